"""Times on a GPU, against torch in the same process: python bench/gpu.py --json bench/results/gpu.json

A figure is the median of replays of a CUDA graph on random data, the contenders in turn, so that what the clocks do
meets all of them. Each promised figure is printed last, beside its bar. `--device cpu --quick` tries the program out
where there is no GPU: by the clock, without graphs, tiny.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyperc
from pyperc import _C

Call = Callable[[], object]
Row = dict[str, Any]

NEVER, ALWAYS = 0, 1 << 40  # widest layer of a path in the plan
HALF = torch.bfloat16


class Bar(NamedTuple):
    """What is promised of a figure: at least `must`, or at most where `at_most`."""

    what: str
    must: float
    hoped: float
    at_most: bool = False

    def worst(self, values: list[float]) -> float:
        return max(values) if self.at_most else min(values)

    def met(self, value: float) -> bool:
        return value <= self.must if self.at_most else value >= self.must


BARS = {
    "elementwise": Bar("elementwise kernels over a copy, the slowest", 0.79, 0.93),
    "grid": Bar("step over eager, the worst of the grid", 0.98, 1.05),
    "64 step": Bar("width 64, 4 hidden layers, 2^20 rows: step over graphed eager", 2.5, 3.5),
    "64 inference": Bar("the same: the time of a copy over inference", 0.42, 0.62),
    "128 step": Bar("width 128, 4 hidden layers, 2^20 rows: step over graphed eager", 1.7, 2.5),
    "small": Bar("width 64 and 128, up to 2^13 rows: step over eager, the worst", 5, 15),
    "256 step": Bar("width 256, 4 hidden layers, 2^17 rows: step over graphed eager", 1.3, 1.6),
    "product": Bar("own product on tensor cores over cuBLAS, 4096 cubed", 0.45, 0.6),
    "strict product": Bar("own product in strict float32 over cuBLAS, 4096 cubed", 0.6, 0.8),
    "least backward": Bar("backward over forward, widths from 1024: the least", 1.8, 1.8),
    "most backward": Bar("backward over forward, widths from 1024: the most", 2.2, 2.2, at_most=True),
    "bits": Bar("different results of 100 forwards and backwards", 1, 1, at_most=True),
}


class Clock:
    """Measures calls on one device. What `recorded` is given is recorded once and replayed, where graphs are."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.on_gpu = self.device.type == "cuda"
        self.flush = torch.empty(96 << 20 if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def recorded(self, call: Call) -> Call:
        call()
        if not self.on_gpu:
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
        if self.on_gpu:
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

    def compare(self, calls: dict[str, Call], budget: float = 0.25) -> dict[str, float]:
        """The median seconds of each call; they take turns."""
        for call in calls.values():
            call()
        self.synchronize()
        fewest, block, rest = (1, 0, 0) if self.quick else (5, 2e-3, budget * len(calls))
        times = {name: max(1, int(block / self.once(call, 2))) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        stop = time.perf_counter() + rest
        while time.perf_counter() < stop or len(next(iter(samples.values()))) < fewest:
            for name, call in calls.items():
                self.flush.zero_()
                samples[name].append(self.once(call, times[name]))
        return {name: statistics.median(values) for name, values in samples.items()}


class Plan:
    """Thresholds of the plan, set for a while."""

    def __init__(self, **values: int) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = _C.thresholds("cuda")
        _C.set_thresholds({name: self.values.get(name.split("_")[0], NEVER) for name in self.before}, "cuda")

    def __exit__(self, *_: object) -> None:
        _C.set_thresholds(self.before, "cuda")


def networks(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(plain torch, pyperc) with the same parameters."""
    layers: list[nn.Module] = []
    for n, (k, m) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(k, m), *([nn.ReLU()] if n + 2 < len(sizes) else [])]
    plain = nn.Sequential(*layers).to(device, dtype)
    return plain, pyperc.fuse(nn.Sequential(*layers))


def step_of(model: nn.Module, x: Tensor, dy: Tensor) -> Call:
    wanted = [*([x] if x.requires_grad else []), *model.parameters()]
    return lambda: torch.autograd.grad(model(x), wanted, dy)


def inference_of(model: nn.Module, x: Tensor) -> Call:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def elementwise(clock: Clock) -> Iterator[Row]:
    """Bytes a second of the elementwise kernels alone, each byte counted once: x = f(s), and ds with db from dx and
    what f' reads, which is all that is left of a layer's backward where b alone wants its gradient."""
    width, aten = 1024, torch.ops.aten
    functions = {
        "relu": (torch.relu, lambda dy, kept: aten.threshold_backward(dy, kept, 0)),
        "gelu": (nn.functional.gelu, aten.gelu_backward),
        "tanh": (torch.tanh, aten.tanh_backward),
        "silu": (nn.functional.silu, aten.silu_backward),
    }
    for dtype, (name, (f, df)) in itertools.product((HALF, torch.float16, torch.float32), functions.items()):
        batch = 4 if clock.quick else (256 << 20) // (width * dtype.itemsize)
        s, dy = (torch.randn(batch, width, device=clock.device).to(dtype) for _ in range(2))
        x, w, b = s[:, :8].contiguous(), dy[0].unsqueeze(1).repeat(1, 8), torch.zeros_like(s[0])
        layer = ([name], [])
        saved = torch.ops.pyperc.mlp_forward(x, [w], [b], *layer)
        seconds = clock.compare(
            {
                "f": clock.recorded(lambda s=s, name=name: _C.activation(s, name)),
                "f of torch": clock.recorded(lambda s=s, f=f: f(s)),
                "ds, db": clock.recorded(
                    lambda dy=dy, x=x, w=w, saved=saved, layer=layer: torch.ops.pyperc.mlp_backward(
                        dy, x, [w], saved, *layer, [False, False, True]
                    )
                ),
                "ds, db of torch": clock.recorded(lambda dy=dy, s=s, df=df: df(dy, s).sum(0)),
                "copy": clock.recorded(lambda s=s: s.clone()),
            }
        )
        rates = {what: (3 if "ds" in what else 2) * s.nbytes / value / 1e12 for what, value in seconds.items()}
        slowest = min(rates["f"], rates["ds, db"]) / rates["copy"]
        yield {"dtype": str(dtype), "activation": name, "TB/s": rates, "elementwise": slowest}


def passes(clock: Clock, sizes: list[int], batch: int, *, compiled: bool = False, needs_dx: bool = False) -> Row:
    """Step and inference of one network: against eager, eager in a graph, and torch.compile."""
    plain, ours = networks(sizes, HALF, clock.device)
    x = torch.randn(batch, sizes[0], device=clock.device).to(HALF).requires_grad_(needs_dx)
    dy = torch.randn(batch, sizes[-1], device=clock.device).to(HALF)
    result: Row = {"sizes": sizes, "batch": batch, "dtype": str(HALF)}
    for what, of in (
        ("step", lambda model: step_of(model, x, dy)),
        ("inference", lambda model: inference_of(model, x)),
    ):
        calls = {
            "eager": of(plain),
            "ours": of(ours),
            "eager, graph": clock.recorded(of(plain)),
            "ours, graph": clock.recorded(of(ours)),
        }
        if compiled:
            torch.compiler.reset()
            calls["torch.compile"] = of(torch.compile(plain, mode="max-autotune"))
        seconds = clock.compare(calls)
        result[what] = {
            "us": {name: 1e6 * value for name, value in seconds.items()},
            "over eager": seconds["eager"] / seconds["ours, graph"],
            "over eager, both without a graph": seconds["eager"] / seconds["ours"],
            "over graphed eager": seconds["eager, graph"] / seconds["ours, graph"],
        }
        if compiled:
            result[what]["over torch.compile"] = seconds["torch.compile"] / seconds["ours, graph"]
    step, inference = (result[what]["us"]["ours, graph"] for what in ("step", "inference"))
    result["backward over forward"] = step / inference - 1
    return result


def narrow(clock: Clock) -> Iterator[Row]:
    """Networks of 4 hidden layers, whole or in part in one kernel."""
    most = 6 if clock.quick else 20
    for width, log2 in ((64, 20), (128, 20), (256, 17)):
        row = passes(clock, [width] * 6, 1 << min(log2, most))
        inference = {}
        if width == 64:
            rows = torch.randn(1 << min(log2, most), width, device=clock.device).to(HALF)
            copy = clock.compare({"copy": clock.recorded(rows.clone)})["copy"]
            inference = {"64 inference": 1e6 * copy / row["inference"]["us"]["ours, graph"]}
        yield {**row, f"{width} step": row["step"]["over graphed eager"], **inference}
    for width, log2 in itertools.product((64, 128), (0, 6, 10, 13)):
        row = passes(clock, [width] * 6, 1 << min(log2, most))
        yield {**row, "small": row["step"]["over eager"]}


def wide(clock: Clock) -> Iterator[Row]:
    for width, log2 in ((1024, 14), (2048, 13), (4096, 13)):
        row = passes(clock, [16 if clock.quick else width] * 4, 1 << (4 if clock.quick else log2), needs_dx=True)
        ratio = row["backward over forward"]
        yield {**row, "least backward": ratio, "most backward": ratio}


def grid(clock: Clock) -> Iterator[Row]:
    """As far as the memory of one GPU holds what eager keeps."""
    widths, batches = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (0, 4, 7, 10, 13, 17, 20)
    for width, log2 in itertools.product(widths, batches):
        if width << log2 <= (1 << 8 if clock.quick else 1 << 30):
            row = passes(clock, [width] * 4, 1 << log2)
            step = row["step"]
            yield {**row, "grid": min(step["over graphed eager"], step["over eager, both without a graph"])}


def products(clock: Clock) -> Iterator[Row]:
    """Our products beside cuBLAS. Float32 is strict: torch's flag for TF32 is off."""
    size = 32 if clock.quick else 4096
    chain = _C.Chain([("identity", [])])
    for dtype in (HALF, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
        with Plan(gemm=ALWAYS, plain=ALWAYS):
            own = clock.recorded(lambda a=a, b=b: _C.mlp(a, [b], [None], chain))
        seconds = clock.compare({"own": own, "cublas": clock.recorded(lambda a=a, b=b: a @ b.T)})
        rates = {name: 2 * size**3 / value / 1e12 for name, value in seconds.items()}
        bar = "strict product" if dtype == torch.float32 else "product"
        yield {"dtype": str(dtype), "TFLOP/s": rates, bar: rates["own"] / rates["cublas"]}


def plan(clock: Clock) -> Iterator[Row]:
    """What the plan's thresholds should be: a step each way, by width."""
    paths = {
        "narrow": Plan(narrow=ALWAYS),
        "gemm": Plan(gemm=ALWAYS, plain=ALWAYS),
        "gemm, dw by cublas": Plan(gemm=ALWAYS),
        "cublas": Plan(),
    }
    kinds = {
        "bfloat16": (HALF, False),
        "TF32": (torch.float32, True),
        "float32": (torch.float32, False),
        "float64": (torch.float64, False),
    }
    for kind, (dtype, tf32) in kinds.items():
        for width, log2 in itertools.product((16, 32, 64, 128, 192, 256, 512), (10, 14, 18)):
            if clock.quick and width << log2 > 1 << 15:
                continue
            _, ours = networks([width] * 4, dtype, clock.device)
            x, dy = (torch.randn(1 << log2, width, device=clock.device).to(dtype) for _ in range(2))
            calls = {}
            torch.backends.cuda.matmul.allow_tf32 = tf32
            try:
                for name, chosen in paths.items():
                    if name != "narrow" or (width <= 128 and (tf32 or dtype == HALF)):
                        with chosen:
                            calls[name] = clock.recorded(step_of(ours, x, dy))
            finally:
                torch.backends.cuda.matmul.allow_tf32 = False
            seconds = clock.compare(calls, budget=0.1)
            best = min(seconds, key=seconds.__getitem__)
            yield {"kind": kind, "width": width, "batch": 1 << log2, "seconds": seconds, "best": best}


def bits(clock: Clock) -> Iterator[Row]:
    """How many different results 100 runs of forward and backward give, each way."""
    for name, chosen in {"narrow": Plan(narrow=ALWAYS), "gemm": Plan(gemm=ALWAYS, plain=ALWAYS)}.items():
        _, ours = networks([64, 128, 128, 10], HALF, clock.device)
        x = torch.randn(300 if clock.quick else 40000, 64, device=clock.device, dtype=HALF)
        seen = set()
        with chosen:
            for _ in range(3 if clock.quick else 100):
                y = ours(x)
                gradients = torch.autograd.grad(y, list(ours.parameters()), torch.ones_like(y))
                seen.add(tuple(t.detach().float().cpu().numpy().tobytes() for t in (y, *gradients)))
        yield {"path": name, "bits": len(seen)}


def compiled(clock: Clock) -> Iterator[Row]:
    """Against torch.compile, which takes its time to tune."""
    for width, log2 in ((64, 20), (128, 20), (64, 10), (256, 17), (1024, 14)):
        small = clock.quick
        yield passes(clock, [16 if small else width] * 6, 1 << (4 if small else log2), compiled=clock.on_gpu)


def relu(clock: Clock) -> Iterator[Row]:
    """Bias and relu in the library's product, which we do not use: what it would save, and whether it keeps a NaN."""
    shapes = ((1 << 14, 1024, 1024), (1 << 17, 256, 256), (1024, 512, 512), (1, 512, 512), (7, 33, 65))
    for dtype, (batch, k, n) in itertools.product((HALF, torch.float16, torch.float32), shapes):
        x = torch.randn(4 if clock.quick else batch, k, device=clock.device).to(dtype)
        w, b = (torch.randn(size, device=clock.device).to(dtype) for size in ((n, k), (n,)))
        calls: dict[str, Call] = {
            "one": lambda x=x, w=w, b=b: torch._addmm_activation(b, x, w.t(), use_gelu=False),
            "two": lambda x=x, w=w, b=b: torch.relu_(torch.addmm(b, x, w.t())),
        }
        seconds = clock.compare({name: clock.recorded(call) for name, call in calls.items()}, budget=0.1)
        x[0, 0] = torch.nan
        one, two = (call().isnan() for call in calls.values())
        keeps = torch.equal(one, two)
        yield {"dtype": str(dtype), "shape": [batch, k, n], "seconds": seconds, "keeps a NaN": keeps}


# In the order of what a reader wants first.
TABLES = (bits, narrow, products, elementwise, wide, grid, plan, relu, compiled)


def facts(device: torch.device) -> Row:
    """The machine, as found."""
    found: Row = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "build": _C.build(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(device.index or 0)]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
            found["nvidia-smi"] = dict(zip(fields.split(","), said.split(", "), strict=True))
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            found["nvidia-smi"] = str(error)
    return found


def figures(rows: list[Row]) -> dict[str, float]:
    """Of each bar the worst that was measured."""
    measured = {name: [row[name] for row in rows if name in row] for name in BARS}
    return {name: BARS[name].worst(values) for name, values in measured.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no figures")
    parser.add_argument("--only", nargs="+", choices=[table.__name__ for table in TABLES], help="some of the tables")
    parser.add_argument("--minutes", type=float, default=14, help="no case begins when they are over")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch sees no GPU; --device cpu --quick tries the program out without")
    if not _C.build()["cuda"]:
        sys.exit(f"bench/gpu.py: pyperc is built without CUDA: {_C.build()['cuda_reason']}")
    torch.manual_seed(0)
    clock = Clock(arguments.device, arguments.quick)
    stop = time.perf_counter() + 60 * arguments.minutes
    report: Row = {"before": facts(clock.device), "rows": []}
    failures = 0

    def add(row: Row) -> None:
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    for table in TABLES:
        if arguments.only and table.__name__ not in arguments.only:
            continue
        try:
            for row in table(clock):
                add({"table": table.__name__, **row})
                gc.collect()
                if clock.on_gpu:
                    torch.cuda.empty_cache()
                if time.perf_counter() > stop:
                    break
        except Exception as error:  # the other tables are still worth having
            traceback.print_exc()
            failures += 1
            add({"table": table.__name__, "error": f"{type(error).__name__}: {error}"})
    report["after"] = facts(clock.device)
    report["figures"] = figures(report["rows"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    print(f"\n{report['before'].get('gpu', 'no GPU: the figures mean nothing')}, torch {torch.__version__}")
    print(f"{'':72}{'measured':>10}{'must':>8}{'hoped':>8}")
    for name, bar in BARS.items():
        value = report["figures"].get(name)
        said = "-" if value is None else f"{value:.3g}"
        verdict = "" if value is None or bar.met(value) else "  missed"
        print(f"{bar.what:72}{said:>10}{bar.must:>8.3g}{bar.hoped:>8.3g}{verdict}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
