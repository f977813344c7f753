"""The emulator's primitives, and a small product on the matrix instructions that uses them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from emulator import Emulator

MATRIX_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def small_product(emulator: Emulator, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """C = A B^T of random matrices, and what it must be; float32 is rounded to TF32 by truncation."""
    step = 16 // dtype.itemsize
    pitch = -(-k // step) * step
    a, b = (emulator.place(torch.randn(rows, k).to(dtype), pitch=pitch) for rows in (m, n))
    c = emulator.empty(m, n, dtype=torch.float32, pitch=n + 3)
    emulator.call("small_product", dtype, m, n, k, a, a.stride(0), b, b.stride(0), c, c.stride(0))
    exact = [x.contiguous() for x in (a, b)]
    if dtype == torch.float32:
        exact = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in exact]
    return c, exact[0].double() @ exact[1].double().T


@pytest.mark.parametrize("copies", ["eager", "lazy"])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_product_on_the_matrix_instructions(emulator: Emulator, dtype: torch.dtype, copies: str) -> None:
    for seed, (m, n, k) in enumerate([(1, 1, 1), (64, 32, 32), (65, 33, 70), (130, 40, 97), (3, 100, 256)]):
        emulator.settings(seed=seed, copies=copies)
        got, want = small_product(emulator, dtype, m, n, k)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    counts = emulator.counts()
    assert counts["mma"] > 0
    assert counts["conflicts"] == 0
