"""The native step over networks of plain torch and its optimizers, for tests of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pyperc
from pyperc import _C
from pyperc.activation import chain, of_module

F64 = torch.float64

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], list[dict[str, Any]]]] = {
    "sgd": (
        torch.optim.SGD,
        [
            {"lr": 0.05},
            {"lr": 0.05, "weight_decay": 0.1, "maximize": True},
            {"lr": 0.05, "momentum": 0.9},
            {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01},
            {"lr": 0.05, "momentum": 0.7, "nesterov": True, "weight_decay": 0.01},
        ],
    ),
    "adam": (
        torch.optim.Adam,
        [
            {"lr": 0.01},
            {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.1},
            {"lr": 0.01, "amsgrad": True, "maximize": True, "weight_decay": 0.01},
        ],
    ),
    "adamw": (torch.optim.AdamW, [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.2, "amsgrad": True}]),
}


def network(
    sizes: Sequence[int], activations: Sequence[str] = ("tanh",), dtype: torch.dtype = F64, drop: float = 0.0
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(n, m, bias=i != 1, dtype=dtype))
        if i + 2 < len(sizes):
            layers.append(pyperc.nn.Activation(activations[i % len(activations)]))
            if drop:
                layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers)


def settings_of(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor | None]) -> tuple[list[int], list[Any]]:
    """The group of each parameter, and its state in torch's own tensors, made where torch would make them."""
    groups, states = [], []
    names = next(i.states for i in _C.optimizers() if i.name == type(optimizer).__name__.lower())
    for p in parameters:
        group = next((g for g, o in enumerate(optimizer.param_groups) if any(p is q for q in o["params"])), -1)
        groups.append(group)
        state = []
        if group >= 0 and p is not None:
            options = optimizer.param_groups[group]
            used = {"momentum_buffer": options.get("momentum"), "max_exp_avg_sq": options.get("amsgrad")}
            for name in names:
                if used.get(name, True):
                    optimizer.state[p].setdefault(name, torch.zeros_like(p))
                state.append(optimizer.state[p].get(name))
        states.append(state)
    return groups, states


def step_of(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    loss: str = "mse",
    parameters: Sequence[float] = (),
    drop: Sequence[float] | None = None,
    counts: Sequence[int] | None = None,
    **options: Any,
) -> Any:
    linears: list[nn.Linear] = []
    layers: list[Any] = []
    for module in model:
        if isinstance(module, nn.Linear):
            linears.append(module)
            layers.append(("identity", ()))
        elif not isinstance(module, nn.Dropout):
            layers[-1] = of_module(module)
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    groups, states = settings_of(optimizer, [*weights, *biases])
    return _C.Step(
        weights,
        biases,
        chain(tuple(layers)),
        drop or [0.0] * len(weights),
        loss,
        parameters,
        type(optimizer).__name__.lower(),
        optimizer.param_groups,
        groups,
        states,
        counts or [0] * (2 * len(weights)),
        **options,
    )


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        scale = max(q.abs().max().item(), 1e-3)
        error = (p.double() - q.double()).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error}"


def gradients_of(model: nn.Sequential, loss: Tensor) -> list[Tensor | None]:
    """In the order of the native step: the weights, then the biases."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    tensors = [*(m.weight for m in linears), *(m.bias for m in linears)]
    found = iter(torch.autograd.grad(loss, [t for t in tensors if t is not None]))
    return [None if t is None else next(found) for t in tensors]
