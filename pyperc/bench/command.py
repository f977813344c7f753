"""`python -m pyperc bench`: measures the tables one after the other, prints them, and saves what was measured."""

import argparse
import datetime
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pyperc.bench import machine
from pyperc.bench.cases import Compiler, Job, Record, Settings
from pyperc.bench.measure import Pace
from pyperc.bench.tables import backward, blas, elementwise, gemm, grid, growth, halves, linear, memory, mlp, narrow
from pyperc.bench.text import Table

TABLES: tuple[ModuleType, ...] = (gemm, blas, linear, mlp, halves, elementwise, narrow, backward, grid, growth, memory)

SECONDS = {"smoke": 1.0, "quick": 150.0, "full": 680.0}
"""What a run aims at; compiling and setting up are within."""
LEAST = 0.12
"""Seconds for a contender, however late it has become."""

SMOKE = Pace(0.002, warm_up=0.001, block=0.0005, probe=0.0005, fewest=2, patience=1.5)
SCHEMA = 1

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    for mode, text in (
        ("quick", "without torch.compile and the grid of shapes, 3 minutes (the default)"),
        ("full", "everything, 12 minutes"),
        ("smoke", argparse.SUPPRESS),
    ):
        size.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
    names = [_name(table) for table in TABLES]
    add("--only", nargs="+", choices=names, metavar="TABLE", help=f"just these: {', '.join(names)}")
    add("--json", type=Path, metavar="FILE", help="write every figure, for bench/report.py")
    add("--plot", type=Path, metavar="DIR", help="draw the figures as PNG into this folder")
    add("--tune", action="store_true", help="measure the thresholds of the plan instead")
    parser.set_defaults(run=command, mode="quick", error=parser.error)


def command(options: argparse.Namespace) -> int:
    """Runs it; the exit status."""
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        options.error(f"argument --json: must be a file in an existing folder, got '{options.json}'")
    if options.plot and options.plot.exists() and not options.plot.is_dir():
        options.error(f"argument --plot: must be a folder, got '{options.plot}'")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        options.error("argument --plot: needs matplotlib: pip install matplotlib, or the extra pyperc[bench]")
    progress = _progress if sys.stderr.isatty() else None
    if options.tune:
        from pyperc.bench import tune

        pace = SMOKE if options.mode == "smoke" else Pace(0.3, warm_up=0.1)
        tuned = tune.measure(pace, progress)
        if options.json:
            options.json.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")
        print(tune.tables(tuned))
        return 0
    settings = Settings(options.mode, growth=bool(options.plot))
    if settings.full:
        settings.compiler = Compiler()
    result = measure(settings, only=options.only, progress=progress, say=lambda text: print(text, flush=True))
    if options.json:
        options.json.write_text(_lines(result), encoding="utf-8")
        print(f"figures in {options.json}")
    if options.plot:
        from pyperc.bench import plots

        options.plot.mkdir(parents=True, exist_ok=True)
        for path in plots.draw(result, options.plot):
            print(f"drawn: {path}")
    return 0


def measure(
    settings: Settings, *, only: Sequence[str] | None = None, progress: Say | None = None, say: Say | None = None
) -> dict[str, Any]:
    """Measures and says each table as soon as it is there; the whole as plain values."""
    started = time.perf_counter()
    if say and settings.smoke:
        say("a try of the machinery: the budgets are too small for the figures to mean anything\n")
    pace = SMOKE if settings.smoke else Pace()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "mode": settings.mode,
        "machine": machine.machine(pace),
        "noise": {},
        "records": [],
        "skipped": {},
    }
    plan = [(table, table.jobs(settings)) for table in TABLES if only is None or _name(table) in only]
    clock = _Clock([job for _, jobs in plan for job in jobs], started + SECONDS[settings.mode])
    for table, jobs in plan:
        records: list[Record] = []
        for job in jobs:
            if progress:
                progress(f"{clock.left():4.0f} s left, {_name(table)}: {job.name}")
            records += job.run(clock.pace(job, pace))
        if progress:
            progress("")
        result["records"] += records
        for shown in table.tables(records):
            if say and (shown.rows or shown.notes):
                say(shown.text() + "\n")
    if settings.compiler and settings.compiler.reason:
        result["skipped"]["compile"] = settings.compiler.reason
    result["noise"] = machine.noise(result["records"])
    result["seconds"] = time.perf_counter() - started
    if say:
        for what, why in result["skipped"].items():
            say(f"left out: {what}: {why}\n")
        say(machine.text(result))
        say("ratios are medians over rounds of the other's time over pyperc's: above 1, pyperc is faster")
        say(f"measured in {result['seconds']:.0f} s")
    return result


def tables(result: dict[str, Any], *names: str) -> list[Table]:
    """The tables of a saved result, all of them or those of these names."""
    found = []
    for table in TABLES:
        records = [record for record in result["records"] if record["table"] == _name(table)]
        if records and (not names or _name(table) in names):
            found += [shown for shown in table.tables(records) if shown.rows or shown.notes]
    return found


class _Clock:
    """Shares the time that is left among the jobs that are left, by their weights."""

    def __init__(self, jobs: Sequence[Job], end: float) -> None:
        self.end = end
        self.weight = sum(job.weight for job in jobs)
        self.fixed = sum(_fixed(job) for job in jobs)

    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())

    def pace(self, job: Job, pace: Pace) -> Pace:
        """How long this job may take for each contender."""
        each = max(LEAST, (self.left() - self.fixed) / max(1.0, self.weight))
        self.weight -= job.weight
        self.fixed -= _fixed(job)
        if pace is SMOKE:
            return pace
        # A third goes to warming up, probes and the making of the case; 2 s tell no more than 1.
        return replace(pace, seconds=min(2.0, 0.65 * each), warm_up=min(pace.warm_up, 0.3 * each))


def _fixed(job: Job) -> float:
    """Seconds that a job takes whatever it is given."""
    if job.weight:
        return 0.0
    return grid.SECONDS if job.name.startswith("grid") else 20.0


def _lines(result: dict[str, Any]) -> str:
    """As JSON with a line for each record, five digits of each figure."""
    records = [json.dumps(_rounded(record)) for record in result["records"]]
    rest = json.dumps(_rounded({**result, "records": None}), indent=1)
    return rest.replace('"records": null', '"records": [\n' + ",\n".join(records) + "\n ]") + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _name(table: ModuleType) -> str:
    return str(table.NAME)


def _progress(text: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r\x1b[K{text[:width]}")
    sys.stderr.flush()
