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
from pyperc._progress import bar_of
from pyperc.bench import command as bench
from pyperc.bench.measure import quartiles
from pyperc.compare import Timing, agreement, fastest_form, time_batch
from pyperc.experiments import command as experiment
from pyperc.info import info, text
from pyperc.step import TrainStep
from pyperc.train import Epoch, TorchStep, Trainer, targets

Say: TypeAlias = Callable[..., None]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOSSES = [loss.name for loss in _C.losses()]
RATES = {"sgd": 0.3, "adam": 1e-3, "adamw": 1e-3}
"""The optimizers, and the step of each where none is given."""
LABELS = {"pyperc": "pyperc", "torch": "plain torch"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0; 1 where training failed, a claim does not hold or an extra is missing; 2 for bad arguments; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except ImportError as error:
        print(f"python -m pyperc: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyperc", description="Multi-layer perceptrons for PyTorch.")
    parser.add_argument("--version", action="version", version=f"pyperc {pyperc.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    about = commands.add_parser("info", help="versions, instruction sets, threads, CUDA")
    about.add_argument("--json", action="store_true", help="print them as JSON, for a program to read")
    about.set_defaults(run=_info)

    learn = commands.add_parser("train", help="train a classifier of images and print its loss and errors by epoch")
    add, names = learn.add_argument, pyperc.activations()
    add(
        "--data",
        default="digits",
        metavar="NAME",
        help="digits, which need scikit-learn, or mnist:DIR, a folder with the four IDX files (default: %(default)s)",
    )
    add(
        "--sizes",
        type=_positive,
        nargs="+",
        metavar="N",
        help="widths of the layers, from the input to the output (default: two hidden layers of 256)",
    )
    add(
        "--activation",
        default="relu",
        choices=names,
        metavar="NAME",
        help=f"of the hidden layers: {', '.join(names)} (default: %(default)s)",
    )
    add("--epochs", type=_positive, default=20, metavar="N", help="passes over the data (default: %(default)s)")
    add("--batch-size", type=_positive, default=64, metavar="N", help="samples in a step (default: %(default)s)")
    add(
        "--loss",
        default="cross_entropy",
        choices=LOSSES,
        metavar="NAME",
        help=f"{', '.join(LOSSES)} (default: %(default)s)",
    )
    add("--optimizer", default="sgd", choices=RATES, help="torch's, by its formulas (default: %(default)s)")
    rates = ", ".join(f"{lr:g} for {name}" for name, lr in RATES.items())
    add("--lr", type=_step, metavar="X", help=f"the learning rate (default: {rates})")
    add("--momentum", type=_step, metavar="X", help="momentum of sgd (default: none)")
    add(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the initial weights and of the shuffling (default: %(default)s)",
    )
    add("--dtype", default="float32", choices=DTYPES, help="of the weights and the samples (default: %(default)s)")
    add("--threads", type=_positive, metavar="N", help="how many torch may use (default: as many as it chooses)")
    add("--compare", choices=["torch"], help="train the same network with torch's own loop beside it, and time both")
    add("--save", type=_writable, metavar="FILE", help="write the trained weights here, for torch.load")
    add("--plot", type=_writable, metavar="FILE", help="draw loss and errors by epoch here, as a PNG for example")
    add("--json", action="store_true", help="print the figures as JSON to stdout, and all else to stderr")
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
    options.lr = options.lr or RATES[options.optimizer]
    try:
        if options.momentum and options.optimizer != "sgd":
            raise ValueError(f"argument --momentum: is sgd's, {options.optimizer} has none")
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
    except (ValueError, RuntimeError, OSError) as error:
        options.error(str(error))

    networks: dict[str, nn.Module] = {"pyperc": model}
    if options.compare:
        networks["torch"] = pyperc.unfuse(copy.deepcopy(model))
    untrained = copy.deepcopy(networks)
    form = _fastest_form(untrained["torch"], data, options) if options.compare else "plain"

    shape = "-".join(map(str, sizes))
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"pyperc {pyperc.__version__}, torch {torch.__version__}, {isa}, {_plural(threads, 'thread')}, {options.dtype}")
    say(f"{options.data}: {len(data.y_train):,} samples to train, {len(data.y_test):,} to test, standardised")
    say(f"network {shape}, {options.activation}, {count:,} parameters")
    epochs = _plural(options.epochs, "epoch")
    rule = f"{options.optimizer}, lr {options.lr:g}" + f", momentum {options.momentum}" * bool(options.momentum)
    say(f"{epochs} in batches of {options.batch_size}, {options.loss}, {rule}, seed {options.seed}")
    if options.compare:
        say(f"plain torch with the {form} form of its optimizer, the fastest here")
    say("")
    steps = {name: _step_of(name, network, options, form) for name, network in networks.items()}
    warm = {name: _step_of(name, network, options, form) for name, network in copy.deepcopy(untrained).items()}
    try:
        curves = _run(steps, warm, data, options, say)
    except FloatingPointError as error:
        print(f"python -m pyperc train: {error}", file=sys.stderr)
        return 1

    accuracy = {name: 1 - curve[-1].test_error for name, curve in curves.items()}
    say("\n" + "\n".join(f"test accuracy of {LABELS[name]}: {value:.2%}" for name, value in accuracy.items()))
    named = ("data", "activation", "dtype", "epochs", "batch_size", "loss", "optimizer", "lr", "momentum", "seed")
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
        steps = {name: _step_of(name, network, options, form) for name, network in untrained.items()}
        figures |= {"torch_form": form, **_compare(curves, networks, steps, data, options, say)}
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


def _step_of(name: str, network: nn.Module, options: argparse.Namespace, form: str) -> Any:
    """A TrainStep of the network, or for plain torch a TorchStep with this form of its optimizer."""
    settings = {"lr": options.lr, **({"momentum": options.momentum} if options.momentum else {})}
    if name == "torch":
        return TorchStep(network, options.loss, options.optimizer, form=form, **settings)
    return TrainStep(network, options.loss, options.optimizer, **settings)


def _fastest_form(plain: nn.Module, data: datasets.Dataset, options: argparse.Namespace) -> str:
    x, labels = data.x_train[: options.batch_size], data.y_train[: options.batch_size]
    y = targets(labels, data.classes, options.loss, x.dtype)
    return fastest_form(lambda form: _step_of("torch", copy.deepcopy(plain), options, form), x, y)


def _run(
    steps: dict[str, Any],
    warm: dict[str, Any],
    data: datasets.Dataset,
    options: argparse.Namespace,
    say: Say,
) -> dict[str, list[Epoch]]:
    """Trains every network epoch by epoch, in turns, and prints a row for each epoch."""
    settings = {"batch_size": options.batch_size, "seed": options.seed}
    trainers = {name: Trainer(step, data, **settings) for name, step in steps.items()}
    curves: dict[str, list[Epoch]] = {name: [] for name in trainers}

    # A step of a copy, so that threads are started and memory is mapped before the first epoch is timed.
    few = data._replace(x_train=data.x_train[: options.batch_size], y_train=data.y_train[: options.batch_size])
    for step in warm.values():
        Trainer(step, few, **settings).epoch()

    say(_tables.header("torch" in steps))
    total = options.epochs * sum(trainer.batches for trainer in trainers.values())
    bar = None if options.no_progress else bar_of(total)
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


def _compare(
    curves: dict[str, list[Epoch]],
    networks: dict[str, nn.Module],
    steps: dict[str, Any],
    data: datasets.Dataset,
    options: argparse.Namespace,
    say: Say,
) -> dict[str, Any]:
    """Prints how both trainings agree and the ratios of their times; returns the same figures."""
    states = {name: network.state_dict() for name, network in networks.items()}
    agreed = agreement(curves["pyperc"], curves["torch"], states["pyperc"], states["torch"])
    say(f"{_tables.verdict(agreed)}\n")

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(options.batch_size, data.features, generator=generator, dtype=data.x_train.dtype)
    labels = torch.randint(data.classes, (options.batch_size,), generator=generator)
    timings = time_batch(steps["pyperc"], steps["torch"], x, targets(labels, data.classes, options.loss, x.dtype))
    ours, theirs = ([len(data.y_train) / point.samples_per_second for point in curve] for curve in curves.values())
    ratio = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
    timings["epoch"] = Timing(quartiles(ours).median, quartiles(theirs).median, ratio)
    over = {
        "pyperc": timings["backward"].ours / timings["forward"].ours,
        "torch": timings["backward"].theirs / timings["forward"].theirs,
    }
    say(_tables.times(timings, over, options.batch_size))
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
