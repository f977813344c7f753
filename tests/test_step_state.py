"""TrainStep around the step: state that moves to torch and back, NaN, threads, Dropout, 16 bits, engines, errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import (
    F32,
    F64,
    OPTIMIZERS,
    Loop,
    batches,
    network,
    ordinary,
    prepared,
    run_both,
    same,
    same_parameters,
    same_state,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import flop_counter

import pyperc
from pyperc.step import graphed, train_step
from pyperc.step.native import Native

STATES = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("adamw", {"lr": 0.01, "amsgrad": True}),
]


@pytest.mark.parametrize(("optimizer", "options"), STATES, ids=str)
def test_a_run_moves_to_torch_and_back(engine: str, optimizer: str, options: dict[str, Any]) -> None:
    model = network()
    loop = Loop(model, optimizer, **options)
    step = pyperc.TrainStep(prepared(model, engine), optimizer=optimizer, **options)
    fresh = copy.deepcopy(step.state_dict())
    for _ in range(2):
        for x, y in batches():
            step(x, y)
        loop.model.load_state_dict(model.state_dict())
        loop.optimizer.load_state_dict(copy.deepcopy(step.state_dict()))
        same_state(step, loop)
        for x, y in batches():
            loop(x, y)
        model.load_state_dict(loop.model.state_dict())
        step.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
        run_both(step, loop, batches())
    step.load_state_dict(fresh)
    loop.optimizer = OPTIMIZERS[optimizer](loop.model.parameters(), **options)
    run_both(step, loop, batches())
    assert step.steps == 4


@pytest.mark.parametrize(("optimizer", "options"), STATES, ids=str)
def test_a_run_goes_on_with_the_same_bits(engine: str, optimizer: str, options: dict[str, Any]) -> None:
    given = batches(rows=(7, 3, 7, 1, 7, 4))
    step = pyperc.TrainStep(prepared(network(), engine), optimizer=optimizer, **options)
    for x, y in given[:3]:
        step(x, y)
    saved = io.BytesIO()
    torch.save((step.model.state_dict(), step.state_dict()), saved)
    other = pyperc.TrainStep(prepared(network(), engine), optimizer=optimizer, **{**options, "lr": 0.5})
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    other.load_state_dict(state)
    other.model.load_state_dict(weights)
    assert other.steps == 3
    copied = copy.deepcopy(step)
    unpickled = pickle.loads(pickle.dumps(step))
    for x, y in given[3:]:
        losses = [s(x, y) for s in (step, other, copied, unpickled)]
        assert all(torch.equal(losses[0], loss) for loss in losses)
    for another in (other, copied, unpickled):
        assert all(map(torch.equal, step.model.parameters(), another.model.parameters()))


def test_its_optimizer_may_step_by_itself(engine: str) -> None:
    """On gradients of the user's own, between steps."""
    model = network()
    loop = Loop(model, "adam", lr=0.01)
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam", lr=0.01)
    for x, y in batches():
        run_both(step, loop, [(x, y)])
        F.cross_entropy(model(x), y).backward()
        step.optimizer.step()
        step.optimizer.zero_grad()
        loop(x, y)
    run_both(step, loop, batches())


def test_a_group_that_is_added(engine: str) -> None:
    model = network()
    later = [model[4].weight, model[4].bias]
    loop = Loop(model, lr=0.1, momentum=0.9, params=lambda m: [*m[0].parameters(), *m[2].parameters()])
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1, momentum=0.9, params=list(model.parameters())[:4])
    run_both(step, loop, batches())
    step.optimizer.add_param_group({"params": later, "lr": 0.2})
    loop.optimizer.add_param_group({"params": list(loop.model[4].parameters()), "lr": 0.2})
    run_both(step, loop, batches())


def test_what_is_written_into_the_model_counts(engine: str) -> None:
    """load_state_dict in place and by assignment of data; another Parameter is not the optimizer's, as in torch."""
    model = network()
    loop = Loop(model, lr=0.1, momentum=0.9)
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1, momentum=0.9)
    for change in (
        lambda m: m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}),
        lambda m: setattr(m[2].weight, "data", m[2].weight.data.T.contiguous().T * 2),
        lambda m: setattr(m[4], "weight", nn.Parameter(m[4].weight.detach() * 2)),
    ):
        run_both(step, loop, batches())
        change(model)
        change(loop.model)
    for x, y in batches():
        same(step(x, y), loop(x, y))
    same_parameters(step, loop)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_loss_that_is_no_number(engine: str, optimizer: str, value: float) -> None:
    model = network()
    step = pyperc.TrainStep(prepared(model, engine), "mse", optimizer, lr=0.01, on_nan="raise")
    given = batches("mse")
    for x, y in given:
        step(x, y)
    before = copy.deepcopy((model.state_dict(), step.state_dict()))
    x, y = given[0]
    with pytest.raises(FloatingPointError, match=f"the loss is {value} in step 5; the parameters are those of before"):
        step(x, y.new_full(y.shape, value))
    same((model.state_dict(), step.state_dict()), before)
    step(x, y)
    assert step.steps == 5
    onward = pyperc.TrainStep(prepared(network(), engine), "mse", lr=0.01)
    assert not onward(x, y * value).isfinite()
    assert onward.model[4].bias.isnan().any()


def test_two_steps_on_two_threads(engine: str) -> None:
    models = [network((5, 32, 3)) for _ in range(2)]
    loops = [Loop(model, "adam", lr=0.01) for model in models]
    steps = [pyperc.TrainStep(prepared(model, engine), optimizer="adam", lr=0.01) for model in models]
    given = batches(rows=(16, 5) * 20)

    def train(step: pyperc.TrainStep) -> None:
        for x, y in given:
            step(x, y)

    threads = [threading.Thread(target=train, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step, loop in zip(steps, loops, strict=True):
        for x, y in given:
            loop(x, y)
        torch.testing.assert_close(list(step.model.parameters()), list(loop.model.parameters()), rtol=1e-9, atol=1e-10)


def test_a_step_while_another_thread_reads_the_model(engine: str) -> None:
    model = network((5, 64, 64, 3))
    loop = Loop(model, lr=0.1)
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1)
    given, outputs, done = batches(rows=(32,) * 40), [], threading.Event()

    def read() -> None:
        with torch.no_grad():
            while not done.is_set():
                outputs.append(model(given[0][0]).isfinite().all())

    reader = threading.Thread(target=read)
    reader.start()
    for x, y in given:
        step(x, y)
    done.set()
    reader.join()
    assert all(outputs)
    for x, y in given:
        loop(x, y)
    torch.testing.assert_close(list(model.parameters()), list(loop.model.parameters()), rtol=1e-9, atol=1e-10)


def dropped(engine: str, p: float = 0.5) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(5, 64, dtype=F64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 64, dtype=F64), nn.Dropout(p)]
    return prepared(pyperc.fuse(nn.Sequential(*layers, nn.Linear(64, 3, dtype=F64))), engine)


def test_dropout_follows_the_generator(engine: str) -> None:
    def train(seed: int) -> list[Tensor]:
        step = pyperc.TrainStep(dropped(engine), lr=0.1)
        torch.manual_seed(0)
        given = batches()
        torch.manual_seed(seed)
        losses = [step(x, y) for x, y in given]
        assert step.engine == engine
        return [*losses, *step.model.parameters()]

    first, again, other = train(3), train(3), train(4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[-1], other[-1])


def test_dropout_drops_that_share_and_scales_the_rest(engine: str) -> None:
    """A network that adds up its hidden units: the mean of many steps' scores is what it is without Dropout."""
    model = nn.Sequential(nn.Linear(1, 4096, dtype=F64), nn.Dropout(0.25), nn.Linear(4096, 1, dtype=F64))
    with torch.no_grad():
        for layer, value in ((model[0], 1.0), (model[2], 1 / 4096)):
            layer.weight.fill_(value)
            layer.bias.zero_()
    model = prepared(pyperc.fuse(model), engine)
    step = pyperc.TrainStep(model, "mse", lr=0.0)
    x, y = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    scores = torch.stack([step(x, y) for _ in range(50)]).sqrt()
    deviation = (0.25 / 0.75 / 4096) ** 0.5
    assert abs(scores.mean() - 1) < 4 * deviation / 50**0.5
    assert 0.7 * deviation < scores.std() < 1.3 * deviation
    _, gradients = step.gradients(x, y)
    kept = gradients["2.weight"] != 0
    assert abs(kept.double().mean() - 0.75) < 0.03
    assert torch.equal(kept.T, gradients["0.weight"] != 0)


def test_dropout_in_evaluation_is_not_there(engine: str) -> None:
    model = dropped(engine)
    loop = Loop(model, lr=0.1)
    step = pyperc.TrainStep(model, lr=0.1)
    step(*batches()[0])
    model.load_state_dict(loop.model.state_dict())
    run_both(pyperc.TrainStep(model.eval(), lr=0.1), Loop(loop.model.eval(), lr=0.1), batches())
    model.load_state_dict(loop.model.state_dict())
    for x, y in batches():
        same(step(x, y), loop(x, y))
    assert not torch.equal(step(x, y), pyperc.TrainStep(model.train(), lr=0.1)(x, y))


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
@pytest.mark.parametrize(("optimizer", "options"), STATES, ids=str)
def test_16_bits_have_masters(engine: str, dtype: torch.dtype, optimizer: str, options: dict[str, Any]) -> None:
    """The loop: gradients of the rounded weights, an update of float32 ones, rounded again."""
    model = prepared(network(dtype=dtype), engine)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    other, reference = network(dtype=dtype), OPTIMIZERS[optimizer](masters, **options)
    step = pyperc.TrainStep(model, optimizer=optimizer, **options)
    for x, y in batches(dtype=dtype):
        with torch.no_grad():
            for p, master in zip(other.parameters(), masters, strict=True):
                p.copy_(master)
        expected = F.cross_entropy(other(x).float(), y)
        for master, gradient in zip(masters, torch.autograd.grad(expected, list(other.parameters())), strict=True):
            master.grad = gradient.float()
        reference.step()
        loss = step(x, y)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected.detach(), rtol=0.02, atol=0.02)
    assert step.engine == ("autograd" if dtype == torch.float16 else engine)
    state = step.state_dict()
    torch.testing.assert_close(state["masters"], [m.detach() for m in masters], rtol=0.02, atol=0.02)
    assert all(map(torch.equal, model.parameters(), [m.to(dtype) for m in state["masters"]]))
    reference.load_state_dict(state)


@HALVES
def test_masters_are_saved_and_follow_what_is_written(engine: str, dtype: torch.dtype) -> None:
    given = batches(rows=(7, 3, 7, 1), dtype=dtype)
    step = pyperc.TrainStep(prepared(network(dtype=dtype), engine), lr=1e-3)
    for x, y in given[:2]:
        step(x, y)
    other = pyperc.TrainStep(prepared(network(dtype=dtype), engine), lr=1e-3)
    state = copy.deepcopy((step.model.state_dict(), step.state_dict()))
    other.load_state_dict(state[1])
    other.model.load_state_dict(state[0])
    for x, y in given[2:]:
        step(x, y)
        other(x, y)
    assert all(map(torch.equal, step.state_dict()["masters"], other.state_dict()["masters"]))
    with torch.no_grad():
        step.model[0].bias.fill_(0.5)
    step(*given[0])
    torch.testing.assert_close(step.state_dict()["masters"][1], torch.full((7,), 0.5), rtol=0, atol=0.01)


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


def test_momentum_that_comes_later() -> None:
    model = network()
    loop, step = Loop(model, lr=0.1), pyperc.TrainStep(model, lr=0.1)
    for momentum, dampening in ((0.0, 0.0), (0.9, 0.5), (0.0, 0.0), (0.5, 0.1)):
        for optimizer in (step.optimizer, loop.optimizer):
            optimizer.param_groups[0].update(momentum=momentum, dampening=dampening)
        for x, y in batches():
            same(step(x, y), loop(x, y))
        same_parameters(step, loop)
    same_state(step, loop)


def test_two_steps_share_an_optimizer() -> None:
    """One network, two losses, one Adam."""
    model = network()
    loop = Loop(model, "adam")
    shared = torch.optim.Adam(model.parameters())
    steps = [pyperc.TrainStep(model, loss, shared) for loss in ("cross_entropy", "mse")]
    for (x, y), (_, z) in zip(batches(), batches("mse"), strict=True):
        for step, target, function in zip(steps, (y, z), (F.cross_entropy, F.mse_loss), strict=True):
            loop.loss = function
            same(step(x, target), loop(x, target))
    same_parameters(steps[0], loop)
    same(shared.state_dict()["state"], loop.optimizer.state_dict()["state"])


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


def test_release_is_followed_by_the_next_step(engine: str) -> None:
    model = network()
    loop = Loop(model, "adam")
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam")
    step.release()
    for x, y in batches():
        same(step(x, y), loop(x, y))
        step.release()
    run_both(step, loop, batches())


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


def test_the_norm_is_that_of_the_last_step() -> None:
    model = network()
    loop, step = Loop(model, clip=0.1, lr=0.1), pyperc.TrainStep(model, lr=0.1, clip_grad_norm=0.1)
    (x, y), *_ = batches()
    assert math.isnan(step.grad_norm)
    for hook in (None, ordinary, None):
        handle = hook and model.register_forward_hook(hook)
        run_both(step, loop, [(x, y)])
        norm = step.grad_norm
        assert norm > 0
        assert copy.deepcopy(step).grad_norm == step.grad_norm == norm  # a copy has no native engine
        step.gradients(x, y)  # which is no step
        if handle is not None:
            handle.remove()
        assert step.engine == "native" or handle is None
        assert step.grad_norm == norm


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
