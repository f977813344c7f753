"""tanh, sigmoid and gelu, element by element, over torch's; on one thread, the arrays in the second-level cache."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyperc import _C
from pyperc.bench.cases import FLOAT, Cost, Job, Record, Settings, over, timed
from pyperc.bench.measure import Block, calls
from pyperc.bench.text import Table, times

NAME = "elementwise"
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
}
COUNT = 1 << 16


def jobs(settings: Settings) -> list[Job]:
    # An element counts as one operation: the share of the peak means nothing here, and is not shown.
    count = 64 if settings.smoke else COUNT
    return [
        timed(
            NAME,
            name,
            "forward",
            Cost(count, 2 * FLOAT * count),
            partial(contenders, name, count),
            facts={"elements": count},
            threads=1,
        )
        for name in PLAIN
    ]


def contenders(name: str, count: int) -> dict[str, Block]:
    x = 3 * torch.randn(count, generator=torch.Generator().manual_seed(0))
    return {
        "pyperc": calls(lambda: _C.activation(x, name, []), torch.no_grad),
        "eager": calls(lambda: PLAIN[name](x), torch.no_grad),
    }


def tables(records: Sequence[Record]) -> list[Table]:
    found = Table("Elementary functions on one thread, per element", ["", "over torch", "pyperc", "torch"])
    for record in records:
        each = (record["contenders"][name]["seconds"] / record["elements"] for name in ("pyperc", "eager"))
        found.rows.append([record["case"], times(over(record)), *(f"{seconds * 1e9:.3f} ns" for seconds in each)])
    return [found]
