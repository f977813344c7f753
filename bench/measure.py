"""Measuring contenders side by side on a machine that is not alone: interleaved blocks between probes of the peak.

Contenders take turns, A B A B, in one process, so that whatever slows the machine slows both. Before and after each
block a probe measures the peak of fused multiply-adds (float32, the instruction set and threads in use); a block beside
a low probe shared the processor with something else and is dropped. What is left is summarised by its median.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from pyperc import _C

if TYPE_CHECKING:
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

WARM_UP = 0.5  # s; clocks and caches settle in less
BLOCK = 0.02  # s; long against the clock, short against a slow neighbour's time slice
PROBE = 0.002  # s
LOW = 0.85  # of the best probes: below, the machine was not ours
FEWEST = 5  # blocks for each contender, however long one takes


@dataclass
class Samples:
    """Seconds per call of one contender's blocks, and the lower of the two probes around each, GF/s."""

    seconds: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    dropped: int = 0
    disturbed: bool = False  # too few blocks were left, so all are kept

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        if len(self.seconds) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def beside(self, floor: float) -> Samples:
        """The blocks whose probes reach that floor."""
        kept = [(s, p) for s, p in zip(self.seconds, self.probes, strict=True) if p >= floor]
        return Samples([s for s, _ in kept], [p for _, p in kept], len(self.seconds) - len(kept))


# Of the whole session: a case that is disturbed throughout must not set its own standard.
_best_probes = [0.0]


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, Samples]:
    """Measures each contender for about `seconds`, in turns; up to three times as long where most is disturbed."""
    once = {name: _warm_up(run, WARM_UP / len(contenders)) for name, run in contenders.items()}
    calls = {name: max(1, round(BLOCK / duration)) for name, duration in once.items()}
    samples = {name: Samples() for name in contenders}
    start = time.perf_counter()
    before = _C.probe(PROBE)
    while True:
        for name, run in contenders.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            elapsed = time.perf_counter() - begin
            after = _C.probe(PROBE)
            samples[name].seconds.append(elapsed / calls[name])
            samples[name].probes.append(min(before, after))
            before = after
        probes = sorted(p for s in samples.values() for p in s.probes)
        _best_probes[0] = max(_best_probes[0], probes[int(0.9 * (len(probes) - 1))])
        undisturbed = {name: s.beside(LOW * _best_probes[0]) for name, s in samples.items()}
        enough = all(len(s.seconds) >= FEWEST for s in undisturbed.values())
        spent = (time.perf_counter() - start) / (seconds * len(contenders))
        if spent > 3 and not enough:
            return {name: replace(s, disturbed=True) for name, s in samples.items()}
        if spent > 1 and enough:
            return undisturbed


def _warm_up(run: Callable[[], object], seconds: float) -> float:
    """Runs for that long; the shortest call, in seconds."""
    shortest, end = math.inf, time.perf_counter() + seconds
    while shortest == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


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
    """The timer for pytest.mark.benchmark: two contenders measured in turns become two entries of one group."""
    return _replay()


_measured: dict[tuple[str, str], dict[str, Samples]] = {}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and the least bytes that must move: every operand and result once."""

    flops: float
    bytes: float


def record(
    benchmark: BenchmarkFixture,
    config: pytest.Config,
    *,
    case: str,
    work: str,
    contender: str,
    contenders: Callable[[], dict[str, Callable[[], object]]],
    cost: Cost,
) -> None:
    """One entry of pytest-benchmark: `contender` in the measurement of `case`, which the first entry makes for all."""
    if config.getoption("benchmark_disable"):
        contenders()[contender]()
        benchmark.pedantic(lambda: None)
        return
    key = (case, work)
    if key not in _measured:
        _measured[key] = interleaved(contenders(), float(config.getoption("benchmark_max_time")))
    samples = _measured[key][contender]
    _replay.load(samples.seconds)
    benchmark.group = f"{case}, {work}"
    benchmark.pedantic(lambda: None, rounds=len(samples.seconds))
    probe = statistics.median(samples.probes)
    rate = cost.flops / samples.median / 1e9
    benchmark.extra_info.update(
        case=case,
        work=work,
        contender=contender,
        median=samples.median,
        spread=samples.spread,
        blocks=len(samples.seconds),
        dropped=samples.dropped,
        disturbed=samples.disturbed,
        flops=cost.flops,
        bytes=cost.bytes,
        gflops=rate,
        probe=probe,
        share=rate / probe,
        threads=torch.get_num_threads(),
        isa=_C.isa(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
