"""The linear layer that brings its activation with it."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from pyperc import functional
from pyperc.activation import ActivationLike, describe, resolve

Device: TypeAlias = torch.device | str | int | None


class Linear(nn.Linear):
    """An nn.Linear with its activation fused into it: y = f(x w^T + b).

    x is [*, in_features], y [*, out_features], of the parameters' floating dtype and on their device; weight and bias
    are initialised, named and stored as nn.Linear's.
    `activation` is a name, a (name, parameters) pair or an nn.Module; its name and the values of its parameters are
    kept in the attributes `activation` and `activation_parameters`.

    Raises TypeError for a bias that is no bool, ValueError for an unknown activation, and on a call what
    `pyperc.functional.linear` raises. EE-559, lecture 3.1.

    >>> Linear(3, 2, activation=("leaky_relu", {"negative_slope": 0.2}))
    Linear(in_features=3, out_features=2, bias=True, activation='leaky_relu', negative_slope=0.2)
    >>> Linear(3, 2, activation="tanh")(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: ActivationLike = "identity",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if bias not in (True, False):
            raise TypeError(
                f"Linear: bias must be True or False, got {bias!r}; an activation goes by keyword, activation={bias!r}"
            )
        name, parameters = resolve(activation)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.activation = name
        self.activation_parameters = parameters

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, (self.activation, self.activation_parameters))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={describe((self.activation, self.activation_parameters))}"
