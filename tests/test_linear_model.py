"""The linear models: against scikit-learn by value, and in its manners; the lecture's tables; bad input."""

from __future__ import annotations

import builtins
import math
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", "1.6")

import sklearn
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_iris, make_blobs
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis as ReferenceLDA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as ReferenceLogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.svm import LinearSVC as ReferenceLinearSVC
from sklearn.utils.estimator_checks import check_estimator

from pyperc import datasets
from pyperc.features import Polynomial, RandomPairProducts
from pyperc.linear_model import (
    LinearDiscriminantAnalysis,
    LinearSVC,
    LogisticRegression,
    Perceptron,
    ThresholdLogicUnit,
    from_truth_table,
    margin_bound,
)


def standardised(load) -> tuple[np.ndarray, np.ndarray]:
    x, y = load(return_X_y=True)
    return StandardScaler().fit_transform(x), y


DATA = {"two classes": standardised(load_breast_cancer), "three classes": standardised(load_iris)}
CHANGED_BY_WEIGHTS = {
    "check_sample_weight_equivalence_on_dense_data": "a weight scales one step; a repeated sample is visited twice"
}
MODELS = [
    Perceptron(),
    LogisticRegression(),
    LinearSVC(),
    LinearSVC(loss="hinge", random_state=0),
    LinearDiscriminantAnalysis(),
]


@pytest.fixture(params=DATA)
def data(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    return DATA[request.param]


# scikit-learn's manners


@pytest.mark.parametrize("model", [*MODELS, LinearDiscriminantAnalysis("eigen", shrinkage=0.1)], ids=str)
def test_scikit_learns_checks(model) -> None:
    visits = isinstance(model, Perceptron) or getattr(model, "loss", "") == "hinge"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(model, expected_failed_checks=CHANGED_BY_WEIGHTS if visits else None)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_tensors_in_tensors_out(model, data) -> None:
    x, y = data[0].astype(np.float32), data[1]
    arrays, tensors = clone(model).fit(x, y), clone(model).fit(torch.tensor(x), torch.tensor(y))
    for name in ("coef_", "intercept_", "classes_"):
        ours = getattr(tensors, name)
        assert isinstance(ours, torch.Tensor)
        np.testing.assert_array_equal(ours.numpy(), getattr(arrays, name))
    assert tensors.coef_.dtype == torch.float32
    for name in ("predict", "decision_function", "predict_proba"):
        if hasattr(model, name):
            ours = getattr(tensors, name)(torch.tensor(x))
            assert isinstance(ours, torch.Tensor)
            np.testing.assert_array_equal(ours.numpy(), getattr(arrays, name)(x))
            assert isinstance(getattr(tensors, name)(x), np.ndarray)
    assert tensors.score(torch.tensor(x), torch.tensor(y)) == arrays.score(x, y)
    assert torch.equal(pickle.loads(pickle.dumps(tensors)).coef_, tensors.coef_)
    half = clone(model).fit(torch.tensor(x, dtype=torch.bfloat16), torch.tensor(y))
    assert half.coef_.dtype == torch.bfloat16


def test_pipelines_and_grids() -> None:
    x, y = DATA["two classes"]
    grid = GridSearchCV(make_pipeline(StandardScaler(), LogisticRegression()), {"logisticregression__C": [0.1, 1.0]})
    assert grid.fit(x, y).best_score_ > 0.95


def test_labels_of_any_kind() -> None:
    x = [[-1.0], [1.0]]
    for labels in (["no", "yes"], [False, True], [-1, 1]):
        assert Perceptron().fit(x, labels).predict(x).tolist() == labels
        if isinstance(labels[0], int):
            assert Perceptron().fit(torch.tensor(x), torch.tensor(labels)).predict(torch.tensor(x)).tolist() == labels


def test_without_scikit_learn_the_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    for name in [n for n in sys.modules if n.startswith(("pyperc.linear_model", "pyperc.features"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pyperc.linear_model needs scikit-learn.*pyperc\[sklearn\]"):
        import pyperc.linear_model
    with pytest.raises(ImportError, match=r"pyperc.features needs scikit-learn.*pyperc\[sklearn\]"):
        import pyperc.features  # noqa: F401


# Perceptron


def lecture(x: torch.Tensor, y: torch.Tensor, epochs: int) -> tuple[torch.Tensor, list[int]]:
    """The lecture's program, the bias being a constant feature."""
    w, changes = torch.zeros(x.size(1), dtype=x.dtype), []
    for _ in range(epochs):
        changes.append(0)
        for i in range(x.size(0)):
            if x[i].dot(w) * y[i] <= 0:
                w = w + y[i] * x[i]
                changes[-1] += 1
        if changes[-1] == 0:
            break
    return w, changes


def test_the_perceptron_is_the_lectures() -> None:
    x = torch.randn(60, 3, dtype=torch.float64)
    y = (x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) >= 0.3).long()
    w, changes = lecture(torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1), 2.0 * y - 1, 1000)
    assert len(changes) > 3
    model = Perceptron().fit(x, y, validation=(x[:20], y[:20]))
    assert [epoch.changes for epoch in model.history_] == changes
    assert model.n_iter_ == len(changes)
    torch.testing.assert_close(torch.cat([model.coef_[0], model.intercept_]), w)
    assert model.history_[-1] == (0, 0.0, 0.0)
    for epochs in range(1, len(changes)):
        with pytest.warns(ConvergenceWarning, match=f"max_iter={epochs} epochs"):
            part = Perceptron(max_iter=epochs).fit(x, y)
        assert part.history_[-1].error == pytest.approx(1 - part.score(x, y))
        assert part.history_[-1].error == model.history_[epochs - 1].error
        assert model.history_[epochs - 1].validation_error == pytest.approx(1 - part.score(x[:20], y[:20]))


def test_unseparable_data_end_with_a_warning() -> None:
    x, y = [[0.0], [0.0], [1.0]], [0, 1, 1]
    with pytest.warns(ConvergenceWarning, match="may not be separable"):
        model = Perceptron().fit(x, y)
    assert model.n_iter_ == 1000


def test_partial_fits_are_epochs() -> None:
    x, y = DATA["three classes"]
    whole, parts = Perceptron(max_iter=4), Perceptron()
    with pytest.warns(ConvergenceWarning):
        whole.fit(x, y)
    for _ in range(4):
        parts.partial_fit(x, y, classes=[0, 1, 2])
    np.testing.assert_array_equal(whole.coef_, parts.coef_)
    assert parts.t_ == whole.t_ == 4 * 150 + 1
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        Perceptron().partial_fit(x, y)
    with pytest.raises(ValueError, match="y must hold labels of classes"):
        parts.partial_fit(x, y + 1)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_products_within_the_pass_are_those_of_a_pipeline() -> None:
    x, y = datasets.digits()[:2]
    features = RandomPairProducts(200, random_state=0)
    inside = Perceptron(features=features, max_iter=5).fit(x.double(), y)
    stored = make_pipeline(features, Perceptron(max_iter=5)).fit(x.double(), y)
    assert inside.coef_.shape == (10, 264)
    torch.testing.assert_close(inside.coef_, stored[-1].coef_)
    assert torch.equal(inside.predict(x.double()), stored.predict(x.double()))
    plain = Perceptron(max_iter=5).fit(x.double(), y)
    assert inside.history_[-1].error < plain.history_[-1].error
    with pytest.raises(ValueError, match="features must be a PairProducts or a RandomPairProducts"):
        Perceptron(features=Polynomial()).fit(x, y)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_options_of_the_perceptron() -> None:
    x, y = DATA["two classes"]
    first, again = (Perceptron(shuffle=True, random_state=1, max_iter=5).fit(x, y).coef_ for _ in range(2))
    np.testing.assert_array_equal(first, again)
    last, average = (Perceptron(average=a, max_iter=20).fit(x[::2], y[::2]) for a in (False, True))
    assert average.score(x[1::2], y[1::2]) >= last.score(x[1::2], y[1::2])
    warm = Perceptron(max_iter=3, warm_start=True)
    warm.fit(x, y).fit(x, y)
    np.testing.assert_array_equal(warm.coef_, Perceptron(max_iter=6).fit(x, y).coef_)
    # A sample of weight zero is not there.
    weight = (np.arange(len(x)) % 2).astype(float)
    np.testing.assert_array_equal(
        Perceptron(max_iter=5).fit(x, y, sample_weight=weight).coef_, Perceptron(max_iter=5).fit(x[1::2], y[1::2]).coef_
    )
    assert Perceptron(fit_intercept=False, max_iter=5).fit(x, y).intercept_ == 0


def mnist() -> datasets.Dataset:
    folder = Path(os.environ.get("PYPERC_MNIST", Path(__file__).parent.parent.parent / "shared" / "data" / "mnist"))
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}; PYPERC_MNIST names another folder")
    return datasets.mnist(folder)


def test_zero_against_one_on_mnist(isa: str) -> None:
    data = mnist()
    train, test = data.y_train < 2, data.y_test < 2
    validation = data.x_test[test], data.y_test[test]
    model = Perceptron().fit(data.x_train[train], data.y_train[train], validation=validation)
    assert [epoch.changes for epoch in model.history_] == [48, 23, 20, 9, 11, 6, 0]
    errors = [round(100 * epoch.error, 2) for epoch in model.history_]
    assert errors == [0.13, 0.08, 0.13, 0.04, 0.02, 0, 0]
    held_out = [round(100 * (epoch.validation_error or 0), 2) for epoch in model.history_]
    assert held_out == [0.19, 0.09, 0.14, 0.05, 0.05, 0.05, 0.05]


# The bound


def test_the_updates_stay_under_the_bound() -> None:
    for seed in range(5):
        x, y = make_blobs(40, centers=2, random_state=seed, cluster_std=1.0)
        try:
            known = margin_bound(x, y)
        except ValueError:
            continue
        updates = sum(epoch.changes for epoch in Perceptron(max_iter=10**6).fit(x, y).history_)
        assert 0 < updates <= known.bound
        rows = np.column_stack([x, np.ones(40)]) * (2 * y - 1)[:, None]
        assert known.radius == pytest.approx(np.linalg.norm(rows, axis=1).max())
        assert (rows @ known.w).min() >= known.margin / 2 * (1 - 1e-9)
        scaled = margin_bound(10 * rows, y, fit_intercept=False)
        plain = margin_bound(rows, y, fit_intercept=False)
        assert scaled.margin == pytest.approx(10 * plain.margin, rel=1e-5)
        assert scaled.bound == pytest.approx(plain.bound, abs=1)


def test_the_margin_is_the_support_vector_machines() -> None:
    x, y = make_blobs(50, centers=[[-3, 0, 1], [3, 1, 0]], random_state=0)
    reference = SVC(kernel="linear", C=1e9, tol=1e-9).fit(x, y)
    centre = -reference.intercept_[0] / np.square(reference.coef_).sum() * reference.coef_
    known = margin_bound(x - centre, y, fit_intercept=False)
    assert known.margin >= 2 / np.linalg.norm(reference.coef_) * (1 - 1e-4)
    assert isinstance(margin_bound(torch.tensor(x), torch.tensor(y)).w, torch.Tensor)


def test_no_margin_without_a_hyperplane() -> None:
    with pytest.raises(ValueError, match="separable by a hyperplane"):
        margin_bound([[0.0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0])
    with pytest.raises(ValueError, match="y must hold two classes"):
        margin_bound([[0.0], [1.0], [2.0]], [0, 1, 2])


# Logistic regression


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_logistic_regression_is_scikit_learns(data, c: float) -> None:
    x, y = data
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y))
    for keywords in ({}, {"class_weight": "balanced"}, {"fit_intercept": False}):
        ours = LogisticRegression(C=c, tol=1e-8, max_iter=1000, **keywords).fit(x, y, sample_weight=weight)
        theirs = ReferenceLogisticRegression(C=c, tol=1e-8, max_iter=10000, **keywords).fit(x, y, sample_weight=weight)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-4)
        np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-5)
        np.testing.assert_allclose(ours.predict_log_proba(x), theirs.predict_log_proba(x), atol=1e-3)
        assert ours.score(x, y) == theirs.score(x, y)


def test_logistic_regression_in_float32_and_warm() -> None:
    x, y = DATA["two classes"]
    wide = LogisticRegression(tol=1e-5, max_iter=500).fit(x, y)
    narrow = LogisticRegression(tol=1e-5, max_iter=500, warm_start=True).fit(x.astype(np.float32), y)
    np.testing.assert_allclose(narrow.coef_, wide.coef_, atol=2e-3)
    assert narrow.coef_.dtype == np.float32
    assert narrow.fit(x.astype(np.float32), y).n_iter_[0] < 5
    with pytest.warns(ConvergenceWarning, match="max_iter=2"):
        LogisticRegression(max_iter=2, tol=1e-9).fit(x, y)


def test_gradient_descent_is_the_lectures() -> None:
    x, y = DATA["two classes"]
    model = LogisticRegression(solver="gd", eta=1e-3, steps=20).fit(torch.tensor(x), torch.tensor(y))
    samples, signs = torch.tensor(x), torch.tensor(2.0 * y - 1, dtype=torch.float64)
    w, b, losses = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64), []
    for _ in range(20):
        losses.append(-torch.nn.functional.logsigmoid(signs * (samples.mv(w) + b)).sum().item())
        u = signs * (-signs * (samples.mv(w) + b)).sigmoid()
        w += 1e-3 * (samples * u[:, None]).sum(0)
        b += 1e-3 * u.sum()
    torch.testing.assert_close(model.coef_[0], w)
    torch.testing.assert_close(model.intercept_[0], b)
    np.testing.assert_allclose(model.loss_history_[:20], losses)
    assert model.loss_history_[-1] < losses[-1]
    assert (
        LogisticRegression(solver="gd", eta=1e-3, steps=300).fit(*DATA["three classes"]).score(*DATA["three classes"])
        > 0.9
    )


# Support vector machines


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_squared_hinge_is_scikit_learns(data, c: float) -> None:
    x, y = data
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y))
    for keywords in ({}, {"class_weight": {0: 3.0, 1: 0.5}}, {"fit_intercept": False}, {"intercept_scaling": 10.0}):
        ours = LinearSVC(C=c, tol=1e-8, max_iter=5000, **keywords).fit(x, y, sample_weight=weight)
        theirs = ReferenceLinearSVC(C=c, tol=1e-10, max_iter=100000, dual=False, **keywords)
        theirs.fit(x, y, sample_weight=weight)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-3)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-3)


@pytest.mark.parametrize("widest", [0, 1536], ids=["plain", "preconditioned"])
def test_both_solvers_of_the_squared_hinge_agree(data, widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y))
    model = LinearSVC(C=0.1, tol=1e-8, max_iter=5000, class_weight={0: 3.0, 1: 0.5})
    newton = clone(model).fit(x, y, sample_weight=weight)
    monkeypatch.setattr("pyperc.linear_model._svm.MOST_FOR_NEWTON", 0)
    monkeypatch.setattr("pyperc.linear_model._solver.WIDEST", widest)
    lbfgs = clone(model).fit(x, y, sample_weight=weight)
    assert lbfgs.n_iter_ > newton.n_iter_
    np.testing.assert_allclose(lbfgs.coef_, newton.coef_, atol=1e-5)
    np.testing.assert_allclose(lbfgs.intercept_, newton.intercept_, atol=1e-5)


def test_weighted_hinges_are_scikit_learns() -> None:
    x, y = DATA["two classes"]
    weight = np.random.default_rng(0).uniform(0, 2, len(y))
    keywords = {"loss": "hinge", "C": 0.05, "tol": 1e-8, "class_weight": "balanced"}
    ours = LinearSVC(max_iter=10**5, **keywords).fit(x, y, sample_weight=weight)
    theirs = ReferenceLinearSVC(max_iter=10**6, **keywords).fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-4)


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_hinge_is_scikit_learns(data, c: float) -> None:
    x, y = data
    ours = LinearSVC(loss="hinge", C=c, tol=1e-6, max_iter=20000).fit(x, y)
    theirs = ReferenceLinearSVC(loss="hinge", C=c, tol=1e-6, max_iter=100000).fit(x, y)

    def objective(model) -> float:
        signs = np.where(y[:, None] == (model.classes_ if len(model.classes_) > 2 else model.classes_[1:]), 1, -1)
        scores = x @ model.coef_.T + model.intercept_
        penalty = np.square(model.coef_).sum() + np.square(model.intercept_).sum()
        return penalty / 2 + c * np.maximum(0, 1 - signs * scores).sum()

    assert objective(ours) == pytest.approx(objective(theirs), rel=1e-5)


def test_a_free_bias_is_the_lectures_machine() -> None:
    x, y = DATA["two classes"]
    ours = LinearSVC(loss="hinge", tol=1e-7, max_iter=10**6, intercept_scaling=math.inf).fit(x, y)
    theirs = SVC(kernel="linear", C=1.0, tol=1e-8).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-4)
    assert set(ours.support_) == set(theirs.support_)


# Linear discriminant analysis

LDA_OPTIONS = [
    {"solver": "lsqr"},
    {"solver": "eigen"},
    {"solver": "lsqr", "shrinkage": "auto"},
    {"solver": "lsqr", "shrinkage": 0.3},
    {"solver": "eigen", "shrinkage": "auto"},
    {"solver": "eigen", "shrinkage": 0.2},
    {"solver": "lsqr", "uneven": True},
    {"solver": "svd", "uneven": True},
    {"solver": "svd", "store_covariance": True},
]


@pytest.mark.parametrize("options", LDA_OPTIONS, ids=str)
def test_discriminant_analysis_is_scikit_learns(data, options: dict[str, object]) -> None:
    if options["solver"] == "svd" and tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9):
        pytest.skip("its covariance was divided by n - classes")
    x, y = data
    keywords = {key: value for key, value in options.items() if key != "uneven"}
    if "uneven" in options:
        count = len(set(y))
        keywords["priors"] = [0.6] + [0.4 / (count - 1)] * (count - 1)
    ours, theirs = LinearDiscriminantAnalysis(**keywords).fit(x, y), ReferenceLDA(**keywords).fit(x, y)
    for name in ("coef_", "intercept_", "means_", "priors_", "covariance_", "explained_variance_ratio_"):
        if hasattr(theirs, name):
            expected = getattr(theirs, name)
            np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-6, atol=1e-8 * abs(expected).max())
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-8)
    np.testing.assert_allclose(ours.predict_log_proba(x), theirs.predict_log_proba(x), atol=1e-5)
    if options["solver"] != "lsqr":
        np.testing.assert_allclose(abs(ours.transform(x)), abs(theirs.transform(x)), atol=1e-7)


def test_a_singular_covariance_has_a_solution() -> None:
    x, y = DATA["two classes"]
    singular = np.column_stack([x, x[:, :3] @ [1.0, 2.0, -1.0], np.full(len(x), 7.0), x[:, 0]])
    expected = LinearDiscriminantAnalysis().fit(x, y).predict_proba(x)
    for solver in ("svd", "lsqr", "eigen"):
        model = LinearDiscriminantAnalysis(solver).fit(singular, y)
        np.testing.assert_allclose(model.predict_proba(singular), expected, atol=1e-6)


def test_discriminant_analysis_refuses_what_it_cannot_do() -> None:
    x, y = DATA["three classes"]
    with pytest.raises(NotImplementedError, match="shrinkage not supported with 'svd'"):
        LinearDiscriminantAnalysis(shrinkage=0.5).fit(x, y)
    with pytest.raises(ValueError, match=r"shrinkage must be None, 'auto' or a number in \[0, 1\], got 2"):
        LinearDiscriminantAnalysis("lsqr", shrinkage=2).fit(x, y)
    with pytest.raises(ValueError, match=r"n_components cannot be larger than .* = 2, got 3"):
        LinearDiscriminantAnalysis(n_components=3).fit(x, y)
    with pytest.raises(ValueError, match="priors must be 3 numbers of at least 0"):
        LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(x, y)
    assert LinearDiscriminantAnalysis(n_components=1).fit(x, y).transform(x).shape == (150, 1)


# Threshold logic units


def test_units_of_the_lecture() -> None:
    table = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert ThresholdLogicUnit([1, 1], -0.5)(table).tolist() == ThresholdLogicUnit.or_()(table).tolist() == [0, 1, 1, 1]
    assert ThresholdLogicUnit([1, 1], -1.5)(table).tolist() == ThresholdLogicUnit.and_()(table).tolist() == [0, 0, 0, 1]
    assert (
        ThresholdLogicUnit([-1], 0.5)([[0], [1]]).tolist() == ThresholdLogicUnit.not_()([[0], [1]]).tolist() == [1, 0]
    )
    assert ThresholdLogicUnit([1.0], 0.0)(torch.zeros(2, 1)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"x must be \[\*, 2\], got \[4, 3\]"):
        ThresholdLogicUnit.or_()(np.zeros((4, 3)))


def test_any_truth_table_is_a_network() -> None:
    for n in (1, 2, 3):
        inputs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n).reshape(2**n, n)
        tables = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2**n)
        for table in tables:
            assert torch.equal(from_truth_table(table)(inputs)[:, 0], table)
        assert torch.equal(from_truth_table(tables.t())(inputs), tables.t())
    for table in ([0, 1, 1], [0, 2], [1], []):
        with pytest.raises(ValueError, match="from_truth_table: table must"):
            from_truth_table(table)


# Bad input


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_bad_samples_are_refused(model, kind: str) -> None:
    given = torch.tensor if kind == "tensor" else np.array
    x, y = [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]], [0, 1, 1]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            clone(model).fit(given([[bad, 1.0], *x[1:]]), given(y))
    with pytest.raises(ValueError, match=r"only one class: 1|1 class"):
        clone(model).fit(given(x), given([1, 1, 1]))
    with pytest.raises(ValueError, match=r"one label for each row|inconsistent numbers"):
        clone(model).fit(given(x), given([0, 1]))
    with pytest.raises(ValueError, match="Unknown label type"):
        clone(model).fit(given(x), given([0.5, 1.25, 2.0]))
    fitted = clone(model).fit(given(x), given(y))
    with pytest.raises(ValueError, match=r"X has 3 features, but \w+ is expecting 2"):
        fitted.predict(given([[1.0, 2.0, 3.0]]))
    if not isinstance(model, LinearDiscriminantAnalysis):
        with pytest.raises(ValueError, match=r"sample_weight|inconsistent|Sample weights"):
            clone(model).fit(given(x), given(y), sample_weight=given([1.0, 1.0]))
        with pytest.raises(ValueError, match="sample_weight must not be negative"):
            clone(model).fit(given(x), given(y), sample_weight=given([1.0, -1.0, 1.0]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Perceptron(max_iter=0), "max_iter must be a whole number above 0, got 0"),
        (Perceptron(eta0=-1), "eta0 must be a number above 0, got -1"),
        (LogisticRegression(C=0), "C must be a number above 0, got 0"),
        (LogisticRegression(solver="newton"), "solver must be one of lbfgs, gd, got 'newton'"),
        (LinearSVC(loss="log"), "loss must be one of squared_hinge, hinge, got 'log'"),
        (LinearDiscriminantAnalysis("qr"), "solver must be one of svd, lsqr, eigen, got 'qr'"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.fit([[0.0], [1.0], [2.0]], [0, 1, 1])
