"""Multi-layer perceptrons for PyTorch that cost what their arithmetic costs.

>>> import torch, pyperc
>>> model = pyperc.MLP([784, 256, 10], activation="relu")
>>> model(torch.randn(32, 784)).shape
torch.Size([32, 10])

`fuse` does the same for a network that exists already; `explain` says what runs where.
"""

import importlib.util
from typing import Any

import torch

__version__ = "0.1.0"


def _check_torch() -> None:
    """Refuse a torch that the native module does not fit, before loading it ends in a missing symbol."""
    try:
        from pyperc._build import TORCH as BUILT
    except ModuleNotFoundError:
        raise ImportError(
            "pyperc: the native module is not built; run `pip install --no-build-isolation .` in the source folder"
        ) from None
    if BUILT.split("+")[0].split(".")[:2] != torch.__version__.split("+")[0].split(".")[:2]:
        raise ImportError(
            f"pyperc: built against torch {BUILT}, but torch {torch.__version__} is running; install the former, or "
            "build pyperc again: `pip install --no-build-isolation --force-reinstall --no-deps .`"
        )


_check_torch()

from pyperc import functional, nn  # noqa: E402
from pyperc.activation import activations  # noqa: E402
from pyperc.explain import explain  # noqa: E402
from pyperc.fit import fit  # noqa: E402
from pyperc.fuse import fuse, unfuse  # noqa: E402
from pyperc.info import info  # noqa: E402
from pyperc.nn import MLP, Linear  # noqa: E402
from pyperc.operators import decompositions  # noqa: E402
from pyperc.step import TrainStep  # noqa: E402

# What is imported when it is first asked for, and from where.
_NEED_SCIKIT_LEARN = {
    "features": "features",
    "linear_model": "linear_model",
    "neural_network": "neural_network",
    "MLPClassifier": "neural_network",
    "MLPRegressor": "neural_network",
}
_LATER = {"datasets": "datasets", "sharding": "sharding", "train": "train", **_NEED_SCIKIT_LEARN}


def __getattr__(name: str) -> Any:
    """`pyperc.train`, `pyperc.linear_model`, `pyperc.MLPClassifier`, ..."""
    if name not in _LATER:
        raise AttributeError(f"module 'pyperc' has no attribute {name!r}")
    module = importlib.import_module(f"pyperc.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    """Without what cannot be had: `help` asks for each of the names."""
    missing = _NEED_SCIKIT_LEARN if importlib.util.find_spec("sklearn") is None else ()
    return [*globals(), *(name for name in _LATER if name not in missing)]


__all__ = [
    "MLP",
    "Linear",
    "TrainStep",
    "activations",
    "decompositions",
    "explain",
    "fit",
    "functional",
    "fuse",
    "info",
    "nn",
    "unfuse",
]
