"""Lecture 3.1: the support vector machine keeps its distance, and only its support vectors matter."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.linear_model import LinearSVC, Perceptron

LAMBDAS = (1.0, 0.1, 0.01, 0.001, 0.0001)
DRAWN = 0.001
Array = NDArray[np.float64]


class Plane(NamedTuple):
    """The boundary w . x + b = 0, and how it lies."""

    w: Array
    b: float
    support: int
    """points with y (w . x + b) <= 1, to rounding"""
    objective: float
    """lambda |w|^2 + (1/N) sum max(0, 1 - y (w . x + b))"""
    nearest: float
    """the smallest y (w . x + b) / |w|: negative where a point is on the wrong side"""


def points(n: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Two clouds with some room between them."""
    y = np.where(np.arange(n) < n // 2, -1.0, 1.0)
    x = generator.normal(size=(n, 2)) @ np.array([[0.55, 0.3], [-0.2, 0.5]]) + 1.7 * y[:, None] * np.array([0.9, -0.45])
    return x, y


def machine(x: Array, y: Array, c: float) -> LinearSVC:
    """The lecture's objective: hinge loss, and the bias not penalised."""
    model = LinearSVC(loss="hinge", C=c, intercept_scaling=math.inf, tol=1e-8, max_iter=100_000)
    return model.fit(x, y)


def plane(model: Any, x: Array, y: Array, regularisation: float) -> Plane:
    """A fitted model's boundary."""
    w, b = np.asarray(model.coef_, dtype=float)[0], float(np.asarray(model.intercept_).ravel()[0])
    products = y * (x @ w + b)
    objective = regularisation * w @ w + np.maximum(0, 1 - products).mean()
    return Plane(w, b, int((products <= 1 + 1e-4).sum()), float(objective), float(products.min() / np.linalg.norm(w)))


def run(setup: Setup) -> Result:
    """Several lambda on the same points, beside the perceptron's boundary."""
    n = 80 if setup.quick else 200
    x, y = points(n, np.random.default_rng(9))
    perceptron = Perceptron().fit(x, y)
    planes = {value: plane(machine(x, y, 1 / (2 * value * n)), x, y, value) for value in LAMBDAS}
    first = plane(perceptron, x, y, DRAWN)
    best = planes[LAMBDAS[-1]]

    chosen = planes[DRAWN]
    kept = y * (x @ chosen.w + chosen.b) <= 1 + 1e-4
    again = plane(machine(x[kept], y[kept], 1 / (2 * DRAWN * n)), x, y, DRAWN)
    moved = float(np.abs(np.append(again.w - chosen.w, again.b - chosen.b)).max() / np.linalg.norm(chosen.w))
    # By convexity no other plane does better: each lambda's own plane against those of all the others.
    least = all(
        planes[value].objective <= plane_of(other, x, y, value) + 1e-6
        for value in LAMBDAS
        for other in (*planes.values(), first)
    )

    rows = [
        [
            f"SVM, lambda = {value:g}",
            f"{2 / np.linalg.norm(p.w):.3f}",
            str(p.support),
            f"{p.nearest:.4f}",
            f"{p.objective:.5f}",
        ]
        for value, p in planes.items()
    ]
    rows.append(["perceptron", "", "", f"{first.nearest:.4f}", ""])
    claims = [
        Claim(
            f"the machine keeps farther away than the perceptron: its nearest point is {best.nearest:.3f} from the "
            f"boundary, the perceptron's {first.nearest:.3f}",
            best.nearest > 1.2 * first.nearest > 0,
        ),
        Claim(
            "a larger lambda widens the space between w . x + b = -1 and +1, over more points, until it is so small "
            "that the margin is as hard as can be",
            all(
                np.linalg.norm(wide.w) < np.linalg.norm(narrow.w) * (1 + 1e-4) and wide.support >= narrow.support
                for wide, narrow in pairwise(planes.values())
            )
            and planes[1.0].support > 10 * best.support,
        ),
        Claim(
            f"only the {chosen.support} support vectors of {n} points matter: without all others the boundary moves by "
            f"{moved:.0e}",
            moved < 1e-3 and chosen.support < n / 4,
        ),
        Claim("for every lambda, no other of these boundaries has a smaller objective", least),
    ]
    return Result(
        [
            Table(
                ["", "2/|w|", "support vectors", "nearest point", "objective"],
                rows,
                f"{n} points; objective: lambda |w|^2 + (1/N) sum max(0, 1 - y (w . x + b))",
            )
        ],
        {
            "lambda": list(LAMBDAS),
            "planes": [{**p._asdict(), "w": p.w.tolist()} for p in planes.values()],
            "perceptron": {**first._asdict(), "w": first.w.tolist()},
            "moved_without_the_others": moved,
        },
        claims,
        f"Left: the boundary for lambda = {DRAWN:g}, its margins (dashed) and its support vectors (ringed), and the "
        "perceptron's boundary, which stops at the first that separates. Middle: a large lambda widens the margin over "
        "more points. Right: the hinge loss, beside the errors that it bounds.",
        lambda figure: _draw(figure, x, y, chosen, planes[0.1], first),
        (13.0, 4.4),
    )


def plane_of(other: Plane, x: Array, y: Array, regularisation: float) -> float:
    """The objective of another plane."""
    hinge = np.maximum(0, 1 - y * (x @ other.w + other.b)).mean()
    return float(regularisation * other.w @ other.w + hinge)


def _draw(figure: Any, x: Array, y: Array, small: Plane, large: Plane, perceptron: Plane) -> None:
    left, middle, hinge = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 1])
    for axes, shown, title in ((left, small, f"$\\lambda$ = {DRAWN:g}"), (middle, large, "$\\lambda$ = 0.1")):
        figures.populations(axes, x, y)
        figures.boundary(axes, shown.w, shown.b, color="black", linewidth=1.8, label="SVM")
        for level in (-1, 1):
            figures.boundary(axes, shown.w, shown.b, level, color="black", linestyle="--", linewidth=0.9)
        inside = y * (x @ shown.w + shown.b) <= 1 + 1e-4
        axes.scatter(*x[inside].T, s=75, facecolors="none", edgecolors="black", linewidths=1.1, label="support vectors")
        figures.plane(axes, x)
        axes.set_title(f"{title}: {shown.support} support vectors")
    figures.boundary(
        left, perceptron.w, perceptron.b, color="dimgrey", linestyle=":", linewidth=2.2, label="perceptron"
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=5, frameon=False)
    a = np.linspace(-2, 2.5, 200)
    hinge.plot(a, np.maximum(0, 1 - a), "k-", linewidth=1.8, label=r"hinge, max(0, 1 - $\alpha$)")
    hinge.plot(a, a < 0, color=figures.MIDDLE, linestyle="--", linewidth=1.8, label="error")
    hinge.set(xlabel=r"$\alpha = y\,(w \cdot x + b)$", ylabel="loss", title="hinge loss")
    hinge.grid(alpha=0.3)
    hinge.legend(frameon=False)
