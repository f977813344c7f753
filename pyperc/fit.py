"""Training over epochs: validation, history, early stopping, Ctrl-C, checkpoints."""

from __future__ import annotations

import copy
import inspect
import numbers
import os
import pickle
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from pyperc._progress import Report
from pyperc.batches import Loader, Reading, Rows, Source
from pyperc.interrupt import Interrupts
from pyperc.step import TrainStep
from pyperc.step.objective import SIGNED, Loss, Objective
from pyperc.step.optimizer import CLASSES, plain

__all__ = ["Epoch", "History", "evaluate", "fit"]

SECONDS = 0.1
"""Between two looks at Ctrl-C, the progress bar and the clock."""


class Epoch(NamedTuple):
    """What one pass over the samples gave."""

    epoch: int
    """from 1"""
    loss: float
    """mean of the batches' losses, each before its own step, by their sizes"""
    validation_loss: float | None
    """after the epoch"""
    validation_error: float | None
    """share of the validation samples, without those of ignore_index, that are misclassified; None without classes"""
    seconds: float
    """of training alone"""


class History(list[Epoch]):
    """The epochs of a training, in their order, and why it ended.

    >>> history = History(Epoch(i + 1, loss, None, None, 0.1) for i, loss in enumerate([2.0, 1.5, 1.7]))
    >>> history.best.epoch, history.stalled(patience=1), history.stalled(patience=2)
    (2, True, False)
    """

    stopped: str = ""
    """"epochs", "early stopping" or "callback"; empty while the training goes on"""

    @property
    def best(self) -> Epoch:
        """The epoch of the least validation loss, or of the least loss where nothing is held out."""
        return min(self, key=_monitored)

    def stalled(self, patience: int, min_delta: float = 0.0) -> bool:
        """Whether the best loss has not improved by more than min_delta in the last so many epochs."""
        if len(self) <= patience:
            return False
        before, last = map(_monitored, self[:-patience]), map(_monitored, self[-patience:])
        return not min(last) < min(before) - min_delta


def _monitored(point: Epoch) -> float:
    return point.loss if point.validation_loss is None else point.validation_loss


def fit(
    model: nn.Module,
    X: Any,
    y: Any = None,
    epochs: int = 10,
    batch_size: int | None = None,
    loss: Loss = "cross_entropy",
    optimizer: str | torch.optim.Optimizer = "sgd",
    lr: float | Callable[[int], float] | None = None,
    *,
    validation: Any = None,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    callbacks: Iterable[Callable[[History], object] | LRScheduler] = (),
    patience: int | None = None,
    min_delta: float = 0.0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    scale: float | Tensor | None = None,
    shift: float | Tensor = 0.0,
    **options: Any,
) -> History:
    """Trains a network in place, epoch after epoch, by a `pyperc.TrainStep` for each batch.

    Where the step is native an epoch is too: each shuffled batch is read directly from X, the interpreter's lock is
    released, and nothing is allocated. Other networks go through autograd with the same results.

    Args:
        X: the samples [n, in]: a tensor, a numpy array, a numpy memmap (read where it is mapped) or anything that numpy
            makes an array of. Images [n, height, width] become rows; other dtypes are converted to the model's. Or a
            DataLoader of batches (x, y), with a batch size and an order of its own; y, batch_size and generator are
            left out then.
        y: the targets: for cross_entropy classes [n] or probabilities [n, classes]; for mse numbers [n, out]; for
            logistic, hinge and squared_hinge -1 and +1 (not 0 and 1), [n, out]. Of one output [n] will do.
        epochs: passes over the samples, at least 1.
        batch_size: 64 where not given; the last batch of an epoch may be smaller.
        scale, shift: the model is given x * scale + shift, also of the validation samples. Where no scale is given it
            is 1 / 255 for uint8, and 1 for all else.
        loss, optimizer, lr, options: those of `pyperc.TrainStep`; a loss that is NaN or infinite raises. Where no lr is
            given it is torch's 1e-3, which for "sgd" is little.
        validation: (X, y) or a DataLoader, for a loss and an error after each epoch.
        shuffle, generator: a new order for each epoch, drawn from the generator, torch's own where none is given.
        callbacks: called with the history after each epoch; one that returns True ends the training. A scheduler of
            torch.optim, for an `optimizer` that is one of torch's, takes its step. The state of what has a state_dict
            and a load_state_dict is kept in the checkpoint.
        patience: epochs without a loss (that of the validation, where there is one) less by more than `min_delta`,
            after which the training ends; the best epoch's parameters and buffers are then put back.
        progress: print a line for each epoch to stderr, and show a bar there if it is a terminal and tqdm is installed.
        checkpoint: a file, replaced as a whole at the end of an epoch or a batch when `checkpoint_seconds` are over
            since the last time, on Ctrl-C and at the end. Where it exists the training goes on from it, with results
            bit-identical to one that was never interrupted: parameters, buffers, the optimizer's state, the place in
            the epoch and the states of torch's generators are in it. A larger `epochs` trains for longer; a training
            that `patience` or a callback has ended stays so.

    Returns:
        The `History`: a list of `Epoch`s, with `best` and the reason why it ended, `stopped`.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the batch that it came in, so that the model is that of a whole number of
            steps, as is the checkpoint, which is then written. Its attribute `history` holds the epochs that were
            complete. A second Ctrl-C does not wait. A program with a SIGINT handler of its own keeps it.
        FloatingPointError: a loss became NaN or infinite; the parameters are those before that step.
        ValueError, TypeError: arguments that do not fit, or a checkpoint of another training.
        IndexError: a class in y that is none of the model's.

    Example:
        >>> import pyperc
        >>> from pyperc.datasets import digits
        >>> data = digits()
        >>> _ = torch.manual_seed(0)
        >>> history = fit(pyperc.MLP([64, 256, 10]), data.x_train, data.y_train, epochs=5, optimizer="adam", lr=1e-3,
        ...               validation=(data.x_test, data.y_test), progress=False)
        >>> [point.epoch for point in history], history[-1].validation_error < 0.15, history.stopped
        ([1, 2, 3, 4, 5], True, 'epochs')

        Two epochs, then two more from the checkpoint, and an end where the validation loss has not improved for three:

        >>> import pathlib, tempfile
        >>> settings = dict(optimizer="adam", lr=1e-3, validation=(data.x_test, data.y_test), patience=3,
        ...                 checkpoint=pathlib.Path(tempfile.mkdtemp()) / "run.pt", progress=False)
        >>> first = fit(pyperc.MLP([64, 32, 10]), data.x_train, data.y_train, epochs=2, **settings)
        >>> both = fit(pyperc.MLP([64, 32, 10]), data.x_train, data.y_train, epochs=4, **settings)
        >>> len(first), len(both), both[:2] == first
        (2, 4, True)

        A DataLoader brings the batches itself:

        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
        >>> len(fit(pyperc.MLP([64, 32, 10]), loader, epochs=1, optimizer="adam", progress=False))
        1
    """
    _check_counts("fit", epochs=epochs, batch_size=batch_size, patience=patience)
    _check_options(options)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"fit: generator must be a torch.Generator or None, got {generator!r}")
    called = _as_list(callbacks)
    reading = Reading(model, Objective(loss).name, scale, shift)
    source: Source
    if isinstance(X, DataLoader):
        for name, value in {"y": y, "batch_size": batch_size, "generator": generator}.items():
            if value is not None:
                raise ValueError(f"fit: {name} must be left out where X is a DataLoader, which has its own")
        source = Loader(reading, X)
    else:
        source = Rows(reading, X, y, batch_size or 64, shuffle, generator)
        _check_signs(reading.loss, "y", source.y)
    _check_validation(reading, validation)
    options = {"on_nan": "raise", "scale": source.scale, "shift": source.shift, **options}
    step = TrainStep(model, loss, optimizer, lr, **options)
    settings = {
        "the batches of an epoch": source.total,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "loss": _named(loss),
        "optimizer": _named(optimizer),
        "lr": _named(lr),
        "patience": patience,
        **{name: _named(value) for name, value in options.items()},
    }
    mode = model.training
    try:
        with Interrupts() as interrupts, Report(progress, epochs, source.total) as report:
            training = _Training(
                step=step,
                source=source,
                evaluate=None if validation is None else lambda: evaluate(step, reading.pieces(validation)),
                callbacks=called,
                epochs=epochs,
                patience=patience,
                min_delta=min_delta,
                path=None if checkpoint is None else Path(checkpoint),
                save_after=checkpoint_seconds,
                settings=settings,
                interrupts=interrupts,
                report=report,
            )
            training.load()
            training.run()
    finally:
        model.train(mode)
    return training.history


@dataclass
class _Training:
    """A training, which between two batches can be saved, or ended by Ctrl-C."""

    step: TrainStep
    source: Source
    evaluate: Callable[[], tuple[float, float | None]] | None
    callbacks: list[Any]
    epochs: int
    patience: int | None
    min_delta: float
    path: Path | None
    save_after: float
    settings: dict[str, Any]
    interrupts: Interrupts
    report: Report

    history: History = field(default_factory=History)
    best: dict[str, Tensor] | None = None
    """the model's state after the best epoch, where it may be put back"""
    within: bool = False
    """whether an epoch is begun"""
    seconds: float = 0.0
    """of that epoch"""
    saved: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Epochs until there is a reason to stop."""
        while not self._over():
            self._take_batches()
            self._end_epoch()
            self._pause()
        self.save()
        if self.best is not None:
            self.step.model.load_state_dict(self.best)

    def _over(self) -> bool:
        if not self.within and not self.history.stopped:
            if self.patience is not None and self.history.stalled(self.patience, self.min_delta):
                self.history.stopped = "early stopping"
            elif len(self.history) >= self.epochs:
                self.history.stopped = "epochs"
        return bool(self.history.stopped)

    def _take_batches(self) -> None:
        """What is left of an epoch."""
        if not self.within:
            self.source.begin()
            self.seconds, self.within = 0.0, True
        self.step.model.train()
        while self.within:
            start = time.perf_counter()
            self.within = self.source.run(self.step, SECONDS)
            self.seconds += time.perf_counter() - start
            self.report.batches(self.source.position)
            if self.within:
                self._pause()

    def _end_epoch(self) -> None:
        """Adds the epoch to the history and shows it to the callbacks."""
        loss, error = (None, None) if self.evaluate is None else self.evaluate()
        self.history.append(Epoch(len(self.history) + 1, self.source.mean_loss(), loss, error, self.seconds))
        self.source.position = 0
        self.report.epoch(self.history[-1])
        if self.patience is not None and self.history.best is self.history[-1]:
            self.best = copy.deepcopy(self.step.model.state_dict())
        for callback in self.callbacks:
            if isinstance(callback, ReduceLROnPlateau):
                callback.step(_monitored(self.history[-1]))
            elif isinstance(callback, LRScheduler):
                callback.step()
            elif callback(self.history) is True:
                self.history.stopped = "callback"

    def _pause(self) -> None:
        """Between two batches: saves where it is time, and ends where Ctrl-C was pressed."""
        if self.interrupts.noted or time.monotonic() - self.saved >= self.save_after:
            self.save()
        if self.interrupts.noted:
            # Not a class of its own: Python tells the shell of exactly this one that Ctrl-C ended it.
            interrupted = KeyboardInterrupt()
            interrupted.history = self.history  # type: ignore[attr-defined]
            raise interrupted

    def save(self) -> None:
        """Replaces the checkpoint."""
        if self.path is None:
            return
        content = {
            "settings": self.settings,
            "model": self.step.model.state_dict(),
            "step": self.step.state_dict(),
            "source": self.source.state(),
            "seconds": self.seconds,
            "history": [tuple(epoch) for epoch in self.history],
            "stopped": self.history.stopped,
            "best": self.best,
            "callbacks": [_state_of(callback) for callback in self.callbacks],
        }
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("wb") as file:
            torch.save(plain(content), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        self.saved = time.monotonic()

    def load(self) -> None:
        """Goes on from the checkpoint, if there is one."""
        if self.path is None or not self.path.exists():
            return
        wrong = f"fit: checkpoint {self.path} must be one that fit wrote"
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, LookupError, EOFError) as error:
            raise ValueError(f"{wrong}, got a file that torch cannot load") from error
        if not isinstance(content, dict) or content.keys() != CONTENT:
            raise ValueError(wrong)
        for name in self.settings | content["settings"]:
            was, now = content["settings"].get(name), self.settings.get(name)
            if was != now:
                raise ValueError(f"fit: checkpoint {self.path} was written with {name} {was!r}, got {now!r}")
        if len(self.callbacks) != len(content["callbacks"]):
            raise ValueError(
                f"fit: checkpoint {self.path} was written with {len(content['callbacks'])} callbacks, got "
                f"{len(self.callbacks)}"
            )
        self.step.model.load_state_dict(content["model"])
        self.step.load_state_dict(content["step"])
        for callback, state in zip(self.callbacks, content["callbacks"], strict=True):
            if state is not None:
                callback.load_state_dict(state)
        self.history.extend(Epoch(*epoch) for epoch in content["history"])
        if content["stopped"] == "callback":  # the other reasons follow from the history
            self.history.stopped = "callback"
        self.best, self.seconds = content["best"], content["seconds"]
        self.within = self.source.resume(content["source"])
        self.report.resumed(self.path, len(self.history), self.source.position)


CONTENT = {"settings", "model", "step", "source", "seconds", "history", "stopped", "best", "callbacks"}


def _state_of(callback: Any) -> Any:
    return callback.state_dict() if hasattr(callback, "load_state_dict") else None


def _named(value: Any) -> Any:
    """What a checkpoint remembers of an argument."""
    if value is None or isinstance(value, str | int | float | tuple):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _check_counts(function: str, **counts: Any) -> None:
    for name, count in counts.items():
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, numbers.Integral):
            raise TypeError(f"{function}: {name} must be a whole number, got {count!r}")
        if count < 1:
            raise ValueError(f"{function}: {name} must be at least 1, got {count}")


def _as_list(callbacks: Any) -> list[Any]:
    expected = "fit: callbacks must be a list of functions and of torch's schedulers"
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"{expected}, got {callbacks!r}")
    called = list(callbacks)
    for i, callback in enumerate(called):
        if not callable(callback) and not isinstance(callback, LRScheduler):
            raise TypeError(f"{expected}, got {callback!r} as callbacks[{i}]")
    return called


def _check_options(options: dict[str, Any]) -> None:
    of_step = {*inspect.signature(TrainStep).parameters, *(name for _, names in CLASSES.values() for name in names)}
    for option in options:
        if option not in of_step:
            own = ", ".join(name for name in inspect.signature(fit).parameters if name != "options")
            raise TypeError(f"fit: {option} is none of its arguments, {own}, and no option of pyperc.TrainStep")


def _check_validation(reading: Reading, validation: Any) -> None:
    """Before the training, not after its first epoch."""
    if validation is None or isinstance(validation, DataLoader):
        return
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        came = type(validation).__name__
        raise TypeError(
            f"fit: validation must be (X, y) or a DataLoader, got a {came}"
            f"{f' of {len(validation)}' if isinstance(validation, tuple | list) else ''}"
        )
    _, y = reading.rows("validation[0]", validation[0], "validation[1]", validation[1])
    _check_signs(reading.loss, "validation[1]", y)


def _check_signs(loss: str, name: str, y: Tensor) -> None:
    """Raises for classes 0 and 1, of which 0 would weigh a sample out."""
    if loss in SIGNED and bool((y == 0).any()) and bool(((y == 0) | (y == 1)).all()):
        came = "0 and 1" if bool((y == 1).any()) else "0 alone"
        raise ValueError(f"fit: {name} must be -1 and +1 for the loss {loss}, got {came}")


def evaluate(step: TrainStep, pieces: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float | None]:
    """Loss and share of misclassified samples (None without classes) of batches (x, y), in eval mode."""
    model, mode = step.model, step.model.training
    model.eval()
    with torch.no_grad():
        scores, target = (torch.cat(parts) for parts in zip(*((model(x), y) for x, y in pieces), strict=True))
        value = float(step.loss(scores, target))
    model.train(mode)
    if step.loss.name == "cross_entropy":
        classes = target if target.ndim == scores.ndim - 1 else target.argmax(-1)
        wrong = scores.argmax(-1) != classes
        if not target.is_floating_point():
            wrong = wrong[target != step.loss.ignore_index]
        return value, float(wrong.double().mean())
    if step.loss.name in SIGNED:
        return value, float(((scores >= 0) != (target > 0)).double().mean())
    return value, None
