"""Where a training's batches come from: rows in memory or in a mapped file, or a DataLoader."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyperc._sklearn import tensor_of

BYTE_SCALE = 1 / 255
"""What the bytes of an image are multiplied by on their way in."""

ROWS_AT_ONCE = 1024
"""Of a pass without gradients: as many rows of a wide hidden layer stay in the last-level cache."""

READABLE = (torch.uint8, torch.float32, torch.float64)
"""The dtypes whose rows a step converts as it gathers them."""


@dataclass
class Reading:
    """How samples and targets are read, for a model and the loss of this name, "" for a function."""

    model: nn.Module
    loss: str
    scale: Any = None
    """the model is given x * scale + shift; where there is no scale, it is 1 / 255 for bytes and 1 for all else"""
    shift: Any = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"fit: model must be an instance of torch.nn.Module, got {_name_of(self.model)}")
        if not any(p.is_floating_point() for p in self.model.parameters()):
            raise ValueError("fit: model must have parameters of a floating dtype, got none")

    @property
    def parameter(self) -> nn.Parameter:
        """One that has the dtype and the device of the model."""
        return next(p for p in self.model.parameters() if p.is_floating_point())

    def scale_of(self, x: Tensor) -> Any:
        """What x is multiplied by."""
        if self.scale is None:
            return BYTE_SCALE if x.dtype == torch.uint8 else 1.0
        return self.scale

    def rows(self, x_name: str, X: Any, y_name: str, y: Any) -> tuple[Tensor, Tensor]:
        """X and y, a row for each sample; X on its own memory where a step reads its dtype."""
        if y is None:
            raise ValueError(f"fit: {y_name} must hold a target for each row of {x_name}, got None")
        x = _tensor(x_name, X)
        if x.ndim < 2 or len(x) == 0:
            raise ValueError(f"fit: {x_name} must be [samples, features] with at least one, got {list(x.shape)}")
        if x.is_complex() or x.layout != torch.strided:
            raise TypeError(f"fit: {x_name} must be a dense real array, got {x.dtype} of layout {x.layout}")
        x = x.to(self.parameter.device, x.dtype if x.dtype in READABLE else self.parameter.dtype)
        target = self.target(y, y_name)
        if target.ndim == 0 or len(target) != len(x):
            raise ValueError(
                f"fit: {y_name} must have a row for each of the {len(x)} rows of {x_name}, got {list(target.shape)}"
            )
        return self._flat(x), target

    def batch(self, X: Any) -> Tensor:
        """A batch as the model is given it."""
        given = _tensor("X", X)
        x, scale = self._flat(given.to(self.parameter.device, self.parameter.dtype)), self.scale_of(given)
        numbers = isinstance(scale, int | float) and isinstance(self.shift, int | float)
        return x if numbers and (scale, self.shift) == (1, 0) else x * scale + self.shift

    def target(self, y: Any, name: str = "y") -> Tensor:
        """Classes as int64, all else in the model's dtype, where the loss has a name; a row for each sample."""
        target = _tensor(name, y).to(self.parameter.device)
        if target.is_floating_point():
            target = target.to(self.parameter.dtype)
        elif self.loss:
            target = target.to(torch.int64 if self.loss == "cross_entropy" else self.parameter.dtype)
        return target[:, None] if self.loss not in ("", "cross_entropy") and target.ndim == 1 else target

    def pieces(self, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) of a pass without gradients over (X, y) or a DataLoader, x as the model is given it."""
        pairs: Iterable[tuple[Any, Tensor]]
        if isinstance(data, DataLoader):
            pairs = ((X, self.target(y)) for X, y in map(_pair, data))
        else:
            x, target = self.rows("validation[0]", data[0], "validation[1]", data[1])
            pairs = zip(x.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE), strict=True)  # type: ignore[no-untyped-call]
        for X, target in pairs:
            yield self.batch(X), target

    def _flat(self, x: Tensor) -> Tensor:
        """Images as rows, for a network that begins with a linear layer of so many features; in unit column stride."""
        model = self.model
        first = model[0] if isinstance(model, nn.Sequential) and len(model) else model
        if isinstance(first, nn.Linear) and x.shape[-1] != first.in_features == x[0].numel():
            x = x.flatten(1)
        unit: Tensor = x if x.stride(-1) == 1 else x.contiguous()
        return unit


def _name_of(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _pair(batch: Any) -> Any:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"fit: a DataLoader's batches must be pairs (x, y), got {_name_of(batch)}")
    return batch


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    try:
        return tensor_of(array)
    except TypeError:  # what numpy has, and torch has not
        raise TypeError(f"fit: {name} must hold numbers, got {np.asarray(array).dtype.type.__name__}") from None


class Step(Protocol):
    """What takes the steps of an epoch: a `pyperc.TrainStep`, or torch's own loop beside it."""

    batches: int

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor: ...

    def epoch(
        self, x: Tensor, y: Tensor, order: Any, batch_size: int, losses: Tensor, begin: int = ..., seconds: float = ...
    ) -> int: ...


class Source(ABC):
    """The batches of an epoch in their order, how many of them were taken, and their losses.

    `generators` are those that an epoch draws from: with their states, and that at the epoch's beginning, an epoch is
    continued after its first `position` batches as if nothing had been in between.
    """

    total: int | None
    """batches in an epoch, where that is known"""

    scale: Any = 1.0
    shift: Any = 0.0
    """of the step that takes these batches"""

    def __init__(self, reading: Reading, generators: list[Any]) -> None:
        device = reading.parameter.device
        own = [torch.default_generator] if device.type != "cuda" else [torch.cuda.default_generators[device.index or 0]]
        every = [torch.default_generator, *own, *(g for g in generators if g is not None)]
        self.generators: list[torch.Generator] = list({id(generator): generator for generator in every}.values())
        self.position = 0

    def begin(self) -> None:
        """Draws the order of the next epoch."""
        self._begun = self._states()
        self.position = 0
        self._draw()

    @abstractmethod
    def _draw(self) -> None: ...

    @abstractmethod
    def run(self, step: Step, seconds: float) -> bool:
        """Takes batches, at least one, until so much time is over; returns whether there are more."""

    @property
    @abstractmethod
    def losses(self) -> Tensor:
        """float64 [position], of the batches taken"""

    @property
    @abstractmethod
    def sizes(self) -> Tensor:
        """float64 [position]"""

    @abstractmethod
    def _skip(self, losses: Tensor, sizes: Tensor) -> None:
        """Passes over the batches that had these losses."""

    def mean_loss(self) -> float:
        """Of the epoch, each batch by its size."""
        return float(self.losses @ self.sizes / self.sizes.sum())

    def state(self) -> dict[str, Any]:
        """All of it, for `resume`."""
        now = self._states()
        if not self.position:
            return {"now": now}
        return {"now": now, "begun": self._begun, "losses": self.losses.clone(), "sizes": self.sizes.clone()}

    def resume(self, state: dict[str, Any]) -> bool:
        """Goes on where `state` was taken; returns whether that is within an epoch."""
        within = "begun" in state
        if within:
            self._restore(state["begun"])
            self.begin()
            self._skip(state["losses"], state["sizes"])
            self.position = len(state["losses"])
        self._restore(state["now"])
        return within

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _restore(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


class Rows(Source):
    """Rows of x [n, *] and y [n, *] in an order that is drawn anew for each epoch; x is never copied."""

    def __init__(
        self, reading: Reading, X: Any, y: Any, batch_size: int, shuffle: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__(reading, [generator])
        self.x, self.y = reading.rows("X", X, "y", y)
        self.scale, self.shift = reading.scale_of(self.x), reading.shift
        self.shuffle, self.generator = shuffle, generator
        self.batch_size = min(batch_size, len(self.x))
        starts = torch.arange(0, len(self.x), self.batch_size)
        self.total: int = len(starts)
        self._sizes = (len(self.x) - starts).clamp(max=self.batch_size).double()

    def _draw(self) -> None:
        self.order = torch.randperm(len(self.x), generator=self.generator) if self.shuffle else None
        self._losses = torch.zeros(self.total, dtype=torch.float64)

    def run(self, step: Step, seconds: float) -> bool:
        begin = self.position
        try:
            step.epoch(self.x, self.y, self.order, self.batch_size, self._losses, begin=begin, seconds=seconds)
        finally:
            self.position = step.batches
        return self.position < self.total

    @property
    def losses(self) -> Tensor:
        return self._losses[: self.position]

    @property
    def sizes(self) -> Tensor:
        return self._sizes[: self.position]

    def _skip(self, losses: Tensor, sizes: Tensor) -> None:
        self._losses[: len(losses)] = losses


class Loader(Source):
    """The batches (x, y) of a DataLoader."""

    def __init__(self, reading: Reading, loader: DataLoader[Any]) -> None:
        super().__init__(reading, [loader.generator, getattr(loader.sampler, "generator", None)])
        self.reading, self.loader = reading, loader
        try:
            self.total = len(loader)
        except TypeError:  # an IterableDataset need not know
            self.total = None

    def _draw(self) -> None:
        self._batches = iter(self.loader)
        self._taken: list[tuple[Any, int]] = []

    def run(self, step: Step, seconds: float) -> bool:
        end = time.perf_counter() + seconds
        for X, y in map(_pair, self._batches):
            target = self.reading.target(y)
            self._taken.append((step(self.reading.batch(X), target), len(target)))
            self.position += 1
            if time.perf_counter() >= end:
                return self.position != self.total
        if self.position == 0:
            raise ValueError("fit: X must be a DataLoader of at least one batch, got none")
        return False

    @property
    def losses(self) -> Tensor:
        return torch.tensor([float(loss) for loss, _ in self._taken], dtype=torch.float64)

    @property
    def sizes(self) -> Tensor:
        return torch.tensor([size for _, size in self._taken], dtype=torch.float64)

    def _skip(self, losses: Tensor, sizes: Tensor) -> None:
        # The batches come last, so that none is taken beyond.
        for loss, size, _ in zip(losses.tolist(), sizes.tolist(), self._batches, strict=False):
            self._taken.append((loss, int(size)))
