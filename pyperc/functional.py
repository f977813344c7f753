"""Functions of tensors: linear, one layer, mlp, all of them in one native call, and the losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from pyperc import _C
from pyperc._losses import cross_entropy, hinge_loss, logistic_loss, mse_loss, squared_hinge_loss
from pyperc.activation import ActivationLike, Resolved, chain, resolve

__all__ = ["cross_entropy", "hinge_loss", "linear", "logistic_loss", "mlp", "mse_loss", "squared_hinge_loss"]

T = TypeVar("T", bound=Tensor | None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: ActivationLike = "identity") -> Tensor:
    """One layer: y = f(x w^T + b).

    x is [*, in], weight [out, in], bias [out] or None, y [*, out]; all of one floating dtype, on one device.
    `activation` is a name, a (name, parameters) pair or an nn.Module. Differentiable to any order.

    Raises TypeError for a tensor of the wrong kind (integer, sparse, another dtype or device than x's), ValueError for
    shapes that do not fit and for an unknown activation. EE-559, lectures 3.1 (the unit) and 3.4 (the layer).

    >>> linear(torch.tensor([[1.0, -2.0]]), torch.eye(2), torch.ones(2), "relu")
    tensor([[2., 0.]])
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(linear, operands, x, weight, bias=bias, activation=activation)
        return result
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"linear: {name} must be a Tensor, got {type(tensor).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"linear: bias must be a Tensor or None, got {type(bias).__name__}")
    return call(x, [weight], [bias], (resolve(activation),))


def mlp(
    x: Tensor,
    weights: Iterable[Tensor],
    biases: Iterable[Tensor | None] | None,
    activations: Sequence[ActivationLike],
) -> Tensor:
    """A multi-layer perceptron: x(0) = x, x(l) = f(l)(x(l-1) w(l)^T + b(l)); returns x(L).

    x is [*, sizes[0]], weights[l] [sizes[l+1], sizes[l]], biases[l] [sizes[l+1]] or None (biases=None: no layer has
    one), activations[l] the activation after layer l, one for each layer. All of one floating dtype, on one device.
    One native call forward and one backward; differentiable to any order.

    Raises TypeError for a tensor of the wrong kind (integer, sparse, another dtype or device than x's), ValueError for
    shapes that do not chain, lists of unequal length and an unknown activation. EE-559, lectures 3.4 and 3.6.

    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> mlp(x, [w, -w], [torch.ones(2), None], ["relu", "identity"])
    tensor([[-2., -3.]])
    """
    weights = _as_list("weights", weights)
    biases = _as_list("biases", [None] * len(weights) if biases is None else biases)
    operands = (x, *weights, *(bias for bias in biases if bias is not None))
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(mlp, operands, x, weights, biases, activations)
        return result
    if isinstance(activations, str) or not isinstance(activations, Sequence):
        raise TypeError(f"mlp: activations must be a sequence, one for each of the layers, got {activations!r}")
    for name, entries in (("biases", biases), ("activations", activations)):
        if len(entries) != len(weights):
            raise ValueError(
                f"mlp: {name} must have one entry for each of the {len(weights)} weights, got {len(entries)}"
            )
    return call(x, weights, biases, tuple(resolve(activation) for activation in activations))


def call(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], layers: tuple[Resolved, ...]) -> Tensor:
    """The one way in: straight to the native code, or as an operator where somebody watches the dispatcher.

    torch.compile and torch.export record operators, and a TorchDispatchMode (make_fx, FlopCounterMode) is shown
    operators: a direct call would be a hole in what they see. jit.trace cannot record a list of optional tensors, so
    it is given the layers.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        names = [name for name, _ in layers]
        parameters = [value for _, values in layers for value in values]
        output: Tensor = torch.ops.pyperc.mlp.default(x, weights, biases, names, parameters)
        return output
    if torch._C._get_tracing_state() is not None:
        for weight, bias, (name, values) in zip(weights, biases, layers, strict=True):
            x = torch.ops.pyperc.activation.default(F.linear(x, weight, bias), name, list(values))
        return x
    if not isinstance(x, Tensor):
        raise TypeError(f"mlp: x must be a Tensor, got {type(x).__name__}")
    return _C.mlp(x, weights, biases, chain(layers))


def _as_list(name: str, tensors: Iterable[T]) -> list[T]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"mlp: {name} must be a sequence of Tensors, got {type(tensors).__name__}")
    entries = list(tensors)
    for i, tensor in enumerate(entries):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "biases"):
            raise TypeError(f"mlp: {name}[{i}] must be a Tensor, got {type(tensor).__name__}")
    return entries
