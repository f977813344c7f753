"""The products of squares by numpy's BLAS, in a process of its own: its threads stay awake and would disturb others."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import torch

from pyperc.bench.cases import FLOAT, Cost, Job, Record, Settings, add
from pyperc.bench.measure import Pace, calls, interleaved
from pyperc.bench.tables import gemm
from pyperc.bench.text import Table, of_peak

NAME = "numpy"


def jobs(settings: Settings) -> list[Job]:
    if not settings.full:
        return []
    return [Job("numpy's BLAS", lambda pace: measure((256, 512, 1024, 2048, 4096), 0.8), weight=0, seconds=25)]


def measure(sides: Sequence[int], seconds: float) -> list[Record]:
    """A record for each side and layout, measured by the child with the same blocks and probes."""
    threads = str(torch.get_num_threads())
    # torch's threads, there for the probe, give the processor up at once.
    settings = {"OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    command = [sys.executable, "-m", __name__, threads, str(seconds), *map(str, sides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures numpy failed: {done.stderr.strip()[-500:]}")
    records: list[Record] = json.loads(done.stdout.splitlines()[-1])
    return records


def _main(threads: int, seconds: float, sides: Sequence[int]) -> None:
    import numpy as np

    torch.set_num_threads(threads)
    records = []
    for side in sides:
        x, w = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
        operands = {"forward": (x, w.T), "dx": (x, w), "dw": (w.T, x)}
        for layout in gemm.LAYOUTS:
            a, b = operands[layout]
            pace = Pace(seconds, warm_up=0.3 * seconds, fewest=3)
            measured = interleaved({"numpy": calls(partial(np.matmul, a, b))}, pace)
            record: Record = {"table": NAME, "case": str(side), "work": layout, "numpy": np.__version__}
            add(record, measured, Cost(2 * side**3, 3 * FLOAT * side**2))
            records.append(record)
    print(json.dumps(records))


def tables(records: Sequence[Record]) -> list[Table]:
    title = "The same products by numpy's BLAS, in a process of its own: share of the FMA peak"
    found = Table(title, ["m = n = k", *gemm.LAYOUTS.values()])
    for case in dict.fromkeys(record["case"] for record in records):
        shares = [r["contenders"]["numpy"]["share"] for r in records if r["case"] == case]
        found.rows.append([case, *map(of_peak, shares)])
    return [found]


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]), [int(side) for side in sys.argv[3:]])
