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


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("network", linear.networks(Settings("full")), ids=lambda network: network.name)
def test_linear(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, settings: Settings, network: Network, contender: str
) -> None:
    record(benchmark, pytestconfig, "linear", linear.job(network, settings), contender)
