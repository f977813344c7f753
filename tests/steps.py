"""The loop of plain torch that a TrainStep stands for, for tests that hold one against the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from plain import plain
from torch import Tensor, nn

import pyperc

F32, F64 = torch.float32, torch.float64
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
# Without state, and with each kind of it.
STATES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("adamw", {"lr": 0.01, "amsgrad": True}),
]
Batch = tuple[Tensor, Tensor]


def network(sizes: tuple[int, ...] = (5, 7, 6, 3), activation: Any = "tanh", dtype: torch.dtype = F64) -> pyperc.MLP:
    return pyperc.MLP(sizes, activation, dtype=dtype)


def batches(loss: str = "cross_entropy", rows: Iterable[int] = (6, 1, 9, 5), dtype: torch.dtype = F64) -> list[Batch]:
    """Of [*, 5] to [*, 3], of several sizes."""
    return [(torch.randn(n, 5, dtype=dtype), target(loss, n, dtype)) for n in rows]


def target(loss: str, n: int, dtype: torch.dtype = F64) -> Tensor:
    if loss == "cross_entropy":
        return torch.randint(3, (n,))
    return torch.randn(n, 3, dtype=dtype) if loss == "mse" else torch.randn(n, 3).sign().to(dtype)


def ordinary(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing, but must be called."""


def prepared(model: nn.Module, engine: str) -> nn.Module:
    """The model, with something on it that only autograd runs where that is asked for."""
    if engine == "autograd":
        model.register_forward_hook(ordinary)
    return model


class Loop:
    """zero_grad, forward, backward, clip, step; over a copy of the model that plain torch computes."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: str = "sgd",
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        clip: float | None = None,
        params: Callable[[nn.Module], Any] = lambda model: model.parameters(),
        **options: Any,
    ) -> None:
        self.model = plain(model)
        self.optimizer = OPTIMIZERS[optimizer](params(self.model), **options)
        self.loss, self.clip = loss, clip

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()


def same(got: Any, want: Any, dtype: torch.dtype = F64) -> None:
    tolerance = 1e-12 if dtype == F64 else 2e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def same_parameters(step: pyperc.TrainStep, loop: Loop, dtype: torch.dtype = F64) -> None:
    same(list(step.model.parameters()), list(loop.model.parameters()), dtype)


def same_state(step: pyperc.TrainStep, loop: Loop) -> None:
    got, want = step.state_dict()["state"], loop.optimizer.state_dict()["state"]
    assert {i: set(state) for i, state in got.items()} == {i: set(state) for i, state in want.items()}
    same(dict(got), dict(want))


def run_both(step: pyperc.TrainStep, loop: Loop, given: Iterable[Batch], dtype: torch.dtype = F64) -> None:
    """The same batches through both: losses, parameters and the optimizer's state are the same."""
    for x, y in given:
        same(step(x, y), loop(x, y), dtype)
    same_parameters(step, loop, dtype)
    if dtype == F64:
        same_state(step, loop)
