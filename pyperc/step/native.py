"""The native engine: one call of csrc/torch/step_call.cpp over the model's parameters and the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from pyperc import _C
from pyperc.activation import chain
from pyperc.runs import autocast_because, ordinary_everywhere_because
from pyperc.step.network import Network, NotNative

if TYPE_CHECKING:
    from pyperc.step.autograd import Autograd

STATES = {info.name: tuple(info.states) for info in _C.optimizers()}
# What load_state_dict puts others in the place of.
_REPLACED = ("state", "param_groups")
_KINDS: dict[type[Optimizer], str] = {SGD: "sgd", Adam: "adam", AdamW: "adamw"}


class Handover:
    """A hook of an optimizer: before somebody else reads its state, `give_back` brings that up to date.

    `give_back` is a weak reference to a method.
    """

    def __init__(self, give_back: Callable[[], Callable[[], None] | None]) -> None:
        self.give_back = give_back

    def __call__(self, *_: Any) -> None:
        give_back = self.give_back()
        if give_back is not None:
            give_back()


class Native:
    """A `_C.Step`, and the way of its state back into the optimizer's. Raises NotNative, which says why."""

    name = "native"

    def __init__(self, other: Autograd, steps: int) -> None:
        """For the step that `other` takes by autograd, of which `steps` were taken."""
        reason = ordinary_everywhere_because() or autocast_because(other.model.device)
        if reason is not None:
            raise NotNative(reason)
        if other.model.device.type != "cpu":
            raise NotNative(f"the model is on {other.model.device}")
        objective, optimizer = other.objective, other.optimizer
        if not objective.name:
            raise NotNative("the loss is a function", lambda: True)
        kind = _kind(optimizer)
        network = Network(other.model.model)
        # As torch's schedulers ask, who look whether the optimizer has stepped before them.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self.state, self.names = optimizer.state, STATES[kind]
        self.parameters = network.parameters()
        masters = [None if p is None else other.masters.of.get(p) for p in self.parameters]
        # What the optimizer holds: the master of a 16-bit parameter.
        self.held = [p if master is None else master for p, master in zip(self.parameters, masters, strict=True)]
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        groups = [-1 if p is None else group_of.get(p, -1) for p in self.held]
        self.tensors = [
            [] if i < 0 else self._tensors(p, kind, optimizer.param_groups[i])
            for p, i in zip(self.held, groups, strict=True)
        ]
        counts = [0 if i < 0 else self._count(p, kind) for p, i in zip(self.held, groups, strict=True)]
        # What the state holds of each parameter, and whether it holds other tensors than those that a step writes.
        self.seen = {p: dict(self.state[p]) if p in self.state else {} for p in self.held if p is not None}
        self.incomplete = any(
            t is not seen and (seen is not None or p.requires_grad)
            for p, held, tensors in zip(self.parameters, self.held, self.tensors, strict=True)
            if p is not None and held is not None
            for t, seen in ((t, self.seen[held].get(name)) for name, t in zip(self.names, tensors, strict=False))
            if t is not None
        )
        try:
            self.step = _C.Step(
                [linear.weight for linear in network.linears],
                [linear.bias for linear in network.linears],
                chain(tuple(network.layers)),
                network.dropout,
                objective.name,
                objective.parameters,
                kind,
                optimizer.param_groups,
                groups,
                self.tensors,
                counts,
                reduction=objective.reduction,
                class_weight=None if objective.weight is None else objective.weight.to(other.model.dtype).contiguous(),
                label_smoothing=objective.label_smoothing,
                ignore_index=objective.ignore_index,
                max_norm=math.inf if other.clip_grad_norm is None else other.clip_grad_norm,
                on_nan="raise" if other.raises else "ignore",
                masters=masters if any(master is not None for master in masters) else None,
                watched=(*network.watched, *((vars(optimizer), name, getattr(optimizer, name)) for name in _REPLACED)),
                sizes=(*network.sizes, *_sizes(optimizer)),
            )
            if not other.model.plain:
                first = network.linears[0]
                self.step.set_input(_per_feature(other.model.scale, first), _per_feature(other.model.shift, first))
        except (TypeError, ValueError) as refusal:
            raise NotNative(str(refusal)) from None
        self.step.steps = self.begin = steps

    def gradients(self, x: Any, y: Any, weight: Tensor | None) -> tuple[Tensor, dict[nn.Parameter, Tensor]] | None:
        loss, gradients = self.step.gradients(x, y, weight)
        if loss is None:
            return None
        return loss, {p: g for p, g in zip(self.parameters, gradients, strict=True) if p is not None and g is not None}

    def write_state(self) -> bool:
        """Brings the optimizer's state up to date: what torch's optimizer would hold now. True where that took an
        object that was not there, so that the state is another one than this engine was made for."""
        changed = False
        for p, tensors, count in zip(self.held, self.tensors, self.step.counts, strict=True):
            own = {name: t for name, t in zip(self.names, tensors, strict=False) if t is not None}
            if p is None or not own:
                continue
            seen, now = self.seen[p], self.state.get(p, {})
            if self.names[0] != "momentum_buffer":
                own["step"] = _counted(seen.get("step"), count)
            for name, t in own.items():
                known = seen.get(name)
                # What somebody else has put there or taken away meanwhile stays as it is.
                if t is not known and now.get(name) is known and (count or known is not None):
                    self.state[p][name] = seen[name] = t
                    changed = True
        return changed

    def _tensors(self, p: nn.Parameter | None, kind: str, group: dict[str, Any]) -> list[Tensor | None]:
        """The optimizer's state of a parameter, zeros where there is none yet; None where the settings need none."""
        assert p is not None
        needed = {"momentum_buffer": bool(group["momentum"])} if kind == "sgd" else {"max_exp_avg_sq": group["amsgrad"]}
        state = self.state.get(p, {})
        return [
            (torch.zeros(p.shape, dtype=p.dtype) if state.get(name) is None else state[name].contiguous())
            if needed.get(name, True)
            else None
            for name in self.names
        ]

    def _count(self, p: nn.Parameter | None, kind: str) -> int | Tensor:
        """Of the updates; torch's own tensor, where there is one, in which the native code goes on counting."""
        assert p is not None
        state = self.state.get(p, {})
        if kind == "sgd":
            return int(state.get("momentum_buffer") is not None)
        count: int | Tensor = state.get("step", 0)
        return count if isinstance(count, Tensor) else int(count)


def _counted(step: Any, count: int) -> Tensor:
    """The optimizer's tensor with that number in it, and a new one where it has none."""
    if not isinstance(step, Tensor) or step.is_inference():
        return torch.tensor(float(count))
    if step != count:
        step.fill_(count)
    return step


def _kind(optimizer: Optimizer) -> str:
    if type(optimizer) not in _KINDS:
        raise NotNative(f"{type(optimizer).__name__} is not one of SGD, Adam and AdamW", lambda: True)
    decoupled = {group.get("decoupled_weight_decay", False) for group in optimizer.param_groups}
    if len(decoupled) > 1 or any(group["differentiable"] for group in optimizer.param_groups):
        raise NotNative("a group of the optimizer is differentiable, or only some have decoupled weight decay")
    if any(not isinstance(hook, Handover) for hooks in _hooks(optimizer) for hook in hooks.values()):
        raise NotNative("the optimizer has a step hook")
    return "adamw" if decoupled == {True} else _KINDS[type(optimizer)]


def _hooks(optimizer: Optimizer) -> tuple[dict[int, Any], ...]:
    """What torch calls around optimizer.step."""
    return (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )


def _sizes(optimizer: Optimizer) -> list[tuple[Any, int]]:
    """A state that is emptied, or of which a part is replaced, is begun anew."""
    containers = (*_hooks(optimizer), optimizer.param_groups, optimizer.state, *optimizer.state.values())
    return [(entries, len(entries)) for entries in containers]


def _per_feature(value: float | Tensor, linear: nn.Linear) -> float | Tensor:
    if not isinstance(value, Tensor):
        return float(value)
    try:
        return value.to(linear.weight.dtype).expand(linear.in_features).contiguous()
    except RuntimeError:
        raise NotNative(f"scale and shift are not one number, or one for each input: {list(value.shape)}") from None
