"""The command `python -m pyperc experiment`."""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pyperc
from pyperc import _tables
from pyperc.experiments import EXPERIMENTS, NAMES, find
from pyperc.experiments.frame import Experiment, Result, Setup
from pyperc.experiments.index import Shown, page


def add_to(commands: Any) -> None:
    """Adds the command to an argument parser's subcommands."""
    parser = commands.add_parser("experiment", help="run the lectures' demonstrations again: table and figure")
    add = parser.add_argument
    add("name", nargs="?", choices=[*NAMES, "all"], metavar="NAME", help=f"{', '.join(NAMES)}, or all")
    add("--list", action="store_true", help="the experiments, and what each shows")
    add("--data", default="digits", metavar="NAME", help="digits, or mnist:DIR with the four IDX files (%(default)s)")
    add("--plot", type=_folder, metavar="DIR", help="draw NAME.png into this folder; with all, index.html beside them")
    add("--json", type=_file, metavar="FILE", help="write the numbers for a program")
    add("--quick", action="store_true", help="a shorter form that shows the same")
    parser.set_defaults(run=_run, error=parser.error)


def _folder(word: str) -> Path:
    path = Path(word).expanduser()
    if not (path.is_dir() or (not path.exists() and path.parent.is_dir())):
        raise argparse.ArgumentTypeError(f"must be a folder, or a new one in an existing folder, got {word!r}")
    return path


def _file(word: str) -> Path:
    path = Path(word).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder, got {word!r}")
    return path


def _run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 1 where a claim does not hold or the data do not suit. ImportError is `main`'s."""
    setup = Setup(options.data, options.quick)
    try:
        if options.list:
            print(listing())
            return 0
        if options.name is None:
            raise ValueError(f"the following arguments are required: NAME, one of {', '.join([*NAMES, 'all'])}")
        chosen = EXPERIMENTS if options.name == "all" else (find(options.name),)
        runs = [experiment.run for experiment in chosen]
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("argument --plot: needs matplotlib: pip install matplotlib, or the extra pyperc[demo]")
        if any(experiment.uses_data for experiment in chosen):
            _ = setup.data
        elif options.data != "digits":
            raise ValueError(f"argument --data: {options.name} makes points of its own and looks at no images")
    except (ValueError, OSError) as error:
        options.error(str(error))

    if options.plot:
        options.plot.mkdir(exist_ok=True)
    shown = []
    for experiment, run in zip(chosen, runs, strict=True):
        print(heading(experiment, setup), end="\n\n", flush=True)
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            result = run(setup)
        except (ValueError, FloatingPointError) as error:
            print(f"python -m pyperc experiment: {experiment.name}: {error}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - start
        print(result.text(), end="\n\n", flush=True)
        if options.plot:
            result.save(options.plot / f"{experiment.name}.png")
            print(f"figure in {options.plot / experiment.name}.png\n", flush=True)
        shown.append(Shown(experiment, result, seconds))

    if options.plot and options.name == "all":
        (options.plot / "index.html").write_text(page(shown, setup), encoding="utf-8")
        print(f"all figures in {options.plot / 'index.html'}")
    if options.json:
        options.json.write_text(json.dumps(_numbers(shown, setup), indent=2) + "\n", encoding="utf-8")
        print(f"numbers in {options.json}")
    return 0 if all(claim.holds for one in shown for claim in one.result.claims) else 1


def listing() -> str:
    """The experiments with their lectures and titles, as `--list` prints them."""
    rows = [[one.name, one.lecture, "images" if one.uses_data else "points", one.title] for one in EXPERIMENTS]
    return _tables.align(["name", "lecture", "data", "shows"], rows)


def heading(experiment: Experiment, setup: Setup) -> str:
    """The line over an experiment's tables."""
    data = f" ({setup.label})" if experiment.uses_data else ""
    return f"{experiment.name}, lecture {experiment.lecture}: {experiment.title}{data}"


def _numbers(shown: list[Shown], setup: Setup) -> dict[str, Any]:
    def one(result: Result, seconds: float) -> dict[str, Any]:
        return {**result.numbers, "claims": [claim._asdict() for claim in result.claims], "seconds": seconds}

    return {
        "pyperc": pyperc.__version__,
        "torch": torch.__version__,
        "data": setup.data_name,
        "quick": setup.quick,
        "experiments": {item.experiment.name: one(item.result, item.seconds) for item in shown},
    }
