"""The emulator is proven: each planted fault, a patch of a kernel's own text, is found by the kernel's check.

A check runs several seeds with early and with late copies, at ragged sizes, and compares with float64.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulator import ROOT, Emulator, KernelError, build
from reference import named
from test_cuda_elementwise import NAMES, backward, differentiate
from test_cuda_gemm import CHECKS, Kind, check_far_rows
from test_cuda_narrow_mlp import FEW, HOPPER, cases, check_an_infinity, check_backward, check_forward
from test_cuda_primitives import small_product

Check = Callable[[Emulator], None]

SEEDS = 4


def check_product(emulator: Emulator) -> None:
    for copies in ("eager", "lazy"):
        for seed in range(SEEDS):
            emulator.settings(seed=seed, copies=copies)
            got, want = small_product(emulator, torch.bfloat16, 70, 50, 150)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
            assert emulator.counts()["conflicts"] == 0


def check_elementwise(emulator: Emulator) -> None:
    relu, parameters = NAMES.index("relu"), [0.0, 0.0]
    for seed in range(SEEDS):
        for columns, pitch in ((70, 72), (70, 70), (12, 12), (520, 520)):
            emulator.settings(seed=seed)
            rows = 40
            s = emulator.place(torch.randn(rows, columns), pitch=pitch, aligned=seed % 2 == 0)
            x = emulator.empty(rows, columns, dtype=s.dtype, pitch=pitch + 4, fill=7.0)
            emulator.call("activate", s.dtype, relu, parameters, rows, columns, s, pitch, x, pitch + 4)
            torch.testing.assert_close(x, s.relu())
            assert (x.as_strided((rows - 1, 4), (pitch + 4, 1), x.storage_offset() + columns) == 7).all()
            dx = emulator.place(torch.randn(rows, columns), pitch=pitch, aligned=seed % 2 == 0)
            ds, db = emulator.empty(rows, columns, dtype=s.dtype, pitch=pitch), emulator.empty(columns, dtype=s.dtype)
            differentiate(emulator, named("relu"), dx, x, ds, db)
            want = backward(named("relu"), dx.double(), x.double())
            torch.testing.assert_close(ds.double(), want)
            torch.testing.assert_close(db.double(), want.sum(0), rtol=1e-5, atol=1e-5)
    far = emulator.empty(3, 4, dtype=torch.float32, pitch=1 << 30)  # row 2 begins at element 2^31
    far.copy_(torch.randn(3, 4))
    want = far.relu()
    emulator.call("activate", far.dtype, relu, parameters, 3, 4, far, 1 << 30, far, 1 << 30)
    torch.testing.assert_close(far.contiguous(), want.contiguous())
    emulator.release()


def check_products(emulator: Emulator, kind: Kind) -> None:
    for seed in range(SEEDS):
        emulator.settings(seed=seed, copies="lazy" if seed % 2 else "eager")
        for check in CHECKS.values():
            check(emulator, kind, 67, 70, 200, seed)
        CHECKS["dw"](emulator, kind, 5, 9, 1100, seed)
        emulator.release()
    check_far_rows(emulator, kind)


def check_matrix_products(emulator: Emulator) -> None:
    check_products(emulator, Kind(torch.bfloat16))


def check_ordinary_products(emulator: Emulator) -> None:
    check_products(emulator, Kind(torch.float32))


def check_narrow(emulator: Emulator) -> None:
    for seed in range(SEEDS):
        for check, sizes, shared in (
            (check_forward, [9, 32, 1, 17], FEW),
            (check_forward, [30, 3, 64, 17], HOPPER),
            (check_backward, [9, 32, 1, 17], HOPPER),
            (check_backward, [30, 3, 64, 17], FEW),
        ):
            emulator.settings(seed=seed, copies="lazy" if seed % 2 else "eager")
            check(emulator, cases(emulator, 530, sizes, torch.bfloat16, seed), shared)
        emulator.release()
    check_an_infinity(emulator)


PRODUCT, TILE, ELEMENTWISE = "tests/cuda/product.cuh", "csrc/cuda/tile.cuh", "csrc/cuda/elementwise.cuh"
GEMM, EPILOGUE = "csrc/cuda/gemm.cuh", "csrc/cuda/epilogue.cuh"
NARROW, ROWS = "csrc/cuda/narrow_mlp.cuh", "csrc/cuda/narrow_rows.cuh"
FORWARD, BACKWARD = "csrc/cuda/narrow_forward.cuh", "csrc/cuda/narrow_backward.cuh"
BARRIER = "    sync();  // the tile of k is there for all, and nobody reads that of k - 1 any more\n"
COPY = "    copy(k + STAGES - 1);\n"

INT32 = "g.c + static_cast<int>((at.m + i) * g.ldc) + n, count, aligned, v);\n    }\n  }"

# By check and file: what is replaced, and by what.
FAULTS: dict[tuple[Check, str], dict[str, tuple[str, str]]] = {
    (check_product, PRODUCT): {
        "no barrier before a tile is read": (BARRIER, ""),
        "no barrier before a tile is overwritten": (BARRIER + COPY, COPY + BARRIER),
        "a barrier that half of the threads pass": ("    sync();", "    if (warp() < 2) sync();"),
        "a wait for too few copies": ("copy_wait<STAGES - 2>", "copy_wait<STAGES - 1>"),
        "no commit": ("    copy_commit();", "    "),
        "one stage too few": ("return TileA{memory + k % STAGES", "return TileA{memory + k % 2"),
        "a fragment's columns off by one": ("lane() % 4 * 2 + r % 2", "lane() % 4 * 2 + (r + 1) % 2"),
        "a store beyond the last row": ("row < g.m && column", "row < g.m + 1 && column"),
    },
    (check_product, TILE): {
        "an ldmatrix address of the wrong lane": ("at(m + lane() % 16,", "at(m + lane() % 8,"),
        "an ldmatrix address outside of the tile": ("at(n + lane() % 8", "at(n + 64 + lane() % 8"),
        "an ldmatrix that conflicts": ("row / ROWS_IN_ALL_BANKS % CYCLE", "row / 8 % CYCLE"),
        "a copy beyond the last row": ("row < rows ?", "row < ROWS ?"),
        "a copy beyond the last column": ("left >= PIECE ? PIECE : left > 0", "left > 0 ? PIECE : left > 0"),
        "a fragment's halves swapped": ("% 2));\n    f[0] = {{r[0], r[1]}};", "% 2));\n    f[0] = {{r[1], r[0]}};"),
    },
    (check_elementwise, ELEMENTWISE): {
        "a store beyond the last column": (
            "cells.columns) row[cells.column(e)] = v.e[e]",
            "cells.columns + 1) row[cells.column(e)] = v.e[e]",
        ),
        "a load beyond the last column": (
            "if (cells.column(e) < cells.columns) v.e[e]",
            "if (cells.column(e) < cells.columns + 64) v.e[e]",
        ),
        "a vector beyond the last column": ("first + SIZE <= columns", "first < columns"),
        "the stride of another matrix": ("g.ld_x, narrow_all<T>(x)", "g.ld_s, narrow_all<T>(x)"),
        "an index in 32 bits": ("g.s + row * g.ld_s", "g.s + static_cast<int>(row * g.ld_s)"),
        "a partial sum of another warp without a barrier": ("  sync();\n  const int groups", "  const int groups"),
        "a warp's sum that leaves out a lane": (
            "for (int mask = lanes; mask < WARP;",
            "for (int mask = lanes; mask < WARP / 2;",
        ),
        "a vector at a place that is not aligned": ("% 16 == 0 && ld *", "% 4 == 0 && ld *"),
    },
    (check_matrix_products, GEMM): {
        "gemm: no barrier before the tiles are read": (
            "    sync();  // this step's tiles are there for all, and nobody reads those of the step before any more\n",
            "",
        ),
        "gemm: no barrier before the sums take the tiles' place": (
            "  sync();  // the tiles have been read",
            "    //",
        ),
        "gemm: a wait for too few copies": ("copy_wait<S::STAGES - 2>", "copy_wait<S::STAGES - 1>"),
        "gemm: no commit": ("    copy_commit();  // an empty", "    // an empty"),
        "gemm: a swapped stride": ("      b += BK * g.b.rs;", "      b += BK * g.b.cs;"),
        "gemm: a fragment's rows off by one": ("sums.element(r + half * 8, n)", "sums.element(r + half * 8 + 1, n)"),
    },
    (check_matrix_products, EPILOGUE): {
        "gemm: a store beyond the last column": ("width - column < SIZE ? width - column : SIZE;", "SIZE;"),
        "gemm: a load beyond the last row": ("rows = count > 0 ? height : 0;", "rows = count > 0 ? BM : 0;"),
        "gemm: another warp's sums without a barrier": (
            "    sync();\n    for (int j = thread()",
            "    for (int j = thread()",
        ),
        "gemm: an index in 32 bits": ("g.c + (at.m + i) * g.ldc + n, count, aligned, v);\n    }\n  }", INT32),
        "gemm: partial sums over one another": ("at.split * g.m * g.n", "at.split * g.n"),
    },
    (check_ordinary_products, GEMM): {
        "ordinary gemm: no barrier between two steps": ("put(step + 1);\n    sync();", "put(step + 1);"),
        "ordinary gemm: one buffer for two": ("step % 2 * (2 *", "0 * (2 *"),
        "ordinary gemm: a load beyond the last row": ("i * APART < left ?", "i * APART < left + 1 ?"),
    },
    (check_narrow, FORWARD): {
        "narrow: no barrier before the next layer's weights come": (
            "        sync();  // this layer's weights are there for all, and nobody reads the last one's any more\n",
            "",
        ),
        "narrow: no wait for the rows": ("      copy_wait<0>();\n      if (weights", "      if (weights"),
        "narrow: the next rows over those that are read": ("    warp_sync();  // before the next rows come\n", ""),
        "narrow: weights over those in use": ("(turn + 1) % 2", "turn % 2"),
        "narrow: 0 times infinity beyond the last column": (
            " < layer.out ? pair[e] : 0",
            " < layer.out ? pair[e] : pair[e]",
        ),
        "narrow: f twice": ("if constexpr (A::saved != Saved::Summation)", "if constexpr (true)"),
    },
    (check_narrow, ROWS): {
        "narrow: rows beyond the last": ("i < height && left > 0 ?", "left > 0 ?"),
        "narrow: an element beyond the last column": ("if (e < count) at[e]", "at[e]"),
        "narrow: another column's bias": ("bias[n + column + 1]", "bias[n + column]"),
    },
    (check_narrow, BACKWARD): {
        "narrow: no barrier before all rows are read": ("    sync();  // ds and x are there for all rows\n", ""),
        "narrow: no barrier before the next rows come": ("    sync();  // they have been read", "    //"),
        "narrow: no barrier before the weights are read": ("      sync();  // the weights are there", "      //"),
        "narrow: a wait for too few copies": ("copy_wait<1>", "copy_wait<2>"),
        "narrow: no commit where there are no rows": (
            "    copy_commit();  // an",
            "    if (t < tiles) copy_commit();  //",
        ),
        "narrow: one stage for two": ("stage * (2 * S::TILE)", "0 * (2 * S::TILE)"),
        "narrow: another column's f'": ("element(x.first + i, n, column)", "element(x.first + i, n, column ^ 2)"),
        "narrow: another row's db": ("db.add(i, a[i])", "db.add(0, a[i])"),
        "narrow: another warp's sums without a barrier": (
            "  sync();\n  if (warp() || !parts)",
            "  if (warp() || !parts)",
        ),
        "narrow: the partial sums of another layer": ("sums[b * g.depth * S::", "sums[b * S::"),
    },
    (check_narrow, NARROW): {
        "narrow: the sums of all layers in one place": ("sums + l * S::LAYER_SUMS", "sums"),
        "narrow: the rows of ds as far apart as those of dy": (
            "      ds = buffer;\n      ld_ds = space.pitch;\n    }\n    for",
            "      ds = buffer;\n    }\n    for",
        ),
    },
}

# What each check needs compiled, and the one dtype of it.
FILES = {
    check_product: (["tests/cuda/product_entries.cpp"], "BFloat16"),
    check_elementwise: (["tests/cuda/elementwise_entries.cpp", "csrc/cuda/elementwise_float.cu"], "float"),
    check_matrix_products: (["tests/cuda/gemm_entries.cpp", "csrc/cuda/gemm_bfloat16.cu"], "BFloat16"),
    check_ordinary_products: (["tests/cuda/gemm_entries.cpp", "csrc/cuda/gemm_float.cu"], "float"),
    check_narrow: (["tests/cuda/narrow_mlp_entries.cpp", "csrc/cuda/narrow_mlp_bfloat16.cu"], "BFloat16"),
}

# What it calls of other kernels, as they are.
CALLED: dict[Check, tuple[str, ...]] = {check_narrow: ("elementwise_bfloat16",)}


def patched(folder: Path, check: Check, edit: Callable[[Path], None]) -> Emulator:
    """The kernels of a check, in a copy of the sources that `edit` has changed."""
    for part in ("csrc/core", "csrc/cuda", "tests/cuda"):
        shutil.copytree(ROOT / part, folder / part)
    edit(folder)
    files, dtype = FILES[check]
    entries = folder / "tests/cuda/entries.h"
    entries.write_text(re.sub(rf"    case \d: return f\((?!{dtype}).*\n", "", entries.read_text()))
    ready = ROOT / "build/emulator/plain"
    objects = [ready / f"{name}.o" for name in ("emulator", "emulator_entries", *CALLED.get(check, ()))]
    return Emulator(build(folder / "build", ["-O0"], [*(folder / file for file in files), *objects]))


@pytest.mark.parametrize("check", FILES, ids=lambda check: check.__name__)
def test_without_a_fault_the_checks_pass(emulator: Emulator, check: Check) -> None:
    check(emulator)


@pytest.mark.parametrize(
    ("place", "fault"), [pytest.param(place, fault, id=fault) for place in FAULTS for fault in FAULTS[place]]
)
def test_a_planted_fault_is_found(
    emulated_kernels: Emulator, tmp_path: Path, place: tuple[Check, str], fault: str
) -> None:
    check, file = place
    old, new = FAULTS[place][fault]

    def plant(folder: Path) -> None:
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} does not hold once what the fault replaces: {old!r}"
        (folder / file).write_text(text.replace(old, new))

    faulty = patched(tmp_path, check, plant)
    with pytest.raises((KernelError, AssertionError)):
        check(faulty)
