"""Models and steps that lead back to themselves go when nobody else holds them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyperc

# How a part of a model, or of its training, leads back to the model.
TIES: dict[str, Callable[[nn.Module, pyperc.TrainStep], Any]] = {
    "a layer": lambda model, step: setattr(model[0], "owner", [model, step]),
    "a hook of a parameter": lambda model, step: model[0].weight.register_hook(lambda grad, of=(model, step): None),
    "a parameter": lambda model, step: setattr(model[0].weight, "owner", (model, step)),
    "its step": lambda model, step: setattr(model, "step", step),
    "its optimizer": lambda model, step: setattr(step.optimizer, "owner", step),
}


def called(model: nn.Module, step: pyperc.TrainStep) -> None:
    model(torch.zeros(3, 4))


def stepped(model: nn.Module, step: pyperc.TrainStep) -> None:
    for _ in range(3):
        step(torch.zeros(3, 4), torch.zeros(3, 2))
    assert step.engine == "native"


@pytest.mark.parametrize("use", [called, stepped])
@pytest.mark.parametrize("tie", TIES)
def test_a_model_that_has_run(tie: str, use: Callable[[nn.Module, pyperc.TrainStep], None]) -> None:
    model = pyperc.fuse(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    step = pyperc.TrainStep(model, "mse", "adam")
    use(model, step)
    TIES[tie](model, step)
    gone = [weakref.ref(model), weakref.ref(step.optimizer)]
    del model, step
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_what_goes_with_a_model_may_call_it() -> None:
    """A finalizer that runs while the collector takes the parts of a cycle, in whatever order."""
    outcomes: list[object] = []

    class Last:
        def __init__(self, model: nn.Module, step: pyperc.TrainStep) -> None:
            self.model, self.step = model, step

        def __del__(self) -> None:
            x = torch.ones(3, 4)
            for call in (lambda: self.model(x), lambda: self.step(x, torch.ones(3, 2))):
                try:
                    outcomes.append(call())
                except RuntimeError as error:
                    outcomes.append(error)

    model = pyperc.MLP([4, 8, 2])
    step = pyperc.TrainStep(model, "mse", "adam")
    called(model, step)
    stepped(model, step)
    model.last = Last(model, step)
    model.weakly = weakref.ref(model)
    gone = weakref.ref(model)
    del model, step
    gc.collect()
    gc.collect()
    assert gone() is None
    assert len(outcomes) == 2
    assert all(isinstance(outcome, Tensor | RuntimeError) for outcome in outcomes)
