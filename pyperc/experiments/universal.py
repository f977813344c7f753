"""Lecture 3.4: a sum of shifted activations comes as near to a continuous function as one likes."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pyperc
from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table

Array = NDArray[np.float64]
STEEPNESS = 8.0
"""Of a sigmoid step, in units of the inverse distance of two steps: steep enough for a step, smooth enough to blend."""


def psi(x: Tensor) -> Tensor:
    """The function that is approximated, continuous on [0, 1]."""
    return torch.sin(2 * torch.pi * x) + 0.5 * torch.sin(3 * torch.pi * x * x) + 0.3 * x


def relu_network(knots: Tensor) -> pyperc.MLP:
    """psi's interpolation at K + 1 equidistant knots as a network [1, K, 1].

    Unit k is relu(x - a_k); its output weight is the change of slope at its knot a_k, and the output's bias is
    psi(a_0), so that the sum passes through psi at every knot.
    """
    values = psi(knots)
    slopes = values.diff() / knots.diff()
    changes = torch.cat([slopes[:1], slopes.diff()])
    return _network("relu", torch.ones_like(changes), -knots[:-1], changes, values[0])


def sigmoid_network(knots: Tensor) -> pyperc.MLP:
    """A network [1, K, 1] that rises by psi(a_k) - psi(a_k-1) around the middle of each of the K intervals."""
    values, width = psi(knots), knots[1] - knots[0]
    middles = (knots[1:] + knots[:-1]) / 2
    steepness = torch.full_like(middles, STEEPNESS) / width
    return _network("sigmoid", steepness, -steepness * middles, values.diff(), values[0])


def _network(activation: str, w: Tensor, b: Tensor, omega: Tensor, offset: Tensor) -> pyperc.MLP:
    """x -> omega . f(w x + b) + offset."""
    network = pyperc.MLP([1, len(w), 1], activation=activation, dtype=torch.float64)
    parameters = (w[:, None], b, omega[None], offset[None])
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), parameters, strict=True):
            parameter.copy_(value)
    return network


def run(setup: Setup) -> Result:
    """The largest error on [0, 1] for K = 1, 2, 4, ... units, of relu and of sigmoid."""
    counts = [2**i for i in range(8 if setup.quick else 11)]
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
    target = psi(grid)
    build = {"relu": relu_network, "sigmoid": sigmoid_network}
    errors: dict[str, list[float]] = {name: [] for name in build}
    for count in counts:
        knots = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        for name, network in build.items():
            with torch.no_grad():
                errors[name].append(float((network(knots)(grid) - target).abs().max()))

    curvature = _largest_second_derivative()
    bounds = [curvature / (8 * count * count) for count in counts]
    rows = [
        [str(count), f"{relu:.6f}", f"{bound:.6f}", f"{sigmoid:.6f}"]
        for count, relu, bound, sigmoid in zip(counts, errors["relu"], bounds, errors["sigmoid"], strict=True)
    ]
    finest = [one[-2] / one[-1] for one in errors.values()]
    claims = [
        Claim(
            "from K = 4 on, every doubling of K lowers the error, for relu and for sigmoid",
            all(b < a for one in errors.values() for a, b in pairwise(one[2:])),
        ),
        Claim(
            "the error of relu stays under max |psi''| / (8 K^2)",
            all(error <= bound * (1 + 1e-9) for error, bound in zip(errors["relu"], bounds, strict=True)),
        ),
        Claim(
            f"at the end a doubling of K divides the error by 4 for relu and by 2 for sigmoid: "
            f"{finest[0]:.2f}, {finest[1]:.2f}",
            3.5 < finest[0] < 4.5 and 1.7 < finest[1] < 2.5,
        ),
    ]
    return Result(
        [
            Table(
                ["K", "error, relu", "its bound", "error, sigmoid"],
                rows,
                "largest |psi(x) - omega . f(w x + b)| on [0, 1], one hidden layer of K units built by hand",
            )
        ],
        {"K": counts, "error": errors, "relu_bound": bounds},
        claims,
        "Left: the sum of relu units being built for K = 8: each new unit bends the line at its knot, so that it then "
        "passes through the next point of the function. Middle: the terms of the units. Right: the largest error falls "
        "as 1/K^2 for relu and as 1/K for sigmoid.",
        lambda figure: _draw(figure, counts, errors),
        (13.0, 4.2),
    )


def _largest_second_derivative() -> float:
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(psi(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return float(second.abs().max())


def _draw(figure: Any, counts: list[int], errors: dict[str, list[float]]) -> None:
    building, terms, falling = figure.subplots(1, 3)
    line, nine = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (1001, 9))
    _, a, omega, offset = (parameter.detach() for parameter in relu_network(nine).parameters())
    units = omega * torch.relu(line[:, None] + a)
    x, parts, sums = line.numpy(), units.numpy(), (offset + units.cumsum(1)).numpy()
    for axes in (building, terms):
        axes.axhline(0, color="lightgrey", linewidth=0.8)
    greys = np.linspace(0.75, 0.15, 8)
    for k in (1, 2, 3, 4, 6):
        building.plot(x, sums[:, k - 1], color="dimgrey", linestyle="--", linewidth=1)
        at, height = _label(x, sums[:, k - 1])
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        building.text(at, height, f"{k}", fontsize=9, ha="center", va="center", bbox=box)
    building.plot(x, psi(line).numpy(), color=figures.MIDDLE, linewidth=3, alpha=0.7, label=r"$\psi$")
    building.plot(x, sums[:, -1], color="black", linewidth=1.2, label="all 8 units")
    building.plot(nine.numpy(), psi(nine).numpy(), "ko", markersize=4)
    building.set(ylim=(-2.4, 2.6), xlabel="x", ylabel="sum", title="the first 1, 2, 3, 4, 6 units, and all 8")
    building.legend(frameon=False, loc="lower left")
    for k in range(8):
        terms.plot(x, parts[:, k], color=str(greys[k]), linestyle=("-", "--", ":", "-.")[k % 4], linewidth=1.4)
    terms.set(xlabel="x", ylabel="term", title=r"the 8 terms $\omega_k\,$relu$(x - a_k)$")
    for (name, error), style, power in zip(errors.items(), figures.LINES, (2, 1), strict=False):
        falling.plot(counts, error, label=name, **style)
        at, above = (counts[-3], error[-3] * 2.2) if power == 1 else (counts[-4], error[-4] / 6)
        falling.text(at, above, f"like 1/K{'²' * (power == 2)}", ha="center" if power == 1 else "right")
    falling.set(xscale="log", yscale="log", xlabel="hidden units K", ylabel="largest error on [0, 1]", title="error")
    falling.grid(alpha=0.3)
    falling.legend(frameon=False)


def _label(x: Array, y: Array) -> tuple[float, float]:
    """Where a partial sum is about to leave the figure, or its end."""
    (outside,) = ((y > 2.3) | (y < -2.1)).nonzero()
    at = int(outside[0]) if len(outside) else len(x) - 20
    return float(x[at]), float(y[at])
