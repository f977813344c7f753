"""Bad input of `pyperc.TrainStep` and its batches: an exception that names the argument, and nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import batches, network, prepared, same
from torch import Tensor, nn

import pyperc

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": [1]}, TypeError, "model must be an instance of torch.nn.Module, got list"),
    ({"model": nn.ReLU()}, ValueError, "model have one, got none"),
    ({"loss": "huber"}, ValueError, "loss must be one of mse, logistic, .*, got 'huber'"),
    ({"loss": 3}, TypeError, "loss must be one of mse, .* or a function, got 3"),
    ({"loss": "mse", "label_smoothing": 0.1}, TypeError, "label_smoothing is no option of loss mse"),
    ({"loss": "mse", "threshold": 0.0}, TypeError, "threshold is no option of loss mse"),
    ({"loss": nn.MSELoss(), "reduction": "sum"}, TypeError, "reduction is no option of MSELoss, which brings its own"),
    ({"loss": F.l1_loss, "weight": torch.ones(3)}, TypeError, "weight is no option of a loss that is a function"),
    ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, "reduction must be mean or sum, got 'none'"),
    ({"reduction": "none"}, ValueError, "reduction must be mean or sum, got 'none'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    ({"weight": [1.0]}, TypeError, "weight must be a Tensor or None, got list"),
    ({"optimizer": "rmsprop"}, ValueError, "optimizer must be one of sgd, adam, adamw, .* got 'rmsprop'"),
    ({"optimizer": 3}, TypeError, "optimizer must be one of sgd, adam, adamw, .* got 3"),
    ({"optimizer": "adam", "momentum": 0.9}, TypeError, "momentum is no option of adam, which has lr, betas, eps"),
    ({"lr": -1.0}, ValueError, "sgd: Invalid learning rate: -1.0"),
    ({"momentum": -1.0}, ValueError, "sgd: Invalid momentum value: -1.0"),
    ({"nesterov": True}, ValueError, "Nesterov momentum requires a momentum"),
    ({"params": [nn.Parameter(torch.ones(1))]}, ValueError, "params must hold parameters of model alone"),
    ({"params": []}, ValueError, "params must hold a parameter"),
    ({"on_nan": "stop"}, ValueError, "on_nan must be ignore or raise, got 'stop'"),
    ({"clip_grad_norm": -1.0}, ValueError, "clip_grad_norm must be positive, got -1.0"),
    ({"clip_grad_norm": "1"}, TypeError, "clip_grad_norm must be a number or None, got '1'"),
    ({"scale": "255"}, TypeError, "scale must be a number or a Tensor, got str"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), ERRORS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"TrainStep: .*{message}"):
        pyperc.TrainStep(**{"model": network(), **arguments})


def test_an_optimizer_that_is_given_brings_its_own() -> None:
    model, other = network(), network()
    with pytest.raises(TypeError, match="lr belongs to the optimizer"):
        pyperc.TrainStep(model, optimizer=torch.optim.SGD(model.parameters()), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold parameters of model alone, got another in group 0"):
        pyperc.TrainStep(model, optimizer=torch.optim.SGD(other.parameters()))
    with pytest.raises(TypeError, match="optimizer must step without a closure, which LBFGS does not"):
        pyperc.TrainStep(model, optimizer=torch.optim.LBFGS(model.parameters()))


CALLS: list[tuple[str, Callable[[Tensor, Tensor], tuple[Any, ...]], type[Exception], str]] = [
    ("cross_entropy", lambda x, y: (x, y[:2]), ValueError, r"y must be .*\[6\].*, got .*\[2\]"),
    ("cross_entropy", lambda x, y: (x, y.int()), TypeError, "y must be .*int64.*got .*int32"),
    ("cross_entropy", lambda x, y: (x, y + 3), IndexError, "out of bounds|out of range|from 0 to 2"),
    ("cross_entropy", lambda x, y: (x, [0] * 6), TypeError, "y must be a .*Tensor, got list"),
    ("mse", lambda x, y: (x, y[:, :1]), ValueError, r"y must be .*\[6.*3\], got .*\[6, 1\]"),
    ("mse", lambda x, y: (x, y.float()), TypeError, "y must .*float64.*got .*float32"),
    ("mse", lambda x, y: (x, y, y), ValueError, r"weight must be .*\[6\], got \[6, 3\]"),
    ("mse", lambda x, y: (x, y, 2.0), TypeError, "weight must be a .*Tensor.*, got float"),
    ("mse", lambda x, y: (x[:, :4], y), (ValueError, RuntimeError), "x must|shape"),
]


@pytest.mark.parametrize(("loss", "call", "error", "message"), CALLS, ids=[message for *_, message in CALLS])
def test_what_is_wrong_with_a_batch(
    engine: str, loss: str, call: Callable[[Tensor, Tensor], tuple[Any, ...]], error: Any, message: str
) -> None:
    model = network()
    step = pyperc.TrainStep(prepared(model, engine), loss, "adam")
    (x, y), *_ = batches(loss)
    before = copy.deepcopy((model.state_dict(), step.state_dict()))
    with pytest.raises(error, match=message):
        step(*call(x, y))
    same((model.state_dict(), step.state_dict()), before)
    step(x, y)
    assert step.steps == 1


def test_a_function_that_returns_no_number() -> None:
    (x, y), *_ = batches("mse")
    with pytest.raises(TypeError, match=r"loss must return a Tensor of one element, got one of shape \[6, 3\]"):
        pyperc.TrainStep(network(), lambda s, y: s - y)(x, y)
    with pytest.raises(TypeError, match="weight needs a loss of the list"):
        pyperc.TrainStep(network(), F.l1_loss)(x, y, torch.ones(6))
