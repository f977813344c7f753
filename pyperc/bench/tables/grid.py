"""Any shape: a grid of batches, widths, depths and activations; every point that is slower than eager is listed."""

import itertools
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyperc
from pyperc.bench.cases import Job, Network, Record, Settings, middle
from pyperc.bench.measure import Pace, interleaved
from pyperc.bench.text import Table

NAME = "grid"
SECONDS, PARTS = 200.0, 10
"""Of all parts together, each a case of its own."""
BATCHES = (1, 2, 8, 32, 128, 512, 2048, 8192)
WIDTHS = (1, 3, 16, 64, 256, 1024, 4096)
LAYERS = (1, 2, 4, 8)
WORKS = ("forward", "forward+backward")
MOST_FLOPS = 4_000_000_000
MOST_PARAMETERS = 1 << 25
"""Beyond, one point would take the time of a hundred."""

SHORT = Pace(0.008, warm_up=0.004, block=0.002, probe=0.0005, fewest=3, patience=2.0)
CLOSE = 1.05
"""A ratio that was measured briefly and is below is measured again."""
AGAIN = Pace(0.15, warm_up=0.02, block=0.005, probe=0.001, fewest=7)


def points() -> list[tuple[Network, str]]:
    """Every point that fits, in an order that is random and always the same."""
    found = []
    for batch, width, layers, name, work in itertools.product(BATCHES, WIDTHS, LAYERS, pyperc.activations(), WORKS):
        # A single layer has its activation behind it; more have it between them.
        network = Network(batch, (width,) * (layers + 1), name, name if layers == 1 else "identity")
        if network.cost(work).flops <= MOST_FLOPS and network.parameters <= MOST_PARAMETERS:
            found.append((network, work))
    random.Random(0).shuffle(found)
    return found


def jobs(settings: Settings) -> list[Job]:
    if settings.smoke:
        return [Job("two points", lambda pace: [sweep("two points", points()[:2], 1e9, SHORT, pace)], weight=0)]
    if not settings.full:
        return []
    return [part(i) for i in range(PARTS)]


def part(i: int) -> Job:
    name, seconds = f"part {i + 1} of {PARTS}", SECONDS / PARTS
    run = partial(sweep, name, points()[i::PARTS], seconds, SHORT, AGAIN)
    return Job(name, lambda pace: [run()], weight=0, seconds=seconds)


def sweep(case: str, every: Sequence[tuple[Network, str]], seconds: float, short: Pace, again: Pace) -> Record:
    """Measures points briefly for four fifths of the time, and those that were slower once more, at length."""
    start = time.perf_counter()
    measured: list[tuple[Network, str, dict[str, Any]]] = []
    for network, work in every:
        if time.perf_counter() > start + 0.8 * seconds:
            break
        measured.append((network, work, point(network, work, short)))
    slower = sorted((m for m in measured if m[2]["ratio"] < CLOSE), key=lambda m: float(m[2]["ratio"]))
    for network, work, found in slower:
        if time.perf_counter() > start + seconds:
            break
        found.update(point(network, work, again), again=True)
    return {"table": NAME, "case": case, "work": "both", "points": [m[2] for m in measured], "of": len(every)}


def point(network: Network, work: str, pace: Pace) -> dict[str, Any]:
    """The ratio; where it is below 1, all that the table says about it."""
    measurement = interleaved(network.contenders(work), pace)
    ratio = measurement.ratios("eager", "pyperc")
    layers = len(network.pairs)
    found: dict[str, Any] = {"batch": network.batch, "width": network.sizes[0], "layers": layers}
    found |= {"activation": network.activation, "work": work, "ratio": ratio.median}
    if ratio.median < CLOSE:
        found |= {"case": network.name, "lower": ratio.lower, "upper": ratio.upper, "again": False}
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    if not records:
        return []
    measured = [point for record in records for point in record["points"]]
    slower = sorted((p for p in measured if p["ratio"] < 1), key=lambda p: float(p["ratio"]))
    found = Table("Any shape: the points slower than eager", ["", "work", "over eager", "quartiles", "measured"])
    for p in slower:
        between = f"{p['lower']:.2f} to {p['upper']:.2f}"
        row = [p["case"], p["work"], f"{p['ratio']:.3f}", between, "at length" if p["again"] else "briefly"]
        found.rows.append(row)
    ratio = middle([p["ratio"] for p in measured])
    least = min((p["ratio"] for p in measured), default=0.0)
    axes = (("batch", BATCHES), ("widths", WIDTHS), ("layers", LAYERS))
    spans = ", ".join(f"{name} {values[0]} to {values[-1]}" for name, values in axes)
    found.notes = [
        f"{len(measured)} of {sum(record['of'] for record in records)} points measured ({spans}, every activation), "
        f"each briefly first: {len(slower) or 'none'} slower than eager; least ratio {least:.2f}, median {ratio:.2f}."
    ]
    return [found]
