"""The native training step by value: the same loop in plain torch, for every loss, optimiser, option and path."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_steps import F64, OPTIMIZERS, gradients_of, network, same, settings_of, step_of
from shapes import instruction_set
from test_plan import PATHS
from torch import Tensor, nn

import pyperc
from pyperc import _C
from pyperc.activation import chain

OPTIONS = [pytest.param(name, options, id=f"{name} {options}") for name, (_, o) in OPTIMIZERS.items() for options in o]


@pytest.fixture(params=[isa for isa in _C.isas() if isa != "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """avx512_bf16 is avx512 in the dtypes that are computed in."""
    with instruction_set(request.param):
        yield request.param


def classes(rows: int, outputs: int) -> Tensor:
    return torch.randint(outputs, (rows,))


def signs(rows: int, outputs: int) -> Tensor:
    return torch.randint(2, (rows, outputs)) * 2.0 - 1.0


def numbers(rows: int, outputs: int) -> Tensor:
    return torch.randn(rows, outputs)


def probabilities(rows: int, outputs: int) -> Tensor:
    return torch.rand(rows, outputs).softmax(1)


def reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum()


# name of the case: loss, its parameters, targets, torch's own.
LOSSES: dict[str, tuple[str, tuple[float, ...], Callable[[int, int], Tensor], Callable[..., Tensor]]] = {
    "mse": ("mse", (), numbers, lambda s, y, reduction: F.mse_loss(s, y, reduction=reduction)),
    "logistic": ("logistic", (), signs, lambda s, y, reduction: reduced(F.softplus(-y * s), reduction)),
    "hinge": ("hinge", (0.7,), signs, lambda s, y, reduction: reduced(F.relu(0.7 - y * s), reduction)),
    "squared_hinge": (
        "squared_hinge",
        (1.0,),
        signs,
        lambda s, y, reduction: reduced(F.relu(1 - y * s) ** 2, reduction),
    ),
    "cross_entropy": ("cross_entropy", (), classes, lambda s, y, **options: F.cross_entropy(s, y, **options)),
    "cross_entropy of probabilities": (
        "cross_entropy",
        (),
        probabilities,
        lambda s, y, **options: F.cross_entropy(s, y, **options),
    ),
}


def test_every_loss_and_optimizer_of_the_lists_is_tested() -> None:
    assert {loss for loss, *_ in LOSSES.values()} == {info.name for info in _C.losses()}
    assert list(OPTIMIZERS) == [info.name for info in _C.optimizers()]


def compare(
    model: nn.Sequential,
    case: str,
    name: str,
    options: dict[str, Any],
    batches: Sequence[int],
    tolerance: float = 1e-12,
    **loss_options: Any,
) -> None:
    """The same steps natively and in torch, on batches of those sizes."""
    loss, parameters, targets, formula = LOSSES[case]
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    make = OPTIMIZERS[name][0]
    optimizer, reference = make(ours.parameters(), **options), make(theirs.parameters(), **options)  # type: ignore[call-arg]
    native = {k: v for k, v in loss_options.items() if k != "weight"}
    if "weight" in loss_options:
        native["class_weight"] = loss_options["weight"]
    step = step_of(ours, optimizer, loss, parameters, **native)
    dtype = next(model.parameters()).dtype
    linears = [m for m in model if isinstance(m, nn.Linear)]
    inputs, outputs = linears[0].in_features, linears[-1].out_features
    loss_options.setdefault("reduction", "mean")
    for rows in batches:
        x = torch.randn(rows, inputs).to(dtype)
        y = targets(rows, outputs)
        y = y if y.dtype == torch.long else y.to(dtype)
        if y.dtype == torch.long and "ignore_index" in loss_options and rows > 1:
            y[0] = loss_options["ignore_index"]
        reference.zero_grad()
        expected = formula(theirs(x), y, **loss_options)
        expected.backward()
        reference.step()
        found = step(x, y)
        torch.testing.assert_close(found, expected.detach(), rtol=tolerance * 10, atol=tolerance)
        assert found.shape == ()
        assert found.dtype == dtype
    same(ours, theirs, tolerance)
    assert step.steps == len(batches)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(value, reference.state[q][key], rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_optimizer_and_option(isa: str, name: str, options: dict[str, Any]) -> None:
    compare(network([7, 33, 18, 5], ("tanh", "gelu")), "mse", name, options, [13, 1, 40, 13, 13, 2, 64, 13])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", LOSSES)
def test_every_loss_and_reduction(isa: str, case: str, reduction: str) -> None:
    for outputs in (1, 5, 19):
        compare(network([6, 17, outputs]), case, "sgd", {"lr": 1e-3}, [9, 1, 33, 9], reduction=reduction)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("case", ["cross_entropy", "cross_entropy of probabilities"])
def test_the_options_of_cross_entropy(isa: str, case: str, smoothing: float, weighted: bool) -> None:
    for outputs, reduction in itertools.product((3, 21), ("mean", "sum")):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        if weighted:
            options["weight"] = torch.rand(outputs, dtype=F64) + 0.1
        if case == "cross_entropy":
            options["ignore_index"] = 2
        compare(network([6, 17, outputs]), case, "adam", {"lr": 1e-3}, [9, 12, 33], **options)


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_loss_with_every_optimizer_in_float32(isa: str, name: str, case: str) -> None:
    compare(network([20, 65, 10], ("relu",), torch.float32), case, name, {"lr": 1e-3}, [32] * 5, 1e-4)


@pytest.fixture
def thresholds() -> Iterator[None]:
    before = _C.thresholds()
    yield
    _C.set_thresholds(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "options"), [OPTIONS[0], OPTIONS[1], OPTIONS[3], OPTIONS[5]])
def test_every_path(isa: str, thresholds: None, path: str, name: str, options: dict[str, Any]) -> None:
    _C.set_thresholds(PATHS[path])
    for threads in (2, 3) if "threads" in path else (1,):
        torch.set_num_threads(threads)
        for sizes, rows, activation in (
            ([20, 33, 7], 3, "tanh"),
            ([20, 33, 40, 7], 70, "gelu"),
            ([64, 5, 90], 33, "relu"),
            ([129, 40], 21, "silu"),
        ):
            compare(network(sizes, (activation,)), "mse", name, options, [rows, rows])


def test_wide_networks_take_blocks_of_every_dimension(isa: str, thresholds: None) -> None:
    torch.set_num_threads(2)
    for path, name in itertools.product(
        ("threads share rows, by layers", "threads share rows, dw summed by rows"), ("sgd", "adam")
    ):
        _C.set_thresholds(PATHS[path])
        # Where a gradient is all but 0 Adam's step is its sign, which rounding decides, unless eps outweighs it.
        settings = {"lr": 1e-3, "eps": 1e-3} if name == "adam" else {"lr": 1e-3}
        compare(network([530, 800, 260], ("relu",), torch.float32), "mse", name, settings, [600], 2e-3)


@pytest.mark.parametrize("activation", [info.name for info in _C.activations()])
def test_every_activation_last_and_between(isa: str, activation: str) -> None:
    model = network([6, 17, 12, 5], (activation,))
    model.append(pyperc.nn.Activation(activation))
    compare(model, "mse", "sgd", {"lr": 0.05}, [9, 9])


def test_sample_weights(isa: str) -> None:
    """The mean divides by the sum of the weights."""
    for case in LOSSES:
        loss, parameters, targets, formula = LOSSES[case]
        model = network([6, 17, 5])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = step_of(model, optimizer, loss, parameters)
        x, y, weight = torch.randn(9, 6, dtype=F64), targets(9, 5), torch.rand(9, dtype=F64)
        y = y if y.dtype == torch.long else y.to(F64)
        rows = torch.stack([formula(model(x[i : i + 1]), y[i : i + 1], reduction="mean") for i in range(9)])
        expected = (rows * weight).sum() / weight.sum()
        loss_found, found = step.gradients(x, y, weight)
        torch.testing.assert_close(loss_found, expected.detach())
        torch.testing.assert_close(found, gradients_of(model, expected))


def test_gradients_change_nothing(isa: str) -> None:
    model = network([6, 17, 12, 5])
    before = copy.deepcopy(model)
    step = step_of(model, torch.optim.Adam(model.parameters()))
    x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
    loss, found = step.gradients(x, y)
    expected = F.mse_loss(model(x), y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradients_of(model, expected))
    same(model, before, 0.0)
    assert step.counts == [0] * 6
    assert step.steps == 0


def test_frozen_parameters_and_groups(isa: str) -> None:
    for frozen in (["0.weight"], ["0.weight", "0.bias"], ["2.weight"], ["4.weight", "4.bias"], ["0.bias", "2.weight"]):
        model = network([6, 17, 12, 5], ("gelu",))
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        theirs = copy.deepcopy(model)

        def groups(model: nn.Module) -> list[dict[str, Any]]:
            weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
            biases = [p for n, p in model.named_parameters() if n == "0.bias"]
            return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.5, "momentum": 0.5}]

        optimizer, reference = torch.optim.SGD(groups(model), lr=0.1), torch.optim.SGD(groups(theirs), lr=0.1)
        step = step_of(model, optimizer)
        for i in range(4):
            for o in (optimizer, reference):
                o.param_groups[0]["lr"] = torch.tensor(0.1) if i == 2 else 0.1 / (i + 1)
            x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
            reference.zero_grad()
            F.mse_loss(theirs(x), y).backward()
            reference.step()
            step(x, y)
        same(model, theirs)


@pytest.mark.parametrize("name", [name for name in _C.isas() if name != "scalar"] or ["scalar"])
@pytest.mark.parametrize(
    ("batch", "sizes", "threads", "frozen"),
    [
        pytest.param(512, [784, 1024, 1024, 10], 2, 1, id="a wide layer above a frozen one"),
        pytest.param(256, [2048, 500, 136, 10], 1, 0, id="the last columns of a thread are packed at once"),
    ],
)
def test_wide_layers_are_updated_within_the_workspace(
    name: str, batch: int, sizes: list[int], threads: int, frozen: int
) -> None:
    torch.set_num_threads(threads)
    model = network(sizes, ("relu",), torch.float32)
    for layer in [m for m in model if isinstance(m, nn.Linear)][:frozen]:
        layer.requires_grad_(False)
    theirs = copy.deepcopy(model)
    step = step_of(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0))
    x, y = torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])
    with instruction_set(name):
        step(x, y)
    F.mse_loss(theirs(x), y).backward()
    torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=10.0).step()
    same(model, theirs, 1e-4)


@pytest.mark.parametrize("max_norm", [1e-2, 1e6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping(isa: str, name: str, max_norm: float) -> None:
    make, options = OPTIMIZERS[name][0], OPTIMIZERS[name][1][-1]
    ours = network([6, 17, 12, 5])
    theirs = copy.deepcopy(ours)
    optimizer, reference = make(ours.parameters(), **options), make(theirs.parameters(), **options)  # type: ignore[call-arg]
    step = step_of(ours, optimizer, max_norm=max_norm)
    for _ in range(3):
        x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
        reference.zero_grad()
        F.mse_loss(theirs(x), y).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        reference.step()
        step(x, y)
        assert step.norm == pytest.approx(norm.item(), rel=1e-12)
    same(ours, theirs)


@pytest.mark.parametrize("stored", [torch.float32, F64, torch.uint8], ids=str)
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_an_epoch_is_its_steps(isa: str, dtype: torch.dtype, stored: torch.dtype, shuffled: bool) -> None:
    rows, size = 50, 12
    X = (torch.rand(rows, 9) * 255).to(stored)
    scale, shift = torch.rand(9, dtype=dtype) / 100, torch.rand(9, dtype=dtype)
    for case, scaled, weighted in (("cross_entropy", True, False), ("mse", False, True)):
        if not scaled and stored != torch.uint8:
            X = X / 255
        loss, parameters, targets, _ = LOSSES[case]
        y = targets(rows, 5)
        y = y if y.dtype == torch.long else y.to(dtype)
        weight = torch.rand(rows, dtype=dtype) if weighted else None
        order = torch.randperm(rows)[:-1] if shuffled else None
        ours = network([9, 17, 5], dtype=dtype)
        theirs = copy.deepcopy(ours)
        rates = torch.rand(5, 1, dtype=F64) * 0.01
        step = step_of(ours, torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), loss, parameters)
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
        single = step_of(theirs, optimizer, loss, parameters)
        if scaled:
            step.set_input(scale, shift)
        losses = torch.zeros(5, dtype=F64)
        at = 0
        while at < len(losses):  # no time: one batch in each call
            at = step.epoch(
                X, y, order, size, losses, at, seconds=0.0 if shuffled else math.inf, weight=weight, lr=rates
            )
        assert at == step.batches == 5
        assert step.steps == 5
        for b, batch in enumerate((torch.arange(rows) if order is None else order).split(size)):
            x = X[batch].to(dtype)
            optimizer.param_groups[0]["lr"] = rates[b, 0].item()
            found = single(x * scale + shift if scaled else x, y[batch], weight[batch] if weighted else None)
            torch.testing.assert_close(losses[b], found.double(), rtol=1e-5, atol=1e-6)
        same(ours, theirs, 1e-12 if dtype == F64 else 1e-5)


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def scrambled(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return x ^ x >> 15


def kept(generator: torch.Generator, rows: int, widths: Sequence[int], p: float) -> list[Tensor]:
    """Which elements a step keeps: csrc/core/random.h once more, from one number of torch's generator."""
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator).item() % 2**64
    masks = []
    for layer, width in enumerate(widths):
        base = mixed((int(seed) + 0x9E3779B97F4A7C15 * (layer + 1)) % 2**64)
        keys = [mixed((base + 0x9E3779B97F4A7C15 * (row + 1)) % 2**64) for row in range(rows)]
        low, high = (torch.tensor([[key >> bits & 0xFFFFFFFF] for key in keys]) for bits in (0, 32))
        masks.append(scrambled(scrambled((torch.arange(width) + low) % 2**32) ^ high) >= p * 2**32)
    return masks


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_dropout_by_value(isa: str, activation: str) -> None:
    """The same masks whatever runs, drawn with one number of the generator; and their share is right."""
    p = 0.3
    for rows, threads in ((64, 1), (64, 3), (1, 1)):
        torch.set_num_threads(threads)
        model = network([6, 40, 33, 5], (activation,))
        generator = torch.Generator().manual_seed(5)
        step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), drop=[p, p, 0.0], generator=generator)
        masks = kept(torch.Generator().manual_seed(5), rows, (40, 33), p)
        x, y = torch.randn(rows, 6, dtype=F64), torch.randn(rows, 5, dtype=F64)
        h = x
        for linear, f, mask in zip(model[0::2], model[1::2], masks, strict=False):
            h = f(linear(h)) * mask / (1 - p)
        expected = F.mse_loss(model[4](h), y)
        loss, found = step.gradients(x, y)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(found, gradients_of(model, expected))
        assert len({generator.get_state().numpy().tobytes(), after_one_number(5)}) == 1
        for mask in masks:
            share = mask.double().mean().item()
            assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / mask.numel())


def after_one_number(seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return generator.get_state().numpy().tobytes()


def test_everything_and_nothing_dropped() -> None:
    for p in (0.0, 1.0):
        model = network([6, 40, 5])
        step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), drop=[p, 0.0])
        x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
        h = model[1](model[0](x)) * (1 - p)
        torch.testing.assert_close(step.gradients(x, y)[1], gradients_of(model, F.mse_loss(model[2](h), y)))


def test_awkward_tensors(isa: str) -> None:
    """Transposed, expanded and flattened inputs, targets of any strides, no rows at all."""
    model = network([6, 17, 5])
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(4, 6, dtype=F64), torch.randn(4, 5, dtype=F64)
    cases = [
        (x.mT.contiguous().mT, y.mT.contiguous().mT),
        (x[:1].expand(4, 6), y[:1].expand(4, 5)),
        (x.reshape(2, 2, 6), y.reshape(2, 2, 5)),
        (x[0], y[0]),
        (x.repeat(1, 2)[:, ::2], y.repeat(1, 2)[:, ::2]),
    ]
    for a, b in cases:
        loss, found = step.gradients(a, b)
        expected = F.mse_loss(model(a), b)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(found[0], torch.autograd.grad(expected, model[0].weight)[0])
    before = copy.deepcopy(model)
    total = step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), reduction="sum")
    assert total(torch.empty(0, 6, dtype=F64), torch.empty(0, 5, dtype=F64)).item() == 0
    same(model, before, 0.0)
    with pytest.raises(FloatingPointError, match="nan in step 1"):
        step(torch.empty(0, 6, dtype=F64), torch.empty(0, 5, dtype=F64))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_with_masters(isa: str, name: str) -> None:
    """Gradients of the rounded network step the float32 masters, which are rounded into it."""
    for case, max_norm in (("mse", math.inf), ("cross_entropy", 0.1)):
        loss, parameters, targets, formula = LOSSES[case]
        make, options = OPTIMIZERS[name][0], OPTIMIZERS[name][1][-1]
        model = network([20, 33, 18, 5], ("tanh", "gelu"), torch.bfloat16)
        masters = copy.deepcopy(model).float()
        theirs, rounded = copy.deepcopy(masters), copy.deepcopy(model)
        optimizer, reference = make(masters.parameters(), **options), make(theirs.parameters(), **options)  # type: ignore[call-arg]
        linears = [[m for m in net if isinstance(m, nn.Linear)] for net in (model, masters)]
        own, wide = ([*(m.weight for m in part), *(m.bias for m in part)] for part in linears)
        groups, states = settings_of(optimizer, wide)
        layers = (("tanh", ()), ("gelu", ()), ("identity", ()))
        step = _C.Step(
            own[:3],
            own[3:],
            chain(layers),
            [0.0] * 3,
            loss,
            parameters,
            name,
            optimizer.param_groups,
            groups,
            states,
            [0] * 6,
            masters=wide,
            max_norm=max_norm,
        )
        order = torch.tensor([3, 0, 12, 7, 7])
        for rows in (13, 1, 13):
            x, y = torch.randn(rows, 20).bfloat16(), targets(rows, 5)
            y = y if y.dtype == torch.long else y.bfloat16()
            expected = formula(rounded(x).float(), y if y.dtype == torch.long else y.float(), reduction="mean")
            for p, gradient in zip(
                theirs.parameters(), torch.autograd.grad(expected, list(rounded.parameters())), strict=True
            ):
                p.grad = gradient.float()
            nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
            reference.step()
            with torch.no_grad():
                for p, q in zip(rounded.parameters(), theirs.parameters(), strict=True):
                    p.copy_(q)
            found = step(x, y)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected.detach(), rtol=2e-2, atol=2e-2)
        # An update of adam is lr long whatever the gradient: its sign may differ where that is nearly zero.
        for p, q in zip(masters.parameters(), theirs.parameters(), strict=True):
            assert (p - q).abs().mean() <= 0.1 * (0.05 if name == "sgd" else 0.01)
        torch.testing.assert_close(
            list(model.parameters()), [p.bfloat16() for p in masters.parameters()], rtol=0, atol=0
        )
        losses = torch.empty(1, dtype=F64)
        assert step.epoch(x.float(), y, order, 5, losses) == 1
        torch.testing.assert_close(
            list(model.parameters()), [p.bfloat16() for p in masters.parameters()], rtol=0, atol=0
        )
        assert losses.isfinite().all()


def test_a_call_that_is_refused_changes_nothing() -> None:
    """Another thread's, during an epoch: neither the settings that the epoch goes by nor what it reads through."""
    torch.set_num_threads(1)
    model = network([64, 128, 8], dtype=torch.float32)
    alone = copy.deepcopy(model)
    x, y, losses = torch.randn(256, 64), torch.randn(256, 8), torch.zeros(4000, dtype=F64)
    order = torch.randint(256, (4000 * 32,))
    scale, shift = torch.rand(64), torch.rand(64)

    def made(net: nn.Sequential) -> tuple[Any, torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        step = step_of(net, optimizer)
        step.set_input(scale, shift)
        return step, optimizer

    made(alone)[0].epoch(x, y, order, 32, losses)
    step, optimizer = made(model)
    thread = threading.Thread(target=step.epoch, args=(x, y, order, 32, losses))
    thread.start()
    while step.batches == 0:
        time.sleep(0)
    optimizer.param_groups[0]["lr"] = math.nan
    for call in (
        lambda: step(x, y),
        lambda: step.gradients(x, y),
        lambda: step.epoch(x, y, order, 32, losses),
        lambda: step.set_input(torch.full((64,), math.nan), shift),
        lambda: setattr(step, "steps", 0),
        step.release,
    ):
        with pytest.raises(RuntimeError, match="running in another thread"):
            call()
    assert step.workspace > 0
    assert thread.is_alive()
    thread.join()
    assert step.steps == 4000
    same(model, alone, 0.0)
