"""Modules that are no nn.Sequential, but whose forward sends its input down a straight line of layers.

    def forward(self, x):
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))

The feed-forward blocks of transformer libraries, and most multi-layer perceptrons that are written by hand.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyperc.activation import Activation, activations, module
from pyperc.nn import Sequential
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
# A loop runs as its sequence says; other jumps, and changes of state, may go another way on another call.
_LOOPS = {"FOR_ITER", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "JUMP_FORWARD"}
_CHANGES = {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_ATTR", "DELETE_SUBSCR"}
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_IS_CHECK_TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
# The tracer's own code: torch's and Python's.
_TORCH, _PYTHON = str(Path(inspect.getfile(torch)).parent), str(Path(inspect.getfile(dis)).parent)


class Line(NamedTuple):
    """A straight line of layers, and what must still hold for the forward to be that line."""

    container: Sequential
    names: list[str]  # of the container's children in the block
    argument: str  # the name of forward's only argument
    families: list[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]]  # children, and as they were
    passed: list[tuple[nn.Module, Any, dict[str, Any]]]  # modules run through: their forward and their attributes

    def holds(self) -> bool:
        return all(children == were for children, were in self.families) and all(
            _forward_of(passed) is forward and _same(_attributes(passed), attributes)
            for passed, forward, attributes in self.passed
        )

    def hooked(self) -> bool:
        """Whether a module that the line has no call for has a hook, which the line would pass over."""
        return any(
            getattr(passed, f"_{kind}_hooks")
            for passed, _, _ in self.passed[1:]
            for kind in ("forward", "forward_pre", "backward", "backward_pre")
        )


class Block(nn.Module):
    """The base that `pyperc.fuse` puts before such a module's own class."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        line = self._line_to_take()
        if line is not None and not line.hooked():
            if len(args) == 1 and not keywords:
                return line.container.forward(args[0])
            if not args and keywords.keys() == {line.argument}:
                return line.container.forward(keywords[line.argument])
        return super().forward(*args, **keywords)

    def _line_to_take(self) -> Line | None:
        if torch.compiler.is_compiling():
            # Dynamo cannot trace the search, but since 2.12 it can the check, and compiles anew when that would fail.
            line: Line | None = self.__dict__.get("_pyperc_line") if _IS_CHECK_TRACED else None
            return line if line is not None and line.holds() else None
        return self.line() if ordinary_everywhere_because() is None else None

    def line(self) -> Line | None:
        """The line as the module is now."""
        line: Line | None = self.__dict__.get("_pyperc_line")
        if line is None or not line.holds():
            line = self.__dict__["_pyperc_line"] = line_of(self)
        return line

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(self.__dict__ if inherited is None else inherited())
        state.pop("_pyperc_line", None)
        return state


def line_of(block: nn.Module) -> Line | None:
    """The straight line that the forward of `block` is, or None if it is anything else, or nothing to fuse."""
    if "forward" in block.__dict__ or not any(type(child) in LINEAR_TYPES for child in block.modules()):
        return None
    bare = _bare(block)
    if not _has_straight_forward(bare):
        return None
    tracer, codes = _Tracer(), _Codes(getattr(type(bare).forward, "__code__", None))
    try:
        with codes:
            graph = tracer.trace(bare)
    except Exception:  # whatever forward does with a stand-in for a tensor
        return None
    if not codes.seen or not all(_is_straight(code) for code in codes.seen):
        return None
    layers = _layers(block, graph)
    if layers is None:
        return None
    argument, names, children = layers
    container = Sequential(*children)
    if not any((stretch := stretch_from(children, i)) and len(stretch.children) > 1 for i in range(len(children))):
        return None
    families = [(m._modules, dict(m._modules)) for m in block.modules() if m._modules]
    passed = [(m, _forward_of(m), _attributes(m)) for m in (block, *tracer.inlined)]
    return Line(container, names, argument, families, passed)


def _bare(block: nn.Module) -> nn.Module:
    """The block for the tracer: its own forward, not the one that `fuse` has put before it."""
    original = type(block).__dict__.get("fused_from")
    if original is None:
        return block
    bare: nn.Module = original.__new__(original)
    bare.__dict__.update(block.__dict__)
    return bare


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.inlined: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LINEAR_TYPES or isinstance(m, nn.Sequential | Activation) or super().is_leaf_module(m, "")

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.is_leaf_module(m, ""):
            if not _has_straight_forward(m):
                raise NotImplementedError  # here already: a model may be large
            self.inlined.append(m)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, target: Any, *args: Any, **keywords: Any) -> fx.Node:
        if kind == "call_function" and target not in _ACTIVATIONS and target not in _PURE:
            raise NotImplementedError
        return super().create_node(kind, target, *args, **keywords)


class _Codes:
    """Collects the code of a function and of those outside of torch and Python's library that are called from there."""

    def __init__(self, function: types.CodeType | None) -> None:
        self.function, self.depth = function, 0
        self.seen: set[types.CodeType] = set()

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        sys.setprofile(self._look)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)

    def _look(self, frame: types.FrameType, event: str, _: Any) -> None:
        if frame.f_code is self.function:
            self.depth += (event == "call") - (event == "return")
        file = frame.f_code.co_filename
        tracers = file.startswith((_TORCH, "<frozen")) or file == __file__
        if event == "call" and self.depth and not tracers and ("-packages" in file or not file.startswith(_PYTHON)):
            self.seen.add(frame.f_code)


def _has_straight_forward(block: nn.Module) -> bool:
    code = getattr(type(block).forward, "__code__", None)
    return code is not None and _is_straight(code)


def _is_straight(code: types.CodeType) -> bool:
    return not any(
        (i.opcode in _JUMPS and i.opname not in _LOOPS) or i.opname in _CHANGES for i in dis.get_instructions(code)
    ) and not any(isinstance(constant, types.CodeType) for constant in code.co_consts)


def _layers(block: nn.Module, graph: fx.Graph) -> tuple[str, list[str], list[nn.Module]] | None:
    """The name of the argument; names and modules of the line's steps; None where it forks."""
    argument = ""
    names: list[str] = []
    children: list[nn.Module] = []
    before: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if before is not None or node.args:
                return None
            argument = str(node.target)
        else:
            constants = [*node.args[1:], *node.kwargs.values()]
            if not node.args or node.args[0] is not before or len(node.all_input_nodes) > 1:
                return None
            if node.op == "output":
                return argument, names, children
            child = block.get_submodule(node.target) if node.op == "call_module" else _module_of(node)
            if child is None or (node.op == "call_module" and constants):
                return None
            names.append(node.target if node.op == "call_module" else node.name)
            children.append(child)
        if len(node.users) != 1:
            return None
        before = node
    return None


def _module_of(node: fx.Node) -> nn.Module | None:
    """A module that computes what the node's function or method does."""
    target: Any = node.target
    constants = node.args[1:]
    if target in _ACTIVATIONS:
        activation = _ACTIVATIONS[target](*constants, **node.kwargs)
        return None if getattr(activation, "inplace", False) else activation
    if target in _PURE or (node.op == "call_method" and target in _PURE_METHODS):
        return _Function(getattr(Tensor, target) if isinstance(target, str) else target, constants, node.kwargs)
    return None


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.args, self.keywords = function, args, keywords

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.args, **self.keywords)


def _forward_of(block: nn.Module) -> Any:
    return getattr(type(block), "fused_from", type(block)).forward


def _attributes(block: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in block.__dict__.items() if key[0] != "_" and key != "training"}


def _same(now: dict[str, Any], then: dict[str, Any]) -> bool:
    return len(now) == len(then) and all(key in now and _unchanged(now[key], value) for key, value in then.items())


def _unchanged(now: Any, then: Any) -> bool:
    # Numbers by value: in a tracer's hands they are objects of its own.
    return now == then if isinstance(then, int | float | str) and isinstance(now, type(then)) else now is then
