"""The classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels
from torch import Tensor

from pyperc._estimators import numpy_of
from pyperc._sklearn import like
from pyperc.neural_network._base import PARAMETERS, MultilayerPerceptron
from pyperc.neural_network._solvers import Task

if TYPE_CHECKING:
    from pyperc.nn import MLP


class MLPClassifier(ClassifierMixin, MultilayerPerceptron):
    __doc__ = f"""A classifier by a multi-layer perceptron, which minimises the cross-entropy of the classes.

    The outputs go through softmax for several classes, through the logistic function for two (one output) and for each
    label of a multilabel problem. Parameters, attributes and results are those of
    `sklearn.neural_network.MLPClassifier`.
{PARAMETERS}
    Attributes:
        classes_, n_outputs_, n_layers_, out_activation_, n_features_in_.
        coefs_, intercepts_: [in, out] and [out] of each layer.
        network_: the `pyperc.MLP` whose memory they share.
        loss_, loss_curve_, best_loss_, validation_scores_, best_validation_score_, n_iter_, t_.

    Source: EE-559, lectures 3.4 to 3.6.

    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> model = MLPClassifier([16], solver="lbfgs", alpha=1.0, max_iter=500, random_state=0).fit(x, y)
    >>> model.score(x, y) > 0.95, [coef.shape for coef in model.coefs_]
    (True, [(4, 16), (16, 3)])
    """

    classes_: Any

    def _targets(self, y: Any, incremental: bool) -> Any:
        check_classification_targets(y)
        if not hasattr(self, "_binarizer") or not (self.warm_start or incremental):
            self._set_classes(LabelBinarizer().fit(y))
        classes = self._binarizer.classes_
        unknown = np.setdiff1d(unique_labels(y), classes)
        if len(unknown):
            raise ValueError(f"{type(self).__name__}: y must hold classes of the fit before, {classes}, got {unknown}")
        if self.warm_start and not incremental and len(unique_labels(y)) < len(classes):
            raise ValueError(
                f"{type(self).__name__}: warm_start can only be used where y has the same classes as in the previous "
                f"call to fit, {classes}, got {unique_labels(y)}"
            )
        hot = self._binarizer.transform(y)
        if self._binarizer.y_type_ == "multiclass":
            return hot.argmax(1)
        return 2.0 * (hot.toarray() if hasattr(hot, "toarray") else hot) - 1

    def _set_classes(self, binarizer: LabelBinarizer) -> None:
        self._binarizer = binarizer
        self.classes_ = binarizer.classes_

    def _publish(self, X: Any, network: MLP) -> None:
        super()._publish(X, network)
        classes = self._binarizer.classes_
        numeric = isinstance(X, Tensor) and classes.dtype.kind in "biuf"
        self.classes_ = torch.from_numpy(classes).to(X.device) if numeric else classes

    def _start(self, target: Any) -> None:
        several = self._binarizer.y_type_ == "multiclass"
        self.n_outputs_ = len(self._binarizer.classes_) if several else target.shape[1]
        self.out_activation_ = "softmax" if several else "logistic"

    def _task(self) -> Task:
        return Task("cross_entropy" if self.out_activation_ == "softmax" else "logistic")

    def _labels(self, scores: Tensor) -> Any:
        several = self.out_activation_ == "softmax"
        likely = (scores.softmax(1) if several else scores.sigmoid()).cpu().numpy()
        return self._binarizer.inverse_transform(likely[:, 0] if self.n_outputs_ == 1 else likely)

    def _score(self, y: Any, predicted: Any, sample_weight: Any) -> float:
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    @available_if(MultilayerPerceptron._solves_by_steps)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> MLPClassifier:
        """One epoch over X from the weights so far. The first call needs all classes that will ever come."""
        if not hasattr(self, "_binarizer"):
            if classes is None:
                raise ValueError(f"{type(self).__name__}: classes must be passed on the first call to partial_fit.")
            multilabel = type_of_target(numpy_of(y)).startswith("multilabel")
            self._set_classes(LabelBinarizer().fit(numpy_of(y) if multilabel else np.unique(numpy_of(classes))))
        elif classes is not None and not np.array_equal(np.unique(numpy_of(classes)), self._binarizer.classes_):
            raise ValueError(
                f"{type(self).__name__}: classes={classes!r} is not the same as on last call to partial_fit, was: "
                f"{self.classes_}"
            )
        self._fit(X, y, sample_weight, incremental=True)
        return self

    def predict(self, X: Any) -> Any:
        """The class of each row of X, or its labels, [n, labels], of 0 and 1."""
        labels = self._labels(self._scores(X))
        numeric = isinstance(X, Tensor) and labels.dtype.kind in "biuf"
        return torch.from_numpy(labels).to(X.device) if numeric else labels

    def predict_proba(self, X: Any) -> Any:
        """P(Y = c | x) for each class c, [n, classes]; for each label in a multilabel problem."""
        scores = self._scores(X)
        if self.out_activation_ == "softmax":
            return like(scores.softmax(1), X)
        likely = scores.sigmoid()
        return like(torch.cat([1 - likely, likely], 1) if self.n_outputs_ == 1 else likely, X)

    def predict_log_proba(self, X: Any) -> Any:
        """log(predict_proba(X)), -inf where that is 0."""
        likely = self.predict_proba(X)
        if isinstance(likely, Tensor):
            return likely.log()
        with np.errstate(divide="ignore"):
            return np.log(likely)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the rows of X whose class, or whose every label, is y's."""
        return self._score(numpy_of(y), numpy_of(self.predict(X)), numpy_of(sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
