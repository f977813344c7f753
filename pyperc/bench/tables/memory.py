"""Peak bytes of forward and backward for each activation, counted in a process of its own for each contender.

Two figures, since neither sees everything:

- allocated: the largest sum of what torch's allocator has handed out and not yet got back, from the memory events of
  torch.profiler, over the first forward and backward of a fresh thread, which would have to allocate what a thread
  keeps. pyperc's workspaces come from that allocator. What MKL and oneDNN allocate for themselves is not seen, nor the
  512 KB that each thread keeps for pyperc's passes.
- resident: the growth of the process's peak resident memory (VmHWM of Linux, set back before), which sees everything,
  in pages. The allocator of the C library is told to give freed blocks back at once.

The parameters, x and dy exist before and count in neither.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import pyperc
from pyperc.bench.cases import Job, Network, Record, Settings
from pyperc.bench.tables import mlp
from pyperc.bench.text import Table, size

NAME = "memory"


def jobs(settings: Settings) -> list[Job]:
    networks = [Network(8, (16, 16), "gelu")] if settings.smoke else list(measured())
    return [Job("memory", lambda pace: measure(networks), weight=0, seconds=20)]


def measured() -> Iterator[Network]:
    """Every activation at one shape, and the networks whose times are measured."""
    for name in pyperc.activations():
        yield Network(512, (512,) * 5, name)
    yield from mlp.TRAINED


def measure(networks: Sequence[Network]) -> list[Record]:
    """A record for each network."""
    request = json.dumps([[network.batch, network.sizes, network.activation] for network in networks])
    # Side by side: they count bytes, not seconds.
    with ThreadPoolExecutor() as pool:
        asked = {name: pool.submit(_child, name, request) for name in ("pyperc", "eager")}
        answers = {name: future.result() for name, future in asked.items()}
    records = []
    for i, network in enumerate(networks):
        peaks = {name: answer[i] for name, answer in answers.items()}
        records.append(
            {"table": NAME, "case": network.name, "work": "forward+backward", **network.facts(), "peak": peaks}
        )
    return records


def _child(contender: str, request: str) -> list[dict[str, int | None]]:
    # Blocks of 64 KiB and more are mapped, and unmapped when they are freed, so that residence follows allocation.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
    }
    environment["PYTHONPATH"] = os.pathsep.join(path or "." for path in sys.path)
    command = [sys.executable, "-m", __name__, contender, str(torch.get_num_threads())]
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-500:]}")
    answer: list[dict[str, int | None]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def allocated(run: Any) -> tuple[int, int]:
    """(peak, what is left when all is done) of torch's allocator over one call, in bytes, in this thread."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: int(event.start_ns())):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def resident(run: Any) -> int | None:
    """Growth of the peak resident memory over one call, in bytes; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except (OSError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _main(contender: str, threads: int) -> None:
    """The child: reads the networks, writes their peaks."""
    torch.set_num_threads(threads)
    networks = [Network(batch, tuple(sizes), activation) for batch, sizes, activation in json.loads(sys.stdin.read())]

    def prepare(network: Network) -> Any:
        model = network.models()[contender]
        x, dy = network.data()
        leaves = [x.requires_grad_(), *model.parameters()]
        return lambda: torch.autograd.grad(model(x), leaves, dy)

    def in_fresh_thread(run: Any) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(run()))
        thread.start()
        thread.join()
        # The workspace that a thread keeps goes when the system's thread ends, a little after Python's.
        task, end = Path(f"/proc/self/task/{thread.native_id}"), time.perf_counter() + 2
        while task.exists() and time.perf_counter() < end:
            time.sleep(0.001)
        return found[0]

    # Code and threads are paged in by a small network, twice: the profiler has its own first time.
    small = prepare(Network(8, (16,) * len(networks[0].sizes), networks[0].activation))
    for _ in range(2):
        in_fresh_thread(lambda: (allocated(small), resident(small)))
    answers = []
    for network in networks:
        run = prepare(network)
        peak, left = in_fresh_thread(lambda run=run: allocated(run))
        answers.append({"allocated": peak, "kept": left, "resident": in_fresh_thread(lambda run=run: resident(run))})
        del run
    print(json.dumps(answers))


def tables(records: Sequence[Record]) -> list[Table]:
    header = ["", "allocated: pyperc", "eager", "eager / pyperc", "resident: pyperc", "eager", "eager / pyperc"]
    found = Table("Memory: peak of forward and backward beyond parameters, input and dy", [*header, "kept by pyperc"])
    for record in records:
        row = [record["case"]]
        ours, plain = record["peak"]["pyperc"], record["peak"]["eager"]
        for kind in ("allocated", "resident"):
            if ours[kind] is None or plain[kind] is None:
                row += ["-", "-", "-"]
            elif not (ours[kind] and plain[kind]):
                row += [size(ours[kind]), size(plain[kind]), "-"]
            else:
                ratio = plain[kind] / ours[kind]
                more = " (more)" if ratio < 0.995 else ""
                row += [size(ours[kind]), size(plain[kind]), f"{ratio:.2f}{more}"]
        found.rows.append([*row, size(ours["kept"])])
    if records:
        found.notes.append(
            "Allocated: from torch's allocator, by torch.profiler's memory events, over the first call of a fresh "
            "thread: pyperc's workspaces are counted, what MKL keeps for itself is not, nor the 512 KB that a thread "
            "keeps for pyperc's passes. Resident: growth of the process's peak resident memory, which sees "
            "everything, and of small networks just pages that were not at hand. Kept: the workspace of torch's "
            "allocator that stays for the thread's next call."
        )
    return [found]


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
