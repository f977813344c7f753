"""Whole networks: forward and backward through torch.autograd.grad (dx, dw, db), and inference."""

from collections.abc import Sequence

from pyperc.bench.cases import Job, Network, Record, Settings, label, over, relu, timed
from pyperc.bench.text import Table, duration, of_peak, operations, size, times

NAME = "mlp"
TRAINED = [
    *relu(
        (1, [64] * 4),
        (32, [64] * 4),
        (64, [784, 256, 256, 10]),
        (128, [128] * 5),
        (256, [512] * 5),
        (1024, [1024] * 4),
        (4096, [256] * 4),
        (1024, [64] * 4),
    ),
    *relu((32, [64] * 4), (128, [128] * 5), (4096, [256] * 4), activation="tanh"),
]
INFERRED = relu((1, [64] * 4), (32, [64] * 4), (128, [128] * 5))


def jobs(settings: Settings) -> list[Job]:
    if settings.smoke:
        return [job(Network(3, (4, 5, 2)), work, settings) for work in ("forward+backward", "forward")]
    trained = [job(network, "forward+backward", settings) for network in TRAINED]
    return trained + [job(network, "forward", settings) for network in INFERRED]


def job(network: Network, work: str, settings: Settings) -> Job:
    return timed(
        NAME,
        network.name,
        work,
        network.cost(work),
        lambda: network.contenders(work, settings.compiler),
        facts=network.facts(),
        count=settings.count,
        seconds=settings.compiling,
    )


def tables(records: Sequence[Record]) -> list[Table]:
    return [
        table("Forward and backward (dx, dw, db), batch x sizes", [r for r in records if r["work"] != "forward"]),
        table("Inference, no grad, batch x sizes", [r for r in records if r["work"] == "forward"]),
    ]


def table(title: str, records: Sequence[Record]) -> Table:
    """Times, ratios and shares, operations and bytes; with torch.compile where it was measured."""
    compiled = any("compile" in record["ratios"] for record in records)
    others = ["eager", *["compile"] * compiled]
    found = Table(title, ["", *(f"over {name}" for name in others), "pyperc", *others, "of peak", "flops", "bytes"])
    for record in records:
        contenders = record["contenders"]
        row = [label(record), *(times(over(record, name)) for name in others)]
        for name in ("pyperc", *others):
            row.append(duration(contenders[name]["seconds"]) if name in contenders else "-")
        share = of_peak(contenders["pyperc"]["share"])
        found.rows.append([*row, share, operations(record["flops"]), size(record["bytes"])])
    return found
