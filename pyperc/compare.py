"""Two networks side by side: whether their training agrees, and the ratio of their times."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyperc.bench.measure import Block, Pace, Quartiles, calls, interleaved
from pyperc.step import TrainStep
from pyperc.train import Epoch, TorchStep

__all__ = ["Agreement", "Timing", "agreement", "autograd", "fastest_form", "time_batch"]


class Agreement(NamedTuple):
    """How far two trainings from the same weights on the same batches came apart."""

    loss: float
    """largest |difference| of the epochs' losses"""
    loss_relative: float
    """the largest of |difference| / loss, epoch by epoch"""
    first: float
    """|difference| of the first epoch's losses"""
    weight: float
    """largest |difference| of the final parameters"""
    weight_relative: float
    """the same, over the largest |parameter|"""
    same: bool
    """whether rounding explains the difference of the losses"""


def agreement(
    curve: Sequence[Epoch], other: Sequence[Epoch], state: Mapping[str, Tensor], other_state: Mapping[str, Tensor]
) -> Agreement:
    """Compares two loss curves and the parameters that they ended with.

    Descent amplifies the rounding of its first steps, and relu's kink decides on single bits, so that two right
    programs part by far more than eps in the end: on MNIST in float32 by 1e-7 after one epoch and 1e-4 after ten. A
    wrong derivative parts them at once. So the curves count as the same while they differ by at most sqrt(eps) of the
    first loss in the first epoch, and by at most its fourth root later: 3.5e-4 and 1.9e-2 in float32.

    Raises:
        ValueError: the curves or the parameters are not of the same length and names.
    """
    if len(curve) != len(other):
        raise ValueError(f"agreement: both curves must have as many epochs, got {len(curve)} and {len(other)}")
    if state.keys() != other_state.keys():
        raise ValueError(f"agreement: both states must have the same names, got {[*state]} and {[*other_state]}")
    losses = [abs(a.loss - b.loss) for a, b in zip(curve, other, strict=True)]
    relative = [difference / b.loss if difference else 0.0 for difference, b in zip(losses, other, strict=True)]
    weight = max(float((state[name] - other_state[name]).abs().max()) for name in state)
    largest = max(float(tensor.abs().max()) for tensor in other_state.values())
    eps = max(torch.finfo(tensor.dtype).eps for tensor in state.values())
    same = losses[0] <= eps**0.5 * other[0].loss and max(losses) <= eps**0.25 * other[0].loss
    return Agreement(max(losses), max(relative), losses[0], weight, weight / largest if weight else 0.0, same)


class Timing(NamedTuple):
    """Seconds for one batch, and how many times as long the other network took."""

    ours: float
    theirs: float
    ratio: Quartiles
    """theirs / ours, round by round: above 1 where ours is faster"""


def time_batch(
    ours: TrainStep, theirs: TorchStep, x: Tensor, y: Tensor, *, seconds: float = 2.0, warm_up: float = 0.5
) -> dict[str, Timing]:
    """Times a batch in two ways, in turns: forward and backward of both networks, and a whole step of training.

    Args:
        ours, theirs: their networks are trained in place, with lr set to so little that the numbers stay.
        x, y: the input, [batch, features], and the targets.
        seconds: of measuring, about; more where something else takes the processor.
        warm_up: seconds before.

    Returns:
        The timings of `forward`, `backward`, and `step`, from the batch to the new weights.
    """
    pace = Pace(seconds / 4, warm_up, block=0.005, probe=0.001, fewest=8, patience=2.0)
    dy = torch.randn_like(ours.model(x)) / len(x)
    passes = interleaved({name: autograd(step.model, x, dy) for name, step in _named(ours, theirs).items()}, pace)
    for step in (ours, theirs):
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-9
    steps = interleaved({name: calls(partial(step, x, y)) for name, step in _named(ours, theirs).items()}, pace)
    timings = {}
    for name, measured, part in (("forward", passes, 0), ("backward", passes, 1), ("step", steps, 0)):
        times = (measured.samples["ours"].part(part), measured.samples["theirs"].part(part))
        timings[name] = Timing(*times, measured.ratios("theirs", "ours", part))
    return timings


def fastest_form(make: Callable[[str], TorchStep], x: Tensor, y: Tensor, seconds: float = 0.6) -> str:
    """The form of torch's optimizer that takes the step on this batch in the least time."""
    pace = Pace(seconds / 3, 0.1, block=0.005, probe=0.001, fewest=5, patience=2.0)
    steps = {form: make(form) for form in TorchStep.FORMS}
    measured = interleaved({form: calls(partial(step, x, y)) for form, step in steps.items()}, pace)
    return min(steps, key=lambda form: measured.samples[form].median)


def _named(ours: TrainStep, theirs: TorchStep) -> dict[str, TrainStep | TorchStep]:
    return {"ours": ours, "theirs": theirs}


def autograd(network: nn.Module, x: Tensor, dy: Tensor) -> Block:
    """Blocks of forward and backward on one batch, which are its two parts."""
    clock = time.perf_counter
    parameters = [*network.parameters()]

    def block(repeats: int) -> tuple[float, float]:
        forward = backward = 0.0
        for _ in range(repeats):
            for parameter in parameters:
                parameter.grad = None
            start = clock()
            y = network(x)
            after_forward = clock()
            torch.autograd.backward(y, dy)
            backward += clock() - after_forward
            forward += after_forward - start
        return forward, backward

    return block
