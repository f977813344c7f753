"""Which children of a container one native call computes: what may be fused, looked at anew on every call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import _get_current_function_mode_stack, _get_overloaded_args, has_torch_function
from torch.utils._device import DeviceContext

from pyperc import _C, functional
from pyperc.activation import MODULE_TYPES, Resolved, chain, of_module, settings_reader
from pyperc.layers import Linear

IDENTITY: Resolved = ("identity", ())
LINEAR_TYPES: frozenset[type[nn.Module]] = frozenset({nn.Linear, Linear})
# What each class computes, as it was at import: a forward that is patched into the class later is not passed over.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {cls: cls.forward for cls in LINEAR_TYPES | MODULE_TYPES}
_MODULE_CALL, _F_LINEAR = nn.Module.__call__, F.linear
_WATCHED = ((nn.Module, "__call__", _MODULE_CALL), (F, "linear", _F_LINEAR))
HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in dir(torch_module)
    if name.startswith(("_global_forward", "_global_backward")) and isinstance(getattr(torch_module, name), dict)
)
# The attributes, beside weight and bias, on which it depends what a module of the class computes.
_SETTINGS: dict[type[nn.Module], Callable[[nn.Module], Any] | None] = {
    nn.Linear: None,
    Linear: operator.attrgetter("activation", "activation_parameters"),
    **{cls: settings_reader(cls) for cls in MODULE_TYPES},
}


def ordinary_because(child: nn.Module) -> str | None:
    """Why a child must be called as a module, or None if the native code may compute it."""
    cls = type(child)
    if cls not in _FORWARDS:
        return "is parametrized" if is_parametrized(child) else f"{cls.__name__} is not a layer that is fused"
    if cls.forward is not _FORWARDS[cls]:
        return f"the forward of {cls.__name__} was replaced"
    if (reason := hangs_on(child)) is not None:
        return reason
    if cls in MODULE_TYPES and of_module(child) is None:
        return "its parameters are not those of a listed activation"
    return None


def hangs_on(module: nn.Module) -> str | None:
    """What is called beside or in place of the forward of the module's class, or None."""
    if "forward" in module.__dict__:
        return "has a forward of its own"
    for kind in HOOKS:
        if getattr(module, f"_{kind}_hooks"):
            return f"has a {kind.replace('_', ' ')} hook"
    return None if module._compiled_call_impl is None else "is compiled on its own"


def ordinary_everywhere_because() -> str | None:
    """Why every child must be called as a module now, or None."""
    if nn.Module.__call__ is not _MODULE_CALL or F.linear is not _F_LINEAR:
        return "nn.Module.__call__ or F.linear was replaced"
    if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a global module hook is registered"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    return None


def autocast_because(device: torch.device) -> str | None:
    """Why every layer on a device is torch's own operations now, in the dtype of autocast, or None."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return "autocast is on" if is_on else None


def takes_part(operands: Iterable[Any]) -> bool:
    """True where a tensor subclass or a TorchFunctionMode wants to be shown the calls of F.linear and its like.

    The mode behind torch.set_default_device only looks at functions that make tensors, so it is left out.
    """
    return has_torch_function(operands) and (
        any(type(tensor) is not Tensor for tensor in _get_overloaded_args(operands))
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    )


class Stretch(NamedTuple):
    """Neighbouring children of a container that one native call computes: (Linear [activation])+."""

    children: Sequence[nn.Module]
    linears: list[nn.Linear]
    layers: tuple[Resolved, ...]

    def operands(self) -> tuple[list[Tensor], list[Tensor | None]]:
        return [linear.weight for linear in self.linears], [linear.bias for linear in self.linears]

    def one_by_one(self, x: Any) -> Any:
        for child in self.children:
            x = child(x)
        return x

    def instead_of(self, refusal: Exception, x: Any) -> Any:
        """The result by ordinary calls, where torch's layers take tensors that the native code refuses.

        Complex and sparse ones, or a bias of one element. Where they refuse as well, the native words are the clearer.
        """
        try:
            return self.one_by_one(x)
        except Exception:
            raise refusal from None


def stretch_from(children: Sequence[nn.Module], start: int) -> Stretch | None:
    """The longest stretch that begins with children[start], or None if that must be called as a module."""
    linears: list[nn.Linear] = []
    layers: list[Resolved] = []
    stop = start
    while stop < len(children) and ordinary_because(children[stop]) is None:
        child = children[stop]
        if isinstance(child, nn.Linear):
            linears.append(child)
            layers.append(own_activation(child))
        elif not layers:
            return None
        elif (activation := of_module(child)) is not None and activation != IDENTITY:
            if layers[-1] != IDENTITY:
                break
            layers[-1] = activation
        stop += 1
    if not linears:
        return None
    if stop < len(children) and works_in_place(children[stop]):
        # It would overwrite the output from which the derivative of a fused activation is read. Left to torch, the
        # activation keeps what it needs itself.
        layers[-1] = own_activation(linears[-1])
        while type(children[stop - 1]) not in LINEAR_TYPES:
            stop -= 1
    return Stretch(children[start:stop], linears, tuple(layers))


def works_in_place(child: nn.Module) -> bool:
    return child.__dict__.get("inplace", False) is not False


def own_activation(linear: nn.Linear) -> Resolved:
    return (linear.activation, linear.activation_parameters) if isinstance(linear, Linear) else IDENTITY


Call: TypeAlias = Callable[[Any, Stretch], Any]


def call_native(x: Any, stretch: Stretch) -> Any:
    weights, biases = stretch.operands()
    if takes_part((x, *weights, *biases)):
        return stretch.one_by_one(x)
    try:
        if functional.is_distributed(x):
            return functional.sharded(x, weights, biases, stretch.layers)
        return _C.mlp(x, weights, biases, chain(stretch.layers))
    except (TypeError, ValueError) as refusal:
        return stretch.instead_of(refusal, x)


_TRACED = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def call_operator(x: Any, stretch: Stretch) -> Any:
    """The call as torch.compile and torch.export record it."""
    weights, biases = stretch.operands()
    operands = (x, *weights, *biases)
    # A subclass that knows torch's operations alone (DTensor) need not have a __torch_function__. torch.export traces
    # by modes of its own, which are no reason.
    subclass = any(type(tensor) not in _TRACED for tensor in operands if tensor is not None)
    # An ONNX graph holds no operator of ours.
    if subclass or torch.onnx.is_in_onnx_export() or (takes_part(operands) and not torch.compiler.is_exporting()):
        return stretch.one_by_one(x)
    return functional.call(x, weights, biases, stretch.layers)


class Run:
    """A stretch kept for the next call, which checks that all still is as it was when the stretch was found."""

    def __init__(self, children: Sequence[nn.Module], start: int, stretch: Stretch) -> None:
        self.start, self.stop = start, start + len(stretch.children)
        self.stretch = stretch
        self.whole = len(stretch.children) == len(children)
        classes = {type(child) for child in stretch.children}
        members = []
        for child in stretch.children:
            read = _SETTINGS[type(child)]
            members.append((child, type(child) in LINEAR_TYPES, read, read and read(child)))
        self.native = _C.Run(
            (*_WATCHED, *((cls, "forward", _FORWARDS[cls]) for cls in classes)),
            GLOBAL_HOOKS,
            tuple(members),
            chain(stretch.layers),
            start,
            len(children),
        )
        self.follower_type: type[nn.Module] | None = None
        if self.stop < len(children):
            self.follower_type = type(children[self.stop])
            self.follower_in_place = works_in_place(children[self.stop])
            self.follower_ordinary_because = ordinary_because(children[self.stop])

    def __call__(self, modules: dict[str, nn.Module], children: Sequence[nn.Module], x: Any) -> Any:
        """The stretch's output from the weights as they are now, or None if the stretch is another one by now."""
        if self.follower_type is not None:
            follower = children[self.stop] if self.stop < len(children) else None
            if (
                follower is None
                or type(follower) is not self.follower_type
                or works_in_place(follower) != self.follower_in_place
                # The type alone keeps most followers apart; one that was kept apart by a hook joins without it.
                or (self.follower_type in _FORWARDS and ordinary_because(follower) != self.follower_ordinary_because)
            ):
                return None
        try:
            return self.native(modules, x)
        except (TypeError, ValueError) as refusal:
            return self.stretch.instead_of(refusal, x)
