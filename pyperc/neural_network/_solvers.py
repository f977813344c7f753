"""scikit-learn's three solvers: sgd and adam by a TrainStep for each batch, lbfgs by its gradients.

The objective of a batch of rows with the weights v (1 each, unless sample_weight says otherwise) is

    sum_i v_i loss_i / sum_i v_i  +  alpha / (2 sum_i v_i) |coefs|^2

where loss_i is summed over the outputs. So the step sums weighted rows, v_i / sum v, and decays by alpha / sum v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from pyperc.step import TrainStep

if TYPE_CHECKING:
    from pyperc.interrupt import Interrupts
    from pyperc.nn import MLP


@dataclass
class Rows:
    """The samples of a fit: x [n, in], dense or of scipy's csr, the targets of the step, and the weights or None."""

    x: Any
    target: Tensor
    weight: Tensor | None

    def __len__(self) -> int:
        return len(self.target)

    def totals(self, batches: tuple[Tensor, ...]) -> list[float]:
        """The sum of the weights of each batch."""
        if self.weight is None:
            return [float(len(rows)) for rows in batches]
        return [float(self.weight[rows].sum()) for rows in batches]

    def shares(self, batches: tuple[Tensor, ...], totals: list[float]) -> Tensor:
        """[n], of each row in its batch."""
        share = torch.zeros(len(self), dtype=torch.float64, device=self.target.device)
        for rows, total in zip(batches, totals, strict=True):
            share[rows] = 1 / total if self.weight is None else self.weight[rows] / total
        return share


def dense(x: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of x as the network takes them."""
    return (x if isinstance(x, Tensor) else torch.from_numpy(x.toarray())).to(device, dtype)


@dataclass
class Task:
    """What a network learns: a loss of TrainStep, and what scikit-learn's figures make of it."""

    loss: str | Callable[[Tensor, Tensor], Tensor]
    factor: float = 1.0
    """on the loss of a row"""
    reported: float = 1.0
    """on the objective, where its value is told: scikit-learn tells the squared error's mean over the outputs"""
    weighted: Callable[[Tensor, Tensor], Tensor] | None = None
    """puts the rows' weights into the targets of a loss that is no name"""

    def step(self, network: MLP, optimizer: str, **options: Any) -> TrainStep:
        weights = [p for p in network.parameters() if p.ndim == 2]
        biases = [p for p in network.parameters() if p.ndim == 1]
        groups = [{"params": weights, "weight_decay": 0.0}, {"params": biases, "weight_decay": 0.0}]
        if isinstance(self.loss, str):
            options["reduction"] = "sum"
        return TrainStep(network, self.loss, optimizer, params=groups, **options)

    def arguments(self, target: Tensor, share: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Targets and weights for the step."""
        share = (share * self.factor).to(dtype)
        return (target, share) if self.weighted is None else (self.weighted(target, share), None)


class Descent:
    """sgd or adam: the step with its state, and the learning rate as scikit-learn drives it."""

    def __init__(self, model: Any, network: MLP, task: Task) -> None:
        self.model, self.network, self.task = model, network, task
        self.rate = float(model.learning_rate_init)
        self.adam = model.solver == "adam"
        options: dict[str, Any] = {"lr": self.rate}
        if self.adam:
            options |= {"betas": (model.beta_1, model.beta_2), "eps": model.epsilon}
        else:
            nesterov = model.nesterovs_momentum and model.momentum > 0
            options |= {"momentum": model.momentum, "nesterov": nesterov}
        self.step = task.step(network, model.solver, **options)
        self.decayed = [parameter for parameter in network.parameters() if parameter.ndim == 2]

    def epoch(self, rows: Rows, order: Tensor, batch_size: int, interrupts: Interrupts) -> float:
        """One pass in that order; the mean of the batches' objectives, each before its step, by their sizes."""
        batches = order.split(batch_size)  # type: ignore[no-untyped-call]
        totals = rows.totals(batches)
        dtype = self.decayed[0].dtype
        target, share = self.task.arguments(rows.target, rows.shares(batches, totals), dtype)
        losses = torch.zeros(len(batches), dtype=torch.float64)
        flat, squares = [parameter.detach().view(-1) for parameter in self.decayed], []
        for batch, total in enumerate(totals):
            self._prepare(total)
            squares.append(torch.stack([torch.dot(w, w) for w in flat]).sum())
            if isinstance(rows.x, Tensor):
                self.step.epoch(rows.x, target, order, batch_size, losses, begin=batch, seconds=0.0, weight=share)
            else:
                chosen = batches[batch]
                x = dense(rows.x[chosen.numpy()], dtype, self.decayed[0].device)
                losses[batch] = self.step(x, target[chosen], None if share is None else share[chosen])
            if interrupts.noted:
                raise KeyboardInterrupt
        penalty = self.model.alpha / 2 * torch.stack(squares).double().cpu() / torch.tensor(totals, dtype=torch.float64)
        sizes = torch.tensor([len(chosen) for chosen in batches], dtype=torch.float64)
        return float((losses * self.task.reported + penalty) @ sizes) / len(order)

    def _prepare(self, total: float) -> None:
        """The hyperparameters of a batch whose weights have this sum."""
        weights, biases = self.step.optimizer.param_groups
        weights["weight_decay"] = self.model.alpha / total
        if self.adam:
            # scikit-learn adds eps before the second moment's bias is corrected, torch after.
            correction = math.sqrt(1 - self.model.beta_2 ** (self.step.steps + 1))
            weights["eps"] = biases["eps"] = self.model.epsilon / correction

    def set_rate(self, rate: float) -> None:
        """Another learning rate: scikit-learn's velocity, which holds the rate, stays what it is."""
        for state in self.step.optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_(self.rate / rate)
        for group in self.step.optimizer.param_groups:
            group["lr"] = rate
        self.rate = rate

    def slower(self) -> bool:
        """Whether there is a lower learning rate to go on with."""
        if self.adam or self.model.learning_rate != "adaptive" or self.rate <= 1e-6:
            return False
        self.set_rate(self.rate / 5)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "step": self.step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate = state["rate"]
        self.step.load_state_dict(state["step"])


def lbfgs(model: Any, network: MLP, task: Task, rows: Rows) -> tuple[Any, float]:
    """scipy's L-BFGS-B over all parameters: its result, and the objective there, as it is told.

    scikit-learn minimises a mean over the outputs with the gradient of the sum; here both are of the sum.
    """
    step = task.step(network, "sgd", lr=0.0)
    parameters = dict(network.named_parameters())
    first = next(iter(parameters.values()))
    x = dense(rows.x, first.dtype, first.device)
    everything = (torch.arange(len(rows), device=first.device),)
    totals = rows.totals(everything)
    target, share = task.arguments(rows.target, rows.shares(everything, totals), first.dtype)
    decay = model.alpha / totals[0]

    def losses(vector: Any) -> tuple[float, float, Any]:
        """At these parameters, which the network is given: the loss, the penalty, and their gradient."""
        pieces = torch.from_numpy(vector).split([p.numel() for p in parameters.values()])  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, piece in zip(parameters.values(), pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))
        loss, gradients = step.gradients(x, target, share)
        penalty, found = 0.0, []
        for name, parameter in parameters.items():
            gradient = gradients[name].double()
            if parameter.ndim == 2:
                w = parameter.detach().double()
                penalty += decay / 2 * float(w.square().sum())
                gradient = gradient + decay * w
            found.append(gradient.reshape(-1).cpu())
        return float(loss), penalty, torch.cat(found).numpy()

    def objective(vector: Any) -> tuple[float, Any]:
        loss, penalty, gradient = losses(vector)
        return loss + penalty, gradient

    start = np.concatenate([p.detach().double().reshape(-1).cpu().numpy() for p in parameters.values()])
    options = {"maxfun": model.max_fun, "maxiter": model.max_iter, "gtol": model.tol}
    result = scipy.optimize.minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
    loss, penalty, _ = losses(result.x)
    return result, loss * task.reported + penalty
