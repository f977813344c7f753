"""Lecture 3.3: polynomial regression's error is bias^2 + variance, and the degree trades one for the other."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.features import Polynomial

POINTS = 30
NOISE = 0.4
DEGREES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
SHOWN = (1, 5, 10)


def target(x: Tensor) -> Tensor:
    """The value y to predict at x."""
    return torch.sin(4 * x) + 0.5 * x * x


def fits(degree: int, x: Tensor, y: Tensor, grid: Tensor) -> Tensor:
    """Least squares alpha . Phi(x), Phi(x) = (1, x, ..., x^D), for each row of y [sets, n]: values [sets, grid]."""
    phi = Polynomial(degree)
    alpha = torch.linalg.lstsq(phi.fit_transform(x[:, None]), y.T).solution
    values: Tensor = (phi.transform(grid[:, None]) @ alpha).T
    return values


def run(setup: Setup) -> Result:
    """Many training sets of the same size, a fit of each degree to each, and the mean over the interval."""
    sets = 200 if setup.quick else 2000
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    y = target(x) + NOISE * torch.randn(sets, POINTS, generator=generator, dtype=torch.float64)
    grid = torch.linspace(-1, 1, 201, dtype=torch.float64)
    truth = target(grid)

    predictions = {degree: fits(degree, x, y, grid) for degree in DEGREES}
    bias = [float((predictions[d].mean(0) - truth).square().mean()) for d in DEGREES]
    variance = [float(predictions[d].var(0, correction=0).mean()) for d in DEGREES]
    error = [float((predictions[d] - truth).square().mean()) for d in DEGREES]
    train = [float((fits(d, x, y, x) - y).square().mean()) for d in DEGREES]
    identity = max(abs(e - b - v) / e for e, b, v in zip(error, bias, variance, strict=True))
    best = DEGREES[error.index(min(error))]

    rows = [[str(d), *(f"{values[i]:.5f}" for values in (bias, variance, error, train))] for i, d in enumerate(DEGREES)]
    claims = [
        Claim(f"error = bias^2 + variance for every D: within {identity:.0e} of the error", identity < 1e-9),
        Claim("the variance rises with D", all(a < b for a, b in pairwise(variance))),
        Claim("the training error falls with D", all(a > b for a, b in pairwise(train))),
        Claim(
            f"the bias falls from {bias[0]:.3f} to {bias[-1]:.5f}, so that the error is least between: at D = {best}",
            bias[-1] < bias[0] / 100 and DEGREES[0] < best < DEGREES[-1],
        ),
    ]
    return Result(
        [
            Table(
                ["D", "bias^2", "variance", "error", "training error"],
                rows,
                f"polynomials of degree D fitted to {sets:,} sets of {POINTS} points, noise {NOISE}; mean over [-1, 1]",
            )
        ],
        {"degrees": list(DEGREES), "bias2": bias, "variance": variance, "error": error, "train_error": train},
        claims,
        "The three small figures: ten of the fits (grey), their mean (dashed) and the function (thick): a small degree "
        "is wrong in the same way every time, a large one follows the noise. Right: bias^2 falls, the variance rises.",
        lambda figure: _draw(figure, x, y, grid, predictions, bias, variance, error),
        (13.0, 3.8),
    )


def _draw(
    figure: Any,
    x: Tensor,
    y: Tensor,
    grid: Tensor,
    predictions: dict[int, Tensor],
    bias: list[float],
    variance: list[float],
    error: list[float],
) -> None:
    at = grid.numpy()
    *small, curve = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.4])
    for axes, degree in zip(small, SHOWN, strict=True):
        if axes is not small[0]:
            axes.sharey(small[0])
        for one in predictions[degree][:10].numpy():
            axes.plot(at, one, color="silver", linewidth=0.8)
        axes.plot(x.numpy(), y[0].numpy(), ".", color="dimgrey", markersize=4)
        axes.plot(at, target(grid).numpy(), color=figures.MIDDLE, linewidth=3, alpha=0.8)
        axes.plot(at, predictions[degree].mean(0).numpy(), "k--", linewidth=1.5)
        axes.set(xlabel="x", ylim=(-1.9, 1.9), title=f"D = {degree}")
    small[0].set_ylabel("y")
    for name, values, style in zip(
        ("bias²", "variance", "error"), (bias, variance, error), figures.LINES, strict=False
    ):
        curve.plot(DEGREES, values, **style, label=name)
    curve.set(xlabel="degree D", ylabel="mean over [-1, 1]", yscale="log", title="error = bias² + variance")
    curve.set_ylim(bottom=1e-3)
    curve.grid(alpha=0.3)
    curve.legend(frameon=False)
