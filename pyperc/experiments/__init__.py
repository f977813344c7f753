"""The demonstrations of EE-559, lectures 3.1 to 3.6, run again: `python -m pyperc experiment NAME`.

Each is a module with an `EXPERIMENT`: its name, its lecture, its title, and `run`, which returns tables, numbers,
claims that hold or do not, and a figure. To add one, write the module and put its name into `NAMES`.
"""

import importlib

from pyperc.experiments.frame import Claim, Experiment, Result, Setup, Table

__all__ = ["NAMES", "Claim", "Experiment", "Result", "Setup", "Table", "find"]

NAMES = (
    "perceptron",
    "margin",
    "svm",
    "lda",
    "logistic",
    "xor",
    "features",
    "bias-variance",
    "knn-radial",
    "universal",
    "descent",
    "mlp",
    "backprop",
)


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.
        ImportError: scikit-learn, which the linear models stand on, is not installed.

    Example:
        >>> find("descent").lecture
        '3.5'
    """
    if name not in NAMES:
        raise ValueError(f"the experiment must be one of {', '.join(NAMES)}, got {name!r}")
    found: Experiment = importlib.import_module(f"pyperc.experiments.{name.replace('-', '_')}").EXPERIMENT
    return found
