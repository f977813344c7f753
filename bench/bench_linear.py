"""One linear layer with its activation, no grad, fused and plain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from recording import record, replayed

from pyperc.bench.cases import Settings
from pyperc.bench.tables import linear

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from pyperc.bench.cases import Network

SETTINGS = Settings("full")


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("contender", ["pyperc", "eager"])
@pytest.mark.parametrize("network", linear.networks(SETTINGS), ids=lambda network: network.name)
def test_linear(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, network: Network, contender: str) -> None:
    record(benchmark, pytestconfig, "linear", linear.job(network, SETTINGS), contender)
