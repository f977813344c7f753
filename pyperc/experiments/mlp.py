"""Lectures 3.4 and 3.6: a multi-layer perceptron reads digits, trained with the plain gradient step."""

import copy
from typing import Any

import torch
from torch import Tensor

import pyperc
from pyperc.datasets import Dataset
from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table
from pyperc.train import Epoch, train

ACTIVATIONS = ("relu", "tanh", "identity")
BATCH_SIZE = 32


def collapse(model: pyperc.MLP) -> tuple[Tensor, Tensor]:
    """The one layer (w, b) that two layers with f = identity amount to: w = w(2) w(1), b = w(2) b(1) + b(2)."""
    w1, b1, w2, b2 = (parameter.detach() for parameter in model.parameters())
    return w2 @ w1, w2 @ b1 + b2


def run(setup: Setup) -> Result:
    """The same network with three activations, identity among them, which leaves it affine."""
    data = setup.data.standardised()
    hidden = 128
    # The loss's curvature grows with the number of standardised pixels, and the step that it bears falls.
    lr = 0.3 if data.features < 100 else 0.05
    epochs = 10 if setup.quick or len(data.y_train) > 10_000 else 20
    curves: dict[str, list[Epoch]] = {}
    models: dict[str, pyperc.MLP] = {}
    for name in ACTIVATIONS:
        torch.manual_seed(0)
        models[name] = pyperc.MLP([data.features, hidden, data.classes], activation=name)
        curves[name] = train(models[name], data, epochs=epochs, batch_size=BATCH_SIZE, lr=lr)
    affine, x = copy.deepcopy(models["identity"]).double(), data.x_test.double()
    with torch.no_grad():
        outputs, single = affine(x), pyperc.functional.linear(x, *collapse(affine))
    one_layer = float((outputs - single).abs().max() / outputs.abs().max())

    rows = [
        [
            str(epoch.epoch - 1),
            f"{epoch.loss:.5f}",
            f"{epoch.train_error:.2%}",
            f"{epoch.test_error:.2%}",
            *(f"{curves[name][i].test_error:.2%}" for name in ACTIVATIONS[1:]),
        ]
        for i, epoch in enumerate(curves["relu"])
    ]
    end = {name: curve[-1] for name, curve in curves.items()}
    claims = [
        Claim(
            f"the loss falls from {curves['relu'][0].loss:.3f} to {end['relu'].loss:.5f}",
            end["relu"].loss < curves["relu"][0].loss / 5,
        ),
        Claim(
            "with a non-linear f the network fits the training images better than with an affine one: loss "
            + ", ".join(f"{name} {epoch.loss:.4f}" for name, epoch in end.items()),
            max(end["relu"].loss, end["tanh"].loss) < end["identity"].loss,
        ),
        Claim(
            f"with an affine f the network is one affine mapping: collapsed into one layer, its outputs differ by "
            f"{one_layer:.0e} of the largest",
            one_layer < 1e-12,
        ),
    ]
    return Result(
        [
            Table(
                ["epoch", "loss", "train_error", "test_error", "test_error, tanh", "test_error, identity"],
                rows,
                f"{data.features}-{hidden}-{data.classes}, relu, w <- w - {lr} dw on batches of {BATCH_SIZE}",
            )
        ],
        {
            "sizes": [data.features, hidden, data.classes],
            "lr": lr,
            "batch_size": BATCH_SIZE,
            "curve": {
                name: [
                    {"loss": epoch.loss, "train_error": epoch.train_error, "test_error": epoch.test_error}
                    for epoch in curve
                ]
                for name, curve in curves.items()
            },
            "collapsed_difference": one_layer,
        },
        claims,
        "Left: the loss, epoch by epoch; identity leaves the network affine, and its hidden layer does not help it. "
        "Middle: test images misread. Right: the test images that the relu network misreads (label, and what it read).",
        lambda figure: _draw(figure, curves, models["relu"], data, setup.data.x_test),
        (13.0, 4.2),
    )


def _draw(figure: Any, curves: dict[str, list[Epoch]], model: pyperc.MLP, data: Dataset, pixels: Tensor) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=[2, 1])
    loss, error = left.subplots(1, 2)
    for (name, curve), style in zip(curves.items(), figures.LINES, strict=False):
        epochs = [epoch.epoch - 1 for epoch in curve]
        loss.plot(epochs, [epoch.loss for epoch in curve], **style, label=name)
        error.plot(epochs, [100 * epoch.test_error for epoch in curve], **style, label=name)
    loss.set(xlabel="epoch", ylabel="mean cross-entropy of the training batches", yscale="log", title="loss")
    error.set(xlabel="epoch", ylabel="misclassified test images, %", title="error")
    error.set_ylim(bottom=0)
    for axes in (loss, error):
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    with torch.no_grad():
        read = model(data.x_test).argmax(1)
    wrong = (read != data.y_test).nonzero().flatten()[:12].tolist()
    side = round(pixels.shape[1] ** 0.5)
    right.suptitle("misread by the relu network", fontsize="medium")
    for axes, index in zip(right.subplots(3, 4).flat, [*wrong, *[None] * (12 - len(wrong))], strict=True):
        axes.set_axis_off()
        if index is not None and side * side == pixels.shape[1]:
            axes.imshow(pixels[index].reshape(side, side).numpy(), cmap="Greys")
            axes.set_title(f"{data.y_test[index]}, read {read[index]}", fontsize=8)
