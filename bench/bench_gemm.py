"""The products of one linear layer against torch.mm: x w^T, dx = ds w, dw = ds^T x; each costs 2 m n k flops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from recording import record, replayed

from pyperc.bench.tables import gemm

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SIZES = [
    *((side, side, side) for side in (256, 512, 1024)),
    (32, 64, 64),
    (64, 256, 784),
    (4096, 256, 256),
]


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("layout", gemm.LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=str)
def test_gemm(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, m: int, n: int, k: int, layout: str, contender: str
) -> None:
    record(benchmark, pytestconfig, "gemm", gemm.product(gemm.NAME, m, n, k, layout), contender)
