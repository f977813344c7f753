"""The training behind `python -m pyperc train`: a network on a data set, by pyperc's step or by torch's own loop."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyperc.batches import Reading, Rows
from pyperc.datasets import Dataset
from pyperc.step import TrainStep
from pyperc.step.objective import Objective

__all__ = ["Epoch", "TorchStep", "Trainer", "error_rate", "targets", "train"]

SECONDS = 0.1
"""Between two moments at which a caller is told how many batches are done."""


class Epoch(NamedTuple):
    """What one pass over the training data gave."""

    epoch: int
    """from 1"""
    loss: float
    """mean of the batches' losses, each before its own step"""
    train_error: float
    """share of the training samples that are misclassified after the epoch, in [0, 1]"""
    test_error: float
    """share of the test samples that are misclassified after the epoch, in [0, 1]"""
    samples_per_second: float
    """of training alone; the errors are measured outside"""


class TorchStep:
    """The step as one writes it in torch, by one of the forms of its optimizer: what a `TrainStep` is compared with.

    >>> step = TorchStep(nn.Linear(2, 3), "cross_entropy", "adam", form="fused", lr=0.01)
    >>> step(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)).shape
    torch.Size([])
    """

    FORMS = ("plain", "foreach", "fused")

    def __init__(self, model: nn.Module, loss: str, optimizer: str, *, form: str = "plain", **options: Any) -> None:
        kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.model, self.loss = model, Objective(loss)
        self.optimizer = kinds[optimizer](
            model.parameters(), foreach=form == "foreach", fused=form == "fused", **options
        )
        self.batches = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y) if self.loss.name == "cross_entropy" else self.loss(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def epoch(
        self,
        x: Tensor,
        y: Tensor,
        order: Tensor,
        batch_size: int,
        losses: Tensor,
        begin: int = 0,
        seconds: float = math.inf,
    ) -> int:
        """Steps over the batches begin, begin + 1, ... until the time is over, as `TrainStep.epoch` takes them."""
        end = time.perf_counter() + seconds
        found = []
        for batch in order[begin * batch_size :].split(batch_size):  # type: ignore[no-untyped-call]
            found.append(self(x.index_select(0, batch), y.index_select(0, batch)))
            if time.perf_counter() >= end:
                break
        self.batches = begin + len(found)
        losses[begin : self.batches] = torch.stack(found)
        return self.batches


class Trainer:
    """One network, its data, and the state of its descent.

    The samples are shuffled before each epoch by a generator of the trainer's own, so that two trainers with the same
    seed see the same batches in the same order.

    Args:
        step: takes the step of a batch; its model, which maps [batch, features] to [batch, classes], is trained.
        data: in the model's dtype.
        batch_size: the last batch of an epoch may be smaller.
        seed: of the shuffling.
    """

    def __init__(self, step: TrainStep | TorchStep, data: Dataset, *, batch_size: int = 64, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.step, self.model, self.data = step, step.model, data
        reading = Reading(self.model, step.loss.name)
        y = targets(data.y_train, data.classes, step.loss.name, data.x_train.dtype)
        generator = torch.Generator().manual_seed(seed)
        self._rows = Rows(reading, data.x_train, y, batch_size, True, generator)
        self.epochs = 0

    @property
    def batches(self) -> int:
        """The number of batches in an epoch."""
        return self._rows.total

    def epoch(self, after_batches: Callable[[int], object] | None = None) -> Epoch:
        """Trains for one pass over the data; `after_batches` is told now and then how many more are done.

        Raises:
            FloatingPointError: the loss became infinite or NaN.
        """
        self.model.train()
        start = time.perf_counter()
        self._rows.begin()
        more = True
        while more:
            before = self._rows.position
            more = self._rows.run(self.step, SECONDS)
            if after_batches is not None:
                after_batches(self._rows.position - before)
        seconds = time.perf_counter() - start
        mean = self._rows.mean_loss()
        self.epochs += 1
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss became {mean} in epoch {self.epochs}; a smaller lr may help")
        data = self.data
        errors = (error_rate(self.model, data.x_train, data.y_train), error_rate(self.model, data.x_test, data.y_test))
        return Epoch(self.epochs, mean, *errors, len(data.y_train) / seconds)


def targets(y: Tensor, classes: int, loss: str, dtype: torch.dtype) -> Tensor:
    """What a loss compares the scores [n, classes] with: the classes y [n] themselves, or each with its own score.

    >>> targets(torch.tensor([1]), 3, "hinge", torch.float32)
    tensor([[-1.,  1., -1.]])
    """
    if loss == "cross_entropy":
        return y
    hot = F.one_hot(y, classes).to(dtype)
    return hot if loss == "mse" else 2 * hot - 1


def train(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 0.3,
    seed: int = 0,
    loss: str = "cross_entropy",
    optimizer: str = "sgd",
    after_epoch: Callable[[Epoch], object] | None = None,
) -> list[Epoch]:
    """Trains a classifier in place for some epochs; for each batch (EE-559, lectures 3.5 and 3.6)

        w <- w - lr dw      with dw the gradient of the batch's mean loss

    or what else the optimizer makes of dw.

    Args:
        epochs: at least 1.
        batch_size, seed: as `Trainer` has them.
        loss, optimizer: by the names of `pyperc.TrainStep`; a loss of single scores sets each class against the rest.
        lr: the learning rate, finite and positive; 0.3 by default, which suits "sgd". "adam" wants some 1e-3.
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
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be finite and positive, got {lr}")
    trainer = Trainer(TrainStep(model, loss, optimizer, lr), data, batch_size=batch_size, seed=seed)
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
