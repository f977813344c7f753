"""What every estimator does with its arguments: arrays of numpy or tensors of torch, checked as scikit-learn checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyperc._sklearn import check_samples, tensor_of

NATIVE = (torch.float32, torch.float64)


class TensorEstimator(BaseEstimator):
    """An estimator that takes numpy arrays, or tensors in their place."""

    n_features_in_: int

    def _tensor(self, X: Tensor, reset: bool) -> Tensor:
        """X checked, where it is, in a dtype that the passes have."""
        x = check_samples(self, X, reset)
        if x.dtype not in NATIVE:
            x = x.float()
        return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

    def _input(self, X: Any) -> Tensor:
        """The samples of a prediction."""
        check_is_fitted(self)
        if isinstance(X, Tensor):
            return self._tensor(X, reset=False)
        return tensor_of(validate_data(self, X, dtype=[np.float64, np.float32], order="C", reset=False))


def numpy_of(array: Any) -> Any:
    """A tensor as an array; all else as it is."""
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else array
