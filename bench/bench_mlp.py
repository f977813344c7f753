"""Multi-layer perceptrons, fused and plain: forward without a graph, forward and backward, a step of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from recording import record, replayed

from pyperc.bench.cases import timed
from pyperc.bench.measure import calls
from pyperc.bench.tables import mlp
from pyperc.step import TrainStep
from pyperc.train import TorchStep

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from pyperc.bench.cases import Job, Network, Settings
    from pyperc.bench.measure import Block

NETWORKS = pytest.mark.parametrize("network", mlp.TRAINED, ids=lambda network: network.name)


def step(network: Network) -> Job:
    """A step of SGD on the squared error, from the batch to the new weights; the flops are those of its products."""
    x, y = network.data()

    def blocks() -> dict[str, Block]:
        models = network.models()
        ours = TrainStep(models["pyperc"], "mse", lr=1e-9)
        theirs = TorchStep(models["eager"], "mse", "sgd", lr=1e-9)
        return {"pyperc": calls(lambda: ours(x, y)), "eager": calls(lambda: theirs(x, y))}

    return timed("step", network.name, "step", network.cost("forward+backward"), blocks, facts=network.facts())


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
