"""What other parts of torch are told of the operators: their flops, and their decompositions into torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from pyperc import _C

__all__ = ["decompositions"]

_OPS = torch.ops.pyperc
Shape = Sequence[int]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators as compositions of torch's own operations, for `ExportedProgram.run_decompositions`.

    An exported program holds the operator `pyperc::mlp`, which needs pyperc where it runs. Decomposed, it holds
    nothing but ATen: what a target without custom operators wants, and what `torch.onnx.export` wants of a program that
    is exported already. Of a module it makes a plain graph by itself.

    >>> import pyperc
    >>> model = pyperc.MLP([4, 8, 2])
    >>> program = torch.export.export(model, (torch.zeros(3, 4),))
    >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ['pyperc.mlp.default']
    >>> plain = program.run_decompositions(pyperc.decompositions())
    >>> [str(node.target) for node in plain.graph.nodes if node.op == "call_function"]
    ['aten.linear.default', 'aten.relu.default', 'aten.linear.default']
    """
    return {
        _OPS.mlp.default: _mlp,
        _OPS.mlp_forward.default: _mlp_forward,
        _OPS.mlp_backward.default: _mlp_backward,
        _OPS.activation.default: _C.composed_activation,
    }


_COUNTS = {info.name: len(info.parameters) for info in _C.activations()}


def _chain(activations: Sequence[str], parameters: Sequence[float]) -> _C.Chain:
    values = iter(parameters)
    return _C.Chain([(name, [next(values) for _ in range(_COUNTS[name])]) for name in activations])


def _mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Sequence[float],
) -> Tensor:
    return _C.composed_forward(x, weights, biases, _chain(activations, parameters))[len(weights) - 1]


def _mlp_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Sequence[float],
) -> list[Tensor]:
    return _C.composed_forward(x, weights, biases, _chain(activations, parameters))


def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    activations: Sequence[str],
    parameters: Sequence[float],
    needs: Sequence[bool],
) -> list[Tensor]:
    return _C.composed_backward(dy, x, weights, saved, _chain(activations, parameters), needs)


def _forward_flops(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """2 m n k for each layer, what the same layers' addmm are counted as."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights)


def _backward_flops(
    dy: Shape,
    x: Shape,
    weights: Sequence[Shape],
    saved: Any,
    activations: Any,
    parameters: Any,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """dw(l) = ds(l)^T x(l-1) where wanted, and dx(l-1) = ds(l) w(l) down to the lowest layer that wants something."""
    depth, batch = len(weights), math.prod(x[:-1])
    wanted = [needs[1 + layer] or needs[1 + depth + layer] for layer in range(depth)]
    flops = 0
    for layer, w in enumerate(weights):
        below = needs[0] or any(wanted[:layer])
        flops += 2 * batch * math.prod(w) * (needs[1 + layer] + below)
    return flops


def register() -> None:
    """Tell torch: FlopCounterMode counts by these formulas."""
    if _OPS.mlp not in flop_registry:  # unless the module is loaded anew
        register_flop_formula([_OPS.mlp, _OPS.mlp_forward])(_forward_flops)
        register_flop_formula(_OPS.mlp_backward)(_backward_flops)


register()
