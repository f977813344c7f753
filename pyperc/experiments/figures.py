"""Strokes that several figures share, told apart by grey level, line and mark."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DARK, MIDDLE, LIGHT = "black", "tab:orange", "tab:blue"

LINES: tuple[dict[str, Any], ...] = (
    {"color": DARK, "linestyle": "-", "marker": "o", "markersize": 4},
    {"color": MIDDLE, "linestyle": "--", "marker": "s", "markersize": 4, "markerfacecolor": "white"},
    {"color": LIGHT, "linestyle": ":", "marker": "^", "markersize": 5},
    {"color": "dimgrey", "linestyle": "-.", "marker": "D", "markersize": 4, "markerfacecolor": "white"},
)
"""For curves of measured points."""


def populations(axes: Any, x: ArrayLike, y: ArrayLike, names: tuple[str, str] = ("y = -1", "y = +1")) -> None:
    """Points x [n, 2]: hollow circles where y <= 0, filled squares where y > 0."""
    x, positive = np.asarray(x), np.asarray(y) > 0
    axes.scatter(
        *x[~positive].T, s=16, facecolors="white", edgecolors="black", linewidths=0.8, label=names[0], zorder=3
    )
    axes.scatter(
        *x[positive].T, s=14, color=MIDDLE, marker="s", edgecolors="black", linewidths=0.4, label=names[1], zorder=3
    )


def boundary(axes: Any, w: ArrayLike, b: float, level: float = 0.0, **style: Any) -> None:
    """The line w . x + b = level in the plane."""
    w = np.asarray(w, dtype=float).ravel()
    axes.axline(w * (level - b) / (w @ w), w * (level - b) / (w @ w) + np.array([-w[1], w[0]]), **style)


def plane(axes: Any, x: ArrayLike, margin: float = 0.1) -> None:
    """Limits around points x [n, 2], and the same scale on both axes."""
    low, high = np.min(np.asarray(x), axis=0), np.max(np.asarray(x), axis=0)
    room = margin * (high - low)
    axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    axes.set(xlabel="$x_1$", ylabel="$x_2$")
    axes.set_aspect("equal", adjustable="box")
