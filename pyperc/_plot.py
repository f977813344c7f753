"""Draws training curves, and what the experiments show, into files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyperc.train import Epoch

# Told apart by grey level, line and mark, so that a print without colour is read as well.
STYLES = (
    {"color": "black", "linestyle": "-", "marker": "", "linewidth": 1.5},
    {"color": "tab:orange", "linestyle": "", "marker": "o", "markersize": 5, "markerfacecolor": "none"},
)


def formats() -> list[str]:
    """The endings of the files that can be written."""
    return sorted(Figure().canvas.get_supported_filetypes())


def draw(curves: Mapping[str, Sequence[Epoch]], title: str, path: str | Path) -> None:
    """Draws the loss and the errors of one or two trainings against the epoch."""
    figure = blank()
    loss, error = figure.subplots(1, 2)
    for (name, curve), style in zip(curves.items(), STYLES, strict=False):
        epochs = [point.epoch for point in curve]
        loss.plot(epochs, [point.loss for point in curve], label=name, **style)
        error.plot(epochs, [100 * point.test_error for point in curve], label=f"{name}, test", **style)
        faint = {**style, "linestyle": style["linestyle"] and "--", "marker": style["marker"] and "x", "alpha": 0.6}
        error.plot(epochs, [100 * point.train_error for point in curve], label=f"{name}, train", **faint)
    loss.set(xlabel="epoch", ylabel="mean cross-entropy of the training batches", yscale="log", title="loss")
    error.set(xlabel="epoch", ylabel="misclassified samples, %", title="error")
    error.set_ylim(bottom=0)
    for axes in (loss, error):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    save(figure, path)


def blank(size: tuple[float, float] = (10, 4)) -> Figure:
    """An empty figure of so many inches, laid out by itself."""
    return Figure(figsize=size, layout="constrained")


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure in the format of the file's ending."""
    figure.savefig(path, dpi=150)
