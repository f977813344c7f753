"""What autograd offers, by value: derivatives of higher order, graphs kept and used twice, changes in place, hooks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from reference import (
    ACTIVATIONS,
    ALTERED,
    Activation,
    Network,
    check,
    composition,
    draw,
    named,
    native,
    peak,
    results,
    smooth,
)
from small import F64, as_function, same, small
from torch import Tensor

import pyperc
from pyperc import _C

TANH, RELU, GELU = named("tanh"), named("relu"), named("gelu")
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)
SMOOTH = [a for a in ACTIVATIONS if smooth(a)]
CHANGED_IN_PLACE = "modified by an inplace operation"


@EVERY_ACTIVATION
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(activation: Activation, bias: bool) -> None:
    function, leaves = as_function(small(activation, bias=bias).requires_grad())
    assert torch.autograd.gradcheck(function, leaves)


@EVERY_ACTIVATION
def test_gradgradcheck(activation: Activation) -> None:
    function, leaves = as_function(small(activation).requires_grad())
    assert torch.autograd.gradgradcheck(function, leaves)


def derivative(forward: Callable[[Network], Tensor], net: Network, order: int) -> list[Tensor]:
    """The gradient of a scalar made of the gradient of a scalar ..., `order` times, at every leaf."""
    leaves = list(net.leaves.values())
    seed = torch.Generator(net.x.device).manual_seed(1)
    y = (forward(net) * net.dy).sum()
    for i in range(order):
        grads = torch.autograd.grad(y, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        y = sum((g * torch.randn(g.shape, generator=seed, dtype=g.dtype, device=g.device)).sum() for g in grads)
        if not y.requires_grad:
            assert i < order - 1 or not any(g.requires_grad for g in grads)
            break
    return [g.detach() for g in grads]


@EVERY_ACTIVATION
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_double_backward_by_value(isa: str, dtype: torch.dtype, activation: Activation, layers: int) -> None:
    net = draw([7, 20, 33, 19, 5][: layers + 1], 6, activation, dtype, margin=1e-3).requires_grad()
    want = derivative(composition, net.to(F64).requires_grad(), 2)
    own = derivative(composition, net, 2)
    for got, torchs, reference in zip(derivative(native, net, 2), own, want, strict=True):
        scale = torch.finfo(dtype).eps * 200 * max(peak(w) for w in want)
        assert peak(got.double() - reference) <= 2 * peak(torchs.double() - reference) + scale
    if activation in SMOOTH:
        assert all(peak(reference) > 1e-3 for reference in want), "the test would not see a zero"


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_third_derivative_by_value(activation: Activation) -> None:
    net = small(activation).requires_grad()
    got, want = derivative(native, net, 3), derivative(composition, net, 3)
    assert all(peak(w) > 1e-4 for w in want)
    same(tuple(got), tuple(want))


@pytest.mark.parametrize("needed", [("dx",), ("dw[0]",), ("db[1]",), ("dw[0]", "dw[1]"), ("dx", "db[0]")], ids=" ".join)
def test_double_backward_where_some_need_a_gradient(needed: tuple[str, ...]) -> None:
    net = small(GELU).requires_grad(lambda name: name in needed)
    leaves = [net.leaves[name] for name in needed]

    def second(forward: Callable[[Network], Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad((forward(net) ** 2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)

    same(second(native), second(composition))


def test_double_backward_through_the_incoming_gradient_alone() -> None:
    net = small(TANH).requires_grad(lambda name: name == "dw[0]")
    dy = net.dy.clone().requires_grad_()
    results_ = []
    for forward in (native, composition):
        (dw,) = torch.autograd.grad(forward(net), net.w[0], dy, create_graph=True)
        results_.append(torch.autograd.grad((dw**2).sum(), dy)[0])
    same(*results_)
    assert peak(results_[0]) > 1e-3


def test_gradient_penalty_reaches_the_weights() -> None:
    """The penalty on |dx| of WGAN: backward() through a graph that holds a first backward."""
    grads = []
    for forward in (native, composition):
        net = small(GELU, sizes=(5, 20, 1), batch=9).requires_grad()
        (dx,) = torch.autograd.grad(forward(net).sum(), net.x, create_graph=True)
        ((dx.norm(dim=1) - 1) ** 2).mean().backward()
        grads.append(tuple(w.grad for w in net.w))
    same(*grads)
    assert all(peak(g) > 1e-4 for g in grads[0])


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_second_derivative_of_a_piecewise_linear_network_is_a_zero_that_is_there(name: str, trained: bool) -> None:
    """As of torch's own modules: a penalty on |dx| runs whatever network it is given."""
    model = pyperc.MLP([4, 8, 1], name).requires_grad_(trained)
    x = torch.randn(16, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert peak(second) == 0


def test_no_warning_says_that_a_derivative_is_missing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derivative(native, small(TANH).requires_grad(), 2)


def test_retained_graph_gives_the_same_gradients_twice(isa: str, dtype: torch.dtype) -> None:
    net = draw([9, 20, 5], 7, GELU, dtype).requires_grad()
    y, leaves = native(net), list(net.leaves.values())
    first = torch.autograd.grad(y, leaves, net.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, net.dy, retain_graph=True)
    third = torch.autograd.grad(y, leaves, net.dy)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, second, third, strict=True))


@pytest.mark.parametrize("activation", [TANH, GELU, named("identity")], ids=str)
def test_backward_twice_without_the_graph_is_torchs_own_error(activation: Activation) -> None:
    net = small(activation).requires_grad()
    y = native(net)
    y.backward(net.dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(net.dy)


@pytest.mark.parametrize("activation", [TANH, GELU], ids=str)
@pytest.mark.parametrize("which", ["dx", "dw[1]"])
def test_a_change_in_place_in_between_is_torchs_own_error(activation: Activation, which: str) -> None:
    net = small(activation).requires_grad()
    y = native(net)
    with torch.no_grad():
        net.leaves[which].add_(1)
    with pytest.raises(RuntimeError, match=CHANGED_IN_PLACE):
        y.backward(net.dy)


def test_what_no_gradient_reads_may_change() -> None:
    """backward reads no bias, and the first w only for dx. Torch's own composition accepts both."""
    net = small(TANH)
    net.dy.fill_(1)
    want = results(composition, net)
    net = net.requires_grad(lambda name: name != "dx")
    y = native(net)
    with torch.no_grad():
        net.b[0].add_(1)
        net.w[0].add_(1)
    y.backward(net.dy)
    same(net.w[0].grad, want["dw[0]"])
    same(net.w[1].grad, want["dw[1]"])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_changed_output_gives_the_right_gradient_or_torchs_error(activation: Activation) -> None:
    net = small(activation)
    want = results(composition, net)
    net = net.requires_grad()
    y = native(net)
    try:
        y.mul_(2)
        got = torch.autograd.grad(y, list(net.leaves.values()), net.dy)
    except RuntimeError as error:
        if CHANGED_IN_PLACE not in str(error):
            raise
    else:
        same(tuple(got), tuple(2 * want[name] for name in net.leaves))


def test_a_weight_that_is_stepped_between_two_forwards() -> None:
    net = small(TANH).requires_grad()
    native(net).backward(net.dy)
    with torch.no_grad():
        for w in net.w:
            w -= 0.1 * w.grad
            w.grad = None
    net.x.grad = None
    y = native(net)
    y.backward(net.dy)
    check(net, {"y": y.detach(), "dx": net.x.grad, "dw[0]": net.w[0].grad, "dw[1]": net.w[1].grad})


def test_the_output_used_twice() -> None:
    net = small(GELU)
    grads = []
    for forward in (native, composition):
        leaves = net.requires_grad()
        y = forward(leaves)
        grads.append(torch.autograd.grad((y * y.detach()).sum() + y.exp().sum(), list(leaves.leaves.values())))
    same(*grads)


def test_gradients_accumulate() -> None:
    net = small(GELU).requires_grad()
    want = results(composition, net)
    for _ in range(3):
        native(net).backward(net.dy)
    for name, leaf in net.leaves.items():
        same(leaf.grad, 3 * want[name])


def test_accumulated_gradients_are_not_aliased() -> None:
    net = small(GELU).requires_grad()
    native(net).backward(net.dy)
    grads = [leaf.grad for leaf in net.leaves.values()]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
    assert all(g.data_ptr() != net.dy.data_ptr() for g in grads)


@pytest.mark.parametrize("activation", [TANH, GELU], ids=str)
def test_a_weight_and_bias_shared_by_two_layers(activation: Activation) -> None:
    net = small(activation, sizes=(4, 4, 4, 4), batch=5)
    grads = []
    for forward in (native, composition):
        w, b = net.w[0].clone().requires_grad_(), net.b[0].clone().requires_grad_()
        x = net.x.clone().requires_grad_()
        forward(Network(x, [w, net.w[1], w], [b, None, b], net.activations, net.dy)).backward(net.dy)
        grads.append((x.grad, w.grad, b.grad))
    same(*grads)


def test_the_input_as_a_weight() -> None:
    grads = []
    for forward in (native, composition):
        x = torch.linspace(-1, 1, 9, dtype=F64).view(3, 3).requires_grad_()
        forward(Network(x, [x, x.T], [None, None], [TANH, TANH], x)).sum().backward()
        grads.append(x.grad)
    same(*grads)


def test_a_network_of_two_calls() -> None:
    net = small(GELU, sizes=(4, 6, 5, 3), batch=5)
    want = results(composition, net)
    net = net.requires_grad()
    hidden = native(Network(net.x, net.w[:2], net.b[:2], net.activations[:2], net.dy))
    y = native(Network(hidden, net.w[2:], net.b[2:], net.activations[2:], net.dy))
    got = torch.autograd.grad(y, list(net.leaves.values()), net.dy)
    same(tuple(got), tuple(want[name] for name in net.leaves))


def test_no_graph_without_grad_mode() -> None:
    net = small(TANH).requires_grad()
    want = native(net).detach()
    with torch.no_grad():
        assert not native(net).requires_grad
    with torch.inference_mode():
        y = native(net)
        assert y.is_inference()
        assert torch.equal(y, want)
    assert not native(small(TANH)).requires_grad
    assert native(net).detach().grad_fn is None


def test_the_node_names_itself() -> None:
    net = small(TANH, sizes=(3, 4, 4, 2)).requires_grad()
    y = native(net)
    assert y.grad_fn is not None
    assert "mlp" in y.grad_fn.name().lower()
    assert len(y.grad_fn.next_functions) >= 7, "one node stands for the network"


def test_inputs_that_are_not_leaves() -> None:
    grads = []
    for forward in (native, composition):
        net = small(GELU).requires_grad()
        w = [w.mul(2) for w in net.w]
        forward(Network(net.x.sin(), w, net.b, net.activations, net.dy)).backward(net.dy)
        grads.append(tuple(leaf.grad for leaf in net.leaves.values()))
    same(*grads)


def test_hooks_on_tensors_and_nodes_run() -> None:
    net = small(TANH).requires_grad()
    want = results(composition, net)
    seen: list[str] = []
    net.w[1].register_hook(lambda g: seen.append("w") or g * 2)
    y = native(net)
    y.register_hook(lambda g: seen.append("y"))
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append("node"))
    y.backward(net.dy)
    assert seen == ["y", "node", "w"]
    same(net.w[1].grad, 2 * want["dw[1]"])


def test_an_undefined_incoming_gradient() -> None:
    net = small(TANH).requires_grad()
    y = native(net)

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> None:
            return None

    Cut.apply(y).sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in net.leaves.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_anomaly_mode_names_the_node_that_made_a_nan() -> None:
    net = small(TANH).requires_grad()
    with torch.autograd.detect_anomaly(check_nan=True):
        y = native(net)
        y.backward(net.dy, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"(?i)mlp.*returned nan"):
            y.backward(net.dy * torch.nan)


@pytest.mark.parametrize("activation", [TANH, GELU], ids=str)
def test_saved_tensor_hooks_see_what_is_saved(activation: Activation) -> None:
    """Hooks that move saved tensors away (to the disk) get all of them, and backward reads what they give back."""
    net = small(activation).requires_grad()
    want = results(native, net)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = native(net)
    assert any(t.data_ptr() == net.w[1].data_ptr() for t in packed)
    assert any(t.data_ptr() == net.x.data_ptr() for t in packed)
    got = torch.autograd.grad(y, list(net.leaves.values()), net.dy)
    assert all(torch.equal(want[name], g) for name, g in zip(net.leaves, got, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        y = native(net)
    same(tuple(torch.autograd.grad(y, list(net.leaves.values()), net.dy)), tuple(want[name] for name in net.leaves))
    with torch.autograd.graph.save_on_cpu():
        y = native(net)
    same(tuple(torch.autograd.grad(y, list(net.leaves.values()), net.dy)), tuple(want[name] for name in net.leaves))


def test_only_what_backward_reads_is_kept() -> None:
    """With f' read from the output, s is never kept: x, the layers' outputs and the parameters are all."""
    net = small(TANH, sizes=(3, 4, 5, 2)).requires_grad()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        native(net)
    parameters = sum(t.numel() for t in (*net.w, *net.b))
    assert sum(t.numel() for t in kept) <= parameters + net.x.numel() + 2 * (4 + 5 + 2)


def test_backward_in_another_thread() -> None:
    net = small(GELU).requires_grad()
    want = results(composition, net)
    y = native(net)
    thread = threading.Thread(target=lambda: y.backward(net.dy))
    thread.start()
    thread.join()
    for name, leaf in net.leaves.items():
        same(leaf.grad, want[name])


def test_activation_checkpointing() -> None:
    net = small(GELU).requires_grad()
    want = results(composition, net)
    torch.utils.checkpoint.checkpoint(
        lambda x: native(Network(x, net.w, net.b, net.activations, net.dy)), net.x, use_reentrant=False
    ).backward(net.dy)
    for name, leaf in net.leaves.items():
        same(leaf.grad, want[name])


def test_the_graph_is_freed_with_the_output() -> None:
    """The node holds no cycle: with the output gone, so is what it saved."""
    net = small(TANH)
    w = [w.requires_grad_() for w in net.w]
    x = net.x * 1
    saved = weakref.ref(x)
    y = _C.mlp(x, w, net.b, net.chain)
    del x
    assert saved() is not None
    del y
    assert saved() is None
