"""What a training tells while it runs: a line for each epoch, and a bar where somebody sees it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyperc.fit import Epoch


def bar_of(total: int | None) -> Any:
    """A bar over so many batches on stderr, or None where stderr is no terminal or tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="batch", leave=False, file=sys.stderr)


class Report:
    """The lines and the bar of `fit`, on stderr; with `shown` false, nothing."""

    def __init__(self, shown: bool, epochs: int, total: int | None) -> None:
        self.shown, self.epochs = shown, epochs
        self.bar = bar_of(total) if shown else None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def batches(self, position: int) -> None:
        """So many batches of the epoch are done."""
        if self.bar is not None:
            self.bar.update(position - self.bar.n)

    def epoch(self, epoch: Epoch) -> None:
        """The epoch is done."""
        line = f"epoch {epoch.epoch}/{self.epochs}  loss {epoch.loss:.6f}"
        if epoch.validation_loss is not None:
            line += f"  validation loss {epoch.validation_loss:.6f}"
        if epoch.validation_error is not None:
            line += f"  error {epoch.validation_error:.2%}"
        self._say(f"{line}  {epoch.seconds:.2f} s")
        if self.bar is not None:
            self.bar.reset()

    def resumed(self, path: Path, epochs: int, position: int) -> None:
        """The training goes on."""
        self._say(f"goes on from {path}, after {epochs} epochs and {position} batches")

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        if self.shown:
            print(line, file=sys.stderr, flush=True)
