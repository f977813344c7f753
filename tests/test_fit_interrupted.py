"""Trainings that are interrupted, by Ctrl-C or a checkpoint's age, and go on; other threads meanwhile."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from fits import QUIET, assert_same, network, seeded, some_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pyperc
from pyperc.interrupt import Interrupts

if TYPE_CHECKING:
    from pyperc.fit import History

MODULE = sys.modules["pyperc.fit"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *moments: int) -> None:
    """Ctrl-C, as the process gets it, after so many batches in all."""
    taken, plain = [], MODULE.Report.batches

    def batches(self, position: int) -> None:
        taken.append(position)
        if len(taken) in moments:
            signal.raise_signal(signal.SIGINT)
        plain(self, position)

    monkeypatch.setattr(MODULE, "SECONDS", 0.0)
    monkeypatch.setattr(MODULE.Report, "batches", batches)


class Squares(Dataset):
    """Samples with a random number of torch's in each."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.linspace(0, i / 50, 5, dtype=torch.float64) + 0.1 * torch.rand(5), i % 3


SETTINGS = {
    "rows, momentum, dropout": {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9, "batch_size": 16},
    "adam, unshuffled": {"optimizer": "adam", "lr": 0.01, "batch_size": 16, "shuffle": False},
    "own generator, schedule": {"optimizer": "adamw", "lr": lambda step: 0.1 / (1 + step), "batch_size": 16},
    "loader": {"optimizer": "adam", "lr": 0.01},
    "loader, workers": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5},
}


def run(kind: str, **keywords) -> tuple[nn.Module, History, Tensor]:
    """A training of 4 epochs of 4 batches: the model, the history, and a random number drawn after it."""
    x, y = some_data()
    model = network(dropout=0.3)
    settings = dict(SETTINGS[kind])
    if kind.startswith("loader"):
        workers = 2 if "workers" in kind else 0
        x, y = (
            DataLoader(Squares(), 16, shuffle=True, num_workers=workers, generator=seeded() if workers else None),
            None,
        )
    elif kind.startswith("own"):
        settings["generator"] = seeded()
    torch.manual_seed(5)
    history = QUIET(model, x, y, 4, validation=some_data(), **settings, **keywords)
    return model, history, torch.rand(3)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_interrupted_training_resumes_to_the_bit(kind, tmp_path, monkeypatch) -> None:
    expected, curve, number = run(kind)
    path = tmp_path / "run.pt"
    interrupt_at(monkeypatch, 2, 8, 11)
    seen = []
    for complete in (0, 2, 2):
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(kind, checkpoint=path)
        assert len(stopped.value.history) == complete
        seen.append(path.read_bytes())
    torch.manual_seed(99)
    model, history, after = run(kind, checkpoint=path)
    assert [point[:4] for point in history] == [point[:4] for point in curve]
    assert_same(model, expected)
    assert torch.equal(after, number)
    assert len({*seen}) == 3
    # What is complete is only read.
    again, history, _ = run(kind, checkpoint=path)
    assert len(history) == 4
    assert_same(again, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_more_epochs_are_the_same_as_all_at_once(tmp_path) -> None:
    x, y = some_data()
    models = [network(), network()]
    settings = {"lr": 0.1, "momentum": 0.9, "patience": 20}
    torch.manual_seed(5)
    curve = QUIET(models[0], x, y, 5, 16, validation=(x, y), **settings)
    torch.manual_seed(5)
    for epochs in (2, 5):
        history = QUIET(models[1], x, y, epochs, 16, validation=(x, y), checkpoint=tmp_path / "run.pt", **settings)
    assert [point[:4] for point in history] == [point[:4] for point in curve]
    assert_same(*models)


def test_the_state_of_callbacks_is_kept(tmp_path) -> None:
    x, y = some_data()

    def train(epochs: int) -> float:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        QUIET(model, x, y, epochs, optimizer=optimizer, callbacks=[scheduler], checkpoint=tmp_path / "run.pt")
        return scheduler.last_epoch, optimizer.param_groups[0]["lr"]

    assert train(3) == (3, 0.5)
    assert train(5) == (5, 0.25)


def test_what_has_ended_stays_so_and_ctrl_c_ends_nothing(tmp_path, monkeypatch) -> None:
    x, y = some_data()

    def train(name: str, epochs: int = 6, **settings) -> tuple[int, str]:
        history = QUIET(network(), x, y, epochs, 16, lr=0.1, checkpoint=tmp_path / name, **settings)
        return len(history), history.stopped

    for _ in range(2):
        assert train("callback", callbacks=[lambda history: len(history) == 2]) == (2, "callback")
        assert train("patience", patience=2, min_delta=math.inf) == (3, "early stopping")
    assert train("epochs", 2) == (2, "epochs")
    assert train("epochs", 3) == (3, "epochs")
    interrupt_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train("ctrl-c")
    assert train("ctrl-c") == (6, "epochs")


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": np.float64(0.1), "momentum": np.float32(0.9), "clip_grad_norm": np.float64(1)},
        {"optimizer": "adam", "betas": (np.float32(0.9), np.float64(0.99)), "scale": np.float64(0.5)},
        {"lr": lambda step: 0.1 * np.cos(step / 100), "batch_size": np.int64(16), "patience": np.int64(9)},
    ],
    ids=["sgd", "adam", "schedule and counts"],
)
def test_numbers_of_numpy_can_be_read_back(settings, tmp_path) -> None:
    x, y = some_data()
    torch.manual_seed(5)
    curve = QUIET(network(), x, y, 4, **settings)
    torch.manual_seed(5)
    for epochs in (2, 4):
        history = QUIET(network(), x, y, epochs, checkpoint=tmp_path / "run.pt", **settings)
    assert [point[:4] for point in history] == [point[:4] for point in curve]


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path, monkeypatch) -> None:
    x, y = some_data()
    path = tmp_path / "run.pt"
    QUIET(network(), x, y, 1, 16, checkpoint=path)
    before = path.read_bytes()
    with path.open("rb") as opened:
        QUIET(network(), x, y, 2, 16, checkpoint=path)
        # Whoever had it open has the one before, whole.
        assert opened.read() == before
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        QUIET(network(), x, y, 3, 16, checkpoint=path)
    assert path.read_bytes() == before


def test_checkpoints_of_other_trainings_are_refused(tmp_path) -> None:
    x, y = some_data()
    path = tmp_path / "run.pt"
    QUIET(network(), x, y, 1, 16, lr=0.1, checkpoint=path)
    for settings, message in [
        ({"batch_size": 8}, "written with the batches of an epoch 4, got 7"),
        ({"lr": 0.2}, r"written with lr 0\.1, got 0\.2"),
        ({"momentum": 0.5}, r"written with momentum None, got 0\.5"),
        ({"optimizer": "adam"}, "written with optimizer 'sgd', got 'adam'"),
        ({"callbacks": [print]}, "written with 0 callbacks, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            QUIET(network(), x, y, 2, **{"batch_size": 16, "lr": 0.1, "checkpoint": path, **settings})
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="must be one that fit wrote"):
        QUIET(network(), x, y, 2, 16, lr=0.1, checkpoint=path)


PROGRAM = """
import sys, torch, pyperc
torch.manual_seed(0)
torch.set_num_threads(1)
model = pyperc.MLP([20, 32, 4])
x = torch.randn(2000, 20)
y = x[:, :4].argmax(1)
torch.manual_seed(1)
try:
    history = pyperc.fit(model, x, y, int(sys.argv[2]), 8, optimizer="adam", checkpoint=sys.argv[1])
except KeyboardInterrupt as interrupted:
    saved = torch.load(sys.argv[1])
    same = all(torch.equal(saved["model"][name], value) for name, value in model.state_dict().items())
    print("interrupted", len(interrupted.history), same)
    raise
"""


def test_ctrl_c_ends_a_process_after_its_batch(tmp_path) -> None:
    path = tmp_path / "run.pt"
    command = [sys.executable, "-c", PROGRAM, str(path), "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("epoch 2/"):
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=600)
    assert process.returncode != 0
    said = re.match(r"interrupted (\d+) (\w+)", output)
    assert said is not None
    assert said[2] == "True"
    assert "KeyboardInterrupt" in errors
    saved = torch.load(path)
    assert len(saved["history"]) == int(said[1]) >= 2


def test_the_second_ctrl_c_does_not_wait_and_other_handlers_stay() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.noted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    got = []
    before = signal.signal(signal.SIGINT, lambda *_: got.append(1))
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert got == [1]
        assert not interrupts.noted
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_as_well() -> None:
    x, y = some_data()
    found = []
    thread = threading.Thread(target=lambda: found.append(QUIET(network(), x, y, 2)))
    thread.start()
    thread.join()
    assert len(found[0]) == 2


def test_other_threads_run_during_an_epoch() -> None:
    """The interpreter's lock is free while batches run."""
    x, y = torch.randn(20000, 64), torch.randint(10, (20000,))
    model, ticks, ended = pyperc.MLP([64, 256, 256, 10]), [], threading.Event()

    def tick() -> None:
        while not ended.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    history = QUIET(model, x, y, 1, 2000)
    ended.set()
    thread.join()
    assert len(ticks) > 5 * history[0].seconds
