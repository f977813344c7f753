"""Measuring contenders side by side on a machine that is not alone: interleaved blocks between probes of the peak.

Contenders take turns, A B B A, in one process, so that whatever slows the machine slows all. Before and after each
block a probe measures the peak of fused multiply-adds (float32, the instruction set and the threads in use); a block
beside a low probe shared the processor with something else and is dropped. Each round, one block of each contender,
gives a ratio of its own; medians summarise what is left.

How far apart the threads are is measured beside each block, too, by a cache line that goes from one to another and
back. The threads of a virtual machine change places: what one writes and another reads costs several times as much
while their cores have no cache in common, and then no probe is low.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from pyperc import _C

__all__ = ["Block", "Measurement", "Pace", "Quartiles", "Samples", "calls", "interleaved", "quartiles"]

LOW = 0.85
"""Of the best probes: below, the machine was not ours."""

Block: TypeAlias = Callable[[int], Sequence[float]]
"""Makes that many calls; returns the seconds that each part of a call took, over all of them."""


class Quartiles(NamedTuple):
    """The middle half of some measurements."""

    lower: float
    median: float
    upper: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of at least one value.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        Quartiles(lower=2.0, median=3.0, upper=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def calls(run: Callable[[], object], within: Callable[[], AbstractContextManager[object]] = nullcontext) -> Block:
    """Blocks of plain calls, all of them inside one context."""

    def block(repeats: int) -> tuple[float]:
        with within():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start,)

    return block


@dataclass(frozen=True)
class Pace:
    """How long to measure, in seconds where nothing else is said."""

    seconds: float = 1.0
    """for each contender, about; up to `patience` times as long where most blocks are disturbed"""
    warm_up: float = 0.5
    """for all contenders together; clocks and caches settle in less"""
    block: float = 0.02
    """long against the clock's grain, short against a slow neighbour's time slice"""
    probe: float = 0.002
    fewest: int = 5
    """undisturbed rounds, however long one takes"""
    patience: float = 3.0


@dataclass
class Samples:
    """One contender's blocks, round by round."""

    parts: list[tuple[float, ...]] = field(default_factory=list)
    """seconds per call of each part"""
    probes: list[float] = field(default_factory=list)
    """the lower of the two probes around each block, GF/s"""
    kept: list[bool] = field(default_factory=list)
    round_trips: list[float] = field(default_factory=list)
    """after each block, ns"""

    @property
    def seconds(self) -> list[float]:
        """Per call, of the blocks that were kept."""
        return [sum(parts) for parts, kept in zip(self.parts, self.kept, strict=True) if kept]

    def part(self, index: int) -> float:
        """The median of one part, in seconds per call."""
        return statistics.median(p[index] for p, kept in zip(self.parts, self.kept, strict=True) if kept)

    @property
    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        low, middle, high = quartiles(self.seconds)
        return (high - low) / middle

    @property
    def dropped(self) -> int:
        """Blocks beside a low probe."""
        return self.kept.count(False)

    def share(self, flops: float) -> float:
        """Of the probes beside the blocks, for calls of that many floating-point operations; the median."""
        rows = zip(self.parts, self.probes, self.kept, strict=True)
        return statistics.median(flops / sum(parts) / 1e9 / probe for parts, probe, kept in rows if kept)


@dataclass(frozen=True)
class Measurement:
    """What `interleaved` found."""

    samples: dict[str, Samples]
    disturbed: bool
    """too few undisturbed rounds were had, so all are kept"""

    def ratios(self, over: str, under: str, part: int | None = None) -> Quartiles:
        """Time of `over` over that of `under`, of one part or of all together, round by round."""
        a, b = self.samples[over], self.samples[under]
        both = [i for i, kept in enumerate(zip(a.kept, b.kept, strict=True)) if all(kept)]

        def time_of(samples: Samples, i: int) -> float:
            return sum(samples.parts[i]) if part is None else samples.parts[i][part]

        return quartiles([time_of(a, i) / time_of(b, i) for i in both])

    def parts_ratio(self, name: str, over: int, under: int) -> Quartiles:
        """Time of one part over that of another part of the same calls."""
        samples = self.samples[name]
        return quartiles([p[over] / p[under] for p, kept in zip(samples.parts, samples.kept, strict=True) if kept])

    @property
    def probe(self) -> float:
        """The median of the probes beside the kept blocks, GF/s."""
        pairs = [pair for s in self.samples.values() for pair in zip(s.probes, s.kept, strict=True)]
        return statistics.median(probe for probe, kept in pairs if kept)

    @property
    def round_trip(self) -> Quartiles:
        """Of a cache line between the threads and back, beside the kept blocks, ns; 0 with one thread."""
        pairs = [pair for s in self.samples.values() for pair in zip(s.round_trips, s.kept, strict=True)]
        return quartiles([round_trip for round_trip, kept in pairs if kept and round_trip] or [0.0])


# Of the whole process, for an instruction set and a count of threads: a case that is disturbed throughout must not set
# its own standard.
_best: dict[tuple[str, int], float] = {}


def best_probe() -> float:
    """The best probe so far with the instruction set and the threads in use, GF/s."""
    return _best.get((_C.isa(), torch.get_num_threads()), 0.0)


def interleaved(contenders: Mapping[str, Block], pace: Pace) -> Measurement:
    """Measures the contenders in turns; at least one round is kept of each."""
    samples = {name: Samples() for name in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        blocks = [_Filled(block, pace.block) for block in contenders.values()]
        for block in blocks:
            block.warm_up(pace.warm_up / len(blocks))
        turns = list(zip(samples.values(), blocks, strict=True))
        start, rounds = time.perf_counter(), 0
        before = _C.probe(pace.probe)
        while True:
            for each, block in turns[:: -1 if rounds % 2 else 1]:
                parts = block()
                after = _C.probe(pace.probe)
                each.parts.append(parts)
                each.probes.append(min(before, after))
                each.round_trips.append(_C.round_trip())
                before = after
            rounds += 1
            spent = (time.perf_counter() - start) / (pace.seconds * len(contenders))
            if rounds < pace.fewest or spent < 1:
                continue
            enough = _keep(samples) >= pace.fewest
            if enough or spent > pace.patience:
                break
    finally:
        if collecting:
            gc.enable()
    if not enough:
        for each in samples.values():
            each.kept = [True] * rounds
    return Measurement(samples, not enough)


def _keep(samples: dict[str, Samples]) -> int:
    """Marks the blocks beside high probes; the number of rounds of which every block is kept."""
    key = (_C.isa(), torch.get_num_threads())
    probes = sorted(probe for each in samples.values() for probe in each.probes)
    _best[key] = max(_best.get(key, 0.0), probes[int(0.9 * (len(probes) - 1))])
    for each in samples.values():
        each.kept = [probe >= LOW * _best[key] for probe in each.probes]
    return sum(all(kept) for kept in zip(*(each.kept for each in samples.values()), strict=True))


class _Filled:
    """Blocks of as many calls as fill them, by the shortest call so far.

    The first call is none of those: it imports, compiles and allocates. Taken for the pace of all, the import of sympy
    by a process's first backward pass left blocks of one call, beside a cold cache: 93 us for a call of 32.
    """

    def __init__(self, block: Block, seconds: float) -> None:
        self.block, self.seconds, self.shortest = block, seconds, math.inf

    def warm_up(self, seconds: float) -> None:
        """Calls for that long, and at least three times."""
        self.block(1)
        readings, end = 0, time.perf_counter() + seconds
        while readings < 2 or time.perf_counter() < end:
            self()
            readings += 1

    def __call__(self) -> tuple[float, ...]:
        """Seconds per call of each part."""
        repeats = max(1, round(self.seconds / self.shortest))
        parts = tuple(part / repeats for part in self.block(repeats))
        self.shortest = max(1e-9, min(self.shortest, sum(parts)))
        return parts
