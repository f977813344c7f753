"""The narrow CUDA network on the emulator, by value against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from reference import ACTIVATIONS, Activation, named
from test_cuda_elementwise import NAMES, SAVED, backward
from test_cuda_elementwise import near as near_torch
from torch import Tensor

if TYPE_CHECKING:
    from emulator import Emulator

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HOPPER, FEW = 227 << 10, 0  # bytes of shared memory: for the weights of all layers, for those of two
MULTIPROCESSORS = 1

# Batch, sizes: one of each, less and more than a tile of rows and than a width; more tiles than blocks, of each width.
NETWORKS = [
    (1, [1, 1]),
    (70, [3, 64, 1]),
    (530, [9, 32, 1, 17]),
    (530, [30, 33, 64, 17]),
    (130, [65, 128, 100]),
    (270, [128, 10, 70, 128, 5]),
]


@dataclass
class Case:
    """A network and its batch, between guard pages."""

    dtype: torch.dtype
    activations: list[Activation]
    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    kept: list[Tensor]
    y: Tensor

    @property
    def depth(self) -> int:
        return len(self.weights)


def cases(emulator: Emulator, batch: int, sizes: list[int], dtype: torch.dtype, seed: int) -> Case:
    hidden = [a for a in ACTIVATIONS if a.name not in ("heaviside", "sign")]  # rounding decides next to the step
    activations = [hidden[(seed + i) % len(hidden)] for i in range(len(sizes) - 1)]
    step = 16 // dtype.itemsize

    def place(values: Tensor, kind: int) -> Tensor:
        n = values.shape[-1]
        pitch = [-(-n // step) * step, n, n + 1][kind % 3] if values.dim() == 2 else None
        return emulator.place(values.to(dtype), pitch=pitch, aligned=kind % 3 != 2)

    pairs = list(pairwise(sizes))
    return Case(
        dtype,
        activations,
        place(torch.randn(batch, sizes[0]), seed),
        [place(torch.randn(out, n) / n**0.5, seed + i) for i, (n, out) in enumerate(pairs)],
        [place(torch.randn(out), i) if (seed + i) % 4 else None for i, (_n, out) in enumerate(pairs)],
        [place(torch.zeros(batch, out), seed + i + 1) for i, (_n, out) in enumerate(pairs)],
        place(torch.zeros(batch, sizes[-1]), seed + 1),
    )


def numbers(case: Case, dw: list[Tensor | None], db: list[Tensor | None], *, keeps: bool = True) -> Tensor:
    def address(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    rows = []
    for i, w in enumerate(case.weights):
        kept = case.kept[i] if keeps else None
        if i == case.depth - 1 and keeps and SAVED[case.activations[i].name] != "summation":
            kept = case.y
        rows.append([
            w.shape[1], w.shape[0], address(w), w.stride(0), address(case.biases[i]),
            NAMES.index(case.activations[i].name), address(kept), 0 if kept is None else kept.stride(0),
            address(dw[i]), address(db[i]),
        ])  # fmt: skip
    return torch.tensor(rows)


def parameters(case: Case) -> list[float]:
    return [p for a in case.activations for p in (*a.parameters, 0.0, 0.0)[:2]]


def forward(emulator: Emulator, case: Case, shared: int, *, keeps: bool = True) -> None:
    nothing: list[Tensor | None] = [None] * case.depth
    layers = numbers(case, nothing, nothing, keeps=keeps)
    emulator.call(
        "narrow_forward", case.dtype, case.x.shape[0], case.depth, layers, parameters(case), case.x, case.x.stride(0),
        case.y, case.y.stride(0), MULTIPROCESSORS, shared,
    )  # fmt: skip


def composed(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """s(1), x(1), s(2), ... in a dtype, each rounded to it."""
    x, out = case.x.to(dtype), []
    for w, b, activation in zip(case.weights, case.biases, case.activations, strict=True):
        s = torch.nn.functional.linear(x, w.to(dtype), None if b is None else b.to(dtype))
        x = activation.f(s.clone())
        out += [s, x]
    return out


def tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def rounded_composed(case: Case) -> list[Tensor]:
    """As the kernel's products read their operands: float32 rounded to TF32."""
    if case.dtype != torch.float32:
        return composed(case, case.dtype)
    x, out = case.x, []
    for w, b, activation in zip(case.weights, case.biases, case.activations, strict=True):
        s = (tf32(x).double() @ tf32(w).double().T).float() + (0 if b is None else b)
        x = activation.f(s.clone())
        out += [s, x]
    return out


def check_forward(emulator: Emulator, case: Case, shared: int) -> None:
    """The output, and what is kept; where nothing is kept, the same bits."""
    forward(emulator, case, shared)
    sizes = sum(w.shape[1] for w in case.weights)
    exact, torch_values = composed(case, torch.float64), rounded_composed(case)
    near_torch(case.y, exact[-1], torch_values[-1], terms=sizes)
    for i, activation in enumerate(case.activations):
        at = 2 * i + (SAVED[activation.name] != "summation")
        kept = case.y if at == len(exact) - 1 else case.kept[i]
        near_torch(kept, exact[at], torch_values[at], terms=sizes)
    assert emulator.counts()["launches"] == 1
    assert emulator.counts()["conflicts"] == 0
    trained = case.y.clone()
    case.y.zero_()
    forward(emulator, case, shared, keeps=False)
    assert torch.equal(case.y, trained)


def check_backward(emulator: Emulator, case: Case, shared: int, wants_dx: bool = True) -> None:
    forward(emulator, case, shared)
    batch, n = case.y.shape
    dy = emulator.place(torch.randn(batch, n).to(case.dtype), pitch=n + batch % 2)
    dx = emulator.empty(*case.x.shape, dtype=case.dtype) if wants_dx else None
    dw = [emulator.empty(*w.shape, dtype=case.dtype) for w in case.weights]
    db = [emulator.empty(w.shape[0], dtype=case.dtype) for w in case.weights]
    run_backward(emulator, case, dy, dx, dw, db, shared)
    exact, torch_values = gradients(case, dy, torch.float64), gradients(case, dy, case.dtype)
    for i in range(case.depth):
        near_torch(dw[i], exact[f"dw{i}"], torch_values[f"dw{i}"], terms=batch, roundings=1)
        near_torch(db[i], exact[f"db{i}"], torch_values[f"db{i}"], terms=batch, roundings=1)
    if dx is not None:
        near_torch(dx, exact["dx"], torch_values["dx"], terms=sum(w.shape[1] for w in case.weights))


@pytest.mark.parametrize("shared", [HOPPER, FEW], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("check", [check_forward, check_backward], ids=["forward", "backward"])
def test_networks(emulator: Emulator, check: Callable[..., None], dtype: torch.dtype, shared: int) -> None:
    for seed, (batch, sizes) in enumerate(NETWORKS * 2):
        emulator.settings(seed=seed, copies="lazy" if seed % 2 else "eager")
        case = cases(emulator, batch, sizes, dtype, seed)
        check(emulator, case, shared, *([] if check is check_forward or seed % 3 else [False]))


def run_backward(
    emulator: Emulator, case: Case, dy: Tensor, dx: Tensor | None, dw: list[Tensor], db: list[Tensor], shared: int
) -> None:
    layers = numbers(case, list(dw), list(db))
    batch = case.x.shape[0]
    device = MULTIPROCESSORS, shared
    size = emulator.number("narrow_workspace", case.dtype, batch, case.depth, layers, parameters(case), *device)
    workspace = emulator.empty(size // 4, dtype=torch.float32)
    emulator.call(
        "narrow_backward", case.dtype, batch, case.depth, layers, parameters(case), case.x, case.x.stride(0), dy,
        dy.stride(0), dx, 0 if dx is None else dx.stride(0), workspace, *device,
    )  # fmt: skip


def gradients(case: Case, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """From what forward has kept, in a dtype; float32 as products of TF32 read it."""

    def operand(t: Tensor) -> Tensor:
        return tf32(t) if dtype == torch.float32 else t

    out, dx = {}, dy.to(dtype)
    for i in reversed(range(case.depth)):
        activation = case.activations[i]
        output = SAVED[activation.name] != "summation"
        kept = case.y if output and i == case.depth - 1 else case.kept[i]
        ds = backward(activation, dx, kept.to(dtype))
        x = case.x.to(dtype) if i == 0 else case.kept[i - 1].to(dtype)
        if i and SAVED[case.activations[i - 1].name] == "summation":
            x = case.activations[i - 1].f(x.clone())
        w = case.weights[i].to(dtype)
        out[f"dw{i}"], out[f"db{i}"] = operand(ds).T @ operand(x), ds.sum(0)
        dx = operand(ds) @ operand(w)
    out["dx"] = dx
    return out


def test_backward_gives_the_same_bits_however_the_threads_run(emulator: Emulator) -> None:
    case = cases(emulator, 300, [30, 33, 64, 17], torch.bfloat16, 1)
    forward(emulator, case, HOPPER)
    dy = emulator.place(torch.randn(300, 17).bfloat16())
    results = []
    for seed in range(3):
        emulator.settings(seed=seed, copies="lazy" if seed % 2 else "eager")
        dw = [emulator.empty(*w.shape, dtype=torch.bfloat16) for w in case.weights]
        db = [emulator.empty(w.shape[0], dtype=torch.bfloat16) for w in case.weights]
        run_backward(emulator, case, dy, None, dw, db, HOPPER)
        results.append([*dw, *db])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_an_infinity(emulator: Emulator, dtype: torch.dtype = torch.bfloat16) -> None:
    """It comes out as in torch, of layers that are no whole number of matrix steps wide: no padding meets it."""
    for name in ("sigmoid", "gelu", "relu"):
        case = cases(emulator, 20, [16, 10, 4], dtype, 0)
        case.activations = [named(name), named("identity")]
        case.x[1, 2] = torch.inf
        forward(emulator, case, HOPPER)
        exact = composed(case, torch.float64)[-1].to(dtype)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(case.y), kind(exact)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_an_infinity_meets_no_padding(emulator: Emulator, dtype: torch.dtype) -> None:
    check_an_infinity(emulator, dtype)


def test_an_empty_batch_has_no_gradient(emulator: Emulator) -> None:
    case = cases(emulator, 0, [3, 5], torch.float16, 0)
    case.activations = [named("relu")]
    dw, db = [emulator.empty(5, 3, dtype=torch.float16)], [emulator.empty(5, dtype=torch.float16)]
    forward(emulator, case, HOPPER)
    run_backward(emulator, case, emulator.empty(0, 5, dtype=torch.float16), None, dw, db, HOPPER)
    assert (dw[0] == 0).all()
    assert (db[0] == 0).all()
