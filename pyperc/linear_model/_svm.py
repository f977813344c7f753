"""The linear support vector machine."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from torch import Tensor

from pyperc import _C
from pyperc._sklearn import like
from pyperc.linear_model._base import LinearClassifier, Samples, check_count, check_positive
from pyperc.linear_model._solver import descend

LOSSES = ("squared_hinge", "hinge")

# Multiplications of one Hessian; above, passes over the samples are cheaper than the steps they save.
MOST_FOR_NEWTON = 2e9


class LinearSVC(LinearClassifier):
    """Minimises  |w|^2 / 2 + (b / intercept_scaling)^2 / 2 + C * sum_n weight_n loss(y_n (w . x_n + b)).

    The loss of a margin z is max(0, 1 - z)^2 ("squared_hinge") or max(0, 1 - z) ("hinge"); several classes: one
    against the rest. As in scikit-learn the bias is the weight of a constant feature intercept_scaling, and as such
    penalised; intercept_scaling = math.inf leaves it free, which with "hinge" is the lecture's
    lambda |w|^2 + (1/N) sum_n max(0, 1 - y_n (w . x_n + b)) for C = 1 / (2 lambda N).

    Args:
        loss: "squared_hinge", solved by Newton's method or, where there are many samples and features, by
            L-BFGS; or "hinge", by dual coordinate descent (Hsieh et al., 2008).
        C: the weight of the losses.
        tol: "squared_hinge": the largest element of the gradient per sample and unit of C; "hinge": the violation of
            the optimality conditions, as LIBLINEAR has it.
        fit_intercept: learn b.
        class_weight: {class: weight} or "balanced"; a weight multiplies C for the samples of its class.
        max_iter: iterations or epochs at most; a ConvergenceWarning says that they were not enough.
        random_state: of the order in which the dual variables are visited.

    Attributes:
        coef_, intercept_: [1, d] and [1] for two classes, [classes, d] and [classes] for several.
        support_: for two classes, the rows with y_n (w . x_n + b) <= 1: the support vectors.
        n_iter_: the most iterations, or epochs, that a class took.

    Source: EE-559, lecture 3.1.

    >>> model = LinearSVC(loss="hinge", C=10.0, intercept_scaling=float("inf"))
    >>> model.fit([[0.0], [1.0], [3.0], [4.0]], [0, 0, 1, 1]).coef_.round(3).tolist(), model.support_.tolist()
    ([[1.0]], [1, 2])
    """

    def __init__(
        self,
        *,
        loss: str = "squared_hinge",
        C: float = 1.0,
        tol: float = 1e-4,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        class_weight: Any = None,
        max_iter: int = 1000,
        random_state: Any = None,
    ) -> None:
        self.loss = loss
        self.C = C
        self.tol = tol
        self.fit_intercept = fit_intercept
        self.intercept_scaling = intercept_scaling
        self.class_weight = class_weight
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LinearSVC:
        """Minimises the objective for X [n, d] with the labels y [n].

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, labels of one class only, an unknown loss.
        """
        name = type(self).__name__
        if self.loss not in LOSSES:
            raise ValueError(f"{name}: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        check_positive(name, C=self.C, tol=self.tol, intercept_scaling=self.intercept_scaling)
        check_count(name, max_iter=self.max_iter)
        samples = self._samples(X, y)
        weight = self._weights(samples, sample_weight)
        of_class = None if self.class_weight is None else self._class_weights(samples, self.class_weight, weight)
        if samples.binary and of_class is not None:
            # Two classes: each has its own; several: a class's weight is that of its own samples against the rest.
            weight = of_class[samples.codes] if weight is None else weight * of_class[samples.codes]
            of_class = None
        n, d = samples.x.shape
        smooth = self._newton if n * (d + 1) ** 2 <= MOST_FOR_NEWTON else self._lbfgs
        solve = smooth if self.loss == "squared_hinge" else self._dual
        coef, intercept, ended = solve(samples, weight, of_class)
        if not ended:
            warnings.warn(
                f"{name}: not converged to tol={self.tol} in max_iter={self.max_iter} iterations",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._learned(samples, coef, intercept)
        if samples.binary:
            margins = samples.signs() * (samples.x.double() @ coef[0].double() + intercept.double())
            self.support_ = like((margins <= 1 + 1e-3).nonzero()[:, 0], samples.given)
        return self

    def _lbfgs(self, samples: Samples, weight: Tensor | None, of_class: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        count, (n, d) = 1 if samples.binary else len(samples.classes), samples.x.shape
        target = samples.signs() if samples.binary else samples.codes

        def objective(w: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
            return _C.linear_objective(samples.x, w, b, target, weight, of_class, "squared_hinge", [1.0])

        total = float(n if weight is None else weight.double().sum())
        penalty = 1 / (self.C * total)
        parameters, self.n_iter_, ended = descend(
            objective,
            samples.x,
            weight,
            torch.zeros(count, d + 1, dtype=torch.float64),
            penalty=penalty,
            bias_penalty=penalty / self.intercept_scaling**2,
            fit_intercept=self.fit_intercept,
            curvature=0.5,
            total=total,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        return parameters[:, :-1].contiguous(), parameters[:, -1].contiguous(), ended

    def _newton(self, samples: Samples, weight: Tensor | None, of_class: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        """Each class by Newton's method: the objective is quadratic between the hinges, so that few steps end it."""
        n, d = samples.x.shape
        x = torch.cat([samples.x.double(), torch.full((n, 1), float(self.fit_intercept), dtype=torch.float64)], 1)
        weights = torch.ones(n, dtype=torch.float64) if weight is None else weight.double()
        penalty = torch.ones(d + 1, dtype=torch.float64)
        penalty[d] = 1 / self.intercept_scaling**2 if self.fit_intercept else 1.0
        found, self.n_iter_, ended = [], 1, True
        for positive in [1] if samples.binary else range(len(samples.classes)):
            own = samples.codes == positive
            factor = 1.0 if of_class is None else torch.where(own, of_class[positive].double(), 1.0)
            u, steps = _newton_steps(
                x,
                own.double() * 2 - 1,
                self.C * weights * factor,
                penalty,
                self.C * float(weights.sum()) * self.tol,
                self.max_iter,
            )
            found.append(u)
            self.n_iter_ = max(self.n_iter_, steps)
            ended = ended and steps < self.max_iter
        parameters = torch.stack(found)
        return parameters[:, :d].contiguous(), parameters[:, d].contiguous(), ended

    def _dual(self, samples: Samples, weight: Tensor | None, of_class: Tensor | None) -> tuple[Tensor, Tensor, bool]:
        x = samples.x
        positives = [1] if samples.binary else list(range(len(samples.classes)))
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

        def one(positive: int) -> tuple[Tensor, Tensor, int, bool]:
            own = samples.codes == positive
            y = own.to(x.dtype).mul_(2).sub_(1)
            upper = torch.full_like(y, self.C) if weight is None else weight * self.C
            if of_class is not None:
                upper = torch.where(own, upper * of_class[positive], upper)
            return self._dual_descent(x, y, upper, seed + positive)

        # The passes release the interpreter's lock; each class has its own order, whatever thread takes it.
        with ThreadPoolExecutor(max(1, min(len(positives), torch.get_num_threads()))) as pool:
            results = list(pool.map(one, positives))
        self.n_iter_ = max(epochs for _, _, epochs, _ in results)
        coef, intercept = torch.stack([w for w, _, _, _ in results]), torch.cat([b for _, b, _, _ in results])
        return coef, intercept.to(x.dtype), all(ended for _, _, _, ended in results)

    def _dual_descent(self, x: Tensor, y: Tensor, upper: Tensor, seed: int) -> tuple[Tensor, Tensor, int, bool]:
        """One class against the rest."""
        w, b = torch.zeros(x.shape[1], dtype=x.dtype), torch.zeros(1, dtype=torch.float64)
        alpha = torch.zeros(len(x), dtype=torch.float64)
        free = self.fit_intercept and math.isinf(self.intercept_scaling)
        bias = 0.0 if not self.fit_intercept else 1.0 if free else self.intercept_scaling**2
        if free:
            # A free bias: the penalty is on its distance from where the round before left it (the proximal point
            # method), whose fixed point has sum alpha y = 0.
            bias = max(1.0, float(x.square().sum(1).mean()))
        epochs = 0
        while True:
            taken, violation = _C.dual_descent(
                x, y, upper, bias, w, b, alpha, self.max_iter - epochs, self.tol, seed + epochs
            )
            epochs += taken
            ended = violation <= self.tol
            shift = bias * float(alpha @ y.double())
            settled = ended and (not free or abs(shift) <= self.tol)
            if settled or not ended or epochs >= self.max_iter:
                return w, b, epochs, settled
            b += shift


def _newton_steps(
    x: Tensor, y: Tensor, upper: Tensor, penalty: Tensor, tolerance: float, max_iter: int
) -> tuple[Tensor, int]:
    """Minimises  sum penalty u^2 / 2 + sum upper max(0, 1 - y x u)^2  until its gradient is within the tolerance.

    The Hessian is that of the samples within the margin (O. Mangasarian, A finite Newton method for classification,
    2002), and a step is halved until the objective falls.
    """

    def gaps_and_value(u: Tensor) -> tuple[Tensor, float]:
        gaps = (1 - y * (x @ u)).clamp_(min=0)
        return gaps, float(0.5 * (penalty * u * u).sum() + (upper * gaps * gaps).sum())

    u = torch.zeros(x.shape[1], dtype=x.dtype)
    gaps, value = gaps_and_value(u)
    for step in range(max_iter):
        gradient = penalty * u - 2 * ((upper * y * gaps) @ x)
        if float(gradient.abs().max()) <= tolerance:
            return u, step
        within = gaps > 0
        rows = x[within] * (2 * upper[within]).sqrt()[:, None]
        hessian = rows.t() @ rows
        diagonal = hessian.diagonal()
        # A free bias of samples that are all outside of the margin has no curvature of its own.
        diagonal += penalty + 1e-12 * (1 + float(diagonal.max()))
        direction = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        slope, length = float(gradient @ direction), 1.0
        while True:
            new = u - length * direction
            gaps, new_value = gaps_and_value(new)
            if new_value <= value - 1e-4 * length * slope:
                break
            length /= 2
            if length < 1e-10:  # rounding is all that is left
                return u, step
        u, value = new, new_value
    return u, max_iter
