"""The elementwise CUDA kernels on the emulator, by value against float64."""

from __future__ import annotations

import pytest
import torch
from emulator import DTYPES, Emulator
from reference import ACTIVATIONS, ALTERED, Activation
from torch import Tensor

from pyperc import _C

NAMES = [info.name for info in _C.activations()]
SAVED = {info.name: info.saved for info in _C.activations()}
EVERY = [*ACTIVATIONS, *ALTERED]

# Rows, columns; one element, less and more than a vector, than a warp's columns, than a block's; few long rows.
SHAPES = [(1, 1), (3, 5), (37, 16), (9, 65), (300, 3), (70, 520), (2, 3000), (1100, 8)]


def scatter(shape: tuple[int, int], dtype: torch.dtype, emulator: Emulator, kind: int) -> Tensor:
    """Random values of the order of 1 to 4, away from 0, where some activations have their kink."""
    s = torch.randn(shape, dtype=torch.float64) * 2
    s = torch.where(s.abs() < 0.01, 0.5, s).to(dtype)
    _rows, columns = shape
    step = 16 // dtype.itemsize
    pitch = [columns, -(-columns // step) * step, columns + 1][kind]
    return emulator.place(s, pitch=pitch, aligned=kind != 2)


def near(got: Tensor, exact: Tensor, torch_value: Tensor, terms: int = 1, roundings: int = 0) -> None:
    """Twice torch's error, what sums of so many terms may lose, and roundings to the dtype."""
    eps = torch.finfo(torch.float32 if got.dtype != torch.float64 else torch.float64).eps
    allowed = 2 * (torch_value.double() - exact).abs().max() + 8 * terms * eps * exact.abs().max().clamp(min=1)
    allowed += roundings * torch.finfo(got.dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_activate_is_f_of_s(emulator: Emulator, activation: Activation, dtype: torch.dtype) -> None:
    for kind, (rows, columns) in enumerate(SHAPES):
        emulator.settings(seed=kind)
        s = scatter((rows, columns), dtype, emulator, kind % 3)
        in_place = kind % 2 == 1
        want, torch_value = activation.f(s.double()), activation.f(s.clone())
        x = s if in_place else emulator.empty(rows, columns, dtype=dtype)
        emulator.call(
            "activate", dtype, NAMES.index(activation.name), activation.parameters, rows, columns, s, s.stride(0), x,
            x.stride(0),
        )  # fmt: skip
        near(x, want, torch_value)


def differentiate(
    emulator: Emulator,
    activation: Activation,
    dx: Tensor,
    saved: Tensor,
    ds: Tensor | None,
    db: Tensor | None,
    x: Tensor | None = None,
) -> None:
    rows, columns = dx.shape
    workspace = emulator.empty(emulator.number("differentiate_workspace", dx.dtype, rows, columns), dtype=torch.uint8)
    matrices = [item for t in (dx, saved, ds, x) for item in ((None, 0) if t is None else (t, t.stride(0)))]
    which = dx.dtype, NAMES.index(activation.name), activation.parameters
    emulator.call("differentiate", *which, rows, columns, *matrices, db, workspace)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_differentiate_gives_ds_and_its_column_sums(
    emulator: Emulator, activation: Activation, dtype: torch.dtype
) -> None:
    for kind, (rows, columns) in enumerate(SHAPES):
        emulator.settings(seed=kind)
        s = scatter((rows, columns), dtype, emulator, kind % 3)
        saved = s if SAVED[activation.name] != "output" else s.copy_(activation.f(s.clone()))
        dx = emulator.place(torch.randn(rows, columns, dtype=torch.float64).to(dtype), pitch=saved.stride(0))
        ds = dx if kind % 2 == 1 else emulator.empty(rows, columns, dtype=dtype, pitch=saved.stride(0))
        db = emulator.empty(columns, dtype=dtype)
        exact = backward(activation, dx.double(), saved.double())
        torch_value = backward(activation, dx.clone(), saved.clone())
        x = emulator.empty(rows, columns, dtype=dtype) if SAVED[activation.name] == "summation" else None
        differentiate(emulator, activation, dx, saved, ds, db, x)
        near(ds, exact, torch_value)
        if x is not None:
            near(x, activation.f(saved.double()), activation.f(saved.clone()))
        near(db, exact.sum(0), torch_value.sum(0), terms=rows)


def backward(activation: Activation, dx: Tensor, saved: Tensor) -> Tensor:
    """dx * f'(s) in the dtype of dx, by the composition: of a layer with the weight [[1]], dx is ds."""
    column = dx.reshape(-1, 1)
    kept = [saved.reshape(-1, 1)] * (2 if SAVED[activation.name] == "summation" else 1)
    chain = _C.Chain([(activation.name, list(activation.parameters))])
    (ds,) = _C.composed_backward(column, column, [torch.ones(1, 1, dtype=dx.dtype)], kept, chain, [True, False, False])
    return ds.reshape(dx.shape)
