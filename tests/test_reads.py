"""Straight forwards that read what changes: looked at anew where it is seen, and refused where it could not be."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyperc
from pyperc.blocks import Line
from pyperc.fuse import straight_line

SLOPE = 0.1
HERE = sys.modules[__name__]


def helper(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


def with_list(x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(1)
    return F.relu(x)


def scaled(slope: float) -> float:
    return math.sqrt(slope) / len("ab")


def outer() -> tuple[Callable[..., Any], Callable[[], None]]:
    """A forward that reads a variable of the function around it, and what changes that."""
    slope = 0.1

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.leaky_relu(self.a(x), slope))

    def change() -> None:
        nonlocal slope
        slope = 0.9

    return forward, change


class Listing(nn.ModuleList):
    def __iter__(self) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().__iter__()


class Base(nn.Module):
    slope = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self._slope, self.own, self.sizes, self.act = 0.1, 0.1, (0.1, 0.2), torch.tanh
        self.layers, self.listing = nn.ModuleList([self.a, self.b]), Listing([self.a, self.b])
        self.order, self.options, self.scale = [0, 1], {"slope": 0.1}, torch.tensor(0.1)
        self.config, self.counter, self.calls = types.SimpleNamespace(slope=0.1), itertools.count(), []
        self.leaky = nn.LeakyReLU(0.1)
        self.register_buffer("buffer", torch.tensor(0.1))

    @property
    def public(self) -> float:
        return self._slope

    @staticmethod
    def still(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.1)

    def activate(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self._slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.leaky_relu(self.a(x), self._slope))


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def made(forward: Callable[..., Any], base: type[nn.Module] = Base) -> nn.Module:
    torch.manual_seed(0)
    return type("Made", (base,), {"forward": forward})()


def set_class(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(Base, name, value)


CHANGES: dict[str, tuple[Callable[..., Any], Callable[[Any], None]]] = {
    "a private attribute": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self._slope)),
        lambda module: setattr(module, "_slope", 0.9),
    ),
    "an attribute": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.own)),
        lambda module: setattr(module, "own", 0.9),
    ),
    "an attribute of a class": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.slope)),
        set_class("slope", 0.9),
    ),
    "an attribute that hides that of the class": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.slope)),
        lambda module: setattr(module, "slope", 0.9),
    ),
    "a tuple": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.sizes[0])),
        lambda module: setattr(module, "sizes", (0.9,)),
    ),
    "an attribute of a layer": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.leaky.negative_slope)),
        lambda module: setattr(module.leaky, "negative_slope", 0.9),
    ),
    "a function that an attribute holds": (
        lambda self, x: self.b(self.act(self.a(x))),
        lambda module: setattr(module, "act", torch.relu),
    ),
    "the mode": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), 0.5 * self.training)),
        lambda module: module.eval(),
    ),
    "a global": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), SLOPE)),
        lambda module: setattr(HERE, "SLOPE", 0.9),
    ),
    "a global that a function reads": (
        lambda self, x: self.b(helper(self.a(x))),
        lambda module: setattr(HERE, "SLOPE", 0.9),
    ),
    "a function that it calls": (
        lambda self, x: self.b(helper(self.a(x))),
        lambda module: setattr(HERE, "helper", torch.relu),
    ),
    "a function of torch": (
        lambda self, x: self.b(torch.nn.functional.relu(self.a(x))),
        lambda module: setattr(F, "relu", lambda x: x + 1),
    ),
    "a function of its arguments alone": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), scaled(self._slope))),
        lambda module: setattr(module, "_slope", 0.9),
    ),
    "a property": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.public)),
        lambda module: setattr(module, "_slope", 0.9),
    ),
    "a static method": (
        lambda self, x: self.b(self.still(self.a(x))),
        set_class("still", staticmethod(torch.relu)),
    ),
    "a method": (
        lambda self, x: self.b(self.activate(self.a(x))),
        set_class("activate", lambda self, x: torch.relu(x)),
    ),
    "what a method reads": (
        lambda self, x: self.b(self.activate(self.a(x))),
        lambda module: setattr(module, "_slope", 0.9),
    ),
    "what the class before reads": (Derived.forward, lambda module: setattr(module, "_slope", 0.9)),
    "the forward of the class before": (Derived.forward, set_class("forward", lambda self, x: self.b(self.a(x)))),
    "a layer of a list": (
        lambda self, x: self.layers[1](torch.relu(self.layers[0](x))),
        lambda module: module.layers.__setitem__(0, nn.Identity()),
    ),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the changes touch is put back."""
    for owner, names in (
        (HERE, ("SLOPE", "helper")),
        (F, ("relu",)),
        (Base, ("slope", "still", "activate", "forward")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, vars(owner)[name])


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_read_and_changes_is_looked_at_anew(name: str) -> None:
    forward, change = CHANGES[name]
    if forward is Derived.forward:
        other: nn.Module = Derived()
    else:
        other = made(forward)
    model = pyperc.fuse(copy.deepcopy(other))
    assert type(model) is not type(other)
    x = 3 * torch.randn(8, 4)
    for _ in range(2):
        torch.testing.assert_close(model(x), other(x))
    line = vars(model)["_pyperc_line"]
    assert line.holds(model)
    for module in (model, other):
        change(module)
    assert not line.holds(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("name", ["a private attribute", "an attribute of a class", "a global", "the mode", "a method"])
def test_a_compiled_call_sees_it_as_well(name: str) -> None:
    forward, change = CHANGES[name]
    torch._dynamo.reset()
    other = made(forward)
    model = pyperc.fuse(copy.deepcopy(other))
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), 3 * torch.randn(8, 4)
    torch.testing.assert_close(compiled(x), other(x))
    for module in (model, other):
        change(module)
    torch.testing.assert_close(compiled(x), other(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["a private attribute", "an attribute of a class", "a global", "the mode", "a function that it calls"]
)
def test_a_native_step_sees_it_as_well(name: str) -> None:
    forward, change = CHANGES[name]
    other = made(forward)
    model = pyperc.fuse(copy.deepcopy(other))
    step, x, y = pyperc.TrainStep(model, "mse", lr=0.0), 3 * torch.randn(8, 4), torch.zeros(8, 4)
    torch.testing.assert_close(step(x, y), F.mse_loss(other(x), y).detach())
    assert step.engine == "native"
    for module in (model, other):
        change(module)
    torch.testing.assert_close(step(x, y), F.mse_loss(other(x), y).detach())


def test_a_variable_of_the_function_around() -> None:
    forward, change = outer()
    other = made(forward)
    model, x = pyperc.fuse(copy.deepcopy(other)), torch.randn(8, 4)
    assert type(model) is not type(other)
    before = model(x)
    step, y = pyperc.TrainStep(model, "mse", lr=0.0), torch.zeros(8, 4)
    step(x, y)
    change()
    torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(step(x, y), F.mse_loss(other(x), y).detach())
    assert not torch.equal(model(x), before)


def test_what_is_not_read_may_change() -> None:
    model = pyperc.fuse(Base())
    line = vars(model)["_pyperc_line"]
    model.other, model.own, model.order = 3, 4, None
    model.eval()
    model(torch.zeros(1, 4))
    assert vars(model)["_pyperc_line"] is line


def test_a_replica_has_its_own_line() -> None:
    """DataParallel copies the attributes of a module."""
    model, x = pyperc.fuse(Base()), torch.randn(3, 4)
    model(x)
    replica = model._replicate_for_data_parallel()
    replica.b = nn.Linear(4, 2)
    assert replica(x).shape == (3, 2)
    assert model(x).shape == (3, 4)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.hooked, self.holds = nn.Linear(4, 4), nn.Linear(4, 4), 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(F.leaky_relu(self.line(x), self.holds))


def test_a_block_has_its_names_for_itself() -> None:
    other = Named()
    model, x = pyperc.fuse(copy.deepcopy(other)), torch.randn(8, 4)
    for module in (model, other):
        module.holds = 0.9
    torch.testing.assert_close(model(x), other(x))
    assert isinstance(straight_line(model), Line)
    for module in (model, other):  # from here on by its own forward
        module.line.register_forward_hook(lambda module, args, y: y + 1)
        module.hooked = nn.Identity()
    torch.testing.assert_close(model(x), other(x))


class Rectified(nn.ReLU):
    """With torch's forward."""


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.last = Inner(), Rectified(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.inner(x)))


def test_a_hook_within_is_no_part_of_the_line() -> None:
    other = Outer()
    other.inner.register_forward_hook(lambda module, args, y: torch.relu(y - 1))
    model, x = pyperc.fuse(copy.deepcopy(other)), torch.randn(8, 4)
    assert type(model) is not Outer
    torch.testing.assert_close(model(x), other(x))
    for module in (model, other):
        module.inner._forward_hooks.clear()
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("of_class", [True, False], ids=["of its class", "of its own"])
def test_another_forward_of_a_module_within(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Outer()
    model, x = pyperc.fuse(copy.deepcopy(other)), torch.randn(8, 4)
    torch.testing.assert_close(model(x), other(x))
    if of_class:
        monkeypatch.setattr(Rectified, "forward", lambda self, x: x + 1, raising=False)
    for module in (model, other):
        if not of_class:
            module.act.forward = lambda x: x + 1
    for _ in range(2):
        torch.testing.assert_close(model(x), other(x))


def test_a_forward_of_its_own_within_is_refused() -> None:
    model, seen = Outer(), []
    model.act.forward = lambda x: (seen.append(1), torch.relu(x))[1]
    assert straight_line(model) == "the forward of Rectified is not that of its class"
    assert seen == []


# What a forward does beside its line, and the reason that is given.
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a list": (lambda self, x: self.b(torch.relu(self.layers[self.order[0]](x))), "reads order, a list, which may"),
    "a dict": (lambda self, x: self.b(F.leaky_relu(self.a(x), self.options["slope"])), "reads options, a dict"),
    "a tensor": (lambda self, x: self.b(F.leaky_relu(self.a(x), float(self.scale))), "reads scale, a Tensor"),
    "a buffer": (lambda self, x: self.b(F.leaky_relu(self.a(x), self.buffer.item())), "reads buffer, a parameter or"),
    "an object": (
        lambda self, x: self.b(F.leaky_relu(self.a(x), self.config.slope)),
        "reads config, a SimpleNamespace",
    ),
    "an iterator": (lambda self, x: self.b(F.leaky_relu(self.a(x), next(self.counter))), "reads counter, a count"),
    "a call of append": (
        lambda self, x: (self.calls.append(1), self.b(torch.relu(self.a(x))))[1],
        "reads calls, a list",
    ),
    "a call of update": (lambda self, x: (self.options.update(n=1), self.b(torch.relu(self.a(x))))[1], "reads options"),
    "a random number": (lambda self, x: self.b(F.leaky_relu(self.a(x), random.random())), "its forward calls random"),
    "another": (lambda self, x: self.b(F.leaky_relu(self.a(x), random.uniform(0, 1))), "its forward reads uniform"),
    "one of torch's": (lambda self, x: self.b(F.leaky_relu(self.a(x), torch.rand(1).item())), "its forward calls rand"),
    "a line printed": (lambda self, x: (print("x"), self.b(torch.relu(self.a(x))))[1], "its forward calls print"),
    "the seed": (lambda self, x: (torch.manual_seed(0), self.b(torch.relu(self.a(x))))[1], "forward calls manual_seed"),
    "a name made up": (lambda self, x: self.b(torch.relu(getattr(self, "a")(x))), "its forward calls getattr"),  # noqa: B009
    "the mode set": (lambda self, x: (self.train(), self.b(torch.relu(self.a(x))))[1], "reads train, which is torch's"),
    "all attributes": (lambda self, x: self.b(torch.relu(self.__dict__["a"](x))), "reads __dict__, which is torch's"),
    "a list that a function holds": (
        lambda self, x: self.b(with_list(self.a(x))),
        "with_list, which its forward calls, reads a default, a list",
    ),
    "a loop of its own": (
        lambda self, x: self.b(torch.relu(next(iter(self.listing))(x))),
        "its forward calls __iter__, but not by its name",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_change_unseen_is_refused(name: str) -> None:
    forward, reason = REFUSED[name]
    model = made(forward)
    assert type(pyperc.fuse(model)) is type(model)
    found = straight_line(model)
    assert isinstance(found, str)
    assert reason in found
    assert model.calls == []
    assert "n" not in model.options


def test_an_import_within() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        import random

        return self.b(F.leaky_relu(self.a(x), random.random()))

    assert straight_line(made(forward)) == "its forward imports random"
