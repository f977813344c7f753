"""The CUDA kernels on the processor: csrc/cuda compiled by g++ over the emulator, called through ctypes.

What tests/cuda/*_entries.cpp defines is called by name: `emulator.call("activate", ...)` with numbers, lists of float
and tensors from `emulator.place`, whose memory ends at a page that cannot be touched. A mistake of the kernel (a race
that deadlocks, an address outside, a misaligned vector) raises `KernelError`; a wrong value shows in the result.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # by the numbers of tests/cuda/entries.h
COUNTS = ("launches", "blocks", "switches", "ldmatrix", "conflicts", "mma", "copies")

COMPILE = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"]
VARIANTS = {"plain": [], "sanitized": SANITIZE}


class KernelError(Exception):
    """The kernel made a mistake, and the launch was ended there."""


def sources() -> list[Path]:
    patterns = ("csrc/cuda/*.cu", "csrc/cuda/emulate/*.cpp", "tests/cuda/*_entries.cpp")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def build(
    folder: Path, flags: Sequence[str] = (), files: Iterable[Path] | None = None, libraries: Sequence[str] = ()
) -> Path:
    """The shared object of these files, sources or objects, compiled as far as they have changed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "emulated.so"
        files = sources() if files is None else list(files)
        objects = {path: path if path.suffix == ".o" else folder / f"{path.stem}.o" for path in files}
        flags = " ".join([*COMPILE, *flags])
        rules = [
            "rule compile",
            f"  command = g++ {flags} -MD -MF $out.d -x c++ -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "rule link",
            f"  command = g++ {flags} -shared $in -o $out {' '.join(libraries)}",
            *(f"build {out}: compile {path}" for path, out in objects.items() if out != path),
            f"build {library}: link {' '.join(map(str, objects.values()))}",
        ]
        (folder / "build.ninja").write_text("\n".join(rules) + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(os.cpu_count())],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the emulated kernels do not compile:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return library


def available() -> bool:
    return shutil.which("g++") is not None and sys.platform == "linux"


class Emulator:
    """One build of the emulated kernels."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.message.restype = ctypes.c_char_p
        self.library.allocate.restype = ctypes.c_void_p
        self.placed: list[int] = []

    @classmethod
    def built(cls, variant: str = "plain") -> Emulator:
        return cls(build(ROOT / "build" / "emulator" / variant, VARIANTS[variant]))

    def settings(self, seed: int = 0, copies: str = "eager") -> None:
        """For the launches from here on; their counts begin at 0."""
        self.library.settings(ctypes.c_int64(seed), ctypes.c_int64({"eager": 0, "lazy": 1}[copies]))

    def counts(self) -> dict[str, int]:
        numbers = (ctypes.c_int64 * len(COUNTS))()
        self.library.counts(numbers)
        return dict(zip(COUNTS, numbers, strict=True))

    def call(self, entry: str, *arguments: object) -> None:
        if self.library[entry](*map(argument_of, arguments)):
            raise KernelError(self.library.message().decode())

    def number(self, entry: str, *arguments: object) -> int:
        function = self.library[entry]
        function.restype = ctypes.c_int64
        return int(function(*map(argument_of, arguments)))

    def empty(
        self, *sizes: int, dtype: torch.dtype, pitch: int | None = None, aligned: bool = True, fill: float = torch.nan
    ) -> Tensor:
        """A tensor of NaN; a matrix's rows lie `pitch` elements apart. Aligned to 16 bytes, or its end to a page."""
        strides = [1]
        for size in reversed(sizes[1:]):
            strides.insert(0, strides[0] * size)
        if pitch is not None:
            strides[-2] = pitch
        count = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) if 0 not in sizes else 0
        size = count * dtype.itemsize
        data = self.library.allocate(ctypes.c_int64(size), ctypes.c_int64(aligned))
        self.placed.append(data)
        if count == 0:
            return torch.empty(sizes, dtype=dtype)
        flat = torch.frombuffer((ctypes.c_char * size).from_address(data), dtype=dtype)
        if (
            count < 1 << 24 and dtype.is_floating_point
        ):  # a larger one costs only what is touched of it, and holds zeros
            flat.fill_(fill)
        return flat.as_strided(sizes, strides)

    def place(self, values: Tensor, pitch: int | None = None, aligned: bool = True) -> Tensor:
        """A copy of the values in memory that ends where it ends; between the rows there is NaN."""
        placed = self.empty(*values.shape, dtype=values.dtype, pitch=pitch, aligned=aligned)
        return placed.copy_(values)

    def release(self) -> None:
        """All that was placed: no tensor of it may be used any more."""
        for data in self.placed:
            self.library.release(ctypes.c_void_p(data))
        self.placed.clear()


def argument_of(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int64(DTYPES.index(value))
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, (list, tuple)):
        return (ctypes.c_double * max(2, len(value)))(*value)
    raise TypeError(f"an entry takes numbers, lists of float and tensors, got {value!r}")
