"""Logistic regression."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pyperc import _C
from pyperc.linear_model._base import ProbabilisticClassifier, Samples, check_count, check_positive
from pyperc.linear_model._solver import descend

SOLVERS = ("lbfgs", "gd")


class LogisticRegression(ProbabilisticClassifier):
    """P(Y = 1 | x) = sigmoid(w . x + b), and for several classes softmax(x w^T + b).

    `solver="lbfgs"` minimises  C * sum_n weight_n loss_n + |w|^2 / 2,  as scikit-learn does, where the loss is
    -log P(Y = y_n | x_n); C = math.inf leaves the penalty out. `solver="gd"` is the lecture's: from w = 0 and b = 0,
    `steps` times w -= eta dw and b -= eta db, with the gradients of the sum of the losses and without a penalty.

    Args:
        C: the inverse of the penalty's strength, for "lbfgs".
        tol: the largest element of the gradient, per unit of weight, at which "lbfgs" ends.
        fit_intercept: learn b.
        solver: "lbfgs" or "gd".
        eta, steps: the learning rate and the number of steps of "gd".
        max_iter: iterations of "lbfgs" at most.
        class_weight: {class: weight} or "balanced".
        random_state: taken for scikit-learn's sake, and not used: neither solver draws random numbers.
        warm_start: go on from the last fit's weights.

    Attributes:
        coef_, intercept_: [1, d] and [1] for two classes, [classes, d] and [classes] for several.
        loss_history_: for "gd", the sum of the losses before the first step and after each.
        n_iter_: iterations or steps, an array of one as in scikit-learn.

    Source: EE-559, lectures 3.2 and 3.5.

    >>> model = LogisticRegression().fit([[-1.0], [-0.5], [0.5], [1.0]], [0, 0, 1, 1])
    >>> model.predict_proba([[0.0]]).round(3).tolist()
    [[0.5, 0.5]]
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        tol: float = 1e-4,
        fit_intercept: bool = True,
        solver: str = "lbfgs",
        eta: float = 0.1,
        steps: int = 1000,
        max_iter: int = 100,
        class_weight: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.C = C
        self.tol = tol
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.eta = eta
        self.steps = steps
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.random_state = random_state
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LogisticRegression:
        """Minimises the losses of X [n, d] with the labels y [n].

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, labels of one class only, an unknown solver.
        """
        name = type(self).__name__
        if self.solver not in SOLVERS:
            raise ValueError(f"{name}: solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        check_positive(name, C=self.C, tol=self.tol, eta=self.eta)
        check_count(name, steps=self.steps, max_iter=self.max_iter)
        samples = self._samples(X, y)
        weight = self._weights(samples, sample_weight, self.class_weight)
        loss = "logistic" if samples.binary else "cross_entropy"
        target = samples.signs() if samples.binary else samples.codes

        def objective(w: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
            return _C.linear_objective(samples.x, w, b, target, weight, None, loss, [])

        start = self._start(samples)
        if self.solver == "gd":
            coef, intercept = self._gradient_descent(objective, start.to(samples.x.dtype))
        else:
            total = float(len(samples.x) if weight is None else weight.double().sum())
            parameters, iterations, ended = descend(
                objective,
                samples.x,
                weight,
                start,
                penalty=0.0 if math.isinf(self.C) else 1 / (self.C * total),
                bias_penalty=0.0,
                fit_intercept=self.fit_intercept,
                curvature=0.1,
                total=total,
                tol=self.tol,
                max_iter=self.max_iter,
            )
            if not ended:
                warnings.warn(
                    f"{name}: not converged to tol={self.tol} in max_iter={self.max_iter} iterations",
                    ConvergenceWarning,
                    stacklevel=2,
                )
            coef, intercept = parameters[:, :-1].contiguous(), parameters[:, -1].contiguous()
            self._set_iterations(iterations)
        self._learned(samples, coef, intercept)
        return self

    def _set_iterations(self, count: int) -> None:
        self.n_iter_ = torch.tensor([count], dtype=torch.int32).numpy()

    def _start(self, samples: Samples) -> Tensor:
        """(w, b) in each row."""
        count, d = 1 if samples.binary else len(samples.classes), samples.x.shape[1]
        if self.warm_start and hasattr(self, "coef_") and tuple(self.coef_.shape) == (count, d):
            coef, intercept = (torch.as_tensor(p).to("cpu", torch.float64) for p in (self.coef_, self.intercept_))
            return torch.cat([coef, intercept[:, None]], 1)
        return torch.zeros(count, d + 1, dtype=torch.float64)

    def _gradient_descent(self, objective: Any, start: Tensor) -> tuple[Tensor, Tensor]:
        w, b = start[:, :-1].contiguous(), start[:, -1].contiguous()
        self.loss_history_: list[float] = []
        for _ in range(self.steps):
            value, dw, db = objective(w, b)
            self.loss_history_.append(value)
            w = w - self.eta * dw
            if self.fit_intercept:
                b = b - self.eta * db
        self.loss_history_.append(objective(w, b)[0])
        self._set_iterations(self.steps)
        return w, b
