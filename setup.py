"""Builds pyperc._C; the static metadata is in pyproject.toml.

With CUDA where torch is a CUDA build and nvcc is found, or where FORCE_CUDA=1 asks for it, beside a torch for the CPU
too; FORCE_CUDA=0 leaves it out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


SOURCES = files("csrc/cpu/**/*.cpp", "csrc/torch/*.cpp")
CUDA_SOURCES = files("csrc/cuda/*.cpp", "csrc/torch/cuda/*.cpp")
KERNELS = files("csrc/cuda/*.cu")
HEADERS = files("csrc/**/*.h", "csrc/**/*.inl")

# Baseline flags for every file: an ISA file raises its own target, so that no other file can hold its instructions.
# -fno-trapping-math lets a select become a blend; NaN and infinity keep their meaning.
COMPILE = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-fvisibility=hidden", "-Wno-psabi"]

# Ampere, Hopper with its own instructions, and Ampere's PTX for what comes after. A spilled register is an error.
NVCC = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]
NVCC += ["-gencode=arch=compute_80,code=[compute_80,sm_80]", "-gencode=arch=compute_90a,code=sm_90a"]
NVCC += ["-Werror=all-warnings"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def wants_cuda() -> bool:
    asked = os.environ.get("FORCE_CUDA", "")
    if asked == "1" and not find_nvcc():
        sys.exit("FORCE_CUDA=1 asks for the CUDA kernels, but nvcc is neither in $CUDA_HOME/bin nor on the PATH")
    return asked == "1" or (asked != "0" and torch.version.cuda is not None and find_nvcc() is not None)


def static_runtime(nvcc: str) -> str:
    """The path of libcudart_static.a, beside which nvcc's own wrapper may not lie."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    for folder in re.findall(r'"-L([^"]*)"', said):
        for library in (Path(folder), Path(folder).parent):
            if (found := library / "libcudart_static.a").exists():
                return str(found.resolve())
    sys.exit(f"libcudart_static.a is not where {nvcc} looks for libraries")


class Build(BuildExtension):
    """Compiles the kernels before the extension that they are linked into; ninja knows what has changed.

    torch's own CUDAExtension wants a torch with CUDA, which these files, that include nothing of torch, do not need.
    """

    def build_extensions(self) -> None:
        if wants_cuda():
            nvcc = str(find_nvcc())
            objects = self.compile_kernels(nvcc)
            for extension in self.extensions:
                extension.sources += CUDA_SOURCES
                extension.extra_objects += [*objects, static_runtime(nvcc)]
                extension.extra_link_args += ["-ldl", "-lrt", "-lpthread"]
                extension.depends += [*CUDA_SOURCES, *objects]
        super().build_extensions()

    def compile_kernels(self, nvcc: str) -> list[str]:
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = {kernel: str(folder / (Path(kernel).stem + ".o")) for kernel in KERNELS}
        compiler = ["-ccbin", os.environ["CXX"]] if "CXX" in os.environ else []
        lines = [
            "rule nvcc",
            f"  command = {' '.join([nvcc, *compiler, *NVCC])} -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            *(f"build {out}: nvcc {ROOT.resolve() / kernel}" for kernel, out in objects.items()),
        ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run([sys.executable, "-m", "ninja", "-v", "-C", str(folder), "-j", jobs], check=True)
        return list(objects.values())


# What pyperc/__init__.py compares with the torch that it runs with, before it loads the native module.
(ROOT / "pyperc" / "_build.py").write_text(
    f'"""Written by setup.py: what the native module was built against."""\n\nTORCH = "{torch.__version__}"\n'
)

setup(
    ext_modules=[
        CppExtension("pyperc._C", SOURCES, depends=HEADERS, extra_compile_args=COMPILE, extra_link_args=["-fopenmp"])
    ],
    cmdclass={"build_ext": Build},
)
