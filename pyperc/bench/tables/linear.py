"""One linear layer with its activation, without a graph."""

from collections.abc import Sequence

from pyperc.bench.cases import Job, Network, Record, Settings, timed
from pyperc.bench.tables.mlp import table
from pyperc.bench.text import Table

NAME = "linear"
SHAPES = {
    "relu": [(32, 64, 64), (32, 256, 256), (128, 256, 256), (1024, 512, 512), (4096, 128, 128)],
    "gelu": [(128, 256, 256), (4096, 128, 128)],
    "tanh": [(128, 256, 256), (4096, 128, 128)],
}


def networks(settings: Settings) -> list[Network]:
    if settings.smoke:
        return [Network(3, (4, 5), "relu", "relu")]
    return [Network(m, (k, n), name, name) for name, shapes in SHAPES.items() for m, k, n in shapes]


def jobs(settings: Settings) -> list[Job]:
    return [job(network, settings) for network in networks(settings)]


def job(network: Network, settings: Settings) -> Job:
    return timed(
        NAME,
        network.name,
        "forward",
        network.cost("forward"),
        lambda: network.contenders("forward", settings.compiler),
        facts=network.facts(),
        count=settings.count,
        seconds=settings.compiling,
    )


def tables(records: Sequence[Record]) -> list[Table]:
    return [table("Linear and activation, no grad", records)]
