"""Training: an epoch of MNIST's shape through [784, 256, 256, 10], and a fit of the classifier.

    PYPERC_MNIST=DIR python bench/bench_training.py [--only sgd adam MLPClassifier-sgd ...] [--threads N] [--rounds N]

The epoch is that of `pyperc.fit`, 938 shuffled batches of 64, beside the loop that one writes in torch, with each of
its optimizers (plain, foreach, fused); its ratio is to the fastest of them. The classifier's fit is one epoch of that
network, checks of its arguments included, beside scikit-learn's, which takes its turns in another process.
Contenders take turns, and a ratio is the median over the rounds of the ratios within each.

`threads apart` is a cache line's way from one thread to the other and back, before each turn: above 200 ns their cores
have no cache in common, and what threads hand to each other costs several times as much.

An epoch's products are 6 x 268,800 x 60,000 flops less the first layer's dx, 73 GF: `python -m pyperc bench` tells how
many of them the processor makes in a second at most.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from turns import Contenders, Elsewhere, in_turns, over, samples

import pyperc
from pyperc import _C
from pyperc.batches import Reading, Rows

SIZES, BATCH = [784, 256, 256, 10], 64
OPTIMIZERS = {"sgd": (torch.optim.SGD, {"lr": 0.01}), "adam": (torch.optim.Adam, {"lr": 1e-4})}
CLASSIFIER = f"MLPClassifier([256, 256], batch_size={BATCH}, max_iter=1, random_state=0, solver='{{}}')"
FLOPS = 60000 * (6 * sum(a * b for a, b in itertools.pairwise(SIZES)) - 2 * SIZES[0] * SIZES[1])


def epoch_contenders(name: str) -> Contenders:
    x, y, _ = samples()
    torch.manual_seed(0)
    model = pyperc.MLP(SIZES)
    kind, options = OPTIMIZERS[name]
    networks = {form: pyperc.unfuse(copy.deepcopy(model)) for form in ("plain", "foreach", "fused")}
    rows = Rows(Reading(model, "cross_entropy"), x, y, BATCH, True, None)
    step = pyperc.TrainStep(model, optimizer=name, **options)

    def ours() -> None:
        rows.begin()
        while rows.run(step, 0.1):
            pass

    def loop(form: str) -> Callable[[], None]:
        network: nn.Module = networks[form]
        optimizer = kind(network.parameters(), **options, foreach=form == "foreach", fused=form == "fused")

        def epoch() -> None:
            for batch in torch.randperm(len(x)).split(BATCH):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(network(x.index_select(0, batch)), y.index_select(0, batch))
                loss.backward()
                optimizer.step()

        return epoch

    return {"pyperc": ours, **{form: loop(form) for form in networks}}


def classifier_contenders(name: str) -> Contenders:
    from pyperc.neural_network import MLPClassifier  # noqa: F401 - named by CLASSIFIER

    x, y, _ = samples()
    model = eval(CLASSIFIER.format(name))

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x.numpy(), y.numpy())

    return {"pyperc": ours, "sklearn": Elsewhere(CLASSIFIER.format(name), x, y)}


CASES: dict[str, tuple[str, Callable[[str], Contenders], tuple[str, ...]]] = {
    "sgd": ("an epoch of fit, sgd", epoch_contenders, ("plain", "foreach", "fused")),
    "adam": ("an epoch of fit, adam", epoch_contenders, ("plain", "foreach", "fused")),
    "MLPClassifier-sgd": ("MLPClassifier, sgd, an epoch", classifier_contenders, ("sklearn",)),
    "MLPClassifier-adam": ("MLPClassifier, adam, an epoch", classifier_contenders, ("sklearn",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{samples()[2]}, {arguments.threads} threads, {_C.isa()}, torch {torch.__version__}\n")
    print("| training | pyperc | GF/s | over torch | over scikit-learn | theirs | threads apart |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for case in arguments.only:
        title, contenders, others = CASES[case]
        trips: list[float] = []
        turns = contenders(case.removeprefix("MLPClassifier-"))
        seconds = in_turns(turns, arguments.rounds, lambda trips=trips: trips.append(_C.round_trip()))
        ours = statistics.median(seconds["pyperc"])
        ratio = f"{over(seconds, *others):.2f}"
        cells = ["", ratio] if others == ("sklearn",) else [ratio, ""]
        theirs = ", ".join(f"{other} {statistics.median(seconds[other]):.2f} s" for other in others)
        print(
            f"| {title} | {ours:.3f} s | {FLOPS / ours / 1e9:.0f} |",
            " | ".join(cells),
            f"| {theirs} | {min(trips):.0f} to {max(trips):.0f} ns |",
            flush=True,
        )


if __name__ == "__main__":
    main()
