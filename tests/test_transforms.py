"""Forward mode, torch.func, torch.autograd.functional, autocast, half precisions, by value against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import ACTIVATIONS, ALTERED, Activation, check, composition, draw, named, native, peak
from small import F64, as_function, same, small
from torch import Tensor
from torch.autograd import forward_ad

from pyperc import _C

TANH, RELU, GELU = named("tanh"), named("relu"), named("gelu")
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)


@EVERY_ACTIVATION
def test_forward_mode_by_value(activation: Activation) -> None:
    function, leaves = as_function(small(activation))
    plain, _ = as_function(small(activation), composition)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    got, want = (torch.func.jvp(f, tuple(leaves), tuple(tangents)) for f in (function, plain))
    same(got, want)
    assert peak(want[1]) > 1e-3 or activation.name in ("heaviside", "sign")
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, tangents, strict=True)))
        primal, tangent = forward_ad.unpack_dual(dual)
        same((primal, tangent), want)


@pytest.mark.parametrize("which", ["dx", "dw[0]", "db[1]"])
def test_forward_mode_with_the_tangent_of_one_argument(which: str) -> None:
    net = small(GELU)
    tangents = []
    for forward in (native, composition):
        with forward_ad.dual_level():
            function, leaves = as_function(net, forward)
            at = list(net.leaves).index(which)
            leaves[at] = forward_ad.make_dual(leaves[at], torch.ones_like(leaves[at]))
            tangents.append(forward_ad.unpack_dual(function(*leaves)).tangent)
    assert tangents[0] is not None
    assert peak(tangents[1]) > 1e-3
    same(*tangents)


def test_forward_over_reverse() -> None:
    net = small(GELU)
    got = []
    for forward in (native, composition):
        function, leaves = as_function(net.requires_grad(), forward)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0]))
            (dw,) = torch.autograd.grad(function(dual, *leaves[1:]).sum(), leaves[1])
            got.append(forward_ad.unpack_dual(dw).tangent)
    assert peak(got[1]) > 1e-3
    same(*got)


def functional_cases() -> list[tuple[str, Callable[[Callable[..., Tensor], list[Tensor]], object]]]:
    func = torch.func
    return [
        ("grad", lambda f, v: func.grad(lambda *a: f(*a).sin().sum(), argnums=tuple(range(len(v))))(*v)),
        ("vjp", lambda f, v: func.vjp(f, *v)[1](torch.ones(2, 2, dtype=F64))),
        ("vmap over x", lambda f, v: func.vmap(f, in_dims=(0, *[None] * (len(v) - 1)))(*v)),
        ("vmap over w", lambda f, v: func.vmap(lambda w: f(v[0], w, *v[2:]))(torch.stack([v[1], 2 * v[1]]))),
        ("vmap over everything", lambda f, v: func.vmap(f)(*(torch.stack([t, t + 1]) for t in v))),
        ("jacrev", lambda f, v: func.jacrev(f, argnums=(0, 1))(*v)),
        ("jacfwd", lambda f, v: func.jacfwd(f, argnums=(0, 2))(*v)),
        ("hessian", lambda f, v: func.hessian(lambda *a: f(*a).sum(), argnums=(0, 1))(*v)),
        (
            "per-sample gradients",
            lambda f, v: func.vmap(func.grad(lambda w, x: f(x, w, *v[2:]).sum()), in_dims=(None, 0))(v[1], v[0]),
        ),
        ("linearize", lambda f, v: func.linearize(f, *v)[1](*v)),
        ("functional.jacobian", lambda f, v: torch.autograd.functional.jacobian(f, tuple(v))),
        (
            "functional.jacobian vectorized",
            lambda f, v: torch.autograd.functional.jacobian(f, tuple(v), vectorize=True),
        ),
        ("functional.hessian", lambda f, v: torch.autograd.functional.hessian(lambda *a: f(*a).sum(), tuple(v))),
        ("functional.hvp", lambda f, v: torch.autograd.functional.hvp(lambda *a: f(*a).sum(), tuple(v), tuple(v))),
        ("functional.jvp", lambda f, v: torch.autograd.functional.jvp(f, tuple(v), tuple(v))),
    ]


@pytest.mark.parametrize("activation", [TANH, RELU, GELU], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
@pytest.mark.parametrize("transform", [t for _, t in functional_cases()], ids=[n for n, _ in functional_cases()])
def test_functional_transforms_by_value(activation: Activation, transform: Callable[..., object]) -> None:
    net = small(activation)
    got, want = (transform(*as_function(net, forward)) for forward in (native, composition))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_vectorised_backward_of_a_native_graph() -> None:
    net = small(GELU).requires_grad()
    leaves = list(net.leaves.values())
    dy = torch.randn(5, 2, 2, dtype=F64)
    got = torch.autograd.grad(native(net), leaves, dy, is_grads_batched=True)
    want = torch.autograd.grad(composition(net), leaves, dy, is_grads_batched=True)
    same(got, want)


def test_the_jacobian_is_the_product_of_the_layers_jacobians() -> None:
    """Lecture 3.6: J = diag(f'(s(2))) w(2) diag(f'(s(1))) w(1)."""
    net = draw([5, 8, 3], (), TANH, F64)
    s1 = net.w[0] @ net.x + net.b[0]
    s2 = net.w[1] @ torch.tanh(s1) + net.b[1]
    product = torch.diag(TANH.df(s2)) @ net.w[1] @ torch.diag(TANH.df(s1)) @ net.w[0]
    same(torch.autograd.functional.jacobian(lambda x: _C.mlp(x, net.w, net.b, net.chain), net.x), product)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_autocast_is_that_of_linear(activation: Activation, autocast: torch.dtype) -> None:
    net = draw([30, 40, 7], 9, activation, torch.float32)
    got = []
    for forward in (native, composition):
        leaves = net.requires_grad()
        with torch.autocast(torch.get_default_device().type, dtype=autocast):
            y = forward(leaves)
        y.backward(net.dy.to(y.dtype))
        got.append((y.detach(), *(leaf.grad for leaf in leaves.leaves.values())))
    assert [t.dtype for t in got[0]] == [t.dtype for t in got[1]]
    for a, b in zip(*got, strict=True):
        assert peak(a.double() - b.double()) <= 4 * torch.finfo(autocast).eps * max(peak(b), 1e-3)


def test_autocast_leaves_float64_alone_as_linear_does() -> None:
    net = small(TANH)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        got, want = native(net), composition(net)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_autocast_that_is_switched_off_inside() -> None:
    net = draw([30, 40, 7], 9, RELU, torch.float32)
    kind = torch.get_default_device().type
    with torch.autocast(kind, dtype=torch.bfloat16), torch.autocast(kind, enabled=False):
        assert native(net).dtype == torch.float32


def test_parameters_whose_derivative_the_output_cannot_give_run_the_composition() -> None:
    net = draw([30, 40, 7], 9, named("leaky_relu", -0.5), F64, margin=1e-6)
    plan = _C.plan(net.x, net.w, net.b, net.chain)
    assert plan["path"] == "aten"
    assert "parameters" in plan["reason"]
    check(net)


@pytest.mark.parametrize("activation", [named("elu", -0.5), named("elu", 0.0), named("leaky_relu", 0.0)], ids=str)
def test_unusual_parameters(isa: str, activation: Activation) -> None:
    check(draw([30, 40, 7], 9, activation, F64, margin=1e-6))
