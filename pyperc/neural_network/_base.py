"""What the classifier and the regressor share: arguments, weights, the course of a fit, outputs."""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier as Reference
from sklearn.utils import check_array, check_consistent_length, check_random_state, shuffle
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn

from pyperc._estimators import TensorEstimator, numpy_of
from pyperc._sklearn import tensor_of
from pyperc.batches import ROWS_AT_ONCE
from pyperc.interrupt import Interrupts
from pyperc.neural_network._solvers import Descent, Rows, Task, dense, lbfgs
from pyperc.nn import MLP

if TYPE_CHECKING:
    from pyperc.layers import Device

ACTIVATIONS = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}

PARAMETERS = """
    Args:
        hidden_layer_sizes: the widths of the hidden layers.
        activation: of the hidden layers: "identity", "logistic", "tanh" or "relu".
        solver: "adam", "sgd" or "lbfgs".
        alpha: of the penalty alpha / (2 n) |coefs|^2, n being the samples of a batch.
        batch_size: "auto" is the lesser of 200 and n.
        learning_rate: of "sgd": "constant", "invscaling" or "adaptive".
        learning_rate_init, power_t, momentum, nesterovs_momentum: of "sgd".
        learning_rate_init, beta_1, beta_2, epsilon: of "adam".
        max_iter, max_fun: epochs; iterations and evaluations of "lbfgs".
        shuffle, random_state: of the batches, the initial weights and the held-out part.
        tol, n_iter_no_change: a fit ends after so many epochs without an improvement by tol.
        early_stopping, validation_fraction: measure that improvement on a held-out part.
        verbose: print each epoch.
        warm_start: go on from the last fit's weights.
        device: of the network; None is that of X.
        dtype: torch.float32 or torch.float64; None is that of X.
"""


class MultilayerPerceptron(TensorEstimator):
    """The network is a `pyperc.MLP`, `network_`, and coefs_ and intercepts_ are views of its parameters."""

    _parameter_constraints = {  # noqa: RUF012
        **Reference._parameter_constraints,
        "device": [str, torch.device, None],
        "dtype": [torch.dtype, None],
    }
    coefs_: list[Any]
    intercepts_: list[Any]
    loss_: float
    loss_curve_: list[float]
    best_loss_: Any
    validation_scores_: Any
    best_validation_score_: Any

    def __init__(
        self,
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
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.device = device
        self.dtype = dtype

    # What the two differ in.

    @abstractmethod
    def _targets(self, y: Any, incremental: bool) -> Any:
        """y as the task has it, a row for each sample, by numpy; sets the classes."""

    @abstractmethod
    def _task(self) -> Task: ...

    @abstractmethod
    def _start(self, target: Any) -> None:
        """Sets n_outputs_ and out_activation_ of a network that begins."""

    @abstractmethod
    def _labels(self, scores: Tensor) -> Any:
        """Predictions by numpy of the outputs before their activation."""

    @abstractmethod
    def _score(self, y: Any, predicted: Any, sample_weight: Any) -> float: ...

    # Fitting.

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Trains on X [n, in], dense or sparse, and y; see the class.

        Raises:
            ValueError: parameters out of their range, shapes that do not fit, NaN or infinity.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def _solves_by_steps(self) -> bool:
        """What partial_fit needs."""
        if self.solver == "lbfgs":
            raise AttributeError(
                f"partial_fit is only available for stochastic optimizers. {self.solver} is not stochastic."
            )
        return True

    def _fit(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> Any:
        self._validate_params()
        if incremental and self.early_stopping:
            raise ValueError(f"{type(self).__name__}: partial_fit does not support early_stopping=True")
        fresh = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        x, y = self._checked(X, y, reset=fresh)
        target = self._targets(y, incremental)
        random = check_random_state(self.random_state)
        if fresh:
            self._start(target)
            self._initialise(X, x, random)
        network = self.network_
        rows = self._rows(network, x, target, sample_weight)
        if self.solver == "lbfgs":
            self._solve(network, rows)
        else:
            if not incremental or "_descent" not in self.__dict__:
                self._descent = Descent(self, network, self._task())
            self._descend(rows, y, random, incremental)
        self._publish(X, network)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters()):
            raise ValueError(
                f"{type(self).__name__}: the solver produced non-finite parameter weights. The input data may contain "
                "large values and need to be preprocessed."
            )
        return self

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Any, Any]:
        """X as a tensor or a csr matrix, y as an array."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        numeric = not hasattr(self, "predict_proba")
        if isinstance(X, Tensor):
            x: Any = self._tensor(X, reset)
            y = check_array(numpy_of(y), ensure_2d=False, dtype="numeric" if numeric else None, input_name="y")
            check_consistent_length(x, y)
        else:
            x, y = validate_data(
                self,
                X,
                numpy_of(y),
                accept_sparse="csr",
                multi_output=True,
                y_numeric=numeric,
                dtype=[np.float64, np.float32],
                order="C",
                reset=reset,
            )
            x = x if issparse(x) else tensor_of(x)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return x, y

    def _initialise(self, X: Any, x: Any, random: Any) -> None:
        """Draws the weights as scikit-learn draws them, and forgets what was learned."""
        hidden = self.hidden_layer_sizes
        hidden = [*hidden] if np.iterable(hidden) else [hidden]
        if any(width <= 0 for width in hidden):
            raise ValueError(f"{type(self).__name__}: hidden_layer_sizes must be > 0, got {hidden}.")
        sizes = [x.shape[1], *hidden, self.n_outputs_]
        self.n_layers_ = len(sizes)
        device = self.device or (X.device if isinstance(X, Tensor) else "cpu")
        dtype = self.dtype or (x.dtype if isinstance(x, Tensor) else torch.from_numpy(x.data[:0]).dtype)
        factor = 2.0 if self.activation == "logistic" else 6.0
        self.coefs_, self.intercepts_ = [], []
        for width_in, width_out in itertools.pairwise(sizes):
            bound = np.sqrt(factor / (width_in + width_out))
            self.coefs_.append(random.uniform(-bound, bound, (width_in, width_out)))
            self.intercepts_.append(random.uniform(-bound, bound, width_out))
        self._build(sizes, device, dtype)
        self.__dict__.pop("_descent", None)
        self.n_iter_ = self.t_ = 0
        if self.solver != "lbfgs":
            self.loss_curve_ = []
            self._unimproved = 0
            self.best_loss_ = None if self.early_stopping else np.inf
            self.validation_scores_ = [] if self.early_stopping else None
            self.best_validation_score_ = -np.inf if self.early_stopping else None

    def _rows(self, network: MLP, x: Any, target: Any, sample_weight: Any) -> Rows:
        first = next(network.parameters())
        classes = self._task().loss == "cross_entropy"
        y = torch.from_numpy(target).to(first.device, torch.int64 if classes else first.dtype)
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(numpy_of(sample_weight), target, dtype=np.float64)
            weight = torch.from_numpy(weight).to(first.device)
        return Rows(x.to(first.device) if isinstance(x, Tensor) else x, y, weight)

    def _solve(self, network: MLP, rows: Rows) -> None:
        result, self.loss_ = lbfgs(self, network, self._task(), rows)
        self.n_iter_ = min(result.nit, self.max_iter)
        if result.status != 0:
            warnings.warn(
                f"{type(self).__name__}: lbfgs did not converge to tol={self.tol}: {result.message}",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _descend(self, rows: Rows, y: Any, random: Any, incremental: bool) -> None:
        """Epochs of sgd or adam, as scikit-learn counts and ends them."""
        train, held_out = np.arange(len(rows)), None
        if self.early_stopping:
            train, held_out = self._split(train, y, random)
            best = [parameter.detach().clone() for parameter in self._mlp.parameters()]
        count = len(train)
        if self.batch_size != "auto" and self.batch_size > count:
            warnings.warn(
                f"{type(self).__name__}: batch_size={self.batch_size} is larger than the {count} samples, and clipped",
                stacklevel=4,
            )
        batch_size = min(200 if self.batch_size == "auto" else int(self.batch_size), count)
        self.n_iter_ = 0
        position = np.arange(count)
        with Interrupts() as interrupts:
            for _ in range(1 if incremental else self.max_iter):
                if self.shuffle:
                    position = shuffle(position, random_state=random)
                order = torch.from_numpy(train[position]).to(rows.target.device)
                try:
                    self.loss_ = self._descent.epoch(rows, order, batch_size, interrupts)
                except KeyboardInterrupt:
                    warnings.warn(f"{type(self).__name__}: training interrupted by user.", stacklevel=4)
                    break
                self.n_iter_ += 1
                self.t_ += count
                self.loss_curve_.append(self.loss_)
                if self.verbose:
                    print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
                if held_out is None:
                    self._compare_loss()
                elif self._compare_score(rows, y, held_out):
                    best = [parameter.detach().clone() for parameter in self._mlp.parameters()]
                if self.solver == "sgd" and self.learning_rate == "invscaling":
                    self._descent.set_rate(self.learning_rate_init / (self.t_ + 1) ** self.power_t)
                if self._unimproved > self.n_iter_no_change:
                    goes_on = self._descent.slower()
                    if self.verbose:
                        self._say_unimproved(goes_on)
                    if not goes_on:
                        break
                    self._unimproved = 0
            else:
                if not incremental:
                    warnings.warn(
                        f"{type(self).__name__}: maximum iterations ({self.max_iter}) reached and the optimization "
                        "hasn't converged yet.",
                        ConvergenceWarning,
                        stacklevel=4,
                    )
        if self.early_stopping:
            with torch.no_grad():
                for parameter, kept in zip(self._mlp.parameters(), best, strict=True):
                    parameter.copy_(kept)

    def _split(self, rows: Any, y: Any, random: Any) -> tuple[Any, Any]:
        """The rows to train on and those held out."""
        # Like scikit-learn: by class where the classes are two.
        two = hasattr(self, "classes_") and self.n_outputs_ == 1
        train, held_out = train_test_split(
            rows, random_state=random, test_size=self.validation_fraction, stratify=y if two else None
        )
        if len(held_out) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        return train, held_out

    def _compare_loss(self) -> None:
        self._unimproved = self._unimproved + 1 if self.loss_ > self.best_loss_ - self.tol else 0
        self.best_loss_ = min(self.best_loss_, self.loss_)

    def _compare_score(self, rows: Rows, y: Any, held_out: Any) -> bool:
        """Whether the held-out rows have their best score yet."""
        scores = self._outputs(rows.x[held_out])
        weight = None if rows.weight is None else rows.weight[held_out].cpu().numpy()
        finite = bool(torch.isfinite(scores).all())
        score = self._score(y[held_out], self._labels(scores), weight) if finite else np.nan
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")
        self._unimproved = self._unimproved + 1 if score < self.best_validation_score_ + self.tol else 0
        better = bool(score > self.best_validation_score_)
        if better:
            self.best_validation_score_ = score
        return better

    def _say_unimproved(self, goes_on: bool) -> None:
        what = "Validation score" if self.early_stopping else "Training loss"
        then = f"Setting learning rate to {self._descent.rate:f}" if goes_on else "Stopping."
        epochs = f"{self.n_iter_no_change} consecutive epochs"
        print(f"{what} did not improve more than tol={self.tol:f} for {epochs}. {then}")

    # The network and its numbers.

    @property
    def network_(self) -> MLP:
        """The network, on the numbers that coefs_ and intercepts_ hold."""
        check_is_fitted(self, "coefs_")
        if "_mlp" not in self.__dict__:
            sizes = [self.coefs_[0].shape[0], *(coef.shape[1] for coef in self.coefs_)]
            coef = torch.as_tensor(self.coefs_[0])
            self._build(sizes, self.device or coef.device, coef.dtype)
            if (state := self.__dict__.pop("_descent_state", None)) is not None:
                self._descent = Descent(self, self._mlp, self._task())
                self._descent.load_state_dict(state)
        layers = [layer for layer in self._mlp if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, coef, intercept in zip(layers, self.coefs_, self.intercepts_, strict=True):
                for parameter, given in (
                    (layer.weight, torch.as_tensor(coef).t()),
                    (layer.bias, torch.as_tensor(intercept)),
                ):
                    # What was published shares the parameter's memory; what somebody put in its place does not.
                    if given.data_ptr() != parameter.data_ptr():
                        parameter.copy_(given)
        return self._mlp

    def _build(self, sizes: list[int], device: Device, dtype: torch.dtype) -> None:
        # By way of meta, as a network there draws no random numbers.
        self._mlp = MLP(sizes, ACTIVATIONS[self.activation], device="meta", dtype=dtype).to_empty(device=device)

    def _publish(self, X: Any, network: MLP) -> None:
        """coefs_ and intercepts_ of X's kind."""
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        self.coefs_ = [self._published(layer.weight.detach().t(), X) for layer in layers]
        self.intercepts_ = [self._published(layer.bias.detach(), X) for layer in layers]

    @staticmethod
    def _published(result: Tensor, X: Any) -> Any:
        return result.to(X.device) if isinstance(X, Tensor) else result.cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        state.pop("_mlp", None)
        descent = state.pop("_descent", None)
        if descent is not None:
            state["_descent_state"] = descent.state_dict()
        return state

    @torch.no_grad()
    def _outputs(self, x: Any) -> Tensor:
        """The outputs before their activation, [n, outputs], of x that was checked."""
        network = self._mlp
        first = next(network.parameters())
        parts = (x[start : start + ROWS_AT_ONCE] for start in range(0, x.shape[0], ROWS_AT_ONCE))
        return torch.cat([network(dense(part, first.dtype, first.device)) for part in parts])

    def _scores(self, X: Any) -> Tensor:
        check_is_fitted(self)
        if isinstance(X, Tensor):
            x: Any = self._tensor(X, reset=False)
        else:
            x = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], order="C", reset=False)
            x = x if issparse(x) else tensor_of(x)
        self.network_  # noqa: B018 - takes over what somebody put into coefs_
        return self._outputs(x)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
