"""Lecture 3.5: gradient descent into local minima, from several starts and with several eta."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table

STARTS = ((-1.7, 1.8), (-0.3, 1.9), (1.8, 1.5), (-1.9, -0.4), (0.25, -1.9), (1.9, -0.6))
ETAS = (0.01, 0.1, 0.35, 0.8)
SHOWN = 25
"""Steps of the paths with several eta that are drawn."""


def landscape(w: Tensor) -> Tensor:
    """The loss at w [*, 2]: a bowl with three hollows and a hill, so that there are several local minima."""
    loss = 0.15 * w.square().sum(-1)
    for depth, width, at in (
        (1.5, 0.6, (-1.0, 0.9)),
        (1.1, 0.5, (1.1, 0.8)),
        (1.3, 0.7, (0.5, -1.1)),
        (-0.9, 0.5, (-0.1, 0.1)),
    ):
        loss = loss - depth * torch.exp(-(w - w.new_tensor(at)).square().sum(-1) / (2 * width**2))
    return loss


class Path(NamedTuple):
    """The way from one start with one eta."""

    start: tuple[float, float]
    eta: float
    w: Tensor
    """[steps + 1, 2]"""
    loss: Tensor
    """[steps + 1]"""

    @property
    def slope(self) -> float:
        """|grad| at the end."""
        return float(_gradient(self.w[-1]).norm())

    @property
    def never_rose(self) -> bool:
        return bool((self.loss.diff() <= 1e-12).all())


def _gradient(w: Tensor) -> Tensor:
    w = w.detach().requires_grad_()
    return torch.autograd.grad(landscape(w).sum(), w)[0]


def descend(start: tuple[float, float], eta: float, steps: int) -> Path:
    """w <- w - eta grad L(w), so many times."""
    w = [torch.tensor(start, dtype=torch.float64)]
    for _ in range(steps):
        w.append(w[-1] - eta * _gradient(w[-1]))
    path = torch.stack(w)
    return Path(start, eta, path, landscape(path))


def run(setup: Setup) -> Result:
    """Six starts with eta = 0.1, and one start with four eta."""
    steps = 150 if setup.quick else 300
    by_start = [descend(start, 0.1, steps) for start in STARTS]
    by_eta = [descend(STARTS[3], eta, steps) for eta in ETAS]
    minima = _distinct([path.w[-1] for path in by_start])
    curvature = _largest_curvature()

    # The step goes to the minimum of L(w0) + grad L(w0) . (w - w0) + |w - w0|^2 / (2 eta), wherever L itself goes.
    w0, eta = by_start[0].w[0], 0.1
    w1 = by_start[0].w[1].clone().requires_grad_()
    model = landscape(w0) + _gradient(w0) @ (w1 - w0) + (w1 - w0).square().sum() / (2 * eta)
    model_slope = float(torch.autograd.grad(model, w1)[0].norm())

    rows = [
        [
            "({:.2f}, {:.2f})".format(*path.start),
            f"{path.eta:g}",
            "({:.3f}, {:.3f})".format(*path.w[-1].tolist()),
            f"{path.loss[-1]:.5f}",
            f"{path.slope:.1e}",
            "no" if path.never_rose else "yes",
        ]
        for path in (*by_start, *by_eta)
    ]
    claims = [
        Claim(
            f"different starts end in different local minima: {len(minima)} of them, each with |grad| < 1e-6",
            len(minima) >= 3 and max(path.slope for path in by_start) < 1e-6,
        ),
        Claim(
            f"while eta < 2 / {curvature:.2f}, the largest curvature of the loss, no step makes it rise",
            all(path.never_rose for path in (*by_start, *by_eta) if path.eta < 2 / curvature),
        ),
        Claim(
            f"a larger eta, {ETAS[-1]}, never settles: |grad| = {by_eta[-1].slope:.2g} after {steps} steps",
            by_eta[-1].slope > 0.1 and not by_eta[-1].never_rose,
        ),
        Claim(
            f"a step ends where the local quadratic model is least: its gradient there is {model_slope:.0e}",
            model_slope < 1e-12,
        ),
    ]
    numbers: dict[str, Any] = {
        "steps": steps,
        "largest_curvature": curvature,
        "minima": [minimum.tolist() for minimum in minima],
        "paths": [
            {
                "start": list(path.start),
                "eta": path.eta,
                "end": path.w[-1].tolist(),
                "loss": float(path.loss[-1]),
                "gradient": path.slope,
                "never_rose": path.never_rose,
            }
            for path in (*by_start, *by_eta)
        ],
    }
    return Result(
        [Table(["start", "eta", f"after {steps} steps", "loss", "|grad|", "ever rose"], rows)],
        numbers,
        claims,
        "Left: from different starts, the same rule ends in different local minima. Middle: from one start, a small "
        "eta creeps, a moderate one arrives, a large one jumps about. Right: the loss along these paths.",
        lambda figure: _draw(figure, by_start, by_eta),
        (13.0, 4.4),
    )


def _distinct(points: Sequence[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    for point in points:
        if all((point - other).norm() > 1e-3 for other in found):
            found.append(point)
    return found


def _largest_curvature() -> float:
    """The largest eigenvalue of the loss's Hessian on a grid of the square that is drawn."""
    axis = torch.linspace(-2.2, 2.2, 45, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).requires_grad_()
    slope = torch.autograd.grad(landscape(grid).sum(), grid, create_graph=True)[0]
    rows = [torch.autograd.grad(slope[:, i].sum(), grid, retain_graph=True)[0] for i in (0, 1)]
    return float(torch.linalg.eigvalsh(torch.stack(rows, 1)).max())


def _draw(figure: Any, by_start: Sequence[Path], by_eta: Sequence[Path]) -> None:
    starts, etas, losses = figure.subplots(1, 3)
    axis = torch.linspace(-2.2, 2.2, 121, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    (u, v), height = grid.movedim(-1, 0).numpy(), landscape(grid).numpy()
    levels = np.linspace(float(height.min()), 1.2, 16)
    for axes in (starts, etas):
        axes.contourf(u, v, height, levels=levels, cmap="Greys_r", alpha=0.45, extend="max")
        axes.contour(u, v, height, levels=levels, colors="grey", linewidths=0.4)
        axes.set(xlabel="$w_1$", ylabel="$w_2$", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
        axes.set_aspect("equal", adjustable="box")
    for i, path in enumerate(by_start):
        starts.plot(*path.w.T.numpy(), "k.-", markersize=3, linewidth=0.9)
        starts.plot(
            *path.start, "o", color="white", markeredgecolor="black", markersize=7, label=None if i else "start"
        )
        starts.plot(
            *path.w[-1].tolist(),
            "*",
            color=figures.MIDDLE,
            markeredgecolor="black",
            markersize=13,
            label=None if i else "end",
        )
    starts.set_title("six starts, $\\eta$ = 0.1")
    starts.legend(loc="lower left")
    for path, style in zip(by_eta, figures.LINES, strict=True):
        etas.plot(
            *path.w[: SHOWN + 1].T.numpy(), **{**style, "markersize": 3.5}, linewidth=1, label=f"$\\eta$ = {path.eta:g}"
        )
        losses.plot(
            path.loss[: SHOWN + 1].numpy(), **{**style, "markersize": 3}, linewidth=1, label=f"$\\eta$ = {path.eta:g}"
        )
    etas.plot(*by_eta[0].start, "o", color="white", markeredgecolor="black", markersize=7)
    etas.set_title(f"one start, four $\\eta$, {SHOWN} steps")
    losses.set(xlabel="step", ylabel="loss", title="the same paths")
    losses.grid(alpha=0.3)
    losses.set_ylim(top=1.35)
    losses.legend(frameon=False, ncols=2, loc="upper center")
