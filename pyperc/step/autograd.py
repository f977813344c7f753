"""The step by torch's autograd and optimizer, for every model that there is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyperc.step.objective import check_finite

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pyperc.step.objective import Objective
    from pyperc.step.optimizer import Masters


class Reading:
    """model(x * scale + shift), with x in the model's dtype where it is uint8, float32 or float64."""

    def __init__(self, model: nn.Module, scale: float | Tensor, shift: float | Tensor) -> None:
        for name, value in (("scale", scale), ("shift", shift)):
            if not isinstance(value, int | float | Tensor):
                raise TypeError(f"TrainStep: {name} must be a number or a Tensor, got {type(value).__name__}")
        self.model, self.scale, self.shift = model, scale, shift
        self._first = next(model.parameters())
        self.plain = not isinstance(scale, Tensor) and not isinstance(shift, Tensor) and (scale, shift) == (1, 0)

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    def __call__(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            if x.requires_grad:
                x = x.detach()
            if x.dtype in (torch.uint8, torch.float32, torch.float64):
                x = x.to(self.dtype)
        return self.model(x if self.plain else x * self.scale + self.shift)


class Autograd:
    """Forward, backward, clip, update. No parameter's .grad is read or left behind."""

    name = "autograd"

    def __init__(
        self,
        model: Reading,
        objective: Objective,
        optimizer: Optimizer,
        masters: Masters,
        clip_grad_norm: float | None,
        raises: bool,
    ) -> None:
        self.model, self.objective, self.optimizer, self.masters = model, objective, optimizer, masters
        self.clip_grad_norm, self.raises = clip_grad_norm, raises
        self.norm: float | Tensor = math.nan  # of the last step

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the groups that want a gradient; where there is a master, not that."""
        held = self._held()
        if self.masters.of:
            parameter_of = {master: parameter for parameter, master in self.masters.of.items()}
            held = [parameter_of.get(p, p) for p in held]
        return [p for p in held if p.requires_grad]

    def step(self, x: Any, y: Any, weight: Tensor | None, number: int) -> Tensor:
        trained = self.trained()
        updated = [self.masters.of.get(p, p) for p in trained] if self.masters.of else trained
        # Of frozen ones too, as the optimizer updates whatever has a gradient.
        held = {p: p.grad for p in (*self.masters.of, *self._held())}
        for p in held:
            p.grad = None
        try:
            loss = self._loss(x, y, weight)
            if self.raises:
                check_finite(loss.detach(), number + 1)
            if trained:
                loss.backward(inputs=trained)  # type: ignore[no-untyped-call]
            for parameter, master in self.masters.of.items():
                master.grad = None if parameter.grad is None else parameter.grad.float()
            if self.clip_grad_norm is not None:
                self.norm = nn.utils.clip_grad_norm_(updated, self.clip_grad_norm)
            self.optimizer.step()
            self.masters.write()
        finally:
            for p, grad in held.items():
                p.grad = grad
        return loss.detach()

    def gradients(self, x: Any, y: Any, weight: Tensor | None) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        trained = self.trained()
        loss = self._loss(x, y, weight)
        found = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
        return loss.detach(), {p: g for p, g in zip(trained, found, strict=True) if g is not None}

    def _held(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _loss(self, x: Any, y: Any, weight: Tensor | None) -> Tensor:
        with torch.enable_grad():
            return self.objective(self.model(x), y, weight)

    def release(self) -> None:
        pass
