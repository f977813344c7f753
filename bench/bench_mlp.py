"""Multi-layer perceptrons, fused and plain: forward without a graph, and forward with dx, dw and db through autograd.

A layer of k inputs and n outputs on m samples costs 2 m n k flops forward and 4 m n k backward (dx and dw), so backward
over forward is 2 where arithmetic is all (EE-559, lecture 3.6).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from measure import Cost, record, replayed
from torch import nn

import pyperc

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
CASES = [
    (1, [64] * 4, "relu"),
    (32, [64] * 4, "relu"),
    (64, [784, 256, 256, 10], "relu"),
    (128, [128] * 5, "relu"),
    (1024, [64] * 4, "relu"),
    (256, [512] * 5, "relu"),
    (1024, [1024] * 4, "relu"),
    (4096, [256] * 4, "relu"),
    (32, [64] * 4, "tanh"),
    (128, [128] * 5, "tanh"),
    (4096, [256] * 4, "tanh"),
]


def name(batch: int, sizes: list[int], activation: str) -> str:
    alike = len(set(sizes)) == 1
    return f"{batch} x {f'[{sizes[0]}]*{len(sizes)}' if alike else sizes} {activation}"


def plain(sizes: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(sizes):
        layers += [nn.Linear(k, n), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def cost(batch: int, sizes: list[int], work: str) -> Cost:
    pairs = list(itertools.pairwise(sizes))
    flops = sum(2 * batch * k * n for k, n in pairs)
    parameters = sum(k * n + n for k, n in pairs)
    activations = batch * sum(sizes)
    if work == "forward":
        return Cost(flops, 4 * (parameters + activations))
    # Backward reads the parameters, what forward kept and dy, and writes dx, dw and db.
    return Cost(3 * flops, 4 * (3 * parameters + 2 * activations + batch * (sizes[0] + sizes[-1])))


def contenders(batch: int, sizes: list[int], activation: str, work: str) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    eager = plain(sizes, activation)
    fused = pyperc.fuse(copy.deepcopy(eager))
    x, dy = torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])

    def forward(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return model(x)

        return run

    def forward_and_backward(model: nn.Module) -> Callable[[], object]:
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *model.parameters()]
        return lambda: torch.autograd.grad(model(leaf), leaves, dy)

    make = {"forward": forward, "forward+backward": forward_and_backward}[work]
    return {"pyperc": make(fused), "eager": make(eager)}


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("contender", ["pyperc", "eager"])
@pytest.mark.parametrize("work", ["forward", "forward+backward"])
@pytest.mark.parametrize(("batch", "sizes", "activation"), CASES, ids=[name(*case) for case in CASES])
def test_mlp(
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    batch: int,
    sizes: list[int],
    activation: str,
    work: str,
    contender: str,
) -> None:
    record(
        benchmark,
        pytestconfig,
        case=name(batch, sizes, activation),
        work=work,
        contender=contender,
        contenders=lambda: contenders(batch, sizes, activation, work),
        cost=cost(batch, sizes, work),
    )
