"""Reads what pytest-benchmark saved, rewrites the table of the README between its markers, and draws the ratios.

python bench/report.py build/benchmark.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# case -> work -> contender -> extra_info
Results = dict[str, dict[str, dict[str, dict[str, Any]]]]


def read(path: Path) -> tuple[Results, dict[str, Any]]:
    saved = json.loads(path.read_text())
    results: Results = {}
    for entry in saved["benchmarks"]:
        info = entry["extra_info"]
        results.setdefault(info["case"], {}).setdefault(info["work"], {})[info["contender"]] = info
    return results, saved


def ratio(work: dict[str, dict[str, Any]]) -> float:
    """eager's time over pyperc's: above 1 pyperc is faster."""
    return work["eager"]["median"] / work["pyperc"]["median"]


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def backward_over_forward(case: dict[str, dict[str, dict[str, Any]]], contender: str) -> float:
    forward, both = (case[work][contender]["median"] for work in ("forward", "forward+backward"))
    return (both - forward) / forward


def label(name: str, case: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The case, marked where something else took the processor while it was measured."""
    disturbed = any(info["disturbed"] for work in case.values() for info in work.values())
    return f"`{name}`{' (disturbed)' if disturbed else ''}"


def table(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def mlp_table(results: Results) -> str:
    header = [
        "batch x sizes",
        "forward + backward",
        "pyperc",
        "eager",
        "of peak",
        "forward",
        "backward / forward: pyperc",
        "eager",
    ]
    rows = []
    for name, case in results.items():
        if "forward+backward" not in case:
            continue
        both = case["forward+backward"]
        rows.append(
            [
                label(name, case),
                f"**{ratio(both):.2f}**",
                duration(both["pyperc"]["median"]),
                duration(both["eager"]["median"]),
                f"{both['pyperc']['share']:.0%}",
                f"{ratio(case['forward']):.2f}",
                f"{backward_over_forward(case, 'pyperc'):.1f}",
                f"{backward_over_forward(case, 'eager'):.1f}",
            ]
        )
    return table(header, rows) if rows else ""


def gemm_table(results: Results) -> str:
    works = ["forward", "dx", "dw"]
    header = ["one linear layer", *(f"{work} ({what})" for work in works for what in ("ratio", "of peak"))]
    rows = []
    for name, case in results.items():
        if "dx" not in case:
            continue
        cells = [[f"{ratio(case[w]):.2f}", f"{case[w]['pyperc']['share']:.0%}"] for w in works]
        rows.append([label(name, case), *(cell for pair in cells for cell in pair)])
    return table(header, rows) if rows else ""


def section(results: Results, saved: dict[str, Any]) -> str:
    machine, info = saved["machine_info"], next(iter(next(iter(next(iter(results.values())).values())).values()))
    cpu = machine.get("cpu", {})
    model = cpu.get("brand_raw") or machine.get("processor") or machine.get("machine")
    where = (
        f"{model}, {cpu.get('count', '?')} cores, {info['threads']} threads, {info['isa']}, torch {info['torch']}, "
        f"{saved['datetime'][:10]}."
    )
    what = (
        "Ratios are the time of eager `nn.Sequential` over that of pyperc, float32, medians of interleaved blocks: "
        "above 1 pyperc is faster. The peak is that of fused multiply-adds, measured between the blocks."
    )
    return "\n\n".join(part for part in (where, what, mlp_table(results), gemm_table(results)) if part)


def rewrite(readme: Path, text: str) -> None:
    """Replaces what stands between the markers."""
    page = readme.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        sys.exit(f"{readme} must hold {BEGIN} and {END} once each, in this order")
    before, rest = page.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def plot(results: Results, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    bars = [(f"{name}, {work}", ratio(both)) for name, case in results.items() for work, both in case.items()]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    axes.barh(range(len(bars)), [r - 1 for _, r in bars], left=1, color=["C0" if r >= 1 else "C3" for _, r in bars])
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("eager's time over pyperc's")
    for at, (_, r) in enumerate(bars):
        axes.annotate(f" {r:.2f} ", (r, at), va="center", ha="left" if r >= 1 else "right", fontsize=8)
    axes.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json saved")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plot", type=Path, help="where to draw the ratios, e.g. build/benchmark.png")
    arguments = parser.parse_args()
    results, saved = read(arguments.json)
    if not results:
        sys.exit(f"{arguments.json} holds no benchmark")
    rewrite(arguments.readme, section(results, saved))
    plot(results, arguments.plot or arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
