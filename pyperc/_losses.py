"""The losses of csrc/core/losses.h as functions of tensors: value and gradient in one native pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from pyperc import _C

__all__ = ["cross_entropy", "hinge_loss", "logistic_loss", "mse_loss", "squared_hinge_loss"]

REDUCTIONS = ("mean", "sum", "none")


def mse_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """(s - y)^2, for predictions `input` and targets `target` of one shape and floating dtype.

    `weight`, which may be broadcast, multiplies each element's loss. `reduction` is "none", "sum" or "mean", which
    divides by the sum of the weights, as torch does. Value and gradient take one native pass over float32 and float64
    on the CPU; everything else goes through torch's own operations. Differentiable to any order.

    Raises TypeError for a tensor of the wrong kind, ValueError for shapes that do not fit and an unknown reduction.
    EE-559, lecture 3.5.

    >>> mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    tensor(2.5000)
    """
    if has_torch_function((input, target)):
        return _overridden(mse_loss, input, target, weight=weight, reduction=reduction)
    return _element_loss("mse", (), input, target, weight, reduction)


def logistic_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """-log sigmoid(y s), for scores `input` and targets y of -1 and +1.

    Arguments, result and errors are those of `mse_loss`. EE-559, lectures 3.2 and 3.5.

    >>> logistic_loss(torch.tensor([0.0]), torch.tensor([1.0]))
    tensor(0.6931)
    """
    if has_torch_function((input, target)):
        return _overridden(logistic_loss, input, target, weight=weight, reduction=reduction)
    return _element_loss("logistic", (), input, target, weight, reduction)


def hinge_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    threshold: float = 1.0,
) -> Tensor:
    """max(0, threshold - y s), for scores `input` and targets y of -1 and +1.

    The support vector machine has threshold 1, the perceptron 0. Where y s equals the threshold the derivative is -y.
    Arguments, result and errors are those of `mse_loss`. EE-559, lecture 3.1.

    >>> hinge_loss(torch.tensor([0.5, -2.0]), torch.tensor([1.0, -1.0]), reduction="none")
    tensor([0.5000, 0.0000])
    """
    if has_torch_function((input, target)):
        return _overridden(hinge_loss, input, target, weight=weight, reduction=reduction, threshold=threshold)
    return _element_loss("hinge", (threshold,), input, target, weight, reduction)


def squared_hinge_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    threshold: float = 1.0,
) -> Tensor:
    """max(0, threshold - y s)^2, for scores `input` and targets y of -1 and +1.

    Arguments, result and errors are those of `mse_loss`. EE-559, lecture 3.1, squared.

    >>> squared_hinge_loss(torch.tensor([0.5]), torch.tensor([-1.0]))
    tensor(2.2500)
    """
    if has_torch_function((input, target)):
        return _overridden(squared_hinge_loss, input, target, weight=weight, reduction=reduction, threshold=threshold)
    return _element_loss("squared_hinge", (threshold,), input, target, weight, reduction)


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """log sum_c e^s_c - s_y, for scores `input` [*, classes] and classes `target` [*], int64.

    `weight` [classes] multiplies the loss of a class's samples. `reduction`, dtypes and errors are those of `mse_loss`;
    ValueError also for a class that is none. EE-559, lectures 3.2 and 3.5.

    >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """
    if has_torch_function((input, target)):
        return _overridden(cross_entropy, input, target, weight=weight, reduction=reduction)
    _check("cross_entropy", input, target, weight, reduction)
    classes = input.shape[-1] if input.ndim else 0
    if classes == 0 or input.shape[:-1] != target.shape:
        raise ValueError(
            f"cross_entropy: input must be [*, classes] and target [*], got {list(input.shape)} and "
            f"{list(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"cross_entropy: target must be int64, got {target.dtype}")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"cross_entropy: weight must be [{classes}], one for each class, got {list(weight.shape)}")
    rows, codes = input.reshape(-1, classes), target.reshape(-1)
    if not _plain(input, weight):
        loss = F.cross_entropy(rows, codes, weight, reduction=reduction)
        return loss.reshape(target.shape) if reduction == "none" else loss
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < classes):
        raise ValueError(
            f"cross_entropy: target must hold classes from 0 to {classes - 1}, got {int(codes.min())} to "
            f"{int(codes.max())}"
        )
    of_row = None if weight is None else weight[codes]
    value: Tensor = _Loss.apply(rows, codes, of_row, "cross_entropy", (), reduction)  # type: ignore[no-untyped-call]
    return value.reshape(target.shape) if reduction == "none" else value


def _overridden(function: Any, *arguments: Any, **keywords: Any) -> Tensor:
    result: Tensor = handle_torch_function(function, arguments, *arguments, **keywords)
    return result


def _element_loss(
    name: str, parameters: Sequence[float], input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    what = f"{name}_loss"
    _check(what, input, target, weight, reduction)
    if input.shape != target.shape:
        raise ValueError(f"{what}: target must be of input's shape {list(input.shape)}, got {list(target.shape)}")
    for argument, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{what}: {argument} must have input's dtype {input.dtype}, got {tensor.dtype}")
    if weight is not None:
        try:
            weight = weight.expand(input.shape)
        except RuntimeError:
            raise ValueError(
                f"{what}: weight must broadcast to input's shape {list(input.shape)}, got {list(weight.shape)}"
            ) from None
    if not _plain(input, target, weight):
        return _composed(input, target, weight, name, parameters, reduction)
    value: Tensor = _Loss.apply(input, target, weight, name, tuple(parameters), reduction)  # type: ignore[no-untyped-call]
    return value


def _check(what: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> None:
    for argument, tensor in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(tensor, Tensor) and not (tensor is None and argument == "weight"):
            raise TypeError(f"{what}: {argument} must be a Tensor, got {type(tensor).__name__}")
    for argument, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise TypeError(f"{what}: {argument} must be on input's device {input.device}, got {tensor.device}")
    if not input.is_floating_point() or input.layout != torch.strided:
        raise TypeError(f"{what}: input must be a dense floating tensor, got {input.dtype} of layout {input.layout}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{what}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def _plain(input: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but autograd of `input` watches, and the kernels have the dtype: where not, torch composes."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return (
        input.dtype in (torch.float32, torch.float64)
        and input.device.type == "cpu"
        and not input.is_neg()
        and not any(t is not None and (t.is_neg() or t.requires_grad) for t in others)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _composed(
    input: Tensor, target: Tensor, weight: Tensor | None, name: str, parameters: Sequence[float], reduction: str
) -> Tensor:
    """The loss as a composition of torch's operations. For cross_entropy the weight is that of the rows."""
    if name == "cross_entropy":
        loss = F.cross_entropy(input, target, reduction="none")
    else:
        loss = torch.ops.pyperc.loss.default(input, target, name, list(parameters))
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if weight is None else loss.sum() / weight.sum()


class _Loss(torch.autograd.Function):
    """The native pass; its backward is composed where the graph of the gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        name: str,
        parameters: tuple[float, ...],
        reduction: str,
    ) -> Tensor:
        # A mean over no element at all is NaN, as in torch.
        divisor = 1.0
        if reduction == "mean":
            divisor = float(target.numel() if weight is None else weight.sum()) or float("nan")
        value, gradient = _C.loss(
            input.contiguous(),
            target.contiguous(),
            None if weight is None else weight.contiguous(),
            name,
            parameters,
            reduction != "none",
            1.0,
            ctx.needs_input_grad[0],
        )
        ctx.arguments, ctx.divisor = (name, parameters, reduction), divisor
        ctx.save_for_backward(input, target, weight, gradient)
        return value / divisor if reduction == "mean" else value

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dx,) = torch.autograd.grad(_composed(input, target, weight, *ctx.arguments), input, dy, create_graph=True)
        else:
            factor = dy / ctx.divisor
            if ctx.arguments[0] == "cross_entropy" and ctx.arguments[2] == "none":
                factor = factor[:, None]
            dx = gradient * factor
        return dx, None, None, None, None, None
