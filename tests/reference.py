"""The mathematics of a multi-layer perceptron in plain float64 torch, and how near to it a kernel must come.

    s(l) = x(l-1) w(l)^T + b(l)       x(l) = f(s(l))
    ds(l) = dx(l) * f'(s(l))          dx(l-1) = ds(l) w(l)
    dw(l) = ds(l)^T x(l-1)            db(l) = sum over the batch of ds(l)

(EE-559, lecture 3.6.) Lists count layers from 0: w[0] is w(1), x[0] is the input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyperc import _C

HALVES = (torch.bfloat16, torch.float16)


def _threshold_unit(below: float) -> Callable[[Tensor], Tensor]:
    return lambda s: torch.where(torch.isnan(s), s, torch.where(s >= 0, 1.0, below).to(s.dtype))


def _slope(f: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        return torch.autograd.grad(f(s).sum(), s)[0]


# What torch.nn.functional has no function of that name for. The threshold units are 1 at 0 (lecture 3.1).
OWN: dict[str, Callable[..., Tensor]] = {
    "identity": lambda s: s.clone(),
    "gelu_tanh": lambda s: F.gelu(s, approximate="tanh"),
    "heaviside": _threshold_unit(0.0),
    "sign": _threshold_unit(-1.0),
}

# Where torch adds a number near -1 to 1, even in float64.
UNCANCELLED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda s: s * 0.5 * torch.special.erfc(-s * math.sqrt(0.5)),
    "gelu_tanh": lambda s: s * torch.sigmoid(math.sqrt(8 / math.pi) * (s + 0.044715 * s**3)),
}


def formula(name: str, parameters: Sequence[str]) -> Callable[..., Tensor]:
    """The reference f of an activation: torch.nn.functional's function of that name, else an entry of OWN."""
    f = OWN.get(name) or getattr(F, name, None)
    if f is None:
        raise LookupError(
            f"activation {name!r} has no reference: torch.nn.functional has no function of that name; "
            f"add one to OWN in tests/reference.py, called as f(s, {', '.join(f'{p}=...' for p in parameters)})"
        )
    return f


@dataclass(frozen=True)
class Activation:
    """One activation with the values of its parameters; f and df work in the dtype of s."""

    name: str
    keywords: tuple[str, ...] = ()
    parameters: tuple[float, ...] = ()

    def f(self, s: Tensor) -> Tensor:
        return formula(self.name, self.keywords)(s, **dict(zip(self.keywords, self.parameters, strict=True)))

    def exact(self, s: Tensor) -> Tensor:
        """f in float64, in a form that does not cancel."""
        f = UNCANCELLED.get(self.name)
        return f(s.double()) if f else self.f(s.double())

    def df(self, s: Tensor) -> Tensor:
        return _slope(self.f, s)

    def exact_df(self, s: Tensor) -> Tensor:
        return _slope(self.exact, s.double())

    def __str__(self) -> str:
        default = next(i.defaults for i in _C.activations() if i.name == self.name)
        return "_".join([self.name, *(f"{p:g}" for p in self.parameters if self.parameters != tuple(default))])


ACTIVATIONS = [Activation(i.name, tuple(i.parameters), tuple(i.defaults)) for i in _C.activations()]
# Each parameter by its own factor, so that one which is ignored or taken for another shows.
ALTERED = [
    replace(a, parameters=tuple(p * (1.25 + 0.25 * i) for i, p in enumerate(a.parameters)))
    for a in ACTIVATIONS
    if a.parameters
]


def named(name: str, *parameters: float) -> Activation:
    """The activation of that name, with its defaults unless parameters are given."""
    activation = next(a for a in ACTIVATIONS if a.name == name)
    return replace(activation, parameters=parameters) if parameters else activation


def smooth(activation: Activation) -> bool:
    """Whether f' varies and is continuous on [-3, 3], so that derivatives of higher order say something."""
    s = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    df = activation.df(s)
    return 0 < df.diff().abs().max().item() < 0.01


@dataclass
class Network:
    """An input, the layers and the gradient dy with respect to the output."""

    x: Tensor
    w: list[Tensor]
    b: list[Tensor | None]
    activations: list[Activation]
    dy: Tensor

    @property
    def chain(self) -> _C.Chain:
        return _C.Chain([(a.name, list(a.parameters)) for a in self.activations])

    @property
    def op_arguments(self) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[str], list[float]]:
        """The arguments of torch.ops.pyperc.mlp."""
        names = [a.name for a in self.activations]
        return self.x, self.w, self.b, names, [p for a in self.activations for p in a.parameters]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """x, each w and each b, by the name of its gradient."""
        b = {f"db[{i}]": b for i, b in enumerate(self.b) if b is not None}
        return {"dx": self.x} | {f"dw[{i}]": w for i, w in enumerate(self.w)} | b

    def requires_grad(self, only: Callable[[str], bool] = lambda name: True) -> Network:
        """The same network on new leaves of the same strides, of which those that `only` names ask for a gradient."""
        leaf = {name: tensor.detach().requires_grad_(only(name)) for name, tensor in self.leaves.items()}
        b = [leaf.get(f"db[{i}]") for i in range(len(self.b))]
        return replace(self, x=leaf["dx"], w=[leaf[f"dw[{i}]"] for i in range(len(self.w))], b=b)

    def to(self, dtype: torch.dtype) -> Network:
        b = [None if b is None else b.to(dtype) for b in self.b]
        return replace(self, x=self.x.to(dtype), w=[w.to(dtype) for w in self.w], b=b, dy=self.dy.to(dtype))

    def __str__(self) -> str:
        sizes = [self.w[0].shape[1], *(w.shape[0] for w in self.w)]
        bias = "".join("-" if b is None else "b" for b in self.b)
        names = [str(a) for a in self.activations]
        return (
            f"x {list(self.x.shape)} strides {self.x.stride()}, sizes {sizes}, biases {bias}, {names}, {self.x.dtype}"
        )


def native(net: Network) -> Tensor:
    return _C.mlp(net.x, net.w, net.b, net.chain)


def composition(net: Network) -> Tensor:
    """The same network in torch's own operations, in the dtype of the network."""
    x = net.x
    for w, b, activation in zip(net.w, net.b, net.activations, strict=True):
        x = activation.f(F.linear(x, w, b))
    return x


def results(forward: Callable[[Network], Tensor], net: Network) -> dict[str, Tensor]:
    """y, dx, dw[l] and db[l] of a differentiable forward."""
    net = net.requires_grad()
    y = forward(net)
    return {
        "y": y.detach(),
        **dict(zip(net.leaves, torch.autograd.grad(y, list(net.leaves.values()), net.dy), strict=True)),
    }


def rows(t: Tensor) -> Tensor:
    """[*, n] as [samples, n]."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def forward(net: Network) -> tuple[list[Tensor], list[Tensor]]:
    """x(0..L) and s(1..L) in float64, with one row for each sample."""
    x, s = [rows(net.x.detach().double())], []
    for w, b, activation in zip(net.w, net.b, net.activations, strict=True):
        s.append(x[-1] @ w.detach().double().mT + (0 if b is None else b.detach().double()))
        x.append(activation.f(s[-1]))
    return x, s


@dataclass
class Exact:
    """The float64 values by the name of each result, and the rounding error that each is allowed beyond torch's own."""

    values: dict[str, Tensor]
    rounding: dict[str, float]


def exact(net: Network) -> Exact:
    """Forward and backward by the formulas above, and R, the rounding that each result is allowed beyond torch's own.

    A product a b summed over k terms rounds to k eps max|a| max|b|, an activation and its derivative to 4 eps of what
    cancels in them (gelu at s < 0: 1 + erf). With k inputs, n outputs and m samples of the layer:

        R(y)  = max|f'| (E(s) + (k + 1) eps max(max|x| max|w|, max|b|)) + 4 eps max(max|y|, min(max|s|, 1))
        R(dx) = |w^T| E(ds) + (n + 4) eps max(|ds|, |dx|) max|w|
        R(dw) = sqrt(m) (rms x E(ds) + rms ds E(x)) + (m + 4) eps max(|ds|, |dx|) max|x|
        R(db) = sqrt(m) E(ds) + (m + 4) eps max(|ds|, |dx|)

    E is what a layer inherits: the rounding k eps rms a rms b of each product before it, passed on as independent
    errors are, through w times the largest 2-norm |w| of a row (|w^T| of a column), through f and f' as they vary:

        E(s) = |w| E(x) + k eps max(rms x rms w, rms b)      E(x)  = max|f'| E(s)
        E(ds) = max|f'| E(dx) + max|dx| var f'               E(dx) = |w^T| E(ds) + n eps rms ds rms w

    Networks of 16 bits are summed in float32, whose eps that is, and rounded where they are stored, to h: every result
    to h of its peak; x(l) and ds(l) to h of their rms, which E passes on; and f' is read from a rounded x or s, within
    which a kink may lie.
    """
    stored = torch.finfo(net.x.dtype).eps
    eps, h = (torch.finfo(torch.float32).eps, stored) if net.x.dtype in HALVES else (stored, 0.0)
    x, s = forward(net)
    inherited_x, inherited_s = [0.0], []
    for i, (w, b, activation) in enumerate(zip(net.w, net.b, net.activations, strict=True)):
        slope = peak(activation.df(s[i]))
        product = (w.shape[1] + 1) * eps * max(peak(x[i]) * peak(w), peak(b))
        y = slope * (norm(w, 1) * inherited_x[i] + product) + 4 * eps * max(peak(x[i + 1]), min(peak(s[i]), 1.0))
        inherited_s.append(norm(w, 1) * inherited_x[i] + w.shape[1] * eps * max(rms(x[i]) * rms(w), rms(b)))
        inherited_x.append(slope * inherited_s[i] + h * rms(x[i + 1]))
    values, rounding = {"y": x[-1].reshape(net.dy.shape)}, {"y": y}

    m = x[0].shape[0]
    dx, inherited_dx = rows(net.dy.double()), 0.0
    for i in reversed(range(len(net.w))):
        w, df = net.w[i].detach().double(), net.activations[i].df
        slope = df(s[i])
        ds = dx * slope
        largest = max(peak(ds), peak(dx))
        near = inherited_s[i] + (3 * inherited_s[i] + h * s[i].abs() if h else 0.0)
        varies = max(peak(df(s[i] + d) - slope) for d in (near, -near)) + 2 * h * peak(slope)
        inherited_ds = peak(slope) * inherited_dx + peak(dx) * varies + h * rms(ds)
        values[f"dw[{i}]"] = ds.mT @ x[i]
        through = math.sqrt(m) * (rms(x[i]) * inherited_ds + rms(ds) * inherited_x[i])
        rounding[f"dw[{i}]"] = through + (m + 4) * eps * largest * peak(x[i])
        if net.b[i] is not None:
            values[f"db[{i}]"] = ds.sum(0)
            rounding[f"db[{i}]"] = math.sqrt(m) * inherited_ds + (m + 4) * eps * largest
        dx = ds @ w
        rounding["dx"] = norm(w, 0) * inherited_ds + (w.shape[0] + 4) * eps * largest * peak(w)
        inherited_dx = norm(w, 0) * inherited_ds + w.shape[0] * eps * rms(ds) * rms(w)
    values["dx"] = dx.reshape(net.x.shape)
    return Exact(values, {name: rounding[name] + h * peak(value) for name, value in values.items()})


def peak(t: Tensor | None) -> float:
    return t.detach().abs().max().item() if t is not None and t.numel() else 0.0


def rms(t: Tensor | None) -> float:
    return t.detach().double().square().mean().sqrt().item() if t is not None and t.numel() else 0.0


def norm(w: Tensor, dim: int) -> float:
    return peak(torch.linalg.vector_norm(w.detach().double(), dim=dim))


def torch_errors(net: Network, want: Exact) -> dict[str, float]:
    """The largest error of each result of torch's composition.

    In float64 it is that in float32 times the ratio of the two eps, for a float64 reference cannot see it.
    """
    if net.x.dtype in HALVES:
        own = results(composition, replace(net, dy=net.dy.contiguous()))
        return {name: peak(own[name].double() - want.values[name]) for name in own}
    # Contiguous, since torch's own gelu backward refuses an overlapping dy.
    single = replace(net.to(torch.float32), dy=net.dy.float().contiguous())
    own = results(composition, single)
    scale = torch.finfo(net.x.dtype).eps / torch.finfo(torch.float32).eps
    reference = want if net.x.dtype == torch.float32 else exact(single)
    return {name: scale * peak(own[name].double() - reference.values[name]) for name in own}


def check(net: Network, got: dict[str, Tensor] | None = None) -> None:
    """Holds the native results (or `got`) to 2 x the error of torch's composition in the same dtype + R of `exact`.

    A float64 reference rounds as much itself, so that the difference from it may be twice as large.
    """
    got = results(native, net) if got is None else got
    want = exact(net)
    torch_error = torch_errors(net, want)
    wrong = []
    for name, value in got.items():
        reference = want.values[name]
        assert value.shape == reference.shape, f"{name} is {list(value.shape)}, not {list(reference.shape)}: {net}"
        assert value.dtype == net.x.dtype, f"{name} is {value.dtype}: {net}"
        error = peak(value.double() - reference)
        allowed = 2 * torch_error[name] + want.rounding[name]
        allowed *= 2 if net.x.dtype == torch.float64 else 1
        if not error <= allowed:
            wrong.append(f"{name}: error {error:.3g}, torch's {torch_error[name]:.3g}, allowed {allowed:.3g}")
    assert not wrong, "\n".join([str(net), *wrong])


def check_forward(net: Network) -> None:
    """As `check`, of the output alone and without a graph."""
    with torch.no_grad():
        y = native(net)
    assert not y.requires_grad
    check(net, {"y": y})


def draw(
    sizes: Sequence[int],
    batch: int | Sequence[int],
    activations: Activation | Sequence[Activation],
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool | Sequence[bool] = True,
    margin: float | None = None,
    seed: int = 0,
) -> Network:
    """A random network whose s are of the order of 1, and whose input keeps them away from kinks.

    Within rounding of a kink (relu at 0) the derivative in float32 is another one than in float64, and both are right,
    so the samples that come within `margin` of one are drawn again; as a rule that is max k eps of float32, an upper
    bound of the rounding of s.
    """
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    layers = len(sizes) - 1
    lead = (batch,) if isinstance(batch, int) else tuple(batch)
    activations = [activations] * layers if isinstance(activations, Activation) else list(activations)
    bias = [bias] * layers if isinstance(bias, bool) else list(bias)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    w = [normal(n, k) / math.sqrt(k) for k, n in itertools.pairwise(sizes)]
    b = [normal(n) / 2 if on else None for n, on in zip(sizes[1:], bias, strict=True)]
    net = Network(normal(math.prod(lead), sizes[0]), w, b, activations, normal(*lead, sizes[-1]))
    margin = max(sizes) * torch.finfo(torch.float32).eps if margin is None else margin
    for _ in range(100):
        near = near_a_kink(net, margin)
        if not near.any():
            return replace(net, x=net.x.reshape(*lead, sizes[0]))
        net.x[near] = normal(int(near.sum()), sizes[0])
    raise NearKinksError(f"no input away from kinks found in 100 draws, take another seed: {net}")


class NearKinksError(AssertionError):
    """No input keeps the network's s away from the kinks; of one hidden unit and a small weight that may be so."""


def near_a_kink(net: Network, margin: float) -> Tensor:
    """Which rows have an s within `margin` of a jump of f or f'.

    An s of exactly 0 comes from dead units without bias, and is that in every dtype.
    """
    x, s = forward(net)
    near = torch.zeros(x[0].shape[0], dtype=torch.bool)
    for s_l, activation in zip(s, net.activations, strict=True):
        jump = [(g(s_l + margin) - g(s_l - margin)).abs() for g in (activation.f, activation.df)]
        near |= ((jump[0] + jump[1] > max(0.01, 10 * margin)) & (s_l != 0)).any(1)
    return near
