"""fuse and unfuse: the containers of an existing module exchange their class in place, and nothing else."""

from __future__ import annotations

import copyreg
import types
from typing import Any, ClassVar, SupportsIndex, TypeVar

from torch import nn

from pyperc.blocks import Block, Line, line_now, line_of
from pyperc.nn import MLP, Sequential
from pyperc.reads import NotStraight

M = TypeVar("M", bound=nn.Module)


def fuse(module: M) -> M:
    """Make every nn.Sequential in `module` that holds a linear layer compute as a `pyperc.nn.Sequential`, in place.

    Parameters, buffers, hooks and state_dict keys stay as they are; only the class of these containers changes.
    nn.Sequential itself becomes pyperc.nn.Sequential. A subclass becomes a subclass of both, so that isinstance holds
    and a forward that it defines still runs, with super().forward fused.

    A module of another class whose forward sends its one argument down a straight line of layers,
    `self.fc2(F.gelu(self.fc1(x)))`, becomes a subclass of its class that computes this line so. Its forward must have
    no branch, change nothing, and read nothing that may change inside, as a list or a dict may; it is run once on a
    stand-in for a tensor (torch.fx). The line is found anew on a call after the module's children, or attributes and
    globals that its forward reads, have changed, or it was copied; until then, a call that torch.compile or
    torch.export traces takes the class's own forward.

    Containers that derive from pyperc.nn.Sequential already, and all other modules, stay; `pyperc.explain` says why one
    that holds linear layers did. Returns `module`.

    Raises TypeError if `module` is not an nn.Module, or holds one of a class that cannot have a subclass; nothing is
    changed then.

    >>> import torch
    >>> model = fuse(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()))
    >>> type(model).__module__, isinstance(model, nn.Sequential), model(torch.zeros(2, 2, 2)).shape
    ('pyperc.nn', True, torch.Size([2, 3]))
    """
    _check_module("fuse", module)
    found: list[tuple[nn.Module, type[nn.Module], Line | None]] = []
    for inner in module.modules():
        if is_candidate(inner):
            found.append((inner, fused_class(type(inner)), None))
        elif not isinstance(inner, Block) and isinstance(line := straight_line(inner), Line):
            found.append((inner, fused_class(type(inner)), line))
    # All or none of it: what could raise has been done.
    for inner, cls, kept in found:
        object.__setattr__(inner, "__class__", cls)
        if kept is not None:
            inner.__dict__["_pyperc_line"] = kept
    return module


def unfuse(module: M) -> M:
    """Undo `fuse` in place: every fused container gets back the class it had; an MLP becomes a plain nn.Sequential.

    Containers of a class that itself derives from pyperc.nn.Sequential or pyperc.MLP have no class to go back to, and
    stay. Returns `module`. Raises TypeError if `module` is not an nn.Module.

    >>> type(unfuse(fuse(nn.Sequential(nn.Linear(2, 2))))) is nn.Sequential
    True
    """
    _check_module("unfuse", module)
    for container in list(module.modules()):
        original = _original_class(type(container))
        if original is not None:
            for kept in ("_pyperc_runs", "_pyperc_whole", "_pyperc_line"):
                container.__dict__.pop(kept, None)
            object.__setattr__(container, "__class__", original)
    return module


def is_candidate(module: nn.Module) -> bool:
    """True for an nn.Sequential, or an instance of a subclass, that `fuse` would change."""
    return (
        isinstance(module, nn.Sequential)
        and not isinstance(module, Sequential)
        and any(isinstance(child, nn.Linear) for child in module.children())
    )


def straight_line(module: nn.Module) -> Line | str:
    """The line of layers as which `fuse` would compute, or computes, the forward of a module; or why it does not."""
    if isinstance(module, Block) and (line := line_now(module)) is not None:
        return line
    cls = type(module)
    if isinstance(module, nn.Sequential) or cls.__module__.split(".")[0] in ("torch", "pyperc"):
        return f"pyperc.fuse leaves the forward of {cls.__name__} to {cls.__module__.split('.')[0]}"
    try:
        return line_of(module)
    except NotStraight as reason:
        return str(reason)


class Made(nn.Module):
    """Base of the classes that `fused_class` makes; they stand in no module by name, so a pickle names `fused_from`."""

    fused_from: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        """In place of that of `fused_from`, which may keep a list of classes, or want arguments."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new, (self.fused_from, *reduced[1][1:]), *reduced[2:])


_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.Sequential: Sequential}


def fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """pyperc.nn.Sequential for nn.Sequential; for a subclass of that the one class that derives from both, and for
    another class the one that derives from Block and it."""
    if base not in _FUSED:
        bases = (Made, base, Sequential) if issubclass(base, nn.Sequential) else (Made, Block, base)
        members = {"__module__": base.__module__, "__doc__": base.__doc__, "fused_from": base}
        try:
            _FUSED[base] = types.new_class(f"Fused{base.__name__}", bases, exec_body=lambda body: body.update(members))
        except Exception as error:  # a metaclass may do as it likes
            raise TypeError(f"fuse: no subclass of {base.__qualname__} can be made: {error}") from error
    return _FUSED[base]


def _new(base: type[nn.Module], *args: Any) -> nn.Module:
    cls = fused_class(base)
    made: nn.Module = cls.__new__(cls, *args)
    return made


def _original_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    return nn.Sequential if cls in (Sequential, MLP) else cls.__dict__.get("fused_from")


def _check_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        came = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"{function}: module must be an instance of torch.nn.Module, got {came}")
