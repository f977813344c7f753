"""explain: what of a module runs fused on a given input, in which way, and where and why something is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pyperc import _C, functional
from pyperc.activation import chain, describe
from pyperc.blocks import Block
from pyperc.fuse import is_candidate, straight_line
from pyperc.nn import Linear, Sequential, observed_by
from pyperc.runs import (
    LINEAR_TYPES,
    Stretch,
    call_native,
    ordinary_because,
    ordinary_everywhere_because,
    own_activation,
    takes_part,
)
from pyperc.step import TrainStep


@dataclass(frozen=True)
class Backward:
    """How the backward pass of a native call runs on the CPU, if there is one; str() says it in words.

    `split` is how dw and the chain of ds share the pass: "rows", each thread sums dw over its own rows; "tiles", the
    chain of all layers, then tiles of dw; "layers", one layer's dw and dx at a time. `chunk` is the rows that go
    through the chain together; by "layers", those of dx that are made together where it is not made by columns, and 0
    in 16 bits, where both products go block by block, in memory that each thread keeps.
    """

    threads: int
    split: str
    chunk: int

    def __str__(self) -> str:
        several = self.threads > 1
        by_rows = "each thread sums dw over its own rows" if several else "dw is summed over the rows"
        by_layers = f"by columns or by chunks of {self.chunk} rows" if self.chunk else "block by block"
        way = {
            "rows": f"{by_rows}, {self.chunk} a chunk",
            "tiles": f"the chain of ds first, {self.chunk} rows a chunk, then tiles of dw",
            "layers": f"layer by layer, dw and then dx, {by_layers}",
        }
        return f"{self.threads} thread{'s' * several}, {way[self.split]}"


@dataclass(frozen=True)
class Layer:
    """One line of an explanation: a layer with the activation fused into it, or a child called as a module.

    `name` is the module's name in the model; `call` is "fused", "ordinary" or "candidate" (an nn.Sequential that
    `pyperc.fuse` would change); `run` counts the native calls, so layers of the same `run` are computed in one.
    `path` is "native" or "aten" for a fused layer; `note` says why something is not native or not fused. The other
    fields are the plan's, and empty or 0 where there is none; `flops` are those of the forward product, 2 m n k;
    `backward` is that of the run.
    """

    name: str
    module: str
    call: str
    run: int | None = None
    activation: str = ""
    path: str = ""
    isa: str = ""
    dtype: str = ""
    threads: int = 0
    kernel: str = ""
    tile: str = ""
    blocking: str = ""
    pack: str = ""
    saved: str = ""
    flops: int = 0
    note: str = ""
    backward: Backward | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `layers` is the data, str() a table of it, with a line for each way to go backward.

    Of a `pyperc.TrainStep` also the `engine` that runs it, and the `note` that says why it is not the native one.
    """

    layers: tuple[Layer, ...]
    engine: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The layers as plain dicts, ready for json.dumps."""
        of_step = {"engine": self.engine, "note": self.note} if self.engine else {}
        return {**of_step, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        if self.engine:
            return f"engine: {self.engine}{self.note and ', as ' + self.note}\n\n{Explanation(self.layers)}"
        if not self.layers:
            return "no nn.Sequential with a linear layer, and no pyperc.Linear"
        return "\n".join([_table(self.layers), *_backward(self.layers)])

    __repr__ = __str__


def explain(model: nn.Module | TrainStep, *inputs: Any, **keywords: Any) -> Explanation:
    """What runs when `model(*inputs, **keywords)` is called: for each layer of each fused container its path, ISA,
    threads and blocking, or the reason for an ordinary call; and the containers that `pyperc.fuse` would change. Of a
    native call on the CPU also how its backward pass goes, whether or not anything needs a gradient now: with dx where
    its input requires one, or is made within the model.

    The model is called once, without gradients and in evaluation mode (restored afterwards), so that neither
    statistics nor random numbers advance. A container that is called several times is explained by its first call; one
    that is not called has no input to plan for, and is said to be so. For a `pyperc.TrainStep` its model is explained,
    and which engine takes the step.

    Raises TypeError if `model` is not an nn.Module, and whatever the call raises.

    >>> explanation = explain(Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout()), torch.zeros(2, 4))
    >>> [(layer.name, layer.call, layer.activation) for layer in explanation.layers]
    [('0', 'fused', 'relu'), ('2', 'ordinary', '')]
    """
    if isinstance(model, TrainStep):
        return Explanation(explain(model.model, *inputs, **keywords).layers, *model.choice())
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be an instance of torch.nn.Module, got {type(model).__name__}")
    model = model._modules.get("_orig_mod") or model  # torch.compile's wrapper: its calls are recorded elsewhere
    observed = _observe(model, inputs, keywords)
    layers: list[Layer] = []
    run = itertools.count()
    for name, module in model.named_modules():
        if is_candidate(module):
            layers.append(Layer(name, type(module).__name__, "candidate", note="pyperc.fuse would fuse it"))
        elif isinstance(module, Sequential):
            names = [f"{name}.{key}" if name else key for key in module._modules]
            layers += _children(
                names, list(module._modules.values()), observed.get(module, _Call("the container was not called")), run
            )
        elif isinstance(module, Block) and (line := module.line()) is not None:
            names = [f"{name}.{child}" if name else child for child in line.names]
            call = observed.get(line.container, _Call("the block was not called, or not with a tensor alone"))
            layers += _children(names, list(line.container._modules.values()), call, run)
        elif straight_line(module) is not None:
            layers.append(Layer(name, type(module).__name__, "candidate", note="pyperc.fuse would fuse it"))
        elif module in observed:
            layers += _children([name], [module], observed[module], run)
    return Explanation(tuple(layers))


@dataclass
class _Call:
    """A first call: the stretches that were fused, each with its input, or why none was."""

    ordinary_because: str | None = None
    stretches: list[tuple[Stretch, Any]] = field(default_factory=list)


def _observe(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> dict[nn.Module, _Call]:
    """The first call of each fused container, and of each pyperc.Linear that is called as a module."""
    observed: dict[nn.Module, _Call] = {}
    given = {t.untyped_storage().data_ptr() for t in tree_leaves((inputs, keywords)) if type(t) is torch.Tensor}

    def as_trained(x: Any) -> Any:
        if type(x) is not torch.Tensor or not x.is_floating_point() or x.untyped_storage().data_ptr() in given:
            return x
        return x.detach().requires_grad_()

    def observer(container: Sequential, input: Any) -> Any:
        seen = _Call(ordinary_everywhere_because())
        observed.setdefault(container, seen)

        def call(x: Any, stretch: Stretch) -> Any:
            seen.stretches.append((stretch, as_trained(x)))
            return call_native(x, stretch)

        if seen.ordinary_because is None:
            return container.walk(input, call)
        return nn.Sequential.forward(container, input)  # type: ignore[no-untyped-call]

    def before_linear(linear: nn.Linear, args: tuple[Any, ...]) -> None:
        stretch = Stretch([linear], [linear], (own_activation(linear),))
        observed.setdefault(linear, _Call(None, [(stretch, as_trained(args[0]))]))

    with observed_by(observer), torch.no_grad(), ExitStack() as restore:
        for module in model.modules():
            restore.callback(setattr, module, "training", module.training)
            module.training = False
        inside = {child for module in model.modules() if isinstance(module, Sequential) for child in module.children()}
        for module in model.modules():
            if isinstance(module, Linear) and module not in inside:
                restore.callback(module.register_forward_pre_hook(before_linear).remove)
        model(*inputs, **keywords)
    return observed


def _children(names: Sequence[str], children: Sequence[nn.Module], call: _Call, run: Iterator[int]) -> list[Layer]:
    """The lines for the children of one container, in their order; `run` numbers the native calls."""
    layers: list[Layer] = []
    stretches = list(call.stretches)
    position = 0
    while position < len(children):
        child = children[position]
        if stretches and stretches[0][0].children[0] is child:
            stretch, x = stretches.pop(0)
            stop = position + len(stretch.children)
            layers += _stretch(names[position:stop], stretch, x, run)
            position = stop
        else:
            note = call.ordinary_because or ordinary_because(child) or "an activation that follows no linear layer"
            layers.append(Layer(names[position], type(child).__name__, "ordinary", note=note))
            position += 1
    return layers


def _stretch(names: Sequence[str], stretch: Stretch, x: Any, run: Iterator[int]) -> list[Layer]:
    """The lines for one native call: its linear layers, or all of its children where the tensors forbid the call."""
    weights, biases = stretch.operands()
    if functional.is_distributed(x):
        return _sharded(names, stretch, x, run)
    try:
        refusal = "a tensor subclass or a TorchFunctionMode takes part" if takes_part((x, *weights, *biases)) else ""
        plan = {} if refusal else _C.plan(x, weights, biases, chain(stretch.layers))
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if refusal:
        return [
            Layer(name, type(child).__name__, "ordinary", note=refusal)
            for name, child in zip(names, stretch.children, strict=True)
        ]
    number = next(run)
    backward = Backward(**plan["backward"]) if "backward" in plan else None
    own = {entry.name for entry in fields(Layer)}
    linears = [pair for pair in zip(names, stretch.children, strict=True) if type(pair[1]) in LINEAR_TYPES]
    return [
        Layer(
            name,
            f"{type(linear).__name__}({layer['in']}, {layer['out']})",
            "fused",
            run=number,
            path=plan["path"],
            isa=plan.get("isa", ""),
            dtype=str(x.dtype).removeprefix("torch."),
            threads=plan.get("threads", 0),
            note=plan["reason"],
            backward=backward,
            **{key: value for key, value in layer.items() if key in own and key != "activation"},
            activation=describe(resolved).replace("'", ""),
        )
        for (name, linear), resolved, layer in zip(linears, stretch.layers, plan["layers"], strict=True)
    ]


def _sharded(names: Sequence[str], stretch: Stretch, x: Any, run: Iterator[int]) -> list[Layer]:
    """The lines for a stretch of DTensors, which is as many native calls as there are rules for its parts."""
    layers: list[Layer] = []
    linears = [pair for pair in zip(names, stretch.children, strict=True) if type(pair[1]) in LINEAR_TYPES]

    def observer(start: int, stop: int, rule: str | None) -> None:
        number = None if rule is None else next(run)
        for (name, linear), resolved in zip(linears[start:stop], stretch.layers[start:stop], strict=True):
            module = f"{type(linear).__name__}({linear.in_features}, {linear.out_features})"
            activation = describe(resolved).replace("'", "")
            if rule is None:
                note = "DTensors placed in a way that has no rule: torch's operations"
                layers.append(Layer(name, module, "ordinary", activation=activation, note=note))
            else:
                note = f"DTensors: {rule}"
                layers.append(Layer(name, module, "fused", run=number, activation=activation, path="native", note=note))

    functional.sharded(x, *stretch.operands(), stretch.layers, observer)
    if not layers:
        for i in range(len(linears)):
            observer(i, i + 1, None)
    return layers


_COLUMNS = (
    "name",
    "module",
    "activation",
    "call",
    "run",
    "path",
    "isa",
    "dtype",
    "threads",
    "kernel",
    "tile",
    "blocking",
    "pack",
    "note",
)


def _table(layers: Sequence[Layer]) -> str:
    rows = [[_cell(layer, column) for column in _COLUMNS] for layer in layers]
    shown = [i for i, _ in enumerate(_COLUMNS) if any(row[i] for row in rows)]
    lines = [[_COLUMNS[i] for i in shown], *([row[i] for i in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _backward(layers: Sequence[Layer]) -> list[str]:
    """A line for each way that a backward pass takes, with the runs that take it."""
    runs: dict[Backward, list[int]] = {}
    for run, backward in {layer.run: layer.backward for layer in layers}.items():
        if run is not None and backward is not None:
            runs.setdefault(backward, []).append(run)
    lines = [f"backward of run{'s' * (len(of) > 1)} {', '.join(map(str, of))}: {way}" for way, of in runs.items()]
    return ["", *lines] if lines else []


def _cell(layer: Layer, column: str) -> str:
    value = getattr(layer, column)
    if value is None or (column in ("threads", "flops") and not value):
        return ""
    return "(model)" if column == "name" and not value else str(value)
