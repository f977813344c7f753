"""MLPClassifier and MLPRegressor: scikit-learn's curves and weights by value, its manners; tensors; bad input."""

from __future__ import annotations

import copy
import inspect
import pickle
import signal
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", "1.6")

import sklearn.neural_network as reference
from scipy.sparse import csc_matrix, csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from threadpoolctl import threadpool_limits

import pyperc
from pyperc import neural_network

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

WEIGHTS = pytest.mark.skipif(
    "sample_weight" not in inspect.signature(reference.MLPClassifier.fit).parameters,
    reason="scikit-learn 1.7 weighs samples",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of numpy's, too: its threads spin."""
    with threadpool_limits(1):
        yield


def standardised(load) -> tuple[np.ndarray, np.ndarray]:
    x, y = load(return_X_y=True)
    return StandardScaler().fit_transform(x), y


def noisy(count: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 7))
    y = np.sin(x[:, :outputs]) + x[:, -1:] ** 2 + 0.1 * random.uniform(size=(count, outputs)) + 1
    return x, y[:, 0] if outputs == 1 else y


IRIS, CANCER = standardised(load_iris), standardised(load_breast_cancer)
LABELS = IRIS[0], np.stack([IRIS[1] > 0, IRIS[0][:, 0] > 0.3, IRIS[0][:, 1] > -0.2], 1).astype(int)
TASKS = {
    "three classes": ("MLPClassifier", {}, IRIS),
    "two classes": ("MLPClassifier", {}, CANCER),
    "labels": ("MLPClassifier", {}, LABELS),
    "one number": ("MLPRegressor", {}, noisy(203, 1)),
    "three numbers": ("MLPRegressor", {}, noisy(203, 3)),
}
SOLVERS = {
    "adam": {},
    "sgd": {"solver": "sgd", "learning_rate_init": 0.01},
    "sgd, plain momentum, strong alpha": {"solver": "sgd", "nesterovs_momentum": False, "alpha": 5.0, "batch_size": 33},
    "sgd, no momentum, unshuffled": {"solver": "sgd", "momentum": 0, "batch_size": 20, "shuffle": False},
    "sgd, invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.05, "power_t": 0.3},
    "sgd, adaptive": {
        "solver": "sgd",
        "learning_rate": "adaptive",
        "learning_rate_init": 0.05,
        "tol": 0.02,
        "n_iter_no_change": 1,
    },
    "adam, early stopping": {"early_stopping": True, "n_iter_no_change": 4, "batch_size": 16},
}


def pair(task: str, **settings):
    """scikit-learn's estimator and ours, and the data."""
    kind, own, data = TASKS[task]
    settings = {
        "hidden_layer_sizes": [9, 6],
        "activation": "tanh",
        "max_iter": 12,
        "random_state": 0,
        **own,
        **settings,
    }
    return getattr(reference, kind)(**settings), getattr(neural_network, kind)(**settings), data


def assert_alike(ours, theirs, tolerance: float = 1e-11) -> None:
    """Everything that scikit-learn's has learnt, in ours."""
    for name in ("coefs_", "intercepts_", "loss_curve_", "validation_scores_"):
        expected = getattr(theirs, name, None)
        for a, b in zip(getattr(ours, name, None) or [], expected or [], strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
    for name in ("loss_", "best_loss_", "best_validation_score_"):
        expected = getattr(theirs, name, None)
        assert getattr(ours, name, None) == (
            expected if expected is None else pytest.approx(expected, rel=tolerance)
        ), name
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(ours, name) == getattr(theirs, name), name


# By value


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("task", TASKS)
def test_training_is_scikit_learns(task, solver) -> None:
    theirs, ours, (x, y) = pair(task, **SOLVERS[solver])
    theirs.fit(x, y)
    ours.fit(x, y)
    assert_alike(ours, theirs)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-9)
    assert ours.score(x, y) == pytest.approx(theirs.score(x, y))
    if hasattr(theirs, "predict_proba"):
        np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-9)
        np.testing.assert_allclose(ours.predict_log_proba(x), theirs.predict_log_proba(x), rtol=1e-8)


@WEIGHTS
@pytest.mark.parametrize("solver", ["adam", "sgd", "adam, early stopping"])
@pytest.mark.parametrize("task", ["three classes", "two classes", "three numbers"])
def test_weighted_samples_are_scikit_learns(task, solver) -> None:
    theirs, ours, (x, y) = pair(task, **SOLVERS[solver])
    weight = np.random.default_rng(1).uniform(0.5, 2, len(x))
    assert_alike(ours.fit(x, y, sample_weight=weight), theirs.fit(x, y, sample_weight=weight))


@pytest.mark.parametrize("task", ["three classes", "two classes", "labels", "one number"])
def test_lbfgs_is_scikit_learns(task) -> None:
    theirs, ours, (x, y) = pair(task, solver="lbfgs", alpha=0.1)
    assert_alike(ours.fit(x, y), theirs.fit(x, y), 1e-7)


def test_lbfgs_finds_the_least_of_the_sum_over_the_outputs() -> None:
    _, ours, (x, y) = pair("three numbers", solver="lbfgs", alpha=0.1, max_iter=1000, tol=1e-7)
    ours.fit(x, y)
    network = copy.deepcopy(ours.network_)
    penalty = sum(p.square().sum() for p in network.parameters() if p.ndim == 2) * 0.1 / 2 / len(x)
    squares = (network(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum(1).mean() / 2
    (squares + penalty).backward()
    assert max(float(p.grad.abs().max()) for p in network.parameters()) < 2e-3
    assert ours.loss_ == pytest.approx((squares / 3 + penalty).item())


@pytest.mark.skipif("loss" not in reference.MLPRegressor().get_params(), reason="scikit-learn 1.7 has the loss")
@pytest.mark.parametrize("solver", ["adam", "sgd", "lbfgs"])
def test_poisson_is_scikit_learns(solver) -> None:
    for task in ("one number", "three numbers"):
        theirs, ours, (x, y) = pair(task, loss="poisson", solver=solver, alpha=0.1)
        weight = np.random.default_rng(1).uniform(0.5, 2, len(x))
        assert_alike(ours.fit(x, y, weight), theirs.fit(x, y, weight), 1e-11 if solver != "lbfgs" else 1e-7)
        np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-6)


@pytest.mark.parametrize("activation", ["identity", "logistic", "relu"])
def test_activations_are_scikit_learns(activation) -> None:
    theirs, ours, (x, y) = pair("three classes", activation=activation)
    assert_alike(ours.fit(x, y), theirs.fit(x, y))


def test_float32_is_trained_in_float32() -> None:
    theirs, ours, (x, y) = pair("two classes")
    x = x.astype(np.float32)
    assert_alike(ours.fit(x, y), theirs.fit(x, y), 1e-4)
    assert ours.coefs_[0].dtype == ours.predict_proba(x).dtype == np.float32
    wide = clone(ours).set_params(dtype=torch.float64).fit(x, y)
    assert wide.coefs_[0].dtype == np.float64


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fits_are_scikit_learns_and_go_on_after_a_pickle(solver) -> None:
    theirs, ours, (x, y) = pair("three classes", solver=solver)
    for part in (slice(0, 60), slice(60, 150), slice(0, 150)):
        theirs.partial_fit(x[part], y[part], classes=[0, 1, 2])
        ours.partial_fit(x[part], y[part], classes=[0, 1, 2])
        ours = pickle.loads(pickle.dumps(ours))
        assert_alike(ours, theirs)
    regressors = pair("one number", solver=solver)[:2]
    x, y = noisy(50, 1)
    for _ in range(2):
        assert_alike(*(model.partial_fit(x, y) for model in regressors[::-1]))


def test_a_warm_start_is_scikit_learns() -> None:
    theirs, ours, (x, y) = pair("three classes", warm_start=True)
    for _ in range(2):
        assert_alike(ours.fit(x, y), theirs.fit(x, y))
    assert len(ours.loss_curve_) == 24
    with pytest.raises(ValueError, match="same classes as in the previous"):
        ours.fit(x[:100], y[:100])


def test_weights_put_in_from_outside() -> None:
    theirs, ours, (x, y) = pair("three classes", warm_start=True)
    theirs.fit(x, y)
    ours.set_params(max_iter=1).fit(x, y)
    ours.coefs_ = [coef.copy() for coef in theirs.coefs_]
    ours.intercepts_ = [intercept.copy() for intercept in theirs.intercepts_]
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-12)
    for model in (ours, theirs):
        model.set_params(max_iter=12, random_state=3).fit(x, y)
    for a, b in zip(ours.coefs_, theirs.coefs_, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    # They are the network's own memory.
    ours.coefs_[-1][:] = 0
    ours.intercepts_[-1][:] = [0, 1, 0]
    assert ours.predict(x).tolist() == [1] * len(x)
    assert isinstance(ours.network_, pyperc.MLP)
    assert bool((ours.network_(torch.from_numpy(x)) == torch.tensor([0.0, 1.0, 0.0])).all())


# scikit-learn's manners


@pytest.mark.parametrize("model", [neural_network.MLPClassifier(), neural_network.MLPRegressor()], ids=str)
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_scikit_learns_checks(model, solver) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(clone(model).set_params(solver=solver, max_iter=100))


def test_parameters_are_scikit_learns() -> None:
    for name in ("MLPClassifier", "MLPRegressor"):
        theirs, ours = getattr(reference, name)().get_params(), getattr(neural_network, name)().get_params()
        assert theirs.items() <= ours.items()
        assert ours.keys() - theirs.keys() <= {"device", "dtype", "loss"}
        assert getattr(pyperc, name) is getattr(neural_network, name)


def test_pipelines_and_grids() -> None:
    x, y = load_iris(return_X_y=True)
    model = neural_network.MLPClassifier([8], solver="lbfgs", random_state=0, max_iter=50)
    grid = GridSearchCV(make_pipeline(StandardScaler(), model), {"mlpclassifier__alpha": [0.01, 1.0]}, cv=3)
    assert grid.fit(x, y).best_score_ > 0.9


def test_labels_of_any_kind() -> None:
    x = [[-1.0], [1.0]] * 5
    for labels in (["no", "yes"], [False, True], [-1, 1]):
        model = neural_network.MLPClassifier([4], solver="lbfgs", random_state=0).fit(x, labels * 5)
        assert model.predict(x[:2]).tolist() == labels
        assert model.classes_.tolist() == labels


@pytest.mark.parametrize("kind", [csr_matrix, csc_matrix])
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_sparse_samples(kind, solver) -> None:
    _, ours, (x, y) = pair("three classes", solver=solver, batch_size=40)
    x = np.where(np.abs(x) > 0.5, x, 0)
    dense = clone(ours).fit(x, y)
    ours.fit(kind(x), y)
    assert_alike(ours, dense, 1e-9)
    np.testing.assert_allclose(ours.predict_proba(kind(x)), dense.predict_proba(x), rtol=1e-9)


def test_verbose_says_what_scikit_learn_says(capsys) -> None:
    for settings in (SOLVERS["sgd, adaptive"], SOLVERS["adam, early stopping"]):
        theirs, ours, (x, y) = pair("two classes", verbose=True, **settings)
        theirs.fit(x, y)
        expected = capsys.readouterr().out
        ours.fit(x, y)
        assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
            line.split()[:2] for line in expected.splitlines()
        ]


def test_ctrl_c_keeps_what_was_learnt(monkeypatch) -> None:
    _, ours, (x, y) = pair("three classes", batch_size=10, max_iter=1000, tol=0)
    plain, taken = pyperc.TrainStep.epoch, []

    def epoch(self, *arguments, **keywords):
        taken.append(self)
        if len(taken) == 40:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(pyperc.TrainStep, "epoch", epoch)
    with pytest.warns(UserWarning, match="interrupted by user"):
        ours.fit(x, y)
    assert taken[0].steps == 40
    assert ours.n_iter_ == len(ours.loss_curve_) == 2
    assert ours.score(x, y) > 0.3


# Tensors


@pytest.mark.parametrize("task", TASKS)
def test_tensors_in_tensors_out(task) -> None:
    _, ours, (x, y) = pair(task)
    arrays, tensors = clone(ours).fit(x, y), clone(ours).fit(torch.from_numpy(x), torch.from_numpy(y))
    for name in ("coefs_", "intercepts_"):
        for a, b in zip(getattr(tensors, name), getattr(arrays, name), strict=True):
            assert isinstance(a, torch.Tensor)
            np.testing.assert_array_equal(a.numpy(), b)
    for name in ("predict", "predict_proba"):
        if hasattr(ours, name):
            result = getattr(tensors, name)(torch.from_numpy(x))
            assert isinstance(result, torch.Tensor)
            np.testing.assert_array_equal(result.numpy(), getattr(arrays, name)(x))
            assert isinstance(getattr(tensors, name)(x), np.ndarray)
    assert tensors.score(torch.from_numpy(x), torch.from_numpy(y)) == arrays.score(x, y)
    copied = pickle.loads(pickle.dumps(tensors))
    assert torch.equal(copied.predict(torch.from_numpy(x)), tensors.predict(torch.from_numpy(x)))
    if hasattr(ours, "predict_proba"):
        assert isinstance(tensors.classes_, torch.Tensor)
    half = clone(ours).fit(torch.from_numpy(x).bfloat16(), torch.from_numpy(y))
    assert half.coefs_[0].dtype == torch.float32


def test_the_generator_of_torch_is_left_alone() -> None:
    before = torch.get_rng_state()
    _, ours, (x, y) = pair("three classes")
    ours.fit(x, y)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_another_device() -> None:
    theirs, ours, (x, y) = pair("three classes", device="cuda")
    assert_alike(ours.fit(x, y), theirs.fit(x, y), 1e-9)
    assert ours.network_[0].weight.is_cuda
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-7)
    tensors = clone(ours).set_params(device=None).fit(torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda())
    assert tensors.coefs_[0].is_cuda
    assert tensors.predict(torch.from_numpy(x).cuda()).is_cuda


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, "'alpha' parameter of MLPClassifier must be a float in the range"),
        ({"solver": "newton"}, "'solver' parameter of MLPClassifier must be a str among"),
        ({"device": 1.5}, "'device' parameter of MLPClassifier must be"),
        ({"dtype": "float32"}, "'dtype' parameter of MLPClassifier must be"),
        ({"hidden_layer_sizes": [4, 0]}, r"hidden_layer_sizes must be > 0, got \[4, 0\]"),
        ({"early_stopping": True, "validation_fraction": 0.001}, "The validation set is too small"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(settings, message) -> None:
    x, y = IRIS
    with pytest.raises(ValueError, match=message):
        neural_network.MLPClassifier(**settings).fit(x, y)


def test_bad_input_is_named() -> None:
    x, y = IRIS
    model = neural_network.MLPClassifier(max_iter=2)
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        model.partial_fit(x, y)
    with pytest.raises(AttributeError, match="partial_fit"):
        neural_network.MLPClassifier(solver="lbfgs").partial_fit(x, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping"):
        neural_network.MLPClassifier(early_stopping=True).partial_fit(x, y, classes=[0, 1, 2])
    model.partial_fit(x, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="not the same as on last call"):
        model.partial_fit(x, y, classes=[0, 1])
    with pytest.raises(ValueError, match=r"y must hold classes of the fit before, \[0 1 2\], got \[3\]"):
        model.partial_fit(x, y + 1)
    for X in (x[:, :3], torch.from_numpy(x[:, :3])):
        with pytest.raises(ValueError, match="X has 3 features, but MLPClassifier is expecting 4 features"):
            model.predict(X)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(torch.from_numpy(x), torch.zeros(3))
    with pytest.raises(ValueError, match="y must not be negative for the poisson loss"):
        neural_network.MLPRegressor(loss="poisson").fit(x, y - 1.0)
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        neural_network.MLPRegressor(solver="sgd", learning_rate_init=1e30, activation="identity").fit(x, y)
    with pytest.warns(UserWarning, match="batch_size=200 is larger than the 150 samples"):
        neural_network.MLPClassifier(batch_size=200, max_iter=1).fit(x, y)
    with pytest.warns(ConvergenceWarning, match=r"maximum iterations \(1\) reached"):
        neural_network.MLPClassifier(max_iter=1).fit(x, y)
    with pytest.warns(ConvergenceWarning, match="lbfgs did not converge"):
        neural_network.MLPClassifier(max_iter=1, solver="lbfgs").fit(x, y)
