"""What a measurement ran on: the processor, its peak and its bandwidth; and how much of it something else took."""

import os
import time
from collections.abc import Sequence
from typing import Any

import torch

import pyperc
from pyperc import _C
from pyperc.bench.cases import FAR, Record, middle
from pyperc.bench.measure import Pace

__all__ = ["facts", "machine", "noise", "text"]

# Three arrays: far beyond any cache, and within the second level of one core.
MEMORY_BYTES, CACHE_BYTES = 64 << 20, 128 << 10


def facts() -> dict[str, Any]:
    """What was measured, on what: figures of another are not to be mixed with these."""
    info = pyperc.info()
    names = ("pyperc", "python", "platform", "processor", "torch", "compiler", "isa", "threads")
    return {
        **{name: info[name] for name in names},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "blas": "MKL" if torch._C.has_mkl else "unknown",
    }


def machine(pace: Pace) -> dict[str, Any]:
    """The facts and the two roofs, as plain values."""
    probes = [_C.probe(pace.probe) for _ in range(max(1, round(pace.warm_up / pace.probe / 2)))]
    return {
        **facts(),
        "probe": max(probes),
        "probe_median": middle(probes),
        "memory_bandwidth": bandwidth(MEMORY_BYTES, pace),
        "cache_bandwidth": bandwidth(CACHE_BYTES, pace),
    }


def bandwidth(size: int, pace: Pace) -> float:
    """Best of c = a + b on arrays of that many bytes each, on torch's threads, GB/s."""
    a, b, c = (torch.rand(size // 4) for _ in range(3))
    best, end = 0.0, time.perf_counter() + pace.warm_up / 2
    repeats = max(1, (1 << 22) // size)
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.add(a, b, out=c)
        best = max(best, 3 * size * repeats / (time.perf_counter() - start) / 1e9)
    return best


def noise(records: Sequence[Record]) -> dict[str, Any]:
    """Blocks taken and dropped, the middle spread, the cases that kept disturbed blocks, how far apart threads were."""
    each = [c for record in records for c in record.get("contenders", {}).values()]
    dropped = sum(c["dropped"] for c in each)
    trips = [r["round_trip"] for r in records if r.get("round_trip")]
    return {
        "blocks": sum(c["blocks"] for c in each) + dropped,
        "dropped": dropped,
        "spread": middle([c["spread"] for c in each]),
        "disturbed": [f"{r['table']}: {r['case']}, {r['work']}" for r in records if r.get("disturbed")],
        "round_trips": sorted(trips),
    }


def text(result: dict[str, Any]) -> str:
    """The machine and the noise, a line each."""
    m, n = result["machine"], result["noise"]
    share = n["dropped"] / max(1, n["blocks"])
    disturbed = f"; {len(n['disturbed'])} cases disturbed throughout" if n["disturbed"] else ""
    return "\n".join(
        [
            f"{m['processor']}, {m['cores']} cores, {m['isa']}, {m['threads']} threads, float32; pyperc {m['pyperc']}, "
            f"torch {m['torch']} ({m['blas']}), {result['date'][:10]}",
            f"FMA peak {m['probe']:.0f} GF/s (median {m['probe_median']:.0f}), "
            f"memory {m['memory_bandwidth']:.0f} GB/s, "
            f"second-level cache {m['cache_bandwidth']:.0f} GB/s",
            f"noise: {n['dropped']} of {n['blocks']} blocks dropped ({share:.1%}) beside a low probe, middle spread "
            f"(quartiles) {n['spread']:.1%}{disturbed}",
            *distance(n.get("round_trips", [])),
        ]
    )


def distance(trips: Sequence[float]) -> list[str]:
    """A line on how far apart the threads were; none with one thread."""
    if not trips:
        return []
    near, far = ([trip for trip in trips if (trip > FAR) is side] for side in (False, True))
    said = [f"{middle(each):.0f} ns beside {len(each)} cases" for each in (near, far) if each]
    line = f"a cache line from one thread to another and back: {', '.join(said)}"
    return [line + (", marked far: those cores have no cache in common" if far else "")]
