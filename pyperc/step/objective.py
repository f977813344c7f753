"""What a step descends on: a loss of csrc/core/losses.h with its reduction and weights, or any function of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyperc import _C, functional

Loss: TypeAlias = str | nn.Module | Callable[[Tensor, Tensor], Tensor]
INFO = {info.name: info for info in _C.losses()}
HALVES = (torch.bfloat16, torch.float16)
SIGNED = ("logistic", "hinge", "squared_hinge")
"""The losses whose targets are -1 and +1."""
# torch's names for losses of the list.
_KNOWN: dict[Any, str] = {F.cross_entropy: "cross_entropy", F.mse_loss: "mse"}
_MODULES: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: ("cross_entropy", ("reduction", "weight", "label_smoothing", "ignore_index")),
    nn.MSELoss: ("mse", ("reduction",)),
}


class Objective:
    """loss(scores, target, weight) -> a tensor of one element, with derivatives.

    `name` is that of a loss of the list, or "" where `function` computes something else; an option that is None has
    torch's default. 16-bit scores are compared with their targets in float32.
    """

    def __init__(self, loss: Loss, **options: Any) -> None:
        options = {option: value for option, value in options.items() if value is not None}
        self.name, self.function = "", None
        if type(loss) in _MODULES:
            self.name, own = _MODULES[type(loss)]
            _check_options(options, (), f"{type(loss).__name__}, which brings its own")
            options = {option: getattr(loss, option) for option in own}
        elif isinstance(loss, str) or loss in _KNOWN:
            self.name = loss if isinstance(loss, str) else _KNOWN[loss]
            if self.name not in INFO:
                raise ValueError(f"TrainStep: loss must be one of {', '.join(INFO)}, or a function, got {loss!r}")
            row = ("label_smoothing", "ignore_index") if INFO[self.name].over == "row" else ()
            _check_options(options, ("reduction", "weight", *row, *INFO[self.name].parameters), f"loss {self.name}")
        elif callable(loss) and not isinstance(loss, type):
            self.function = loss
            _check_options(options, (), "a loss that is a function")
        else:
            raise TypeError(f"TrainStep: loss must be one of {', '.join(INFO)}, or a function, got {loss!r}")
        self.reduction: str = options.get("reduction", "mean")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"TrainStep: reduction must be mean or sum, got {self.reduction!r}")
        self.weight: Tensor | None = options.get("weight")
        if not isinstance(self.weight, Tensor | None):
            raise TypeError(f"TrainStep: weight must be a Tensor or None, got {type(self.weight).__name__}")
        self.label_smoothing: float = options.get("label_smoothing", 0.0)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"TrainStep: label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        self.ignore_index: int = options.get("ignore_index", -100)
        info = INFO.get(self.name)
        self.parameters = (
            [float(options.get(p, d)) for p, d in zip(info.parameters, info.defaults, strict=True)] if info else []
        )

    def __call__(self, scores: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        if self.function is not None:
            return _by_function(self.function, scores, target, weight)
        if not isinstance(target, Tensor):
            raise TypeError(f"step: y must be a Tensor, got {type(target).__name__}")
        if scores.dtype in HALVES:
            scores = scores.float()
            target = target.float() if target.is_floating_point() else target
        if weight is not None:
            if not isinstance(weight, Tensor):
                raise TypeError(f"step: weight must be a Tensor or None, got {type(weight).__name__}")
            if weight.shape != scores.shape[:-1]:
                raise ValueError(f"step: weight must be {list(scores.shape[:-1])}, got {list(weight.shape)}")
            weight = weight.to(scores.dtype)
        if self.name == "cross_entropy":
            return self._cross_entropy(scores, target, weight)
        _check_target(target, scores, scores.dtype, scores.shape)
        of_output = None if self.weight is None else self.weight.to(scores)
        if weight is not None:
            of_output = weight[..., None] if of_output is None else weight[..., None] * of_output
        if self.name == "mse" and of_output is None:
            return F.mse_loss(scores, target, reduction=self.reduction)
        loss: Callable[..., Tensor] = getattr(functional, f"{self.name}_loss")
        return loss(scores, target, of_output, self.reduction, *self.parameters)

    def _cross_entropy(self, scores: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """torch's, over [*, classes]; the mean of weighted samples divides by the sum of the weights."""
        probabilities = target.is_floating_point()
        if probabilities:
            _check_target(target, scores, scores.dtype, scores.shape)
        else:
            _check_target(target, scores, torch.int64, scores.shape[:-1])
        rows = scores
        if scores.dim() != 2:  # a view of the same shape would be a node of the graph
            rows = scores.reshape(-1, scores.shape[-1])
            target = target.reshape(rows.shape if probabilities else -1)
        of_class = None if self.weight is None else self.weight.to(scores)

        def loss(reduction: str) -> Tensor:
            return F.cross_entropy(
                rows,
                target,
                of_class,
                ignore_index=self.ignore_index,
                reduction=reduction,
                label_smoothing=self.label_smoothing,
            )

        if weight is None:
            return loss(self.reduction)
        weight = weight.reshape(-1)
        total = (loss("none") * weight).sum()
        if self.reduction == "sum":
            return total
        if not probabilities:
            kept = target != self.ignore_index
            weight = weight * kept
            weight = weight if of_class is None else weight * of_class[target.where(kept, 0)]
        return total / weight.sum()


def _by_function(
    function: Callable[[Tensor, Tensor], Tensor], scores: Tensor, target: Tensor, weight: Tensor | None
) -> Tensor:
    if weight is not None:
        raise TypeError(f"step: weight needs a loss of the list, {', '.join(INFO)}; this step's is a function")
    loss = function(scores, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        came = f"one of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"step: loss must return a Tensor of one element, got {came}")
    return loss


def _check_options(given: dict[str, Any], allowed: tuple[str, ...], loss: str) -> None:
    for option in given:
        if option not in allowed:
            raise TypeError(f"TrainStep: {option} is no option of {loss}")


def _check_target(target: Tensor, scores: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if target.dtype != dtype or target.shape != shape:
        kind = TypeError if target.dtype != dtype else ValueError
        raise kind(f"step: y must be {dtype} {list(shape)}, got {target.dtype} {list(target.shape)}")


def check_finite(loss: Tensor, step: int) -> None:
    """Raises FloatingPointError where the loss of that step is NaN or infinite."""
    value = float(loss)
    if not math.isfinite(value):
        raise FloatingPointError(f"step: the loss is {value} in step {step}; the parameters are those of before it")
