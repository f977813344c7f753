"""Lecture 3.6: back-propagation, every derivative beside autograd's, and what the backward pass costs."""

import copy
import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pyperc
from pyperc.experiments import figures
from pyperc.experiments.frame import Claim, Result, Setup, Table

SIZES = (2, 3, 2)


class Derivative(NamedTuple):
    """One line of the lecture's backward pass."""

    name: str
    equation: str
    value: Tensor
    """by the equation"""
    autograd: Tensor
    """of the same network in plain torch"""
    native: Tensor | None
    """by pyperc's backward, where it hands the tensor out"""


def derivatives(model: pyperc.MLP, x: Tensor, y: Tensor) -> list[Derivative]:
    """The lecture's equations for l = |x(2) - y|^2 and f = tanh, line by line; x and y are [1, width]."""
    w1, b1, w2, b2 = (parameter.detach() for parameter in model.parameters())

    s1 = x @ w1.T + b1
    x1 = s1.tanh()
    s2 = x1 @ w2.T + b2
    x2 = s2.tanh()

    dx2 = 2 * (x2 - y)
    ds2 = dx2 * (1 - x2**2)
    dx1 = ds2 @ w2
    ds1 = dx1 * (1 - x1**2)
    dx0 = ds1 @ w1

    # The same with every intermediate kept by autograd.
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, b1, w2, b2)]
    a0, v1, c1, v2, c2 = leaves
    t1 = a0 @ v1.T + c1
    a1 = t1.tanh()
    t2 = a1 @ v2.T + c2
    a2 = t2.tanh()
    wanted = (a2, t2, v2, c2, a1, t1, v1, c1, a0)
    autograd = torch.autograd.grad((a2 - y).square().sum(), wanted)

    a0 = x.clone().requires_grad_()
    dw1, db1, dw2, db2, native_dx0 = torch.autograd.grad((model(a0) - y).square().sum(), (*model.parameters(), a0))
    lines = (
        ("dx(2)", "2 (x(2) - y)", dx2, None),
        ("ds(2)", "dx(2) * f'(s(2))", ds2, None),
        ("dw(2)", "ds(2)^T x(1)", ds2.T @ x1, dw2),
        ("db(2)", "ds(2)", ds2[0], db2),
        ("dx(1)", "ds(2) w(2)", dx1, None),
        ("ds(1)", "dx(1) * f'(s(1))", ds1, None),
        ("dw(1)", "ds(1)^T x(0)", ds1.T @ x, dw1),
        ("db(1)", "ds(1)", ds1[0], db1),
        ("dx(0)", "ds(1) w(1)", dx0, native_dx0),
    )
    return [
        Derivative(name, equation, value, theirs, native)
        for (name, equation, value, native), theirs in zip(lines, autograd, strict=True)
    ]


def jacobian(model: pyperc.MLP, x: Tensor) -> Tensor:
    """J = diag(f'(s(2))) w(2) diag(f'(s(1))) w(1) at x [in], for f = tanh: [out, in]."""
    w1, b1, w2, b2 = (parameter.detach() for parameter in model.parameters())
    x1 = (w1 @ x + b1).tanh()
    x2 = (w2 @ x1 + b2).tanh()
    return torch.diag(1 - x2**2) @ w2 @ torch.diag(1 - x1**2) @ w1


class Count(NamedTuple):
    """Operations of the matrix products that torch ran, a multiplication and an addition counted as two."""

    forward: int
    backward: int


def count(network: nn.Module, x: Tensor) -> Count:
    """Counts while the network, of plain torch modules, runs forward and backward."""
    with FlopCounterMode(display=False) as counter:
        y = network(x)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return Count(forward, counter.get_total_flops())


def seconds(network: nn.Module, x: Tensor, rounds: int) -> tuple[float, float]:
    """Median times of forward and of backward, taken in turns; on one thread, which other work disturbs least."""
    forward, backward = [], []
    dy = torch.randn_like(network(x))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            network.zero_grad(set_to_none=True)
            x.grad = None
            start = time.perf_counter()
            y = network(x)
            between = time.perf_counter()
            y.backward(dy)
            backward.append(time.perf_counter() - between)
            forward.append(between - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(forward[2:]), statistics.median(backward[2:])


def run(setup: Setup) -> Result:
    """The derivatives of a network [2, 3, 2], and the cost of one that arithmetic binds."""
    generator = torch.Generator().manual_seed(2)
    model = pyperc.MLP(SIZES, "tanh", "tanh", dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).div(0.05).round().mul(0.05))
    x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    lines = derivatives(model, x, y)
    from_autograd = max(_far(line.value, line.autograd) for line in lines)
    from_native = max(_far(line.value, line.native) for line in lines if line.native is not None)
    product, reversed_ = jacobian(model, x[0]), torch.func.jacrev(model)(x[0])

    width, batch, rounds = (256, 128, 9) if setup.quick else (1024, 512, 17)
    wide = pyperc.MLP([width] * 4)
    plain = pyperc.unfuse(copy.deepcopy(wide))
    costs = []
    for needed in (True, False):
        inputs = torch.randn(batch, width, generator=generator).requires_grad_(needed)
        operations = count(plain, inputs)
        costs.append((needed, operations, seconds(wide, inputs, rounds), seconds(plain, inputs, rounds)))
    layers = len(wide) // 2 + 1
    ratios = [operations.backward / operations.forward for _, operations, _, _ in costs]
    without = 2 - 1 / layers

    given = [
        [name, _numbers(value)]
        for name, value in (("x", x), ("y", y), *((_symbol(n), p) for n, p in model.named_parameters()))
    ]
    rows = [
        [
            line.name,
            line.equation,
            _numbers(line.value),
            f"{_far(line.value, line.autograd):.0e}",
            "" if line.native is None else f"{_far(line.value, line.native):.0e}",
        ]
        for line in lines
    ]
    cost_rows = [
        [
            "yes" if needed else "no",
            f"{operations.forward:,}",
            f"{operations.backward:,}",
            f"{operations.backward / operations.forward:.4f}",
            f"{ours[1] / ours[0]:.2f}",
            f"{theirs[1] / theirs[0]:.2f}",
        ]
        for needed, operations, ours, theirs in costs
    ]
    claims = [
        Claim(f"each dx, ds, dw and db is autograd's: within {from_autograd:.0e}", from_autograd < 1e-14),
        Claim(f"pyperc's backward gives the same dw, db and dx(0): within {from_native:.0e}", from_native < 1e-14),
        Claim(
            f"the product of the layers' Jacobians is the network's: within {_far(product, reversed_):.0e}",
            _far(product, reversed_) < 1e-14,
        ),
        Claim(f"counted, backward is exactly twice forward: {ratios[0]:.4f}", ratios[0] == 2),
        Claim(
            f"and where the input needs no gradient, less the first layer's dx: {ratios[1]:.4f} = 2 - 1/{layers}",
            abs(ratios[1] - without) < 1e-12,
        ),
    ]
    numbers = {
        "derivatives": {line.name: line.value.tolist() for line in lines},
        "difference_from_autograd": from_autograd,
        "difference_from_pyperc": from_native,
        "jacobian": product.tolist(),
        "cost": [
            {
                "input_needs_gradient": needed,
                "forward_operations": operations.forward,
                "backward_operations": operations.backward,
                "counted": operations.backward / operations.forward,
                "timed": {"pyperc": ours[1] / ours[0], "torch": theirs[1] / theirs[0]},
            }
            for needed, operations, ours, theirs in costs
        ],
    }
    shape = f"{'-'.join(['{}'] * 4).format(*[width] * 4)}, relu, a batch of {batch}, float32"
    return Result(
        [
            Table(["given", "value"], given, "x(0) = x, s(l) = x(l-1) w(l)^T + b(l), x(l) = tanh(s(l)), l = 1, 2"),
            Table(
                ["", "equation", "value", "from autograd", "from pyperc"],
                rows,
                "derivatives of the loss |x(2) - y|^2, and their largest difference",
            ),
            Table(
                ["dx(0) needed", "forward", "backward", "counted", "timed, pyperc", "timed, torch"],
                cost_rows,
                f"backward / forward: {shape}; operations of the products; median times, one thread",
            ),
        ],
        numbers,
        claims,
        "Left: each derivative by the lecture's equations against autograd's; all lie on the diagonal. Right: the cost "
        "of the backward pass over that of the forward pass, counted and timed; the lecture's rule of thumb is 2.",
        lambda figure: _draw(figure, lines, numbers["cost"], layers),
    )


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def _symbol(name: str) -> str:
    """`0.weight` of an MLP as w(1), `2.bias` as b(2)."""
    position, kind = name.split(".")
    return f"{kind[0]}({int(position) // 2 + 1})"


def _numbers(tensor: Tensor) -> str:
    """A vector's numbers, or a matrix's rows with a bar between."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).tolist()
    return "[" + " | ".join(" ".join(f"{value:.4g}" for value in row) for row in rows) + "]"


def _draw(figure: Any, lines: list[Derivative], costs: Any, layers: int) -> None:
    same, ratio = figure.subplots(1, 2)
    for kind, style in zip(("dx", "ds", "dw", "db"), figures.LINES, strict=True):
        chosen = [line for line in lines if line.name.startswith(kind)]
        ours, theirs = (torch.cat([getattr(line, side).flatten() for line in chosen]) for side in ("value", "autograd"))
        same.plot(theirs.tolist(), ours.tolist(), **{**style, "linestyle": "", "markersize": 7}, label=kind)
    same.axline((0, 0), slope=1, color="grey", linewidth=0.8, zorder=0)
    same.set(xlabel="autograd", ylabel="the lecture's equation", title="each derivative of a network 2-3-2")
    same.legend(frameon=False)
    same.grid(alpha=0.3)
    heights = list(itertools.chain.from_iterable((one["counted"], *one["timed"].values()) for one in costs))
    places = [0, 1, 2, 4, 5, 6]
    bars = ratio.bar(places, heights, color=["black", "silver", "white"] * 2, edgecolor="black", width=0.8)
    for bar, hatch in zip(bars, ("", "//", "..") * 2, strict=True):
        bar.set_hatch(hatch)
    ratio.axhline(2, color="grey", linestyle="--", linewidth=1, zorder=0)
    for text in ratio.bar_label(bars, fmt="%.2f", padding=3):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    ratio.set(xticks=[1, 5], xticklabels=["computed", "not needed"], xlabel="dx(0)", ylabel="backward / forward")
    ratio.set(title=f"cost of backward over forward, {layers} layers", ylim=(0, max(*heights, 2) * 1.45))
    ratio.legend(
        bars[:3], ["operations, counted", "time, pyperc", "time, plain torch"], frameon=False, loc="upper right"
    )
