"""Linear layers in bfloat16 and float16, without a graph; the share is of the float32 peak, which they may exceed."""

from collections.abc import Sequence
from functools import partial

import torch

from pyperc.bench.cases import Job, Network, Record, Settings, timed
from pyperc.bench.tables.mlp import table
from pyperc.bench.text import Table

NAME = "halves"
SHAPES = [(32, 64, 64), (128, 256, 256), *((side, side, side) for side in (512, 1024, 2048))]


def networks(settings: Settings) -> list[Network]:
    shapes = [(3, 4, 5)] if settings.smoke else SHAPES if settings.full else SHAPES[:4]
    dtypes = (torch.bfloat16, torch.float16) if settings.full else (torch.bfloat16,)
    return [Network(m, (k, n), "relu", "relu", dtype) for dtype in dtypes for m, k, n in shapes]


def jobs(settings: Settings) -> list[Job]:
    return [
        timed(
            NAME,
            network.name,
            "forward",
            network.cost("forward"),
            partial(network.contenders, "forward"),
            facts=network.facts(),
        )
        for network in networks(settings)
    ]


def tables(records: Sequence[Record]) -> list[Table]:
    return [table("Linear and relu in 16 bits, no grad; share of the float32 peak", records)]
