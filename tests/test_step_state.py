"""TrainStep around the step: state that moves to torch and back, NaN, threads, Dropout, 16 bits, the norm."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import (
    F64,
    OPTIMIZERS,
    STATES,
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

import pyperc


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path) -> None:
    step = pyperc.TrainStep(pyperc.MLP([3, 2]), optimizer="adam", lr=np.float64(0.1), betas=(np.float32(0.5), 0.9))
    torch.save(step.state_dict(), tmp_path / "step.pt")
    step.load_state_dict(torch.load(tmp_path / "step.pt", weights_only=True))
    assert step.optimizer.param_groups[0]["lr"] == 0.1


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


@HALVES
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copied", "pickled"])
def test_the_masters_of_a_copy_follow_what_is_written(
    engine: str, dtype: torch.dtype, copied: Callable[[pyperc.TrainStep], pyperc.TrainStep]
) -> None:
    """As often as the original was, of which a copy's count of writes knows nothing."""
    (x, y), *more = batches(dtype=dtype)
    step = pyperc.TrainStep(prepared(network(dtype=dtype), engine), lr=1e-3)
    step(x, y)
    other = copied(step)
    with torch.no_grad():
        for p, q in zip(other.model.parameters(), step.model.parameters(), strict=True):
            while p._version < q._version:
                p.fill_(0.5)
    for x, y in more:
        other(x, y)
    for master in other.state_dict()["masters"]:
        torch.testing.assert_close(master, torch.full_like(master, 0.5), rtol=0, atol=0.02)


GIVEN: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "vector_to_parameters": lambda model, values: nn.utils.vector_to_parameters(values, model.parameters()),
    "p.data =": lambda model, values: [
        setattr(p, "data", v.reshape(p.shape).clone())
        for p, v in zip(model.parameters(), values.split([p.numel() for p in model.parameters()]), strict=True)
    ],
}


@HALVES
@pytest.mark.parametrize("given", GIVEN)
def test_masters_follow_other_memory(engine: str, dtype: torch.dtype, given: str) -> None:
    model = prepared(network(dtype=dtype), engine)
    step = pyperc.TrainStep(model, lr=1e-3)
    for x, y in batches(dtype=dtype):
        step(x, y)
        for _ in range(3):  # the last may lie where the first did
            values = torch.rand(sum(p.numel() for p in model.parameters())).to(dtype)
            GIVEN[given](model, values.clone())
        step(x, y)
        masters = torch.cat([m.flatten() for m in step.state_dict()["masters"]])
        torch.testing.assert_close(masters, values.float(), rtol=0, atol=0.02)
        torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), masters.to(dtype))


def each(state: dict[Any, Any], change: Callable[[dict[str, Tensor]], object]) -> None:
    for of_parameter in state.values():
        change(of_parameter)


# What somebody does to optimizer.state, as torch's optimizers take it.
WRITTEN: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "emptied": lambda o: o.state.clear(),
    "one emptied": lambda o: o.state.pop(o.param_groups[0]["params"][2]),
    "other tensors": lambda o: each(o.state, lambda s: s.update({k: v * 0.5 for k, v in s.items() if k != "step"})),
    "other values": lambda o: each(o.state, lambda s: [v.mul_(0.5) for k, v in s.items() if k != "step"]),
    "another step": lambda o: each(o.state, lambda s: s.update({k: v * 0 + 7 for k, v in s.items() if k == "step"})),
    "step set back": lambda o: each(o.state, lambda s: [v.zero_() for k, v in s.items() if k == "step"]),
    "other dictionaries": lambda o: o.state.update({p: {k: v * 2 for k, v in s.items()} for p, s in o.state.items()}),
    "another group": lambda o: o.param_groups.__setitem__(0, {**o.param_groups[0], "lr": 0.02}),
}


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize(("optimizer", "options"), STATES[1:], ids=str)
def test_the_optimizers_state_may_be_written(
    engine: str, optimizer: str, options: dict[str, Any], written: str, before: int
) -> None:
    model = network()
    loop = Loop(model, optimizer, **options)
    step = pyperc.TrainStep(prepared(model, engine), optimizer=optimizer, **options)
    (x, y), *more = batches()
    step.gradients(x, y)
    for _ in range(before):
        same(step(x, y), loop(x, y))
    for o in (step.optimizer, loop.optimizer):
        if o.state:
            WRITTEN[written](o)
    for x, y in more:
        same(step(x, y), loop(x, y))
        same_parameters(step, loop)
        for p, q in zip(model.parameters(), loop.model.parameters(), strict=True):  # read in place
            same(step.optimizer.state[p], loop.optimizer.state[q])
    assert step.engine == engine


def test_the_state_of_what_thaws_is_there_at_once(engine: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    loop = Loop(model, "adam", lr=0.01)
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam", lr=0.01)
    for x, y in batches():
        same(step(x, y), loop(x, y))
    for net in (model, loop.model):
        net[0].requires_grad_(True)
    same(step(x, y), loop(x, y))
    same(step.optimizer.state[model[0].weight], loop.optimizer.state[loop.model[0].weight])


def test_no_momentum_yet(engine: str) -> None:
    """As torch's SGD wrote it into its state for long."""
    model = network()
    loop, step = (made(model) for made in (lambda m: Loop(m, lr=0.1), lambda m: pyperc.TrainStep(m, lr=0.1)))
    prepared(model, engine)
    for o in (step.optimizer, loop.optimizer):
        for p in o.param_groups[0]["params"]:
            o.state[p]["momentum_buffer"] = None
        o.param_groups[0].update(momentum=0.9, dampening=0.5)
    run_both(step, loop, batches())


def test_an_order_of_rows_that_are_none(engine: str) -> None:
    step = pyperc.TrainStep(prepared(network(), engine), lr=0.1)
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(3, (8,))
    losses = torch.zeros(2, dtype=F64)
    for wrong in (8, -1):
        with pytest.raises(IndexError, match=f"step: order must hold rows from 0 to 7, got {wrong}"):
            step.epoch(x, y, torch.tensor([0, 7, wrong]), 2, losses)
        assert step.batches == 1
    assert step.steps == 2
    with pytest.raises(IndexError, match=r"y must hold classes|Target . is out of bounds"):
        step.epoch(x, y + 3, torch.tensor([0, 7, 1]), 2, losses)


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


def test_release_is_followed_by_the_next_step(engine: str) -> None:
    model = network()
    loop = Loop(model, "adam")
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam")
    step.release()
    for x, y in batches():
        same(step(x, y), loop(x, y))
        step.release()
    run_both(step, loop, batches())


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
