"""The three products of a linear layer over torch.mm, on squares: x w^T, dx = ds w, dw = ds^T x; 2 m n k flops each."""

from collections.abc import Callable, Sequence

import torch

from pyperc import _C
from pyperc.bench.cases import FLOAT, Cost, Job, Record, Settings, label, over, timed
from pyperc.bench.measure import Block, calls
from pyperc.bench.text import Table, of_peak, times

NAME = "gemm"
LAYOUTS = {"forward": "x w^T", "dx": "ds w", "dw": "ds^T x"}


def jobs(settings: Settings) -> list[Job]:
    largest = 64 if settings.smoke else 4096 if settings.full else 1024
    sides = [side for side in (64, 256, 512, 1024, 2048, 4096) if side <= largest and (side > 64 or settings.smoke)]
    return [product(NAME, side, side, side, layout) for side in sides for layout in LAYOUTS]


def product(
    table: str, m: int, n: int, k: int, layout: str, *, threads: int | None = None, isa: str | None = None
) -> Job:
    """One product of a layer k -> n on m samples."""
    facts = {"m": m, "n": n, "k": k}
    return timed(
        table,
        name(m, n, k),
        layout,
        Cost(2 * m * n * k, FLOAT * (m * k + n * k + m * n)),
        lambda: contenders(m, n, k, layout),
        facts=facts,
        threads=threads,
        isa=isa,
    )


def name(m: int, n: int, k: int) -> str:
    return str(m) if m == n == k else f"{m} x {k}->{n}"


def contenders(m: int, n: int, k: int, layout: str) -> dict[str, Block]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (m, n)))
    plain: dict[str, Callable[[], object]] = {
        "forward": lambda: torch.mm(x, w.t()),
        "dx": lambda: torch.mm(dy, w),
        "dw": lambda: torch.mm(dy.t(), x),
    }
    ours: Callable[[], object]
    if layout == "forward":
        chain = _C.Chain([("identity", [])])
        ours = lambda: _C.mlp(x, [w], [None], chain)  # noqa: E731
    else:
        saved, needs = [torch.empty(m, n)], [layout == "dx", layout == "dw", False]
        backward = torch.ops.pyperc.mlp_backward.default
        ours = lambda: backward(dy, x, [w], saved, ["identity"], [], needs)  # noqa: E731
    # In inference mode the operator is the kernel and not its differentiable composition.
    return {"pyperc": calls(ours, torch.inference_mode), "eager": calls(plain[layout], torch.inference_mode)}


def tables(records: Sequence[Record]) -> list[Table]:
    return [table("Products of squares: share of the FMA peak, and ratio to torch.mm", records)]


def table(title: str, records: Sequence[Record]) -> Table:
    """A row for each size, with the three layouts beside each other."""
    header = ["m = n = k", *(f"{LAYOUTS[w]} {what}" for w in LAYOUTS for what in ("of peak", "over torch"))]
    found = Table(title, header)
    for case in dict.fromkeys(record["case"] for record in records):
        works = {record["work"]: record for record in records if record["case"] == case}
        row = [max(map(label, works.values()), key=len)]
        for work in LAYOUTS:
            record = works.get(work)
            row += [of_peak(record["contenders"]["pyperc"]["share"]), times(over(record))] if record else ["-", "-"]
        found.rows.append(row)
    return found
