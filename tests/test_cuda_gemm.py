"""The CUDA products with what follows on them, on the emulator, by value against float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from emulator import DTYPES, Emulator
from reference import ACTIVATIONS, ALTERED, Activation, named
from test_cuda_elementwise import NAMES, SAVED, backward
from torch import Tensor

NOTHING, ACTIVATE, DIFFERENTIATE = range(3)
EVERY = [*ACTIVATIONS, *ALTERED]


class Kind(NamedTuple):
    """A dtype, and for float32 whether products may round to TF32."""

    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


KINDS = [*map(Kind, DTYPES), Kind(torch.float32, tf32=True)]

# m, n, k: one element and one column, less and more than a step of k, than a small block; a large block and more.
SHAPES = [(1, 1, 1), (67, 1, 33), (3, 70, 17), (65, 66, 200), (130, 129, 70)]


def matrix(emulator: Emulator, rows: int, columns: int, dtype: torch.dtype, kind: int, along_rows: bool) -> Tensor:
    """[rows, columns] that lies along its rows or its columns: aligned, tightly, at an odd address, or with no unit
    stride at all."""
    outer, inner = (rows, columns) if along_rows else (columns, rows)
    step = 16 // dtype.itemsize
    values = torch.randn(outer, inner).to(dtype)
    if kind == 3:
        placed = emulator.place(values.repeat_interleave(2, 1))[:, ::2]
    else:
        placed = emulator.place(
            values, pitch=[-(-inner // step) * step, inner, inner + 1][kind % 3], aligned=kind % 3 != 2
        )
    return placed if along_rows else placed.T


def multiply(
    emulator: Emulator, kind: Kind, epilogue: int, a: Tensor, b: Tensor, c: Tensor, *,
    activation: Activation | None = None, bias: Tensor | None = None, s: Tensor | None = None,
    saved: Tensor | None = None, db: Tensor | None = None,
) -> None:  # fmt: skip
    (m, k), n = a.shape, b.shape[1]
    size = emulator.number("gemm_workspace", kind.dtype, epilogue, m, n, k, int(kind.tf32))
    workspace = emulator.empty(size // 4, dtype=torch.float32)
    chosen = activation or named("identity")
    emulator.call(
        "gemm", kind.dtype, epilogue, NAMES.index(chosen.name), chosen.parameters, m, n, k, a, *a.stride(), b,
        *b.stride(), c, c.stride(0), bias, s, 0 if s is None else s.stride(0), saved,
        0 if saved is None else saved.stride(0), db, int(kind.tf32), workspace,
    )  # fmt: skip


def rounded(x: Tensor, kind: Kind) -> Tensor:
    """What the product reads, in float64: TF32 keeps 10 bits, ties away from zero."""
    if not kind.tf32:
        return x.double()
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def near(got: Tensor, want: Tensor, dtype: torch.dtype, terms: int, scale: float) -> None:
    """Sums in float32 or float64 of products of the order of `scale`, and one rounding to the dtype."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = 8 * (terms + 8) * eps * scale + 2 * torch.finfo(dtype).eps * want.abs()
    error = (got.double() - want).abs()
    assert (error <= allowed).all(), f"error {error.max():.3g}"


def check_dw(emulator: Emulator, kind: Kind, m: int, n: int, k: int, seed: int) -> None:
    layout = seed % 4
    a = matrix(emulator, m, k, kind.dtype, layout, along_rows=False)
    b = matrix(emulator, k, n, kind.dtype, (layout + 1) % 4, along_rows=True)
    c = emulator.empty(m, n, dtype=kind.dtype, pitch=n + layout)
    multiply(emulator, kind, NOTHING, a, b, c)
    near(c, rounded(a, kind) @ rounded(b, kind), kind.dtype, k, scale=4)


def check_forward(emulator: Emulator, kind: Kind, m: int, n: int, k: int, seed: int) -> None:
    activation, layout = EVERY[seed % len(EVERY)], seed % 4
    x = matrix(emulator, m, k, kind.dtype, layout, along_rows=True)
    w = matrix(emulator, n, k, kind.dtype, (layout + 2) % 4, along_rows=True)
    bias = emulator.place(torch.randn(n).to(kind.dtype), aligned=False) if seed % 3 else None
    s = emulator.empty(m, n, dtype=kind.dtype, pitch=n + layout) if seed % 2 else None
    c = emulator.empty(m, n, dtype=kind.dtype, pitch=n + layout)
    multiply(emulator, kind, ACTIVATE, x, w.T, c, activation=activation, bias=bias, s=s)
    want = rounded(x, kind) @ rounded(w, kind).T + (0 if bias is None else bias.double())
    if s is not None:
        near(s, want, kind.dtype, k, scale=4)
    if activation.name in ("heaviside", "sign"):  # rounding decides a sum next to the step
        sure = want.abs() > 1e-3
        want, c = torch.where(sure, want, 1.0), torch.where(sure, c, activation.f(torch.ones(())).to(c.dtype))
    near(c, activation.f(want), kind.dtype, k, scale=8)


def check_ds(emulator: Emulator, kind: Kind, m: int, n: int, k: int, seed: int) -> None:
    """Of the layer below, and its column sums."""
    activation, layout = EVERY[seed % len(EVERY)], seed % 4
    ds = matrix(emulator, m, k, kind.dtype, layout, along_rows=True)
    w = matrix(emulator, k, n, kind.dtype, (layout + 1) % 4, along_rows=True)
    s = emulator.place(torch.randn(m, n).to(kind.dtype), pitch=n + layout)
    saved = s if SAVED[activation.name] != "output" else s.copy_(activation.f(s.clone()))
    c = emulator.empty(m, n, dtype=kind.dtype, pitch=n + layout)
    db = emulator.empty(n, dtype=kind.dtype) if seed % 4 else None
    multiply(emulator, kind, DIFFERENTIATE, ds, w, c, activation=activation, saved=saved, db=db)
    want = backward(activation, (rounded(ds, kind) @ rounded(w, kind)), saved.double())
    near(c, want, kind.dtype, k, scale=8)
    if db is not None:
        near(db, want.sum(0), kind.dtype, k + m, scale=8 * m**0.5)


CHECKS = {"dw": check_dw, "forward": check_forward, "ds": check_ds}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("product", CHECKS)
def test_a_product_of_any_shape_and_strides(emulator: Emulator, product: str, kind: Kind) -> None:
    for seed, (shape, _layout) in enumerate(itertools.product(SHAPES, range(4))):
        emulator.settings(seed=seed, copies="lazy" if seed % 2 else "eager")
        CHECKS[product](emulator, kind, *shape, seed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_long_sum_is_split_and_added_in_order(emulator: Emulator, kind: Kind) -> None:
    m, n, k = 5, 9, 2500
    a = matrix(emulator, m, k, kind.dtype, 0, along_rows=False)
    b = matrix(emulator, k, n, kind.dtype, 0, along_rows=True)
    results = []
    for seed in range(3):
        emulator.settings(seed=seed, copies="lazy" if seed % 2 else "eager")
        c = emulator.empty(m, n, dtype=kind.dtype)
        multiply(emulator, kind, NOTHING, a, b, c)
        assert emulator.counts()["launches"] == 2
        results.append(c)
    near(results[0], rounded(a, kind) @ rounded(b, kind), kind.dtype, k, scale=4)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_every_activation_follows_a_product(emulator: Emulator, activation: Activation) -> None:
    for kind in KINDS:
        x = matrix(emulator, 5, 8, kind.dtype, 0, along_rows=True)
        w = matrix(emulator, 24, 8, kind.dtype, 0, along_rows=True)
        c = emulator.empty(5, 24, dtype=kind.dtype)
        multiply(emulator, kind, ACTIVATE, x, w.T, c, activation=activation)
        want = rounded(x, kind) @ rounded(w, kind).T
        sure = want.abs() > 1e-3
        near(torch.where(sure, c, 0), torch.where(sure, activation.f(want), 0), kind.dtype, 8, scale=8)


def test_ldmatrix_has_no_bank_conflicts(emulator: Emulator) -> None:
    for kind in KINDS[2:]:
        for epilogue in (NOTHING, ACTIVATE, DIFFERENTIATE):
            emulator.settings()
            a = matrix(emulator, 150, 96, kind.dtype, 0, along_rows=epilogue != NOTHING)
            b = matrix(emulator, 96, 136, kind.dtype, 0, along_rows=epilogue != ACTIVATE)
            multiply(emulator, kind, epilogue, a, b, emulator.empty(150, 136, dtype=kind.dtype), saved=None)
            counts = emulator.counts()
            assert counts["mma"] > 0
            assert counts["conflicts"] == 0


def test_no_terms_and_no_rows(emulator: Emulator) -> None:
    for kind in KINDS:
        c = emulator.empty(3, 4, dtype=kind.dtype)
        empty = emulator.empty(0, dtype=kind.dtype)
        multiply(emulator, kind, NOTHING, empty.reshape(3, 0), empty.reshape(0, 4), c)
        assert (c == 0).all()
        db = emulator.empty(4, dtype=kind.dtype)
        w = matrix(emulator, 5, 4, kind.dtype, 0, along_rows=True)
        multiply(emulator, kind, DIFFERENTIATE, empty.reshape(0, 5), w, empty.reshape(0, 4), db=db)
        assert (db == 0).all()


def check_far_rows(emulator: Emulator, kind: Kind) -> None:
    """Rows 3 * 2^30 elements apart: the last of three begins beyond 2^32."""
    k, n = 8, 8
    x = emulator.empty(3, k, dtype=kind.dtype, pitch=3 << 30).copy_(torch.randn(3, k))
    w = emulator.place(torch.randn(n, k).to(kind.dtype))
    c = emulator.empty(3, n, dtype=kind.dtype, pitch=3 << 30)
    multiply(emulator, kind, ACTIVATE, x, w.T, c)
    near(c, x.double() @ w.double().T, kind.dtype, k, scale=4)
    emulator.release()


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_offsets_beyond_32_bits(emulator: Emulator, kind: Kind) -> None:
    check_far_rows(emulator, kind)
