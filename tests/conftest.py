"""Fixtures: each instruction set that this processor runs, each dtype, torch's settings put back after every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from emulator import Emulator, available
from shapes import instruction_set

from pyperc import _C
from pyperc.__main__ import main

DTYPES = [torch.float32, torch.float64]


def pytest_configure() -> None:
    """In the background, a shell has the tests ignore the signal that some of them are about."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """avx512_bf16 is avx512 but for products of bfloat16, and by its place in the list what all else here runs on.

    In float32 and float64 it is not tested once more where each instruction set is named.
    """
    again = {item for item in items if repeats(getattr(item, "callspec", None))}
    config.hook.pytest_deselected(items=list(again))
    items[:] = [item for item in items if item not in again]


# What runs on each device that is there.
ON_EVERY_DEVICE = {"test_autograd", "test_gradients", "test_transforms", "test_fuse", "test_state", "test_cuda_binding"}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if len(DEVICES) > 1 and metafunc.module.__name__ in ON_EVERY_DEVICE:
        metafunc.parametrize("device", DEVICES, indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of a test lie that does not say so itself."""
    place = torch.device(getattr(request, "param", "cpu"))
    if place.type == "cpu":
        yield place
        return
    torch.set_default_device(place)
    yield place
    torch.set_default_device(None)


def repeats(callspec: object) -> bool:
    params = getattr(callspec, "params", {})
    return params.get("isa") == "avx512_bf16" and params.get("dtype") in DTYPES


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["native", "autograd"])
def engine(request: pytest.FixtureRequest) -> str:
    """Of a TrainStep, for `steps.prepared`."""
    return request.param


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """A fixed seed and one thread before, the count of threads and the default dtype as they were after.

    One, because OpenMP's threads spin: on a busy machine the small products of these tests take ten times as long on
    two. What several threads do is tested where the count is set.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command line says to stderr of arguments that it refuses."""

    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return refuse


@pytest.fixture(scope="session")
def emulated_kernels() -> Emulator:
    if not available():
        pytest.skip("the emulated kernels need g++ on Linux")
    return Emulator.built(os.environ.get("PYPERC_EMULATOR", "plain"))


@pytest.fixture
def emulator(emulated_kernels: Emulator) -> Iterator[Emulator]:
    """The CUDA kernels on the processor; what a test places is released after it."""
    emulated_kernels.settings()
    yield emulated_kernels
    emulated_kernels.release()
