"""The models that the multi-layer perceptron grew from, with scikit-learn's manners and native passes over the samples.

>>> from pyperc.linear_model import Perceptron
>>> model = Perceptron().fit([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 1])
>>> model.predict([[0, 1], [0, 0]]).tolist(), model.n_iter_
([1, 0], 6)

The perceptron, the margin's bound and the threshold units are those of EE-559, lecture 3.1; linear discriminant
analysis of 3.2; logistic regression of 3.2 and 3.5. numpy arrays give numpy arrays, torch tensors torch tensors.
"""

from pyperc._sklearn import need

need("pyperc.linear_model")

from pyperc.linear_model._discriminant import LinearDiscriminantAnalysis  # noqa: E402
from pyperc.linear_model._logistic import LogisticRegression  # noqa: E402
from pyperc.linear_model._margin import MarginBound, margin_bound  # noqa: E402
from pyperc.linear_model._perceptron import Epoch, Perceptron  # noqa: E402
from pyperc.linear_model._svm import LinearSVC  # noqa: E402
from pyperc.linear_model._units import ThresholdLogicUnit, from_truth_table  # noqa: E402

__all__ = [
    "Epoch",
    "LinearDiscriminantAnalysis",
    "LinearSVC",
    "LogisticRegression",
    "MarginBound",
    "Perceptron",
    "ThresholdLogicUnit",
    "from_truth_table",
    "margin_bound",
]
