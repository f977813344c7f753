"""explain: what of a module runs fused on a given input, in which way, and where and why something is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyperc import _C, functional
from pyperc.activation import Resolved, chain, describe
from pyperc.blocks import Block, Line
from pyperc.fuse import is_candidate, straight_line
from pyperc.nn import Linear, Sequential, observed_by
from pyperc.runs import (
    Stretch,
    autocast_because,
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

    `split` is how dw and the chain of ds share the pass: "rows", each thread sums dw over its own rows; "layers", one
    layer's dw and dx at a time. `chunk` is the rows that go through the chain together; by "layers", those of dx that
    are made together where it is not made by columns, and 0 in 16 bits, where both products go block by block, in
    memory that each thread keeps.
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
            "layers": f"layer by layer, dw and then dx, {by_layers}",
        }
        return f"{self.threads} thread{'s' * several}, {way[self.split]}"


@dataclass(frozen=True)
class Layer:
    """One line of an explanation: a layer with the activation fused into it, or a module that is called as it is.

        name        the module's name in the model
        module      its class, and the widths of a linear layer
        activation  that is computed with it
        call        "fused"; "ordinary", a call of the module itself; "candidate", which `pyperc.fuse` would change
        run         counts the native calls: layers of the same run are computed in one
        path        of a fused layer: "native", or "aten", torch's own operations
        isa         instruction set; on a GPU its architecture
        dtype       of the numbers that go in; under autocast what it makes of them
        threads     that share the forward pass of the run
        kernel      "gemm", a product by tiles, or "dot", sums along the weight's rows, for few rows or columns; in 16
                    bits also what is multiplied
        tile        of gemm rows of x by columns of the output, whose sums stay in registers; of dot rows by the numbers
                    in a vector
        blocking    rows of x that are taken together, and k, the terms of a sum that are added up before the next
                    block; what several threads share; and how many blocks a long batch is taken in where no x is kept
        pack        how the weight is read: transposed into panels, in place, or along its rows
        saved       what f' is read from, and backward keeps: "output", x(l); "summation", s(l); or "nothing"
        flops       of the forward product, 2 m n k
        note        why something is not native or not fused
        backward    that of the run

    What a plan does not say is empty or 0.
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

    Of a `pyperc.TrainStep` also the `engine` that takes it, and the `note` that says why it is not the native one; the
    layers are then those of its model's own call, not of the step.
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
            engine = f"engine: {self.engine}{self.note and ', as ' + self.note}"
            return f"{engine}\n\nmodel(x) called by itself, which is not the step:\n{Explanation(self.layers)}"
        if not self.layers:
            return "no linear layer was called"
        return "\n".join([_table(self.layers), *_backward(self.layers)])

    __repr__ = __str__


def explain(model: nn.Module | TrainStep, *inputs: Any, **keywords: Any) -> Explanation:
    """What runs when `model(*inputs, **keywords)` is called: for each layer of what is fused its path, ISA, threads and
    blocking, or the reason for an ordinary call; what `pyperc.fuse` would change; and for each other module that calls
    linear layers the reason why it would not. Of a native call on the CPU also how its backward pass goes, whether or
    not anything needs a gradient now: with dx where its input requires one, or is made within the model.

    The model is called once, without gradients and in evaluation mode (restored afterwards), so that neither
    statistics nor random numbers advance. A container that is called several times is explained by its first call; one
    that is not called has no input to plan for, and is said to be so. Of a `pyperc.TrainStep` it says which engine
    takes the step, and explains its model's own call, which the native engine does not make.

    Raises TypeError if `model` is not an nn.Module or no input is given, and whatever the call raises.

    >>> model = Sequential(Linear(4, 3, activation="relu"), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> print(explain(model, torch.zeros(5, 4)))  # `Layer` says what the columns are
    name  module        activation  call      run  path    isa   dtype    threads  kernel  tile  blocking     pack  note
    ----  ------------  ----------  --------  ---  ------  ---...
    0     Linear(4, 3)  relu        fused     0    native  ...   float32  1        gemm    ...   rows 5, k 4  weight ...
    1     LayerNorm               ordinary                                        LayerNorm is not a layer that is fused
    2     Linear(3, 2)  identity    fused     1    native  ...   float32  1        gemm    ...   rows 5, k 3  weight ...
    <BLANKLINE>
    backward of runs 0, 1: 1 thread, dw is summed over the rows, 5 a chunk
    """
    if isinstance(model, TrainStep):
        return Explanation(explain(model.model, *inputs, **keywords).layers, *model.choice())
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be an instance of torch.nn.Module, got {type(model).__name__}")
    model = model._modules.get("_orig_mod") or model  # torch.compile's wrapper: its calls are recorded elsewhere
    try:
        observed = _observe(model, inputs, keywords)
    except TypeError as error:
        if inputs or keywords:
            raise
        raise TypeError("explain: expected an example input after the model, explain(model, x), got none") from error
    return Explanation(tuple(_Tree(observed).lines("", model)))


@dataclass
class _Call:
    """A first call: the stretches that were fused, each with its input, or why none was."""

    ordinary_because: str | None = None
    stretches: list[tuple[Stretch, Any]] = field(default_factory=list)


def _observe(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> dict[nn.Module, _Call]:
    """The first call of each fused container, and of each pyperc.Linear that is called as a module."""
    observed: dict[nn.Module, _Call] = {}
    given = {t.untyped_storage().data_ptr() for t in tree_leaves((inputs, keywords)) if type(t) is Tensor}

    def as_trained(x: Any) -> Any:
        if type(x) is not Tensor or not x.is_floating_point() or x.untyped_storage().data_ptr() in given:
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


class _Tree:
    """The lines of a model, from the top down. A module has them once; `run` numbers the native calls."""

    def __init__(self, observed: dict[nn.Module, _Call]) -> None:
        self.observed = observed
        self.explained: set[nn.Module] = set()
        self.run = itertools.count()

    def lines(self, name: str, module: nn.Module) -> list[Layer]:
        """Those of a module and of all that is in it; none where that holds no linear layer."""
        if module in self.explained:
            return []
        if isinstance(module, Sequential):
            call = self.observed.get(module, _Call("the container was not called"))
            lines = self._in_turn([_joined(name, key) for key in module._modules], list(module), call)
        else:
            lines = self._own(name, module)
            for key, child in module._modules.items():
                lines += [] if child is None else self.lines(_joined(name, key), child)
        if lines:
            self.explained.add(module)
        return lines

    def _own(self, name: str, module: nn.Module) -> list[Layer]:
        """Those of a module that is no fused container: of its line, of a pyperc.Linear, or why it has none."""
        line = straight_line(module)
        if isinstance(line, Line):
            self.explained.update(passed for passed, *_ in line.passed)
            if isinstance(module, Block):
                call = self.observed.get(line.container, _Call("the block was not called, or not with a tensor alone"))
                return self._in_turn([_joined(name, key) for key in line.names], list(line.container), call)
            return [Layer(name, type(module).__name__, "candidate", note="pyperc.fuse would fuse it")]
        if is_candidate(module):
            return [Layer(name, type(module).__name__, "candidate", note="pyperc.fuse would fuse its linear layers")]
        if module in self.observed:
            return self._in_turn([name], [module], self.observed[module])
        if isinstance(module, nn.Linear) and not name:
            line = "alone it is not fused: a pyperc.Linear is, and an nn.Sequential after pyperc.fuse"
        elif isinstance(module, _LISTS) or not _calls_linear(module):
            return []
        return [Layer(name, type(module).__name__, "ordinary", note=line)]

    def _in_turn(self, names: Sequence[str], children: Sequence[nn.Module], call: _Call) -> list[Layer]:
        """The lines for the children of one container, in their order."""
        lines: list[Layer] = []
        stretches = list(call.stretches)
        position = 0
        while position < len(children):
            name, child, stop = names[position], children[position], position + 1
            if stretches and stretches[0][0].children[0] is child:
                stretch, x = stretches.pop(0)
                stop = position + len(stretch.children)
                lines += _stretch(names[position:stop], stretch, x, self.run)
            elif own := self.lines(name, child):
                lines += own
            elif child not in self.explained:
                note = call.ordinary_because or ordinary_because(child) or "an activation that follows no linear layer"
                lines.append(Layer(name, type(child).__name__, "ordinary", note=note))
            position = stop
        return lines


_LISTS = (nn.ModuleList, nn.ModuleDict)


def _calls_linear(module: nn.Module) -> bool:
    """Whether it has a linear layer of torch to call by itself, as a child or in a list."""
    return any(
        (isinstance(child, nn.Linear) and not isinstance(child, Linear))
        or (isinstance(child, _LISTS) and _calls_linear(child))
        for child in module.children()
    )


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _stretch(names: Sequence[str], stretch: Stretch, x: Any, run: Iterator[int]) -> list[Layer]:
    """The lines for one native call: its linear layers, or all of its children where the tensors forbid the call."""
    weights, biases = stretch.operands()
    if takes_part((x, *weights, *biases)):
        return _ordinary(names, stretch, "a tensor subclass or a TorchFunctionMode takes part")
    if isinstance(x, Tensor) and (reason := autocast_because(x.device)) is not None:
        # What autocast makes of each tensor but those of float64.
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
        plan: dict[str, Any] = {"path": "aten", "reason": reason, "layers": [{}] * len(weights)}
    elif functional.is_distributed(x):
        return _sharded(names, stretch, x, run)
    else:
        try:
            dtype, plan = x.dtype, _C.plan(x, weights, biases, chain(stretch.layers))
        except (TypeError, ValueError) as refusal:
            return _ordinary(names, stretch, str(refusal))
    number = next(run)
    backward = Backward(**plan["backward"]) if "backward" in plan else None
    own = {entry.name for entry in fields(Layer)} - {"activation"}
    return [
        _fused(
            name,
            linear,
            resolved,
            run=number,
            path=plan["path"],
            isa=plan.get("isa", ""),
            dtype=str(dtype).removeprefix("torch."),
            threads=plan.get("threads", 0),
            note=plan["reason"],
            backward=backward,
            **{key: value for key, value in layer.items() if key in own},
        )
        for (name, linear), resolved, layer in zip(
            _linears(names, stretch), stretch.layers, plan["layers"], strict=True
        )
    ]


def _sharded(names: Sequence[str], stretch: Stretch, x: Any, run: Iterator[int]) -> list[Layer]:
    """The lines for a stretch of DTensors, which is as many native calls as there are rules for its parts."""
    layers: list[Layer] = []
    linears = _linears(names, stretch)

    def observer(start: int, stop: int, rule: str | None) -> None:
        number = None if rule is None else next(run)
        for (name, linear), resolved in zip(linears[start:stop], stretch.layers[start:stop], strict=True):
            if rule is None:
                note = "DTensors placed in a way that has no rule: torch's operations"
                layers.append(_fused(name, linear, resolved, call="ordinary", note=note))
            else:
                layers.append(_fused(name, linear, resolved, run=number, path="native", note=f"DTensors: {rule}"))

    functional.sharded(x, *stretch.operands(), stretch.layers, observer)
    if not layers:
        for i in range(len(linears)):
            observer(i, i + 1, None)
    return layers


def _ordinary(names: Sequence[str], stretch: Stretch, note: str) -> list[Layer]:
    named = zip(names, stretch.children, strict=True)
    return [Layer(name, type(child).__name__, "ordinary", note=note) for name, child in named]


def _linears(names: Sequence[str], stretch: Stretch) -> list[tuple[str, nn.Linear]]:
    named = zip(names, stretch.children, strict=True)
    return [(name, child) for name, child in named if isinstance(child, nn.Linear)]


def _fused(name: str, linear: nn.Linear, activation: Resolved, call: str = "fused", **plan: Any) -> Layer:
    module = f"{type(linear).__name__}({linear.in_features}, {linear.out_features})"
    return Layer(name, module, call, activation=describe(activation).replace("'", ""), **plan)


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
