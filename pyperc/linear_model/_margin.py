"""The margin of separable data and the bound on the perceptron's updates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils.validation import check_X_y
from torch import Tensor

from pyperc import _C
from pyperc._sklearn import check_tensor, tensor_of

EPOCHS = 100  # between two looks at the duality gap
ROUNDS = 200
GAP = 1e-6  # relative, at which the margin is known


class MarginBound(NamedTuple):
    """What the convergence theorem says of a data set.

    >>> margin_bound([[-2.0], [2.0]], [0, 1], fit_intercept=False).bound
    1
    """

    radius: float
    """R: every sample is in the sphere of this radius around the origin"""
    margin: float
    """gamma: a unit w exists with y_n (w . x_n) >= gamma/2 for every n"""
    bound: int
    """floor(4 R^2 / gamma^2): the perceptron algorithm makes at most so many updates"""
    w: Any
    """that unit vector, its bias last"""


def margin_bound(X: Any, y: Any, *, fit_intercept: bool = True) -> MarginBound:
    """R, the best margin gamma, and the most updates that the perceptron algorithm can make, floor(4 R^2 / gamma^2).

    X is [n, d]; y [n] holds two classes, of which the greater is the positive one. With `fit_intercept` a constant
    feature 1 is put last, as the algorithm has it, and R and gamma are those of the longer vectors. The margin is that
    of the support vector machine without a slack, to a millionth; scaling the data changes the bound no more than that.

    Raises:
        ValueError: the classes cannot be separated by a hyperplane, or y does not hold two classes.

    Source: EE-559, lecture 3.1, and A. Novikoff, On convergence proofs on perceptrons, 1962.

    >>> result = margin_bound([[-2.0], [1.0]], [0, 1], fit_intercept=False)
    >>> result.radius, round(result.margin, 4), result.bound
    (2.0, 2.0, 4)
    """
    if isinstance(X, Tensor):
        x = check_tensor(X, "margin_bound").cpu().double()
        labels = y.detach().cpu() if isinstance(y, Tensor) else torch.as_tensor(np.asarray(y))
        classes, codes = torch.unique(labels, return_inverse=True)
    else:
        X, y = check_X_y(X, y, dtype=np.float64)
        x = tensor_of(X)
        unique, inverse = np.unique(y, return_inverse=True)
        classes, codes = unique, torch.from_numpy(inverse)
    if len(classes) != 2 or len(codes) != len(x):
        raise ValueError(
            f"margin_bound: y must hold two classes, one label for each of the {len(x)} rows of X, got {len(classes)} "
            f"classes and {len(codes)} labels"
        )
    if fit_intercept:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    x = x.contiguous()
    signs = codes.double() * 2 - 1
    radius = float(x.norm(dim=1).max())
    half, w = _half_margin(x / radius if radius else x, signs)
    gamma = 2 * half * radius
    bound = math.floor(4 * radius * radius / (gamma * gamma) * (1 + 2 * GAP))
    return MarginBound(radius, gamma, bound, w.to(X.device) if isinstance(X, Tensor) else w.numpy())


def _half_margin(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """max over unit w of min_n y_n (w . x_n), of rows of norm 1 at most, and that w.

    The dual variables alpha of the support vector machine bound it from above: |sum alpha y x| / sum alpha is the
    distance of two points of the classes' hulls.
    """
    n, d = x.shape
    w, b = torch.zeros(d, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    alpha = torch.zeros(n, dtype=torch.float64)
    upper = torch.full((n,), math.inf, dtype=torch.float64)
    least = math.inf
    for i in range(ROUNDS):
        _C.dual_descent(x, y, upper, 0.0, w, b, alpha, EPOCHS, 1e-9, i)
        # What rounding has added up over the epochs goes.
        w = x.t() @ (alpha * y)
        norm = float(w.norm())
        if norm == 0 or not math.isfinite(norm):
            break
        below = float((y * (x @ w)).min()) / norm
        least = min(least, norm / float(alpha.sum()))
        if below > 0 and least - below <= GAP * least:
            return below, w / norm
        if least < 1e-6:
            break
    if norm and math.isfinite(norm) and below > 0:
        return below, w / norm
    raise ValueError("margin_bound: X and y must be separable by a hyperplane; no such hyperplane was found")
