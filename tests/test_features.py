"""The feature maps, by value and in scikit-learn's manners."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", "1.6")

from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from pyperc.features import PairProducts, Polynomial, Radial, RandomPairProducts
from pyperc.linear_model import Perceptron

X = np.array([[2.0, 3.0, -1.0], [0.5, -4.0, 0.0]])
MAPS = [
    (PairProducts([(0, 1), (2, 2)]), [[2, 3, -1, 6, 1], [0.5, -4, 0, -2, 0]], ["x0", "x1", "x2", "x0 x1", "x2 x2"]),
    (
        Polynomial(2),
        [[1, 2, 3, -1, 4, 9, 1], [1, 0.5, -4, 0, 0.25, 16, 0]],
        ["1", "x0", "x1", "x2", "x0^2", "x1^2", "x2^2"],
    ),
    (Polynomial(1, include_bias=False), X.tolist(), ["x0", "x1", "x2"]),
    (Radial(), [[2, 3, -1, 14], [0.5, -4, 0, 16.25]], ["x0", "x1", "x2", "radius0^2"]),
    (
        Radial([[2, 3, -1], [0, 0, 0]], include_input=False),
        [[0, 14], [2.25 + 49 + 1, 16.25]],
        ["radius0^2", "radius1^2"],
    ),
]


@pytest.mark.parametrize(("mapping", "expected", "names"), MAPS, ids=lambda case: type(case).__name__)
def test_values_kinds_and_names(mapping, expected, names) -> None:
    for dtype in (np.float32, np.float64):
        features = mapping.fit_transform(X.astype(dtype))
        np.testing.assert_allclose(features, expected)
        assert features.dtype == dtype
    tensor = torch.tensor(X, dtype=torch.float32)
    assert torch.equal(mapping.fit(tensor).transform(tensor), torch.tensor(expected, dtype=torch.float32))
    assert mapping.get_feature_names_out().tolist() == names


@pytest.mark.parametrize(
    "mapping", [RandomPairProducts(5, random_state=0), PairProducts([(0, 0)]), Polynomial(3), Radial()], ids=str
)
def test_scikit_learns_checks(mapping) -> None:
    check_estimator(mapping)


def test_random_pairs_depend_on_the_seed_alone() -> None:
    first, again, other = (RandomPairProducts(50, random_state=seed).fit(X).pairs_ for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (50, 2)
    assert first.min() >= 0
    assert first.max() < 3


def test_xor_is_separable_in_its_products() -> None:
    x, y = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [0, 1, 1, 0]
    for model in (make_pipeline(PairProducts(), Perceptron()), Perceptron(features=PairProducts())):
        assert model.fit(x, y).predict(x).tolist() == y


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (PairProducts([(0, 3)]), r"columns of X from 0 to n_features - 1 = 2, got 3"),
        (PairProducts([0, 1]), r"pairs must be a sequence of \(i, j\)"),
        (RandomPairProducts(-1), r"n must be a whole number of at least 0, got -1"),
        (Polynomial(2.5), r"degree must be a whole number of at least 0, got 2.5"),
        (Radial([[0.0, 0.0]]), r"centers must be \[k, 3\]"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(mapping, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapping.fit(X)


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Radial().fit(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="X has 2 features, but Radial is expecting 3"):
        Radial().fit(torch.tensor(X)).transform(torch.ones(1, 2))
