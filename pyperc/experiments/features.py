"""Lecture 3.3: 8 against the other digits by a perceptron; random products of pixels make it separable."""

import warnings
from typing import Any

import numpy as np

from pyperc.datasets import Dataset
from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.features import RandomPairProducts
from pyperc.linear_model import Perceptron


def errors(data: Dataset, products: int, seed: int, epochs: int, over: int) -> tuple[float, float]:
    """Train and test error of a perceptron on the pixels and so many products: the mean over the last epochs."""
    features = RandomPairProducts(products, random_state=seed) if products else None
    model = Perceptron(max_iter=epochs, features=features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few epochs are not meant to reach the end
        model.fit(data.x_train, data.y_train, validation=(data.x_test, data.y_test))
    # Where it has reached the end, the epochs that are missing would repeat the last one.
    last = [*model.history_, *[model.history_[-1]] * (epochs - len(model.history_))][-over:]
    return float(np.mean([e.error for e in last])), float(np.mean([e.validation_error for e in last]))


def run(setup: Setup) -> Result:
    """Error against the number of products: a mean over several draws of them."""
    data = setup.one_against(8)
    few = len(data.y_train) < 10_000
    counts = (
        (0, 100, 1000)
        if setup.quick
        else (0, 50, 100, 200, 500, 1000, 2000)
        if few
        else (0, 250, 500, 1000, 2000, 4000)
    )
    draws = 2 if setup.quick else 10 if few else 3
    # With few images, single changes move the error up and down: so the mean of some epochs.
    epochs, over = (40, 20) if few else (5, 1)
    # Without products there is nothing to draw.
    found = [
        np.array([errors(data, count, seed, epochs, over) for seed in range(draws if count else 1)]) for count in counts
    ]
    train, test = ([float(one[:, side].mean()) for one in found] for side in (0, 1))
    when = f"mean of epochs {epochs - over + 1} to {epochs}" if few else f"after {epochs} epochs"
    when += f", {draws} draws of the products"
    rows = [[f"{count:,}", f"{a:.2%}", f"{b:.2%}"] for count, a, b in zip(counts, train, test, strict=True)]
    claims = [
        Claim(
            f"the training error falls with the number of products: {train[0]:.2%} with none, {train[-1]:.2%} with "
            f"{counts[-1]:,}",
            train[-1] < train[0] / 1.5 and _falls(counts, train),
        ),
        Claim(
            f"and so does the test error: {test[0]:.2%}, {test[-1]:.2%}",
            test[-1] < test[0] / 1.5 and _falls(counts, test),
        ),
    ]
    return Result(
        [
            Table(
                ["products", "train_error", "test_error"],
                rows,
                f"8 against the rest, {data.features} pixels and random products of two; {when}",
            )
        ],
        {"products": list(counts), "train_error": train, "test_error": test, "draws": draws},
        claims,
        f"The error of a perceptron that tells 8 from the other digits ({when}): products of two pixels, taken at "
        "random, raise its capacity.",
        lambda figure: _draw(figure, counts, train, test, setup.label),
        (6.5, 4.2),
    )


def _falls(counts: tuple[int, ...], values: list[float]) -> bool:
    """Whether a larger count goes with a smaller value, as a whole: single steps may go the other way by chance."""
    ranks = np.argsort(np.argsort(values))
    return bool(np.corrcoef(np.arange(len(counts)), ranks)[0, 1] < -0.7)


def _draw(figure: Any, counts: tuple[int, ...], train: list[float], test: list[float], label: str) -> None:
    axes = figure.subplots()
    for values, name, style in ((train, "train", figures.LINES[0]), (test, "test", figures.LINES[1])):
        axes.plot(counts, [100 * value for value in values], **style, label=name)
    axes.set(
        xlabel="products of pixels taken at random", ylabel="misclassified, %", title=f"8 against the rest, {label}"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
