"""bfloat16 and float16 on the CPU: every activation by value, the conversions bit by bit, sums in float32."""

from __future__ import annotations

import pytest
import torch
from reference import ACTIVATIONS, ALTERED, HALVES, Activation, check, check_forward, draw, named, native, results
from shapes import instruction_set
from torch import Tensor

import pyperc
from pyperc import _C

IDENTITY = _C.Chain([("identity", [])])


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def half(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def every_value(half: torch.dtype) -> Tensor:
    return torch.arange(1 << 16).to(torch.uint16).view(half)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with the signs of zeros, any NaN being any other."""
    nan = a.isnan() & b.isnan()
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | nan).all())


@pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)
def test_every_activation_by_value(isa: str, half: torch.dtype, activation: Activation) -> None:
    mr, nr = _C.tile(isa, half)
    jumps = activation.name in ("heaviside", "sign")
    for sizes, batch in [([17, nr + 3], 2 * mr + 1), ([20, 9, 33], mr - 1), ([33, nr, 7, 5], 3)]:
        if jumps and len(sizes) > 2:
            continue  # of two layers, the rounding of the first decides the signs of the second
        net = draw(sizes, batch, activation, half)
        assert _C.plan(net.x, net.w, net.b, net.chain)["path"] == "native"
        check(net)


@pytest.mark.parametrize("k", [1, 2, 31, 33, 64])
def test_sizes_around_the_tile(isa: str, half: torch.dtype, k: int) -> None:
    mr, nr = _C.tile(isa, half)
    for m in (1, 4, mr, mr + 1):
        for n in (1, nr - 1, nr, nr + 1):
            check(draw([k, n], m, named("tanh"), half, seed=m))


def test_loads_widen_every_value_exactly(isa: str, half: torch.dtype) -> None:
    """Loaded, and stored again: every pattern comes back, denormals, infinities and the signs of zeros included."""
    x = every_value(half)
    for length in (x.numel(), x.numel() - 5, 3):
        assert same_bits(_C.activation(x[:length], "identity"), x[:length])
    wide = x[~x.isnan() & (x.abs() >= torch.finfo(half).smallest_normal)]
    assert same_bits(_C.mlp(wide[:, None], [torch.ones(1, 1, dtype=half)], [None], IDENTITY)[:, 0], wide)


def test_stores_round_to_nearest_even(isa: str, half: torch.dtype) -> None:
    """a + b of two numbers, summed in float32, is rounded as torch rounds it: ties, overflow, all signs."""
    info = torch.finfo(half)
    a = every_value(half)
    a = a[torch.isfinite(a) & (a.abs() >= info.smallest_normal)]
    b = torch.cat([torch.tensor([1.0, -info.eps / 2, info.eps * 1.5, 3.0, info.max, -info.max]), torch.randn(26)])
    b = b.to(half)
    got = _C.mlp(torch.ones(1, 1, dtype=half), [a[:, None]], [a.roll(1)], IDENTITY)[0]
    assert same_bits(got, (a.float() + a.roll(1).float()).to(half))
    got = _C.mlp(a[:, None], [torch.ones(len(b), 1, dtype=half)], [b], IDENTITY)
    assert same_bits(got, (a.float()[:, None] + b.float()).to(half))


def test_denormals_are_made_and_kept(isa: str, half: torch.dtype) -> None:
    """By the elementwise kernels everywhere; by products, except those of bfloat16 pairs, which take them for zero."""
    tiny = torch.finfo(half).smallest_normal
    s = torch.linspace(-tiny, tiny, 65, dtype=torch.float64).to(half)
    assert same_bits(_C.activation(s, "identity"), s)
    y = _C.mlp(torch.ones(3, 1, dtype=half), [s[:, None]], [None], IDENTITY)
    flushed = isa == "avx512_bf16" and half == torch.bfloat16
    assert (y == (torch.where(s.abs() < tiny, 0.0, s) if flushed else s)).all()


def test_sums_are_float32(isa: str, half: torch.dtype) -> None:
    """2^k terms of 1 stay countable where the 16-bit format itself would stop at 256 or 2048; so do dw and db."""
    count = 8192
    x = torch.ones(3, count, dtype=half)
    assert (_C.mlp(x, [torch.ones(5, count, dtype=half)], [None], IDENTITY) == count).all()
    net = draw([7, 5], count, named("identity"), half)
    net.x, net.dy = torch.ones_like(net.x), torch.ones_like(net.dy)
    got = results(native, net)
    assert (got["dw[0]"] == count).all()
    assert (got["db[0]"] == count).all()


def test_instruction_sets_agree(half: torch.dtype) -> None:
    net = draw([70, 40, 9], 50, named("gelu"), half)
    outputs = []
    for name in _C.isas():
        with instruction_set(name):
            outputs.append(native(net))
    for y in outputs:
        torch.testing.assert_close(y, outputs[0], rtol=2 * torch.finfo(half).eps, atol=torch.finfo(half).eps)


def test_wide_layers_span_cache_blocks(isa: str, half: torch.dtype) -> None:
    check_forward(draw([2100, 45], 70, named("relu"), half))
    check(draw([13, 45], 2300, named("tanh"), half))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_backward_goes_in_blocks(isa: str, half: torch.dtype, activation: str) -> None:
    """Rows, columns and depth of dx and of dw take several blocks, the last ones smaller; gelu's x is made again."""
    check(draw([213, 410, 257], 421, named(activation), half))


def test_explain_names_the_operands(half: torch.dtype) -> None:
    name = str(half).removeprefix("torch.")
    model = pyperc.MLP([64, 64], dtype=half)
    for isa in _C.isas():
        with instruction_set(isa):
            (layer,) = pyperc.explain(model, torch.zeros(32, 64, dtype=half)).layers
        pairs = isa == "avx512_bf16" and half == torch.bfloat16
        assert f"{name} pairs" if pairs else f"{name} widened to float32" in str(layer)


def test_second_derivatives_are_those_of_the_composition(half: torch.dtype) -> None:
    net = draw([9, 20, 4], 7, named("tanh"), half).requires_grad()
    (dx,) = torch.autograd.grad(native(net), net.x, net.dy, create_graph=True)
    (again,) = torch.autograd.grad(dx.square().sum(), net.w[0])
    assert again.dtype == half
    assert again.abs().max() > 0
