"""The tables that the command line prints."""

from collections.abc import Mapping, Sequence

from pyperc.compare import Agreement, Timing
from pyperc.train import Epoch

UNITS = ((1.0, 1.0, "s "), (1e-2, 1e3, "ms"), (0.0, 1e6, "us"))
"""From how many seconds on, times what, under which name."""


def header(compared: bool) -> str:
    """The columns of `row`."""
    line = f"{'epoch':>5}  {'loss':>9}  {'train error':>11}  {'test error':>10}  {'samples/s':>9}"
    return line + f"  | plain torch: {'loss':>9}  {'test error':>10}  {'samples/s':>9}" * compared


def row(ours: Epoch, plain: Epoch | None) -> str:
    """One epoch, with that of plain torch beside it."""
    line = f"{ours.epoch:5}  {ours.loss:9.6f}  {ours.train_error:11.2%}  {ours.test_error:10.2%}"
    line += f"  {ours.samples_per_second:9,.0f}"
    if plain is not None:
        line += f"  |              {plain.loss:9.6f}  {plain.test_error:10.2%}  {plain.samples_per_second:9,.0f}"
    return line


def verdict(agreed: Agreement) -> str:
    """What a difference of two trainings means, in a sentence."""
    if agreed.loss == agreed.weight == 0:
        return "same curve as plain torch, bit for bit"
    loss = f"largest difference {agreed.loss:.1e} of the loss, {agreed.weight:.1e} of the final weights"
    if agreed.same:
        return f"same curve as plain torch: {loss} (rounding)"
    return f"NOT the curve of plain torch: {loss}, more than rounding explains"


def times(timings: Mapping[str, Timing], over: Mapping[str, float], batch_size: int) -> str:
    """The timings of `time_batch`, of an epoch, and the ratio of backward to forward."""
    labels = {"step": "a step of training", "epoch": "an epoch of training"}
    lines = [
        f"{f'a random batch of {batch_size}':24}  {'pyperc':>10}  {'plain torch':>11}  plain torch / pyperc (quartiles)"
    ]
    for name, timing in timings.items():
        scale, unit = next((scale, unit) for least, scale, unit in UNITS if timing.ours >= least)
        cells = f"{timing.ours * scale:7.1f} {unit}  {timing.theirs * scale:8.1f} {unit}"
        low, middle, high = timing.ratio
        lines.append(f"{labels.get(name, name):24}  {cells}  {middle:6.2f}  ({low:.2f} to {high:.2f})")
    lines.append(f"{'backward / forward':24}  {over['pyperc']:10.2f}  {over['torch']:11.2f}")
    return "\n".join(lines)


def align(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells under their columns: those of numbers to the right, the others to the left.

    >>> print(align(["name", "n"], [["one", "1"], ["twelve", "12"]]))
    name     n
    ------  --
    one      1
    twelve  12
    """
    lines = [[*columns], *([*row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # A sign, a point or a digit begins a number; an empty cell may stand in a column of numbers.
    right = [all(not cell or cell[0] in "+-.0123456789" for cell in column) for column in zip(*rows, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )
