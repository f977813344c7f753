"""Multi-layer perceptrons, fused and plain: forward without a graph, forward and backward, a step of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from recording import record, replayed

from pyperc.bench.cases import timed
from pyperc.bench.tables import mlp
from pyperc.compare import stepper

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from pyperc.bench.cases import Job, Network, Settings

NETWORKS = pytest.mark.parametrize("network", mlp.TRAINED, ids=lambda network: network.name)


def step(network: Network) -> Job:
    """Forward, backward and the step of SGD; the flops are those of forward and backward."""
    x, dy = network.data()
    return timed(
        "step",
        network.name,
        "step",
        network.cost("forward+backward"),
        lambda: {name: stepper(model, x, dy) for name, model in network.models().items()},
        facts=network.facts(),
    )


@pytest.mark.benchmark(timer=replayed)
@NETWORKS
def test_forward(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, settings: Settings, network: Network, contender: str
) -> None:
    record(benchmark, pytestconfig, "mlp forward", mlp.job(network, "forward", settings), contender)


@pytest.mark.benchmark(timer=replayed)
@NETWORKS
def test_backward(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, settings: Settings, network: Network, contender: str
) -> None:
    record(benchmark, pytestconfig, "mlp backward", mlp.job(network, "forward+backward", settings), contender)


@pytest.mark.benchmark(timer=replayed)
@NETWORKS
def test_step(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, network: Network, contender: str) -> None:
    record(benchmark, pytestconfig, "step", step(network), contender)
