"""L-BFGS for a linear model's loss with a quadratic penalty, in coordinates in which its curvature is nearly round."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

# (w [classes, d], b [classes]) -> sum of the losses, dw, db
Objective = Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]]

# Up to this width a Cholesky factor of the curvature costs less than the passes over the data that it saves.
WIDEST = 1536
ROWS_PER_COLUMN = 8


class Preconditioner:
    """u = (w, b) L, where L L^T = curvature X^T X / n + penalty, from a sample of the rows."""

    def __init__(self, x: Tensor, weight: Tensor | None, curvature: float, penalty: Tensor) -> None:
        n, d = x.shape
        step = max(1, n // (ROWS_PER_COLUMN * (d + 1)))
        rows = x[::step]
        factor = None if weight is None else weight[::step].sqrt()
        if factor is not None:
            rows = rows * factor[:, None]
        sums = rows.sum(0) if factor is None else factor @ rows
        total = float(len(rows)) if factor is None else float(factor.square().sum())
        gram = torch.empty(d + 1, d + 1, dtype=torch.float64)
        gram[:d, :d] = rows.t() @ rows
        gram[d, :d] = gram[:d, d] = sums.double()
        gram[d, d] = total
        gram *= curvature / max(total, 1e-300)
        diagonal = gram.diagonal()
        # Directions in which the sample and the penalty say nothing keep a scale of their own.
        floor = 1e-7 * float(diagonal.mean()) + 1e-300
        diagonal += torch.maximum(penalty, torch.tensor(floor, dtype=torch.float64))
        self.factor: Tensor = torch.linalg.cholesky(gram)

    def to(self, parameters: Tensor) -> Tensor:
        return parameters @ self.factor

    def back(self, u: Tensor) -> Tensor:
        parameters: Tensor = torch.linalg.solve_triangular(self.factor, u, upper=False, left=False)
        return parameters

    def gradient(self, g: Tensor) -> Tensor:
        gradient: Tensor = torch.linalg.solve_triangular(self.factor.t(), g, upper=True, left=False)
        return gradient


def descend(
    objective: Objective,
    x: Tensor,
    weight: Tensor | None,
    start: Tensor,
    *,
    penalty: float,
    bias_penalty: float,
    fit_intercept: bool,
    curvature: float,
    total: float,
    tol: float,
    max_iter: int,
) -> tuple[Tensor, int, bool]:
    """Minimises sum of losses / total + penalty |w|^2 / 2 + bias_penalty b^2 / 2 from `start` [classes, d + 1].

    Ends where no element of the gradient exceeds `tol`. Returns the parameters, (w, b) in each row, the iterations,
    and whether it ended by itself.
    """
    classes, d = start.shape[0], start.shape[1] - 1
    penalties = torch.full((d + 1,), penalty, dtype=torch.float64)
    penalties[d] = bias_penalty
    conditioner = Preconditioner(x, weight, curvature, penalties) if d <= WIDEST else None
    reached = math.inf

    def evaluate(u: Tensor) -> tuple[float, Tensor]:
        nonlocal reached
        parameters = u if conditioner is None else conditioner.back(u)
        if not fit_intercept:
            parameters = parameters.clone()
            parameters[:, d] = 0
        value, dw, db = objective(parameters[:, :d].to(x.dtype).contiguous(), parameters[:, d].to(x.dtype).contiguous())
        gradient = torch.empty(classes, d + 1, dtype=torch.float64)
        gradient[:, :d] = dw
        gradient[:, d] = db if fit_intercept else 0
        gradient /= total
        gradient += penalties * parameters
        reached = float(gradient.abs().max())
        value = value / total + 0.5 * float((penalties * parameters * parameters).sum())
        return value, gradient if conditioner is None else conditioner.gradient(gradient)

    u, iterations = lbfgs(
        evaluate,
        start.double() if conditioner is None else conditioner.to(start.double()),
        lambda: reached <= tol,
        max_iter,
    )
    parameters = u if conditioner is None else conditioner.back(u)
    if not fit_intercept:
        parameters[:, d] = 0
    return parameters, max(1, iterations), iterations < max_iter or reached <= tol


def lbfgs(
    evaluate: Callable[[Tensor], tuple[float, Tensor]],
    u: Tensor,
    done: Callable[[], bool],
    max_iter: int,
    memory: int = 10,
    noise: float = 64 * torch.finfo(torch.float64).eps,
) -> tuple[Tensor, int]:
    """Minimises a smooth function; returns where and after how many iterations.

    Each step satisfies the weak Wolfe conditions, found by bisection (Lewis and Overton, 2013). `done` is asked about
    the point that was evaluated last, which is that of the step. It also ends where a step changes the value by less
    than `noise`, relative, or where none lowers it: rounding is then all that is left.

    Source: J. Nocedal, Updating quasi-Newton matrices with limited storage, 1980.
    """
    value, gradient = evaluate(u)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)
    for iteration in range(max_iter):
        if done():
            return u, iteration
        direction = -_inverse_hessian(pairs, gradient)
        slope = _dot(gradient, direction)
        if not slope < 0:
            return u, iteration
        step, low, high = 1.0 if pairs else min(1.0, 1 / float(gradient.norm())), 0.0, math.inf
        for _ in range(50):
            new = u + step * direction
            new_value, new_gradient = evaluate(new)
            if not new_value <= value + 1e-4 * step * slope:
                high = step
            elif _dot(new_gradient, direction) < 0.9 * slope:
                low = step
            else:
                break
            step = (low + high) / 2 if math.isfinite(high) else 2 * low
        if not new_value <= value:
            return u, iteration
        change, difference = new - u, new_gradient - gradient
        curvature = _dot(change, difference)
        if curvature > 0:
            pairs.append((change, difference, curvature))
        gain = value - new_value
        u, value, gradient = new, new_value, new_gradient
        if gain <= noise * abs(value):
            return u, iteration + 1
    return u, max_iter


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _inverse_hessian(pairs: deque[tuple[Tensor, Tensor, float]], gradient: Tensor) -> Tensor:
    """The two loops of L-BFGS."""
    q, shares = gradient.clone(), []
    for change, difference, curvature in reversed(pairs):
        share = _dot(change, q) / curvature
        q -= share * difference
        shares.append(share)
    if pairs:
        _, difference, curvature = pairs[-1]
        q *= curvature / _dot(difference, difference)
    for (change, difference, curvature), share in zip(pairs, reversed(shares), strict=True):
        q += (share - _dot(difference, q) / curvature) * change
    return q
