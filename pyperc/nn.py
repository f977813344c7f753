"""The fused containers, Sequential and the multi-layer perceptron MLP; and Linear and Activation to put into them."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from pyperc.activation import Activation, ActivationLike, Resolved, module, resolve
from pyperc.layers import Device, Linear
from pyperc.runs import (
    Call,
    Run,
    call_native,
    call_operator,
    ordinary_because,
    ordinary_everywhere_because,
    stretch_from,
)

__all__ = ["MLP", "Activation", "Linear", "Sequential"]

Observer = Callable[["Sequential", Any], Any]
_observer: Observer | None = None


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Within, every fused container hands its input to observer(container, input) and returns what that returns."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


class Sequential(nn.Sequential):
    """An nn.Sequential that computes each stretch of linear layers and their activations in one native call.

    s(l) = x(l-1) w(l)^T + b(l), x(l) = f(s(l)); x is [*, in], y [*, out], of the parameters' floating dtype.
    Children, state_dict and results are nn.Sequential's. Whatever cannot be fused runs as the ordinary call of that
    child: other modules, which split the container into stretches, and a linear layer or activation on which
    something hangs: a hook, a parametrisation, a forward of its own. That is looked at on every call;
    `pyperc.explain` prints what runs how.

    Raises on a call what `pyperc.functional.mlp` raises, and what the children raise. EE-559, lectures 3.4 and 3.6.

    >>> model = Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> model(torch.zeros(5, 4)).shape
    torch.Size([5, 2])
    """

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.walk(input, call_operator)
        if _observer is not None:
            return _observer(self, input)
        whole: Run | None = self.__dict__.get("_pyperc_whole")
        if whole is not None:
            try:
                y = whole.native(self._modules, input)
            except (TypeError, ValueError) as refusal:
                return whole.stretch.instead_of(refusal, input)
            if y is not None:
                return y
        return self._by_runs(input)

    def _by_runs(self, input: Any) -> Any:
        """The forward of a container that is not one run, or not the one that it was."""
        if ordinary_everywhere_because() is not None:
            return super().forward(input)  # type: ignore[no-untyped-call]
        children = list(self._modules.values())
        self.__dict__.pop("_pyperc_whole", None)
        runs: dict[int, Run] | None = self.__dict__.get("_pyperc_runs")
        if runs is None:
            runs = self.__dict__["_pyperc_runs"] = {}
        position, x = 0, input
        while position < len(children):
            run = runs.get(position)
            y = None if run is None else run(self._modules, children, x)
            if run is not None and y is not None:
                x, position = y, run.stop
            elif (stretch := stretch_from(children, position)) is not None:
                for later in [start for start in list(runs) if start > position]:
                    runs.pop(later, None)
                runs[position] = run = Run(children, position, stretch)
                if run.whole:
                    self.__dict__["_pyperc_whole"] = run
                x, position = call_native(x, stretch), run.stop
            else:
                runs.pop(position, None)
                x, position = children[position](x), position + 1
        return x

    def walk(self, input: Any, call: Call) -> Any:
        """The forward without anything kept: call(x, stretch) for what is fused, the children's own for the rest."""
        children = list(self._modules.values())
        position, x = 0, input
        while position < len(children):
            stretch = stretch_from(children, position)
            if stretch is None:
                x, position = children[position](x), position + 1
            else:
                x, position = call(x, stretch), position + len(stretch.children)
        return x

    def __add__(self, other: nn.Sequential) -> Sequential:
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> Sequential:
        return Sequential(*super().__mul__(other))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        for kept in ("_pyperc_runs", "_pyperc_whole"):
            state.pop(kept, None)
        return state


class MLP(Sequential):
    """A multi-layer perceptron: x(0) = x, x(l) = f(x(l-1) w(l)^T + b(l)), with the output activation after the last.

    `sizes` are the widths [in, hidden ..., out]; x is [*, sizes[0]], y [*, sizes[-1]]. An activation is a name of
    `pyperc.activations()`, a (name, {parameter: value}) pair or an nn.Module that is built anew for each layer. The
    children are plain nn.Linear and activation modules (none for identity): initialisation, random numbers drawn and
    state_dict keys are those of the nn.Sequential that one would write by hand.

    Raises TypeError if sizes are not integers, ValueError if there are fewer than two or one is not positive, and for
    an unknown activation. EE-559, lecture 3.4.

    >>> MLP([784, 256, 10], activation="tanh")
    MLP(
      (0): Linear(in_features=784, out_features=256, bias=True)
      (1): Tanh()
      (2): Linear(in_features=256, out_features=10, bias=True)
    )
    """

    def __init__(
        self,
        sizes: Iterable[SupportsIndex],
        activation: ActivationLike = "relu",
        output_activation: ActivationLike = "identity",
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        widths = _as_widths(sizes)
        if bias not in (True, False):
            raise TypeError(f"MLP: bias must be True or False, got {bias!r}")
        hidden, last = resolve(activation), resolve(output_activation)
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(width_in, width_out, bias=bias, device=device, dtype=dtype))
            after = hidden if i + 2 < len(widths) else last
            if after[0] != "identity":
                layers.append(module(after))
        super().__init__(*layers)

    def __getitem__(self, idx: slice | int) -> nn.Module:
        if isinstance(idx, slice):
            return Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


def _as_widths(sizes: Iterable[SupportsIndex]) -> list[int]:
    try:
        given = list(sizes)
    except TypeError:
        raise TypeError(f"MLP: sizes must be a sequence of integers, got {sizes!r}") from None
    widths: list[int] = []
    for i, size in enumerate(given):
        try:
            widths.append(operator.index(size))
        except TypeError:
            raise TypeError(f"MLP: sizes[{i}] must be an integer, got {size!r}") from None
        if isinstance(size, bool):
            raise TypeError(f"MLP: sizes[{i}] must be an integer, got {size!r}")
        if widths[i] < 1:
            raise ValueError(f"MLP: sizes[{i}] must be positive, got {size!r}")
    if len(widths) < 2:
        raise ValueError(f"MLP: sizes must hold at least the input's and the output's width, got {given!r}")
    return widths


def network_of(function: str, model: nn.Module) -> tuple[list[Tensor], list[Tensor | None], tuple[Resolved, ...]]:
    """Weights, biases and activations of a fused container whose children form one stretch, for `function`.

    Raises TypeError for another kind of model, ValueError if something stands between its layers or hangs on them.
    """
    if not isinstance(model, Sequential | Linear):
        raise TypeError(
            f"{function}: model must be a fused container (pyperc.MLP, pyperc.nn.Sequential, or an nn.Sequential after "
            f"pyperc.fuse) or a pyperc.Linear, got {type(model).__name__}"
        )
    children: list[nn.Module] = list(model._modules.values()) if isinstance(model, Sequential) else [model]
    if type(model).forward not in (Sequential.forward, Linear.forward) or "forward" in model.__dict__:
        raise ValueError(f"{function}: model must compute its children one after the other, got a forward of its own")
    if model._forward_hooks or model._forward_pre_hooks:
        raise ValueError(f"{function}: model must have no forward hooks, which its derivative would not see")
    stretch = stretch_from(children, 0)
    stop = 0 if stretch is None else len(stretch.children)
    if stretch is None or stop < len(children):
        what = f"child {stop} ({type(children[stop]).__name__})" if children else "no child"
        reason = ordinary_because(children[stop]) if children else None
        raise ValueError(
            f"{function}: the children of model must form one stretch of linear layers and their activations, got "
            f"{what}{': ' + reason if reason else ''}"
        )
    return *stretch.operands(), stretch.layers
