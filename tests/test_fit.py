"""Training over epochs: by value against the plain loop, from every source; when it ends; bad input."""

from __future__ import annotations

import copy
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import QUIET, assert_same, network, seeded, some_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyperc
from pyperc.fit import Epoch, History, fit

MODULE = sys.modules["pyperc.fit"]


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, loss, optimizer, epochs: int) -> list[float]:
    """The losses of the epochs of the loop that one would write."""
    generator, curve = seeded(), []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x), generator=generator).split(16):
            optimizer.zero_grad()
            value = loss(model(x[batch]), y[batch])
            value.backward()
            optimizer.step()
            total += value.item() * len(batch)
        curve.append(total / len(x))
    return curve


# The loop


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"lr": 0.1}),
        ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        ("adam", {"lr": 0.01}),
        ("adamw", {"lr": 0.01}),
    ],
    ids=["sgd", "nesterov", "adam", "adamw"],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_epochs_are_those_of_the_plain_loop(name, options, loss) -> None:
    x, y = some_data()
    target = y if loss == "cross_entropy" else F.one_hot(y, 3).double()
    model = network()
    other = pyperc.unfuse(copy.deepcopy(model))
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = F.cross_entropy if loss == "cross_entropy" else F.mse_loss
    curve = plain_loop(other, x, target, reference, optimizer(other.parameters(), **options), 3)
    history = QUIET(model, x, target, 3, 16, loss, name, generator=seeded(), **options)
    assert_same(model, other, 1e-12)
    np.testing.assert_allclose([point.loss for point in history], curve, rtol=1e-12)
    assert [point.epoch for point in history] == [1, 2, 3]
    assert history.stopped == "epochs"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_any_network_any_loss_and_any_optimizer() -> None:
    x, y = some_data()

    def smooth(scores: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(scores, F.one_hot(target, 3).double())

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.one(x) * self.two(x).sigmoid()

    model = Gated().double()
    other = copy.deepcopy(model)
    curve = plain_loop(other, x, y, smooth, torch.optim.RMSprop(other.parameters(), lr=0.01), 2)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    history = QUIET(model, x, y, 2, 16, smooth, optimizer, generator=seeded(), validation=(x, y))
    assert_same(model, other, 1e-12)
    np.testing.assert_allclose([point.loss for point in history], curve, rtol=1e-12)
    expected = smooth(model.eval()(x), y).item()
    assert history[-1].validation_loss == pytest.approx(expected, rel=1e-12)
    assert history[-1].validation_error is None


def test_the_seed_decides_the_order() -> None:
    x, y = some_data()
    torch.manual_seed(3)
    first = QUIET(network(), x, y, 2, 16)
    curves = []
    for seed in (3, 4):
        model = network()
        torch.manual_seed(seed)
        curves.append([point.loss for point in QUIET(model, x, y, 2, 16)])
    assert curves[0] != curves[1]
    torch.manual_seed(3)
    unshuffled = [QUIET(network(), x, y, 1, 16, shuffle=False)[0].loss for _ in range(2)]
    assert unshuffled[0] == unshuffled[1]
    assert first[0].seconds > 0


def test_validation_by_value_and_the_mode() -> None:
    x, y = some_data()
    model = network(dropout=0.5).eval()
    history = QUIET(model, x, y, 2, 16, lr=0.1, validation=(x[:20], y[:20]))
    assert not model.training
    scores = model(x[:20])
    assert history[-1].validation_loss == pytest.approx(F.cross_entropy(scores, y[:20]).item(), rel=1e-12)
    assert history[-1].validation_error == pytest.approx((scores.argmax(1) != y[:20]).double().mean().item())
    assert history.best == min(history, key=lambda point: point.validation_loss)
    loader = QUIET(network(), x, y, 1, 16, shuffle=False, validation=DataLoader(TensorDataset(x, y), 7))
    assert loader[0].validation_loss == pytest.approx(
        QUIET(network(), x, y, 1, 16, shuffle=False, validation=(x, y))[0].validation_loss, rel=1e-12
    )


def test_ignored_samples_are_no_errors() -> None:
    x, y = some_data()
    model, kept = network(), y != 2
    history = QUIET(model, x, y, 2, 25, lr=0.1, ignore_index=2, validation=(x, y))
    wrong = (model(x)[kept].argmax(1) != y[kept]).double().mean()
    assert history[-1].validation_error == pytest.approx(wrong.item())


@pytest.mark.parametrize("loss", ["logistic", "hinge", "squared_hinge"])
def test_two_classes_by_their_sign(loss) -> None:
    x, y = some_data()
    signs = torch.where(y == 0, -1, 1)
    model = network(out=1)
    history = QUIET(model, x, signs, 30, 16, loss, "adam", lr=0.05, validation=(x.numpy(), signs.numpy()))
    wrong = ((model(x)[:, 0] >= 0) != (signs > 0)).double().mean()
    assert history[-1].validation_error == pytest.approx(wrong.item())
    assert wrong < 0.1


# Sources


def sources(tmp_path, x: Tensor, y: Tensor):
    """The same samples, however they come."""
    path = tmp_path / "x.npy"
    np.save(path, x.numpy())
    mapped = np.load(path, mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    return {
        "numpy": (x.numpy(), y.numpy()),
        "memmap": (mapped, y.numpy().astype(np.uint8)),
        "lists": (x.tolist(), y.tolist()),
        "columns of a table": (torch.cat([x, x], 1)[:, :5], y.int()),
        "transposed": (x.t().contiguous().t(), y),
        "images": (x.reshape(len(x), 5, 1), y),
    }


def test_every_source_gives_the_same_bits(tmp_path) -> None:
    x, y = some_data()
    expected = network()
    losses = [p.loss for p in QUIET(expected, x, y, 2, 16, "cross_entropy", "adam", generator=seeded())]
    for name, (X, Y) in sources(tmp_path, x, y).items():
        model = network()
        history = QUIET(model, X, Y, 2, 16, "cross_entropy", "adam", generator=seeded())
        assert [point.loss for point in history] == losses, name
        assert_same(model, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_what_its_batches_would(workers) -> None:
    x, y = some_data()
    order = torch.randperm(50, generator=seeded())
    expected = network()
    losses = [p.loss for p in QUIET(expected, x[order], y[order], 1, 16, lr=0.1, shuffle=False)]
    model = network()
    loader = DataLoader(TensorDataset(x, y), 16, sampler=order.tolist(), num_workers=workers)
    assert [point.loss for point in QUIET(model, loader, epochs=1, lr=0.1)] == pytest.approx(losses, rel=1e-12)
    assert_same(model, expected, 1e-12)


def test_other_dtypes_are_the_models() -> None:
    x, y = some_data(torch.float32)
    expected, model = network(torch.float32), network(torch.float32)
    QUIET(expected, x, y, 2, 16, generator=seeded())
    QUIET(model, x.double().numpy(), y, 2, 16, generator=seeded())
    assert_same(model, expected, 1e-6)


def test_bytes_are_scaled() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 2, 3), dtype=np.uint8)
    y = torch.arange(60) % 3
    models = [pyperc.MLP([6, 8, 3], dtype=torch.float64) for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    floats = torch.from_numpy(images).double().flatten(1) / 255
    loader = DataLoader(TensorDataset(torch.from_numpy(images), y), 16)
    histories = [
        QUIET(models[0], floats, y, 2, 16, lr=0.5, shuffle=False, validation=(floats, y)),
        QUIET(models[1], images, y, 2, 16, lr=0.5, shuffle=False, validation=(images, y)),
        QUIET(models[2], loader, epochs=2, lr=0.5, validation=loader),
    ]
    for model, history in zip(models[1:], histories[1:], strict=True):
        assert_same(model, models[0], 1e-12)
        for point, expected in zip(history, histories[0], strict=True):
            assert point[:4] == pytest.approx(expected[:4], rel=1e-12)


# When to stop


def test_early_stopping_puts_the_best_epoch_back() -> None:
    x, y = some_data()
    torch.manual_seed(1)
    held_out = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))
    model, states = network(), []
    settings = {"lr": 0.5, "validation": held_out, "generator": seeded()}
    history = QUIET(
        model,
        x,
        y,
        200,
        16,
        patience=3,
        callbacks=[lambda _: states.append(copy.deepcopy(model.state_dict()))],
        **settings,
    )
    assert history.stopped == "early stopping"
    assert len(history) == history.best.epoch + 3 < 200
    for name, value in states[history.best.epoch - 1].items():
        assert torch.equal(model.state_dict()[name], value)
    assert QUIET(network(), x, y, 5, 16, patience=1, min_delta=math.inf).stopped == "early stopping"


def test_a_callback_ends_it_and_a_scheduler_takes_its_steps() -> None:
    x, y = some_data()
    seen = []
    history = QUIET(network(), x, y, 9, callbacks=[lambda h: seen.append(len(h)), lambda h: len(h) == 2])
    assert (seen, history.stopped) == ([1, 2], "callback")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1e9),
    ]
    QUIET(model, x, y, 2, optimizer=optimizer, callbacks=schedulers)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * 0.01)


def test_a_loss_that_is_no_number_ends_it() -> None:
    x, y = some_data()
    x[30, 2] = math.nan
    model = network()
    with pytest.raises(FloatingPointError, match="nan"):
        QUIET(model, x, y, 2, 16, shuffle=False)
    expected = network()
    QUIET(expected, x[:16], y[:16], 1, 16, shuffle=False)
    assert_same(model, expected, 1e-12)


# What is told


def test_a_line_for_each_epoch(capsys, tmp_path) -> None:
    x, y = some_data()
    path = tmp_path / "run.pt"
    fit(network(), x, y, 2, 16, validation=(x, y), checkpoint=path)
    printed = capsys.readouterr()
    number = r"\d+\.\d+"
    assert re.fullmatch(
        "".join(
            rf"epoch {i}/2  loss {number}  validation loss {number}  error {number}%  {number} s\n" for i in (1, 2)
        ),
        printed.err,
    )
    assert printed.out == ""
    fit(network(), x, y, 2, 16, checkpoint=path)
    assert capsys.readouterr().err == f"goes on from {path}, after 2 epochs and 0 batches\n"
    QUIET(network(), x, y, 2, 16)
    assert capsys.readouterr().err == ""


def test_a_bar_where_somebody_sees_it(capsys, monkeypatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(network(), *some_data(), 2, 16)
    assert "batch/s" in capsys.readouterr().err


def test_the_history_knows_its_best() -> None:
    history = History(Epoch(i, 9.0 - i, v, None, 0.1) for i, v in enumerate([3.0, 1.0, 2.0, 0.95], 1))
    assert history.best.epoch == 4
    assert not history.stalled(2)
    assert history.stalled(2, min_delta=0.1)
    assert not history.stalled(4)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "fit: epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, r"fit: epochs must be a whole number, got 1\.5"),
        ({"batch_size": 0}, ValueError, "fit: batch_size must be at least 1, got 0"),
        ({"patience": -1}, ValueError, "fit: patience must be at least 1, got -1"),
        ({"y": None}, ValueError, "fit: y must hold a target for each row of X, got None"),
        ({"y": torch.zeros(7).long()}, ValueError, r"fit: y must have a row for each of the 50 rows of X, got \[7\]"),
        ({"X": torch.zeros(50)}, ValueError, r"fit: X must be \[samples, features\] with at least one, got \[50\]"),
        ({"X": torch.zeros(0, 5)}, ValueError, r"fit: X must be \[samples, features\] with at least one, got \[0, 5\]"),
        ({"X": torch.zeros(50, 5).to_sparse()}, TypeError, "fit: X must be a dense real array"),
        ({"X": torch.zeros(50, 4, dtype=torch.float64)}, (ValueError, RuntimeError), None),
        ({"validation": (torch.zeros(3, 5), torch.zeros(2))}, ValueError, r"fit: validation\[1\] must have a row"),
        ({"optimizer": "newton"}, ValueError, "newton"),
        ({"generator": 3}, TypeError, r"fit: generator must be a torch\.Generator or None, got 3"),
        ({"callbacks": None}, TypeError, "fit: callbacks must be a list of functions and of .* schedulers, got None"),
        ({"callbacks": len}, TypeError, "fit: callbacks must be a list .*, got <built-in function len>"),
        ({"callbacks": [len, 3]}, TypeError, r"fit: callbacks must be a list .*, got 3 as callbacks\[1\]"),
        ({"loss": "absolute"}, ValueError, "absolute"),
        ({"momentun": 0.9}, TypeError, "momentun"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, error, message) -> None:
    x, y = some_data()
    with pytest.raises(error, match=message):
        QUIET(**{"model": network(), "X": x, "y": y, "epochs": 1, **change})


def test_a_loader_has_its_own_order() -> None:
    loader = DataLoader(TensorDataset(*some_data()), 16)
    for name, value in {"y": torch.zeros(50), "batch_size": 4, "generator": torch.Generator()}.items():
        with pytest.raises(ValueError, match=f"fit: {name} must be left out where X is a DataLoader"):
            QUIET(network(), loader, **{name: value})
