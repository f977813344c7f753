"""How the cost grows: forward and backward against batch, width and depth, over three decades each."""

from collections.abc import Sequence
from functools import partial

from pyperc.bench.cases import Job, Network, Record, Settings, label, over, timed
from pyperc.bench.text import Table, duration, of_peak, times

NAME = "growth"
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def networks(settings: Settings) -> dict[str, list[Network]]:
    """Along each axis, the network that grows."""
    steps = (1, 2) if settings.smoke else STEPS if settings.full else STEPS[::2]
    return {
        "batch": [Network(8 * step, (256,) * 4) for step in steps],
        "width": [Network(64, (4 * step,) * 3) for step in steps],
        "depth": [Network(32, (64,) * (step + 1)) for step in steps],
    }


def jobs(settings: Settings) -> list[Job]:
    if not (settings.full or settings.growth or settings.smoke):
        return []
    return [
        timed(
            NAME,
            f"{axis} {at(axis, network)}",
            "forward+backward",
            network.cost("forward+backward"),
            partial(network.contenders, "forward+backward"),
            facts={**network.facts(), "axis": axis, "at": at(axis, network)},
            count=1,
        )
        for axis, along in networks(settings).items()
        for network in along
    ]


def at(axis: str, network: Network) -> int:
    return {"batch": network.batch, "width": network.sizes[0], "depth": len(network.pairs)}[axis]


def tables(records: Sequence[Record]) -> list[Table]:
    found = Table("How the cost grows: forward and backward", ["", "over eager", "pyperc", "at peak", "of peak"])
    for record in records:
        ours = record["contenders"]["pyperc"]
        floor = duration(record["flops"] / record["probe"] / 1e9)
        found.rows.append(
            [label(record), times(over(record)), duration(ours["seconds"]), floor, of_peak(ours["share"])]
        )
    if records:
        found.notes.append("Batch: [256]*4. Width: 64 x [width]*3. Depth: 32 x [64]*(depth + 1). relu.")
    return [found]
