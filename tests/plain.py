"""A fused network and the same weights as a plain nn.Sequential, for tests that hold one against the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyperc


def plain(model: nn.Module) -> nn.Module:
    """A copy of the model that plain torch computes."""
    return pyperc.unfuse(copy.deepcopy(model))


def pair(
    sizes: tuple[int, ...] = (6, 9, 7, 3), activation: Any = "tanh", dtype: torch.dtype = torch.float64
) -> tuple[pyperc.MLP, nn.Module]:
    """A fused network, and the plain one of the same weights."""
    model = pyperc.MLP(sizes, activation, dtype=dtype)
    return model, plain(model)


def gradients(model: Callable[[Tensor], Tensor], parameters: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of a scalar of it with respect to x and the parameters."""
    x = x.detach().clone().requires_grad_()
    leaves = [x, *parameters]
    for leaf in leaves:
        leaf.grad = None
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    (y.sin() * weights).sum().backward()
    return [y.detach(), *(leaf.grad.detach().clone() for leaf in leaves)]


def close(got: Any, want: Any, dtype: torch.dtype = torch.float64) -> None:
    """Equal up to the rounding of sums in another order."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def same_gradients(
    model: nn.Module, other: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> None:
    """model and other, or `run`, which calls model in some other way, give the same output and gradients."""
    close(
        gradients(model if run is None else run, list(model.parameters()), x),
        gradients(other, list(other.parameters()), x),
        x.dtype,
    )
