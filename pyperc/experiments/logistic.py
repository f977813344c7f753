"""Lectures 3.2 and 3.5: logistic regression by gradient descent, its boundary beside LDA's."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pyperc
from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.linear_model import LinearDiscriminantAnalysis, LogisticRegression

ETA = 0.1
STEPS = (10, 100, 1000, 10_000)
POINTS = 100
LIMIT = 0.3
"""The square that is drawn and compared is [-LIMIT, LIMIT]^2."""
Array = NDArray[np.float64]


def points(generator: np.random.Generator) -> tuple[Array, Array]:
    """Two Gaussian populations with one covariance that overlap, 50 points of each, around 0."""
    y = np.where(np.arange(POINTS) < POINTS // 2, -1.0, 1.0)
    noise = generator.normal(size=(POINTS, 2)) @ np.array([[0.2, 0.08], [0.0, 0.13]])
    return 0.4 * (noise + 0.14 * y[:, None] * np.array([1.0, -0.2])), y


def gradient(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As the lecture prints it: dw = -sum_n x_n u_n, db = -sum_n u_n, u_n = y_n sigmoid(-y_n (w . x_n + b))."""
    u = y * (-y * (x.mv(w) + b)).sigmoid_()
    v = x * u.view(-1, 1)
    return -v.sum(0), -u.sum()


def run(setup: Setup) -> Result:
    """The boundary after 10, 100, 1000 and 10000 steps on 100 points, eta = 0.1."""
    x, y = points(np.random.default_rng(1))
    fits = [LogisticRegression(solver="gd", eta=ETA, steps=steps).fit(x, y) for steps in STEPS]
    lda = LinearDiscriminantAnalysis().fit(x, y)
    lines = [(np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])) for model in (*fits, lda)]

    axis = np.linspace(-LIMIT, LIMIT, 101)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    sides = [grid @ w + b > 0 for w, b in lines]
    apart = [float(np.mean(side != sides[-1])) for side in sides]
    losses = [float(np.logaddexp(0, -y * (x @ w + b)).sum()) for w, b in lines]
    errors = [float(np.mean(np.where(x @ w + b >= 0, 1, -1) != y)) for w, b in lines]
    angles = [_angle(w, lines[-1][0]) for w, _ in lines]

    at = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    samples, labels = torch.from_numpy(x), torch.from_numpy(y)
    loss = pyperc.functional.logistic_loss(samples @ at + bias, labels, reduction="sum")
    printed, derived = gradient(samples, labels, at.detach(), bias.detach()), torch.autograd.grad(loss, (at, bias))
    difference = max(float((a - d).abs().max() / d.abs().max()) for a, d in zip(printed, derived, strict=True))

    names = [f"{steps:,} steps" for steps in STEPS] + ["LDA"]
    rows = [
        [name, f"{w[0]:.3f}", f"{w[1]:.3f}", f"{b:.3f}", f"{loss_:.4f}", f"{error:.0%}", f"{angle:.1f}", f"{share:.1%}"]
        for name, (w, b), loss_, error, angle, share in zip(names, lines, losses, errors, angles, apart, strict=True)
    ]
    claims = [
        Claim(f"the lecture's gradient is autograd's: within {difference:.0e} of it", difference < 1e-12),
        Claim(
            "the loss falls from each count of steps to the next",
            all(a > b for a, b in pairwise(losses[:-1])),
        ),
        Claim(
            f"the boundary comes to LDA's: {apart[0]:.0%} of the square lies between them after {STEPS[0]} steps, "
            f"{apart[-2]:.1%} after {STEPS[-1]:,}",
            apart[-2] < 0.05 and apart[-2] < apart[0],
        ),
    ]
    return Result(
        [
            Table(
                ["", "w_1", "w_2", "b", "loss", "errors", "degrees from LDA", "square between"],
                rows,
                f"-sum log sigmoid(y (w . x + b)) on {POINTS} points, eta = {ETA}, from w = 0, b = 0",
            )
        ],
        {
            "steps": list(STEPS),
            "w": [w.tolist() for w, _ in lines[:-1]],
            "b": [b for _, b in lines[:-1]],
            "loss": losses[:-1],
            "lda": {"w": lines[-1][0].tolist(), "b": lines[-1][1]},
            "area_between": apart[:-1],
            "angle": angles[:-1],
            "gradient_difference": difference,
        },
        claims,
        "The boundary of logistic regression after n steps of gradient descent (the grey shows its posterior), and "
        "that of LDA on the same points: dashed in every figure, and alone in the last.",
        lambda figure: _draw(figure, x, y, lines),
        (14.0, 3.7),
    )


def _angle(a: Array, b: Array) -> float:
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _draw(figure: Any, x: Array, y: Array, lines: list[tuple[Array, float]]) -> None:
    axis = np.linspace(-LIMIT, LIMIT, 121)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    titles = [rf"$n = 10^{power}$" for power in (1, 2, 3, 4)] + ["LDA"]
    for axes, (w, b), title in zip(figure.subplots(1, 5, sharey=True), lines, titles, strict=True):
        posterior = 1 / (1 + np.exp(-(grid @ w + b)))
        axes.contourf(axis, axis, posterior, levels=np.linspace(0, 1, 11), cmap="Greys", alpha=0.6)
        figures.populations(axes, x, y)
        figures.boundary(axes, w, b, color="black", linewidth=1.8, label="w . x + b = 0")
        figures.boundary(axes, *lines[-1], color="black", linestyle="--", linewidth=1, label="LDA")
        axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xlabel="$x_1$", title=title)
        axes.set_aspect("equal", adjustable="box")
        if w is lines[0][0]:
            axes.set_ylabel("$x_2$")
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
