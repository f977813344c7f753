"""The perceptron algorithm (F. Rosenblatt, 1957)."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from torch import Tensor

from pyperc import _C
from pyperc.linear_model._base import LinearClassifier, Samples, check_count, check_positive


class Epoch(NamedTuple):
    """What one epoch did.

    >>> Perceptron(max_iter=9).fit([[-1.0], [2.0]], [0, 1]).history_[-1]
    Epoch(changes=0, error=0.0, validation_error=None)
    """

    changes: int
    """samples that were wrong when their turn came, over all classes"""
    error: float
    """share of the training samples that are wrong after the epoch"""
    validation_error: float | None
    """the same of the validation samples"""


class _State(NamedTuple):
    """Weights in the order of the pass: the input's columns, then products grouped by their first column."""

    w: Tensor
    b: Tensor | None
    sums: tuple[Tensor, Tensor] | None
    steps: int


class _Pairs:
    """The products of a feature map in the order of the pass."""

    def __init__(self, pairs: Any, columns: int) -> None:
        table = torch.as_tensor(np.asarray(pairs), dtype=torch.int64).reshape(-1, 2)
        self.order = table[:, 0].argsort(stable=True)
        table = table[self.order].int()
        first, counts = torch.unique_consecutive(table[:, 0], return_counts=True)
        begin = F.pad(counts.cumsum(0), (1, 0)).int()
        self.table = (first.contiguous(), begin, table[:, 1].contiguous())
        self.columns = columns

    def to_pass(self, coef: Tensor) -> Tensor:
        return torch.cat([coef[:, : self.columns], coef[:, self.columns :][:, self.order]], 1)

    def from_pass(self, w: Tensor) -> Tensor:
        coef = w.clone()
        coef[:, self.columns + self.order] = w[:, self.columns :]
        return coef


class Perceptron(LinearClassifier):
    """The perceptron algorithm: w = 0; for each sample with y (w . x + b) <= 0, w += y x and b += y.

    By default it is the lecture's to the letter: the samples in their order, epoch after epoch, until one changes
    nothing. Several classes: one against the rest. It stops for certain only if the samples are separable.

    Args:
        fit_intercept: learn b, which is the weight of a constant feature 1.
        max_iter: epochs at most; a ConvergenceWarning says that they were not enough.
        shuffle: a new order in each epoch.
        average: coef_ and intercept_ are the averages over all steps (Freund and Schapire, 1999).
        eta0: the length of a step; from w = 0 it scales the weights and changes no prediction.
        features: a `pyperc.features.PairProducts` or `RandomPairProducts`, whose products are computed within the pass
            rather than stored. coef_ then has a column for each of its features.
        random_state: of the shuffles.
        class_weight: {class: weight} or "balanced": scales the steps of a class's samples, of several classes in the
            one of them that is theirs.
        warm_start: go on from the last fit's weights.

    Attributes:
        coef_, intercept_: [1, d] and [1] for two classes, of which classes_[1] is the positive one; [classes, d] and
            [classes] for several.
        history_: an `Epoch` for each epoch.
        n_iter_, t_: the epochs and the steps taken, those that changed nothing included.

    Source: EE-559, lecture 3.1.

    >>> x, y = [[0.0, 1.0], [1.0, 0.0], [2.0, 3.0]], ["low", "low", "high"]
    >>> model = Perceptron().fit(x, y)
    >>> [epoch.changes for epoch in model.history_], model.predict(x).tolist()
    ([2, 2, 0], ['low', 'low', 'high'])
    """

    _state: _State

    def __init__(
        self,
        *,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        shuffle: bool = False,
        average: bool = False,
        eta0: float = 1.0,
        features: Any = None,
        random_state: Any = None,
        class_weight: Any = None,
        warm_start: bool = False,
    ) -> None:
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.average = average
        self.eta0 = eta0
        self.features = features
        self.random_state = random_state
        self.class_weight = class_weight
        self.warm_start = warm_start

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *, validation: tuple[Any, Any] | None = None
    ) -> Perceptron:
        """Epochs until one changes nothing.

        Args:
            X, y: the samples, [n, d] and [n].
            sample_weight: [n]; scales a sample's steps, and 0 passes over it.
            validation: (X, y) whose error after each epoch goes into history_.

        Raises:
            ValueError: shapes that do not fit, NaN or infinity, or labels of one class only.
        """
        self._check()
        samples = self._samples(X, y)
        weight = self._row_weights(samples, sample_weight)
        self._prepare(samples, resume=self.warm_start)
        held_out = None
        if validation is not None:
            X_held, y_held = validation
            held_out = self._samples(X_held, y_held, classes=samples.classes, reset=False)
        random = check_random_state(self.random_state)
        scores = samples.x.new_empty(len(samples.x), len(self._state.w))
        self.history_: list[Epoch] = []
        changes = validation_error = None
        for _ in range(self.max_iter):
            now = self._epoch(samples, weight, random, scores)
            # The pass has scored the weights that it began with: they are those after the epoch before.
            if changes is not None:
                self.history_.append(Epoch(changes, _error(scores, samples), validation_error))
            changes = now
            validation_error = None if held_out is None else self._error_of(held_out)
            if changes == 0:
                break
        if changes:
            self._epoch(samples, torch.zeros_like(samples.x[:, 0]), None, scores)
            warnings.warn(
                f"Perceptron: {changes} samples were wrong in the last of max_iter={self.max_iter} epochs; the data "
                "may not be separable",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.history_.append(Epoch(changes or 0, _error(scores, samples), validation_error))
        self.n_iter_ = len(self.history_)
        self._publish(samples)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Perceptron:
        """One epoch over X from the weights so far. The first call needs all classes that will ever come."""
        self._check()
        first = not hasattr(self, "_state")
        if first and classes is None:
            raise ValueError("Perceptron: classes must be passed on the first call to partial_fit.")
        if not first and classes is not None and not np.array_equal(np.unique(classes), np.asarray(self.classes_)):
            raise ValueError(
                f"Perceptron: classes={classes!r} is not the same as on last call to partial_fit, was: {self.classes_}"
            )
        samples = self._samples(X, y, classes=classes if first else self.classes_, reset=first)
        weight = self._row_weights(samples, sample_weight)
        if first:
            self._prepare(samples, resume=False)
        self._state = self._state._replace(
            w=self._state.w.to(samples.x.dtype), b=None if self._state.b is None else self._state.b.to(samples.x.dtype)
        )
        random = check_random_state(self.random_state)
        changes = self._epoch(samples, weight, random, None)
        self.history_ = [*getattr(self, "history_", []), Epoch(changes, self._error_of(samples), None)]
        self.n_iter_ = len(self.history_)
        self._publish(samples)
        return self

    def _check(self) -> None:
        check_count("Perceptron", max_iter=self.max_iter)
        check_positive("Perceptron", eta0=self.eta0)

    def _row_weights(self, samples: Samples, sample_weight: Any) -> Tensor | None:
        """The weight of each row; sets `_own`, a further one of each class's own samples."""
        self._own: Tensor | None = None
        if samples.binary or self.class_weight is None:
            return self._weights(samples, sample_weight, self.class_weight)
        weight = self._weights(samples, sample_weight)
        self._own = self._class_weights(samples, self.class_weight, weight)
        return weight

    def _prepare(self, samples: Samples, resume: bool) -> None:
        """The weights to begin with."""
        columns = samples.x.shape[1]
        self._pairs: _Pairs | None = None
        if self.features is not None:
            self.features_ = clone(self.features).fit(samples.x)
            if not hasattr(self.features_, "pairs_"):
                raise ValueError(
                    "Perceptron: features must be a PairProducts or a RandomPairProducts, whose products the pass "
                    f"computes, got {self.features!r}; put other maps before the Perceptron in a Pipeline"
                )
            self._pairs = _Pairs(self.features_.pairs_, columns)
            columns += len(self.features_.pairs_)
        count, dtype = 1 if samples.binary else len(samples.classes), samples.x.dtype
        if resume and hasattr(self, "_state") and self._state.w.shape == (count, columns):
            w, b, sums, steps = self._state
            self._state = _State(w.to(dtype), None if b is None else b.to(dtype), sums, steps)
            return
        w, b = torch.zeros(count, columns, dtype=dtype), torch.zeros(count, dtype=dtype)
        sums = (torch.zeros_like(w), torch.zeros_like(b)) if self.average else None
        self._state = _State(w, b if self.fit_intercept else None, sums, 0)

    def _epoch(self, samples: Samples, weight: Tensor | None, random: Any, scores: Tensor | None) -> int:
        """One pass over the samples; the count of changes."""
        w, b, sums, steps = self._state
        n = len(samples.x)
        order = torch.from_numpy(random.permutation(n)) if self.shuffle and random is not None else None
        products = None if self._pairs is None else self._pairs.table
        positive = [1] if len(w) == 1 else list(range(len(w)))
        counts = _C.perceptron_epoch(
            samples.x, samples.codes, w, b, positive, self.eta0, order, weight, self._own, products, scores, sums, steps
        )
        if random is not None:
            self._state = self._state._replace(steps=steps + n)
        return sum(counts)

    def _error_of(self, samples: Samples) -> float:
        return _error(self._score(samples.x, self._state.w, self._state.b), samples)

    def _publish(self, samples: Samples) -> None:
        w, b, sums, steps = self._state
        if self.average and sums is not None:
            w = w - sums[0] / steps
            b = None if b is None else b - sums[1] / steps
        self.t_ = steps + 1
        self._learned(
            samples, w.clone() if self._pairs is None else self._pairs.from_pass(w), None if b is None else b.clone()
        )

    def _score(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Scores with weights in the order of the pass."""
        if self._pairs is None:
            return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
        # A pass in which every sample has weight zero changes nothing and scores all.
        scores = x.new_empty(len(x), len(w))
        codes, nothing = torch.zeros(len(x), dtype=torch.int64), x.new_zeros(len(x))
        _C.perceptron_epoch(
            x,
            codes,
            w.to(x.dtype),
            None if b is None else b.to(x.dtype),
            list(range(len(w))),
            1.0,
            None,
            nothing,
            None,
            self._pairs.table,
            scores,
            None,
            0,
        )
        return scores

    def _scores(self, X: Any) -> Tensor:
        if getattr(self, "_pairs", None) is None:
            return super()._scores(X)
        x = self._input(X)
        assert self._pairs is not None
        coef, intercept = (torch.as_tensor(p).to("cpu", x.dtype) for p in (self.coef_, self.intercept_))
        return self._score(x, self._pairs.to_pass(coef).contiguous(), intercept)


def _error(scores: Tensor, samples: Samples) -> float:
    predicted = (scores[:, 0] >= 0).long() if scores.shape[1] == 1 else scores.argmax(1)
    return float((predicted != samples.codes).double().mean())
