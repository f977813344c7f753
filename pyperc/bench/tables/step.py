"""A step of training: pyperc.TrainStep over torch's loop with the best of its three optimisers, and what the step costs
beside forward and backward alone.

Counted, plain descent adds two operations to each parameter; that it adds no pass over dw shows in the step's time over
that of forward and backward.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import pyperc
from pyperc.bench.cases import Cost, Job, Network, Record, Settings, label, over, relu, timed
from pyperc.bench.measure import Block, calls
from pyperc.bench.text import Table, duration

NAME = "step"
PASSES = "forward+backward"
IMPLEMENTATIONS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPERATIONS = {"sgd": 2, "adam": 14}
"""Of an update, for each parameter."""

SHAPES = ((1, [64] * 4), (32, [64] * 4), (64, [784, 256, 256, 10]), (128, [128] * 5), (256, [512] * 5))
LARGE = ((1024, [1024] * 4), (4096, [256] * 4), (1024, [64] * 4))


def cases(settings: Settings) -> list[tuple[Network, str, str]]:
    """Network, loss, optimiser."""
    if settings.smoke:
        return [(relu((3, (4, 5, 2)))[0], "cross_entropy", "adam")]
    small, large = relu(*SHAPES), relu(*LARGE)
    return [*((n, "mse", "sgd") for n in (*small, *large)), *((n, "cross_entropy", "adam") for n in small)]


def jobs(settings: Settings) -> list[Job]:
    return [
        timed(
            NAME,
            network.name,
            f"{loss}, {optimizer}",
            cost(network, optimizer),
            partial(contenders, network, loss, optimizer),
            facts={**network.facts(), "counted": cost(network, optimizer).flops / passes(network)},
            count=len(IMPLEMENTATIONS) + 2,
        )
        for network, loss, optimizer in cases(settings)
    ]


def passes(network: Network) -> int:
    return network.forward_flops + network.backward_flops(dx=False)


def cost(network: Network, optimizer: str) -> Cost:
    """The parameters, and the optimiser's two moments of each, are read and written once."""
    moved = network.parameters * (2 if optimizer == "sgd" else 6) + 2 * network.batch * sum(network.sizes)
    return Cost(passes(network) + OPERATIONS[optimizer] * network.parameters, network.dtype.itemsize * moved)


def contenders(network: Network, loss: str, optimizer: str) -> dict[str, Block]:
    x, dy = network.data()
    y = dy if loss == "mse" else torch.randint(network.sizes[-1], (network.batch,))
    formula = F.mse_loss if loss == "mse" else F.cross_entropy
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    step = pyperc.TrainStep(network.models()["pyperc"], loss=loss, optimizer=optimizer, lr=1e-4)
    fused = network.models()["pyperc"]
    parameters = list(fused.parameters())

    def loop(model: nn.Module, descent: torch.optim.Optimizer) -> None:
        descent.zero_grad()
        formula(model(x), y).backward()  # type: ignore[no-untyped-call]
        descent.step()

    found = {
        "pyperc": calls(lambda: step(x, y)),
        PASSES: calls(lambda: torch.autograd.grad(fused(x), parameters, dy)),
    }
    for name, options in IMPLEMENTATIONS.items():
        model = network.plain()
        found[name] = calls(partial(loop, model, make(model.parameters(), lr=1e-4, **options)))
    return found


def tables(records: Sequence[Record]) -> list[Table]:
    found = Table(
        "A step of training: TrainStep over torch's loop, with each of its optimisers' implementations",
        ["", "loss, optimiser", "step", *IMPLEMENTATIONS, "over the best", "over its passes", "operations"],
    )
    for record in records:
        times = record["contenders"]
        ratios = [over(record, name) or 0.0 for name in IMPLEMENTATIONS]
        row = [label(record), record["work"], duration(times["pyperc"]["seconds"])]
        row += [f"{ratio:.2f}" for ratio in (*ratios, min(ratios))]
        row += [f"{1 / (over(record, PASSES) or 1.0):.2f}", f"{record['counted']:.3f}"]
        found.rows.append(row)
    if records:
        found.notes.append(
            f"Over its passes: the step's time over that of {PASSES} through autograd; operations: the same, counted."
        )
    return [found]
