"""Where one way of computing overtakes another on this machine, beside the thresholds of csrc/cpu/plan.h.

For each threshold a ladder of shapes is measured both ways, forced and in turns. The crossing is the first step from
which the second way stays ahead. Of one that is chosen for memory, not for speed, the table says what that costs in
time.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pyperc import _C
from pyperc.bench.cases import FAR as FAR_APART
from pyperc.bench.cases import Network
from pyperc.bench.measure import Block, Pace, interleaved
from pyperc.bench.text import Table, duration

__all__ = ["PACE", "measure", "tables"]

PACE = Pace(0.2, warm_up=0.06)
NEVER = 1 << 40

CHUNKS = (56, 112, 168, 224, 280, 336, 392, 504, 672)


@dataclass(frozen=True)
class Best:
    """What is best in the middle."""

    what: str
    names: tuple[str, ...]
    """in the plan's table; all have the size that is measured"""
    sizes: tuple[int, ...]
    network: Network
    beside: dict[str, int] = field(default_factory=dict)
    """other thresholds, which let these rule alone"""


BLOCKS = [
    *(
        Best("rows of a chunk", ("least_chunk", "most_chunk"), CHUNKS, Network(4096, (width,) * 4))
        for width in (64, 256, 512)
    ),
    *(
        Best(
            "bytes of a chunk",
            ("chunk_bytes",),
            tuple(1 << i for i in range(16, 22)),
            Network(4096, (width,) * 4),
            {"least_chunk": 1, "most_chunk": NEVER},
        )
        for width in (128, 512)
    ),
    *(
        Best("bytes of a block of columns", ("block_bytes",), tuple(1 << i for i in range(16, 22)), network)
        for network in (Network(256, (512,) * 5), Network(1024, (1024,) * 4))
    ),
    Best(
        "bytes of x and ds packed at once for dw",
        ("scratch_bytes",),
        tuple(1 << i for i in range(16, 22)),
        Network(512, (512,) * 4),
        {"in_place_bytes": 0},
    ),
    Best(
        "bytes of a block of dx's columns",
        ("product_bytes",),
        tuple(1 << i for i in range(20, 25)),
        Network(4096, (2048,) * 3),
    ),
    *(
        Best("bytes of which multiples are kept apart", ("pad_bytes",), (0, 1024, 4096), network)
        for network in (Network(1024, (512,) * 3), Network(1024, (1024,) * 3))
    ),
]


@dataclass(frozen=True)
class Threshold:
    """Below it the first way, from it on the second."""

    name: str
    """in the plan's table"""
    what: str
    ladder: Sequence[int]
    shape: Callable[[int], Network]
    work: str
    ways: dict[str, dict[str, int]]
    """what each is called, and the thresholds that force it"""
    memory: str = ""
    """what the first way holds, where the threshold is chosen to hold less and not for speed"""


def thresholds() -> list[Threshold]:
    """What is measured."""
    threads = torch.get_num_threads()
    shared = {"parallel_flops": 1}
    packed = {"dot_rows": -1, "dot_most": -1}
    rows = tuple(range(1, 17))
    return [
        Threshold(
            "parallel_flops",
            "flops of each thread from which another one pays",
            tuple(round(5e4 * 2 ** (i / 2)) for i in range(13)),
            lambda flops: Network(max(1, flops * threads // 8192), (64, 64)),
            "forward",
            {"one thread": {"parallel_flops": NEVER}, "all threads": shared},
        ),
        Threshold(
            "rows_per_thread",
            "rows of each thread from which rows are shared, not columns",
            (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024),
            lambda each: Network(each * threads, (256, 256)),
            "forward",
            # Without dot_rows, which would share rows either way.
            {
                "columns": {**shared, "columns_bytes": -1, "rows_per_thread": NEVER, "dot_rows": -1},
                "rows": {**shared, "columns_bytes": -1, "rows_per_thread": 0, "dot_rows": -1},
            },
        ),
        Threshold(
            "columns_bytes",
            "bytes of activations from which rows are shared, whatever the weights are",
            tuple(4 * 448 * rows for rows in (64, 128, 256, 512, 1024, 2048)),
            lambda size: Network(size // (4 * 448), (448, 448)),
            "forward",
            {
                "columns": {**shared, "weight_bytes": NEVER, "columns_bytes": NEVER},
                "rows": {**shared, "weight_bytes": NEVER, "columns_bytes": -1, "rows_per_thread": 0},
            },
        ),
        Threshold(
            "weight_bytes",
            "bytes of a weight from which it is packed by blocks",
            tuple(4 * width**2 for width in (128, 192, 256, 384, 512, 768, 1024)),
            lambda size: Network(256, (math.isqrt(size // 4),) * 3),
            "forward",
            {
                "packed at once": {**shared, "weight_bytes": NEVER, "columns_bytes": -1},
                "by blocks": {**shared, "weight_bytes": 0},
            },
        ),
        Threshold(
            "gradient_rows",
            "rows of each thread from which it sums a dw of its own",
            (64, 96, 128, 192, 256, 384, 512, 1024),
            lambda each: Network(each * threads, (64,) * 4),
            "forward+backward",
            {
                "shared dw": {**shared, "gradient_rows": NEVER},
                "own dw": {**shared, "gradient_rows": 0, "peak_percent": NEVER},
            },
        ),
        Threshold(
            "peak_percent",
            "percent of plain torch's peak, held with a dw for each thread, from which dw is shared",
            (85, 90, 100, 120, 150, 200),
            # x of two layers and dx, beside a dw for each thread and packed weights, are so much of what plain torch
            # holds at dw of the last layer, x of two layers and two ds.
            lambda percent: Network(256 * (300 * (threads + 1) - percent) // (4 * percent - 300), (256,) * 4),
            "forward+backward",
            {
                "own dw": {**shared, "gradient_rows": 0, "peak_percent": NEVER},
                "shared dw": {**shared, "gradient_rows": NEVER},
            },
            memory="each thread's own dw is held until all are added",
        ),
        Threshold(
            "wide_bytes",
            "bytes of a row from which dw goes layer by layer",
            tuple(4 * width for width in (128, 256, 512, 768, 1024, 1536)),
            lambda size: Network(size, (size // 4,) * 3),
            "forward+backward",
            {
                "by chunks": {"wide_bytes": NEVER, "gradient_rows": 0, "peak_percent": NEVER},
                "by layers": {"wide_bytes": 0},
            },
        ),
        Threshold(
            "packed_bytes",
            "bytes of outputs from which one thread goes layer by layer",
            tuple(3 * 4 * 64 * batch for batch in (16, 32, 64, 96, 120)),
            lambda size: Network(size // (3 * 4 * 64), (64,) * 4),
            "forward+backward",
            # By wide_bytes, as packed_bytes would also change the forward pass.
            {
                "by rows": {"parallel_flops": NEVER, "gradient_rows": 0, "packed_bytes": NEVER},
                "by layers": {"parallel_flops": NEVER, "wide_bytes": 0, "packed_bytes": NEVER},
            },
        ),
        Threshold(
            "packed_bytes",
            "bytes of weights, beyond a layer's activations, from which they are packed in pieces",
            tuple(4 * 64**2 * layers for layers in (1, 2, 4, 8, 16)),
            lambda size: Network(64, (64,) * (size // (4 * 64**2) + 2)),
            "forward+backward",
            {
                "packed at once": {**shared, "columns_bytes": -1, "wide_bytes": 0, "packed_bytes": NEVER},
                "in pieces": {**shared, "columns_bytes": -1, "wide_bytes": 0, "packed_bytes": 0},
            },
            memory="all weights that are packed at once are held",
        ),
        Threshold(
            "rows_at_once",
            "rows of a batch whose hidden activations wait for one another",
            (2048, 4096, 8192),
            lambda rows: Network(rows, (1024,) * 4),
            "forward",
            {"all at once": {"rows_at_once": NEVER}, "in pieces": {"rows_at_once": 1024}},
            memory="the hidden activations of all rows are held, of two layers",
        ),
        Threshold(
            "in_place_bytes",
            "bytes between rows from which packing pays",
            tuple(4 * width for width in (40, 72, 136, 264, 520, 776, 1032, 1544, 2056)),
            lambda size: Network(64, (size // 4,) * 2),
            "forward+backward",
            {
                "in place": {"in_place_bytes": NEVER, "few_rows": -1},
                "packed": {"in_place_bytes": -1, "few_rows": -1},
            },
        ),
        Threshold(
            "dot_rows",
            "rows from which packing beats dot in short sums",
            rows,
            lambda m: Network(m, (64, 64)),
            "forward",
            {"dot": {"dot_rows": NEVER}, "packed": packed},
        ),
        Threshold(
            "dot_most",
            "rows from which packing beats dot in long sums",
            (4, 8, 12, 16, 24, 32, 48, 64),
            lambda m: Network(m, (1024, 1024)),
            "forward",
            {"dot": {"dot_rows": NEVER}, "packed": packed},
        ),
        Threshold(
            "dot_terms",
            "terms of a sum for each row from which dot pays",
            (4, 8, 16, 32, 64),
            lambda terms: Network(8, (8 * terms, 256)),
            "forward",
            {"packed": packed, "dot": {"dot_most": NEVER, "dot_terms": 0}},
        ),
        Threshold(
            "few_rows",
            "rows from which packing wide rows pays",
            rows,
            lambda m: Network(m, (1032, 1032)),
            "forward+backward",
            {
                "in place": {"few_rows": NEVER, "in_place_bytes": -1},
                "packed": {"few_rows": -1, "in_place_bytes": -1},
            },
        ),
    ]


def forced(run: Block, values: dict[str, int]) -> Block:
    """The block with thresholds of its own."""

    def block(repeats: int) -> Sequence[float]:
        before = _C.thresholds()
        _C.set_thresholds(values)
        try:
            return run(repeats)
        finally:
            _C.set_thresholds(before)

    return block


def measure(pace: Pace, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The ladders and the crossings, as plain values."""
    smoke = pace.seconds < 0.01
    found: dict[str, Any] = {"now": _C.thresholds(), "thresholds": [], "blocks": []}
    for each in thresholds():
        steps = []
        for step in each.ladder[: 2 if smoke else None]:
            if progress:
                progress(f"{each.what}: {step}")
            run = each.shape(step).contenders(each.work)["pyperc"]
            pair = {way: forced(run, values) for way, values in each.ways.items()}
            first, second = pair
            measured = interleaved(pair, pace)
            ratio = measured.ratios(first, second).median
            steps.append({"at": step, "ratio": ratio, "round_trip": measured.round_trip.median})
        entry = {"name": each.name, "what": each.what, "ways": [*each.ways], "memory": each.memory, "steps": steps}
        found["thresholds"].append({**entry, "crossing": crossing(steps)})
    for best in {best.what: best for best in BLOCKS}.values() if smoke else BLOCKS:
        if progress:
            progress(f"{best.what}: {best.network.name}")
        found["blocks"].append(blocks(replace(best, network=Network(8, (4,) * 3)) if smoke else best, pace))
    if progress:
        progress("")
    return found


def crossing(steps: Sequence[dict[str, Any]]) -> int | None:
    """The first step from which the second way is the faster on every later one, too; None where it never is.

    Example:
        >>> crossing([{"at": 1, "ratio": 1.1}, {"at": 2, "ratio": 0.9}, {"at": 4, "ratio": 1.2}])
        4
    """
    first = None
    for step in reversed(steps):
        if step["ratio"] <= 1:
            break
        first = int(step["at"])
    return first


def price(each: dict[str, Any], now: int) -> str:
    """What a threshold that is chosen for memory costs in time, on the steps that it sends the second way.

    Example:
        >>> steps = [{"at": 1, "ratio": 0.5}, {"at": 2, "ratio": 0.8}, {"at": 4, "ratio": 1.1}]
        >>> of = {"name": "room", "ways": ["at once", "in parts"], "memory": "all is held", "steps": steps}
        >>> price(of, 1)
        'room is chosen for memory, as all is held: above 1, in parts takes up to 1.25 times as long as at once.'
    """
    first, second = each["ways"]
    ratios = [step["ratio"] for step in each["steps"] if step["at"] > now]
    cost = f"{second} takes up to {1 / min(ratios):.2f} times as long as {first}" if ratios else "nothing was measured"
    return f"{each['name']} is chosen for memory, as {each['memory']}: above {now}, {cost}."


def blocks(best: Best, pace: Pace) -> dict[str, Any]:
    """Seconds of forward and backward for blocks of a few sizes."""
    run = best.network.contenders("forward+backward")["pyperc"]
    sizes = {str(size): forced(run, {**best.beside, **dict.fromkeys(best.names, size)}) for size in best.sizes}
    measured = interleaved(sizes, pace)
    seconds = {name: statistics.median(samples.seconds) for name, samples in measured.samples.items()}
    fastest = int(min(seconds, key=lambda size: seconds[size]))
    return {"what": best.what, "names": [*best.names], "case": best.network.name, "seconds": seconds, "best": fastest}


def tables(result: dict[str, Any]) -> str:
    """The crossings beside the thresholds in force, and the ladders."""
    now = result["now"]
    summary = Table("Thresholds of the plan", ["", "name", "now", "crossing here"])
    ladders = []
    for each in result["thresholds"]:
        at, first, last = each["crossing"], each["steps"][0]["at"], each["steps"][-1]["at"]
        here = f"above {last}" if at is None else f"{at} or less" if at == first else f"{at}"
        summary.rows.append([each["what"], each["name"], str(now[each["name"]]), here])
        slow, fast = each["ways"]
        ladder = Table(f"{each['name']}: time of {slow} over {fast}", ["at", "ratio", "threads apart"])
        for step in each["steps"]:
            ladder.rows.append([str(step["at"]), f"{step['ratio']:.2f}", f"{step['round_trip']:.0f} ns"])
        ladders.append(ladder)
    summary.notes.append(
        "Up to columns_bytes, peak_percent, packed_bytes, in_place_bytes, dot_rows, dot_most and few_rows inclusive, "
        "the first way is taken."
    )
    summary.notes.append(
        f"Threads apart: a cache line's way from one to another and back. Above {FAR_APART:.0f} ns their cores have no "
        "cache in common, and what one writes and another reads costs more."
    )
    summary.notes += [price(each, now[each["name"]]) for each in result["thresholds"] if each["memory"]]
    for each in result["blocks"]:
        there = ", ".join(f"{name} {now[name]}" for name in each["names"])
        title = f"{each['what']}, {each['case']}: best {each['best']}, now {there}"
        table = Table(title, ["", "forward and backward"])
        table.rows = [[size, duration(seconds)] for size, seconds in each["seconds"].items()]
        ladders.append(table)
    return "\n\n".join(table.text() for table in [summary, *ladders])
