"""The demonstrations of EE-559, lectures 3.1 to 3.6, run again: `python -m pyperc experiment NAME`.

Each is a module with a `run`, which returns tables, numbers, claims that hold or do not, and a figure. To add one,
write the module and put what it shows into `EXPERIMENTS`, which is there before any of the modules is imported.
"""

from pyperc.experiments.frame import Claim, Experiment, Result, Setup, Table

__all__ = ["EXPERIMENTS", "NAMES", "Claim", "Experiment", "Result", "Setup", "Table", "find"]

EXPERIMENTS = (
    Experiment("perceptron", "3.1", "The perceptron algorithm on 0 against 1, epoch by epoch", uses_data=True),
    Experiment("margin", "3.1", "The perceptron's changes stay under 4 R^2 / gamma^2", uses_data=True),
    Experiment("svm", "3.1", "The support vector machine: the widest margin, from a few support vectors"),
    Experiment("lda", "3.2", "Linear discriminant analysis: boundary, sigmoid, posterior"),
    Experiment("logistic", "3.2, 3.5", "Logistic regression by gradient descent, beside LDA"),
    Experiment("xor", "3.1, 3.3", "xor: not separable in (u, v), separable in (u, v, u v)"),
    Experiment("features", "3.3", "Products of pixels let a perceptron tell 8 from the rest", uses_data=True),
    Experiment("bias-variance", "3.3", "Bias and variance of polynomial regression as its degree grows"),
    Experiment("knn-radial", "3.3", "A radial feature makes the same nearest neighbours better"),
    Experiment("universal", "3.4", "Sums of shifted activations approximate a continuous function"),
    Experiment("descent", "3.5", "Gradient descent ends in a local minimum: start and eta decide which"),
    Experiment("mlp", "3.4, 3.6", "A multi-layer perceptron trained with the plain gradient step", uses_data=True),
    Experiment("backprop", "3.6", "Every derivative beside autograd's, and backward costs twice forward"),
)
NAMES = tuple(one.name for one in EXPERIMENTS)


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.

    Example:
        >>> find("descent").lecture
        '3.5'
    """
    if name not in NAMES:
        raise ValueError(f"the experiment must be one of {', '.join(NAMES)}, got {name!r}")
    return EXPERIMENTS[NAMES.index(name)]
