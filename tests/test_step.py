"""TrainStep by value against the loop in plain torch: losses, optimizers, groups, schedules, clipping, engines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import F32, F64, Loop, batches, network, prepared, run_both, same, same_parameters, target
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyperc
from pyperc import _C

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.1}),
    "sgd with weight decay": ("sgd", {"lr": 0.1, "weight_decay": 0.3}),
    "sgd with momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "sgd with dampening": ("sgd", {"lr": 0.1, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1}),
    "nesterov": ("sgd", {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1}),
    "sgd upwards": ("sgd", {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.2}),
    "defaults of sgd": ("sgd", {}),
    "adam": ("adam", {"lr": 0.01}),
    "defaults of adam": ("adam", {}),
    "adam with its options": ("adam", {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    "amsgrad upwards": ("adam", {"lr": 0.01, "amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    "adamw": ("adamw", {"lr": 0.01}),
    "adamw with its options": ("adamw", {"lr": 0.01, "betas": (0.6, 0.8), "weight_decay": 0.5, "amsgrad": True}),
    "adamw upwards": ("adamw", {"lr": 0.01, "maximize": True}),
}

Function = Callable[[Tensor, Tensor], Tensor]
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.25], dtype=F64)


def elementwise(loss: Function, reduction: str) -> Function:
    return lambda s, y: getattr(loss(s, y), reduction)()


LOSSES: dict[str, tuple[str, dict[str, Any], Function]] = {
    "cross_entropy": ("cross_entropy", {}, F.cross_entropy),
    "cross_entropy sum": (
        "cross_entropy",
        {"reduction": "sum"},
        lambda s, y: F.cross_entropy(s, y, reduction="sum"),
    ),
    "cross_entropy weighted": (
        "cross_entropy",
        {"weight": CLASS_WEIGHT},
        lambda s, y: F.cross_entropy(s, y, CLASS_WEIGHT),
    ),
    "cross_entropy smoothed": (
        "cross_entropy",
        {"label_smoothing": 0.2},
        lambda s, y: F.cross_entropy(s, y, label_smoothing=0.2),
    ),
    "cross_entropy with all": (
        "cross_entropy",
        {"weight": CLASS_WEIGHT, "label_smoothing": 0.1, "ignore_index": 1},
        lambda s, y: F.cross_entropy(s, y, CLASS_WEIGHT, label_smoothing=0.1, ignore_index=1),
    ),
    "cross_entropy with all, sum": (
        "cross_entropy",
        {"weight": CLASS_WEIGHT, "label_smoothing": 0.1, "ignore_index": 1, "reduction": "sum"},
        lambda s, y: F.cross_entropy(s, y, CLASS_WEIGHT, label_smoothing=0.1, ignore_index=1, reduction="sum"),
    ),
    **{
        f"{name} {reduction}": (name, {"reduction": reduction, **options}, elementwise(function, reduction))
        for reduction in ("mean", "sum")
        for name, options, function in (
            ("mse", {}, lambda s, y: (s - y) ** 2),
            ("logistic", {}, lambda s, y: F.softplus(-y * s)),
            ("hinge", {"threshold": 0.3}, lambda s, y: F.relu(0.3 - y * s)),
            ("squared_hinge", {}, lambda s, y: F.relu(1 - y * s) ** 2),
        )
    },
}


def test_every_loss_of_the_list_is_tested() -> None:
    assert {name for name, _, _ in LOSSES.values()} == {info.name for info in _C.losses()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_optimizers(engine: str, loss: str, optimizer: str) -> None:
    name, options, function = LOSSES[loss]
    kind, hyperparameters = OPTIMIZERS[optimizer]
    model = network()
    loop = Loop(model, kind, function, **hyperparameters)
    step = pyperc.TrainStep(prepared(model, engine), name, kind, **options, **hyperparameters)
    rows = (6, 1, 5)
    if "ignore_index" in options:
        given = [(x, y.where(torch.arange(len(y)) > 0, 0)) for x, y in batches(name, rows)]
    else:
        given = batches(name, rows)
    run_both(step, loop, given)
    assert step.engine == engine
    assert step.steps == 3


@pytest.mark.parametrize("sizes", [(5, 3), (5, 1, 3), (5, 17, 33, 65, 3)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", ("leaky_relu", {"negative_slope": 0.2})], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd with momentum", "adam"])
def test_sizes_and_dtypes(
    engine: str, dtype: torch.dtype, sizes: tuple[int, ...], activation: Any, optimizer: str
) -> None:
    kind, options = OPTIMIZERS[optimizer]
    model = network(sizes, activation, dtype)
    loop = Loop(model, kind, **options)
    step = pyperc.TrainStep(prepared(model, engine), "cross_entropy", kind, **options)
    run_both(step, loop, batches(rows=(1, 37, 64, 13), dtype=dtype), dtype)
    assert step.engine == engine


def test_a_network_without_biases_and_one_with_an_output_activation(engine: str) -> None:
    for model in (
        pyperc.MLP([5, 4, 3], bias=False, dtype=F64),
        pyperc.MLP([5, 4, 3], output_activation="sigmoid", dtype=F64),
        pyperc.fuse(nn.Sequential(nn.Linear(5, 4, False, dtype=F64), nn.SiLU(), nn.Linear(4, 3, dtype=F64))),
    ):
        loop = Loop(model, loss=F.mse_loss, lr=0.1)
        run_both(pyperc.TrainStep(prepared(model, engine), "mse", lr=0.1), loop, batches("mse"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_width_0_goes_through_autograd() -> None:
    model = pyperc.fuse(nn.Sequential(nn.Linear(5, 0, dtype=F64), nn.ReLU(), nn.Linear(0, 3, dtype=F64)))
    loop = Loop(model, loss=F.mse_loss, lr=0.1)
    step = pyperc.TrainStep(model, "mse", lr=0.1)
    run_both(step, loop, batches("mse"))
    assert step.engine == "autograd"


def test_probabilities_as_targets(engine: str) -> None:
    model = network()
    options = {"weight": CLASS_WEIGHT, "label_smoothing": 0.1}
    loop = Loop(model, loss=lambda s, y: F.cross_entropy(s, y, **options), lr=0.1)
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1, **options)
    run_both(step, loop, [(x, torch.rand(len(x), 3, dtype=F64)) for x, _ in batches()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_weights_of_the_samples(engine: str, loss: str, reduction: str) -> None:
    options = {"weight": CLASS_WEIGHT, "ignore_index": 2} if loss == "cross_entropy" else {}
    model = network()

    def weighted(s: Tensor, y: Tensor) -> Tensor:
        if loss == "mse":
            losses, divisor = (s - y) ** 2 * weight[:, None], weight.sum() * 3
        else:
            losses = F.cross_entropy(s, y, CLASS_WEIGHT, ignore_index=2, reduction="none") * weight
            divisor = (CLASS_WEIGHT[y] * weight)[y != 2].sum()
        return losses.sum() / divisor if reduction == "mean" else losses.sum()

    loop = Loop(model, loss=weighted, lr=0.1)
    step = pyperc.TrainStep(prepared(model, engine), loss, lr=0.1, reduction=reduction, **options)
    for x, y in batches(loss):
        if loss == "cross_entropy":
            y[0] = 0
        weight = torch.rand(len(x), dtype=F64)
        same(step(x, y, weight), loop(x, y))
    same_parameters(step, loop)


def test_weights_of_the_outputs() -> None:
    model = network()
    loop = Loop(model, loss=lambda s, y: ((s - y) ** 2 * CLASS_WEIGHT).sum() / (CLASS_WEIGHT.sum() * len(s)), lr=0.1)
    run_both(pyperc.TrainStep(model, "mse", lr=0.1, weight=CLASS_WEIGHT), loop, batches("mse"))


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (
            nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1),
            nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.1),
        ),
        (nn.MSELoss(reduction="sum"), nn.MSELoss(reduction="sum")),
        (F.cross_entropy, F.cross_entropy),
        (nn.L1Loss(), nn.L1Loss()),
        (lambda s, y: (s - y).abs().amax(), lambda s, y: (s - y).abs().amax()),
    ],
    ids=["nn.CrossEntropyLoss", "nn.MSELoss", "F.cross_entropy", "nn.L1Loss", "a function"],
)
def test_losses_of_torch_and_functions(loss: Any, function: Function) -> None:
    model = network()
    loop = Loop(model, loss=function, lr=0.05)
    kind = "cross_entropy" if "ross" in repr(loss) else "mse"
    run_both(pyperc.TrainStep(model, loss, lr=0.05), loop, batches(kind))


def test_leading_dimensions(engine: str) -> None:
    model = network()
    for name, function in (("cross_entropy", F.cross_entropy), ("mse", F.mse_loss)):
        loop = Loop(model, loss=lambda s, y, f=function: f(s.flatten(0, -2), y), lr=0.1)
        step = pyperc.TrainStep(prepared(copy.deepcopy(model), engine), name, lr=0.1)
        x, y = torch.randn(2, 4, 5, dtype=F64), target(name, 8)
        same(step(x, y.reshape(2, 4, *y.shape[1:])), loop(x, y))
        same_parameters(step, loop)


def test_strided_inputs(engine: str) -> None:
    model = network()
    loop = Loop(model, loss=F.mse_loss, lr=0.1)
    x, y = torch.randn(5, 12, dtype=F64).T[::2], torch.randn(3, 6, dtype=F64).T
    run_both(pyperc.TrainStep(prepared(model, engine), "mse", lr=0.1), loop, [(x, y), (x[:1].expand(4, 5), y[:4])])


def by_layer(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for name, p in model.named_parameters() if name.endswith("weight")], "weight_decay": 0.2},
        {"params": [model[0].bias, model[4].bias], "lr": 0.03, "momentum": 0.0},
    ]


def test_groups_and_a_parameter_in_none(engine: str) -> None:
    """Clipping counts the parameters that are trained; the loop's clips those alone."""
    model = network()
    untouched = model[2].bias.clone()
    loop = Loop(model, params=by_layer, lr=0.1, momentum=0.9)
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1, momentum=0.9, params=by_layer(model))
    run_both(step, loop, batches())
    assert torch.equal(model[2].bias, untouched)
    for groups in (step.param_groups, loop.optimizer.param_groups):
        groups[0]["weight_decay"] = 0.0
        groups[1].update(lr=0.2, momentum=0.5, nesterov=True)
    run_both(step, loop, batches())


def test_frozen_parameters_stay_and_thaw(engine: str) -> None:
    model = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    loop = Loop(model, "adam", lr=0.01)
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam", lr=0.01)
    frozen = [model[0].weight.clone(), model[0].bias.clone(), model[2].bias.clone()]
    run_both(step, loop, batches())
    assert all(map(torch.equal, frozen, (model[0].weight, model[0].bias, model[2].bias)))
    for net in (model, loop.model):
        net[0].requires_grad_(True)
        net[4].weight.requires_grad_(False)
        net[4].weight.grad = None
    run_both(step, loop, batches())


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16], ids=str)
def test_frozen_parameters_with_a_gradient_of_before(engine: str, dtype: torch.dtype) -> None:
    model = prepared(network(dtype=dtype), engine)
    (x, y), *more = batches(dtype=dtype)
    F.cross_entropy(model(x).float(), y).backward()
    model[0].requires_grad_(False)
    frozen, gradients = copy.deepcopy(model[0].state_dict()), [p.grad.clone() for p in model.parameters()]
    step = pyperc.TrainStep(model, lr=0.1, momentum=0.9, weight_decay=0.1)
    for x, y in more:
        step(x, y)
    model[0].requires_grad_(True)
    same(model[0].state_dict(), frozen)
    same([p.grad for p in model.parameters()], gradients)
    masters = step.state_dict().get("masters", [*model.parameters()])
    same([m.to(dtype) for m in masters[:2]], list(frozen.values()))
    assert step.engine == engine


def test_everything_frozen(engine: str) -> None:
    model = network().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1)
    (x, y), *_ = batches()
    same(step(x, y), F.cross_entropy(model(x), y))
    same(model.state_dict(), before)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd with momentum", "adamw"])
@pytest.mark.parametrize("norm", [0.05, 1e3], ids=["clipped", "not clipped"])
def test_clipping(engine: str, optimizer: str, norm: float) -> None:
    kind, options = OPTIMIZERS[optimizer]
    model = network()
    loop = Loop(model, kind, clip=norm, **options)
    step = pyperc.TrainStep(prepared(model, engine), optimizer=kind, clip_grad_norm=norm, **options)
    (x, y), *_ = given = batches()
    _, gradients = step.gradients(x, y)
    run_both(step, loop, given[:1])
    assert step.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients.values()]).norm()))
    run_both(step, loop, given[1:])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR with momentum": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1, 3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)],
        [3],
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["sgd with momentum", "adam"])
def test_schedulers(engine: str, scheduler: str, optimizer: str) -> None:
    kind, options = OPTIMIZERS[optimizer]
    model = network()
    loop = Loop(model, kind, **options)
    step = pyperc.TrainStep(prepared(model, engine), optimizer=kind, **options)
    schedules = [SCHEDULERS[scheduler](o) for o in (step.optimizer, loop.optimizer)]
    for x, y in batches(rows=(4, 3, 5, 2, 6)):
        same(step(x, y), loop(x, y))
        for schedule in schedules:
            schedule.step()
        assert step.param_groups[0]["lr"] == loop.optimizer.param_groups[0]["lr"]
    same_parameters(step, loop)


def test_a_learning_rate_that_is_a_function(engine: str) -> None:
    model = network()
    loop = Loop(model, params=by_layer, lr=0.1)
    groups = by_layer(model)
    groups[1]["lr"] = lambda n: 0.1 if n < 2 else 0.0
    step = pyperc.TrainStep(prepared(model, engine), lr=lambda n: 0.3 / (1 + n), params=groups)
    for n, (x, y) in enumerate(batches()):
        for group, rate in zip(loop.optimizer.param_groups, (0.3 / (1 + n), 0.1 if n < 2 else 0.0), strict=True):
            group["lr"] = rate
        same(step(x, y), loop(x, y))
    same_parameters(step, loop)


def test_a_learning_rate_in_a_tensor(engine: str) -> None:
    model = network()
    loop = Loop(model, lr=torch.tensor(0.1))
    step = pyperc.TrainStep(prepared(model, engine), lr=torch.tensor(0.1))
    run_both(step, loop, batches())
    for optimizer in (step.optimizer, loop.optimizer):
        optimizer.param_groups[0]["lr"].fill_(0.3)
    run_both(step, loop, batches())


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda c: c.__name__)
def test_an_optimizer_of_torch(cls: type[torch.optim.Optimizer]) -> None:
    model = network()
    loop = Loop(model)
    loop.optimizer = cls(loop.model.parameters(), lr=0.01, weight_decay=0.1)
    step = pyperc.TrainStep(model, optimizer=cls(model.parameters(), lr=0.01, weight_decay=0.1))
    run_both(step, loop, batches())


def test_gradients_change_nothing(engine: str) -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam", weight_decay=0.1)
    (x, y), *_ = batches()
    before = copy.deepcopy((model.state_dict(), step.state_dict()))
    loss, gradients = step.gradients(x, y)
    same((model.state_dict(), step.state_dict()), before)
    expected = F.cross_entropy(model(x), y)
    expected.backward()
    same(loss, expected.detach())
    same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_gradients_of_the_user_are_left_alone(engine: str) -> None:
    model = network()
    (x, y), *_ = batches()
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    before = [(p.grad, p.grad.clone()) for p in (x, *model.parameters())]
    versions = [p._version for p in model.parameters()]
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1)
    loss = step(x, y)
    assert not loss.requires_grad
    for p, (grad, value) in zip((x, *model.parameters()), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))


class Recorded(TorchDispatchMode):
    """The names of the operations that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_autograd_takes_the_operations_of_the_loop_and_no_other(optimizer: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    loop, step = Loop(model, optimizer), pyperc.TrainStep(model, optimizer=optimizer)
    (batch,) = batches(rows=[6], dtype=F32)
    called: list[list[str]] = []
    for run in (step, loop):
        run(*batch)  # makes the optimizer's state
        with Recorded() as recorded:
            run(*batch)
        called.append(recorded.names)
    assert called[0] == called[1]


def test_a_graph_from_before_a_step_is_refused(engine: str) -> None:
    model = network()
    (x, y), *_ = batches()
    output = model(x)
    pyperc.TrainStep(prepared(model, engine), lr=0.1)(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_steps_under_no_grad(engine: str) -> None:
    model = network()
    loop = Loop(model, lr=0.1)
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1)
    for x, y in batches():
        with torch.no_grad():
            loss = step(x, y)
        same(loss, loop(x, y))
    same_parameters(step, loop)


def test_an_epoch_is_its_steps(engine: str) -> None:
    model = network()
    other = copy.deepcopy(model)
    step = pyperc.TrainStep(prepared(model, engine), optimizer="adam", lr=lambda n: 0.1 / (1 + n))
    one_by_one = pyperc.TrainStep(prepared(other, engine), optimizer="adam", lr=lambda n: 0.1 / (1 + n))
    x, y, weight = torch.randn(23, 5, dtype=F64), torch.randint(3, (23,)), torch.rand(23, dtype=F64)
    for order in (torch.randperm(23), torch.tensor([3, 3, 22, 0, 7]), None):
        rows = (torch.arange(23) if order is None else order).split(4)
        losses = torch.full((len(rows),), torch.nan, dtype=F64)
        assert step.epoch(x, y, order, 4, losses, weight=weight) == step.batches == len(rows)
        assert torch.equal(losses, torch.stack([one_by_one(x[batch], y[batch], weight[batch]) for batch in rows]))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert step.steps == one_by_one.steps == 14


def test_an_epoch_in_parts(engine: str) -> None:
    step = pyperc.TrainStep(prepared(network(), engine), lr=0.1, on_nan="raise")
    x, y, losses = torch.randn(20, 5, dtype=F64), torch.randint(3, (20,)), torch.zeros(7, dtype=F64)
    assert step.epoch(x, y, None, 3, losses, seconds=0.0) == 1
    assert step.epoch(x, y, None, 3, losses, begin=1) == step.steps == 7
    assert losses.count_nonzero() == 7
    assert step.epoch(x, y, None, 3, losses[:0]) == 0
    x[13] = torch.nan
    with pytest.raises(FloatingPointError, match="in step 12"):
        step.epoch(x, y, None, 3, losses)
    assert step.batches == 4


def test_inputs_of_another_dtype(engine: str) -> None:
    model = network(dtype=F32)
    step = pyperc.TrainStep(prepared(model, engine), lr=0.1)
    loop = Loop(model, lr=0.1)
    x, y, losses = torch.randn(20, 5, dtype=F64), torch.randint(3, (20,)), torch.zeros(4, dtype=F64)
    step.epoch(x, y, None, 5, losses)
    same(losses.float(), torch.stack([loop(*batch) for batch in zip(x.float().split(5), y.split(5), strict=True)]), F32)
    same(step(x, y), loop(x.float(), y), F32)
    same_parameters(step, loop, F32)


def test_inputs_are_scaled_on_the_way_in(engine: str) -> None:
    images, y = torch.randint(256, (12, 5), dtype=torch.uint8), torch.randint(3, (12,))
    shift = torch.randn(5, dtype=F64)
    model = network()
    for scale, offset in ((1 / 255, -0.5), (1 / 255, shift), (1.0, 0.0)):
        net = copy.deepcopy(model)
        loop = Loop(net, lr=0.1)
        step = pyperc.TrainStep(prepared(net, engine), lr=0.1, scale=scale, shift=offset)
        x = images.double() * scale + offset
        same(step(images, y), loop(x, y))
        losses = torch.zeros(3, dtype=F64)
        step.epoch(images, y, None, 5, losses)
        same(losses, torch.stack([loop(*batch) for batch in zip(x.split(5), y.split(5), strict=True)]))
        same_parameters(step, loop)
