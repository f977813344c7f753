"""The machinery around a training loop, by value: the same loop with the fused and with the plain network."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import close, pair, plain, same_gradients
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import pyperc

F64 = torch.float64


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 6, dtype=F64)


def train(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 4, set_to_none: bool = True
) -> None:
    target = torch.linspace(-1, 1, x.shape[0] * 3, dtype=x.dtype).reshape(x.shape[0], 3)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = F.mse_loss(network(x), target)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def trained_alike(make: Callable[[Any], torch.optim.Optimizer], x: Tensor, **options: Any) -> None:
    model, other = pair()
    before = [p.detach().clone() for p in model.parameters()]
    for network in (model, other):
        train(network, make(network.parameters()), x, **options)
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    close(model.state_dict(), other.state_dict())


OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"SparseAdam", "Muon"}))
def test_every_optimizer(name: str, x: Tensor) -> None:
    learning_rate = {} if name == "Adadelta" else {"lr": 0.01}
    trained_alike(lambda parameters: OPTIMIZERS[name](parameters, **learning_rate), x)


def test_muon_for_the_weights(x: Tensor) -> None:
    if "Muon" not in OPTIMIZERS:
        pytest.skip("this torch has no Muon")
    model, other = pair()
    for network in (model, other):
        train(network, torch.optim.Muon([p for p in network.parameters() if p.dim() == 2]), x)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-3, atol=1e-3)  # bfloat16 within


def test_sparse_adam_refuses_dense_gradients_as_always(x: Tensor) -> None:
    model, _ = pair()
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        train(model, torch.optim.SparseAdam(model.parameters()), x)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, cls in sorted(OPTIMIZERS.items())
        for option in ("foreach", "fused")
        if option in inspect.signature(cls).parameters
    ],
)
def test_foreach_and_fused_optimizers(name: str, option: str, x: Tensor) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return OPTIMIZERS[name](parameters, **({} if name == "Adadelta" else {"lr": 0.01}), **{option: True})

    trained_alike(make, x)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_both_ways_to_zero_the_gradients(set_to_none: bool, x: Tensor) -> None:
    trained_alike(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), x, set_to_none=set_to_none)


def test_an_optimizer_within_the_backward_pass(x: Tensor) -> None:
    model, other = pair()
    for network in (model, other):
        for parameter in network.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            network(x).square().sum().backward()
    close(model.state_dict(), other.state_dict())


def test_gradient_accumulation_clipping_and_a_schedule(x: Tensor) -> None:
    model, other = pair()
    for network in (model, other):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
        for _ in range(4):
            optimizer.zero_grad()
            for part in x.chunk(4):
                (network(part).square().mean() / 4).backward()
            nn.utils.clip_grad_value_(network.parameters(), 0.05)
            norm = nn.utils.clip_grad_norm_(network.parameters(), 0.1, error_if_nonfinite=True)
            assert 0 < norm < 1
            optimizer.step()
            schedule.step()
    close(model.state_dict(), other.state_dict())


def test_grad_scaler_scales_back_and_skips_infinities() -> None:
    model, other = pair(dtype=torch.float32)
    x = torch.randn(8, 6)
    for network in (model, other):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for factor in (1.0, 1e38, 1.0):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = network(x)
            scaler.scale(y.float().square().mean() * factor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**11
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-6)


def test_moving_averages_of_the_weights(x: Tensor) -> None:
    model, other = pair()
    averages = []
    for network in (model, other):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        swa, schedule = AveragedModel(network), SWALR(optimizer, swa_lr=0.05)
        for _ in range(4):
            train(network, optimizer, x, steps=1)
            ema.update_parameters(network)
            swa.update_parameters(network)
            schedule.step()
        update_bn([x], swa)
        averages.append((ema(x), swa(x), ema.state_dict(), swa.state_dict()))
    close(*averages)
    assert (averages[0][0] - model(x)).abs().max() > 1e-4


def test_anomaly_mode_gives_the_same_gradients(x: Tensor) -> None:
    model, other = pair()
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        same_gradients(model, other, x)


def test_hooks_on_layers_network_and_backward(x: Tensor) -> None:
    model, other = pair()
    seen: list[list[tuple[str, tuple[int, ...]]]] = []
    for network in (model, other):
        calls: list[tuple[str, tuple[int, ...]]] = []
        network.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        network.register_forward_hook(lambda m, args, y: y + 1)
        network.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
        network.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 0.5,))
        network[2].register_forward_hook(lambda m, a, y, calls=calls: calls.append(("forward", tuple(y.shape))))
        network[2].register_full_backward_hook(
            lambda m, dx, dy, calls=calls: calls.append(("backward", tuple(dx[0].shape)))
        )
        network[0].weight.register_hook(lambda dw: dw * 5)
        network[4].bias.register_post_accumulate_grad_hook(
            lambda p, calls=calls: calls.append(("accumulated", tuple(p.grad.shape)))
        )
        seen.append(calls)
    same_gradients(model, other, x)
    assert sorted(seen[0]) == sorted(seen[1])
    assert len(seen[0]) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, x: Tensor) -> None:
    model, other = pair((6, 6, 6, 6))
    same_gradients(model, other, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    same_gradients(model, other, x, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant))


def test_hooks_on_saved_tensors_and_offloading(x: Tensor) -> None:
    for name in ("tanh", "gelu"):
        model, other = pair(activation=name)
        packed: list[torch.Size] = []

        def pack(t: Tensor, packed: list[torch.Size] = packed) -> Any:
            packed.append(t.shape)
            return t.to(torch.float64).numpy(force=True).copy()

        def saved(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
                return model(x)

        def offloaded(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return model(x)

        same_gradients(model, other, x, saved)
        same_gradients(model, other, x, offloaded)
        assert torch.Size([8, 9]) in packed
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        same_gradients(model, other, x)


def flops(network: nn.Module, x: Tensor, backward: bool = True) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        y = network(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops(), {k: dict(v) for k, v in counter.get_flop_counts().items()}


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("lead", [(8,), (2, 4)], ids=str)
def test_flops_are_those_that_torch_counts(lead: tuple[int, ...], needs_input: bool) -> None:
    model, other = pair(activation="gelu")
    x = torch.randn(*lead, 6, dtype=F64, requires_grad=needs_input)
    want, by_module = flops(other, x)
    got, mine = flops(model, x)
    assert got == want > 0
    assert {k.replace("MLP", "Sequential"): v for k, v in mine.items()} == by_module
    assert flops(model, x, backward=False)[0] == flops(other, x, backward=False)[0]
    weights, biases = [m.weight for m in model[::2]], [m.bias for m in model[::2]]
    assert flops(lambda x: pyperc.functional.mlp(x, weights, biases, ["gelu", "gelu", "identity"]), x)[0] == want
    model[0].requires_grad_(False)
    other[0].requires_grad_(False)
    assert flops(model, x)[0] == flops(other, x)[0]
    y, z = model(x), other(x)
    counts = []
    for output in (y, z):
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_fake_tensors_have_the_shapes_and_cost_nothing() -> None:
    with FakeTensorMode():
        model = pyperc.MLP([60000, 70000, 10], "gelu")
        y = model(torch.empty(512, 60000))
        assert y.shape == (512, 10)
        assert y.device.type == "cpu"
        y.sum().backward()
        assert model[0].weight.grad.shape == (70000, 60000)


def test_the_profiler_shows_readable_names(x: Tensor) -> None:
    model, _ = pair()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(x).sum().backward()
    events = {event.key: event for event in profiler.key_averages(group_by_input_shape=True)}
    assert events["pyperc::mlp"].count == 1
    assert events["pyperc::mlp"].input_shapes[0] == [8, 6]
    assert events["MlpBackward"].count == 1


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Scaled(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode that changes what an operation computes: it must be asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.tanh.default else result


def test_modes_are_shown_the_layers(x: Tensor) -> None:
    model, other = pair()
    for network in (model, other):
        with Seen() as seen:
            y = network(x)
        close(y, other(x))
        assert seen.names == ["linear", "tanh", "linear", "tanh", "linear"]
    with Scaled():
        got, want = model(x), other(x)
    close(got, want)
    assert (got - model(x)).abs().max() > 1e-3


class Wrapper(Tensor):
    """A wrapper subclass that counts the operations which it unwraps for."""

    inner: Tensor
    seen: list[str] = []  # noqa: RUF012
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )
        self.inner = inner.detach()
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace == "aten", f"asked for {func}"
        cls.seen.append(str(func))
        unwrap = lambda t: t.inner if isinstance(t, Wrapper) else t  # noqa: E731
        wrap = lambda t: Wrapper(t) if isinstance(t, Tensor) else t  # noqa: E731
        tree_map = torch.utils._pytree.tree_map
        return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {})))


class Named(Tensor):
    """A subclass with a __torch_function__ and data of its own."""


@pytest.mark.parametrize("wrapped", ["x", "weights", "both"])
def test_wrapper_subclasses_are_shown_torchs_own_operations(wrapped: str, x: Tensor) -> None:
    model, other = pair(activation="gelu")
    want = other(x)
    wanted = torch.autograd.grad(want.square().sum(), list(other.parameters()))
    if wrapped != "x":
        for layer in model[::2]:
            layer.weight = nn.Parameter(Wrapper(layer.weight.detach()))
            layer.bias = nn.Parameter(Wrapper(layer.bias.detach()))
    weights, biases = [m.weight for m in model[::2]], [m.bias for m in model[::2]]
    activations = ["gelu", "gelu", "identity"]
    for run in (model, lambda x: pyperc.functional.mlp(x, weights, biases, activations)):
        Wrapper.seen.clear()
        y = run(x if wrapped == "weights" else Wrapper(x))
        assert isinstance(y, Wrapper)
        close(y.detach().inner, want.detach())
        got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        close([g.inner if isinstance(g, Wrapper) else g for g in got], list(wanted))
        assert Wrapper.seen
        with torch.inference_mode():
            close(run(x if wrapped == "weights" else Wrapper(x)).inner, want.detach())


def test_subclasses_with_torch_function_keep_their_type(x: Tensor) -> None:
    model, other = pair()
    y = model(x.as_subclass(Named))
    assert type(y) is Named
    close(y.as_subclass(Tensor), other(x))
    J = pyperc.functional.mlp(x.as_subclass(Named), [model[0].weight], [model[0].bias], ["tanh"])
    close(J.as_subclass(Tensor), other[:2](x))


def test_a_physics_informed_loss_trains_to_the_same_curve() -> None:
    """Poisson's equation: the loss holds the Laplacian of a tanh network, and its gradient a third derivative."""
    model = pyperc.MLP([2, 16, 16, 1], "tanh", dtype=F64)
    curves = []
    inside = torch.rand(24, 2, dtype=F64)
    border = torch.cat([torch.rand(8, 1, dtype=F64), torch.randint(2, (8, 1)).to(F64)], 1)
    for network in (model, plain(model)):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        curves.append([])
        for _ in range(25):
            s = inside.clone().requires_grad_()
            (du,) = torch.autograd.grad(network(s).sum(), s, create_graph=True)
            laplacian = sum(torch.autograd.grad(du[:, i].sum(), s, create_graph=True)[0][:, i] for i in range(2))
            loss = (laplacian + 1).square().mean() + 10 * network(border).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.7 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-12, atol=1e-12)


def test_the_hessian_of_a_scalar_network_and_of_its_loss(x: Tensor) -> None:
    model, other = pair((6, 9, 1), "gelu")
    for point in (x[0], x[1]):
        want = torch.func.hessian(lambda v: other(v).squeeze())(point)
        assert want.abs().max() > 1e-3
        close(torch.func.hessian(lambda v: model(v).squeeze())(point), want)
        close(torch.autograd.functional.hessian(lambda v: model(v).squeeze(), point), want)
        close(torch.func.jacfwd(torch.func.jacfwd(lambda v: model(v).squeeze()))(point), want)


@pytest.mark.parametrize("name", ["tanh", "gelu", "softplus", "relu"])
def test_gradcheck_of_the_module_in_every_mode(name: str) -> None:
    model, _ = pair((3, 4, 2), name)
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    parameters = dict(model.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (x, *parameters.values())
    torch.autograd.gradcheck(
        call, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True, check_batched_grad=True)
