"""What the compiler made of the CUDA kernels: registers, no local memory, the instructions that each must have.

A kernel that matches no row of the table fails until it has one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyperc import _C

ARCHITECTURES = {"sm_80", "sm_90a"}


@dataclass(frozen=True)
class Expected:
    """A kernel's ceiling of registers, and instructions that it must have: prefixes of their names."""

    registers: int
    instructions: tuple[str, ...] = ()


# The first row whose pattern is found in the demangled name. Registers x threads of a block x blocks at once <= 65,536.
VECTORS = ("LDG.E.128", "STG.E.128")
TENSOR_CORES = ("HMMA", "LDSM", "LDGSTS")
KERNELS = {
    r"activate_kernel<double": Expected(128, VECTORS),
    r"activate_kernel<": Expected(80, VECTORS),
    r"differentiate_kernel<.*(Heaviside|Sign)>": Expected(80, ("STG.E.128",)),  # ds is 0, whatever dx
    r"differentiate_kernel<double": Expected(255, VECTORS),
    r"differentiate_kernel<": Expected(80, VECTORS),
    r"sum_(rows|splits)_kernel<": Expected(64),
    r"matrix_gemm_kernel<float.*Epilogue 0": Expected(255, ("HMMA", "LDGSTS")),  # ldmatrix transposes 16 bits only
    r"matrix_gemm_kernel<float": Expected(255, TENSOR_CORES),
    r"matrix_gemm_kernel<": Expected(128, TENSOR_CORES),
    r"ordinary_gemm_kernel<": Expected(128),
    r"narrow_(forward|backward)_kernel<(BFloat16|Half), .* (32|64)>": Expected(128, TENSOR_CORES),
    r"narrow_backward_kernel<float": Expected(255, ("HMMA", "LDGSTS")),  # ldmatrix transposes 16 bits only
    r"narrow_(forward|backward)_kernel<": Expected(255, TENSOR_CORES),
    r"narrow_sum_kernel<": Expected(128),
}


def tool(name: str) -> str:
    """A binary utility: on the PATH, beside nvcc, or from the packages of the extra `cuda`."""
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/*/bin/{name}"))
    nvcc = shutil.which("nvcc")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    found = shutil.which(name) or shutil.which(name, path=":".join(folders)) or next(map(str, wheels), None)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    return found


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    instructions: frozenset[str] = frozenset()

    @property
    def expected(self) -> Expected:
        rows = [row for pattern, row in KERNELS.items() if re.search(pattern, self.name)]
        assert rows, f"{self.name} has no row in KERNELS"
        return rows[0]

    def __str__(self) -> str:
        return f"{self.name} for {self.architecture}"


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not _C.build()["cuda"]:
        pytest.skip(f"built without CUDA: {_C.build()['cuda_reason']}")
    cuobjdump, nvdisasm = tool("cuobjdump"), Path(tool("nvdisasm"))
    environment = f"PATH={nvdisasm.parent}:/usr/bin:/bin"
    usage = said("env", environment, cuobjdump, "--dump-resource-usage", _C.__file__)
    code = said("env", environment, cuobjdump, "--dump-sass", _C.__file__)
    found: dict[tuple[str, str], Kernel] = {}
    for architecture, name, text in functions(usage, r"Function (\S+):$"):
        numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        found[architecture, name] = Kernel(
            name, architecture, int(numbers["REG"]), int(numbers["STACK"]), int(numbers["LOCAL"])
        )
    for architecture, name, text in functions(code, r"Function : (\S+)$"):
        found[architecture, name].instructions = frozenset(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)
        )
    demangled = said("c++filt", *(kernel.name for kernel in found.values())).splitlines()
    for kernel, name in zip(found.values(), demangled, strict=True):
        plain = re.sub(r"pyperc::|cuda::|\(anonymous namespace\)::", "", name)
        kernel.name = re.sub(r"\((\w+)\)(\d)", r"\1 \2", plain).split("(")[0]
    return list(found.values())


def functions(text: str, heading: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, function, its text)"""
    architecture = ""
    for part in re.split(r"(?m)^(?=arch = |.*Function )", text):
        if match := re.match(r"arch = (\S+)", part):
            architecture = match[1]
        elif match := re.match(r"\s*" + heading, part, re.M):
            yield architecture, match[1], part


def test_every_kernel_is_built_for_every_architecture(kernels: list[Kernel]) -> None:
    by_name: dict[str, set[str]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, set()).add(kernel.architecture)
    assert {name: built for name, built in by_name.items() if built != ARCHITECTURES} == {}
    assert all(any(re.search(pattern, name) for name in by_name) for pattern in KERNELS)


def test_no_kernel_uses_local_memory(kernels: list[Kernel]) -> None:
    local = {"LDL", "STL"}
    bad = [k for k in kernels if k.stack or k.local or local & {i.split(".")[0] for i in k.instructions}]
    assert not bad, "\n".join(map(str, bad))


def test_registers_stay_under_each_kernels_ceiling(kernels: list[Kernel]) -> None:
    bad = [f"{k}: {k.registers} of {k.expected.registers}" for k in kernels if k.registers > k.expected.registers]
    assert not bad, "\n".join(bad)


def test_each_kernel_has_its_instructions(kernels: list[Kernel]) -> None:
    bad = [
        f"{k}: no {wanted}"
        for k in kernels
        for wanted in k.expected.instructions
        if not any(i.startswith(wanted) for i in k.instructions)
    ]
    assert not bad, "\n".join(bad)
