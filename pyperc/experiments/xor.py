"""Lectures 3.1 and 3.3: xor is linearly separable in (u, v, u v), not in (u, v); a network of units computes it."""

import warnings
from itertools import product
from typing import Any

import numpy as np
import torch

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.features import PairProducts
from pyperc.linear_model import Perceptron, from_truth_table

INPUTS = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
XOR, OR = (0, 1, 1, 0), (0, 1, 1, 1)
NAMES: dict[tuple[int, ...], str] = {
    (0, 0, 0, 1): "and",
    (0, 1, 1, 1): "or",
    (0, 1, 1, 0): "xor",
    (1, 0, 0, 1): "not xor",
    (1, 1, 1, 0): "not and",
    (1, 0, 0, 0): "not or",
}
EPOCHS = 100


def learn(table: tuple[int, ...], features: bool) -> Perceptron:
    """The perceptron algorithm on a Boolean function's four lines, at most so many epochs."""
    x = PairProducts([(0, 1)]).fit_transform(INPUTS) if features else INPUTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge is what is shown
        return Perceptron(max_iter=EPOCHS).fit(x, np.array(table) * 2 - 1)


def run(setup: Setup) -> Result:
    """All Boolean functions of two inputs but the constant ones: the perceptron on two features and on three, units."""
    tables = [table for table in product((0, 1), repeat=4) if 0 < sum(table) < 4]
    found: dict[tuple[int, ...], tuple[int, int, int]] = {}
    rows = []
    for table in tables:
        plain, mapped = learn(table, False), learn(table, True)
        outputs = from_truth_table(table)(torch.from_numpy(INPUTS).float()).flatten()
        wrong = [round(4 * model.history_[-1].error) for model in (plain, mapped)]
        found[table] = (wrong[0], wrong[1], int((outputs != torch.tensor(table)).sum()))
        epochs = [
            str(model.n_iter_) if model.history_[-1].changes == 0 else f"over {EPOCHS}" for model in (plain, mapped)
        ]
        cells = [f"{count} wrong, {word} epochs" for count, word in zip(wrong, epochs, strict=True)]
        rows.append(["".join(map(str, table)), NAMES.get(table, ""), *cells, f"{found[table][2]} wrong"])

    unlearnt = {table for table, wrong in found.items() if wrong[0]}
    model = learn(XOR, True)
    w, b = np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])
    claims = [
        Claim("of (u, v), the perceptron learns all but xor and its opposite", unlearnt == {XOR, (1, 0, 0, 1)}),
        Claim("of (u, v, u v), it learns them all", all(wrong[1] == 0 for wrong in found.values())),
        Claim(
            "a network of threshold units built from the truth table computes each",
            all(wrong[2] == 0 for wrong in found.values()),
        ),
    ]
    return Result(
        [
            Table(
                ["00 01 10 11", "", "(u, v)", "(u, v, u v)", "units"],
                rows,
                "Boolean functions f(u, v), by their values",
            )
        ],
        {
            "wrong": {
                "".join(map(str, table)): dict(zip(("plain", "mapped", "units"), wrong, strict=True))
                for table, wrong in found.items()
            },
            "xor": {"w": w.tolist(), "b": b, "epochs": model.n_iter_},
        },
        claims,
        "Left: no line separates xor's four points; the one of or leaves one of them wrong. Middle: with the product "
        "u v as a third coordinate a plane does. Right: what that plane is in (u, v): a curve.",
        lambda figure: _draw(figure, learn(OR, False), w, b),
        (13.0, 4.4),
    )


def _draw(figure: Any, plain: Any, w: Any, b: float) -> None:
    y = np.array(XOR)
    figure.get_layout_engine().set(h_pad=0.2)
    cells = figure.add_gridspec(1, 3, width_ratios=[1, 1.25, 1])
    flat, space, curve = (
        figure.add_subplot(cell, projection=projection)
        for cell, projection in zip(cells, (None, "3d", None), strict=True)
    )
    axis = np.linspace(-0.5, 1.5, 101)
    u, v = np.meshgrid(axis, axis)
    tried, offset = np.asarray(plain.coef_)[0], float(np.asarray(plain.intercept_)[0])
    for axes, side in ((flat, tried[0] * u + tried[1] * v + offset), (curve, w[0] * u + w[1] * v + w[2] * u * v + b)):
        axes.contourf(u, v, side >= 0, levels=[-0.5, 0.5, 1.5], colors=["white", "lightgrey"])
        axes.contour(u, v, side, levels=[0], colors="black", linewidths=1.5)
        for value, marker, colour in ((0, "o", "white"), (1, "s", figures.MIDDLE)):
            axes.plot(
                *INPUTS[y == value].T,
                marker,
                color=colour,
                markeredgecolor="black",
                markersize=13,
                linestyle="",
                label=f"xor = {value}",
            )
        axes.set(xlabel="u", ylabel="v", xlim=(-0.5, 1.5), ylim=(-0.5, 1.5), xticks=[0, 1], yticks=[0, 1])
        axes.set_aspect("equal")
    flat.set_title("(u, v): a line")
    curve.set_title("(u, v, u v), seen in (u, v)")
    curve.legend(loc="upper center", ncols=2, fontsize=8, framealpha=1)
    lifted = np.column_stack([INPUTS, INPUTS.prod(1)])
    corner = np.array([-0.2, 1.2])
    pu, pv = np.meshgrid(corner, corner)
    space.plot_surface(pu, pv, -(w[0] * pu + w[1] * pv + b) / w[2], color="lightgrey", alpha=0.4, edgecolor="grey")
    for value, marker, colour in ((0, "o", "white"), (1, "s", figures.MIDDLE)):
        space.scatter(*lifted[y == value].T, marker=marker, color=colour, edgecolors="black", s=110, depthshade=False)
    for point in lifted:
        space.plot(*zip((*point[:2], 0), point, strict=True), color="grey", linewidth=0.8, linestyle=":")
    space.set(
        xlabel="u", ylabel="v", zlabel="u v", xticks=[0, 1], yticks=[0, 1], zticks=[0, 1], title="(u, v, u v): a plane"
    )
    space.view_init(elev=18, azim=-58)
    space.set_box_aspect(None, zoom=1.1)
