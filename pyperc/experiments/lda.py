"""Lecture 3.2: Gaussian classes with one covariance lead to a sigmoid of a linear function."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.linear_model import LinearDiscriminantAnalysis

M0, M1 = np.array([-0.8, -0.3]), np.array([0.9, 0.6])
S = np.array([[1.0, 0.55], [0.55, 0.8]])
PRIOR = 0.4
"""P(Y = 1)"""
Array = NDArray[np.float64]


def formula(m0: Array, m1: Array, s: Array, prior: float) -> tuple[NDArray[Any], float]:
    """w = (m1 - m0) S^-1, b = (m0 S^-1 m0^T - m1 S^-1 m1^T) / 2 + log P(Y=1) / P(Y=0)."""
    w = np.linalg.solve(s, m1 - m0)
    b = (m0 @ np.linalg.solve(s, m0) - m1 @ np.linalg.solve(s, m1)) / 2 + np.log(prior / (1 - prior))
    return w, float(b)


def density(x: Array, mean: Array, s: Array) -> Array:
    """The Gaussian density at x [n, 2]."""
    far = np.einsum("nd,nd->n", (x - mean) @ np.linalg.inv(s), x - mean)
    value: Array = np.exp(-far / 2) / np.sqrt((2 * np.pi) ** 2 * np.linalg.det(s))
    return value


def posterior(x: Array) -> Array:
    """P(Y = 1 | X = x) by Bayes' law from the two densities."""
    one, zero = density(x, M1, S) * PRIOR, density(x, M0, S) * (1 - PRIOR)
    share: Array = one / (one + zero)
    return share


def draw_points(n: int, generator: np.random.Generator) -> tuple[Array, Array]:
    """n points of the two populations."""
    y = (generator.random(n) < PRIOR).astype(float)
    return np.where(y[:, None] == 1, M1, M0) + generator.normal(size=(n, 2)) @ np.linalg.cholesky(S).T, y


def run(setup: Setup) -> Result:
    """The estimate from more and more points, beside the populations' own w and b."""
    generator = np.random.default_rng(0)
    sizes = (100, 1000, 10_000) if setup.quick else (100, 1000, 10_000, 100_000)
    w, b = formula(M0, M1, S, PRIOR)
    x_test, y_test = draw_points(20_000, generator)
    bayes = float(np.mean((posterior(x_test) > 0.5) != y_test))
    identity = float(np.abs(posterior(x_test) - 1 / (1 + np.exp(-(x_test @ w + b)))).max())

    rows, far, errors, equal = [], [], [], 0.0
    for n in sizes:
        x, y = draw_points(n, generator)
        model = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
        coef, intercept = np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])
        # The lecture's formula on the points' own means, their pooled covariance and their shares.
        m0, m1 = x[y == 0].mean(0), x[y == 1].mean(0)
        centred = x - np.where(y[:, None] == 1, m1, m0)
        own_w, own_b = formula(m0, m1, centred.T @ centred / n, float(y.mean()))
        equal = max(equal, float(np.abs(np.append(coef - own_w, intercept - own_b)).max()))
        far.append(float(np.abs(np.asarray(model.predict_proba(x_test))[:, 1] - posterior(x_test)).max()))
        errors.append(float(np.mean(np.asarray(model.predict(x_test)) != y_test)))
        rows.append(
            [
                f"{n:,} points",
                f"{coef[0]:.4f}",
                f"{coef[1]:.4f}",
                f"{intercept:.4f}",
                f"{far[-1]:.4f}",
                f"{errors[-1]:.2%}",
            ]
        )
    rows.append(["the populations", f"{w[0]:.4f}", f"{w[1]:.4f}", f"{b:.4f}", "", f"{bayes:.2%}"])

    x, y = draw_points(400, np.random.default_rng(1))
    shown = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
    claims = [
        Claim(
            f"Bayes' law on the two Gaussians is sigmoid(w . x + b) with the lecture's w and b: within {identity:.0e}",
            identity < 1e-12,
        ),
        Claim(
            f"the fit is the lecture's formula on the points' means, pooled covariance and shares: within {equal:.0e}",
            equal < 1e-8,
        ),
        Claim(
            f"with more points its posterior comes to that of the populations: within {far[-1]:.4f} everywhere",
            far[-1] < far[0] / 3 and far[-1] < 0.03,
        ),
        Claim(f"and its error to the least possible: {errors[-1]:.2%}, {bayes:.2%}", abs(errors[-1] - bayes) < 0.003),
    ]
    return Result(
        [Table(["", "w_1", "w_2", "b", "largest |posterior - Bayes|", "test error"], rows)],
        {"w": w.tolist(), "b": b, "sizes": list(sizes), "posterior_difference": far, "error": errors, "bayes": bayes},
        claims,
        "Left: two Gaussian populations with one covariance, the posterior P(Y = 1 | X = x) in grey, and the boundary. "
        "Right: along w the populations are Gaussian (bars), and their ratio makes the sigmoid.",
        lambda figure: _draw(figure, x, y, shown),
        (11.0, 4.6),
    )


def _draw(figure: Any, x: Array, y: Array, model: Any) -> None:
    left, right = figure.subplots(1, 2)
    figure.get_layout_engine().set(w_pad=0.12)
    w, b = np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])
    axis = np.linspace(-4.2, 4.2, 169)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    share = np.asarray(model.predict_proba(grid))[:, 1].reshape(169, 169)
    image = left.contourf(axis, axis, share, levels=np.linspace(0, 1, 11), cmap="Greys", alpha=0.7)
    figures.populations(left, x, y, ("Y = 0", "Y = 1"))
    figures.boundary(left, w, b, color="black", linewidth=1.8)
    figures.plane(left, [[-3.6, -3.2], [4.0, 3.6]], 0)
    left.set_title("posterior and boundary")
    left.legend(loc="upper left", fontsize=8, framealpha=1)
    figure.colorbar(image, ax=left, label="P(Y = 1 | X = x)")
    s = x @ w + b
    bins = np.linspace(s.min(), s.max(), 30)
    for value, style in (
        (0, {"color": "white", "hatch": ""}),
        (1, {"color": "silver", "hatch": "///"}),
    ):
        right.hist(s[y == value], bins=bins, density=True, label=f"Y = {value}", edgecolor="black", alpha=0.75, **style)
    line = np.linspace(s.min(), s.max(), 200)
    right.plot(line, 1 / (1 + np.exp(-line)), "k-", linewidth=2, label=r"$\sigma(w \cdot x + b)$")
    right.set(xlabel=r"$w \cdot x + b$", ylabel="density, probability", title="along w", ylim=(0, 1.05))
    right.legend(frameon=False, loc="upper left")
