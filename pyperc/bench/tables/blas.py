"""The products of a linear layer by numpy's BLAS, in a process of its own: its threads stay awake and would disturb."""

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
SIDES = (256, 512, 1024, 2048, 4096)


def jobs(settings: Settings) -> list[Job]:
    if not settings.full:
        return []
    products = [(side, side, side, layout) for side in SIDES for layout in gemm.LAYOUTS]
    return [Job("numpy's BLAS", lambda pace: measure(products, 0.8), weight=0, seconds=25)]


def measure(products: Sequence[tuple[int, int, int, str]], seconds: float) -> list[Record]:
    """A record for each (m, n, k, layout), measured by the child with the same blocks and probes."""
    threads = str(torch.get_num_threads())
    # torch's threads, there for the probe, give the processor up at once.
    settings = {"OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    command = [sys.executable, "-m", __name__, threads, str(seconds)]
    done = subprocess.run(
        command, input=json.dumps(products), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures numpy failed: {done.stderr.strip()[-500:]}")
    records: list[Record] = json.loads(done.stdout.splitlines()[-1])
    return records


def _main(threads: int, seconds: float) -> None:
    """The child: reads the products, writes their records."""
    import numpy as np

    torch.set_num_threads(threads)
    generator = np.random.default_rng(0)
    records = []
    for m, n, k, layout in json.loads(sys.stdin.read()):
        x, w, dy = (generator.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (n, k), (m, n)))
        a, b = {"forward": (x, w.T), "dx": (dy, w), "dw": (dy.T, x)}[layout]
        pace = Pace(seconds, warm_up=0.3 * seconds, fewest=3)
        measured = interleaved({"numpy": calls(partial(np.matmul, a, b))}, pace)
        record: Record = {"table": NAME, "case": gemm.name(m, n, k), "work": layout, "numpy": np.__version__}
        add(record, measured, Cost(2 * m * n * k, FLOAT * (m * k + n * k + m * n)))
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
    _main(int(sys.argv[1]), float(sys.argv[2]))
