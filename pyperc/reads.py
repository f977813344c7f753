"""What the code of a forward reads and calls, found before it is run.

A forward goes the same way on every call as long as all that it reads stays as it is. So its functions are looked
through for names. A global name is resolved. An attribute may be that of any module of the block, for nothing else that
a straight line holds can change: tensors are stand-ins, constants stay. Whatever could change inside is refused, and so
is a call of anything that is not known to be pure.
"""

from __future__ import annotations

import builtins
import dis
import gc
import inspect
import math
import os
import types
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

# A loop runs as its sequence says; other jumps, and changes of state, may go another way on another call.
_LOOPS = {"FOR_ITER", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "JUMP_FORWARD"}
_CHANGES = {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_ATTR", "DELETE_SUBSCR"}
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_VARIABLES = {"LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF"}
_BUILTINS = (
    "abs bool enumerate float int isinstance iter len list max min next range reversed round str sum super tuple zip"
)
_PURE = {getattr(builtins, name) for name in _BUILTINS.split()}
_PURE |= {function for function in vars(math).values() if isinstance(function, types.BuiltinFunctionType)}
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_CONSTANTS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
# Of what torch's modules have, the members that change nothing.
_MEMBERS = {"forward", "children", "named_children", "modules", "named_modules", "keys", "values", "items"}
_TORCH, _PYTHON, _OURS = (
    str(Path(file).parent) + os.sep for file in (inspect.getfile(torch), inspect.getfile(dis), __file__)
)


class NotStraight(Exception):  # noqa: N818
    """Why a module is no straight line of layers, or one with nothing to fuse."""


class Read(NamedTuple):
    """A name, the dictionary in which it was looked up, and what it was: `...` where it was not there."""

    where: Any
    name: str
    value: Any

    def watched(self) -> tuple[Any, str, Any]:
        """As a native step watches it: a dictionary itself, not one of a class's views, the key, and what it is now."""
        where = gc.get_referents(self.where)[0] if isinstance(self.where, types.MappingProxyType) else self.where
        return where, self.name, where.get(self.name, None)


def hold(reads: tuple[Read, ...]) -> bool:
    """Whether all is as it was read."""
    return all((now := where.get(name, ...)) is value or _equal(now, value) for where, name, value in reads)


def _equal(now: Any, then: Any) -> bool:
    # Numbers by value: in a tracer's hands they are objects of its own.
    return isinstance(then, int | float | str) and type(now) is type(then) and bool(now == then)


class Reader:
    """Looks through the forwards of `modules`, all that are in a block, and through the functions that they call.

    `listed` are the functions of torch that may be called. Raises NotStraight for what may go another way.
    """

    def __init__(self, modules: list[nn.Module], listed: Container[Any]) -> None:
        self.modules, self.listed = modules, listed
        self.codes: set[types.CodeType] = set()
        self._functions: set[types.FunctionType] = set()
        self._attributes: set[tuple[str, bool]] = set()
        self._reads: dict[tuple[int, str], Read] = {}

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(self._reads.values())

    def forward(self, module: nn.Module, what: str) -> None:
        function = class_of(module).forward
        if not isinstance(function, types.FunctionType):
            raise NotStraight(f"{what} is no function of Python")
        self._function(function, what)
        if "forward" in vars(module):
            raise NotStraight(f"{what} is not that of its class")
        for owner in (module, *type(module).__mro__):
            if self._read(owner, "forward") is function:
                break

    def _function(self, function: types.FunctionType, what: str) -> None:
        if function in self._functions:
            return
        self._functions.add(function)
        self.codes.add(function.__code__)
        _check(function.__code__, what)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value("a default", default, what)
        to_all_bases = "super" in function.__code__.co_names
        for variable, attributes in names_of(function.__code__):
            for name in self._after(function, variable, attributes, what) if variable else attributes:
                if (name, to_all_bases) not in self._attributes:
                    self._attributes.add((name, to_all_bases))
                    for module in self.modules:
                        self._member(module, name, to_all_bases, what)

    def _after(self, function: types.FunctionType, name: str, attributes: list[str], what: str) -> list[str]:
        """Resolves a name from outside of the function, through Python's modules; the attributes after it."""
        code = function.__code__
        owner: Any = function.__globals__
        if name in code.co_freevars:
            if name == "__class__":  # which super() reads
                return attributes
            owner = _Cell((function.__closure__ or ())[code.co_freevars.index(name)])
        value = self._read(owner, name)
        if value is ...:
            value = getattr(builtins, name, ...)
        while isinstance(value, types.ModuleType) and attributes:
            name, *attributes = attributes
            value = self._read(value, name)
        self._value(name, value, what)
        return attributes

    def _member(self, module: nn.Module, name: str, to_all_bases: bool, what: str) -> None:
        """What a module has by this name, if anything."""
        if name in module._parameters or name in module._buffers:
            raise NotStraight(f"{what} reads {name}, a parameter or buffer")
        owners: list[Any] = [module, *(cls for cls in type(module).__mro__ if not _is_foreign(cls))]
        if not any(name in vars(owner) for owner in owners):
            if name not in _MEMBERS and hasattr(type(module), name):
                raise NotStraight(f"{what} reads {name}, which is torch's of {type(module).__name__}")
            return
        for owner in owners:
            value = self._read(owner, name)
            if value is not ...:
                self._value(name, value, what)
                if owner is not module and not to_all_bases:
                    break

    def _read(self, owner: Any, name: str) -> Any:
        where = owner if isinstance(owner, dict | _Cell) else vars(owner)
        value = where.get(name, ...)
        self._reads[id(owner), name] = Read(where, name, value)
        return value

    def _value(self, name: str, value: Any, what: str) -> None:
        """Raises for what may change inside, or when it is called change something."""
        if isinstance(value, staticmethod | property):
            value = value.__func__ if isinstance(value, staticmethod) else value.fget
        if _is_constant(value) or (isinstance(value, _FUNCTIONS) and (value in self.listed or value in _PURE)):
            return
        if isinstance(value, types.FunctionType) and not is_of_a_library(value.__code__):
            self._function(value, f"{value.__name__}, which its forward calls,")
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            raise unlisted(value)
        elif value is ...:
            raise NotStraight(f"{what} reads {name}, which is nowhere")
        else:
            raise NotStraight(f"{what} reads {name}, a {type(value).__name__}, which may change inside")


class _Cell:
    """A variable of the function around, as if in a dictionary."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def get(self, name: str, default: Any) -> Any:
        return self.cell.cell_contents


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was fused."""
    return getattr(type(module), "fused_from", type(module))


def is_of_a_library(code: types.CodeType) -> bool:
    """Whether it is code of torch, of Python's own library, or of this package."""
    file = code.co_filename
    return file.startswith((_TORCH, _OURS, "<frozen")) or (file.startswith(_PYTHON) and "-packages" not in file)


def names_of(code: types.CodeType) -> Iterator[tuple[str, list[str]]]:
    """Each chain of attributes with the global or outer variable that it begins at, "" where at none."""
    variable, attributes = "", list[str]()
    for instruction in dis.get_instructions(code):
        if instruction.opname in _ATTRIBUTES:
            attributes.append(instruction.argval)
        elif instruction.opname not in ("EXTENDED_ARG", "CACHE", "NOP"):
            if variable or attributes:
                yield variable, attributes
            variable, attributes = instruction.argval if instruction.opname in _VARIABLES else "", []


def _check(code: types.CodeType, what: str) -> None:
    """Raises where the instructions themselves may do something else on another call."""
    for instruction in dis.get_instructions(code):
        if instruction.opcode in _JUMPS and instruction.opname not in _LOOPS:
            raise NotStraight(f"{what} branches (if, and, or, while, with, try, assert)")
        if instruction.opname in _CHANGES:
            raise NotStraight(f"{what} sets an attribute, an item or a global")
        if instruction.opname == "IMPORT_NAME":
            raise NotStraight(f"{what} imports {instruction.argval}")
    if any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        raise NotStraight(f"{what} defines a function (def, lambda, comprehension)")


def unlisted(function: Any) -> NotStraight:
    name = getattr(function, "__name__", function)
    return NotStraight(f"its forward calls {name}, which is neither a module nor a listed activation")


def _is_constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple | frozenset) and all(map(_is_constant, value)))


def _is_foreign(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("torch", "pyperc", "builtins")
