"""Plain stochastic gradient descent on the cross-entropy: the loop behind `python -m pyperc train`."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyperc.datasets import Dataset

__all__ = ["Epoch", "Trainer", "error_rate", "train"]


class Epoch(NamedTuple):
    """What one pass over the training data gave."""

    epoch: int
    """from 1"""
    loss: float
    """mean cross-entropy of the batches, each before its own step"""
    train_error: float
    """share of the training samples that are misclassified after the epoch, in [0, 1]"""
    test_error: float
    samples_per_second: float
    """of training alone; the errors are measured outside"""


class Trainer:
    """One network, its data, and the state of its descent.

    Every batch takes one step (EE-559, lectures 3.5 and 3.6)

        w <- w - lr dw      with dw the gradient of the batch's mean cross-entropy

    The samples are shuffled before each epoch by a generator of the trainer's own, so that two trainers with the same
    seed see the same batches in the same order.

    Args:
        model: maps [batch, features] to [batch, classes]; trained in place.
        data: in the model's dtype.
        batch_size: the last batch of an epoch may be smaller.
        lr: the step, finite and positive.
        seed: of the shuffling.

    Raises:
        ValueError: `batch_size` or `lr` is out of its range.
    """

    def __init__(
        self, model: nn.Module, data: Dataset, *, batch_size: int = 64, lr: float = 0.3, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be finite and positive, got {lr}")
        self.model = model
        self.data = data
        self.batch_size = batch_size
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.epochs = 0

    @property
    def batches(self) -> int:
        """The number of batches in an epoch."""
        return -(-len(self.data.y_train) // self.batch_size)

    def epoch(self, after_batch: Callable[[], object] | None = None) -> Epoch:
        """Trains for one pass over the data; `after_batch` is called after each step.

        Raises:
            FloatingPointError: the loss became infinite or NaN.
        """
        x, y = self.data.x_train, self.data.y_train
        losses = []
        self.model.train()
        start = time.perf_counter()
        batches = torch.randperm(len(y), generator=self.generator).split(self.batch_size)  # type: ignore[no-untyped-call]
        for batch in batches:
            loss = F.cross_entropy(self.model(x.index_select(0, batch)), y.index_select(0, batch))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(loss.detach())
            if after_batch is not None:
                after_batch()
        seconds = time.perf_counter() - start
        sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
        mean = float(torch.stack(losses).double() @ sizes / sizes.sum())
        self.epochs += 1
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean} in epoch {self.epochs}; a smaller lr may help")
        return Epoch(
            self.epochs,
            mean,
            error_rate(self.model, x, y),
            error_rate(self.model, self.data.x_test, self.data.y_test),
            len(y) / seconds,
        )


def train(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 0.3,
    seed: int = 0,
    after_epoch: Callable[[Epoch], object] | None = None,
) -> list[Epoch]:
    """Trains a classifier in place for some epochs; see `Trainer` for the step and the arguments.

    Args:
        epochs: at least 1.
        after_epoch: called with each epoch's figures as they come.

    Raises:
        ValueError: `epochs`, `batch_size` or `lr` is out of its range.
        FloatingPointError: the loss became infinite or NaN.

    Example:
        >>> import pyperc
        >>> from pyperc.datasets import digits
        >>> _ = torch.manual_seed(0)
        >>> curve = train(pyperc.MLP([64, 32, 10]), digits().standardised(), epochs=3)
        >>> [point.epoch for point in curve], curve[-1].loss < curve[0].loss
        ([1, 2, 3], True)
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    trainer = Trainer(model, data, batch_size=batch_size, lr=lr, seed=seed)
    curve = []
    for _ in range(epochs):
        curve.append(trainer.epoch())
        if after_epoch is not None:
            after_epoch(curve[-1])
    return curve


@torch.no_grad()
def error_rate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of samples x [n, features] whose largest output is not at their label y [n], in [0, 1].

    Example:
        >>> error_rate(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.25
    """
    model.eval()
    # 1024 rows of a wide hidden layer stay in the last-level cache, and a large data set needs no large intermediate.
    parts = zip(x.split(1024), y.split(1024), strict=True)  # type: ignore[no-untyped-call]
    return sum(int((model(part).argmax(1) != labels).sum()) for part, labels in parts) / len(y)
