"""Hands what `pyperc.bench` measures to pytest-benchmark: contenders measured in turns are entries of one group."""

from __future__ import annotations

import datetime
import functools
import importlib
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pyperc.bench import machine
from pyperc.bench.measure import Pace

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from pyperc.bench.cases import Job, Record


class _Replay:
    """A clock that makes pytest-benchmark time a call that does nothing at the durations measured here."""

    def __init__(self) -> None:
        self.now, self.durations, self.running = 0.0, iter(()), False

    def load(self, durations: Sequence[float]) -> None:
        self.durations, self.running = iter(durations), False

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.durations, 0.0)
        self.running = not self.running
        return self.now


_replay = _Replay()


def replayed() -> float:
    """The timer for pytest.mark.benchmark."""
    return _replay()


_measured: dict[tuple[str, str], Record] = {}


@functools.cache
def _machine() -> dict[str, Any]:
    return machine.machine(Pace())


@functools.cache
def _versions() -> dict[str, str]:
    modules = [importlib.import_module(name) for name in ("pyperc", "torch", "numpy", "pytest_benchmark")]
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def record(benchmark: BenchmarkFixture, config: pytest.Config, group: str, job: Job, contender: str) -> None:
    """One entry: `contender` in the measurement of the job, which the first entry makes for all of them."""
    if config.getoption("benchmark_disable"):
        job.run(Pace(0.001, warm_up=0.001, block=0.0005, probe=0.0005, fewest=1, patience=1.0))
        benchmark.pedantic(lambda: None)
        return
    key = (group, job.name)
    if key not in _measured:
        (_measured[key],) = job.run(Pace(float(config.getoption("benchmark_max_time"))))
    found = _measured[key]
    if contender not in found["contenders"]:
        pytest.skip(f"torch.compile does not work here for {job.name}")
    seconds = found["contenders"][contender]["seconds"]
    _replay.load(found["contenders"][contender]["quartiles"])
    benchmark.group = f"{group}: {job.name}"
    benchmark.pedantic(lambda: None, rounds=3)
    benchmark.extra_info.update(
        contender=contender,
        flops=found["flops"],
        bytes=found["bytes"],
        gflops=found["flops"] / seconds / 1e9,
        share=found["contenders"][contender]["share"],
        versions=_versions(),
        record=found,
        machine=_machine(),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )
