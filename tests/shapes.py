"""Instruction sets, sizes around the tiles of their microkernels, and the same numbers laid out in awkward ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from reference import HALVES, Activation, Network, draw
from torch import Tensor

from pyperc import _C

# In place of the fixture's float32 and float64, for the tests that look at what the 16-bit formats do differently.
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, *HALVES],
    indirect=True,
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """That instruction set inside, the previous one afterwards."""
    previous = _C.isa()
    _C.use_isa(isa)
    try:
        yield
    finally:
        _C.use_isa(previous)


def awkward_sizes(isa: str, dtype: torch.dtype) -> list[int]:
    mr, nr = _C.tile(isa, dtype)
    return sorted({1, mr - 1, mr, mr + 1, nr - 1, nr, nr + 1, 2 * nr + 1, 13, 101} - {0})


def networks_around_the_tile(isa: str, dtype: torch.dtype, activation: Activation, bias: bool) -> Iterator[Network]:
    """Networks of one to six layers, whose sizes and batches straddle MR and NR."""
    mr, nr = _C.tile(isa, dtype)
    sizes = [nr + 1, 23, mr, nr - 1, 1 + 2 * nr, mr + 1, 5]
    for layers, batch in enumerate([2 * mr + 1, mr, mr + 1, 1, 19, 3], start=1):
        yield draw(
            sizes[-layers - 1 :] if layers % 2 else sizes[: layers + 1],
            batch,
            activation,
            dtype,
            bias=bias,
            seed=layers,
        )


def strided(t: Tensor, row_stride: int) -> Tensor:
    """The same values with rows `row_stride` elements apart, NaN between them."""
    store = torch.full((t.shape[0], row_stride), torch.nan, dtype=t.dtype)
    store[:, : t.shape[1]] = t
    return store[:, : t.shape[1]]


def spread_leads(t: Tensor) -> Iterator[Tensor]:
    """The same values with gaps in each choice of the leading dimensions, so that rows are evenly spaced or not."""
    for steps in itertools.product([1, 2], repeat=t.dim() - 1):
        store = torch.full([n * step for n, step in zip(t.shape, (*steps, 1), strict=True)], torch.nan, dtype=t.dtype)
        view = store[tuple(slice(None, None, step) for step in steps)]
        view.copy_(t)
        yield view


def contiguous(t: Tensor) -> Tensor:
    """contiguous"""
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    """transposed"""
    return t.mT.contiguous().mT


def sliced_columns(t: Tensor) -> Tensor:
    """sliced columns"""
    store = torch.full((t.shape[0], t.shape[1] + 9), torch.nan, dtype=t.dtype)
    store[:, 4:-5] = t
    return store[:, 4:-5]


def every_third_column(t: Tensor) -> Tensor:
    """every third column"""
    store = torch.full((t.shape[0], t.shape[1] * 3), torch.nan, dtype=t.dtype)
    store[:, ::3] = t
    return store[:, ::3]


def every_other_row_at_an_offset(t: Tensor) -> Tensor:
    """every other row at a storage offset"""
    store = torch.full((t.shape[0] * 2 + 1, t.shape[1]), torch.nan, dtype=t.dtype)
    store[1::2] = t
    return store[1::2]


def unaligned(t: Tensor) -> Tensor:
    """one element off alignment"""
    store = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    store[1:] = t.flatten()
    return store[1:].view(t.shape)


def sliced_of_transposed(t: Tensor) -> Tensor:
    """slice of a transposed store"""
    return sliced_columns(t.mT).mT


def one_row_expanded(t: Tensor) -> Tensor:
    """one row expanded"""
    return t[:1].expand(t.shape)


def one_column_expanded(t: Tensor) -> Tensor:
    """one column expanded"""
    return t[:, :1].expand(t.shape)


def one_element_expanded(t: Tensor) -> Tensor:
    """one element expanded"""
    return t[:1, :1].expand(t.shape)


def overlapping_windows(t: Tensor) -> Tensor:
    """overlapping windows"""
    return t.flatten()[: t.shape[0] + t.shape[1] - 1].as_strided(t.shape, (1, 1))


LAYOUTS = [
    contiguous,
    transposed,
    sliced_columns,
    every_third_column,
    every_other_row_at_an_offset,
    unaligned,
    sliced_of_transposed,
    one_row_expanded,
    one_column_expanded,
    one_element_expanded,
    overlapping_windows,
]
