"""Bad input of a training, `pyperc.fit` and `pyperc.TrainStep`: an exception that names the argument and what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
