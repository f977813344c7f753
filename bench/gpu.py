"""Times on a GPU, against torch in the same process: python bench/gpu.py --json bench/results/gpu.json

Every figure is the median of replays of a CUDA graph on random data, the contenders in turn, so that what the clocks do
meets both. `--device cpu --quick` tries the program out where there is no GPU: by the clock, without graphs, tiny.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyperc
from pyperc import _C

Call = Callable[[], object]


class Clock:
    """Measures calls on one device. With `graph` the call is recorded once and replayed."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.flush = torch.empty(1 if quick else 96 << 20, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def graphed(self, call: Call) -> Call:
        if self.device.type != "cuda":
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def once(self, call: Call, times: int) -> float:
        """Seconds a call, of `times` calls in a row."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(times):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / times
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def compare(self, calls: dict[str, Call], budget: float = 0.3) -> dict[str, float]:
        """The median seconds of each call; they take turns."""
        for call in calls.values():
            call()
        self.synchronize()
        times = {name: max(1, int(2e-3 / max(self.once(call, 2), 1e-6))) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        stop = time.perf_counter() + (0.01 if self.quick else budget * len(calls))
        while time.perf_counter() < stop or len(next(iter(samples.values()))) < 5:
            for name, call in calls.items():
                self.flush.zero_()
                samples[name].append(self.once(call, times[name]))
        return {name: statistics.median(values) for name, values in samples.items()}


def networks(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(plain torch, pyperc) with the same parameters."""
    layers: list[nn.Module] = []
    for n, (k, m) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(k, m), *([nn.ReLU()] if n + 2 < len(sizes) else [])]
    plain = nn.Sequential(*layers).to(device, dtype)
    ours = pyperc.fuse(nn.Sequential(*layers)).to(device, dtype)
    return plain, ours


def step_of(model: nn.Module, x: Tensor, dy: Tensor) -> Call:
    """Forward and backward, into gradients that are there already."""
    parameters = list(model.parameters())

    def step() -> None:
        torch.autograd.grad(model(x), parameters, dy)

    return step


def inference_of(model: nn.Module, x: Tensor) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def elementwise(clock: Clock) -> list[dict[str, Any]]:
    """Bytes a second of the elementwise kernels, each byte counted once; 256 MB and up."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        width = 1024
        batch = 64 if clock.quick else (256 << 20) // (width * dtype.itemsize)
        s = torch.randn(batch, width, device=clock.device).to(dtype)
        for name in ("relu", "gelu", "tanh", "silu"):
            plain = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh, "silu": nn.functional.silu}[
                name
            ]
            seconds = clock.compare(
                {
                    "pyperc": clock.graphed(lambda s=s, name=name: _C.activation(s, name)),
                    "torch": clock.graphed(lambda s=s, plain=plain: plain(s)),
                    "copy": clock.graphed(lambda s=s: s.clone()),
                }
            )
            terabytes = {k: 2 * s.nbytes / v / 1e12 for k, v in seconds.items()}
            rows.append({"table": "elementwise", "dtype": str(dtype), "activation": name, "TB/s": terabytes})
    return rows


def passes(clock: Clock, sizes: list[int], batch: int, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Step and inference of one network: against eager, eager in a graph, and torch.compile."""
    plain, ours = networks(sizes, dtype, clock.device)
    x = torch.randn(batch, sizes[0], device=clock.device).to(dtype)
    dy = torch.randn(batch, sizes[-1], device=clock.device).to(dtype)
    result: dict[str, Any] = {"table": "networks", "sizes": sizes, "batch": batch, "dtype": str(dtype)}
    for what, make in (("step", step_of), ("inference", inference_of)):
        arguments = (x, dy) if what == "step" else (x,)
        calls = {
            "eager": make(plain, *arguments),
            "ours, eager": make(ours, *arguments),
            "eager, graph": clock.graphed(make(plain, *arguments)),
            "ours, graph": clock.graphed(make(ours, *arguments)),
        }
        if compiled:
            calls["torch.compile"] = make(torch.compile(plain, mode="max-autotune"), *arguments)
        seconds = clock.compare(calls)
        result[what] = {
            "seconds": seconds,
            "over eager": seconds["eager"] / seconds["ours, eager"],
            "over graphed eager": seconds["eager, graph"] / seconds["ours, graph"],
        }
        if compiled:
            result[what]["over torch.compile"] = seconds["torch.compile"] / seconds["ours, graph"]
    step, inference = result["step"]["seconds"], result["inference"]["seconds"]
    result["backward over forward"] = step["ours, graph"] / inference["ours, graph"] - 1
    return result


def products(clock: Clock) -> list[dict[str, Any]]:
    """Our products beside cuBLAS, 4096 cubed, and what the plan's thresholds should be: both ways by width."""
    if clock.device.type != "cuda":
        return []
    before, rows = _C.thresholds("cuda"), []
    chain = _C.Chain([("identity", [])])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(4096, 4096, device=clock.device).to(dtype) for _ in range(2))
        _C.set_thresholds(dict.fromkeys(before, 1 << 40), "cuda")
        calls = {
            "gemm": clock.graphed(lambda a=a, b=b: _C.mlp(a, [b], [None], chain)),
            "cublas": clock.graphed(lambda a=a, b=b: a @ b.T),
        }
        _C.set_thresholds(before, "cuda")
        seconds = clock.compare(calls)
        teraflops = {name: 2 * 4096**3 / value / 1e12 for name, value in seconds.items()}
        rows.append({"table": "products", "dtype": str(dtype), "TFLOP/s": teraflops})
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 256, 512, 768, 1024, 2048):
            _, ours = networks([width] * 4, dtype, clock.device)
            x, dy = (torch.randn(1 << 14, width, device=clock.device).to(dtype) for _ in range(2))
            calls = {}
            for name, threshold in (("gemm", 1 << 40), ("cublas", 0)):
                _C.set_thresholds(dict.fromkeys(before, threshold), "cuda")
                calls[name] = clock.graphed(step_of(ours, x, dy))
            _C.set_thresholds(before, "cuda")
            seconds = clock.compare(calls)
            rows.append({"table": "plan", "dtype": str(dtype), "width": width, "seconds": seconds})
    return rows


def same_bits(clock: Clock) -> dict[str, Any]:
    """How many different results 100 runs of forward and backward gave."""
    _, ours = networks([64, 128, 128, 10], torch.bfloat16, clock.device)
    x = torch.randn(4096, 64, device=clock.device, dtype=torch.bfloat16)
    seen = set()
    for _ in range(3 if clock.quick else 100):
        y = ours(x)
        gradients = torch.autograd.grad(y, list(ours.parameters()), torch.ones_like(y))
        seen.add(hash(tuple(t.detach().float().cpu().numpy().tobytes() for t in (y, *gradients))))
    return {"table": "bits", "different results": len(seen)}


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, as found."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    found["build"] = _C.build()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(device.index or 0)]
        values = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split(", ")
        found["nvidia-smi"] = dict(zip(fields.split(","), values, strict=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no figures")
    parser.add_argument("--minutes", type=float, default=12, help="the grid ends when they are over")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    clock = Clock(arguments.device, arguments.quick)
    stop = time.perf_counter() + 60 * arguments.minutes
    most = 6 if arguments.quick else 20
    report: dict[str, Any] = {"before": facts(clock.device), "rows": []}

    def add(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    for row in [*elementwise(clock), *products(clock)]:
        add(row)
    add(same_bits(clock))
    # What the README promises first, then the grid, as far as the time goes.
    named = [([w] * 6, 1 << min(n, most)) for w, n in ((64, 20), (128, 20), (64, 13), (128, 13), (128, 6), (256, 17))]
    wide = [([w] * 4, 1 << min(n, most)) for w, n in ((1024, 14), (2048, 13), (4096, 13))]
    grid = [
        ([w] * 4, 1 << n)
        for w in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
        for n in (0, 4, 7, 10, 13, 17, 20)
    ]
    for sizes, batch in [*named, *wide]:
        if not arguments.quick or max(sizes) < 512:
            add(passes(clock, sizes, batch, torch.bfloat16, compiled=not arguments.quick))
    for sizes, batch in grid:
        elements = max(sizes) * batch
        if time.perf_counter() < stop and elements <= (1 << 12 if arguments.quick else 1 << 30):
            add(passes(clock, sizes, batch, torch.bfloat16, compiled=False))
    report["after"] = facts(clock.device)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
