"""The layers of a model that the native step computes as one network, and what must stay as it is while it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from pyperc.activation import MODULE_TYPES
from pyperc.blocks import Block, line_now
from pyperc.nn import Sequential
from pyperc.runs import GLOBAL_HOOKS, HOOKS, LINEAR_TYPES, hangs_on, ordinary_because, stretch_from

if TYPE_CHECKING:
    from pyperc.activation import Resolved

_CONTAINERS = (Sequential.forward, nn.Sequential.forward)
_LAYERS = {*LINEAR_TYPES, *MODULE_TYPES, nn.Dropout}


class NotNative(Exception):  # noqa: N818
    """Why the native engine does not take a step. Where `holds` returns True, another attempt would be refused too."""

    def __init__(self, reason: str, holds: Callable[[], bool] = lambda: False) -> None:
        super().__init__(reason)
        self.holds = holds


class Network:
    """(Linear [activation] [Dropout])+ : layers, and the probability with which a layer's output is dropped.

    `watched`: (dictionary, key, value) that must still hold. `sizes`: (dictionary or list, entries) likewise.
    Raises NotNative for any other model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.linears: list[nn.Linear] = []
        self.layers: list[Resolved] = []
        self.dropout: list[float] = []
        self.watched: list[tuple[dict[str, Any], str, Any]] = []
        self.sizes: list[tuple[Any, int]] = [(hooks, 0) for hooks in GLOBAL_HOOKS]
        segment: list[nn.Module] = []
        for module in self._leaves(model):
            if type(module) is not nn.Dropout:
                segment.append(module)
            elif module.training and module.p > 0:
                self._append(segment, module.p)
                segment = []
        self._append(segment, 0.0)
        for linear in self.linears:
            for name, p in linear._parameters.items():
                if p is not None and type(p) is not nn.Parameter:
                    raise NotNative(f"the {name} of a layer is a {type(p).__name__}")
                if p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks):
                    raise NotNative(f"the {name} of a layer has a hook")
                if p is not None and p.numel() == 0:
                    raise NotNative("a layer has width 0")
        parameters = self.parameters()
        if len({id(p) for p in parameters if p is not None}) < sum(p is not None for p in parameters):
            raise NotNative("two layers share a parameter")

    def parameters(self) -> list[nn.Parameter | None]:
        """The weights, then the biases."""
        return [linear._parameters[name] for name in ("weight", "bias") for linear in self.linears]

    def _append(self, segment: list[nn.Module], dropout: float) -> None:
        """Layers up to a Dropout, or the last ones."""
        stretch = stretch_from(segment, 0)
        stop = 0 if stretch is None else len(stretch.children)
        if stretch is None or stop < len(segment):
            if not segment:
                raise NotNative("a Dropout follows no layer, or none follows it")
            reason = ordinary_because(segment[stop]) or "an activation that follows no linear layer"
            what = f"a native step is one run of layers, which {type(segment[stop]).__name__} interrupts: {reason}"
            raise NotNative(what, _foreign(self.model, segment[stop]))
        self.linears += stretch.linears
        self.layers += stretch.layers
        self.dropout += [0.0] * (len(stretch.linears) - 1) + [dropout]

    def _leaves(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that are called one after the other."""
        reason = hangs_on(module)
        if reason is not None:
            raise NotNative(f"{type(module).__name__} {reason}")
        self._watch(module)
        children = _children(module)
        if children is None:
            self._watch_attributes(module)
            yield module
            return
        if isinstance(module, Block) and (line := line_now(module)) is not None:
            for family, _ in line.families:
                self._watch_children(family)
            for passed, *_ in line.passed:
                self._watch(passed)
            self.watched += [read.watched() for read in line.reads]
        self._watch_children(children)
        for child in children.values():
            if child is None:
                raise NotNative("a child is None")
            yield from self._leaves(child)

    def _watch_children(self, children: dict[str, Any]) -> None:
        self.sizes.append((children, len(children)))
        self.watched += [(children, name, child) for name, child in children.items()]

    def _watch(self, module: nn.Module) -> None:
        state = module.__dict__
        self.sizes += [(state[f"_{kind}_hooks"], 0) for kind in HOOKS]
        self.watched += [(state, "forward", None), (state, "_compiled_call_impl", None)]
        self.watched += [(module._parameters, name, p) for name, p in module._parameters.items()]

    def _watch_attributes(self, module: nn.Module) -> None:
        """On which it depends what the module computes."""
        state = module.__dict__
        own = [name for name in state if name[0] != "_" and (name != "training" or type(module) is nn.Dropout)]
        self.watched += [(state, name, state[name]) for name in own]


def _children(module: nn.Module) -> dict[str, Any] | None:
    """What a container, or the line of a block, calls one after the other; None where it is a layer."""
    if isinstance(module, nn.Sequential) and type(module).forward in _CONTAINERS:
        return module._modules
    if isinstance(module, Block) and (line := line_now(module)) is not None and not line.hooked():
        return line.container._modules
    return None


def _route(module: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]] | None:
    """The containers on the way to a layer, each with the name of the child that leads on; None: no way."""
    if module is layer:
        return []
    for name, child in (_children(module) or {}).items():
        if child is not None and (rest := _route(child, layer)) is not None:
            return [(module, name), *rest]
    return None


def _foreign(model: nn.Module, layer: nn.Module) -> Callable[[], bool]:
    """Whether the model still calls that layer, of a type that is never fused: one look for each container."""
    route = _route(model, layer)

    def holds() -> bool:
        if route is None or type(layer) in _LAYERS:
            return False
        module: Any = model
        for container, name in route:
            if container is not module:
                return False
            module = (_children(container) or {}).get(name)
        return module is layer and _children(layer) is None

    return holds
