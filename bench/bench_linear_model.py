"""The linear models: an epoch of the perceptron, the gradient of logistic regression, whole fits, products of features.

    PYPERC_MNIST=DIR python bench/bench_linear_model.py [--only epoch gradient ...] [--threads N] [--rounds N]

The lecture's programs in torch take turns with ours in this process; scikit-learn, which brings an OpenMP and a BLAS of
its own, takes its turns in another. Random data of MNIST's shape and sparsity, or MNIST itself where PYPERC_MNIST names
its folder; whole fits are measured on MNIST only, as how long they take is a matter of the data.

Contenders take turns, A B C A B C, and a ratio is the median over the rounds of the ratios within each. The gradient
reads each row once: 4 rows columns bytes for 4 rows columns flops, so memory is the floor; `read` sums the same
samples, by torch on the same threads. An epoch reads the samples once too, one thread, in order.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from turns import Contenders, Elsewhere, in_turns, over, samples

from pyperc import _C

FITS = {
    "LogisticRegression": "LogisticRegression(max_iter=1000)",
    "LinearSVC": "LinearSVC(dual=False)",
    "LinearDiscriminantAnalysis": "LinearDiscriminantAnalysis()",
}


def lecture_epoch(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The inner loop of lecture 3.1."""
    for i in range(x.size(0)):
        if x[i].dot(w) * y[i] <= 0:
            w = w + y[i] * x[i]
    return w


def epoch_contenders() -> Contenders:
    digits, labels, _ = samples()
    chosen = labels < 2
    x, target = digits[chosen].contiguous(), labels[chosen].contiguous()
    w, b, scores = torch.zeros(1, 784), torch.zeros(1), torch.empty(len(x), 1)
    with_bias, signs = torch.cat([x, torch.ones(len(x), 1)], 1), 2.0 * target - 1
    # The second epoch, in which few weights change, for all.
    start = lecture_epoch(with_bias, signs, torch.zeros(785))

    def ours() -> None:
        w[0], b[0] = start[:-1], start[-1]
        _C.perceptron_epoch(x, target, w, b, [1], 1.0, None, None, None, None, scores, None, 0)

    return {
        "pyperc": ours,
        "torch": lambda: lecture_epoch(with_bias, signs, start),
        "sklearn": Elsewhere("Perceptron(shuffle=False, max_iter=1, tol=None)", x, target),
    }


def gradient_contenders() -> Contenders:
    x, labels, _ = samples()
    y = torch.where(labels == 8, 1.0, -1.0)
    w, b = 0.05 * torch.randn(1, 784), torch.zeros(1)

    def lecture() -> tuple[Tensor, Tensor]:
        u = y * (-y * (x.mv(w[0]) + b)).sigmoid_()
        v = x * u.view(-1, 1)
        return -v.sum(0), -u.sum()

    return {
        "pyperc": lambda: _C.linear_objective(x, w, b, y, None, None, "logistic", []),
        "torch": lecture,
        "read": lambda: x.sum(),
    }


def fit_contenders(name: str) -> Contenders:
    from pyperc import linear_model

    x, y, _ = samples()
    model = getattr(linear_model, name)()

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y)

    return {"pyperc": ours, "sklearn": Elsewhere(FITS[name], x, y)}


def products() -> tuple[float, float]:
    """Seconds of five epochs on 784 + 4000 features, 8 against the rest, and the process's largest memory in MB."""
    from pyperc.features import RandomPairProducts
    from pyperc.linear_model import Perceptron

    x, y, _ = samples()
    model = Perceptron(features=RandomPairProducts(4000, random_state=0), max_iter=5)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, (y == 8).long())
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


CASES: dict[str, tuple[str, Callable[[], Contenders], int]] = {
    "epoch": ("perceptron, 0 against 1, epoch", epoch_contenders, 1),
    "gradient": ("logistic regression, gradient", gradient_contenders, 1),
    **{name: (f"{name}, fit", lambda name=name: fit_contenders(name), 15) for name in FITS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*CASES, "products"], default=[*CASES, "products"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender; of whole fits a fifteenth")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kind = samples()[2]
    if "products" in arguments.only:
        # First, before others' memory is in the process.
        seconds, memory = products()
        print(f"products: {seconds:.2f} s for 5 epochs on 60000 x (784 + 4000), the process {memory:.0f} MB at most\n")
    print(f"{kind}, {arguments.threads} threads, {_C.isa()}, torch {torch.__version__}\n")
    print("| linear model | pyperc | over torch | over scikit-learn | of memory's speed |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for case in arguments.only:
        if case == "products" or (case in FITS and kind != "MNIST"):
            continue
        title, contenders, slowness = CASES[case]
        seconds_of = in_turns(contenders(), max(1, arguments.rounds // slowness))

        def cell(other: str, form: str, seconds_of: dict[str, list[float]] = seconds_of) -> str:
            return format(over(seconds_of, other), form) if other in seconds_of else ""

        cells = [cell("torch", ".1f"), cell("sklearn", ".1f"), cell("read", ".0%")]
        print(
            f"| {title} | {statistics.median(seconds_of['pyperc']) * 1e3:.2f} ms |", " | ".join(cells), "|", flush=True
        )


if __name__ == "__main__":
    main()
