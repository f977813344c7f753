"""The Jacobian of a network with respect to its input, over torch.func.vmap(jacrev): EE-559, lecture 3.6."""

from collections.abc import Sequence
from functools import partial

import torch

from pyperc import functional
from pyperc.bench.cases import Cost, Job, Network, Record, Settings, relu, timed
from pyperc.bench.measure import Block, calls
from pyperc.bench.tables.mlp import table
from pyperc.bench.text import Table

NAME = "jacobian"
SHAPE = (256, [32, 64, 64, 8])


def networks(settings: Settings) -> list[Network]:
    if settings.smoke:
        return relu((3, (4, 5, 2)))
    return [*relu(SHAPE, activation="tanh"), *relu(SHAPE)]


def jobs(settings: Settings) -> list[Job]:
    return [
        timed(NAME, network.name, "jacobian", cost(network), partial(contenders, network), facts=network.facts())
        for network in networks(settings)
    ]


def cost(network: Network) -> Cost:
    """Of forward, and of the product of the layers' Jacobians from the output down; J is the result."""
    batch, sizes = network.batch, network.sizes
    product = sum(2 * batch * sizes[-1] * k * n for k, n in network.pairs[:-1])
    elements = network.parameters + batch * (sum(sizes) + sizes[0] * sizes[-1])
    return Cost(network.forward_flops + product, network.dtype.itemsize * elements)


def contenders(network: Network) -> dict[str, Block]:
    x, _ = network.data()
    models = network.models()
    every = torch.func.vmap(torch.func.jacrev(models["eager"]))
    return {
        "pyperc": calls(lambda: functional.jacobian(models["pyperc"], x), torch.no_grad),
        "eager": calls(lambda: every(x), torch.no_grad),
    }


def tables(records: Sequence[Record]) -> list[Table]:
    return [table("Jacobian with respect to the input: functional.jacobian, over vmap(jacrev)", records)]
