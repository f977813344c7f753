"""What this installation is: versions, instruction sets, threads, CUDA."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

import pyperc
from pyperc import _C

__all__ = ["info", "text"]


def info() -> dict[str, Any]:
    """The facts that a bug report needs, as plain values that json can write.

        pyperc, python, torch     versions; torch_built, the torch that the kernels were compiled against
        platform, processor       of the machine
        compiler, openmp          of the kernels: its name and version, and whether it had OpenMP
        isas_built, isas          instruction sets compiled, and those of them that this processor runs, worst first
        isa, isa_error            the one that is used; None where PYPERC_ISA names one that cannot be, and then why
        PYPERC_ISA                the environment variable that chooses it, or None: the best
        threads                   torch.get_num_threads()
        cuda, cuda_reason         GPU architectures compiled for; None where there are none, and then why

    Example:
        >>> facts = info()
        >>> facts["isa"] in facts["isas"] and set(facts["isas"]) <= set(facts["isas_built"])
        True
    """
    build = _C.build()
    isa, isa_error = None, None
    try:
        isa = _C.isa()
    except RuntimeError as error:
        isa_error = str(error)
    return {
        "pyperc": pyperc.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "torch": torch.__version__,
        "torch_built": build["torch"],
        "compiler": build["compiler"],
        "isas_built": _C.isas_built(),
        "isas": _C.isas(),
        "isa": isa,
        "isa_error": isa_error,
        "PYPERC_ISA": os.environ.get("PYPERC_ISA"),
        "openmp": build["openmp"],
        "threads": torch.get_num_threads(),
        "cuda": build["cuda"],
        "cuda_reason": build["cuda_reason"],
    }


def text(facts: dict[str, Any]) -> str:
    """The facts of `info` as lines to read."""
    isa = facts["isa"] or f"none: {facts['isa_error']}"
    chosen_by = "the best" if facts["PYPERC_ISA"] is None else f"PYPERC_ISA={facts['PYPERC_ISA']}"
    rows = {
        "pyperc": facts["pyperc"],
        "python": f"{facts['python']} on {facts['platform']}",
        "processor": facts["processor"],
        "torch": f"{facts['torch']}, built against {facts['torch_built']}",
        "compiler": facts["compiler"],
        "ISA": f"{isa} ({chosen_by})",
        "  built": " ".join(facts["isas_built"]),
        "  this processor": " ".join(facts["isas"]),
        "threads": f"{facts['threads']}, {'OpenMP' if facts['openmp'] else 'built without OpenMP'}",
        "CUDA": facts["cuda"] or f"not built: {facts['cuda_reason']}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
