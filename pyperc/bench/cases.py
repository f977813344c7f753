"""What is measured: networks and what they cost, who computes them, and the record that a measurement becomes.

A layer of k inputs and n outputs on m samples costs 2 m n k floating-point operations forward and 4 m n k backward (dx
and dw), so that backward over forward is 2, less the first layer's dx where the input needs none (EE-559, lecture 3.6).
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import pyperc
from pyperc import _C
from pyperc.bench.measure import Block, Measurement, Pace, calls, interleaved, quartiles

__all__ = ["Compiler", "Cost", "Job", "Network", "Record", "Settings", "add", "relu", "timed"]

Record: TypeAlias = dict[str, Any]
"""One measured case, as plain values that json can write."""

FLOAT = 4
"""Bytes."""
FAR = 200.0
"""Nanoseconds of a cache line's round trip between threads, above which their cores have no cache in common."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and the least bytes that must move: every operand and every result once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Network:
    """A batch through layers of these sizes; `activation` of the hidden layers, `output` of the last.

    Example:
        >>> Network(32, (64,) * 4, "tanh").name
        '32 x [64]*4 tanh'
        >>> Network(64, (784, 256, 10)).forward_flops
        26017792
    """

    batch: int
    sizes: tuple[int, ...]
    activation: str = "relu"
    output: str = "identity"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        alike = len(set(self.sizes)) == 1 and len(self.sizes) > 2
        widths = f"[{self.sizes[0]}]*{len(self.sizes)}" if alike else "->".join(map(str, self.sizes))
        words = [f"{self.batch} x {widths}", self.activation if len(self.sizes) > 2 else self.output]
        return " ".join([*words, *[self.dtype_name] * (self.dtype != torch.float32)])

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(in, out) of each layer."""
        return list(itertools.pairwise(self.sizes))

    @property
    def forward_flops(self) -> int:
        """2 m n k, summed over the layers."""
        return sum(2 * self.batch * k * n for k, n in self.pairs)

    def backward_flops(self, dx: bool) -> int:
        """4 m n k, summed over the layers, less the first layer's dx where the input needs none."""
        return 2 * self.forward_flops - (0 if dx else 2 * self.batch * self.sizes[0] * self.sizes[1])

    @property
    def parameters(self) -> int:
        return sum(k * n + n for k, n in self.pairs)

    def cost(self, work: str) -> Cost:
        """Of `forward`, or of `forward+backward` with dx, dw and db."""
        activations = self.batch * sum(self.sizes)
        if work == "forward":
            return Cost(self.forward_flops, self.dtype.itemsize * (self.parameters + activations))
        # Backward reads the parameters, what forward kept and dy, and writes dx, dw and db.
        moved = 3 * self.parameters + 2 * activations + self.batch * (self.sizes[0] + self.sizes[-1])
        return Cost(self.forward_flops + self.backward_flops(dx=True), self.dtype.itemsize * moved)

    def plain(self) -> nn.Sequential:
        """The network in torch's own modules, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = pyperc.MLP(self.sizes, activation=self.activation, output_activation=self.output)
        plain = pyperc.unfuse(model)
        assert type(plain) is nn.Sequential
        return plain.to(self.dtype)

    def models(self) -> dict[str, nn.Module]:
        """The same network fused and plain."""
        plain = self.plain()
        return {"pyperc": pyperc.fuse(copy.deepcopy(plain)), "eager": plain}

    def data(self) -> tuple[Tensor, Tensor]:
        """Random x and dy."""
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(self.batch, self.sizes[i], generator=generator) for i in (0, -1))
        return x.to(self.dtype), dy.to(self.dtype)

    def facts(self) -> Record:
        """For the record."""
        return {"batch": self.batch, "sizes": list(self.sizes), "activation": self.activation, "dtype": self.dtype_name}

    def contenders(self, work: str, compiler: "Compiler | None" = None) -> dict[str, Block]:
        """Blocks of `forward` without a graph, or of `forward+backward`, through torch.autograd.grad."""
        x, dy = self.data()
        models = self.models()
        if compiler:
            models |= compiler.compiled(self.plain(), x, with_backward=work != "forward")
        if work == "forward":
            return {name: _forward(model, x) for name, model in models.items()}
        return {name: _forward_and_backward(model, x, dy) for name, model in models.items()}


def relu(*shapes: tuple[int, Sequence[int]], activation: str = "relu") -> list[Network]:
    """Networks of (batch, sizes) with one activation."""
    return [Network(batch, tuple(sizes), activation) for batch, sizes in shapes]


def _forward(model: nn.Module, x: Tensor) -> Block:
    return calls(lambda: model(x), torch.no_grad)


def _forward_and_backward(model: nn.Module, x: Tensor, dy: Tensor) -> Block:
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *model.parameters()]
    return calls(lambda: torch.autograd.grad(model(leaf), leaves, dy))


class Compiler:
    """torch.compile, where it works here; `reason` says why it does not."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def compiled(self, model: nn.Module, x: Tensor, *, with_backward: bool) -> dict[str, nn.Module]:
        """{"compile": the compiled model}, warmed up; {} after the first failure."""
        if self.reason is not None:
            return {}
        try:
            import torch._inductor.config as inductor

            # A pool of compiling processes would still be awake while its results are measured.
            inductor.compile_threads = 1
            # The networks share the code of nn.Sequential, and dynamo gives up after a few recompilations of one code.
            torch.compiler.reset()
            compiled = torch.compile(model, fullgraph=True, dynamic=False)
            if with_backward:
                for dx in (True, False):
                    compiled(x.clone().requires_grad_(dx)).sum().backward()
                model.zero_grad(set_to_none=True)
            else:
                with torch.no_grad():
                    compiled(x)
        except Exception as error:  # dynamo, inductor and the compiler that they call each raise their own
            lines = str(error).strip().splitlines() or [""]
            self.reason = f"{type(error).__name__}: {lines[0][:200]}"
            return {}
        assert isinstance(compiled, nn.Module)
        return {"compile": compiled}


@dataclass
class Settings:
    """What a run is asked for."""

    mode: str = "quick"
    """quick, full, or smoke: the smallest of everything, to try the machinery"""
    growth: bool = False
    """measure how the cost grows even in a quick run, for the figure"""
    compiler: Compiler | None = None
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def full(self) -> bool:
        return self.mode == "full"

    @property
    def count(self) -> int:
        """Of contenders, where torch.compile may be one."""
        return 3 if self.compiler else 2

    @property
    def compiling(self) -> float:
        """Seconds, about, for a network."""
        return 3.0 if self.compiler else 0.0

    @property
    def smoke(self) -> bool:
        return self.mode == "smoke"


@dataclass(frozen=True)
class Job:
    """One case of a table."""

    name: str
    """of its own in the table"""
    run: Callable[[Pace], list[Record]]
    weight: float = 1.0
    """the share of the time that it should be given"""
    seconds: float = 0.0
    """that it takes beside, whatever it is given"""


def timed(
    table: str,
    case: str,
    work: str,
    cost: Cost,
    contenders: Callable[[], Mapping[str, Block]],
    *,
    facts: Record | None = None,
    threads: int | None = None,
    isa: str | None = None,
    count: int = 2,
    seconds: float = 0.0,
    extra: Callable[[Measurement], Record] | None = None,
) -> Job:
    """A job that measures contenders in turns; its record has the ratio of each to pyperc.

    `count`: of contenders, about. `seconds`: what making them takes. `extra`: more facts, from the measurement.
    """

    def run(pace: Pace) -> list[Record]:
        with using(threads, isa):
            measured = interleaved(contenders(), pace)
            record = {"table": table, "case": case, "work": work, **(facts or {})}
            add(record, measured, cost)
        return [{**record, **(extra(measured) if extra else {})}]

    name = f"{case}, {work}" + (f", {threads} threads" if threads else "") + (f", {isa}" if isa else "")
    return Job(name, run, float(count), seconds)


def add(record: Record, measured: Measurement, cost: Cost) -> None:
    """Puts a measurement into a record, with the machine as it was set."""
    record.update(
        flops=cost.flops,
        bytes=cost.bytes,
        threads=torch.get_num_threads(),
        isa=_C.isa(),
        probe=measured.probe,
        round_trip=measured.round_trip.median,
        disturbed=measured.disturbed,
        contenders={
            name: {
                "seconds": samples.median,
                "quartiles": list(quartiles(samples.seconds)),
                "spread": samples.spread,
                "blocks": len(samples.seconds),
                "dropped": samples.dropped,
                "share": samples.share(cost.flops),
            }
            for name, samples in measured.samples.items()
        },
        ratios={
            name: measured.ratios(name, "pyperc")._asdict()
            for name in measured.samples
            if name != "pyperc" and "pyperc" in measured.samples
        },
    )


@contextmanager
def using(threads: int | None, isa: str | None) -> Iterator[None]:
    """That many threads and that instruction set, then those of before."""
    threads_before, isa_before = torch.get_num_threads(), _C.isa()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if isa is not None:
            _C.use_isa(isa)
        yield
    finally:
        torch.set_num_threads(threads_before)
        _C.use_isa(isa_before)


def label(record: Record) -> str:
    """The case, and what is to be said about its measurement."""
    marks = {"disturbed": record["disturbed"], "far": record.get("round_trip", 0.0) > FAR}
    return " ".join([str(record["case"]), *(f"({mark})" for mark, holds in marks.items() if holds)])


def over(record: Record, name: str = "eager") -> float | None:
    """Time of that contender over pyperc's: above 1, pyperc is faster."""
    ratio = record["ratios"].get(name)
    return ratio["median"] if ratio else None


def middle(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return statistics.median(values) if values else 0.0
