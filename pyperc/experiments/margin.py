"""Lecture 3.1: the perceptron makes at most 4 R^2 / gamma^2 changes, and scaling the population changes nothing."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.linear_model import Perceptron, margin_bound

MARGINS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
SCALE = 8.0
"""A power of two, so that a scaled run rounds as the other does."""
DIRECTION = np.array([0.6, 0.8])
POINTS = 200
Array = NDArray[np.float64]


class Row(NamedTuple):
    """A population, and the worst of several orders in which the algorithm saw it."""

    name: str
    radius: float
    margin: float
    changes: int
    bound: int
    scaled_changes: int
    scaled_bound: int


def population(margin: float, generator: np.random.Generator) -> tuple[Array, Array]:
    """Points of the unit disc on either side of a line through 0, four of them at margin / 2 from it, none nearer."""
    x = generator.uniform(-1, 1, (60 * POINTS, 2))
    x = x[(np.linalg.norm(x, axis=1) <= 1) & (abs(x @ DIRECTION) >= margin / 2)][:POINTS]
    along = np.array([-DIRECTION[1], DIRECTION[0]])
    for i, (side, far) in enumerate(((1, -0.8), (1, 0.8), (-1, -0.8), (-1, 0.8))):
        x[i] = side * margin / 2 * DIRECTION + far * along
    return x, np.sign(x @ DIRECTION)


def changes(x: Any, y: Any, fit_intercept: bool) -> int:
    """The changes until an epoch makes none."""
    model = Perceptron(fit_intercept=fit_intercept, max_iter=100_000).fit(x, y)
    return sum(epoch.changes for epoch in model.history_)


def measure(name: str, x: Array, y: Array, orders: int, generator: np.random.Generator) -> Row:
    """The bound of a population through 0, and the most changes in some orders of its points."""
    found = margin_bound(x, y, fit_intercept=False)
    scaled = margin_bound(SCALE * x, y, fit_intercept=False)
    counts, scaled_counts = [], []
    for i in range(orders):
        order = generator.permutation(len(y)) if i else np.arange(len(y))
        counts.append(changes(x[order], y[order], False))
        scaled_counts.append(changes(SCALE * x[order], y[order], False))
    return Row(name, found.radius, found.margin, max(counts), int(found.bound), max(scaled_counts), int(scaled.bound))


def run(setup: Setup) -> Result:
    """Populations of the plane with smaller and smaller margins, and the images of 0 against those of 1."""
    generator = np.random.default_rng(0)
    margins = MARGINS[:4] if setup.quick else MARGINS
    orders = 3 if setup.quick else 20
    populations = [population(margin, generator) for margin in margins]
    rows = [measure("points", x, y, orders, generator) for x, y in populations]
    data = setup.one_against(1, 0)
    images = np.column_stack([data.x_train.double().numpy(), np.ones(len(data.y_train))])
    rows.append(measure("0 against 1", images, data.y_train.numpy(), 1, generator))

    claims = [
        Claim("the changes stay under floor(4 R^2 / gamma^2) in every order", all(r.changes <= r.bound for r in rows)),
        Claim(
            f"scaling the population by {SCALE:g} changes neither the changes nor the bound",
            all(r.changes == r.scaled_changes and abs(r.bound - r.scaled_bound) <= 1 + 1e-6 * r.bound for r in rows),
        ),
        Claim(
            f"a larger margin needs fewer changes: {rows[0].changes} at gamma = {rows[0].margin:.3f}, "
            f"{rows[-2].changes} at gamma = {rows[-2].margin:.3f}",
            rows[0].changes < rows[-2].changes,
        ),
    ]
    table = Table(
        ["population", "R", "gamma", "changes", "bound", f"changes, x{SCALE:g}", f"bound, x{SCALE:g}"],
        [
            [
                r.name,
                f"{r.radius:.4f}",
                f"{r.margin:.4f}",
                f"{r.changes:,}",
                f"{r.bound:,}",
                f"{r.scaled_changes:,}",
                f"{r.scaled_bound:,}",
            ]
            for r in rows
        ],
        f"gamma is the best margin that there is; the most changes in {orders} orders of {POINTS} points; the images, "
        "with a constant feature 1, in their own order",
    )
    return Result(
        [table],
        {"rows": [row._asdict() for row in rows]},
        claims,
        "Left: a population, the line that separates it best, and its margin gamma. Right: the most changes that the "
        "algorithm made in some orders of the points, under the theorem's bound.",
        lambda figure: _draw(figure, *populations[1], rows[:-1]),
        (10.0, 4.6),
    )


def _draw(figure: Any, x: Array, y: Array, rows: list[Row]) -> None:
    disc, bound = figure.subplots(1, 2)
    found = margin_bound(x, y, fit_intercept=False)
    figures.populations(disc, x, y)
    circle = np.linspace(0, 2 * np.pi, 200)
    disc.plot(
        found.radius * np.cos(circle), found.radius * np.sin(circle), color="grey", linewidth=0.8, label="radius R"
    )
    figures.boundary(disc, found.w, 0, color="black", linewidth=1.5)
    for side in (-1, 1):
        figures.boundary(disc, found.w, 0, side * found.margin / 2, color="black", linestyle="--", linewidth=1)
    figures.plane(disc, [[-1.15, -1.15], [1.15, 1.15]], 0)
    disc.set_title(rf"$\gamma$ = {found.margin:.2f} between the dashed lines")
    disc.legend(loc="lower left", fontsize=8, framealpha=1)
    margins = [row.margin for row in rows]
    bound.plot(margins, [row.bound for row in rows], **figures.LINES[1], label=r"bound $4 R^2 / \gamma^2$")
    bound.plot(margins, [max(row.changes, 1) for row in rows], **figures.LINES[0], label="changes")
    bound.set(xscale="log", yscale="log", xlabel=r"margin $\gamma$", ylabel="changes", title="changes under the bound")
    bound.grid(alpha=0.3, which="both")
    bound.legend(frameon=False)
