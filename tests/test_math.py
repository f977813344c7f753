"""The elementary functions under the activations, on every instruction set: errors in ulp, bounds, monotony."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from reference import ACTIVATIONS, ALTERED, UNCANCELLED, Activation, Network, named, native, peak, results
from torch import Tensor

from pyperc import _C

F32, F64 = torch.float32, torch.float64
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)


def kernel(activation: Activation, s: Tensor) -> Tensor:
    return _C.activation(s, activation.name, list(activation.parameters))


def float32_sweep(step: int) -> Tensor:
    """Every `step`-th bit pattern of float32 from -inf to inf, ascending: as dense near 0 as it is near 1."""
    infinity = 0x7F800000
    positive = torch.arange(0, infinity + 1, step, dtype=torch.int32).view(F32)
    return torch.cat([-positive.flip(0), positive])


def around(dtype: torch.dtype) -> Tensor:
    """A dense line through where the functions bend, and the powers of two with their neighbours."""
    powers = torch.tensor([math.ldexp(1.0, e) for e in range(-30, 8)], dtype=dtype)
    exact = torch.cat([powers, *(torch.nextafter(powers, powers * to) for to in (0, 2))])
    line = torch.linspace(-25, 25, 20011, dtype=dtype)
    return torch.cat([line, exact, -exact, torch.linspace(-120, 120, 4001, dtype=dtype)]).sort().values


def ulp(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of that dtype around each reference value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(reference.double().abs().clamp(info.smallest_normal, info.max)).exponent - 1
    return info.eps * torch.ldexp(torch.ones_like(exponent, dtype=F64), exponent)


def ulps(got: Tensor, reference: Tensor) -> Tensor:
    error = (got.double() - reference).abs() / ulp(reference, got.dtype)
    return torch.where(torch.isfinite(reference) & torch.isfinite(got), error, 0.0)


def worst(s: Tensor, got: Tensor, reference: Tensor, error: Tensor) -> str:
    at = error.argmax()
    return f"{error[at]:.2f} at s = {s[at].item()!r}: {got[at].item()!r}, not {reference[at].item()!r}"


def test_tanh_is_within_2_ulp_in_float32(isa: str) -> None:
    tanh = named("tanh")
    for s in (float32_sweep(509), around(F32), torch.linspace(-10, 10, 500_009)):
        got, reference = kernel(tanh, s), torch.tanh(s.double())
        error = ulps(got, reference)
        assert error.max() <= 2, worst(s, got, reference, error)


def high_precision(f: Callable[[mpmath.mpf], mpmath.mpf], s: Tensor) -> list[mpmath.mpf]:
    with mpmath.workdps(40):
        return [f(mpmath.mpf(v)) for v in s.tolist()]


def ulps_of(got: Tensor, exact: list[mpmath.mpf]) -> Tensor:
    """The error of float64 values against numbers of 40 digits."""
    reference = torch.tensor([float(v) for v in exact], dtype=F64)
    with mpmath.workdps(40):
        error = torch.tensor(
            [float(abs(mpmath.mpf(g) - e)) for g, e in zip(got.tolist(), exact, strict=True)], dtype=F64
        )
    return error / ulp(reference, F64)


def sigmoid(s: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-s))


HIGH_PRECISION: dict[str, tuple[Callable[[mpmath.mpf], mpmath.mpf], float]] = {
    "tanh": (mpmath.tanh, 2),
    "sigmoid": (sigmoid, 4),
    "elu": (lambda s: s if s > 0 else mpmath.expm1(s), 4),
    "softplus": (lambda s: s if s > 20 else mpmath.log1p(mpmath.exp(s)), 4),
    "gelu": (lambda s: s * mpmath.ncdf(s), 4),
    "gelu_tanh": (lambda s: s * sigmoid(mpmath.sqrt(8 / mpmath.pi) * (s + mpmath.mpf("0.044715") * s**3)), 4),
    "silu": (lambda s: s * sigmoid(s), 4),
}


@pytest.mark.parametrize("name", HIGH_PRECISION)
def test_float64_against_40_digits(isa: str, name: str) -> None:
    f, bound = HIGH_PRECISION[name]
    s = around(F64)[::17]
    s = torch.cat([s, torch.logspace(-300, 2, 200, dtype=F64), -torch.logspace(-300, 2, 200, dtype=F64)])
    got, exact = kernel(named(name), s), high_precision(f, s)
    reference = torch.tensor([float(v) for v in exact], dtype=F64)
    error, allowed = ulps_of(got, exact), bound + an_eps(name, reference, F64)
    assert (error <= allowed).all(), worst(s, got, reference, error - allowed)


def an_eps(name: str, reference: Tensor, dtype: torch.dtype) -> Tensor:
    """In ulp, what gelu may be wrong by where it falls off: e^-(s^2 / 2) has more rounding than an ulp there."""
    return torch.finfo(dtype).eps / ulp(reference, dtype) if name in UNCANCELLED else torch.zeros(1)


def local_maximum(error: Tensor, radius: int = 512) -> Tensor:
    """The largest error among the neighbours of each point of an ascending sweep."""
    return torch.nn.functional.max_pool1d(error[None, None], 2 * radius + 1, 1, radius)[0, 0]


@EVERY_ACTIVATION
def test_float32_is_within_4_ulp_or_twice_torchs_error(isa: str, activation: Activation) -> None:
    """Where torch's float32 result is the rounded float64 one everywhere (relu, ...), so must the kernel's be.

    torch's own gelu cancels, which is no measure: it is 0 at -6.
    """
    for s in (float32_sweep(8191), around(F32)):
        got, own, reference = kernel(activation, s), activation.f(s), activation.exact(s)
        assert torch.equal(torch.isnan(got), torch.isnan(reference))
        exact = torch.equal(own, reference.float())
        if activation.name in UNCANCELLED:
            allowed = 4 + an_eps(activation.name, reference, F32)
        else:
            allowed = torch.zeros(1) if exact else 4 + 2 * local_maximum(ulps(own, reference))
        error = ulps(got, reference.float().double() if exact else reference)
        assert (error <= allowed).all(), worst(s, got, reference, error - allowed)


@pytest.mark.parametrize(("low", "high", "bound"), [(-3, -2, 2**-17), (-4, -3, 2**-13), (-5, -4, 2**-9)])
def test_gelu_keeps_its_tail(isa: str, low: float, high: float, bound: float) -> None:
    """Relative to the exact value, where 1 + erf has little left of it."""
    s = torch.linspace(low, high, 10_007)
    gelu = named("gelu")
    got, reference = kernel(gelu, s), gelu.exact(s)
    error = (got / reference - 1).abs()
    assert error.max() <= bound, worst(s, got, reference, error)
    assert (kernel(gelu, torch.tensor([-12.0, -1e3, -1e30])) == 0).all()


@EVERY_ACTIVATION
def test_slopes_in_float32(isa: str, activation: Activation) -> None:
    """With x = 1 and dy = 1, db is f'(w). f' cancels (1 - y^2), so its error is of the order of eps."""
    s = torch.cat([around(F32), float32_sweep(1 << 20)[1:-1]]).sort().values
    if activation.name in ("heaviside", "sign"):
        assert not results(native, line(s, activation))["db[0]"].any()
        return
    got = results(native, line(s, activation))["db[0]"].double()
    reference, own = activation.exact_df(s), activation.df(s).double()
    jumps = (activation.df(s.double() * (1 + 1e-6)) - activation.df(s.double() * (1 - 1e-6))).abs() > 1e-3
    error = torch.where(jumps | ~torch.isfinite(own), 0.0, (got - reference).abs())
    torch_error = local_maximum(torch.nan_to_num(own - reference).abs())
    eps = torch.finfo(F32).eps * (8 if activation.name == "gelu_tanh" else 2)  # its sigmoid's error times s u'(s), 15
    allowed = 2 * torch_error + eps * peak(reference)
    assert (error <= allowed).all(), worst(s, got, reference, error - allowed)


def line(s: Tensor, activation: Activation) -> Network:
    return Network(
        torch.ones(1, 1, dtype=s.dtype),
        [s[:, None]],
        [torch.zeros_like(s)],
        [activation],
        torch.ones(1, len(s), dtype=s.dtype),
    )


@EVERY_ACTIVATION
def test_monotone_where_the_function_is(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    """On consecutive points of a line: no step down by more than the rounding of its two ends."""
    s = torch.linspace(-12, 12, 100_003, dtype=dtype)
    if (activation.f(s.double()).diff() < 0).any():
        pytest.skip(f"{activation} is not monotone")
    y = kernel(activation, s)
    down = -y.diff().double() / ulp(y[1:].double(), dtype)
    assert down.max() <= 2, worst(s[1:], y[1:], activation.f(s.double())[1:], down)


def test_bounds_are_kept(isa: str, dtype: torch.dtype) -> None:
    s = torch.cat([torch.linspace(-200, 200, 100_003, dtype=dtype), torch.tensor([-torch.inf, torch.inf], dtype=dtype)])
    tanh, sigmoid = kernel(named("tanh"), s), kernel(named("sigmoid"), s)
    assert tanh.abs().max() == 1
    assert (tanh.sign() == s.sign()).all()
    assert sigmoid.min() >= 0
    assert sigmoid.max() == 1
    assert kernel(named("softplus"), s).min() >= 0
    assert (kernel(named("elu"), s) >= -1).all()


def test_tanh_is_odd(isa: str, dtype: torch.dtype) -> None:
    s = torch.cat([around(dtype), torch.randn(10_007, dtype=dtype) * 3])
    assert torch.equal(kernel(named("tanh"), -s), -kernel(named("tanh"), s))


@EVERY_ACTIVATION
def test_the_place_in_a_vector_changes_no_bit(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    """Bodies and tails compute the same: each length from 1 to some vectors, each shift."""
    s = torch.randn(97, dtype=dtype) * 4
    want = kernel(activation, s)
    for length in (*range(1, 40), 64, 65):
        for shift in (0, 1, 7):
            assert torch.equal(kernel(activation, s[shift : shift + length]), want[shift : shift + length])


@EVERY_ACTIVATION
def test_the_epilogue_computes_what_the_function_does(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    """A layer of one input is f(w x): the activation in the epilogue and alone are one code, bit for bit."""
    s = torch.randn(133, dtype=dtype) * 4
    x = torch.ones(37, 1, dtype=dtype)
    y = _C.mlp(x, [s[:, None]], [None], _C.Chain([(activation.name, list(activation.parameters))]))
    assert torch.equal(y, kernel(activation, s).expand(37, -1))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_softplus_overflows_behind_no_threshold(isa: str, dtype: torch.dtype) -> None:
    """With a threshold beyond e^x's range log(1 + e^s) is s there, and its slope is 1."""
    far = named("softplus", 1.0, 1e9)
    s = torch.tensor([39.0, 40.0, 41.0, 88.8, 100.0, 709.9, 1e4, torch.finfo(dtype).max / 2], dtype=dtype)
    assert torch.equal(kernel(far, s), s)
    assert torch.equal(results(native, line(s, far))["db[0]"], torch.ones_like(s))
