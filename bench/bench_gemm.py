"""The products of one linear layer, x w^T, dx = ds w and dw = ds^T x, by pyperc, torch.mm and numpy: 2 m n k flops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from recording import record, replayed

from pyperc.bench.cases import Job, Record
from pyperc.bench.tables import blas, gemm

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from pyperc.bench.measure import Pace

CONTENDERS = ["pyperc", "eager", "numpy"]
SIZES = [
    *((side, side, side) for side in (256, 512, 1024)),
    (32, 64, 64),
    (64, 256, 784),
    (4096, 256, 256),
]


def product(m: int, n: int, k: int, layout: str) -> Job:
    """With numpy's time beside the others', from a process of its own."""
    job = gemm.product(gemm.NAME, m, n, k, layout)

    def run(pace: Pace) -> list[Record]:
        (found,) = job.run(pace)
        (other,) = blas.measure([(m, n, k, layout)], pace.seconds)
        found["contenders"] |= other["contenders"]
        return [found]

    return Job(job.name, run)


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("layout", gemm.LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=str)
def test_gemm(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, m: int, n: int, k: int, layout: str, contender: str
) -> None:
    record(benchmark, pytestconfig, "gemm", product(m, n, k, layout), contender)
