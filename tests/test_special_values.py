"""NaN, infinities, denormals, -0 and huge values go through as they do in torch, in vector bodies and in tails."""

from __future__ import annotations

import math

import pytest
import torch
from reference import ACTIVATIONS, ALTERED, UNCANCELLED, Activation, Network, composition, named, native, results
from shapes import EVERY_DTYPE, awkward_sizes
from torch import Tensor

from pyperc import _C

THRESHOLD_UNITS = ("heaviside", "sign")
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)


def special(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    positive = [
        math.inf,
        info.max,
        math.sqrt(info.max) * 2,
        1e6,
        700.0,
        100.0,
        88.8,
        20.5,
        9.1,
        1.0,
        info.eps / 4,
        info.smallest_normal,
        info.smallest_normal / 1024,
        0.0,
    ]
    return [math.nan, *positive, *(-v for v in positive)]


KINDS = (torch.isnan, torch.isposinf, torch.isneginf)


def kind(t: Tensor) -> Tensor:
    """0 for a finite number, 1, 2, 3 for NaN, inf, -inf."""
    return sum(i * is_kind(t.detach()) for i, is_kind in enumerate(KINDS, start=1))


def same_kind(got: Tensor, own: Tensor, what: str, reference: Tensor | None = None) -> None:
    """NaN where torch has NaN, infinities where torch has them, with their signs.

    Torch in float64, rounded, is as good: its float32 sigmoid and gelu overflow on the way, its gelu(inf) is NaN, and
    where the processor has AMX its products of bfloat16 spread a NaN to other samples.
    """
    differs = kind(got) != kind(own)
    if reference is not None:
        differs &= kind(got) != kind(reference.to(got.dtype))
    at = [tuple(i) for i in differs.nonzero().tolist()]
    assert not at, f"{what}: at {at[0]} {got[at[0]].item()}, torch {own[at[0]].item()}"


def close(got: Tensor, own: Tensor, reference: Tensor, what: str, slack: float = 0.0) -> None:
    """Of the same kind, and where finite within 2 x torch's error + 4 eps + a denormal + slack of the reference."""
    same_kind(got, own, what, reference)
    info = torch.finfo(got.dtype)
    finite = torch.isfinite(got) & torch.isfinite(reference)
    error, torch_error = (got.double() - reference).abs(), (own.double() - reference).abs()
    torch_error = torch.where(torch.isfinite(torch_error), torch_error, 0.0)
    allowed = 2 * torch_error + 4 * info.eps * reference.abs() + info.smallest_normal * info.eps + slack
    at = [tuple(i) for i in (finite & (error > allowed)).nonzero().tolist()]
    assert not at, f"{what}: at {at[0]} {got[at[0]].item()}, torch {own[at[0]].item()}, exact {reference[at[0]].item()}"


@EVERY_DTYPE
@EVERY_ACTIVATION
def test_activation_at_every_position_of_a_row(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    _, nr = _C.tile(isa, dtype)
    ordinary = torch.linspace(-2, 2, 2 * nr + 3, dtype=dtype)
    for position in (0, 1, nr - 1, nr, 2 * nr - 1, 2 * nr, 2 * nr + 1, 2 * nr + 2):
        for value in special(dtype):
            s = ordinary.clone()
            s[position] = value
            got = _C.activation(s, activation.name, list(activation.parameters))
            what = f"{activation}({value}) at {position}"
            close(got, activation.f(s), activation.exact(s), what, slack(activation, dtype))


def slack(activation: Activation, dtype: torch.dtype) -> float:
    """e^-(s^2 / 2), by which gelu falls off, rounds to more than an eps of itself, but not of 1."""
    return torch.finfo(dtype).eps if activation.name in UNCANCELLED else 0.0


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", "hardtanh", "tanh", "gelu", "silu", "elu"])
def test_denormals_are_not_flushed(isa: str, dtype: torch.dtype, name: str) -> None:
    info = torch.finfo(dtype)
    s = torch.full((37,), info.smallest_normal / 64, dtype=dtype)
    got = _C.activation(s, name, list(named(name).parameters))
    assert (got > 0).all()
    assert (got < info.smallest_normal).all()
    got = _C.mlp(torch.ones(3, 1, dtype=dtype), [s[:, None]], [None], named_chain("identity"))
    if isa == "avx512_bf16" and dtype == torch.bfloat16:
        assert (got == 0).all()  # products of pairs take denormals for zero, as larger products of torch do there
    else:
        assert (got == s).all()


def named_chain(*names: str) -> _C.Chain:
    return _C.Chain([(name, list(named(name).parameters)) for name in names])


@EVERY_DTYPE
@EVERY_ACTIVATION
def test_special_summations_forward_and_backward(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    """With one input x = 1, s is w and dw = db = dy f'(s), so every special s meets every special dy."""
    s = torch.tensor(special(dtype), dtype=dtype)
    if activation.name in THRESHOLD_UNITS:
        s = s[~s.isnan()]
    for dy in [
        1.0,
        -0.5,
        0.0,
        math.nan,
        math.inf,
        -math.inf,
        torch.finfo(dtype).max,
        torch.finfo(dtype).smallest_normal / 8,
    ]:
        net = Network(
            torch.ones(1, 1, dtype=dtype),
            [s[:, None]],
            [torch.zeros_like(s)],
            [activation],
            torch.full((1, len(s)), dy, dtype=dtype),
        )
        got, own = results(native, net), results(composition, net)
        if activation.name in THRESHOLD_UNITS:
            same_kind(got["y"], own["y"], f"{activation}")
            if math.isfinite(dy):
                assert (got["db[0]"] == 0).all()
            continue
        reference = results(composition, net.to(torch.float64))
        if activation.name in UNCANCELLED:
            slope = dy * activation.exact_df(s)
            reference |= {"y": activation.exact(s), "db[0]": slope, "dw[0]": slope[:, None]}
        # f' is of the order of 1 and may cancel (1 - y^2), so its error is measured against dy.
        for name, extra in {"y": slack(activation, dtype), "db[0]": 2 * torch.finfo(dtype).eps * abs(dy)}.items():
            what = f"{activation}, dy = {dy}, {name}, s = {s.tolist()}"
            close(got[name], own[name], reference[name].reshape(got[name].shape), what, extra)
        same_kind(got["dw[0]"], own["dw[0]"], f"{activation}, dy = {dy}, dw[0]", reference["dw[0]"])


@EVERY_DTYPE
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "huge"], ids=str)
@pytest.mark.parametrize("place", ["x", "w", "b", "dy"])
def test_special_values_through_the_products(isa: str, dtype: torch.dtype, place: str, value: float | str) -> None:
    """Only what depends on the special element changes: zeros that pad a packed panel must not meet an infinity."""
    value = torch.finfo(dtype).max if value == "huge" else float(value)
    mr, nr = _C.tile(isa, dtype)
    m, n, k = 2 * mr + 1, 2 * nr + 1, 19
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        # Small odd integers: sums are exact and no product is 0, so torch and the kernel can only differ in kind.
        return (2 * torch.randint(-2, 2, shape, generator=generator) + 1).to(dtype)

    for i, j in [(0, 0), (-1, -1), (1, -1), (-1, 0), (mr, 5)]:
        net = Network(integers(m, k), [integers(n, k)], [integers(n)], [named("identity")], integers(m, n))
        target = {"x": net.x, "w": net.w[0], "b": net.b[0][None], "dy": net.dy}[place]
        target[min(i, target.shape[0] - 1), min(j, target.shape[1] - 1)] = value
        got, own = results(native, net), results(composition, net)
        exact = results(composition, net.to(torch.float64))
        for name in got:
            same_kind(got[name], own[name], f"{name} with {value} in {place}[{i}, {j}]", exact[name])
            ordinary = torch.isfinite(own[name]) & (own[name].abs() < 1e6)
            assert torch.equal(got[name][ordinary], own[name][ordinary]), name


@EVERY_DTYPE
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "identity", "leaky_relu", "softplus"])
def test_a_special_sample_spoils_no_other_sample(isa: str, dtype: torch.dtype, name: str, value: float) -> None:
    for m in awkward_sizes(isa, dtype)[1:]:
        generator = torch.Generator().manual_seed(m)
        w = [torch.randn(n, k, generator=generator, dtype=dtype) for n, k in [(20, 9), (33, 20), (3, 33)]]
        x = torch.randn(m, 9, generator=generator, dtype=dtype)
        activations = [named(name)] * 3
        net = Network(x, w, [None] * 3, activations, torch.ones(m, 3, dtype=dtype))
        clean = results(native, net)
        x[m // 2, 4] = value
        got, own = results(native, net), results(composition, net)
        exact = results(composition, net.to(torch.float64))
        same_kind(got["y"], own["y"], f"y of {m} samples", exact["y"])
        same_kind(got["dx"], own["dx"], f"dx of {m} samples", exact["dx"])
        others = torch.arange(m) != m // 2
        assert torch.equal(got["y"][others], clean["y"][others])
        assert torch.equal(got["dx"][others], clean["dx"][others])


@EVERY_DTYPE
def test_a_product_with_no_terms_of_its_own_is_not_read(isa: str, dtype: torch.dtype) -> None:
    """Memory around the operands holds NaN: reading past a row shows, writing past one too."""
    mr, nr = _C.tile(isa, dtype)
    for m, n, k in [(1, 1, 1), (mr - 1, nr - 1, 3), (mr + 1, nr + 1, 17), (2 * mr - 1, 3 * nr - 2, 29)]:
        store = [
            torch.full((rows + 2, columns + 2), math.nan, dtype=dtype) for rows, columns in [(m, k), (n, k), (m, n)]
        ]
        x, w, dy = (s[1:-1, 1:-1] for s in store)
        for t in (x, w, dy):
            t.copy_(torch.randint(-3, 4, t.shape))
        net = Network(x, [w], [torch.ones(n, dtype=dtype)], [named("relu")], dy)
        got, own = results(native, net), results(composition, net)
        for name in got:
            assert torch.equal(got[name], own[name]), name
        assert all(s.isnan().sum() == s.numel() - (s.shape[0] - 2) * (s.shape[1] - 2) for s in store)
