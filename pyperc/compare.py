"""Two networks side by side: whether their training agrees, and the ratio of their times."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyperc.train import Epoch

__all__ = ["Agreement", "Quartiles", "Timing", "agreement", "quartiles", "time_batch"]


class Quartiles(NamedTuple):
    """The middle half of some measurements."""

    lower: float
    median: float
    upper: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of at least one value.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        Quartiles(lower=2.0, median=3.0, upper=4.0)
    """
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


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


BLOCK = 0.005
"""Seconds that a block lasts: long against the clock's grain, short against a change in the machine's pace."""


class Timing(NamedTuple):
    """Seconds for one batch, and how many times as long the other network took."""

    ours: float
    theirs: float
    ratio: Quartiles
    """theirs / ours, block by block: above 1 where ours is faster"""


def time_batch(
    ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, *, seconds: float = 2.0, warm_up: float = 0.5
) -> dict[str, Timing]:
    """Times forward, backward and the gradient step of two networks on the same batch, in turns.

    Short blocks of each alternate (A B B A), so that a change in the machine's pace meets both; the figures are medians
    over the blocks. The networks are trained in place, with a step so small that the numbers stay what they were.

    Args:
        x: the input, [batch, features].
        dy: the gradient with respect to the output, [batch, classes].
        seconds: of measuring, about; at least 16 pairs of blocks are taken.
        warm_up: seconds before.

    Returns:
        The timings of `forward`, `backward`, `step` and `total`, their sum.
    """
    pair = [_Stepper(network, x, dy) for network in (ours, theirs)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds, start = 0, time.perf_counter()
        while rounds == 0 or time.perf_counter() < start + warm_up:
            for stepper in pair:
                stepper.block(1)
            rounds += 1
        one_block = (time.perf_counter() - start) / (2 * rounds)
        repeats = max(1, round(BLOCK / one_block))
        blocks: list[tuple[list[float], list[float]]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(blocks) < 16:
            if len(blocks) % 2:
                second, first = pair[1].block(repeats), pair[0].block(repeats)
            else:
                first, second = pair[0].block(repeats), pair[1].block(repeats)
            blocks.append((first, second))
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for index, name in enumerate(("forward", "backward", "step", "total")):
        a, b = ([block[side][index] for block in blocks] for side in (0, 1))
        ratio = quartiles([theirs_ / ours_ for ours_, theirs_ in zip(a, b, strict=True)])
        timings[name] = Timing(statistics.median(a), statistics.median(b), ratio)
    return timings


class _Stepper:
    """One network that can be driven block by block."""

    def __init__(self, network: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.network, self.x, self.dy = network, x, dy
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-9)

    def block(self, repeats: int) -> list[float]:
        """Seconds per batch of forward, backward, step and their sum, over some repeats."""
        clock = time.perf_counter
        forward = backward = step = 0.0
        for _ in range(repeats):
            self.optimizer.zero_grad(set_to_none=True)
            start = clock()
            y = self.network(self.x)
            after_forward = clock()
            torch.autograd.backward(y, self.dy)
            after_backward = clock()
            self.optimizer.step()
            end = clock()
            forward += after_forward - start
            backward += after_backward - after_forward
            step += end - after_backward
        return [part / repeats for part in (forward, backward, step, forward + backward + step)]
