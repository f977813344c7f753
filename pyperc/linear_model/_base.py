"""What the linear classifiers share: their arguments, their classes, and predictions from coef_ and intercept_."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data
from torch import Tensor

from pyperc._estimators import TensorEstimator, numpy_of
from pyperc._sklearn import like, tensor_of


@dataclass
class Samples:
    """What the passes read: x float32 or float64 [n, d] on the CPU, the codes of the classes, and whose they are."""

    x: Tensor
    codes: Tensor
    """int64 [n]: indices into classes_"""
    classes: Any
    given: Any
    """X as the caller gave it"""

    @property
    def binary(self) -> bool:
        return len(self.classes) == 2

    def signs(self) -> Tensor:
        """-1 for the first class, +1 for the second, in x's dtype."""
        return self.codes.to(self.x.dtype).mul_(2).sub_(1)


class LinearClassifier(ClassifierMixin, TensorEstimator):
    """s = x coef_^T + intercept_; the class with the highest score, or for two classes the sign: the lecture's sigma.

    A score of 0 belongs to the second class.
    """

    coef_: Any
    intercept_: Any
    classes_: Any

    def _samples(self, X: Any, y: Any, classes: Any = None, reset: bool = True) -> Samples:
        """X and y checked; `classes` gives the classes where y may lack some."""
        name = type(self).__name__
        if y is None:
            raise ValueError(f"{name} requires y to be passed, but the target y is None")
        if isinstance(X, Tensor):
            checked = self._tensor(X, reset)
            labels = y.detach() if isinstance(y, Tensor) else torch.as_tensor(np.asarray(y))
            if labels.ndim == 2 and labels.shape[1] == 1:
                labels = labels[:, 0]
            if labels.ndim != 1 or len(labels) != len(X):
                raise ValueError(
                    f"{name}: y must be of shape [{len(X)}], one label for each row of X, got {list(labels.shape)}"
                )
            if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
                raise ValueError(f"{name}: Input y contains NaN or infinity.")
            check_classification_targets(labels.cpu().numpy())
            if classes is None:
                unique, codes = torch.unique(labels, return_inverse=True)
            else:
                unique = torch.unique(torch.as_tensor(classes, device=labels.device))
                same = labels[:, None] == unique
                if not bool(same.any(1).all()):
                    raise ValueError(f"{name}: y must hold labels of classes {unique.tolist()} only")
                codes = same.long().argmax(1)
            codes, unique = codes.cpu(), unique.to(X.device)
        else:
            X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], order="C", reset=reset)
            y = column_or_1d(y, warn=True)
            check_classification_targets(y)
            checked = tensor_of(X)
            unique = np.unique(y if classes is None else classes)
            positions = np.searchsorted(unique, y).clip(max=len(unique) - 1)
            if not np.array_equal(unique[positions], y):
                raise ValueError(f"{name}: y must hold labels of classes {unique.tolist()} only")
            codes = torch.from_numpy(positions.astype(np.int64))
        if len(unique) < 2:
            raise ValueError(
                f"{name} needs samples of at least 2 classes in the data, but the data contains only one class: "
                f"{unique[0]}"
            )
        return Samples(checked, codes, unique, X)

    def _tensor(self, X: Tensor, reset: bool) -> Tensor:
        return super()._tensor(X, reset).cpu()

    def _weights(self, samples: Samples, sample_weight: Any, class_weight: Any = None) -> Tensor | None:
        """The weight of each row, or None where all are 1."""
        weight = None
        n = len(samples.codes)
        if sample_weight is not None:
            given = sample_weight.detach().cpu() if isinstance(sample_weight, Tensor) else np.asarray(sample_weight)
            weight = torch.as_tensor(given).to(samples.x.dtype, copy=True)
            if weight.ndim == 0:
                weight = weight.expand(n).contiguous()
            if weight.shape != (n,):
                raise ValueError(
                    f"{type(self).__name__}: sample_weight must be of shape [{n}], one for each row of X, got "
                    f"{list(weight.shape)}"
                )
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"{type(self).__name__}: sample_weight contains NaN or infinity")
            if bool((weight < 0).any()):
                raise ValueError(f"{type(self).__name__}: sample_weight must not be negative")
            if not bool(weight.any()):
                raise ValueError(f"{type(self).__name__}: sample_weight must not be zero for all samples")
        if class_weight is not None:
            of_class = self._class_weights(samples, class_weight, weight)
            weight = of_class[samples.codes] if weight is None else weight * of_class[samples.codes]
        return weight

    def _class_weights(self, samples: Samples, class_weight: Any, weight: Tensor | None = None) -> Tensor:
        """The weight of each class, [classes]."""
        if isinstance(class_weight, str) and class_weight == "balanced":
            counts = torch.bincount(samples.codes, weights=weight, minlength=len(samples.classes)).double()
            # A class whose samples all have weight zero is not there.
            values = torch.where(counts > 0, counts.sum() / (len(counts) * counts), 0.0)
            return values.to(samples.x.dtype)
        labels = samples.classes.cpu().numpy() if isinstance(samples.classes, Tensor) else samples.classes
        values = compute_class_weight(class_weight, classes=labels, y=labels[samples.codes.numpy()])
        return torch.as_tensor(values).to(samples.x.dtype)

    def _learned(self, samples: Samples, coef: Tensor, intercept: Tensor | None) -> None:
        """Sets coef_, intercept_ and classes_, of the kind, dtype and device of the samples."""
        self.classes_ = samples.classes
        if intercept is None:
            intercept = torch.zeros(len(coef), dtype=coef.dtype)
        given = samples.given
        dtype = given.dtype if isinstance(given, Tensor) and given.is_floating_point() else samples.x.dtype
        self.coef_ = like(coef.to(dtype), given)
        self.intercept_ = like(intercept.to(dtype), given)

    def _scores(self, X: Any) -> Tensor:
        """[n, 1 or classes]"""
        x = self._input(X)
        coef, intercept = (torch.as_tensor(p).to("cpu", x.dtype) for p in (self.coef_, self.intercept_))
        return F.linear(x, coef, intercept)

    def decision_function(self, X: Any) -> Any:
        """The scores s, [n] for two classes (positive: the second), [n, classes] for several."""
        scores = self._scores(X)
        return like(scores[:, 0] if scores.shape[1] == 1 else scores, X)

    def predict(self, X: Any) -> Any:
        """The class of each row of X."""
        scores = self._scores(X)
        codes = (scores[:, 0] >= 0).long() if scores.shape[1] == 1 else scores.argmax(1)
        if isinstance(self.classes_, Tensor):
            labels = self.classes_[codes.to(self.classes_.device)]
            return labels.to(X.device) if isinstance(X, Tensor) else labels.cpu().numpy()
        labels = self.classes_[codes.numpy()]
        numeric = isinstance(X, Tensor) and np.issubdtype(labels.dtype, np.number)
        return torch.from_numpy(labels).to(X.device) if numeric else labels

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the rows of X whose class is y's."""
        weight = None if sample_weight is None else numpy_of(sample_weight)
        return float(accuracy_score(numpy_of(y), numpy_of(self.predict(X)), sample_weight=weight))


class ProbabilisticClassifier(LinearClassifier):
    """A linear classifier whose scores are log odds: sigmoid of the one for two classes, else softmax."""

    def predict_log_proba(self, X: Any) -> Any:
        """log P(Y = c | x) for each class c, [n, classes]."""
        scores = self._scores(X)
        if scores.shape[1] == 1:
            return like(torch.cat([F.logsigmoid(-scores), F.logsigmoid(scores)], 1), X)
        return like(scores.log_softmax(1), X)

    def predict_proba(self, X: Any) -> Any:
        """P(Y = c | x) for each class c, [n, classes]."""
        scores = self._scores(X)
        if scores.shape[1] == 1:
            return like(torch.cat([torch.sigmoid(-scores), torch.sigmoid(scores)], 1), X)
        return like(scores.softmax(1), X)


def check_positive(name: str, **values: Any) -> None:
    """ValueError unless each value is a number above 0."""
    for argument, value in values.items():
        if not isinstance(value, numbers.Real) or not float(value) > 0 or math.isnan(float(value)):
            raise ValueError(f"{name}: {argument} must be a number above 0, got {value!r}")


def check_count(name: str, **values: Any) -> None:
    """ValueError unless each value is a whole number above 0."""
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
            raise ValueError(f"{name}: {argument} must be a whole number above 0, got {value!r}")
