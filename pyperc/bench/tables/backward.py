"""Backward over forward: counted operations, and measured times; for small networks, what the rest is.

Counted, backward costs twice forward, less the first layer's dx where the input needs none (EE-559, lecture 3.6).
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyperc.bench.cases import Job, Network, Record, Settings, add, label, using
from pyperc.bench.measure import Block, Pace, interleaved
from pyperc.bench.text import Table, duration

NAME = "backward"
SMALL = 20_000_000
"""Floating-point operations of a forward pass, below which the floor of the call is measured beside it."""
FLOOR = "floor"
NODE = "one node"


def networks(settings: Settings) -> list[Network]:
    if settings.smoke:
        return [Network(3, (4, 5, 2))]
    depths = range(1, 9) if settings.full else (1, 2, 4, 8)
    found = [Network(m, (k,) * (depth + 1)) for m, k in ((256, 512), (32, 64)) for depth in depths]
    return [*found, Network(1024, (1024,) * 4)]


def jobs(settings: Settings) -> list[Job]:
    return [job(network, settings) for network in networks(settings)]


def job(network: Network, settings: Settings) -> Job:
    def run(pace: Pace) -> list[Record]:
        with using(settings.threads, None):
            x, dy = network.data()
            models = network.models()
            if settings.compiler:
                models |= settings.compiler.compiled(network.plain(), x, with_backward=True)
            return [record(network, models, x, dy, dx, pace) for dx in (True, False)]

    contenders = settings.count + (3 if network.forward_flops < SMALL else 0)
    return Job(f"{network.name}, backward over forward", run, 2.0 * contenders, settings.compiling)


def record(network: Network, models: dict[str, nn.Module], x: Tensor, dy: Tensor, dx: bool, pace: Pace) -> Record:
    """With or without dx of the input."""
    contenders = {name: block(model, x, dy, dx) for name, model in models.items()}
    if network.forward_flops < SMALL:
        floor = Network(1, (1,) * len(network.sizes), network.activation)
        for name, model in floor.models().items():
            contenders[f"{name} {FLOOR}"] = block(model, *floor.data(), dx)
        contenders[NODE] = block(_Node(), *floor.data(), dx=True)
    measured = interleaved(contenders, pace)
    found: Record = {"table": NAME, "case": network.name, "work": "dx" if dx else "no dx", **network.facts()}
    add(found, measured, network.cost("forward+backward"))
    # The cost is that with dx: without, the share of the peak counts less.
    found["flops"] = network.forward_flops + network.backward_flops(dx)
    del found["bytes"]
    for each in found["contenders"].values():
        del each["share"]
    found["formula"] = {"forward": network.forward_flops, "backward": network.backward_flops(dx)}
    found["counted"] = {name: counted(models[name], x, dy, dx) for name in ("pyperc", "eager")}
    found["parts"] = {
        name: {
            "forward": samples.part(0),
            "backward": samples.part(1),
            "ratio": measured.parts_ratio(name, over=1, under=0)._asdict(),
        }
        for name, samples in measured.samples.items()
    }
    return found


class _Node(nn.Module):
    """One operation of torch: what a node of autograd costs whoever wrote it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


def block(model: nn.Module, x: Tensor, dy: Tensor, dx: bool) -> Block:
    """Blocks whose parts are forward, with a graph, and backward."""
    clock, grad = time.perf_counter, torch.autograd.grad
    leaf = x.clone().requires_grad_(dx)
    leaves = [*[leaf] * dx, *model.parameters()]

    def run(repeats: int) -> tuple[float, float]:
        forward = backward = 0.0
        for _ in range(repeats):
            start = clock()
            y = model(leaf)
            between = clock()
            grad(y, leaves, dy)
            end = clock()
            forward += between - start
            backward += end - between
        return forward, backward

    return run


def counted(model: nn.Module, x: Tensor, dy: Tensor, dx: bool) -> Record:
    """What torch's FlopCounterMode sees of forward and of backward."""
    leaf = x.clone().requires_grad_(dx)
    found: Record = {}
    with FlopCounterMode(display=False) as counter:
        y = model(leaf)
    found["forward"] = int(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y, [*[leaf] * dx, *model.parameters()], dy)
    found["backward"] = int(counter.get_total_flops())
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    return [ratios(records), rest([record for record in records if NODE in record["parts"]])]


def ratios(records: Sequence[Record]) -> Table:
    names = [name for name in ("pyperc", "eager", "compile") if any(name in r["parts"] for r in records)]
    found = Table(
        "Backward over forward: operations by the formula and by torch's FlopCounterMode, and measured times",
        ["", "dx of input", "formula", *(f"{name}: counted" for name in ("pyperc", "eager")), *names],
    )
    for record in records:
        formula = record["formula"]["backward"] / record["formula"]["forward"]
        row = [label(record), "yes" if record["work"] == "dx" else "no", f"{formula:.3f}"]
        row += [_over(record["counted"][name]) for name in ("pyperc", "eager")]
        row += [f"{record['parts'][name]['ratio']['median']:.2f}" if name in record["parts"] else "-" for name in names]
        found.rows.append(row)
    return found


def _over(counts: dict[str, Any]) -> str:
    return f"{counts['backward'] / counts['forward']:.3f}" if counts["forward"] else "not seen"


def rest(records: Sequence[Record]) -> Table:
    """Of the small networks: each half, its arithmetic at the peak, and the same calls with no arithmetic."""
    found = Table(
        "Small networks: where the time goes, forward / backward",
        ["", "dx of input", "arithmetic at peak", "pyperc", "its floor", "eager", "its floor", "one node of torch"],
    )
    for record in records:
        arithmetic = [record["formula"][half] / record["probe"] / 1e9 for half in ("forward", "backward")]
        row = [label(record), "yes" if record["work"] == "dx" else "no", " / ".join(map(duration, arithmetic))]
        for name in ("pyperc", f"pyperc {FLOOR}", "eager", f"eager {FLOOR}", NODE):
            part = record["parts"][name]
            row.append(f"{duration(part['forward'])} / {duration(part['backward'])}")
        found.rows.append(row)
    if records:
        found.notes.append(
            "The floor is the same network with batch and widths of 1: calls, checks, allocation, autograd's engine."
        )
    return found
