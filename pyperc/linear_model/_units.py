"""Threshold logic units (W. McCulloch and W. Pitts, 1943), and networks of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyperc.nn import MLP


class ThresholdLogicUnit:
    """f(x) = 1 if w . x + b >= 0, else 0.

    Args:
        w: the weights, [d].
        b: the bias.

    x is [*, d], a tensor of any dtype or an array; computed in float64. Raises ValueError for a w that is no vector,
    and on a call for an x that does not fit it.

    Source: EE-559, lecture 3.1.

    >>> ThresholdLogicUnit.or_()([[0, 0], [0, 1], [1, 0], [1, 1]])
    array([0, 1, 1, 1])
    """

    def __init__(self, w: Any, b: float) -> None:
        self.w = torch.as_tensor(w, dtype=torch.float64).detach().clone()
        self.b = float(b)
        if self.w.ndim != 1:
            raise ValueError(f"ThresholdLogicUnit: w must be [d], got shape {list(self.w.shape)}")

    def __call__(self, x: Any) -> Any:
        """0 or 1 for each row of x [*, d]: a tensor of x's dtype where x is one, else an integer array."""
        inputs = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x, dtype=np.float64))
        if inputs.ndim < 1 or inputs.shape[-1] != len(self.w):
            raise ValueError(f"ThresholdLogicUnit: x must be [*, {len(self.w)}], got {list(inputs.shape)}")
        fires = inputs.double() @ self.w.to(inputs.device) + self.b >= 0
        return fires.to(x.dtype) if isinstance(x, Tensor) else fires.long().numpy()

    def __repr__(self) -> str:
        return f"ThresholdLogicUnit({self.w.tolist()}, {self.b})"

    @classmethod
    def or_(cls, n: int = 2) -> ThresholdLogicUnit:
        """1 if any of n inputs is."""
        return cls([1.0] * n, -0.5)

    @classmethod
    def and_(cls, n: int = 2) -> ThresholdLogicUnit:
        """1 if all of n inputs are."""
        return cls([1.0] * n, 0.5 - n)

    @classmethod
    def not_(cls) -> ThresholdLogicUnit:
        """1 if its one input is not."""
        return cls([-1.0], 0.5)


def from_truth_table(table: Any) -> MLP:
    """A network of threshold logic units that computes a Boolean function of n inputs.

    `table` holds its 2^n values, 0 or 1, in the order in which the inputs count in binary, the first input being the
    most significant; [2^n, m] holds m functions, the columns. One hidden unit for each row with a 1 fires on exactly
    that input, by an `and` of the inputs and their negations; an output is an `or` of its rows' units.

    Returns:
        A `pyperc.MLP` of float32 with heaviside throughout; its parameters ask for no gradient, as there is none.

    Raises:
        ValueError: the count of values is no power of two, or a value is neither 0 nor 1.

    Source: EE-559, lecture 3.1.

    >>> xor = from_truth_table([0, 1, 1, 0])
    >>> xor(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])).flatten().tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    values = torch.as_tensor(table).detach().cpu().float()
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.numel() == 0 or len(values) & (len(values) - 1):
        raise ValueError(
            f"from_truth_table: table must be [2^n] or [2^n, m], one row for each input, got {list(values.shape)}"
        )
    if not bool(((values == 0) | (values == 1)).all()):
        raise ValueError("from_truth_table: table must hold 0 and 1 only")
    n = len(values).bit_length() - 1
    if n == 0:
        raise ValueError("from_truth_table: table must have at least 2 rows, for an input to depend on, got 1")
    inputs = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))
    used = values.any(1).nonzero()[:, 0]
    network = MLP([n, max(1, len(used)), values.shape[1]], activation="heaviside", output_activation="heaviside")
    hidden, output = (module for module in network if isinstance(module, torch.nn.Linear))
    with torch.no_grad():
        # A function that is 0 throughout needs no unit; the one that stands there never fires.
        hidden.weight.zero_()
        hidden.bias.fill_(-0.5)
        output.weight.zero_()
        output.bias.fill_(-0.5)
        if len(used):
            hidden.weight.copy_(2 * inputs[used] - 1)
            hidden.bias.copy_(0.5 - inputs[used].sum(1))
            output.weight.copy_(values[used].t())
    return network.requires_grad_(False)
