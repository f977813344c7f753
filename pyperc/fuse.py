"""fuse and unfuse: the containers of an existing module exchange their class in place, and nothing else."""

from __future__ import annotations

import copyreg
import types
from typing import Any, ClassVar, SupportsIndex, TypeGuard, TypeVar

from torch import nn

from pyperc.nn import MLP, Sequential

M = TypeVar("M", bound=nn.Module)


def fuse(module: M) -> M:
    """Make every nn.Sequential in `module` that holds a linear layer compute as a `pyperc.nn.Sequential`, in place.

    Parameters, buffers, hooks and state_dict keys stay as they are; only the class of these containers changes.
    nn.Sequential itself becomes pyperc.nn.Sequential. A subclass becomes a subclass of both, so that isinstance holds
    and a forward that it defines still runs, with super().forward fused. Containers that derive from
    pyperc.nn.Sequential already, and all other modules, stay. Returns `module`.

    Raises TypeError if `module` is not an nn.Module.

    >>> import torch
    >>> model = fuse(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()))
    >>> type(model).__module__, isinstance(model, nn.Sequential), model(torch.zeros(2, 2, 2)).shape
    ('pyperc.nn', True, torch.Size([2, 3]))
    """
    _check_module("fuse", module)
    for container in list(module.modules()):
        if is_candidate(container):
            container.__class__ = fused_class(type(container))
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
            for kept in ("_pyperc_runs", "_pyperc_whole"):
                container.__dict__.pop(kept, None)
            container.__class__ = original
    return module


def is_candidate(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """True for an nn.Sequential, or an instance of a subclass, that `fuse` would change."""
    return (
        isinstance(module, nn.Sequential)
        and not isinstance(module, Sequential)
        and any(isinstance(child, nn.Linear) for child in module.children())
    )


class FusedSubclass(Sequential):
    """Base of the classes that `fused_class` makes; they stand in no module by name, so a pickle names `fused_from`."""

    fused_from: ClassVar[type[nn.Sequential]]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new, (self.fused_from, *reduced[1][1:]), *reduced[2:])


_FUSED: dict[type[nn.Sequential], type[Sequential]] = {nn.Sequential: Sequential}


def fused_class(base: type[nn.Sequential]) -> type[Sequential]:
    """pyperc.nn.Sequential for nn.Sequential, and for a subclass of that the one class that derives from both."""
    if base not in _FUSED:
        members = {"__module__": base.__module__, "__doc__": base.__doc__, "fused_from": base}
        _FUSED[base] = types.new_class(
            f"Fused{base.__name__}", (base, FusedSubclass), exec_body=lambda body: body.update(members)
        )
    return _FUSED[base]


def _new(base: type[nn.Sequential], *args: Any) -> Sequential:
    cls = fused_class(base)
    return cls.__new__(cls, *args)


def _original_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    return nn.Sequential if cls in (Sequential, MLP) else cls.__dict__.get("fused_from")


def _check_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        came = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"{function}: module must be an instance of torch.nn.Module, got {came}")
