"""Modules that are no nn.Sequential, but whose forward sends its input down a straight line of layers.

    def forward(self, x):
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))

The feed-forward blocks of transformer libraries, and most multi-layer perceptrons that are written by hand.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyperc.activation import Activation, activations, module
from pyperc.nn import Sequential
from pyperc.reads import NotStraight, Read, Reader, class_of, hold, is_of_a_library, unlisted
from pyperc.runs import LINEAR_TYPES, ordinary_everywhere_because, stretch_from

# What may stand in a line beside modules: activations by any of their names, and pure functions of one tensor.
_ACTIVATIONS: dict[Any, type[nn.Module]] = {}
for _name in activations():
    _class = type(module(_name))
    if _class is not Activation and _name != "gelu_tanh":
        _ACTIVATIONS[_name] = _class
        for _owner in (F, torch):
            if hasattr(_owner, _name):
                _ACTIVATIONS[getattr(_owner, _name)] = _class
_PURE = {torch.flatten, torch.softmax, torch.log_softmax, F.softmax, F.log_softmax}
_PURE_METHODS = {"flatten", "view", "reshape", "softmax", "log_softmax"}
_IS_CHECK_TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


@dataclass(frozen=True)  # and no tuple, which torch.export would flatten without end: a block's attributes hold it
class Line:
    """A straight line of layers, and what must still hold for the forward to be that line."""

    container: Sequential
    names: list[str]  # of the container's children in the block
    argument: str  # the name of forward's only argument
    families: list[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]]  # children, and as they were
    passed: list[tuple[nn.Module, type[nn.Module]]]  # modules run through, the block first, and their classes
    reads: tuple[Read, ...]  # whatever else their forwards read

    def holds(self, block: nn.Module) -> bool:
        return (
            self.passed[0][0] is block  # and not one whose attributes were copied to this
            and all(children == were for children, were in self.families)
            and all(class_of(passed) is cls for passed, cls in self.passed)
            and hold(self.reads)
        )

    def hooked(self) -> bool:
        """Whether a module that the line has no call for has a hook, which the line would pass over."""
        return any(
            getattr(passed, f"_{kind}_hooks")
            for passed, _ in self.passed[1:]
            for kind in ("forward", "forward_pre", "backward", "backward_pre")
        )


class Block(nn.Module):
    """The base that `pyperc.fuse` puts before such a module's own class, whose names it leaves free."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        line = _line_to_take(self)
        if line is not None and not line.hooked():
            if len(args) == 1 and not keywords:
                return line.container.forward(args[0])
            if not args and keywords.keys() == {line.argument}:
                return line.container.forward(keywords[line.argument])
        return super().forward(*args, **keywords)

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(self.__dict__ if inherited is None else inherited())
        state.pop("_pyperc_line", None)
        return state


def _line_to_take(block: Block) -> Line | None:
    if torch.compiler.is_compiling():
        # Dynamo cannot trace the search, but since 2.12 it can the check, and compiles anew when that would fail.
        line: Line | None = block.__dict__.get("_pyperc_line") if _IS_CHECK_TRACED else None
        return line if line is not None and line.holds(block) else None
    return line_now(block) if ordinary_everywhere_because() is None else None


def line_now(block: Block) -> Line | None:
    """The line as the block is now, which keeps it."""
    line: Line | None = block.__dict__.get("_pyperc_line")
    if line is None or not line.holds(block):
        try:
            line = line_of(block)
        except NotStraight:
            line = None
        block.__dict__["_pyperc_line"] = line
    return line


def line_of(block: nn.Module) -> Line:
    """The straight line that the forward of `block` is. Raises NotStraight, which says why it is none."""
    if "forward" in block.__dict__:
        raise NotStraight("has a forward of its own")
    if not any(type(child) in LINEAR_TYPES for child in block.modules()):
        raise NotStraight("holds no linear layer of the class nn.Linear or pyperc.Linear itself")
    reader = Reader(list(block.modules()), _ACTIVATIONS.keys() | _PURE)
    reader.forward(block, "its forward")
    tracer, strays = _Tracer(reader), _Strays(reader)
    try:
        with strays:
            graph = tracer.trace(_bare(block))
    except NotStraight:
        raise
    except Exception as error:  # whatever forward does with a stand-in for a tensor
        came, *_ = str(error).splitlines() or [type(error).__name__]
        raise NotStraight(f"torch.fx cannot follow its forward: {came}") from error
    if not strays.works:
        raise NotStraight("the calls of its forward cannot be watched")
    for code in strays.seen:
        raise NotStraight(f"its forward calls {code.co_name}, but not by its name")
    argument, names, children = _layers(block, graph)
    container = Sequential(*children)
    if not any((stretch := stretch_from(children, i)) and len(stretch.children) > 1 for i in range(len(children))):
        raise NotStraight("none of its linear layers that may be fused has another or an activation after it")
    families = [(m._modules, dict(m._modules)) for m in block.modules() if m._modules]
    passed = [(m, class_of(m)) for m in (block, *tracer.inlined)]
    return Line(container, names, argument, families, passed, reader.reads)


def _bare(block: nn.Module) -> nn.Module:
    """The block for the tracer: its own forward, not the one that `fuse` has put before it."""
    original = class_of(block)
    if original is type(block):
        return block
    bare: nn.Module = original.__new__(original)
    bare.__dict__.update(block.__dict__)
    return bare


class _Tracer(fx.Tracer):
    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.inlined: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            type(m) in LINEAR_TYPES
            or isinstance(m, nn.Sequential | Activation | Block)
            or super().is_leaf_module(m, "")
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.is_leaf_module(m, ""):
            self.reader.forward(m, f"the forward of {type(m).__name__}")
            self.inlined.append(m)
            forward = m.forward  # without hooks: the line is taken only where there are none
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, target: Any, *args: Any, **keywords: Any) -> fx.Node:
        if kind == "call_function" and target not in _ACTIVATIONS and target not in _PURE:
            raise unlisted(target)
        return super().create_node(kind, target, *args, **keywords)


class _Strays:
    """Collects code that the functions of a reader call by no name: an __iter__, a __getattr__, a __call__."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.works = False
        self.seen: set[types.CodeType] = set()

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        sys.setprofile(self._look)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)

    def _look(self, frame: types.FrameType, event: str, _: Any) -> None:
        codes, caller = self.reader.codes, frame.f_back
        if event == "call" and frame.f_code in codes:
            self.works = True
        elif event == "call" and caller and caller.f_code in codes and not is_of_a_library(frame.f_code):
            self.seen.add(frame.f_code)


def _layers(block: nn.Module, graph: fx.Graph) -> tuple[str, list[str], list[nn.Module]]:
    """The name of the argument; names and modules of the line's steps. Raises where it forks."""
    argument = ""
    names: list[str] = []
    children: list[nn.Module] = []
    before: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if before is not None or node.args:
                raise NotStraight("its forward takes other than one argument without a default")
            argument = str(node.target)
        else:
            is_module, is_end = node.op == "call_module", node.op == "output"
            constants = [*node.args[1:], *node.kwargs.values()]
            alone = bool(node.args) and node.args[0] is before and len(node.all_input_nodes) == 1
            if not alone or (is_module and constants):
                what = "what it returns" if is_end else node.name
                raise NotStraight(f"in its forward, {what} does not follow from the result before it alone")
            if is_end:
                break
            names.append(node.target if is_module else node.name)
            children.append(block.get_submodule(node.target) if is_module else _module_of(node))
        if len(node.users) != 1:
            raise NotStraight(f"its forward uses {node.name} {len(node.users)} times, not once")
        before = node
    return argument, names, children


def _module_of(node: fx.Node) -> nn.Module:
    """A module that computes what the node's function or method does."""
    target: Any = node.target
    constants = node.args[1:]
    if target in _ACTIVATIONS:
        activation = _ACTIVATIONS[target](*constants, **node.kwargs)
        if getattr(activation, "inplace", False):
            raise NotStraight(f"its forward calls {node.name} in place")
        return activation
    if target in _PURE or (node.op == "call_method" and target in _PURE_METHODS):
        return _Function(getattr(Tensor, target) if isinstance(target, str) else target, constants, node.kwargs)
    raise unlisted(target)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.keywords = function, args, keywords

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.args, **self.keywords)
