"""The native step around its values: NaN, tensors that are torch's own, what is watched, errors, threads, memory."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from native_steps import F64, OPTIMIZERS, network, same, step_of
from torch import nn


def test_a_loss_that_is_nan_changes_nothing() -> None:
    for name, bad in itertools.product(OPTIMIZERS, (math.nan, math.inf)):
        model = network([6, 17, 5])
        optimizer = OPTIMIZERS[name][0](model.parameters(), **OPTIMIZERS[name][1][-1])  # type: ignore[call-arg]
        step = step_of(model, optimizer)
        x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
        step(x, y)
        before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        x[3, 2] = bad
        y[0, 0] = bad
        with pytest.raises(FloatingPointError, match="in step 2; the parameters are those of before it"):
            step(x, y)
        same(model, before, 0.0)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
        assert step.steps == 1
        assert max(step.counts) == 1
    model = network([6, 17, 5])
    y[0, 0] = math.nan
    step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), on_nan="ignore")(x, y)
    assert model[-1].weight[0].isnan().all()


def test_parameters_are_torchs_own() -> None:
    """Written in place with their version counters; memory given to them meanwhile is seen."""
    model = network([6, 17, 5])
    theirs = copy.deepcopy(model)
    optimizer, reference = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(theirs.parameters(), lr=0.1)
    step = step_of(model, optimizer)
    for i in range(3):
        x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
        versions = [p._version for p in model.parameters()]
        reference.zero_grad()
        F.mse_loss(theirs(x), y).backward()
        reference.step()
        step(x, y)
        assert [p._version for p in model.parameters()] == [v + 1 for v in versions]
        same(model, theirs)
        if i == 0:
            for p in model.parameters():
                store = torch.full((*p.shape[:-1], 40), torch.nan, dtype=F64)
                store[..., : p.shape[-1]] = p.data
                p.data = store[..., : p.shape[-1]]
    model[0].weight.data = torch.zeros(3, 6, dtype=F64)
    with pytest.raises(ValueError, match=r"weights\[0\]"):
        step(x, y)


def test_watched_entries() -> None:
    model = network([6, 17, 5])
    first = model[0]
    step = step_of(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        watched=((first._parameters, "weight", first.weight), (model._modules, "0", first)),
        sizes=((first._forward_hooks, 0), (model._modules, len(model))),
    )
    x, y = torch.randn(9, 6, dtype=F64), torch.randn(9, 5, dtype=F64)
    assert step(x, y) is not None
    hook = first.register_forward_hook(lambda *_: None)
    assert step(x, y) is None
    assert step.gradients(x, y) == (None, [])
    assert step.epoch(x, y, None, 3, torch.empty(3, dtype=F64)) == -1
    hook.remove()
    assert step(x, y) is not None
    first.weight = nn.Parameter(first.weight.detach().clone())
    assert step(x, y) is None


def test_errors_name_the_argument() -> None:
    model = network([6, 17, 5])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = step_of(model, optimizer)
    x, y = torch.randn(4, 6, dtype=F64), torch.randn(4, 5, dtype=F64)
    for error, match, call in (
        (TypeError, "x must be a torch.Tensor", lambda: step([1.0], y)),
        (TypeError, "y must have the network's dtype", lambda: step(x, y.float())),
        (ValueError, r"x must be \[..., 6\]", lambda: step(y, y)),
        (ValueError, "y must be of shape", lambda: step(x, y[:3])),
        (TypeError, "x must have the network's dtype, or be", lambda: step(x.long(), y)),
        (ValueError, "weight must be of shape", lambda: step(x, y, y[0])),
        (ValueError, "losses must have an entry", lambda: step.epoch(x, y, None, 2, torch.empty(3, dtype=F64))),
        (
            IndexError,
            "row 1 of the batch",
            lambda: step.epoch(x, y, torch.tensor([0, 4]), 2, torch.empty(1, dtype=F64)),
        ),
        (ValueError, "loss: must be one of", lambda: step_of(model, optimizer, "huber")),
        (ValueError, "dropout after the last layer", lambda: step_of(model, optimizer, drop=[0.0, 0.5])),
        (ValueError, "for cross_entropy alone", lambda: step_of(model, optimizer, label_smoothing=0.1)),
    ):
        with pytest.raises(error, match=match):
            call()
    labels = step_of(model, optimizer, "cross_entropy")
    before = copy.deepcopy(model)
    for wrong in (5, -1):
        with pytest.raises(IndexError, match="row 2 of the batch"):
            labels(x, torch.tensor([0, 1, wrong, 3]))
    same(model, before, 0.0)
    tied = nn.Sequential(nn.Linear(6, 6, dtype=F64), nn.Linear(6, 6, dtype=F64))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="parameters 0 and 1 that do"):
        step_of(tied, torch.optim.SGD(tied.parameters(), lr=0.1))
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="must hold momentum_buffer"):
        step(x, y)


def test_two_steps_at_once_and_a_reader() -> None:
    """Each thread has the result that it has alone, while another one reads the models."""
    torch.set_num_threads(1)
    models = [network([30, 64, 64, 5], ("relu",)) for _ in range(2)]
    alone = [copy.deepcopy(m) for m in models]
    data = [(torch.randn(32, 30, dtype=F64), torch.randn(32, 5, dtype=F64)) for _ in range(20)]

    def train(model: nn.Sequential) -> None:
        step = step_of(model, torch.optim.Adam(model.parameters()))
        for x, y in data:
            step(x, y)

    for model in alone:
        train(model)
    threads = [threading.Thread(target=train, args=(m,)) for m in models]
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for model in models:
                model(data[0][0])

    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    for ours, theirs in zip(models, alone, strict=True):
        same(ours, theirs, 0.0)


def test_the_same_bits_twice_and_memory_given_back() -> None:
    torch.set_num_threads(2)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        model = network([100, 300, 200, 10], ("relu",), torch.float32)
        step = step_of(model, torch.optim.Adam(model.parameters()), "cross_entropy", drop=[0.5, 0.0, 0.0])
        assert step.workspace == 0
        for rows in (300, 17):
            step(torch.randn(rows, 100), torch.randint(10, (rows,)))
        assert step.workspace > 0
        step.release()
        assert step.workspace == 0
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(256, (512,) * 5), (1024, (1024,) * 4), (1024, (784, 512, 512, 10))],
    ids=str,
)
def test_the_workspace_is_little_beside_the_activations_kept(batch: int, sizes: Sequence[int]) -> None:
    torch.set_num_threads(2)
    model = network(sizes, ("relu",), torch.float32)
    step = step_of(model, torch.optim.SGD(model.parameters(), lr=0.01))
    step(torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1]))
    assert step.kept == 4 * batch * sum(sizes[1:])
    assert step.workspace <= 1.3 * step.kept
