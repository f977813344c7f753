"""Feature maps: transformers that make samples separable by a hyperplane, with scikit-learn's manners.

numpy arrays give numpy arrays, torch tensors torch tensors. EE-559, lecture 3.3.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyperc._sklearn import check_samples, need, tensor_of

need("pyperc.features")

from sklearn.base import BaseEstimator, TransformerMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted, validate_data  # noqa: E402

__all__ = ["PairProducts", "Polynomial", "Radial", "RandomPairProducts"]


class _Map(TransformerMixin, BaseEstimator):
    """Checks and conversions; a map has `_fit(x)` and `_map(x)` on tensors, and `_names(inputs)`."""

    n_features_in_: int

    def fit(self, X: Any, y: Any = None) -> Any:
        """Reads the number of columns of X [n, d], real numbers, and draws what is random.

        Raises ValueError for another shape, NaN or infinity, and for parameters that are no such numbers or columns.
        """
        x = self._read(X, reset=True)
        self._fit(x)
        return self

    def transform(self, X: Any) -> Any:
        """The features of each row of X, [n, features], in X's dtype where that is float32 or float64.

        Another array becomes float64, a tensor of integers torch's default dtype.

        Raises ValueError for another number of columns than that of the fit, NaN or infinity.
        """
        check_is_fitted(self)
        x = self._read(X, reset=False)
        result = self._map(x)
        return result if isinstance(X, Tensor) else result.numpy()

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """A name for each feature."""
        check_is_fitted(self)
        return np.asarray(self._names(list(_check_feature_names_in(self, input_features))), dtype=object)

    def _read(self, X: Any, reset: bool) -> Tensor:
        if isinstance(X, Tensor):
            return check_samples(self, X, reset)
        return tensor_of(validate_data(self, X, dtype=[np.float64, np.float32], order="C", reset=reset))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _fit(self, x: Tensor) -> None:
        raise NotImplementedError

    def _map(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _names(self, inputs: list[str]) -> list[str]:
        raise NotImplementedError


def _check_count(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}")


class PairProducts(_Map):
    """(x, x_i x_j for the given pairs (i, j)). With its default it is the map that makes xor separable.

    A `Perceptron(features=...)` computes the products within its pass, and stores none.

    Args:
        pairs: a sequence of (i, j), columns of the input.

    Attributes:
        pairs_: int64 [products, 2].

    Source: EE-559, lecture 3.3: Phi(u, v) = (u, v, u v).

    >>> PairProducts().fit_transform([[2.0, 3.0]])
    array([[2., 3., 6.]])
    """

    pairs_: Any

    def __init__(self, pairs: Any = ((0, 1),)) -> None:
        self.pairs = pairs

    def _fit(self, x: Tensor) -> None:
        pairs = np.asarray(self.pairs.cpu() if isinstance(self.pairs, Tensor) else self.pairs)
        d = x.shape[1]
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
            raise ValueError(f"PairProducts: pairs must be a sequence of (i, j), got {self.pairs!r}")
        if pairs.min(initial=0) < 0 or pairs.max(initial=0) >= d:
            raise ValueError(
                f"PairProducts: pairs must hold columns of X from 0 to n_features - 1 = {d - 1}, got {pairs.max()}"
            )
        self.pairs_ = pairs.astype(np.int64)

    def _map(self, x: Tensor) -> Tensor:
        d, count = x.shape[1], len(self.pairs_)
        result = x.new_empty(len(x), d + count)
        result[:, :d] = x
        first, second = torch.from_numpy(self.pairs_).to(x.device).unbind(1)
        torch.mul(x[:, first], x[:, second], out=result[:, d:])
        return result

    def _names(self, inputs: list[str]) -> list[str]:
        return inputs + [f"{inputs[i]} {inputs[j]}" for i, j in self.pairs_]


class RandomPairProducts(PairProducts):
    """(x, x_i x_j for n pairs of columns, drawn at random with replacement).

    Args:
        n: the number of products.
        random_state: of the draw.

    Attributes:
        pairs_: int64 [n, 2].

    Source: EE-559, lecture 3.3: pixels supplemented with products of pairs of pixels taken at random.

    >>> RandomPairProducts(3, random_state=0).fit_transform([[1.0, 2.0]]).shape
    (1, 5)
    """

    def __init__(self, n: int = 1000, *, random_state: Any = None) -> None:
        self.n = n
        self.random_state = random_state

    def _fit(self, x: Tensor) -> None:
        _check_count("RandomPairProducts: n", self.n, 0)
        self.pairs_ = check_random_state(self.random_state).randint(x.shape[1], size=(int(self.n), 2)).astype(np.int64)


class Polynomial(_Map):
    """(1, x, x^2, ..., x^degree) of each column: all columns to the power 1, then all to the power 2, and so on.

    Args:
        degree: the highest power, D.
        include_bias: whether the constant 1 stands first.

    Source: EE-559, lecture 3.3.

    >>> Polynomial(3).fit_transform([[2.0]])
    array([[1., 2., 4., 8.]])
    """

    def __init__(self, degree: int = 2, *, include_bias: bool = True) -> None:
        self.degree = degree
        self.include_bias = include_bias

    def _fit(self, x: Tensor) -> None:
        _check_count("Polynomial: degree", self.degree, 0 if self.include_bias else 1)

    def _map(self, x: Tensor) -> Tensor:
        powers = [torch.ones_like(x[:, :1])] if self.include_bias else []
        power = x
        for exponent in range(1, int(self.degree) + 1):
            if exponent > 1:
                power = power * x
            powers.append(power)
        return torch.cat(powers, 1)

    def _names(self, inputs: list[str]) -> list[str]:
        names = ["1"] if self.include_bias else []
        for exponent in range(1, int(self.degree) + 1):
            names += inputs if exponent == 1 else [f"{name}^{exponent}" for name in inputs]
        return names


class Radial(_Map):
    """(x, |x - c|^2 for each centre c): a sphere around a centre becomes a hyperplane.

    Args:
        centers: [k, d]; None is the origin alone.
        include_input: whether x itself stands first.

    Attributes:
        centers_: [k, d].

    Source: EE-559, lecture 3.3, where a radial feature serves k nearest neighbours.

    >>> Radial().fit_transform([[3.0, 4.0]])
    array([[ 3.,  4., 25.]])
    """

    centers_: Any

    def __init__(self, centers: Any = None, *, include_input: bool = True) -> None:
        self.centers = centers
        self.include_input = include_input

    def _fit(self, x: Tensor) -> None:
        d = x.shape[1]
        if self.centers is None:
            self.centers_ = np.zeros((1, d))
            return
        centers = self.centers.detach().cpu() if isinstance(self.centers, Tensor) else self.centers
        self.centers_ = np.array(centers, dtype=np.float64)
        if self.centers_.ndim != 2 or self.centers_.shape[1] != d:
            raise ValueError(
                f"Radial: centers must be [k, {d}], points with X's number of features, got {list(self.centers_.shape)}"
            )

    def _map(self, x: Tensor) -> Tensor:
        centers = torch.from_numpy(self.centers_).to(x.device, x.dtype)
        squares = torch.stack([(x - c).square().sum(1) for c in centers], 1)
        return torch.cat([x, squares], 1) if self.include_input else squares

    def _names(self, inputs: list[str]) -> list[str]:
        radii = [f"radius{k}^2" for k in range(len(self.centers_))]
        return inputs + radii if self.include_input else radii
