"""Two networks side by side: whether their training agrees, and the ratio of their times."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyperc.bench.measure import Block, Pace, Quartiles, interleaved
from pyperc.train import Epoch

__all__ = ["Agreement", "Timing", "agreement", "stepper", "time_batch"]


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
    ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, *, seconds: float = 2.0, warm_up: float = 0.5
) -> dict[str, Timing]:
    """Times forward, backward and the gradient step of two networks on the same batch, in turns.

    The networks are trained in place, with a step so small that the numbers stay what they were.

    Args:
        x: the input, [batch, features].
        dy: the gradient with respect to the output, [batch, classes].
        seconds: of measuring, about; more where something else takes the processor.
        warm_up: seconds before.

    Returns:
        The timings of `forward`, `backward`, `step` and `total`, their sum.
    """
    pace = Pace(seconds / 2, warm_up, block=0.005, probe=0.001, fewest=8, patience=2.0)
    measured = interleaved({"ours": stepper(ours, x, dy), "theirs": stepper(theirs, x, dy)}, pace)
    a, b = measured.samples["ours"], measured.samples["theirs"]
    timings = {
        name: Timing(a.part(part), b.part(part), measured.ratios("theirs", "ours", part))
        for part, name in enumerate(("forward", "backward", "step"))
    }
    return {**timings, "total": Timing(a.median, b.median, measured.ratios("theirs", "ours"))}


def stepper(network: nn.Module, x: Tensor, dy: Tensor) -> Block:
    """Blocks of training steps on one batch, whose parts are forward, backward and the step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-9)
    clock = time.perf_counter

    def block(repeats: int) -> tuple[float, float, float]:
        forward = backward = step = 0.0
        for _ in range(repeats):
            optimizer.zero_grad(set_to_none=True)
            start = clock()
            y = network(x)
            after_forward = clock()
            torch.autograd.backward(y, dy)
            after_backward = clock()
            optimizer.step()
            end = clock()
            forward += after_forward - start
            backward += after_backward - after_forward
            step += end - after_backward
        return forward, backward, step

    return block
