"""scikit-learn, an extra: the way to say that it is missing, and arrays between numpy and torch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def need(what: str) -> None:
    """Raises ImportError, with the name of the extra, where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{what} needs scikit-learn: pip install scikit-learn, or the extra pyperc[sklearn]"
        ) from error


def tensor_of(array: Any) -> Tensor:
    """A tensor on the array's own memory; nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(np.ascontiguousarray(array))


def check_tensor(X: Tensor, estimator: str) -> Tensor:
    """X [samples, features], floating and finite, as scikit-learn would have it: ValueError or TypeError where not."""
    if X.layout != torch.strided or X.is_quantized or X.is_complex():
        raise TypeError(f"{estimator}: X must be a dense real tensor, got {X.dtype} of layout {X.layout}")
    if X.ndim != 2:
        raise ValueError(
            f"{estimator}: X must be a 2D tensor [samples, features], got {X.ndim}D of shape {list(X.shape)}. "
            "Reshape your data"
        )
    for axis, what in ((0, "sample"), (1, "feature")):
        if X.shape[axis] == 0:
            raise ValueError(
                f"{estimator}: X must hold at least one {what}: found array with 0 {what}(s) (shape={tuple(X.shape)}) "
                "while a minimum of 1 is required."
            )
    if not X.is_floating_point():
        X = X.to(torch.get_default_dtype())
    X = X.detach()
    # A sum is one pass without a mask in memory; it overflows only where the elements decide.
    if not bool(torch.isfinite(X.sum())) and not bool(torch.isfinite(X).all()):
        raise ValueError(f"{estimator}: Input X contains NaN or infinity.")
    return X


def check_samples(estimator: Any, X: Tensor, reset: bool) -> Tensor:
    """X as `check_tensor` has it, with as many features as the estimator was fitted to, or with `reset` is."""
    name = type(estimator).__name__
    x = check_tensor(X, name)
    if reset:
        estimator.n_features_in_ = x.shape[1]
    elif x.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {x.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input"
        )
    return x


def like(result: Tensor, X: Any) -> Any:
    """A result for the caller who gave X: a tensor where X is one, else a numpy array."""
    if isinstance(X, Tensor):
        return result.to(X.device)
    return result.numpy()
