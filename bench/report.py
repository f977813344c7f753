"""Rewrites the README's tables between their markers from what was measured, with the machine and the date of then.

python bench/report.py bench/results/cpu.json

reads what `python -m pyperc bench --json` or `pytest --benchmark-json` saved. `--plot DIR` draws the figures again.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyperc.bench import machine
from pyperc.bench.command import SCHEMA, tables

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OPEN = ("mlp", "linear", "gemm", "jacobian")
FOLDED = {
    "16 bits, one thread, AVX2, elementary functions": ("halves", "narrow", "elementwise", "numpy"),
    "Backward over forward": ("backward",),
    "Any shape, and how the cost grows": ("grid", "growth"),
    "Memory": ("memory",),
}
FIGURES = ("roofline", "ratio", "growth", "backward")


def read(path: Path) -> dict[str, Any]:
    """The result of the command line, or the same made from pytest-benchmark's."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in saved:
        saved = from_pytest(saved["benchmarks"])
    if saved.get("schema") != SCHEMA:
        sys.exit(f"{path} must be what `python -m pyperc bench --json` writes, schema {SCHEMA}, or pytest-benchmark")
    if not saved["records"]:
        sys.exit(f"{path} holds no measurement")
    return saved


def from_pytest(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Each contender's entry carries the whole record of its case."""
    infos = [entry["extra_info"] for entry in entries if "record" in entry["extra_info"]]
    records = {(r["table"], r["case"], r["work"]): r for r in (info["record"] for info in infos)}
    each = list(records.values())
    last = infos[-1] if infos else {"machine": {}, "date": ""}
    return {
        "schema": SCHEMA,
        "date": last["date"],
        "mode": "pytest",
        "machine": last["machine"],
        "records": each,
        "skipped": {},
        "noise": machine.noise(each),
    }


def section(result: dict[str, Any], figures: Sequence[str] = ()) -> str:
    """What stands between the markers: where, how, the tables, and links to the figures."""
    where = machine.text(result).replace("\n", ".\n") + "."
    how = (
        "Ratios are the time of the other over that of pyperc, float32, medians of interleaved rounds: above 1 pyperc "
        'is faster, and where it is not, the table says "slower". The peak is that of fused multiply-adds, measured '
        "between the blocks. Backward over forward is a median over the same calls."
    )
    left_out = [f"Left out: {what}: {why}." for what, why in result["skipped"].items()]
    parts = [where, how, *left_out, *(table.markdown() for table in tables(result, *OPEN))]
    for title, names in FOLDED.items():
        folded = [table.markdown() for table in tables(result, *names)]
        if folded:
            parts += [f"<details><summary>{title}</summary>", *folded, "</details>"]
    if figures:
        parts.append("Figures: " + ", ".join(f"[{Path(figure).stem}]({figure})" for figure in figures) + ".")
    return "\n\n".join(wrapped(part) for part in parts)


def wrapped(paragraph: str) -> str:
    """Running text in lines of 120; tables and tags as they are."""
    if paragraph[:1] in "|<*":
        return paragraph
    return "\n".join(line for text in paragraph.splitlines() for line in textwrap.wrap(text, 120))


def rewrite(readme: Path, text: str) -> None:
    """Replaces what stands between the markers."""
    page = readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        sys.exit(f"{readme} must hold {BEGIN} and {END} once each, in this order")
    before, rest = page.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what `python -m pyperc bench --json` or pytest --benchmark-json saved")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the figures into this folder")
    options = parser.parse_args(arguments)
    result = read(options.json)
    if options.plot:
        from pyperc.bench import plots

        options.plot.mkdir(parents=True, exist_ok=True)
        plots.draw(result, options.plot)
    folder, home = options.plot or options.json.parent, options.readme.resolve().parent
    drawn = [folder.resolve() / f"{name}.png" for name in FIGURES]
    figures = [path.relative_to(home).as_posix() for path in drawn if path.is_file() and path.is_relative_to(home)]
    rewrite(options.readme, section(result, figures))


if __name__ == "__main__":
    main()
