"""Linear discriminant analysis."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.covariance import ledoit_wolf
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pyperc._sklearn import like
from pyperc.linear_model._base import ProbabilisticClassifier, Samples

NAME = "LinearDiscriminantAnalysis"
SOLVERS = ("svd", "lsqr", "eigen")
ROWS = 4096  # in float64 at a time
COLUMNS = 196  # of a block of a symmetric product: a quarter of MNIST's, which leaves 5/8 of the work


class LinearDiscriminantAnalysis(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ProbabilisticClassifier):
    """Gaussian classes with one covariance S:  w = S^-1 (m1 - m0),  P(Y = 1 | x) = sigmoid(w . x + b).

    The parameters, the attributes and the results are those of scikit-learn's class of this name (with "svd", those of
    its releases from 1.9 on, whose covariance divides by n as the other solvers' does). What differs is the
    way: the products of the samples are summed in float64 in blocks, and a symmetric eigenproblem of their covariance
    takes the place of the singular values of all samples. Directions in which no class varies are left out, so that a
    singular covariance has a solution.

    Args:
        solver: "svd" (of the standardised samples within their classes), "lsqr" (S w = m by least squares) or "eigen"
            (the between-class scatter in the metric of S); the last two take a shrinkage.
        shrinkage: S becomes (1 - shrinkage) S + shrinkage tr(S)/d; "auto" is Ledoit and Wolf's.
        priors: P(Y = c); by default the classes' shares.
        n_components: of `transform`.
        store_covariance: keep covariance_ with "svd" too.
        tol: the singular value, relative to the standard deviations, below which "svd" leaves a direction out.

    Source: EE-559, lecture 3.2.

    >>> x = [[-2.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [2.0, 0.0]]
    >>> model = LinearDiscriminantAnalysis().fit(x, [0, 0, 1, 1])
    >>> model.predict([[0.5, 0.5]]).tolist(), model.predict_proba([[0.0, 0.0]]).round(3).tolist()
    ([1], [[0.5, 0.5]])
    """

    def __init__(
        self,
        solver: str = "svd",
        shrinkage: float | str | None = None,
        priors: Any = None,
        n_components: int | None = None,
        store_covariance: bool = False,
        tol: float = 1e-4,
    ) -> None:
        self.solver = solver
        self.shrinkage = shrinkage
        self.priors = priors
        self.n_components = n_components
        self.store_covariance = store_covariance
        self.tol = tol

    def fit(self, X: Any, y: Any) -> LinearDiscriminantAnalysis:
        """The means and the covariance of X [n, d] with the labels y [n].

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, labels of one class only, priors that are no
                probabilities, more components than there can be.
        """
        self._check()
        samples = self._samples(X, y)
        n, count = len(samples.x), len(samples.classes)
        if n == count:
            raise ValueError(f"{NAME}: needs more samples than classes, got {n} of {count} classes")
        counts = torch.bincount(samples.codes, minlength=count).double()
        priors = counts / n if self.priors is None else torch.as_tensor(np.asarray(self.priors), dtype=torch.float64)
        if priors.shape != (count,) or bool((priors < 0).any()):
            raise ValueError(f"{NAME}: priors must be {count} numbers of at least 0, got {self.priors}")
        if abs(float(priors.sum()) - 1) > 1e-5:
            warnings.warn("The priors do not sum to 1. Renormalizing", UserWarning, stacklevel=2)
            priors = priors / priors.sum()
        most = min(count - 1, samples.x.shape[1])
        if self.n_components is not None and self.n_components > most:
            raise ValueError(
                f"{NAME}: n_components cannot be larger than min(n_features, n_classes - 1) = {most}, "
                f"got {self.n_components}"
            )
        self._max_components = most if self.n_components is None else self.n_components
        means = _means(samples, counts)
        solve = {"svd": self._svd, "lsqr": self._lsqr, "eigen": self._eigen}[self.solver]
        coef, intercept = solve(samples, counts, priors, means)
        if count == 2:
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        self.priors_ = like(priors, samples.given)
        self.means_ = self._like(means, samples)
        self._learned(samples, coef.to(samples.x.dtype), intercept.to(samples.x.dtype))
        self._n_features_out = self._max_components
        return self

    def _check(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"{NAME}: solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        given: Any = self.shrinkage
        share = isinstance(given, numbers.Real) and 0 <= float(given) <= 1
        if given is not None and given != "auto" and not share:
            raise ValueError(f"{NAME}: shrinkage must be None, 'auto' or a number in [0, 1], got {self.shrinkage!r}")
        if self.solver == "svd" and self.shrinkage is not None:
            raise NotImplementedError(f"{NAME}: shrinkage not supported with 'svd' solver; use 'lsqr' or 'eigen'")

    def _like(self, result: Tensor, samples: Samples) -> Any:
        return like(result.to(samples.x.dtype), samples.given)

    def _svd(self, samples: Samples, counts: Tensor, priors: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        n, count = len(samples.x), len(counts)
        scatter = _scatter(samples, means, torch.ones(n, dtype=torch.float64))
        if self.store_covariance:
            # As the other solvers have it: the classes' own covariances, weighted by their priors.
            self.covariance_ = self._like(_scatter(samples, means, (priors / counts)[samples.codes]), samples)
        centre = priors @ means
        deviation = (scatter.diagonal() / n).sqrt()
        # Constant columns: their scatter is rounding alone.
        largest = samples.x.abs().amax(0).double()
        deviation[deviation <= 10 * torch.finfo(samples.x.dtype).eps * largest] = 0
        constant = deviation == 0
        deviation[constant] = 1
        scatter[constant] = 0
        scatter[:, constant] = 0
        # The squares of the singular values of the standardised samples, and their right singular vectors.
        squares, vectors = torch.linalg.eigh(scatter / n / deviation / deviation[:, None])
        values = squares.clamp(min=0).sqrt().flip(0)
        rank = int((values > self.tol).sum())
        scalings = (vectors.flip(1)[:, :rank] / deviation[:, None]) / values[:rank]
        weights = (n * priors / max(count - 1, 1)).sqrt()
        between = (weights[:, None] * (means - centre)) @ scalings
        _, values, vectors = torch.linalg.svd(between, full_matrices=False)
        variances = values.square()
        self.explained_variance_ratio_ = like((variances / variances.sum())[: self._max_components], samples.given)
        rank = int((values > self.tol * values[0]).sum()) if len(values) else 0
        scalings = scalings @ vectors[:rank].t()
        self.scalings_ = self._like(scalings, samples)
        self.xbar_ = self._like(centre, samples)
        projected = (means - centre) @ scalings
        coef = projected @ scalings.t()
        return coef, -0.5 * projected.square().sum(1) + priors.log() - centre @ coef.t()

    def _covariance(self, samples: Samples, counts: Tensor, priors: Tensor, means: Tensor) -> Tensor:
        """The mean over the classes of their covariances, weighted by the priors, each shrunk."""
        d = samples.x.shape[1]
        if self.shrinkage == "auto":
            covariance = torch.zeros(d, d, dtype=torch.float64)
            for c, prior in enumerate(priors.tolist()):
                rows = samples.x[samples.codes == c].double().numpy()
                # Ledoit and Wolf's estimate is of the standardised columns, scaled back.
                deviation = rows.std(0)
                deviation[deviation == 0] = 1
                shrunk = ledoit_wolf((rows - rows.mean(0)) / deviation)[0]
                covariance += prior * torch.from_numpy(shrunk * deviation * deviation[:, None])
            return covariance
        covariance = _scatter(samples, means, (priors / counts)[samples.codes])
        if self.shrinkage is None:
            return covariance
        shrinkage = float(self.shrinkage)
        shrunk = covariance * (1 - shrinkage)
        shrunk.diagonal().add_(shrinkage * float(covariance.diagonal().mean()))
        return shrunk

    def _lsqr(self, samples: Samples, counts: Tensor, priors: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        covariance = self._covariance(samples, counts, priors, means)
        self.covariance_ = self._like(covariance, samples)
        # Least squares of least norm, through the eigenvalues: directions without variance are left out.
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        projected = means @ vectors[:, kept]
        coef = (projected / values[kept]) @ vectors[:, kept].t()
        return coef, -0.5 * (means * coef).sum(1) + priors.log()

    def _eigen(self, samples: Samples, counts: Tensor, priors: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        within = self._covariance(samples, counts, priors, means)
        self.covariance_ = self._like(within, samples)
        centre = counts / counts.sum() @ means
        total = _scatter(
            samples, centre.expand_as(means), torch.full((len(samples.x),), 1 / len(samples.x), dtype=torch.float64)
        )
        if self.shrinkage is not None:
            total = self._shrunk_total(samples, total)
        values, vectors = torch.linalg.eigh(within)
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        whiten = vectors[:, kept] / values[kept].sqrt()
        ratios, directions = torch.linalg.eigh(whiten.t() @ (total - within) @ whiten)
        self.explained_variance_ratio_ = like((ratios / ratios.sum()).flip(0)[: self._max_components], samples.given)
        scalings = (whiten @ directions).flip(1)
        self.scalings_ = self._like(scalings, samples)
        coef = (means @ scalings) @ scalings.t()
        return coef, -0.5 * (means * coef).sum(1) + priors.log()

    def _shrunk_total(self, samples: Samples, total: Tensor) -> Tensor:
        if self.shrinkage == "auto":
            one_class = Samples(samples.x, torch.zeros_like(samples.codes), samples.classes[:1], samples.given)
            return self._covariance(one_class, torch.ones(1), torch.ones(1, dtype=torch.float64), total[:1])
        shrinkage = float(self.shrinkage or 0)
        shrunk = total * (1 - shrinkage)
        shrunk.diagonal().add_(shrinkage * float(total.diagonal().mean()))
        return shrunk

    def transform(self, X: Any) -> Any:
        """X in the directions that part the classes best, [n, n_components]."""
        check_is_fitted(self)
        if self.solver == "lsqr":
            raise NotImplementedError(f"{NAME}: transform not implemented for 'lsqr' solver (use 'svd' or 'eigen').")
        x = self._input(X)
        scalings = torch.as_tensor(self.scalings_).to("cpu", x.dtype)
        if self.solver == "svd":
            x = x - torch.as_tensor(self.xbar_).to("cpu", x.dtype)
        return like((x @ scalings)[:, : self._max_components], X)

    def predict_log_proba(self, X: Any) -> Any:
        """log P(Y = c | x) for each class c, [n, classes]."""
        scores = self._scores(X)
        if scores.shape[1] == 1:  # scikit-learn's checks want the logarithm of the rounded probability
            scores = torch.cat([torch.zeros_like(scores), scores], 1)
        return like(scores.log_softmax(1), X)


def _means(samples: Samples, counts: Tensor) -> Tensor:
    """The classes' means [classes, d] in float64: a product of the samples with each class's indicator."""
    sums = torch.zeros(len(counts), samples.x.shape[1], dtype=torch.float64)
    for begin in range(0, len(samples.x), ROWS):
        codes = samples.codes[begin : begin + ROWS]
        indicator = torch.zeros(len(counts), len(codes), dtype=torch.float64)
        indicator[codes, torch.arange(len(codes))] = 1
        sums.addmm_(indicator, samples.x[begin : begin + ROWS].double())
    return sums / counts[:, None]


def _scatter(samples: Samples, means: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight_n (x_n - m)^T (x_n - m), m the mean of x_n's class, in float64: [d, d].

    The upper triangle is computed in blocks of columns, and mirrored.
    """
    d = samples.x.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64)
    for begin in range(0, len(samples.x), ROWS):
        codes = samples.codes[begin : begin + ROWS]
        rows = samples.x[begin : begin + ROWS].double() - means[codes]
        rows.mul_(weight[begin : begin + ROWS].sqrt()[:, None])
        for first in range(0, d, COLUMNS):
            total[first : first + COLUMNS, first:] += _product(rows[:, first : first + COLUMNS], rows[:, first:])
    upper = total.triu()
    return upper + upper.triu(1).t()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, by the kernel that computes dw = ds^T x: in float64 it takes 0.6 of the time of torch.mm."""
    shape = a.new_empty(1, 1).expand(a.shape[1], b.shape[1])
    with torch.inference_mode():
        (result,) = torch.ops.pyperc.mlp_backward.default(a, b, [shape], [a], ["identity"], [], [False, True, False])
    return torch.as_tensor(result)
