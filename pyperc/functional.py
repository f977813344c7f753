"""Functions of tensors: linear, one layer, mlp, all of them in one native call, and the losses; and of a container,
its derivatives with respect to the input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from pyperc import _C
from pyperc._losses import cross_entropy, hinge_loss, logistic_loss, mse_loss, squared_hinge_loss
from pyperc.activation import ActivationLike, Resolved, chain, resolve

__all__ = [
    "cross_entropy",
    "hinge_loss",
    "jacobian",
    "jvp",
    "linear",
    "logistic_loss",
    "mlp",
    "mse_loss",
    "squared_hinge_loss",
    "vjp",
]

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


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian of a network with respect to its input, dy[i] / dx[j] for each x of the batch.

    J = diag(f'(s(L))) w(L) ... diag(f'(s(1))) w(1), the product of the layers' Jacobians, from the output down or
    from the input up, whichever takes fewer operations. x is [*, in], the result [*, out, in], both in the
    parameters' floating dtype. `model` is a fused container (`pyperc.MLP`, `pyperc.nn.Sequential`, what `pyperc.fuse`
    made) whose children form one stretch of linear layers and activations, or a `pyperc.Linear`. The result has
    derivatives of any order, by autograd and by torch.func.

    Raises TypeError for another kind of model, ValueError where the children do not form one stretch, and what `mlp`
    raises. EE-559, lecture 3.6.

    >>> import pyperc
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> x = torch.randn(5, 2)
    >>> J = jacobian(pyperc.fuse(model), x)
    >>> J.shape
    torch.Size([5, 1, 2])
    >>> torch.testing.assert_close(J, torch.func.vmap(torch.func.jacrev(model))(x))
    """
    return _derivative("jacobian", model, x)[0]


def vjp(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx): the network's output, and the gradient dx = J^T dy with respect to its input, without autograd.

    ds(l) = dx(l) * f'(s(l)), dx(l-1) = ds(l) w(l). x and dx are [*, in], y and dy [*, out]; the gradients of the
    weights are not computed. `model`, derivatives of the result and errors are those of `jacobian`; TypeError or
    ValueError also for a dy that is not like y. EE-559, lecture 3.6.

    >>> import pyperc
    >>> model = pyperc.MLP([2, 3, 1])
    >>> y, dx = vjp(model, torch.randn(5, 2), torch.ones(5, 1))
    >>> y.shape, dx.shape
    (torch.Size([5, 1]), torch.Size([5, 2]))
    """
    y, dx = _derivative("vjp", model, x, dy)
    return y, dx


def jvp(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dy): the network's output, and its change dy = J dx along dx, without autograd.

    dx(l) = f'(s(l)) * (dx(l-1) w(l)^T). x and dx are [*, in], y and dy [*, out]. `model`, derivatives of the result and
    errors are those of `jacobian`; TypeError or ValueError also for a dx that is not like x. EE-559, lecture 3.6.

    >>> import pyperc
    >>> model = pyperc.MLP([2, 3, 1])
    >>> y, dy = jvp(model, torch.randn(5, 2), torch.ones(5, 2))
    >>> y.shape, dy.shape
    (torch.Size([5, 1]), torch.Size([5, 1]))
    """
    y, dy = _derivative("jvp", model, x, dx)
    return y, dy


def _derivative(function: str, model: nn.Module, x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    from pyperc.nn import network_of  # which imports this module

    weights, biases, layers = network_of(function, model)
    for name, tensor in zip(("x", "dx" if function == "jvp" else "dy"), (x, *vectors), strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a Tensor, got {type(tensor).__name__}")
    operator = getattr(torch.ops.pyperc, function).default
    inputs = (x, *vectors, *weights, *biases)

    def compute(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        lists = list(inputs[-2 * len(weights) : -len(weights)]), list(inputs[-len(weights) :])
        results = operator(*inputs[: -2 * len(weights)], *lists, *_as_schema(layers))
        return results if isinstance(results, tuple) else (results,)

    if (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    ):
        recorded: tuple[Tensor, ...] = _Recorded.apply(compute, *inputs)  # type: ignore[no-untyped-call]
        return recorded
    return compute(*inputs)


class _Recorded(torch.autograd.Function):
    """compute(*inputs) from the kernels now, with what autograd needs by torch's own operations only if it is asked."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return compute(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # As tensors of their own: a weight that stands in two places has a gradient for each.
            inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            wanted = [(i, t) for i, t in enumerate(inputs) if t is not None and ctx.needs_input_grad[1 + i]]
            pairs = [pair for pair in zip(ctx.compute(*inputs), grads, strict=True) if pair[0].requires_grad]
            results, dresults = zip(*pairs, strict=True) if pairs else ((), ())
        found: list[Tensor | None] = [None] * len(inputs)
        if results:
            with torch.set_grad_enabled(create_graph):
                gradients = torch.autograd.grad(
                    results, [tensor for _, tensor in wanted], dresults, create_graph=create_graph, allow_unused=True
                )
            for (i, _), gradient in zip(wanted, gradients, strict=True):
                found[i] = gradient
        return (None, *found)


def _as_schema(layers: tuple[Resolved, ...]) -> tuple[list[str], list[float]]:
    return [name for name, _ in layers], [value for _, values in layers for value in values]


def call(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], layers: tuple[Resolved, ...]) -> Tensor:
    """The one way in: straight to the native code, or as an operator where somebody watches the dispatcher.

    torch.compile and torch.export record operators, and a TorchDispatchMode (make_fx, FlopCounterMode) is shown
    operators: a direct call would be a hole in what they see. jit.trace cannot record a list of optional tensors, so
    it is given the layers, and so is torch.onnx.export.
    """
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return by_layers(x, weights, biases, layers)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        output: Tensor = torch.ops.pyperc.mlp.default(x, weights, biases, *_as_schema(layers))
        return output
    if torch._C._get_tracing_state() is not None:
        return by_layers(x, weights, biases, layers)
    if not isinstance(x, Tensor):
        raise TypeError(f"mlp: x must be a Tensor, got {type(x).__name__}")
    if is_distributed(x):
        return sharded(x, weights, biases, layers)
    return _C.mlp(x, weights, biases, chain(layers))


def sharded(*arguments: Any) -> Tensor:
    """`pyperc.sharding.call`, imported here: torch.distributed, which it needs, takes half a second to import."""
    from pyperc.sharding import call

    return call(*arguments)


def is_distributed(x: Any) -> bool:
    """True for a DTensor, without importing what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def by_layers(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], layers: Sequence[Resolved]
) -> Tensor:
    for weight, bias, (name, values) in zip(weights, biases, layers, strict=True):
        x = torch.ops.pyperc.activation.default(F.linear(x, weight, bias), name, list(values))
    return x


def _as_list(name: str, tensors: Iterable[T]) -> list[T]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"mlp: {name} must be a sequence of Tensors, got {type(tensors).__name__}")
    entries = list(tensors)
    for i, tensor in enumerate(entries):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "biases"):
            raise TypeError(f"mlp: {name}[{i}] must be a Tensor, got {type(tensor).__name__}")
    return entries
