"""The command line: `python -m pyperc info`, `train`, `bench` and `experiment`."""

import argparse
import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

import pyperc
from pyperc import _C, _tables, datasets
from pyperc.bench import command as bench
from pyperc.bench.measure import quartiles
from pyperc.compare import Timing, agreement, time_batch
from pyperc.experiments import command as experiment
from pyperc.info import info, text
from pyperc.train import Epoch, Trainer

Say: TypeAlias = Callable[..., None]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LABELS = {"pyperc": "pyperc", "torch": "plain torch"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0; 1 where training failed or a claim does not hold; 2 for bad arguments; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyperc", description="Multi-layer perceptrons for PyTorch.")
    parser.add_argument("--version", action="version", version=f"pyperc {pyperc.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    about = commands.add_parser("info", help="versions, instruction sets, threads, CUDA")
    about.add_argument("--json", action="store_true", help="for a program")
    about.set_defaults(run=_info)

    learn = commands.add_parser("train", help="train a classifier and print its curve")
    add, names = learn.add_argument, pyperc.activations()
    add("--data", default="digits", metavar="NAME", help="digits, or mnist:DIR with the four IDX files (%(default)s)")
    add("--sizes", type=_positive, nargs="+", metavar="N", help="widths, input to output (two hidden layers of 256)")
    add("--activation", default="relu", choices=names, metavar="NAME", help=f"{', '.join(names)} (%(default)s)")
    add("--epochs", type=_positive, default=20, metavar="N", help="passes over the data (%(default)s)")
    add("--batch-size", type=_positive, default=64, metavar="N", help="samples in a step (%(default)s)")
    add("--lr", type=_step, default=0.3, metavar="X", help="the step (%(default)s)")
    add("--seed", type=_seed, default=0, metavar="N", help="of the weights and the shuffling (%(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="of weights and samples (%(default)s)")
    add("--threads", type=_positive, metavar="N", help="that torch may use (its own choice)")
    add("--compare", choices=["torch"], help="train the same network with plain torch beside it, and time both")
    add("--save", type=_writable, metavar="FILE", help="write the trained weights, for torch.load")
    add("--plot", type=_writable, metavar="FILE", help="draw the curves, as a PNG for example")
    add("--json", action="store_true", help="print the figures for a program; all else goes to stderr")
    add("--no-progress", action="store_true", help="show no progress bar")
    learn.set_defaults(run=_train, error=learn.error)

    bench.add_arguments(commands.add_parser("bench", help="measure against plain torch and against the processor"))
    experiment.add_to(commands)
    return parser


def _positive(word: str) -> int:
    if not (word.isascii() and word.isdigit()) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {word!r}")
    return int(word)


def _seed(word: str) -> int:
    if not (word.isascii() and word.isdigit()) or int(word) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**63), got {word!r}")
    return int(word)


def _step(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite positive number, got {word!r}")
    return value


def _writable(word: str) -> Path:
    path = Path(word).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder, got {word!r}")
    return path


def _info(options: argparse.Namespace) -> int:
    facts = info()
    print(json.dumps(facts, indent=2) if options.json else text(facts))
    return 0


def _train(options: argparse.Namespace) -> int:
    say = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    dtype = DTYPES[options.dtype]
    try:
        if options.plot:
            _check_plot(options.plot)
        data = datasets.load(options.data)
        sizes = _sizes(options.sizes, data)
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        model = pyperc.MLP(sizes, activation=options.activation, dtype=dtype)
        isa, threads = _C.isa(), torch.get_num_threads()
        mean, std = data.moments
        data = data.standardised().to(dtype)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        options.error(str(error))

    networks: dict[str, nn.Module] = {"pyperc": model}
    if options.compare:
        networks["torch"] = pyperc.unfuse(copy.deepcopy(model))
    untrained = copy.deepcopy(networks)

    shape = "-".join(map(str, sizes))
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"pyperc {pyperc.__version__}, torch {torch.__version__}, {isa}, {_plural(threads, 'thread')}, {options.dtype}")
    say(f"{options.data}: {len(data.y_train):,} samples to train, {len(data.y_test):,} to test, standardised")
    say(f"network {shape}, {options.activation}, {count:,} parameters")
    epochs = _plural(options.epochs, "epoch")
    say(f"{epochs} in batches of {options.batch_size}, lr {options.lr:g}, seed {options.seed}\n")
    try:
        curves = _run(networks, data, options, say)
    except FloatingPointError as error:
        print(f"python -m pyperc train: {error}", file=sys.stderr)
        return 1

    accuracy = {name: 1 - curve[-1].test_error for name, curve in curves.items()}
    say("\n" + "\n".join(f"test accuracy of {LABELS[name]}: {value:.2%}" for name, value in accuracy.items()))
    named = ("data", "activation", "dtype", "epochs", "batch_size", "lr", "seed")
    figures: dict[str, Any] = {
        "pyperc": pyperc.__version__,
        "torch": torch.__version__,
        "isa": isa,
        "threads": threads,
        "sizes": sizes,
        **{name: getattr(options, name) for name in named},
        "test_accuracy": accuracy,
        "curve": {name: [point._asdict() for point in curve] for name, curve in curves.items()},
    }
    if options.compare:
        figures |= _compare(curves, networks, untrained, data, options.batch_size, say)
    if options.save:
        saved = {"sizes": sizes, "activation": options.activation, "mean": mean, "std": std}
        torch.save({**saved, "state_dict": model.state_dict()}, options.save)
        say(f"weights in {options.save}")
    if options.plot:
        from pyperc import _plot

        title = f"{options.data.partition(':')[0]}, {shape}, {options.activation}, lr {options.lr:g}"
        _plot.draw({LABELS[name]: curve for name, curve in curves.items()}, title, options.plot)
        say(f"curves in {options.plot}")
    if options.json:
        print(json.dumps(figures, indent=2))
    return 0


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _sizes(sizes: list[int] | None, data: datasets.Dataset) -> list[int]:
    if sizes is None:
        return [data.features, 256, 256, data.classes]
    if len(sizes) < 2 or sizes[0] != data.features or sizes[-1] != data.classes:
        raise ValueError(
            f"argument --sizes: must begin with the data's {data.features} features and end with its {data.classes} "
            f"classes, got {' '.join(map(str, sizes))}"
        )
    return sizes


def _check_plot(path: Path) -> None:
    """Finds out before the training, not after, that the plot cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("argument --plot: needs matplotlib: pip install matplotlib, or the extra pyperc[demo]")
    from pyperc import _plot

    known = _plot.formats()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"argument --plot: the file must end in one of {', '.join(known)}, got {path.name!r}")


def _run(
    networks: dict[str, nn.Module], data: datasets.Dataset, options: argparse.Namespace, say: Say
) -> dict[str, list[Epoch]]:
    """Trains every network epoch by epoch, in turns, and prints a row for each epoch."""
    settings = {"batch_size": options.batch_size, "lr": options.lr, "seed": options.seed}
    trainers = {name: Trainer(network, data, **settings) for name, network in networks.items()}
    curves: dict[str, list[Epoch]] = {name: [] for name in trainers}

    # A step of a copy, so that threads are started and memory is mapped before the first epoch is timed.
    few = data._replace(x_train=data.x_train[: options.batch_size], y_train=data.y_train[: options.batch_size])
    for network in networks.values():
        Trainer(copy.deepcopy(network), few, **settings).epoch()

    say(_tables.header("torch" in networks))
    bar = _bar(options, options.epochs * sum(trainer.batches for trainer in trainers.values()))
    try:
        for epoch in range(options.epochs):
            # Every other epoch begins with the other network, so that neither always has the warmer cache.
            for name in [*trainers][:: -1 if epoch % 2 else 1]:
                curves[name].append(trainers[name].epoch(bar and bar.update))
            if bar:
                bar.clear()
            say(_tables.row(curves["pyperc"][-1], curves["torch"][-1] if "torch" in curves else None))
    finally:
        if bar:
            bar.close()
    return curves


def _bar(options: argparse.Namespace, batches: int) -> Any:
    """A progress bar over the batches, or None where nobody sees it or tqdm is not installed."""
    if options.no_progress or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=batches, unit="batch", leave=False, file=sys.stderr)


def _compare(
    curves: dict[str, list[Epoch]],
    networks: dict[str, nn.Module],
    untrained: dict[str, nn.Module],
    data: datasets.Dataset,
    batch_size: int,
    say: Say,
) -> dict[str, Any]:
    """Prints how both trainings agree and the ratios of their times; returns the same figures."""
    states = {name: network.state_dict() for name, network in networks.items()}
    agreed = agreement(curves["pyperc"], curves["torch"], states["pyperc"], states["torch"])
    say(f"{_tables.verdict(agreed)}\n")

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, data.features, generator=generator, dtype=data.x_train.dtype)
    dy = torch.randn(batch_size, data.classes, generator=generator, dtype=x.dtype) / batch_size
    timings = time_batch(untrained["pyperc"], untrained["torch"], x, dy)
    ours, theirs = ([len(data.y_train) / point.samples_per_second for point in curve] for curve in curves.values())
    ratio = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
    timings["epoch"] = Timing(quartiles(ours).median, quartiles(theirs).median, ratio)
    over = {
        "pyperc": timings["backward"].ours / timings["forward"].ours,
        "torch": timings["backward"].theirs / timings["forward"].theirs,
    }
    say(_tables.times(timings, over, batch_size))
    return {
        "agreement": agreed._asdict(),
        "seconds": {
            name: {"pyperc": timing.ours, "torch": timing.theirs, "ratio": timing.ratio._asdict()}
            for name, timing in timings.items()
        },
        "backward_over_forward": over,
    }


if __name__ == "__main__":
    sys.exit(main())
