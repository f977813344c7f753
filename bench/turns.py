"""What the measurements of whole models share: samples, contenders in turns, scikit-learn in its own process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyperc import datasets

Contenders = dict[str, Callable[[], object]]

# Answers each line on its input with one once it has fitted the estimator that its first argument says.
WORKER = """
import sys, time, warnings
import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Perceptron
from sklearn.neural_network import MLPClassifier
from sklearn.svm import LinearSVC
warnings.simplefilter("ignore")
data = np.load(sys.argv[2])
x, y = data["x"], data["y"]
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    eval(sys.argv[1]).fit(x, y)
    print(time.perf_counter() - start, flush=True)
"""


class Elsewhere:
    """A fit of scikit-learn in a process of its own; called, it runs once."""

    def __init__(self, estimator: str, x: Tensor, y: Tensor) -> None:
        with tempfile.NamedTemporaryFile(suffix=".npz", delete=False) as file:
            np.savez(file, x=x.numpy(), y=y.numpy())
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, estimator, file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.answer()
        Path(file.name).unlink()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("scikit-learn's process has ended")
        return line

    def __call__(self) -> float:
        """The seconds that it took."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return float(self.answer())

    def __del__(self) -> None:
        self.process.kill()
        self.process.wait()


@lru_cache
def samples() -> tuple[Tensor, Tensor, str]:
    """x [60000, 784], the digits y, and what it is: MNIST or a stand-in of which a fifth is not zero."""
    if folder := os.environ.get("PYPERC_MNIST"):
        data = datasets.mnist(folder)
        return data.x_train, data.y_train, "MNIST"
    torch.manual_seed(0)
    y = torch.randint(10, (60000,))
    prototypes = torch.rand(10, 784) * (torch.rand(10, 784) < 0.2)
    x = (prototypes[y] + 0.3 * torch.randn(60000, 784)).clamp_(0, 1) * (prototypes[y] > 0)
    return x, y, "random"


def in_turns(contenders: Contenders, rounds: int, before: Callable[[], object] | None = None) -> dict[str, list[float]]:
    """Seconds of each contender in each round; `before` is called before each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            if before is not None:
                before()
            start = time.perf_counter()
            own = run()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return seconds


def over(seconds: dict[str, list[float]], *others: str) -> float:
    """How many times as long the fastest of the others took: the median over the rounds."""
    rounds = zip(seconds["pyperc"], *(seconds[other] for other in others), strict=True)
    return statistics.median(min(theirs) / ours for ours, *theirs in rounds)
