"""Derivatives of every kind by value through every way in to a network: none is silently zero."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import close, plain
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyperc

F64 = torch.float64
Way = Callable[[pyperc.MLP], Callable[[Tensor], Tensor]]


def operands(model: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def layers(model: pyperc.MLP) -> Callable[[Tensor], Tensor]:
    """Modules of the same parameters that bring their activation."""
    first, second = pyperc.Linear(3, 4, activation="gelu"), pyperc.Linear(4, 2)
    first.weight, first.bias = model[0].weight, model[0].bias
    second.weight, second.bias = model[2].weight, model[2].bias
    return lambda x: second(first(x))


class Written(nn.Module):
    """The same as a forward that is written out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.up, self.down = model[0], model[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def functions(model: pyperc.MLP) -> Callable[[Tensor], Tensor]:
    (w, v), (b, c) = operands(model)
    return lambda x: pyperc.functional.linear(pyperc.functional.linear(x, w, b, "gelu"), v, c)


def counted(model: pyperc.MLP) -> Callable[[Tensor], Tensor]:
    """Under a dispatch mode."""

    def call(x: Tensor) -> Tensor:
        with FlopCounterMode(display=False):
            return model(x)

    return call


def between(model: pyperc.MLP) -> Callable[[Tensor], Tensor]:
    """Another module stands between the layers."""
    return pyperc.nn.Sequential(model[0], model[1], nn.Dropout(0.0), model[2])


def exported(model: pyperc.MLP) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.zeros(5, 3, dtype=F64),), dynamic_shapes=({0: batch},)).module()
    own = dict(model.named_parameters())
    return lambda x: torch.func.functional_call(program, own, (x,))


WAYS: dict[str, Way] = {
    "MLP": lambda model: model,
    "fused nn.Sequential": lambda model: pyperc.fuse(nn.Sequential(*model)),
    "fused block": lambda model: pyperc.fuse(Written(model)),
    "Linear": layers,
    "functional.mlp": lambda model: lambda x: pyperc.functional.mlp(x, *operands(model), ["gelu", "identity"]),
    "functional.linear": functions,
    "operator": lambda model: lambda x: torch.ops.pyperc.mlp(x, *operands(model), ["gelu", "identity"], []),
    "functional_call": lambda model: (
        lambda x: torch.func.functional_call(model, {name: 1 * p for name, p in model.named_parameters()}, (x,))
    ),
    "checkpoint": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    "another module between": between,
    "a dispatch mode": counted,
    "an exported program": exported,
    "a traced module": lambda model: torch.jit.trace(model, torch.zeros(5, 3, dtype=F64)),
}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
    del WAYS["checkpoint"]  # which refuses forward mode there


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_derivatives_by_value(way: Way) -> None:
    model = pyperc.MLP([3, 4, 2], "gelu", dtype=F64)
    other = plain(model)
    call = way(model)
    x, dx = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)

    def derivatives(function: Callable[[Tensor], Tensor], network: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with forward_ad.dual_level():
            found["jvp"] = forward_ad.unpack_dual(function(forward_ad.make_dual(x, dx))).tangent
        parameters, point = list(network.parameters()), x.clone().requires_grad_()
        y = function(point)
        first = torch.autograd.grad(y.sin().sum(), [point, *parameters], create_graph=True)
        scalar = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(scalar, [point, *parameters], create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), [point, *parameters])
        return {**found, "y": y, "first": first, "second": second, "third": third}

    got, want = derivatives(call, model), derivatives(other, other)
    for order in ("first", "second", "third"):
        assert all(g.abs().max() > 1e-4 for g in want[order]), "the test would not see a zero"
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", [way for name, way in WAYS.items() if name not in ("checkpoint", "a traced module")],
                         ids=[name for name in WAYS if name not in ("checkpoint", "a traced module")])  # fmt: skip
def test_function_transforms_by_value(way: Way) -> None:
    model = pyperc.MLP([3, 4, 2], "gelu", dtype=F64)
    other, call = plain(model), way(model)
    x, dx = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    func = torch.func
    for transform in (
        lambda f: func.jvp(f, (x,), (dx,)),
        lambda f: func.vjp(f, x)[1](torch.ones(5, 2, dtype=F64)),
        lambda f: func.vmap(func.jacrev(f))(x.unsqueeze(1)),
        lambda f: func.linearize(f, x)[1](dx),
        lambda f: func.hessian(lambda v: f(v).sin().sum())(x),
    ):
        close(transform(call), transform(other))


LATER = {"datasets", "sharding", "train", "features", "linear_model", "neural_network", "MLPClassifier", "MLPRegressor"}


def test_what_is_imported_later_is_there_and_listed() -> None:
    """In a process of its own: a submodule that somebody has imported is an attribute anyway."""
    code = f"""
import inspect, pydoc, sys, types
import pyperc
assert {LATER} <= set(dir(pyperc)), dir(pyperc)
assert "sklearn" not in sys.modules
for name in {LATER}:
    thing = getattr(pyperc, name)
    assert isinstance(thing, type if name.startswith("MLP") else types.ModuleType), name
for name in ("fit", "fuse", "explain", "info"):
    assert inspect.isfunction(getattr(pyperc, name)), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    code = """
import inspect, sys
sys.modules["sklearn"] = None
import pyperc
inspect.getmembers(pyperc)
assert "train" in dir(pyperc) and "features" not in dir(pyperc)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'pyperc' has no attribute 'learn'"):
        pyperc.learn  # noqa: B018


def public() -> list[tuple[str, Any]]:
    modules = [pyperc, pyperc.functional, pyperc.nn]
    for name in ("features", "linear_model", "sharding", "step"):
        if name in {module.name for module in pkgutil.iter_modules(pyperc.__path__)}:
            modules.append(__import__(f"pyperc.{name}", fromlist=["*"]))
    found = {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__}
    return [(name, thing) for name, thing in found.items() if callable(thing) and not inspect.ismodule(thing)]


@pytest.mark.parametrize("thing", [thing for _, thing in public()], ids=[name for name, _ in public()])
def test_every_public_name_has_an_example(thing: Any) -> None:
    """Which runs as a doctest."""
    assert ">>> " in inspect.getdoc(thing)
