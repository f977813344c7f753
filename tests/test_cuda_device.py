"""What only a GPU can show: recording in a CUDA graph, streams, several devices, sizes beyond 32 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyperc
from pyperc import _C

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not _C.build()["cuda"], reason="needs a GPU and the CUDA kernels"
)

KINDS = [(torch.bfloat16, 32), (torch.bfloat16, 150), (torch.bfloat16, 1500), (torch.float32, 30), (torch.float64, 30)]


def networks(dtype: torch.dtype, width: int, device: str = "cuda") -> tuple[nn.Module, Tensor]:
    model = pyperc.MLP([7, width, width, 3], activation="gelu").to(device, dtype)
    return model, torch.randn(100, 7, device=device, dtype=dtype)


def step_of(model: nn.Module, x: Tensor) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    return step


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("dtype", "width"), KINDS, ids=str)
def test_a_graph_records_forward_and_backward(dtype: torch.dtype, width: int) -> None:
    model, x = networks(dtype, width)
    step = step_of(model, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(recorded, step(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("dtype", "width"), KINDS, ids=str)
def test_the_current_stream_is_used_and_bits_repeat(dtype: torch.dtype, width: int) -> None:
    model, x = networks(dtype, width)
    want = step_of(model, x)()
    stream = torch.cuda.Stream()
    for _ in range(100):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000)
            late = x.clone()  # what another stream would read too early
            got = step_of(model, late)()
        torch.cuda.current_stream().wait_stream(stream)
        if width < 1000:
            assert same(got, want)
        else:  # cuBLAS may choose another kernel on another stream
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dtype", "width"), KINDS, ids=str)
def test_another_device_than_the_current_one(dtype: torch.dtype, width: int) -> None:
    model, x = networks(dtype, width)
    want, got = step_of(model, x)(), step_of(copy.deepcopy(model).to("cuda:1"), x.to("cuda:1"))()
    for a, b in zip(got, want, strict=True):
        assert b.device.index == 0
        torch.testing.assert_close(a.to(b.device), b)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float16, 100), (torch.float32, 60)], ids=str
)
def test_a_step_of_more_rows_than_one_tile_for_each_block(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By value against float64: the stages of the rows that come while others are used."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    torch.manual_seed(0)
    model = pyperc.MLP([width, width, width, 3], activation="tanh").to("cuda", dtype)
    plain = copy.deepcopy(nn.Sequential(*model)).double()
    x, dy = (torch.randn(100_003, n, device="cuda").to(dtype) for n in (width, 3))
    got = torch.autograd.grad(model(x), list(model.parameters()), dy)
    want = torch.autograd.grad(plain(x.double()), list(plain.parameters()), dy.double())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= 4 * torch.finfo(torch.bfloat16).eps * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 64])
def test_a_batch_of_more_than_65535_tiles(dtype: torch.dtype, width: int) -> None:
    model = pyperc.MLP([3, width], activation="relu", output_activation="relu").to("cuda", dtype)
    x = torch.randn(65536 * 256 + 3, 3, device="cuda", dtype=dtype)
    y = model(x)
    for part in (slice(0, 1000), slice(-1000, None)):
        torch.testing.assert_close(y[part], model(x[part]))


@pytest.mark.parametrize("width", [32, 200], ids=["narrow", "gemm"])
def test_offsets_beyond_32_bits(width: int) -> None:
    batch = (1 << 31) // width + 1000
    if torch.cuda.mem_get_info()[0] < 8 * batch * width:
        pytest.skip("needs more memory")
    model = pyperc.MLP([width, width], output_activation="relu").to("cuda", torch.bfloat16)
    x = torch.randn(1000, width, device="cuda").bfloat16().repeat(-(-batch // 1000), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[-1000:], model(x[-1000:].clone()))
