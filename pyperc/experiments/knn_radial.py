"""Lecture 3.3: the same nearest neighbours, on the two coordinates and on a radial feature designed for the task."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.features import Radial

NEIGHBOURS = 11
Array = NDArray[np.float64]
Map = Callable[[Array], Array]


def rings(n: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """Points x [n, 2] in the square [-1, 1]^2; y = 1 with a probability that depends on the radius alone."""
    x = generator.uniform(-1, 1, (n, 2))
    inside = 1 / (1 + np.exp(25 * (np.linalg.norm(x, axis=1) - 0.7)))
    return x, (generator.random(n) < inside).astype(float)


def votes(x: Array, y: Array, at: Array, feature: Map) -> Array:
    """How many of the K nearest neighbours, in the feature, say 1."""
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(NEIGHBOURS).fit(feature(x), y)
    share: Array = neighbours.predict_proba(feature(at))[:, 1]
    return share * NEIGHBOURS


def run(setup: Setup) -> Result:
    """The test error of both, over several draws of the training points."""
    draws, sizes = (10, (50, 200)) if setup.quick else (50, (50, 100, 200, 400, 800))
    radial = Radial(include_input=False)
    features: dict[str, Map] = {"coordinates": lambda x: x, "radial": lambda x: np.asarray(radial.fit_transform(x))}
    generator = np.random.default_rng(0)
    x_test, y_test = rings(2000, generator)
    least = float(np.mean(y_test != (np.linalg.norm(x_test, axis=1) < 0.7)))

    errors: dict[str, list[float]] = {name: [] for name in features}
    spreads: dict[str, list[float]] = {name: [] for name in features}
    for n in sizes:
        found: dict[str, list[float]] = {name: [] for name in features}
        for _ in range(draws):
            x, y = rings(n, generator)
            for name, feature in features.items():
                predicted = votes(x, y, x_test, feature) > NEIGHBOURS / 2
                found[name].append(float(np.mean(predicted != y_test)))
        for name, values in found.items():
            errors[name].append(float(np.mean(values)))
            spreads[name].append(float(np.std(values)))

    rows = [
        [str(n), *(f"{errors[name][i]:.2%} +- {spreads[name][i]:.2%}" for name in features)]
        for i, n in enumerate(sizes)
    ]
    claims = [
        Claim(
            "for every number of training points the radial feature makes fewer errors",
            all(a > b for a, b in zip(errors["coordinates"], errors["radial"], strict=True)),
        ),
        Claim(
            f"with few points the gain is largest: {errors['coordinates'][0] - errors['radial'][0]:.1%} at {sizes[0]}, "
            f"{errors['coordinates'][-1] - errors['radial'][-1]:.1%} at {sizes[-1]}",
            errors["coordinates"][0] - errors["radial"][0] > errors["coordinates"][-1] - errors["radial"][-1],
        ),
    ]
    x, y = rings(200, np.random.default_rng(1))
    return Result(
        [
            Table(
                ["training points", "(x1, x2)", "x1^2 + x2^2"],
                rows,
                f"test error of {NEIGHBOURS} nearest neighbours, mean and deviation of {draws} draws; "
                f"knowing the rule itself: {least:.2%}",
            )
        ],
        {"sizes": list(sizes), "error": errors, "deviation": spreads, "least": least, "neighbours": NEIGHBOURS},
        claims,
        f"Training points, the votes of their {NEIGHBOURS} nearest neighbours, and the prediction: above with the two "
        "coordinates, below with the radial feature, which does not change under a rotation, as the class does not.",
        lambda figure: _draw(figure, x, y, features),
        (10.0, 6.6),
    )


def _draw(figure: Any, x: Array, y: Array, features: dict[str, Map]) -> None:
    axis = np.linspace(-1, 1, 161)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for row, (name, feature) in zip(figure.subplots(2, 3, sharex=True, sharey=True), features.items(), strict=True):
        counted = votes(x, y, grid, feature).reshape(161, 161)
        extent = (-1, 1, -1, 1)
        figures.populations(row[0], x, y, ("y = 0", "y = 1"))
        image = row[1].imshow(counted, origin="lower", extent=extent, cmap="Greys", vmin=0, vmax=NEIGHBOURS)
        row[2].imshow(counted > NEIGHBOURS / 2, origin="lower", extent=extent, cmap="Greys", vmin=0, vmax=2.5)
        circle = np.linspace(0, 2 * np.pi, 200)
        row[2].plot(0.7 * np.cos(circle), 0.7 * np.sin(circle), "k--", linewidth=1)
        figure.colorbar(image, ax=row[1], label=f"votes for y = 1, of {NEIGHBOURS}")
        for axes, title in zip(row, ("training points", f"votes, {name}", f"prediction, {name}"), strict=True):
            axes.set(title=title, xlim=(-1, 1), ylim=(-1, 1), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
            axes.set_aspect("equal")
        row[0].set_ylabel("$x_2$")
        row[0].legend(loc="upper right", fontsize=8, framealpha=1)
    for axes in row:
        axes.set_xlabel("$x_1$")
