"""The products of one linear layer against torch.mm: x w^T, dx = ds w, dw = ds^T x; each costs 2 m n k flops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from measure import Cost, record, replayed

from pyperc import _C

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SIZES = [
    (32, 64, 64),
    (64, 256, 784),
    (128, 128, 128),
    (256, 512, 512),
    (4096, 256, 256),
    (1024, 1024, 1024),
]
PRODUCTS = ["forward", "dx", "dw"]


def contenders(m: int, n: int, k: int, product: str) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    if product == "forward":
        chain = _C.Chain([("identity", [])])
        return {"pyperc": lambda: _C.mlp(x, [w], [None], chain), "eager": lambda: torch.mm(x, w.t())}
    saved = [torch.empty(m, n)]
    needs = [product == "dx", product == "dw", False]
    backward = torch.ops.pyperc.mlp_backward.default

    def kernel() -> object:
        # Below autograd, where the operator is the kernel and not its differentiable composition.
        with torch.inference_mode():
            return backward(dy, x, [w], saved, ["identity"], [], needs)

    return {
        "pyperc": kernel,
        "eager": {"dx": lambda: torch.mm(dy, w), "dw": lambda: torch.mm(dy.t(), x)}[product],
    }


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("contender", ["pyperc", "eager"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=lambda size: str(size))
def test_gemm(
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    m: int,
    n: int,
    k: int,
    product: str,
    contender: str,
) -> None:
    record(
        benchmark,
        pytestconfig,
        case=f"linear {m} x {k} -> {n}",
        work=product,
        contender=contender,
        contenders=lambda: contenders(m, n, k, product),
        cost=Cost(2.0 * m * n * k, 4.0 * (m * k + n * k + m * n)),
    )
