"""Draws what was measured: a roofline, the ratio to eager, how the cost grows, backward over forward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyperc.bench.cases import Record

__all__ = ["draw"]

# Told apart by grey level, line and mark, so that a print without colour is read as well.
OURS: dict[str, Any] = {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 1.5, "markersize": 5}
PLAIN: dict[str, Any] = {
    "color": "tab:orange",
    "marker": "s",
    "linestyle": "--",
    "linewidth": 1.5,
    "markersize": 5,
    "markerfacecolor": "none",
}
COMPILED: dict[str, Any] = {
    "color": "tab:blue",
    "marker": "^",
    "linestyle": ":",
    "linewidth": 1.5,
    "markersize": 5,
    "markerfacecolor": "none",
}
STYLES = {"pyperc": OURS, "eager": PLAIN, "compile": COMPILED}
LABELS = {"pyperc": "pyperc", "eager": "eager torch", "compile": "torch.compile"}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the figures for which something was measured."""
    by_table: dict[str, list[Record]] = {}
    for record in result["records"]:
        by_table.setdefault(record["table"], []).append(record)
    machine = result["machine"]
    where = f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, {result['date'][:10]}"
    figures = {
        "roofline.png": roofline(by_table, machine),
        "ratio.png": ratio(by_table),
        "growth.png": growth(by_table.get("growth", []), machine),
        "backward.png": backward(by_table.get("backward", [])),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.supxlabel(where, fontsize=8, color="0.35")
            figure.savefig(folder / name, dpi=150)
            written.append(folder / name)
    return written


def roofline(by_table: dict[str, list[Record]], machine: dict[str, Any]) -> Figure | None:
    """GF/s against operations for each byte, under the measured peak and bandwidths."""
    points = [r for name in ("gemm", "linear", "mlp", "growth") for r in by_table.get(name, [])]
    if not points:
        return None
    intensity = [record["flops"] / record["bytes"] for record in points]
    left, right = min(intensity) / 2, max(max(intensity) * 2, 4 * machine["probe"] / machine["memory_bandwidth"])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    peak = machine["probe"]
    for name, line in (("memory", "-"), ("cache", "--")):
        slope = machine[f"{name}_bandwidth"]
        ridge = min(max(peak / slope, left), right)
        label = f"{'memory' if name == 'memory' else 'second-level cache'}, {slope:.0f} GB/s"
        ends = [left, ridge]
        axes.plot(ends, [end * slope for end in ends], color="0.5", linestyle=line, linewidth=1.2, label=label)
    axes.axhline(peak, color="0.3", linewidth=1.6, label=f"FMA peak, {peak:.0f} GF/s")
    for name in ("eager", "pyperc"):
        rates = [record["flops"] / record["contenders"][name]["seconds"] / 1e9 for record in points]
        style = {**STYLES[name], "linestyle": "", "alpha": 0.8}
        axes.plot(intensity, rates, label=LABELS[name], **style)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, 2 * peak))
    _plain(axes)
    axes.set(
        xlabel="floating-point operations for each byte that must move",
        ylabel="GF/s",
        title="Roofline: what the operations and the bytes allow, and what was reached",
    )
    _finish(axes)
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def ratio(by_table: dict[str, list[Record]]) -> Figure | None:
    """eager's time over pyperc's against batch and width; the points of the grid behind."""
    grown = by_table.get("growth", [])
    points = [point for record in by_table.get("grid", []) for point in record["points"]]
    if not grown:
        return None
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    shapes = {"batch": "batch x [256]*4, forward and backward", "width": "64 x [width]*3, forward and backward"}
    for axes, (axis, shape) in zip(both, shapes.items(), strict=True):
        if points:
            # Moved a little, by a golden ratio, so that points of one place can be told apart.
            at = [p[axis] * 2 ** (0.5 * ((i * 0.618) % 1 - 0.5)) for i, p in enumerate(points)]
            ratios = [p["ratio"] for p in points]
            axes.plot(at, ratios, ".", color="0.75", markersize=2.5, label="grid of every kind", zorder=1)
        along = [record for record in grown if record["axis"] == axis]
        axes.plot(
            [r["at"] for r in along],
            [r["ratios"]["eager"]["median"] for r in along],
            label="growing network",
            zorder=3,
            **OURS,
        )
        axes.fill_between(
            [r["at"] for r in along],
            [r["ratios"]["eager"]["lower"] for r in along],
            [r["ratios"]["eager"]["upper"] for r in along],
            color="0.6",
            alpha=0.5,
            zorder=2,
            linewidth=0,
        )
        axes.axhline(1, color="tab:red", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        _plain(axes)
        axes.set(xlabel=axis)
        axes.set_title(shape, fontsize=10)
        _finish(axes)
    both[0].legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
    both[0].set_ylabel("eager's time over pyperc's")
    figure.suptitle("Ratio to eager: above 1, pyperc is faster")
    return figure


def growth(records: Sequence[Record], machine: dict[str, Any]) -> Figure | None:
    """Time against batch, width and depth; the time of the arithmetic alone as a line."""
    if not records:
        return None
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    shapes = {"batch": "batch x [256]*4", "width": "64 x [width]*3", "depth": "32 x [64]*(depth + 1)"}
    three = figure.subplots(1, 3, sharey=True)
    for axes, (axis, shape) in zip(three, shapes.items(), strict=True):
        along = [record for record in records if record["axis"] == axis]
        at = [record["at"] for record in along]
        for name in ("eager", "pyperc"):
            axes.plot(at, [r["contenders"][name]["seconds"] * 1e3 for r in along], label=LABELS[name], **STYLES[name])
        floor = [record["flops"] / machine["probe"] / 1e6 for record in along]
        axes.plot(at, floor, color="0.5", linestyle="-.", linewidth=1.2, label="arithmetic at the FMA peak")
        axes.set(xscale="log", yscale="log", xlabel={"depth": "layers"}.get(axis, axis), title=shape)
        _plain(axes)
        _finish(axes)
    three[0].set_ylabel("forward and backward, ms")
    three[0].legend(frameon=False)
    figure.suptitle("How the cost grows")
    return figure


def backward(records: Sequence[Record]) -> Figure | None:
    """Backward over forward at each depth, with quartiles, and the count; above with dx of the input, below without."""
    families: dict[tuple[int, int], list[Record]] = {}
    for record in records:
        families.setdefault((record["batch"], record["sizes"][0]), []).append(record)
    families = {key: each for key, each in families.items() if len(each) > 2} or families
    if not families:
        return None
    figure = Figure(figsize=(5 * len(families), 6.5), layout="constrained")
    grid = figure.subplots(2, len(families), squeeze=False, sharex="col", sharey=True)
    for column, ((batch, width), each) in enumerate(families.items()):
        names = [name for name in STYLES if any(name in record["parts"] for record in each)]
        for row, work in enumerate(("dx", "no dx")):
            axes = grid[row][column]
            those = [record for record in each if record["work"] == work]
            depths = [len(record["sizes"]) - 1 for record in those]
            counted = [record["formula"]["backward"] / record["formula"]["forward"] for record in those]
            half = 0.4
            axes.hlines(
                counted,
                [depth - half for depth in depths],
                [depth + half for depth in depths],
                color="tab:red",
                linewidth=2,
                alpha=0.6,
                label="operations, counted",
                zorder=1,
            )
            for i, name in enumerate(names):
                found = [
                    (d, r["parts"][name]["ratio"]) for d, r in zip(depths, those, strict=True) if name in r["parts"]
                ]
                axes.errorbar(
                    [depth + (i - (len(names) - 1) / 2) * half / 2 for depth, _ in found],
                    [ratio["median"] for _, ratio in found],
                    [[ratio["median"] - ratio["lower"] for _, ratio in found], _above(found)],
                    label=LABELS[name],
                    zorder=2,
                    **{**STYLES[name], "linestyle": "", "elinewidth": 1},
                )
            axes.set_xticks(depths)
            axes.set_title(f"{batch} x [{width}], {'with' if work == 'dx' else 'without'} dx of the input", fontsize=10)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
        grid[1][column].set_xlabel("layers")
    for row in (0, 1):
        grid[row][0].set_ylabel("backward / forward, time")
    # The axes share it, and the first limit that is set would be that of what is drawn until then.
    grid[0][0].set_ylim(bottom=0)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _above(found: Sequence[tuple[int, dict[str, float]]]) -> list[float]:
    return [ratio["upper"] - ratio["median"] for _, ratio in found]


def _plain(axes: Axes) -> None:
    """Numbers in place of powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3, which="major")
    axes.set_axisbelow(True)
