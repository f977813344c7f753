"""The activations as Python names them: by name, by (name, parameters), or by the torch.nn module that computes one.

The list itself is the native one (`pyperc._C.activations()`); the table of torch.nn classes follows from it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyperc import _C

# What a user may write wherever an activation is asked for, and what it is resolved to: its name and its parameters.
Resolved: TypeAlias = tuple[str, tuple[float, ...]]
ActivationLike: TypeAlias = str | tuple[str, Mapping[str, float]] | Resolved | nn.Module

_DEFAULTS: dict[str, dict[str, float]] = {
    info.name: dict(zip(info.parameters, info.defaults, strict=True)) for info in _C.activations()
}
_BY_NAME: dict[str, Resolved] = {name: (name, tuple(values.values())) for name, values in _DEFAULTS.items()}
# Two activations share the class nn.GELU, which tells them apart by an attribute.
_ATTRIBUTES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "gelu": (nn.GELU, {"approximate": "none"}),
    "gelu_tanh": (nn.GELU, {"approximate": "tanh"}),
}


def activations() -> tuple[str, ...]:
    """The names of the activations, in the order of the native list.

        identity    s
        relu        max(0, s)
        leaky_relu  s where s > 0, else negative_slope s            negative_slope=0.01
        elu         s where s > 0, else alpha (e^s - 1)             alpha=1
        softplus    s where beta s > threshold, else
                    log(1 + e^(beta s)) / beta                      beta=1, threshold=20
        tanh        tanh(s)
        sigmoid     1 / (1 + e^-s)
        gelu        s Phi(s), Phi the normal distribution function
        gelu_tanh   s/2 (1 + tanh(sqrt(2/pi) (s + 0.044715 s^3)))
        silu        s / (1 + e^-s)
        hardtanh    s, cut to [min_val, max_val]                    min_val=-1, max_val=1
        heaviside   1 where s >= 0, else 0
        sign        +1 where s >= 0, else -1

    With parameters: ("leaky_relu", {"negative_slope": 0.2}) or nn.LeakyReLU(0.2). torch.nn has a class for each but
    heaviside and sign, whose derivative is 0 everywhere: in an nn.Sequential they are `pyperc.nn.Activation("sign")`.
    sign(0) is +1, where torch.sign has 0.

    >>> "leaky_relu" in activations()
    True
    """
    return tuple(_DEFAULTS)


class Activation(nn.Module):
    """An activation by its name: y = f(x), elementwise, for those that torch.nn has no class for.

    `heaviside` (1 where x >= 0, else 0) and `sign` (1 where x >= 0, else -1) are the threshold units of EE-559,
    lecture 3.1; their derivative is zero everywhere. Every name of `pyperc.activations()` is accepted, with its
    parameters as keywords; they are kept as attributes, as in torch.nn.

    Shape: x is [*], y is [*]; any floating dtype, any device.
    Raises ValueError for an unknown name or parameter, TypeError for a parameter that is not a number.

    >>> Activation("sign")(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """

    def __init__(self, name: str, **parameters: float) -> None:
        super().__init__()
        self.name, values = resolve((name, parameters))
        for parameter, value in zip(_DEFAULTS[self.name], values, strict=True):
            setattr(self, parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        name, parameters = resolve(self)
        output: Tensor = torch.ops.pyperc.activation.default(input, name, list(parameters))
        return output

    def extra_repr(self) -> str:
        return describe(resolve(self))


def _torch_class(name: str, parameters: Mapping[str, float]) -> type[nn.Module] | None:
    """torch.nn's class of that name: leaky_relu is LeakyReLU, with a keyword for each parameter."""
    for attribute, candidate in vars(nn).items():
        if attribute.lower() != name.replace("_", "") or not isinstance(candidate, type):
            continue
        if issubclass(candidate, nn.Module) and parameters.keys() <= inspect.signature(candidate).parameters.keys():
            return candidate
    return None


def _table() -> dict[str, tuple[type[nn.Module], dict[str, str]]]:
    classes = {name: _torch_class(name, parameters) for name, parameters in _DEFAULTS.items()}
    return {name: (cls, {}) for name, cls in classes.items() if cls is not None} | _ATTRIBUTES


_MODULES = _table()
_NAMES_OF: dict[type[nn.Module], list[str]] = {}
for _name, (_class, _) in _MODULES.items():
    _NAMES_OF.setdefault(_class, []).append(_name)

# The types that `of_module` knows; exact types, since a subclass may compute something else.
MODULE_TYPES: frozenset[type[nn.Module]] = frozenset(_NAMES_OF) | {Activation}


def of_module(module: nn.Module) -> Resolved | None:
    """The activation that `module` computes now, or None if it is none of the list.

    Read from the module's attributes on each call, so that a changed `negative_slope` is seen.

    >>> of_module(nn.LeakyReLU(0.2))
    ('leaky_relu', (0.2,))
    >>> of_module(nn.LayerNorm(3)) is None
    True
    """
    cls = type(module)
    if cls is Activation:
        names = [str(module.name)]
    else:
        names = [
            name
            for name in _NAMES_OF.get(cls, ())
            if all(getattr(module, attribute) == value for attribute, value in _MODULES[name][1].items())
        ]
    if not names or names[0] not in _DEFAULTS:
        return None
    values = tuple(getattr(module, parameter) for parameter in _DEFAULTS[names[0]])
    # A tensor or a parameter in a number's place is something only the module itself can compute.
    return (names[0], values) if all(type(value) in (float, int) for value in values) else None


def settings_reader(cls: type[nn.Module]) -> Callable[[nn.Module], Any] | None:
    """A quick reader of the attributes that decide what an activation module of this class computes, or None.

    Two modules of one class with equal settings compute the same activation.
    """
    if cls is Activation:
        return of_module
    first = _NAMES_OF[cls][0]
    names = [*_DEFAULTS[first], *_MODULES[first][1]]
    return operator.attrgetter(*names) if names else None


def resolve(activation: ActivationLike) -> Resolved:
    """Name and parameters, in the list's order, of an activation however it is written.

    A name takes the defaults; a pair gives the parameters by name, or all of their values in order (so that
    resolving twice changes nothing). Raises ValueError for an unknown name, module or parameter (it lists what there
    is), TypeError for anything else.

    >>> resolve("elu"), resolve(("elu", {"alpha": 0.5})), resolve(nn.GELU(approximate="tanh"))
    (('elu', (1.0,)), ('elu', (0.5,)), ('gelu_tanh', ()))
    """
    if (known := _as_is(activation)) is not None:
        return known
    if isinstance(activation, nn.Module):
        resolved = of_module(activation)
        if resolved is None:
            raise ValueError(f"activation must compute one of {', '.join(_DEFAULTS)}, got {activation}")
        return resolved
    name: Any = activation
    given: Any = {}
    if isinstance(activation, tuple) and len(activation) == 2:
        name, given = activation
    if not isinstance(name, str) or not isinstance(given, Mapping | tuple):
        raise TypeError(f"activation must be a name, a (name, parameters) pair or an nn.Module, got {activation!r}")
    if name not in _DEFAULTS:
        raise ValueError(f"activation must be one of {', '.join(_DEFAULTS)}, got {name!r}")
    defaults = _DEFAULTS[name]
    if isinstance(given, tuple):
        if len(given) != len(defaults):
            raise ValueError(f"activation: {name} must have {len(defaults)} parameters, got {given!r}")
        given = dict(zip(defaults, given, strict=True))
    for parameter, value in given.items():
        if parameter not in defaults:
            expected = f"one of {', '.join(defaults)}" if defaults else "left out, as it has none"
            raise ValueError(f"activation: a parameter of {name} must be {expected}, got {parameter!r}")
        if not isinstance(value, int | float):
            raise TypeError(f"activation: {parameter} of {name} must be a number, got {type(value).__name__}")
    return name, tuple(float(given.get(parameter, default)) for parameter, default in defaults.items())


def _as_is(activation: Any) -> Resolved | None:
    """The two usual ways to write one, of which there is nothing to ask: every call of a layer comes by here."""
    if type(activation) is str:
        return _BY_NAME.get(activation)
    if type(activation) is tuple and len(activation) == 2 and type(activation[1]) is tuple:
        name, values = activation
        expected = _BY_NAME.get(name) if type(name) is str else None
        if expected is not None and list(map(type, values)) == [float] * len(expected[1]):
            return name, values
    return None


def module(activation: ActivationLike) -> nn.Module:
    """A new nn.Module that computes `activation`: torch.nn's own class where there is one, else `Activation`.

    >>> module(("leaky_relu", {"negative_slope": 0.2}))
    LeakyReLU(negative_slope=0.2)
    >>> module("heaviside")
    Activation('heaviside')
    """
    name, values = resolve(activation)
    parameters = dict(zip(_DEFAULTS[name], values, strict=True))
    if name not in _MODULES:
        return Activation(name, **parameters)
    cls, attributes = _MODULES[name]
    return cls(**parameters, **attributes)


def describe(resolved: Resolved) -> str:
    """'leaky_relu', negative_slope=0.2: for printing.

    >>> describe(("leaky_relu", (0.2,)))
    "'leaky_relu', negative_slope=0.2"
    """
    name, values = resolved
    return ", ".join([repr(name), *(f"{p}={v:g}" for p, v in zip(_DEFAULTS[name], values, strict=True))])


@functools.lru_cache(maxsize=1024)
def chain(layers: tuple[Resolved, ...]) -> _C.Chain:
    """The native form of a network's activations; cached, as a network asks for the same one on every call."""
    return _C.Chain(layers)
