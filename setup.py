"""Builds pyperc._C; the static metadata is in pyproject.toml."""

from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for suffix in ("h", "inl") for path in ROOT.glob(f"csrc/**/*.{suffix}"))

# Baseline flags for every file: an ISA file raises its own target, so that no other file can hold its instructions.
# -fno-trapping-math lets a select become a blend; NaN and infinity keep their meaning.
COMPILE = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-fvisibility=hidden", "-Wno-psabi"]


# What pyperc/__init__.py compares with the torch that it runs with, before it loads the native module.
(ROOT / "pyperc" / "_build.py").write_text(
    f'"""Written by setup.py: what the native module was built against."""\n\nTORCH = "{torch.__version__}"\n'
)

setup(
    ext_modules=[
        CppExtension("pyperc._C", SOURCES, depends=HEADERS, extra_compile_args=COMPILE, extra_link_args=["-fopenmp"])
    ],
    cmdclass={"build_ext": BuildExtension},
)
