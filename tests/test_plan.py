"""Each path through the kernels, forced by the plan's thresholds, not hoped for from a shape; and the threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Optional

import pytest
import torch
from reference import check, check_forward, draw, named
from shapes import EVERY_DTYPE
from torch.utils.data import DataLoader, Dataset

import pyperc
from pyperc import _C

FAR = 1 << 40
# What each path is called, and the thresholds under which nothing else is taken.
PATHS = {
    "one thread": {"parallel_flops": FAR},
    "one thread, by layers": {"parallel_flops": FAR, "wide_bytes": 0},
    "threads share rows, dw summed by rows": {
        "parallel_flops": 1,
        "columns_bytes": -1,
        "rows_per_thread": 0,
        "wide_bytes": FAR,
        "gradient_rows": 0,
        "peak_percent": FAR,
    },
    "threads share rows, by layers": {
        "parallel_flops": 1,
        "columns_bytes": -1,
        "wide_bytes": 0,
        "packed_bytes": FAR,
    },
    "threads share rows, one weight or panel packed at a time": {
        "parallel_flops": 1,
        "columns_bytes": -1,
        "wide_bytes": 0,
        "packed_bytes": -FAR,
        "in_place_bytes": -1,
        "few_rows": -1,
        "dot_rows": -1,
        "dot_most": -1,
    },
    "threads share columns": {"parallel_flops": 1, "rows_per_thread": FAR},
    "threads share columns, one panel packed at a time": {
        "parallel_flops": 1,
        "rows_per_thread": FAR,
        "block_bytes": 0,
        "product_bytes": 0,
        "dot_rows": -1,
        "dot_most": -1,
        "least_chunk": 14,
        "most_chunk": 14,
    },
    "one thread, one panel packed at a time": {
        "parallel_flops": FAR,
        "weight_bytes": 0,
        "block_bytes": 0,
        "product_bytes": 0,
    },
    "everything packed": {"in_place_bytes": -1, "few_rows": -1, "dot_rows": -1, "dot_most": -1},
    "dw packed in blocks of the batch": {"in_place_bytes": -1, "few_rows": -1, "scratch_bytes": 16 * 1024},
    "dw packed in blocks of the batch on threads": {
        "in_place_bytes": -1,
        "few_rows": -1,
        "scratch_bytes": 1,
        "parallel_flops": 1,
    },
    "nothing packed that can be read": {"in_place_bytes": FAR, "few_rows": FAR},
    "hidden rows kept apart": {"pad_bytes": 2, "in_place_bytes": FAR},
    "hidden rows kept apart on threads": {"pad_bytes": 2, "parallel_flops": 1, "wide_bytes": 0},
    "hidden rows adjoin": {"pad_bytes": 0},
    "weights read along their rows": {"dot_rows": FAR},
    "weights read along their rows on threads": {"dot_rows": FAR, "parallel_flops": 1},
    "chunks of one tile": {"least_chunk": 1, "most_chunk": 1, "chunk_bytes": 1},
    "chunks of one tile on threads": {"least_chunk": 1, "most_chunk": 1, "chunk_bytes": 1, "parallel_flops": 1},
}
SHAPES = [([20, 33, 7], 3), ([20, 33, 40, 7], 70), ([64, 5, 90], 33), ([129, 40], 21), ([3, 1, 5, 2], 77)]


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    yield
    _C.reset_thresholds()


@EVERY_DTYPE
@pytest.mark.parametrize("path", PATHS)
def test_every_path_by_value(isa: str, dtype: torch.dtype, path: str) -> None:
    _C.set_thresholds(PATHS[path])
    for threads in (2, 3) if "threads" in path else (1,):
        torch.set_num_threads(threads)
        for (sizes, batch), activation in zip(SHAPES, ("tanh", "gelu", "relu", "silu", "softplus"), strict=True):
            check(draw(sizes, batch, named(activation), dtype))


def test_wide_networks_take_blocks_of_every_dimension(isa: str) -> None:
    """More than one block of rows, of k and of columns, and ds^T packed tile by tile."""
    torch.set_num_threads(2)
    for path in ("threads share rows, by layers", "threads share rows, dw summed by rows"):
        _C.set_thresholds(PATHS[path])
        check(draw([530, 1024, 260], 600, named("relu"), torch.float32))


@pytest.mark.parametrize("out", [20, 95])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_forward_pass_in_pieces(isa: str, activation: str, out: int) -> None:
    """One weight packed at a time, while what nobody keeps waits for the batch; a wide output has room for it."""
    model = pyperc.MLP([40, 70, 33, 90, out], activation=activation)
    x = torch.randn(150, 40)
    with torch.no_grad():
        want = model(x)
        _C.set_thresholds({"packed_bytes": -FAR, "chunk_bytes": 1, "parallel_flops": 1})
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), want)


def test_fewer_rows_than_threads(isa: str) -> None:
    """No thread may be left without rows, and dw of the first not be written."""
    torch.set_num_threads(3)
    _C.set_thresholds({**PATHS["threads share rows, dw summed by rows"], "gradient_rows": 0})
    for batch in (1, 2, 3, 4):
        check(draw([20, 33, 7], batch, named("tanh"), torch.float32))


@EVERY_DTYPE
@pytest.mark.parametrize("out", [20, 95])
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_a_forward_pass_in_blocks_of_rows(isa: str, dtype: torch.dtype, split: str, out: int) -> None:
    """The rows of a block go through all layers before the next."""
    net = draw([40, 70, 33, 90, out], 150, named("tanh"), dtype)
    shared = {"rows_per_thread": FAR} if split == "columns" else {"columns_bytes": -1, "rows_per_thread": 0}
    _C.set_thresholds({"parallel_flops": 1, "packed_bytes": -FAR, "chunk_bytes": 1, **shared})
    for threads, rows in itertools.product((1, 2, 3), (1, 31, 75, 149)):
        torch.set_num_threads(threads)
        _C.set_thresholds({"rows_at_once": rows})
        check_forward(net)


def test_the_number_of_threads_is_torchs() -> None:
    model = pyperc.MLP([256, 256, 256])
    x = torch.randn(512, 256)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert {layer.threads for layer in pyperc.explain(model, x).layers if layer.run is not None} == {threads}
    torch.set_num_threads(2)
    assert {layer.threads for layer in pyperc.explain(model, x[:1]).layers if layer.run is not None} == {1}


@pytest.mark.parametrize(
    ("batch", "sizes", "shared"),
    [
        (32, [256, 256], "columns"),  # the weight outweighs what passes between layers: nothing
        (64, [256, 256, 256], "columns"),
        (1024, [64, 64, 64], "rows"),  # the activations outweigh the weights
        (1024, [512, 512, 512], "columns"),  # the weight weighs half of what x does
        (4096, [512, 512, 512], "rows"),
        (8, [384, 384], "rows"),  # weights are read along their rows, without packing
        (4, [1024, 1024], "columns"),
    ],
    ids=str,
)
def test_what_threads_share_out(batch: int, sizes: list[int], shared: str) -> None:
    torch.set_num_threads(2)
    plan = pyperc.explain(pyperc.MLP(sizes), torch.randn(batch, sizes[0]))
    assert {layer.threads for layer in plan.layers if layer.run is not None} == {2}
    assert f"threads share {shared}" in str(plan)


@pytest.mark.parametrize("split", ["dw summed by rows", "by layers"])
def test_a_thread_with_a_small_stack(isa: str, split: str) -> None:
    """What is packed for a backward pass is up to 512 KB a thread."""
    torch.set_num_threads(1)
    _C.set_thresholds({"wide_bytes": 0 if split == "by layers" else FAR, "gradient_rows": 0, "peak_percent": FAR})
    failed: list[BaseException] = []

    def run() -> None:
        try:
            check(draw([200, 256, 100], 300, named("tanh"), torch.float32))
        except BaseException as error:
            failed.append(error)

    before = threading.stack_size(128 * 1024)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert not failed, failed


def test_unknown_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="'speed' must be one of"):
        _C.set_thresholds({"speed": 1})


class Encoded(Dataset[torch.Tensor]):
    """Samples that a network makes in the worker."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.x = torch.randn(64, 128)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        x = self.x[index * 16 : (index + 1) * 16].requires_grad_()
        self.model(x).sum().backward()
        assert x.grad is not None
        return x.grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch's autograd refuses to run after a fork beside a GPU")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_in_the_workers_of_a_data_loader_after_fork() -> None:
    torch.set_num_threads(2)
    data = Encoded(pyperc.MLP([128, 256, 10], activation="tanh"))
    want = torch.stack([data[i] for i in range(4)])  # the parent's threads have run by now
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, want)


def test_many_python_threads_at_once_with_threads_of_their_own() -> None:
    torch.set_num_threads(2)
    model = pyperc.MLP([64, 300, 300, 10], activation="gelu")
    x = torch.randn(300, 64)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    want = gradients()
    wrong: list[str] = []

    def work() -> None:
        torch.set_num_threads(2)
        for _ in range(10):
            if not all(torch.equal(a, b) for a, b in zip(gradients(), want, strict=True)):
                wrong.append(threading.current_thread().name)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def test_other_python_threads_run_meanwhile() -> None:
    """The interpreter's lock is not held while the kernels run."""
    torch.set_num_threads(1)
    model = pyperc.MLP([1024] * 4)
    x = torch.randn(1024, 1024)
    counted, done = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.wait(0.001):
            counted += 1

    counter = threading.Thread(target=count)
    counter.start()
    with torch.no_grad():
        for _ in range(5):
            model(x)
    done.set()
    counter.join()
    assert counted >= 5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_inside_the_inter_op_pool() -> None:
    @torch.jit.script
    def network(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
        biases = torch.jit.annotate(list[Optional[torch.Tensor]], [None, None])  # noqa: UP045
        return torch.ops.pyperc.mlp(x, w, biases, ["tanh", "identity"], torch.jit.annotate(list[float], []))

    @torch.jit.script
    def both(x: torch.Tensor, w: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.jit.fork(network, x, w)
        second = network(x, w)
        return torch.jit.wait(first), second

    torch.set_num_threads(2)
    one, other = both(torch.randn(200, 128), [torch.randn(256, 128), torch.randn(10, 256)])
    assert torch.equal(one, other)
