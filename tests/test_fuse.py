"""fuse and unfuse on the module trees that people write, against the same tree left as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pyperc


class Plain(nn.Sequential):
    """A subclass with nothing of its own."""


class Flattening(nn.Sequential):
    """A subclass with a forward that calls nn.Sequential's."""

    def __init__(self, *layers: nn.Module, scale: float = 2.0) -> None:
        super().__init__(*layers)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input.flatten(1))


class Deeper(Flattening):
    """A subclass of a subclass."""


class Looping(nn.Sequential):
    """A subclass with a forward of its own throughout."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input) + 1
        return input


class VisionMLP(nn.Sequential):
    """The structure of torchvision.ops.MLP: linear, norm, activation, dropout, ..., linear, dropout."""

    def __init__(
        self, width: int, hidden: list[int], norm: Callable[[int], nn.Module] | None, inplace: bool | None
    ) -> None:
        flag = {} if inplace is None else {"inplace": inplace}
        layers: list[nn.Module] = []
        for size in hidden[:-1]:
            layers.append(nn.Linear(width, size))
            if norm is not None:
                layers.append(norm(size))
            layers += [nn.ReLU(**flag), nn.Dropout(0.5, **flag)]
            width = size
        super().__init__(*layers, nn.Linear(width, hidden[-1]), nn.Dropout(0.5, **flag))


class TwoTowers(nn.Module):
    """Several containers within a module, one of them shared, one in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.right = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.again = self.right
        self.others = nn.ModuleList([Plain(nn.Linear(4, 4), nn.SiLU()), nn.Sequential(nn.LayerNorm(4))])
        self.by_name = nn.ModuleDict(
            {"head": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2), nn.GELU()))}
        )
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x) + self.right(x) * self.again(2 * x)
        for other in self.others:
            y = other(y)
        return self.last(self.by_name["head"](y))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid()),
    "without bias": lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Sequential(nn.Linear(5, 4)), nn.Tanh()
    ),
    "subclass": lambda: Plain(nn.Linear(6, 5), nn.ELU(0.5), nn.Linear(5, 4)),
    "forward that calls super": lambda: Flattening(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), scale=3.0),
    "subclass of a subclass": lambda: Deeper(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)),
    "forward of its own": lambda: Looping(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)),
    "torchvision's MLP": lambda: VisionMLP(6, [5, 4, 3], None, None),
    "torchvision's MLP with layer norm": lambda: VisionMLP(6, [5, 4, 3], nn.LayerNorm, None),
    "dropout in place": lambda: nn.Sequential(
        nn.Linear(6, 5),
        nn.LeakyReLU(),
        nn.Dropout(0.5, inplace=True),
        nn.Linear(5, 4),
        nn.ELU(),
        nn.ReLU6(inplace=True),
    ),
    "torchvision's MLP with batch norm": lambda: VisionMLP(6, [5, 4, 3], nn.BatchNorm1d, False),
    "several containers": TwoTowers,
    "in place": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.SiLU(inplace=True)),
    "identities": lambda: nn.Sequential(nn.Identity(), nn.Linear(6, 5), nn.Identity(), nn.ReLU(), nn.Identity()),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 4)),
    "convolutions before": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    ),
    "pyperc.Linear": lambda: nn.Sequential(pyperc.Linear(6, 5, activation="relu"), nn.Linear(5, 4)),
    "bare linear": lambda: nn.Linear(6, 5),
    "nothing to fuse": lambda: nn.Sequential(nn.LayerNorm(6), nn.ReLU()),
}


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output, and every gradient by name, from fixed random numbers."""
    torch.manual_seed(5)
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(torch.randn_like(y))
    return {"y": y, "x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestFuse:
    def test_values_and_gradients_stay(self, make: Callable[[], nn.Module], training: bool) -> None:
        plain = make().double().train(training)
        fused = pyperc.fuse(copy.deepcopy(plain))
        x = torch.randn(5, 6, dtype=torch.float64)
        for _ in range(2):
            torch.testing.assert_close(step(fused, x), step(plain, x))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())

    def test_is_in_place_idempotent_and_undone(self, make: Callable[[], nn.Module], training: bool) -> None:
        model = make().double().train(training)
        before = [(name, type(module), module) for name, module in model.named_modules(remove_duplicate=False)]
        parameters = dict(model.named_parameters())
        assert pyperc.fuse(model) is model
        fused = [type(module) for module in model.modules()]
        assert [type(module) for module in pyperc.fuse(model).modules()] == fused
        for name, cls, module in before:
            assert isinstance(module, cls)
            assert model.get_submodule(name) is module
            holds_linear = isinstance(module, nn.Sequential) and any(isinstance(c, nn.Linear) for c in module)
            assert isinstance(module, pyperc.nn.Sequential) == holds_linear
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
        model(torch.randn(5, 6, dtype=torch.float64))
        assert pyperc.unfuse(model) is model
        assert [(name, type(module), module) for name, module in model.named_modules(remove_duplicate=False)] == before
        assert not any("_pyperc_runs" in vars(module) for module in model.modules())

    def test_copies_and_pickles(self, make: Callable[[], nn.Module], training: bool) -> None:
        fused = pyperc.fuse(make()).double().train(training)
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = step(fused, x)
        twins = [copy.deepcopy(fused)]
        if not any(torch.nn.utils.parametrize.is_parametrized(module) for module in fused.modules()):
            buffer = io.BytesIO()
            torch.save(fused, buffer)
            buffer.seek(0)
            twins += [pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)]
        for twin in twins:
            assert [type(module) for module in twin.modules()] == [type(module) for module in fused.modules()]
            twin.load_state_dict(fused.state_dict())
            torch.testing.assert_close(step(twin, x), step(copy.deepcopy(fused), x))
        assert expected["y"].shape[0] == 5


class TestClasses:
    def test_a_subclass_is_fused_once_for_all(self) -> None:
        a, b = (pyperc.fuse(Flattening(nn.Linear(6, 5))) for _ in range(2))
        assert type(a) is type(b)
        assert type(a).__name__ == "FusedFlattening"
        assert isinstance(a, Flattening)
        assert isinstance(a, pyperc.nn.Sequential)
        assert type(a).__module__ == Flattening.__module__
        assert type(a).__doc__ == Flattening.__doc__

    def test_an_mlp_becomes_a_sequential(self) -> None:
        model = pyperc.MLP([6, 5, 4])
        assert pyperc.fuse(model) is model
        assert type(model) is pyperc.MLP
        assert type(pyperc.unfuse(model)) is nn.Sequential
        assert type(pyperc.fuse(model)) is pyperc.nn.Sequential

    def test_classes_that_derive_from_pyperc_stay(self) -> None:
        class Own(pyperc.MLP):
            pass

        model = Own([6, 5, 4])
        assert type(pyperc.fuse(model)) is Own
        assert type(pyperc.unfuse(model)) is Own

    def test_a_metaclass_stays(self) -> None:
        class Meta(type):
            pass

        class Own(nn.Sequential, metaclass=Meta):
            pass

        assert isinstance(type(pyperc.fuse(Own(nn.Linear(2, 2)))), Meta)

    def test_what_a_class_asks_of_its_subclasses_is_not_asked_of_the_fused_one(self) -> None:
        classes = list(Registered.classes)
        for make in (lambda: Registered(nn.Linear(2, 2)), Written):
            model = pyperc.fuse(make())
            assert type(model).__name__.startswith("Fused")
            assert type(copy.deepcopy(model)) is type(pickle.loads(pickle.dumps(model))) is type(model)
        assert Registered.classes == classes == ["registered", "written"]

    def test_a_class_without_subclasses_leaves_all_as_it_was(self) -> None:
        class Final(type):
            def __new__(cls, name: str, *rest: Any) -> Any:
                if name != "Own":
                    raise RuntimeError("Own is final")
                return super().__new__(cls, name, *rest)

        class Own(nn.Sequential, metaclass=Final):
            pass

        model = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), Written(), Own(nn.Linear(2, 2))])
        with pytest.raises(TypeError, match=r"fuse: no subclass of .*Own can be made: Own is final"):
            pyperc.fuse(model)
        assert [type(inner) for inner in model] == [nn.Sequential, Written, Own]

    def test_slices_are_of_the_fused_class(self) -> None:
        assert type(pyperc.fuse(nn.Sequential(nn.Linear(6, 5), nn.ReLU()))[:1]) is pyperc.nn.Sequential
        fused = pyperc.fuse(Plain(nn.Linear(6, 5), nn.ReLU()))
        assert type(fused[:1]) is type(fused)

    def test_a_reduce_of_its_own_is_kept(self) -> None:
        fused = pyperc.fuse(Reducing(nn.Linear(6, 5)))
        assert type(pickle.loads(pickle.dumps(fused))) is Reducing


class Asking:
    """Has a list of the classes that derive from it, which give their names."""

    classes: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str) -> None:
        Asking.classes.append(name)


class Registered(Asking, nn.Sequential, name="registered"):
    pass


class Written(Asking, nn.Module, name="written"):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Reducing(nn.Sequential):
    def __reduce__(self) -> Any:
        return Reducing, tuple(self)


class TestHooks:
    def test_on_any_module_run_as_before(self) -> None:
        model = TwoTowers().double()
        seen: list[tuple[str, torch.Size]] = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, args, y, name=name: seen.append((name, y.shape)))
        x = torch.randn(5, 6, dtype=torch.float64)
        model(x)
        before, seen[:] = seen[:], []
        pyperc.fuse(model)(x)
        assert seen == before
        assert len(before) > 10


class TestLazy:
    def test_before_and_after_the_sizes_are_known(self) -> None:
        plain = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(4)).double()
        fused = pyperc.fuse(copy.deepcopy(plain))
        assert type(fused) is pyperc.nn.Sequential
        x = torch.randn(5, 6, dtype=torch.float64)
        for model in (plain, fused):
            torch.manual_seed(0)
            model(x)
        assert [type(child) for child in fused] == [nn.Linear, nn.ReLU, nn.Linear]
        torch.testing.assert_close(step(fused, x), step(plain, x))
        assert [layer.call for layer in pyperc.explain(fused, x).layers] == ["fused", "fused"]


class TestWrappers:
    def test_a_compiled_module(self) -> None:
        model = TwoTowers().double()
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = model(x)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(pyperc.fuse(compiled)(x), expected)

    def test_functional_call_on_a_tree(self) -> None:
        plain = TwoTowers().double()
        fused = pyperc.fuse(copy.deepcopy(plain))
        x = torch.randn(5, 6, dtype=torch.float64)
        tripled = {name: 3 * p for name, p in plain.named_parameters()}
        torch.testing.assert_close(*(torch.func.functional_call(model, tripled, x) for model in (fused, plain)))

    def test_a_replica_that_holds_plain_tensors(self) -> None:
        model = pyperc.fuse(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
        x = torch.randn(5, 6)
        expected = model(x)
        replica = model._replicate_for_data_parallel()
        for key, child in model._modules.items():
            twin = child._replicate_for_data_parallel()
            for name, parameter in child._parameters.items():
                setattr(twin, name, None if parameter is None else parameter.detach())
            replica._modules[key] = twin
        torch.testing.assert_close(replica(x), expected)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("function", [pyperc.fuse, pyperc.unfuse], ids=["fuse", "unfuse"])
def test_what_is_no_module_is_named(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"module must be an instance of torch\.nn\.Module, got int"):
        function(3)
    with pytest.raises(TypeError, match="got the class Linear"):
        function(nn.Linear)
