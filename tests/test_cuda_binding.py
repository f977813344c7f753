"""The CUDA backend as torch calls it, its loops over the layers and its buffers: on a GPU, and on tensors of the CPU.

There the same source is linked with the emulated kernels and takes the place of the CPU's backend; torch's products are
its own in either case. So what remains for a GPU to show is the guard, the stream and the compiled kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from emulator import DTYPES, ROOT, Emulator, build, sources
from reference import ACTIVATIONS, Activation, check, check_forward, draw, named
from torch.utils.cpp_extension import include_paths, library_paths

import pyperc
from pyperc import _C

CPU = 0  # c10::DeviceType


@pytest.fixture(scope="module")
def backend(emulated_kernels: Emulator) -> Emulator:
    objects = [ROOT / "build/emulator/plain" / f"{path.stem}.o" for path in sources()]
    files = [ROOT / "csrc/torch" / name for name in ("cuda/mlp.cpp", "network.cpp", "backend.cpp", "composition.cpp")]
    files += [*sorted((ROOT / "csrc/cuda").glob("*.cpp")), ROOT / "tests/cuda/torch/binding.cpp", *objects]
    include = [f"-I{path}" for path in include_paths()]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    return Emulator(build(ROOT / "build/emulator/torch", ["-O1", "-Wno-psabi", *include], files, libraries))


@pytest.fixture(autouse=True)
def emulated(device: torch.device, request: pytest.FixtureRequest) -> Iterator[Emulator | None]:
    """The emulated kernels in the place of the CPU's; on a GPU there is nothing to do."""
    if device.type == "cuda":
        yield None
        return
    backend = request.getfixturevalue("backend")
    table = (ctypes.c_void_p * 16)()
    exchange = ctypes.CDLL(_C.__file__).pyperc_exchange_backend
    backend.library.emulated_backend(table)
    exchange(CPU, table)
    backend.settings(seed=1, copies="lazy")
    yield backend
    exchange(CPU, table)


NEVER, ALWAYS = 0, 1 << 40


@pytest.fixture(params=["narrow", "gemm", "library"])
def path(request: pytest.FixtureRequest, device: torch.device, emulated: Emulator | None) -> Iterator[None]:
    """Each way of computing a network, at any width; the kernels of narrow networks in 16 bits."""
    before = _C.thresholds(device.type)
    widest = {"narrow": {"narrow", "gemm", "plain"}, "gemm": {"gemm", "plain"}, "library": set()}[request.param]
    chosen = {name: ALWAYS if name.split("_")[0] in widest else NEVER for name in before}
    _C.set_thresholds(chosen, device.type)
    yield
    _C.set_thresholds(before, device.type)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_each_activation_in_a_network(emulated: Emulator | None, activation: Activation, dtype: torch.dtype) -> None:
    net = draw((5, 9, 8, 3), 6, [activation, activation, named("identity")], dtype)
    check(net)
    check_forward(net)
    assert not emulated or emulated.counts()["launches"] > 0


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("path", ["library"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_is_added_before_the_sum_is_rounded(dtype: torch.dtype) -> None:
    """Of 100,000 sums some lie so near to 0 that rounding twice puts them on the other side of relu."""
    check(draw((17, 400), 257, named("relu"), dtype))


def test_a_narrow_network_is_one_launch(emulated: Emulator | None) -> None:
    net = draw((5, 9, 8, 3), 6, named("gelu"), torch.bfloat16)
    check_forward(net)
    assert not emulated or emulated.counts()["launches"] == 1


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (70,)], ids=str)
@pytest.mark.parametrize("last", ["identity", "gelu", "tanh"])
def test_batches_of_any_shape(batch: tuple[int, ...], last: str) -> None:
    net = draw(
        (4, 7, 5, 1), batch, [named("gelu"), named("silu"), named(last)], torch.float32, bias=[True, False, True]
    )
    check(net)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_only_the_gradients_that_are_wanted(dtype: torch.dtype) -> None:
    activations = [named("gelu"), named("relu"), named("silu"), named("identity")]
    net = draw((4, 6, 5, 7, 3), 8, activations, dtype)
    leaves = [net.x, *net.w, *net.b]
    parameters = [(a.name, list(a.parameters)) for a in activations]
    chain = _C.Chain(parameters)
    want, near = None, 1e-9 if dtype == torch.float64 else 0.1
    for wanted in [range(len(leaves)), *([i] for i in range(len(leaves))), (1, 4), (0, 8), (2, 5)]:
        inputs = [leaf.detach().clone().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        y = _C.mlp(inputs[0], inputs[1:5], inputs[5:], chain)
        got = torch.autograd.grad(y, [inputs[i] for i in wanted], net.dy)
        want = want or got
        for i, gradient in zip(wanted, got, strict=True):
            torch.testing.assert_close(gradient, want[i], rtol=near, atol=near)


@pytest.mark.usefixtures("path")
def test_strides_of_any_kind() -> None:
    model = pyperc.MLP([6, 10, 4], activation="gelu").double()
    plain = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 4)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)))
    x = torch.randn(6, 8, dtype=torch.float64)
    for view in (x.T, x.T[::2], x.T.unsqueeze(1), x[:, :1].T.expand(5, 6), x.T.reshape(2, 2, 2, 6).transpose(0, 1)):
        torch.testing.assert_close(model(view), plain(view))


@pytest.mark.usefixtures("path")
def test_a_layer_of_width_0() -> None:
    net = draw((4, 0, 3), 6, named("gelu"), torch.float32)
    check(net)
    check_forward(net)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4096), (2, 4099)], ids=str)
def test_an_activation_alone(emulated: Emulator | None, shape: tuple[int, ...]) -> None:
    s = torch.randn(shape)
    torch.testing.assert_close(_C.activation(s, "gelu"), torch.nn.functional.gelu(s))
    assert not emulated or (emulated.counts()["launches"] > 0) == (s.numel() > 0)


def kernel(width: int, dtype: torch.dtype, batch: int = 2) -> str:
    x, w = torch.zeros(batch, 3, dtype=dtype), torch.zeros(width, 3, dtype=dtype)
    report = _C.plan(x, [w], [None], _C.Chain([("relu", [])]))
    assert report["isa"].startswith("sm_")
    return report["layers"][0]["kernel"]


def test_the_plan_names_the_path() -> None:
    assert kernel(64, torch.bfloat16) == "narrow, forward in one kernel"
    assert kernel(128, torch.bfloat16) == "gemm, all on the chip; dw by cublas"
    assert kernel(128, torch.bfloat16, 1 << 15) == "narrow, forward in one kernel"
    assert kernel(3000, torch.bfloat16) == "cublas, elementwise passes"
    assert kernel(30, torch.float32) == "cublas, elementwise passes"


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("path", ["gemm"], indirect=True)
def test_the_plan_follows_the_thresholds() -> None:
    assert kernel(30, torch.float32) == "gemm, all on the chip"
