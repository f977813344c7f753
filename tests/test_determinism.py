"""The same input gives the same bits: over repeated calls, whatever lay in memory, from two Python threads at once."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import pytest
import torch
from reference import Activation, Network, composition, draw, named, native, peak, results
from shapes import EVERY_DTYPE

NETWORKS = [
    ("small", [9, 20, 5], 7),
    ("batch beyond widths", [40, 30, 50], 900),
    ("widths beyond batch", [300, 260, 300], 5),
    ("hundreds", [256, 129, 260], 190),
]


def digest(net: Network) -> str:
    hasher = hashlib.sha256()
    for name, value in results(native, net).items():
        hasher.update(name.encode())
        hasher.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


@EVERY_DTYPE
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("sizes", "batch"), [n[1:] for n in NETWORKS], ids=[n[0] for n in NETWORKS])
def test_repeated_runs_give_the_same_bits(
    isa: str, dtype: torch.dtype, sizes: list[int], batch: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    net = draw(sizes, batch, named("gelu"), dtype)
    first = digest(net)
    for _ in range(4):
        torch.full((1 << 18,), torch.nan)  # What was freed lies in the next workspace.
        assert digest(net) == first


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_alignment_of_the_input_changes_nothing(isa: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    net = draw([67, 45, 20], 37, named("tanh"), dtype)
    first = digest(net)
    for offset in (1, 2, 3, 5):
        store = torch.empty(net.x.numel() + offset, dtype=dtype)
        store[offset:] = net.x.flatten()
        net.x = store[offset:].view(net.x.shape)
        assert digest(net) == first


@pytest.mark.parametrize("width", [1, 3, 7, 10, 40, 600, 1030])
@pytest.mark.parametrize("name", ["identity", "relu", "tanh"])
def test_strides_of_dy_change_no_bit(isa: str, dtype: torch.dtype, name: str, width: int) -> None:
    """Rows of dy that adjoin are summed into db in other ways than those that lie apart, or whose columns do."""
    for batch in (5, 16, 17, 83, 130):
        net = draw([6, width], batch, named(name), dtype, margin=0)
        want = results(native, net)
        apart = torch.nn.functional.pad(net.dy, (0, 3))[:, :width]
        for dy in (apart, net.dy.t().contiguous().t()):
            got = results(native, replace(net, dy=dy))
            assert [key for key in want if not torch.equal(got[key], want[key])] == [], (batch, dy.stride())


@EVERY_DTYPE
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_grad_mode_changes_no_bit_of_the_output(isa: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for activation in (named("relu"), named("gelu")):
        net = draw([67, 45, 20], 130, activation, dtype)
        with torch.no_grad():
            y = native(net)
        assert torch.equal(y, native(net.requires_grad()))


@EVERY_DTYPE
def test_a_sample_does_not_depend_on_how_the_gradients_are_asked_for(dtype: torch.dtype) -> None:
    net = draw([67, 45, 20], 130, named("gelu"), dtype)
    want = results(native, net)
    for name in net.leaves:
        leaves = net.requires_grad(lambda candidate, name=name: candidate == name)
        native(leaves).backward(net.dy)
        assert torch.equal(leaves.leaves[name].grad, want[name]), name


@pytest.mark.parametrize("threads", [1, 2])
def test_two_python_threads_at_once(threads: int) -> None:
    """Different networks at the same time, each again and again: no workspace is shared."""
    torch.set_num_threads(threads)
    nets = [
        draw([64, 300, 30], 90, named("gelu"), torch.float32, seed=1),
        draw([200, 50, 64], 170, named("tanh"), torch.float32, seed=2),
    ]
    want = [digest(net) for net in nets]
    wrong: list[str] = []
    start = threading.Barrier(len(nets))

    def work(net: Network, expected: str) -> None:
        torch.set_num_threads(threads)
        start.wait()
        wrong.extend(str(net) for _ in range(12) if digest(net) != expected)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(nets, want, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("activation", [named("relu"), named("gelu")], ids=str)
def test_training_twice_from_the_same_seed_gives_the_same_weights(activation: Activation) -> None:
    torch.set_num_threads(2)

    def train(forward: object) -> torch.Tensor:
        net = draw([20, 64, 1], 256, activation, torch.float32).requires_grad(lambda name: name != "dx")
        parameters = [*net.w, *net.b]
        target = net.x.sin().sum(1, keepdim=True)
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            ((forward(net) - target) ** 2).mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in parameters])

    first = train(native)
    assert torch.equal(first, train(native))
    assert peak(first - train(composition)) < 1e-5
