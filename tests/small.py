"""Small float64 networks away from kinks, and networks as functions of their leaves, for the tests of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from reference import Activation, Network, draw, native
from torch import Tensor

F64 = torch.float64


def small(activation: Activation, sizes: Sequence[int] = (3, 4, 2), batch: int = 2, bias: bool = True) -> Network:
    return draw(sizes, batch, activation, F64, bias=bias, margin=1e-3)


def as_function(
    net: Network, forward: Callable[[Network], Tensor] = native
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """forward as a function of (x, w.., b..), and those values."""
    names = list(net.leaves)

    def function(*leaves: Tensor) -> Tensor:
        leaf = dict(zip(names, leaves, strict=True))
        b = [leaf.get(f"db[{i}]") for i in range(len(net.b))]
        return forward(Network(leaf["dx"], [leaf[f"dw[{i}]"] for i in range(len(net.w))], b, net.activations, net.dy))

    return function, list(net.leaves.values())


def same(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
