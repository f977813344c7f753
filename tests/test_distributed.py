"""Two processes on this machine: DDP, FSDP2, tensor parallelism and distributed checkpoints, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from distributed_checks import CHECKS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of the two processes says of each check: nothing, or how it failed."""
    folder = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_checks.py")
    root = str(script.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = []
    for rank, text in enumerate(said):
        file = folder / f"found-{rank}.json"
        assert file.exists(), f"process {rank} did not end well:\n{text}"
        results.append(json.loads(file.read_text()))
    return results


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_give_what_one_gives(found: list[dict[str, str]], name: str) -> None:
    for rank, results in enumerate(found):
        assert not results[name], f"in process {rank}:\n{results[name]}"
