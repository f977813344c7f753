"""The optimizer of a step: always one of torch.optim, whose param_groups and state the step reads and writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyperc.step.objective import HALVES

Schedule: TypeAlias = Callable[[int], float]

_ADAM = ("betas", "eps", "weight_decay", "amsgrad", "maximize")
CLASSES: dict[str, tuple[type[Optimizer], tuple[str, ...]]] = {
    "sgd": (SGD, ("momentum", "dampening", "weight_decay", "nesterov", "maximize")),
    "adam": (Adam, _ADAM),
    "adamw": (AdamW, _ADAM),
}


class Masters:
    """float32 copies of 16-bit parameters, which the optimizer updates in their place."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.of = {p: nn.Parameter(p.detach().float()) for p in parameters if p.dtype in HALVES}
        self._forget()

    def _forget(self) -> None:
        """What is known of the parameters: versions, and where their numbers lie. An alias keeps that place taken."""
        self._versions = [-1] * len(self.of)
        self._places = [(p.data_ptr(), p.detach()) for p in self.of]

    def __getstate__(self) -> dict[str, Any]:
        return {"of": self.of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.of = state["of"]
        self._forget()  # versions begin anew in a copy

    def read(self) -> None:
        """Takes over what somebody else has written into a parameter since; what only rounds the master leaves it.

        Seen are writes that torch counts, and other memory that is given to a parameter (`p.data = `), but not what is
        written through `p.data` in place.
        """
        for i, (parameter, master) in enumerate(self.of.items()):
            if parameter._version != self._versions[i] or parameter.data_ptr() != self._places[i][0]:
                with torch.no_grad():
                    master.copy_(master.where(master.to(parameter.dtype) == parameter, parameter.float()))
                self._versions[i] = parameter._version
                self._places[i] = parameter.data_ptr(), parameter.detach()

    def write(self) -> None:
        for parameter, master in self.of.items():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(master)
        self.written()

    def written(self) -> None:
        """The parameters hold the masters' values."""
        self._versions = [parameter._version for parameter in self.of]

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        if len(values) != len(self.of):
            raise ValueError(f"load_state_dict: masters must be {len(self.of)} tensors, got {len(values)}")
        for master, value in zip(self.of.values(), values, strict=True):
            master.copy_(value)
        self._forget()


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's, also in a dict, list or tuple: torch.load refuses numpy's in what was saved."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: plain(entry) for key, entry in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check_closure(optimizer: Optimizer) -> None:
    """Raises for one that computes the loss several times in a step."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(f"TrainStep: optimizer must step without a closure, which {type(optimizer).__name__} does not")


def as_groups(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """`params` as a list of torch's groups, of parameters of the model alone; None: all of them."""
    entries = list(model.parameters()) if params is None else list(params)
    if not entries:
        raise ValueError("TrainStep: params must hold a parameter, or model have one, got none")
    groups = [dict(entry) for entry in entries] if isinstance(entries[0], dict) else [{"params": entries}]
    for group in groups:
        held = group.get("params", ())
        group["params"] = [held] if isinstance(held, Tensor) else list(held)
    check_owner("params", model, groups)
    return groups


def check_owner(argument: str, model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    own = set(model.parameters())
    for i, group in enumerate(groups):
        if not own.issuperset(group["params"]):
            raise ValueError(f"TrainStep: {argument} must hold parameters of model alone, got another in group {i}")


def take_schedules(groups: list[dict[str, Any]], lr: Any) -> dict[int, Schedule]:
    """The learning rates that are functions of the step's number, by their group, which gets the first value."""
    schedules: dict[int, Schedule] = {}
    for i, group in enumerate(groups):
        rate = group.get("lr", lr)
        if callable(rate) and not isinstance(rate, Tensor):
            schedules[i] = rate
            group["lr"] = rate(0)
    return schedules


def make(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    if name not in CLASSES:
        error = ValueError if isinstance(name, str) else TypeError
        raise error(f"TrainStep: optimizer must be one of {', '.join(CLASSES)}, or of torch.optim, got {name!r}")
    cls, own = CLASSES[name]
    allowed = ("lr", *own)
    for option in options:
        if option not in allowed:
            raise TypeError(f"TrainStep: {option} is no option of {name}, which has {', '.join(allowed)}")
    try:
        return cls(groups, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"TrainStep: {name}: {error}") from None
