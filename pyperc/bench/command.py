"""`python -m pyperc bench`: measures the tables one after the other, prints them, and saves what was measured.

A run can be made in pieces: every case is saved when it is measured, and `--resume` goes on with the cases that the
file does not hold.
"""

import argparse
import datetime
import importlib.util
import json
import math
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
from pyperc.bench.tables import (
    backward,
    blas,
    elementwise,
    gemm,
    grid,
    growth,
    halves,
    jacobian,
    linear,
    memory,
    mlp,
    narrow,
    step,
)
from pyperc.bench.text import Table

TABLES: tuple[ModuleType, ...] = (
    gemm,
    blas,
    linear,
    mlp,
    step,
    jacobian,
    halves,
    elementwise,
    narrow,
    backward,
    growth,
    grid,
    memory,
)

SECONDS = {"smoke": 1.0, "quick": 150.0, "full": 680.0}
"""What a run aims at; compiling and setting up are within."""
LEAST, MOST = 0.12, 3.0
"""Seconds for a contender: however late it has become, and from where more tells no more."""
MEASURED = 0.65
"""Of these; the rest goes to warming up, probes and the making of the case."""

LEFT = 3
"""The exit status while cases are left to measure."""

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
    add("--resume", action="store_true", help="measure the cases that FILE does not hold, and add them to it")
    add(
        "--seconds",
        type=_positive,
        default=math.inf,
        metavar="N",
        help=f"begin no case that would end later; the exit status is {LEFT} while cases are left, for --resume",
    )
    add("--against", type=Path, metavar="FILE", help="compare with what --json saved of an earlier run")
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
        raise ImportError("argument --plot: needs matplotlib: pip install matplotlib, or the extra pyperc[bench]")
    if options.resume and not options.json:
        options.error("argument --resume: needs the file, --json FILE")
    progress = _progress if sys.stderr.isatty() else None
    if options.tune:
        from pyperc.bench import tune

        pace = SMOKE if options.mode == "smoke" else tune.PACE
        tuned = tune.measure(pace, progress)
        if options.json:
            options.json.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")
        print(tune.tables(tuned))
        return 0
    settings = Settings(options.mode, growth=bool(options.plot))
    if settings.full:
        settings.compiler = Compiler()
    try:
        saved = load(options.against) if options.against else None
        earlier = load(options.json) if options.resume and options.json.exists() else None
        run = Run(settings, only=options.only, earlier=earlier, file=options.json, seconds=options.seconds)
    except ValueError as error:
        options.error(str(error))
    result = run.measure(progress=progress, say=lambda text: print(text, flush=True))
    if options.json:
        print(f"figures in {options.json}")
    if saved:
        from pyperc.bench import against

        print("\n" + against.table(result, saved).text())
    if options.plot:
        from pyperc.bench import plots

        options.plot.mkdir(parents=True, exist_ok=True)
        for path in plots.draw(result, options.plot):
            print(f"drawn: {path}")
    return LEFT if run.left() else 0


def load(path: Path) -> dict[str, Any]:
    """What `--json` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be what `python -m pyperc bench --json` writes, schema {SCHEMA}")
    return found


class Run:
    """The cases of the tables, those of an earlier result left out; measured and added to it one by one."""

    def __init__(
        self,
        settings: Settings,
        *,
        only: Sequence[str] | None = None,
        earlier: dict[str, Any] | None = None,
        file: Path | None = None,
        seconds: float = math.inf,
    ) -> None:
        """`seconds`: of this piece. Raises ValueError where `earlier` is of another machine or mode."""
        self.started, self.seconds, self.file = time.perf_counter(), seconds, file
        self.settings, self.pace = settings, SMOKE if settings.smoke else Pace()
        here = {"mode": settings.mode, **machine.facts()}
        if earlier:
            was = {"mode": earlier["mode"], **earlier["machine"]}
            if "measured" not in earlier:
                raise ValueError("argument --resume: the file must hold a run of `python -m pyperc bench`")
            for name, value in here.items():
                if was.get(name) != value:
                    raise ValueError(f"argument --resume: must be of the same {name}, {was.get(name)}, here {value}")
        self.result = earlier or {
            "schema": SCHEMA,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "mode": settings.mode,
            "machine": machine.machine(self.pace),
            "noise": {},
            "skipped": {},
            "seconds": 0.0,
            "measured": [],
            "records": [],
        }
        self.before = self.result["seconds"]
        self.jobs = {
            f"{_name(table)}: {job.name}": (table, job)
            for table in TABLES
            if only is None or _name(table) in only
            for job in table.jobs(settings)
        }

    def left(self) -> dict[str, tuple[ModuleType, Job]]:
        """What is not yet measured."""
        return {key: each for key, each in self.jobs.items() if key not in self.result["measured"]}

    def measure(self, *, progress: Say | None = None, say: Say | None = None) -> dict[str, Any]:
        """Measures what is left, as far as the time goes, and says each table when it is whole; all as plain values."""
        if say and self.settings.smoke:
            say("a try of the machinery: the budgets are too small for the figures to mean anything\n")
        left = self.left()
        clock = _Clock([job for _, job in left.values()], self.started + SECONDS[self.settings.mode] - self.before)
        for i, (key, (table, job)) in enumerate(left.items()):
            if i and self.spent() + clock.share(job) > self.seconds:
                break
            if progress:
                progress(f"{clock.left():4.0f} s left, {key}")
            self.add(key, job.run(clock.pace(job, self.pace)))
            if progress:
                progress("")
            if say and not any(other is table for other, _ in self.left().values()):
                for shown in tables(self.result, _name(table)):
                    say(shown.text() + "\n")
        if say:
            self.close(say)
        return self.result

    def spent(self) -> float:
        """Seconds of this piece."""
        return time.perf_counter() - self.started

    def add(self, key: str, records: list[Record]) -> None:
        """Puts what was measured into the result, and the result into the file."""
        result = self.result
        result["records"] += records
        result["measured"].append(key)
        result["noise"] = machine.noise(result["records"])
        result["seconds"] = self.before + self.spent()
        if self.settings.compiler and self.settings.compiler.reason:
            result["skipped"]["compile"] = self.settings.compiler.reason
        if self.file:
            whole = self.file.with_name(self.file.name + ".part")
            whole.write_text(_lines(result), encoding="utf-8")
            whole.replace(self.file)

    def close(self, say: Say) -> None:
        """Says what else there is to say."""
        result, left = self.result, len(self.left())
        for what, why in result["skipped"].items():
            say(f"left out: {what}: {why}\n")
        if result["noise"]:
            say(machine.text(result))
        say("ratios are medians over rounds of the other's time over pyperc's: above 1, pyperc is faster")
        say(f"measured in {result['seconds']:.0f} s" + (f"; {left} of {len(self.jobs)} cases are left" if left else ""))


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
        self.fixed = sum(job.seconds for job in jobs)

    def left(self) -> float:
        return max(0.0, self.end - time.perf_counter())

    def each(self) -> float:
        """Seconds for one contender, with warming up, probes and the making of the case."""
        return min(MOST, max(LEAST, (self.left() - self.fixed) / max(1.0, self.weight)))

    def share(self, job: Job) -> float:
        """Seconds that this job will take, about."""
        return job.seconds + job.weight * self.each()

    def pace(self, job: Job, pace: Pace) -> Pace:
        """How long this job may take for each contender."""
        each = self.each()
        self.weight -= job.weight
        self.fixed -= job.seconds
        if pace is SMOKE:
            return pace
        return replace(pace, seconds=MEASURED * each, warm_up=min(pace.warm_up, 0.3 * each))


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


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _name(table: ModuleType) -> str:
    return str(table.NAME)


def _progress(text: str) -> None:
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r\x1b[K{text[:width]}")
    sys.stderr.flush()
