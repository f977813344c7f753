"""Bad input of a training, `pyperc.fit` and `pyperc.TrainStep`: an exception that names the argument and what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import pyperc

X, Y = torch.randn(20, 3), torch.arange(20) % 2


def fit(model: Any = None, X: Any = X, y: Any = Y, **options: Any) -> Any:
    return pyperc.fit(pyperc.MLP([3, 4, 2]) if model is None else model, X, y, 1, progress=False, **options)


@pytest.mark.parametrize(
    ("model", "came"), [(pyperc.MLP, "the class MLP"), (len, "builtin_function_or_method")], ids=["class", "function"]
)
def test_a_model_that_is_no_module(model: Any, came: str) -> None:
    with pytest.raises(TypeError, match=rf"fit: model must be an instance of torch.nn.Module, got {came}"):
        fit(model)
    with pytest.raises(TypeError, match=r"TrainStep: model must be an instance of torch.nn.Module, got"):
        pyperc.TrainStep(model)


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match=r"fit: model must have parameters of a floating dtype, got none"):
        fit(nn.ReLU())
    with pytest.raises(ValueError, match=r"TrainStep: params must hold a parameter"):
        pyperc.TrainStep(nn.ReLU())


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss], ids=lambda loss: loss.__name__)
def test_a_loss_that_is_a_class(loss: Any) -> None:
    for function in (lambda: fit(loss=loss), lambda: pyperc.TrainStep(pyperc.MLP([3, 2]), loss)):
        with pytest.raises(TypeError, match=r"loss must be one of .*cross_entropy, or a function, got <class"):
            function()


@pytest.mark.parametrize("content", [b"", b"hi", b"\x80\x02]q\x00."], ids=["empty", "text", "pickle"])
def test_a_checkpoint_that_is_another_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"fit: checkpoint .*run.pt must be one that fit wrote"):
        fit(checkpoint=path)
    assert path.read_bytes() == content


def test_a_loader_without_batches() -> None:
    with pytest.raises(ValueError, match=r"fit: X must be a DataLoader of at least one batch, got none"):
        fit(X=DataLoader([]), y=None)


@pytest.mark.parametrize("batches", [list(X), [(x, x, x) for x in X]], ids=["one tensor", "three"])
def test_a_loader_of_no_pairs(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"fit: a DataLoader's batches must be pairs \(x, y\), got"):
        fit(X=DataLoader(batches), y=None)
    with pytest.raises(TypeError, match=r"fit: a DataLoader's batches must be pairs \(x, y\), got"):
        fit(validation=DataLoader(batches))


SIGNS = 2.0 * Y - 1


@pytest.mark.parametrize("loss", ["logistic", "hinge", "squared_hinge"])
def test_classes_where_a_loss_wants_signs(loss: str) -> None:
    model = pyperc.MLP([3, 1])
    before = [p.clone() for p in model.parameters()]
    for y, came in ((Y, "0 and 1"), (Y.numpy(), "0 and 1"), (Y > 0, "0 and 1"), (Y[:, None] * 1.0, "0 and 1")):
        with pytest.raises(ValueError, match=rf"fit: y must be -1 and \+1 for the loss {loss}, got {came}"):
            fit(model, y=y, loss=loss)
    with pytest.raises(ValueError, match=r"fit: y must be -1 and \+1 .*, got 0 alone"):
        fit(model, y=0 * Y, loss=loss)
    with pytest.raises(ValueError, match=rf"fit: validation\[1\] must be -1 and \+1 for the loss {loss}, got 0 and 1"):
        fit(model, y=SIGNS, loss=loss, validation=(X, Y))
    assert all(map(torch.equal, model.parameters(), before))
    for y in (SIGNS, torch.ones(20), SIGNS * (torch.arange(20) > 3), SIGNS / 2):
        fit(model, y=y, loss=loss)
    fit(model, y=Y, loss="mse")


@pytest.mark.parametrize(
    ("validation", "came"),
    [((X,), "a tuple of 1"), ([X, Y, Y], "a list of 3"), (X, "a Tensor"), (0.2, "a float")],
    ids=["one", "three", "no pair", "a share"],
)
def test_a_validation_that_is_no_pair(validation: Any, came: str) -> None:
    with pytest.raises(TypeError, match=rf"fit: validation must be \(X, y\) or a DataLoader, got {came}"):
        fit(validation=validation)


@pytest.mark.parametrize("optimizer", ["sgd", torch.optim.SGD], ids=["ours", "torch's"])
def test_an_argument_that_fit_has_not(optimizer: Any) -> None:
    model = pyperc.MLP([3, 2])
    given = optimizer if isinstance(optimizer, str) else optimizer(model.parameters())
    with pytest.raises(
        TypeError, match=r"fit: validation_data is none of its arguments, model, X, .*validation, .*, and no option of"
    ):
        fit(model, optimizer=given, validation_data=(X, Y))
    with pytest.raises(TypeError, match=r"TrainStep: amsgrad is no option of sgd, which has lr, momentum"):
        fit(amsgrad=True)


def test_words_for_numbers() -> None:
    names = np.array(["ape", "bat"])[Y.numpy()]
    for y in (names, names.tolist()):
        with pytest.raises(TypeError, match=r"fit: y must hold numbers, got str_"):
            fit(y=y)
    with pytest.raises(TypeError, match=r"fit: y must hold numbers, got object_"):
        fit(y=names.astype(object))
    with pytest.raises(TypeError, match=r"fit: X must hold numbers, got str_"):
        fit(X=X.numpy().astype(str))
    with pytest.raises(TypeError, match=r"fit: validation\[1\] must hold numbers, got str_"):
        fit(validation=(X, names))
