"""The training loop and the comparison of two trainings."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyperc
from pyperc import _plot, _tables
from pyperc.bench.measure import Quartiles, quartiles
from pyperc.compare import Agreement, Timing, agreement, fastest_form, time_batch
from pyperc.datasets import Dataset, digits
from pyperc.train import Epoch, TorchStep, Trainer, error_rate, targets, train


def some_data(dtype=torch.float32):
    """Points of three classes: 50 to train and 20 to test, in batches of 16 with two over."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (70,), generator=generator)
    x = torch.randn(70, 5, generator=generator, dtype=dtype) + 3 * F.one_hot(y, 5)
    return Dataset(x[:50], y[:50], x[50:], y[50:], 3)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return pyperc.MLP([5, 8, 3], activation="tanh", dtype=dtype)


def test_an_epoch_is_one_step_of_descent_for_each_batch():
    data, model = some_data(torch.float64), network(torch.float64)
    expected = copy.deepcopy(model)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(7))
    losses = []
    for batch in order.split(16):
        loss = F.cross_entropy(expected(data.x_train[batch]), data.y_train[batch])
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.25 * gradient
        losses += [loss.item()] * len(batch)

    (point,) = train(model, data, epochs=1, batch_size=16, lr=0.25, seed=7)
    assert point.loss == pytest.approx(sum(losses) / 50, rel=1e-12)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-12)
    wrong = (expected(data.x_test).argmax(1) != data.y_test).sum() / 20
    assert point.test_error == pytest.approx(float(wrong))
    assert point.samples_per_second > 0


def test_the_same_seed_gives_the_same_curve_and_another_one_does_not():
    data = some_data()
    first, again, other = ([point.loss for point in train(network(), data, epochs=3, seed=seed)] for seed in (1, 1, 2))
    assert first == again
    assert first[1:] != other[1:]


def test_epochs_are_told_as_they_come():
    told = []
    curve = train(network(), some_data(), epochs=3, after_epoch=told.append)
    assert told == curve
    assert [point.epoch for point in curve] == [1, 2, 3]


def test_batches_are_counted_and_told():
    trainer = Trainer(pyperc.TrainStep(network(), lr=0.1), some_data(), batch_size=16)
    told = []
    trainer.epoch(told.append)
    assert trainer.batches == sum(told) == 4


def test_a_batch_may_hold_more_than_there_is():
    assert train(network(), some_data(), epochs=1, batch_size=1000)[0].epoch == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be finite and positive, got 0.0"),
        ({"lr": -1.0}, "lr must be finite and positive, got -1.0"),
        ({"lr": math.nan}, "lr must be finite and positive, got nan"),
        ({"lr": math.inf}, "lr must be finite and positive, got inf"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(network(), some_data(), **settings)


def test_a_diverging_descent_is_told():
    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match=r"the loss became (inf|nan) in epoch \d; a smaller lr may help"):
        train(pyperc.MLP([5, 8, 8, 3]), some_data(), epochs=9, batch_size=4, lr=1e12)


def test_error_rate_counts_over_parts_of_a_large_set():
    y = torch.arange(2500) % 7
    x = F.one_hot(y, 7).float()
    assert error_rate(nn.Identity(), x, y) == 0
    assert error_rate(nn.Identity(), x, torch.where(torch.arange(2500) < 25, (y + 1) % 7, y)) == 0.01


def test_digits_are_learnt():
    torch.manual_seed(0)
    curve = train(pyperc.MLP([64, 256, 256, 10]), digits().standardised())
    assert curve[-1].test_error <= 0.035


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.3), ("adam", 1e-3)], ids=["sgd", "adam"])
def test_the_curve_is_that_of_plain_torch(dtype, bound, activation, optimizer, lr):
    torch.manual_seed(0)
    model = pyperc.MLP([64, 32, 32, 10], activation=activation, dtype=dtype)
    plain = pyperc.unfuse(copy.deepcopy(model))
    assert type(plain) is nn.Sequential
    data = digits().to(dtype)
    steps = [pyperc.TrainStep(model, optimizer=optimizer, lr=lr), TorchStep(plain, "cross_entropy", optimizer, lr=lr)]
    trainers = [Trainer(step, data) for step in steps]
    curves = [[trainer.epoch() for _ in range(3)] for trainer in trainers]
    agreed = agreement(*curves, model.state_dict(), plain.state_dict())
    assert agreed.same
    assert agreed.loss < bound
    assert agreed.weight_relative < bound


def points(*losses):
    return [Epoch(number, loss, 0.5, 0.5, 1000.0) for number, loss in enumerate(losses, 1)]


def test_agreement_takes_the_largest_differences():
    agreed = agreement(
        points(2.0, 1.0), points(2.5, 1.25), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.5, -4.0])}
    )
    assert agreed == Agreement(0.5, 0.2, 0.5, 6.0, 1.5, False)


def test_agreement_of_equal_trainings_is_exact():
    state = {"w": torch.zeros(2)}
    assert agreement(points(1.0), points(1.0), state, state) == Agreement(0.0, 0.0, 0.0, 0.0, 0.0, True)


@pytest.mark.parametrize(("dtype", "same"), [(torch.float32, True), (torch.float64, False)], ids=str)
def test_what_counts_as_rounding_depends_on_the_dtype(dtype, same):
    state = {"w": torch.ones(2, dtype=dtype)}
    assert agreement(points(2.0), points(2.0 + 1e-5), state, state).same is same


def test_rounding_may_grow_after_the_first_epoch():
    state = {"w": torch.ones(2)}
    assert agreement(points(2.0, 1.0), points(2.0, 1.01), state, state).same
    assert not agreement(points(2.0, 1.0), points(2.0, 1.1), state, state).same
    assert not agreement(points(2.01, 1.0), points(2.0, 1.0), state, state).same


def test_agreement_refuses_what_cannot_be_compared():
    state = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="as many epochs, got 1 and 2"):
        agreement(points(1.0), points(1.0, 2.0), state, state)
    with pytest.raises(ValueError, match="the same names"):
        agreement(points(1.0), points(1.0), state, {"v": torch.ones(2)})


def test_quartiles_of_one_value_are_that_value():
    assert quartiles([2.0]) == Quartiles(2.0, 2.0, 2.0)


def test_time_batch_measures_the_slower_network_as_slower():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(40))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    y = torch.randint(5, (4,))
    steps = pyperc.TrainStep(nn.Linear(5, 5)), TorchStep(Slow(), "cross_entropy", "sgd")
    timings = time_batch(*steps, torch.rand(4, 5), y, seconds=0.05, warm_up=0.05)
    assert [*timings] == ["forward", "backward", "step"]
    assert timings["forward"].ratio.median > 2
    assert timings["step"].ratio.lower > 1
    assert timings["step"].theirs > timings["step"].ours > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_forms_of_torchs_optimizers_take_the_same_steps(optimizer):
    data, weights = some_data(torch.float64), []
    for form in TorchStep.FORMS:
        step = TorchStep(pyperc.unfuse(network(torch.float64)), "mse", optimizer, form=form, lr=0.01)
        Trainer(step, data, batch_size=16).epoch()
        weights.append(step.model[0].weight)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-12, atol=1e-12)
    x, y = data.x_train[:16], targets(data.y_train[:16], 3, "mse", torch.float64)
    form = fastest_form(lambda form: TorchStep(nn.Linear(5, 3).double(), "mse", optimizer, form=form), x, y, 0.05)
    assert form in TorchStep.FORMS


@pytest.mark.parametrize("loss", ["mse", "logistic", "hinge", "squared_hinge"])
def test_a_loss_of_single_scores_sets_each_class_against_the_rest(loss):
    torch.manual_seed(0)
    curve = train(pyperc.MLP([5, 16, 3]), some_data(), epochs=20, batch_size=16, lr=0.1, loss=loss)
    assert curve[-1].loss < curve[0].loss
    assert curve[-1].train_error < 0.2


@pytest.mark.parametrize(
    ("agreed", "text"),
    [
        (Agreement(0, 0, 0, 0, 0, True), "same curve as plain torch, bit for bit"),
        (Agreement(2e-6, 0, 1e-7, 3e-6, 0, True), "same curve as plain torch: largest difference 2.0e-06 of the loss"),
        (Agreement(0.5, 0, 1e-7, 3, 0, False), "NOT the curve of plain torch: largest difference 5.0e-01"),
    ],
    ids=["equal", "rounding", "apart"],
)
def test_the_verdict_says_what_a_difference_means(agreed, text):
    assert _tables.verdict(agreed).startswith(text)


def test_the_columns_stand_under_their_names():
    (point,) = points(0.123456)
    for plain in (None, point):
        assert len(_tables.row(point, plain)) == len(_tables.header(plain is not None))
    timing = Timing(1e-4, 2e-4, Quartiles(1.9, 2.0, 2.1))
    lines = _tables.times({"forward": timing, "epoch": timing}, {"pyperc": 1.5, "torch": 2.0}, 64).splitlines()
    assert "100.0 us" in lines[1]
    assert "2.00  (1.90 to 2.10)" in lines[1]


def test_a_plot_is_written(tmp_path):
    path = tmp_path / "curve.png"
    _plot.draw({"pyperc": points(2.0, 1.0), "plain torch": points(2.0, 1.0)}, "title", path)
    assert path.read_bytes().startswith(b"\x89PNG")
