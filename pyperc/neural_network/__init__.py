"""Multi-layer perceptrons with scikit-learn's manners, trained by pyperc's steps.

Names, parameters and attributes are those of `sklearn.neural_network`; with the same `random_state` the same weights
are drawn and the same batches taken, so that the loss curves are the same to rounding.

>>> from pyperc.neural_network import MLPClassifier
>>> model = MLPClassifier([8], solver="lbfgs", random_state=1).fit([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0])
>>> model.predict([[0, 1], [1, 1]]).tolist()
[1, 0]

numpy arrays give numpy arrays, torch tensors torch tensors. `pyperc.MLPClassifier` and `pyperc.MLPRegressor` are these.
"""

from pyperc._sklearn import need

need("pyperc.neural_network")

from pyperc.neural_network._classifier import MLPClassifier  # noqa: E402
from pyperc.neural_network._regressor import MLPRegressor  # noqa: E402

__all__ = ["MLPClassifier", "MLPRegressor"]
