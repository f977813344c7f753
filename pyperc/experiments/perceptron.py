"""Lecture 3.1: the perceptron algorithm on the images of 0 against those of 1, epoch by epoch."""

from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.linear_model import Perceptron


class Row(NamedTuple):
    """One epoch."""

    changes: int
    train_error: float
    test_error: float


LECTURE = [
    Row(changes, train / 100, test / 100)
    for changes, train, test in (
        (64, 0.23, 0.19),
        (24, 0.07, 0.00),
        (10, 0.06, 0.05),
        (6, 0.03, 0.14),
        (5, 0.03, 0.14),
        (4, 0.02, 0.14),
        (3, 0.01, 0.14),
        (2, 0.00, 0.14),
        (0, 0.00, 0.14),
    )
]
"""As the lecture prints them for MNIST; it does not give its preprocessing and its order."""


def run(setup: Setup) -> Result:
    """0 is the negative class, 1 the positive one; the pixels and a constant feature, in the given order."""
    data = setup.one_against(1, 0)
    model = Perceptron()
    model.fit(data.x_train, data.y_train, validation=(data.x_test, data.y_test))
    ours = [Row(epoch.changes, epoch.error, float(epoch.validation_error or 0)) for epoch in model.history_]
    changes = [row.changes for row in ours]
    claims = [
        Claim(
            f"an epoch without a change comes: the algorithm stops after {sum(changes)} changes in {len(ours)} epochs",
            changes[-1] == 0,
        ),
        Claim(f"then every training image is classified: {ours[-1].train_error:.2%}", ours[-1].train_error == 0),
        Claim(f"and of the test images it misses {ours[-1].test_error:.2%}, under 1%", ours[-1].test_error < 0.01),
    ]
    rows = [
        [str(epoch), *_cells(mine), *_cells(theirs)] for epoch, (mine, theirs) in enumerate(zip_longest(ours, LECTURE))
    ]
    columns = ["nb_changes", "train_error", "test_error"]
    return Result(
        [
            Table(
                ["epoch", *columns, *(f"lecture: {columns[0]}", *columns[1:])],
                rows,
                f"0 against 1, {len(data.y_train):,} images to train and {len(data.y_test):,} to test; "
                "beside the lecture's run on MNIST",
            )
        ],
        {"train": len(data.y_train), "test": len(data.y_test), "history": [row._asdict() for row in ours]},
        claims,
        "Left: changes in each epoch, until there is none. Middle: the errors after each epoch. Right: the weights "
        "that the algorithm ends with; dark pixels speak for 1, light ones for 0.",
        lambda figure: _draw(figure, ours, np.asarray(model.coef_)[0], setup.label),
        (13.0, 4.0),
    )


def _cells(row: Row | None) -> list[str]:
    return ["", "", ""] if row is None else [str(row.changes), f"{row.train_error:.2%}", f"{row.test_error:.2%}"]


def _draw(figure: Any, ours: list[Row], w: Any, label: str) -> None:
    changes, errors, weights = figure.subplots(1, 3)
    for rows, name, style in ((ours, f"pyperc, {label}", figures.LINES[0]), (LECTURE, "lecture", figures.LINES[1])):
        changes.plot([row.changes for row in rows], **style, label=name)
    changes.set(xlabel="epoch", ylabel="changes", title="changes in an epoch")
    errors.plot([100 * row.train_error for row in ours], **figures.LINES[0], label="train")
    errors.plot([100 * row.test_error for row in ours], **figures.LINES[1], label="test")
    errors.set(xlabel="epoch", ylabel="misclassified, %", title=f"errors after each epoch, {label}")
    for axes, longest in ((changes, max(len(ours), len(LECTURE))), (errors, len(ours))):
        axes.set_xticks(range(longest))
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    side = round(len(w) ** 0.5)
    image = weights.imshow(
        w.reshape(side, side) if side * side == len(w) else w[None], cmap="Greys", vmin=-abs(w).max(), vmax=abs(w).max()
    )
    weights.set(xticks=[], yticks=[], xlabel="column of pixels", ylabel="row of pixels", title="w")
    figure.colorbar(image, ax=weights)
