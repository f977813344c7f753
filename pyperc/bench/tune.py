"""Where one way of computing overtakes another on this machine, beside the thresholds of csrc/cpu/plan.cpp.

For each threshold a ladder of shapes is measured both ways, in turns. The crossing is the first step from which the
second way stays ahead. `_C.plan_override` forces the ways; a build without it lets only some be reached.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyperc import _C
from pyperc.bench.cases import Network
from pyperc.bench.measure import Block, Pace, interleaved
from pyperc.bench.text import Table, duration

__all__ = ["measure", "tables"]

ALWAYS, NEVER = 0.0, 1e18
FORCED = "plan_override"


@dataclass(frozen=True)
class Threshold:
    """Below it the first way, from it on the second."""

    name: str
    """as in plan.cpp, in lower case"""
    what: str
    ladder: Sequence[int]
    ways: tuple[str, str]
    block: Callable[[int, int], Block]
    """(step, which way)"""


def measure(pace: Pace, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The ladders and the crossings, as plain values."""
    found: dict[str, Any] = {"constants": constants(), "thresholds": [], "chunks": [], "hook": hook() is not None}
    smoke = pace.seconds < 0.01
    for threshold in thresholds():
        steps = []
        for step in threshold.ladder[: 2 if smoke else None]:
            if progress:
                progress(f"{threshold.what}: {step}")
            pair = {way: threshold.block(step, i) for i, way in enumerate(threshold.ways)}
            measured = interleaved(pair, pace)
            steps.append({"at": step, "ratio": measured.ratios(*threshold.ways).median})
        found["thresholds"].append(
            {
                "name": threshold.name,
                "what": threshold.what,
                "ways": list(threshold.ways),
                "steps": steps,
                "crossing": crossing(steps),
            }
        )
    if found["hook"]:
        found["chunks"] = chunks(pace, smoke)
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


def hook() -> Callable[[dict[str, float]], dict[str, float]] | None:
    """Replaces thresholds and returns those of before, where this build has it."""
    found: Callable[[dict[str, float]], dict[str, float]] | None = getattr(_C, FORCED, None)
    return found


def constants() -> dict[str, float]:
    """The plan's thresholds: of the build, or as its source has them; {} where there is neither."""
    override = hook()
    if override:
        return override({})
    source = Path(__file__).parents[2] / "csrc" / "cpu" / "plan.cpp"
    if not source.is_file():
        return {}
    found = {}
    for declaration in re.findall(r"constexpr \w+ (.+?);", source.read_text(encoding="utf-8")):
        for name, value in re.findall(r"(\w+) = ([\d.e* ]+)", declaration):
            product = 1.0
            for factor in value.split("*"):
                product *= float(factor)
            found[name.lower()] = product
    return found


def forced(run: Block, **thresholds: float) -> Block:
    """The block with thresholds of its own."""
    override = hook()
    assert override is not None

    def block(repeats: int) -> Sequence[float]:
        before = override(thresholds)
        try:
            return run(repeats)
        finally:
            override(before)

    return block


def thresholds() -> list[Threshold]:
    """What can be measured with this build."""
    override = hook()
    if override is None:
        return [_threads_by_torch(), _dot_by_layout()]
    known = override({})

    def of(network: Network, work: str) -> Block:
        return network.contenders(work)["pyperc"]

    def ways(name: str, first: float, second: float, shape: Callable[[int], tuple[Network, str]]) -> Any:
        return lambda step, way: forced(of(*shape(step)), **{name: (first, second)[way]})

    rows = tuple(range(1, 17))
    every = [
        Threshold(
            "min_parallel_flops",
            "flops from which more threads pay",
            tuple(round(1e5 * 2 ** (i / 2)) for i in range(13)),
            ("one thread", "all threads"),
            ways("min_parallel_flops", NEVER, ALWAYS, lambda f: (Network(max(1, f // 8192), (64, 64)), "forward")),
        ),
        Threshold(
            "min_rows_per_thread",
            "rows for each thread from which rows are shared, not columns",
            rows,
            ("columns", "rows"),
            ways(
                "min_rows_per_thread",
                1e9,
                ALWAYS,
                lambda r: (Network(r * torch.get_num_threads(), (512, 512)), "forward"),
            ),
        ),
        Threshold(
            "dot_rows",
            "rows from which packing beats dot",
            rows[: int(known.get("dot_rows", 0)) or None],
            ("dot", "packed"),
            ways("dot_rows", known.get("dot_rows", 0), ALWAYS, lambda r: (Network(r, (256, 256)), "forward")),
        ),
        Threshold(
            "few_rows",
            "rows from which packing a wide matrix pays, backward",
            rows,
            ("in place", "packed"),
            ways("few_rows", 1e9, ALWAYS, lambda r: (Network(r, (1024, 1024)), "forward+backward")),
        ),
        Threshold(
            "max_stride_in_place",
            "bytes between rows from which packing pays, backward",
            tuple(4 * k for k in (136, 264, 520, 776, 1032, 1544, 2056)),
            ("in place", "packed"),
            ways(
                "max_stride_in_place",
                NEVER,
                ALWAYS,
                lambda b: (Network(64, (b // 4, b // 4)), "forward+backward"),
            ),
        ),
        Threshold(
            "wide_bytes",
            "bytes of a row from which dw goes layer by layer",
            tuple(4 * k for k in (128, 256, 512, 768, 1024, 1536)),
            ("chunk by chunk", "by layers"),
            ways("wide_bytes", NEVER, ALWAYS, lambda b: (Network(4 * (b // 4), (b // 4,) * 3), "forward+backward")),
        ),
    ]
    return [threshold for threshold in every if threshold.name in known]


def _threads_by_torch() -> Threshold:
    """Above the constant alone: below it the plan takes one thread whatever torch has."""
    threads = torch.get_num_threads()

    def block(flops: int, way: int) -> Block:
        run = Network(max(1, flops // 8192), (64, 64)).contenders("forward")["pyperc"]

        def with_threads(repeats: int) -> Sequence[float]:
            torch.set_num_threads((1, threads)[way])
            try:
                return run(repeats)
            finally:
                torch.set_num_threads(threads)

        return with_threads

    least = constants().get("min_parallel_flops", 8e5)
    ladder = tuple(round(least * 2 ** (i / 2)) for i in range(1, 9))
    return Threshold(
        "min_parallel_flops", "flops from which more threads pay", ladder, ("one thread", "all threads"), block
    )


def _dot_by_layout() -> Threshold:
    """`dot` reads rows of w; a w whose columns are contiguous sends the same product to the tiles, without packing."""
    chain = _C.Chain([("identity", [])])

    def block(rows: int, way: int) -> Block:
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(rows, 256, generator=generator), torch.randn(256, 256, generator=generator)
        weight = w.t().contiguous().t() if way else w

        def run(repeats: int) -> tuple[float]:
            with torch.no_grad():
                start = time.perf_counter()
                for _ in range(repeats):
                    _C.mlp(x, [weight], [None], chain)
                return (time.perf_counter() - start,)

        return run

    return Threshold(
        "dot_rows",
        "rows from which tiles on a transposed w beat a w as it is",
        (1, 2, 3, 4, 6, 8, 12, 16),
        ("as it is", "transposed"),
        block,
    )


def chunks(pace: Pace, smoke: bool) -> list[dict[str, Any]]:
    """Seconds of forward and backward for chunks of a few sizes."""
    found = []
    for network in [Network(8, (4,) * 3)] if smoke else [Network(4096, (width,) * 4) for width in (64, 256, 512)]:
        steps = (14, 28) if smoke else (56, 112, 168, 224, 280, 336, 392, 504, 672)
        run = network.contenders("forward+backward")["pyperc"]
        measured = interleaved({str(c): forced(run, min_chunk=c, max_chunk=c) for c in steps}, pace)
        seconds = {name: statistics.median(samples.seconds) for name, samples in measured.samples.items()}
        found.append({"case": network.name, "seconds": seconds, "best": int(min(seconds, key=lambda c: seconds[c]))})
    return found


def tables(result: dict[str, Any]) -> str:
    """The crossings beside the constants, and the ladders."""
    known = result["constants"]
    summary = Table("Thresholds of the plan", ["", "name", "now", "crossing here"])
    ladders = []
    for each in result["thresholds"]:
        now = known.get(each["name"])
        at = each["crossing"]
        first, last = each["steps"][0]["at"], each["steps"][-1]["at"]
        here = f"above {last:g}" if at is None else f"{at:g} or less" if at == first else f"{at:g}"
        summary.rows.append([each["what"], each["name"], "-" if now is None else f"{now:g}", here])
        slow, fast = each["ways"]
        ladder = Table(f"{each['name']}: time of {slow} over {fast}", ["at", "ratio"])
        ladder.rows = [[f"{step['at']:g}", f"{step['ratio']:.2f}"] for step in each["steps"]]
        ladders.append(ladder)
    rest = [name for name in known if name not in {each["name"] for each in result["thresholds"]}]
    if rest:
        summary.notes.append("others now: " + ", ".join(f"{name} {known[name]:g}" for name in rest))
    for each in result["chunks"]:
        table = Table(f"rows of a chunk, {each['case']}: best {each['best']}", ["rows", "forward and backward"])
        table.rows = [[rows, duration(seconds)] for rows, seconds in each["seconds"].items()]
        ladders.append(table)
    if not result["hook"]:
        summary.notes.append(
            f"this build has no _C.{FORCED}: threads are measured above the constant alone, dot by the weight's layout"
        )
    return "\n\n".join(table.text() for table in [summary, *ladders])
