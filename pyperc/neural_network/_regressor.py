"""The regressor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if
from torch import Tensor

from pyperc._estimators import numpy_of
from pyperc._sklearn import like
from pyperc.neural_network._base import PARAMETERS, MultilayerPerceptron
from pyperc.neural_network._solvers import Task

if TYPE_CHECKING:
    from pyperc.layers import Device


def poisson(scores: Tensor, target: Tensor) -> Tensor:
    """sum_i v_i sum_k (y log(y / e^s) - y + e^s), half the deviance; the last column of the target holds v."""
    y, share = target[:, :-1], target[:, -1:]
    return (share * (scores.exp() - y * scores + torch.xlogy(y, y) - y)).sum()


class MLPRegressor(RegressorMixin, MultilayerPerceptron):
    __doc__ = f"""A regressor by a multi-layer perceptron, which minimises half the squared error, or Poisson's loss.

    Parameters, attributes and results are those of `sklearn.neural_network.MLPRegressor`; `loss` may be
    "squared_error" or "poisson", which has the output e^s for targets that are not negative.
{PARAMETERS}
    Attributes:
        n_outputs_, n_layers_, out_activation_, n_features_in_.
        coefs_, intercepts_: [in, out] and [out] of each layer.
        network_: the `pyperc.MLP` whose memory they share.
        loss_, loss_curve_, best_loss_, validation_scores_, best_validation_score_, n_iter_, t_.

    Source: EE-559, lectures 3.4 to 3.6.

    >>> import numpy as np
    >>> x = np.linspace(-1, 1, 50)[:, None]
    >>> model = MLPRegressor(hidden_layer_sizes=[20], solver="lbfgs", random_state=0).fit(x, x[:, 0] ** 2)
    >>> model.score(x, x[:, 0] ** 2) > 0.99
    True
    """

    _parameter_constraints = {  # noqa: RUF012
        **MultilayerPerceptron._parameter_constraints,
        "loss": [StrOptions({"squared_error", "poisson"})],
    }

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: Any = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            activation,
            solver=solver,
            alpha=alpha,
            batch_size=batch_size,
            learning_rate=learning_rate,
            learning_rate_init=learning_rate_init,
            power_t=power_t,
            max_iter=max_iter,
            shuffle=shuffle,
            random_state=random_state,
            tol=tol,
            verbose=verbose,
            warm_start=warm_start,
            momentum=momentum,
            nesterovs_momentum=nesterovs_momentum,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            n_iter_no_change=n_iter_no_change,
            max_fun=max_fun,
            device=device,
            dtype=dtype,
        )
        self.loss = loss

    def _targets(self, y: Any, incremental: bool) -> Any:
        target = y[:, None] if y.ndim == 1 else y
        if self.loss == "poisson" and (target < 0).any():
            raise ValueError(f"{type(self).__name__}: y must not be negative for the poisson loss, got {target.min()}")
        return target

    def _start(self, target: Any) -> None:
        self.n_outputs_ = target.shape[1]
        self.out_activation_ = "exp" if self.loss == "poisson" else "identity"

    def _task(self) -> Task:
        if self.loss == "poisson":
            return Task(poisson, weighted=lambda target, share: torch.cat([target, share[:, None]], 1))
        return Task("mse", factor=0.5, reported=1 / self.n_outputs_)

    def _labels(self, scores: Tensor) -> Any:
        return self._values(scores).cpu().numpy()

    def _values(self, scores: Tensor) -> Tensor:
        values = scores.exp() if self.out_activation_ == "exp" else scores
        return values[:, 0] if self.n_outputs_ == 1 else values

    def _score(self, y: Any, predicted: Any, sample_weight: Any) -> float:
        return float(r2_score(y, predicted, sample_weight=sample_weight))

    @available_if(MultilayerPerceptron._solves_by_steps)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """One epoch over X from the weights so far."""
        self._fit(X, y, sample_weight, incremental=True)
        return self

    def predict(self, X: Any) -> Any:
        """The output for each row of X: [n], or [n, outputs] for several."""
        return like(self._values(self._scores(X)), X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R^2."""
        return self._score(numpy_of(y), numpy_of(self.predict(X)), numpy_of(sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
