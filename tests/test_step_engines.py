"""Which engine of TrainStep takes a step: other models, changes between steps, refusals, `explain`, recorded steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import F32, F64, STATES, Loop, batches, network, prepared, run_both, same, same_parameters
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import flop_counter

import pyperc
from pyperc.step import graphed, train_step
from pyperc.step.native import Native


def tied() -> nn.Module:
    model = network((5, 5, 5, 3))
    model[2].weight = model[0].weight
    return model


def with_layer_norm() -> nn.Module:
    return pyperc.fuse(
        nn.Sequential(nn.Linear(5, 4, dtype=F64), nn.LayerNorm(4, dtype=F64), nn.Linear(4, 3, dtype=F64))
    )


def parametrized() -> nn.Module:
    model = network()
    parametrizations.weight_norm(model[2])
    return model


def hooked() -> nn.Module:
    model = network()
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    return model


def patched() -> nn.Module:
    model = network()
    model[1].forward = torch.sin
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network((5, 8, 5))
        self.outer = nn.Linear(5, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x + self.inner(x))


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a shared weight": tied,
    "LayerNorm": with_layer_norm,
    "a parametrization": parametrized,
    "a hook": hooked,
    "a patched forward": patched,
    "a module of the user": Residual,
    "plain torch": lambda: pyperc.unfuse(network()),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("optimizer", "options"), [STATES[1], STATES[3]], ids=str)
def test_any_model_trains(other: str, optimizer: str, options: dict[str, Any]) -> None:
    model = OTHERS[other]()
    loop = Loop(model, optimizer, clip=1.0, **options)
    run_both(pyperc.TrainStep(model, optimizer=optimizer, clip_grad_norm=1.0, **options), loop, batches())


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def set_grad(p: nn.Parameter) -> None:
    p.grad = p.grad * 3


# What somebody does between two steps: to the model, and to the optimizer.
CHANGES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "a hook on a layer": lambda m, o: m[2].register_forward_hook(doubled),
    "a hook on an activation": lambda m, o: m[1].register_forward_hook(doubled),
    "a hook on the model": lambda m, o: m.register_forward_hook(doubled),
    "a hook on a parameter": lambda m, o: m[2].weight.register_hook(lambda grad: grad * 3),
    "a hook after a gradient": lambda m, o: m[2].weight.register_post_accumulate_grad_hook(set_grad),
    "a hook on the optimizer": lambda m, o: o.register_step_pre_hook(lambda o, args, kw: set_grad(m[0].weight)),
    "another activation": lambda m, o: setattr(m, "1", nn.Sigmoid()),
    "an activation of the user": lambda m, o: m.register_module("3", Sine()),
    "another slope": lambda m, o: setattr(m[1], "negative_slope", 0.5),
    "one layer more": lambda m, o: m.append(nn.Sigmoid()),
    "one layer less": lambda m, o: m.pop(1),
    "a patched forward": lambda m, o: setattr(m[3], "forward", torch.sin),
    "a parametrization": lambda m, o: parametrizations.weight_norm(m[0]),
    "a shared weight": lambda m, o: setattr(m[2], "bias", nn.Parameter(m[0].bias.detach()[:6].clone())),
    "no momentum": lambda m, o: o.param_groups[0].update(momentum=0.0, dampening=0.0),
    "another state": lambda m, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "no state": lambda m, o: o.state.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_steps(change: str) -> None:
    model = pyperc.MLP([5, 7, 6, 3], "leaky_relu", dtype=F64)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}
    loop, step = Loop(model, **options), pyperc.TrainStep(model, **options)
    run_both(step, loop, batches())
    assert step.engine == "native"
    for net, optimizer in ((model, step.optimizer), (loop.model, loop.optimizer)):
        CHANGES[change](net, optimizer)
    for x, y in batches():
        same(step(x, y), loop(x, y))
    same_parameters(step, loop)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What came of each attempt to bind the native engine."""
    made: list[str] = []

    class Counted(Native):
        def __init__(self, *args: Any) -> None:
            made.append("refused")
            super().__init__(*args)
            made[-1] = "bound"

    monkeypatch.setattr(train_step, "Native", Counted)
    return made


class Straight(nn.Module):
    """A block once it is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 4, dtype=F64), nn.LayerNorm(4, dtype=F64), nn.Linear(4, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(torch.tanh(self.a(x)))))


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a layer": with_layer_norm,
    "a layer of a layer": lambda: nn.Sequential(
        nn.Sequential(nn.Sequential(*with_layer_norm()[:2])), nn.Linear(4, 3, dtype=F64)
    ),
    "a layer of a block": lambda: pyperc.fuse(Straight()),
    "a module of the user": Residual,
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_refused_for_a_layer_is_not_tried_again(refused: str, attempts: list[str]) -> None:
    model = REFUSED[refused]()
    loop, step = Loop(model, lr=0.1), pyperc.TrainStep(model, lr=0.1)
    run_both(step, loop, batches())
    assert attempts == ["refused"]
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        same(other(*batches()[0]).isfinite(), torch.tensor(True))
    assert attempts == ["refused"] * 3


@pytest.mark.parametrize(
    ("loss", "optimizer"), [(F.cross_entropy, "rmsprop"), (lambda s, y: F.cross_entropy(s, y), "sgd")]
)
def test_what_is_refused_for_good_is_not_tried_again(loss: Any, optimizer: str, attempts: list[str]) -> None:
    model = network()
    given = torch.optim.RMSprop(model.parameters()) if optimizer == "rmsprop" else optimizer
    step = pyperc.TrainStep(model, loss, given)
    for x, y in batches():
        step(x, y)
    assert attempts == ["refused"]


REPLACED: dict[str, Callable[[nn.Sequential], object]] = {
    "the layer": lambda m: setattr(m[0], "1", nn.Tanh()),
    "its container": lambda m: setattr(m, "0", nn.Sequential(m[0][0], nn.Tanh())),
    "one layer less": lambda m: m[0].pop(1),
    "its type": lambda m: setattr(m[0][1], "__class__", nn.Tanh),
}


@pytest.mark.parametrize("replaced", REPLACED)
def test_a_refused_layer_that_goes_and_comes_back(replaced: str, attempts: list[str]) -> None:
    model = nn.Sequential(with_layer_norm()[:2], nn.Linear(4, 3, dtype=F64))
    options = {"params": lambda m: [*m[0][0].parameters(), *m[1].parameters()]}
    loop, step = Loop(model, lr=0.1, **options), pyperc.TrainStep(model, lr=0.1, params=options["params"](model))
    run_both(step, loop, batches())
    for net in (model, loop.model):
        REPLACED[replaced](net)
    run_both(step, loop, batches())
    assert attempts == ["refused", "bound"]
    for net in (model, loop.model):
        net[0].append(nn.LayerNorm(4, dtype=F64))
    run_both(step, loop, batches())
    assert attempts == ["refused", "bound", "refused"]


def test_those_who_watch_operations_are_shown_them() -> None:
    model = network()
    loop, step = Loop(model, lr=0.1), pyperc.TrainStep(model, lr=0.1)
    (x, y), *more = batches()
    step(x, y)
    loop(x, y)
    counts = []
    for call in (step, loop):
        with flop_counter.FlopCounterMode(display=False) as counter:
            call(x, y)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.autocast("cpu", torch.bfloat16):
        same(step(x, y), loop(x, y))
        assert step.engine == "autograd"
    loop.model.load_state_dict(model.state_dict())
    run_both(step, loop, more)
    assert step.engine == "native"


def test_inputs_that_are_no_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.inner(pair[0] + pair[1])

    model = Pair()
    loop = Loop(model.inner, lr=0.1)
    step = pyperc.TrainStep(model, lr=0.1)
    for x, y in batches():
        same(step((x, x), y), loop(2 * x, y))
    same_parameters(step, loop)


class Image(Tensor):
    """As torchvision's, for example."""


@pytest.mark.parametrize("given", [lambda x: x.as_subclass(Image), Tensor.to_sparse], ids=["a subclass", "sparse"])
def test_tensors_that_torch_takes(given: Callable[[Tensor], Tensor]) -> None:
    model = network()
    loop, step = Loop(model, lr=0.1), pyperc.TrainStep(model, lr=0.1)
    for x, y in batches():
        same(torch.as_tensor(step(given(x), y)).as_subclass(Tensor), loop(x, y))
        same(step(x, y), loop(x, y))
    same_parameters(step, loop)


def test_explain_names_the_engine(engine: str) -> None:
    step = pyperc.TrainStep(prepared(network(), engine), lr=0.1)
    x, _ = batches()[0]
    for explanation in (pyperc.explain(step, x), step.explain(x)):
        assert explanation.engine == step.engine == engine
        assert bool(explanation.note) == (engine == "autograd")
        assert explanation.to_dict()["engine"] == engine
        assert str(explanation).startswith(f"engine: {engine}")
        assert [layer.call for layer in explanation.layers] == ["fused"] * 3
    assert step.steps == 0
    assert repr(step) == "TrainStep(MLP, cross_entropy, SGD, steps=0)"


def test_explain_tells_the_step_from_the_models_own_call() -> None:
    x = torch.zeros(3, 4)
    native = str(pyperc.explain(pyperc.TrainStep(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2))), x))
    other = str(pyperc.explain(pyperc.TrainStep(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))), x))
    assert native.startswith("engine: native\n\nmodel(x) called by itself, which is not the step:\nname ")
    assert other.startswith(
        "engine: autograd, as a native step is one run of layers, which LayerNorm interrupts: "
        "LayerNorm is not a layer that is fused\n\nmodel(x) called by itself, which is not the step:\n"
    )
    assert "pyperc.fuse would fuse its linear layers" in other


def test_explain_leaves_the_step_as_it_is(engine: str, attempts: list[str]) -> None:
    step = pyperc.TrainStep(prepared(network(), engine), optimizer="adam", clip_grad_norm=1.0)
    (x, y), *_ = batches()
    for _ in range(3):
        step(x, y)
    norm, before = step.grad_norm, len(attempts)
    assert norm > 0
    assert step.explain(x).engine == step.engine == engine
    assert step.grad_norm == norm
    step(x, y)
    assert step.steps == 4
    if engine == "native":  # two questions, and none for the step
        assert len(attempts) == before + 2


class Recorder:
    """In place of a CUDA graph: what is recorded runs when it is replayed, on the tensors that it was recorded with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = 0
        monkeypatch.setattr(graphed.Graphed, "_aside", staticmethod(lambda function: function()))
        monkeypatch.setattr(graphed.Graphed, "_capture", staticmethod(self.capture))
        # What only a GPU has.
        monkeypatch.setattr(graphed, "_RECORDABLE", {"foreach": False})

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.recorded += 1
        loss = torch.zeros(())
        return lambda: loss.copy_(function()), loss


@pytest.mark.parametrize(("optimizer", "options"), STATES, ids=str)
def test_the_recorded_step(monkeypatch: pytest.MonkeyPatch, optimizer: str, options: dict[str, Any]) -> None:
    """Which shapes are recorded, and that a replay reads the inputs and the learning rate of its own call."""
    recorder = Recorder(monkeypatch)
    model = network(dtype=F32)
    loop = Loop(model, optimizer, **options)
    step = pyperc.TrainStep(prepared(model, "autograd"), optimizer=optimizer, **options)
    engine = step._autograd
    step._autograd = graphed.Graphed(
        engine.model, engine.objective, engine.optimizer, engine.masters, engine.clip_grad_norm, engine.raises
    )
    run_both(step, loop, batches(rows=(6, 3) * 5, dtype=F32), F32)
    assert recorder.recorded == 2
    for o in (step.optimizer, loop.optimizer):
        o.param_groups[0]["lr"] = 0.05
    run_both(step, loop, batches(rows=(6, 3), dtype=F32), F32)
    assert recorder.recorded == 2
    for o in (step.optimizer, loop.optimizer):
        o.param_groups[0]["weight_decay"] = 0.2
    run_both(step, loop, batches(rows=(6,) * 5, dtype=F32), F32)
    assert recorder.recorded == 3
    step.release()
    run_both(step, loop, batches(rows=(6,) * 5, dtype=F32), F32)
    assert recorder.recorded == 4
