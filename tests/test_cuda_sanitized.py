"""The emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer: each access exact, no signed overflow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import ROOT, VARIANTS, build

NOT_HERE = ("test_cuda_code.py", "test_cuda_faults.py", "test_cuda_sanitized.py")
# Of the two 16-bit formats, which the kernels' text does not tell apart, one; of the elementwise kernels one activation
# that reads the output and one that reads the summation.
SELECTED = "(not float16 or bfloat16) and (not elementwise or gelu_tanh or (relu and not leaky))"


def test_the_kernels_under_the_sanitizers() -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulated kernels need g++")
    asan = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    build(ROOT / "build" / "emulator" / "sanitized", VARIANTS["sanitized"])
    tests = sorted(str(p) for p in (ROOT / "tests").glob("test_cuda_*.py") if p.name not in NOT_HERE)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(asan).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYPERC_EMULATOR": "sanitized",
        "CUDA_VISIBLE_DEVICES": "",  # the driver and the sanitizer want the same addresses
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run([*command, "-k", SELECTED], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
