"""pyperc.nn: the fused containers against a plain nn.Sequential of the very same children."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

import pyperc


def results(model: Callable[[Tensor], Tensor], leaves: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the input and of the leaves, from the same random numbers each time."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)
    return y, *torch.autograd.grad(y, [x, *leaves], dy, allow_unused=True, materialize_grads=True)


def agrees(model: nn.Sequential, x: Tensor | None = None) -> Tensor:
    """The model computes what torch's loop over its children does, values and gradients; returns its output."""
    first = next(model.parameters())
    x = torch.randn(5, first.shape[1] if first.dim() == 2 else 6, dtype=first.dtype) if x is None else x
    leaves = [p for p in model.parameters() if p.requires_grad]
    expected = results(nn.Sequential(*model), leaves, x)
    for _ in range(2):  # as found, and as kept from the first call
        actual = results(model, leaves, x)
        # In 16 bits torch rounds more often, and what cancels keeps the rounding of its terms.
        halves = {"rtol": 0.02, "atol": 0.02} if x.dtype in (torch.bfloat16, torch.float16) else {}
        torch.testing.assert_close(actual, expected, **halves)
    return actual[0]


def ordinary_linears(y: Tensor) -> int:
    """How many linear layers torch itself computed on the way to y (a batch of rows, layers with bias)."""
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return sum(node.name() == "AddmmBackward0" for node in seen)


@pytest.fixture
def model() -> pyperc.MLP:
    """Four layers at 0, 2, 4, 6 with tanh at 1, 3, 5, all in one native call."""
    return pyperc.MLP([6, 5, 7, 4, 3], activation="tanh", dtype=torch.float64)


class TestMLP:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("name", pyperc.activations())
    def test_is_the_sequential_written_by_hand(self, name: str, bias: bool) -> None:
        activation = lambda: [] if name == "identity" else [pyperc.activation.module(name)]  # noqa: E731
        torch.manual_seed(0)
        model = pyperc.MLP([6, 5, 4, 3], name, name, bias=bias)
        torch.manual_seed(0)
        layers = [layer for k, n in [(6, 5), (5, 4), (4, 3)] for layer in [nn.Linear(k, n, bias=bias), *activation()]]
        plain = nn.Sequential(*layers)
        assert [type(child) for child in model] == [type(child) for child in plain]
        assert list(model.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
        assert str(model) == str(plain).replace("Sequential", "MLP", 1)
        agrees(model)

    def test_loads_both_ways(self, model: pyperc.MLP) -> None:
        plain = nn.Sequential(*copy.deepcopy(model))
        other = pyperc.MLP([6, 5, 7, 4, 3], activation="tanh", dtype=torch.float64)
        other.load_state_dict(plain.state_dict())
        nn.Sequential(*copy.deepcopy(other)).load_state_dict(model.state_dict())
        torch.testing.assert_close(other(torch.ones(2, 6).double()), model(torch.ones(2, 6).double()))

    def test_output_activation_and_parameters(self) -> None:
        model = pyperc.MLP((6, 5, 3), ("leaky_relu", {"negative_slope": 0.3}), nn.Softplus(beta=2), dtype=torch.float64)
        assert [str(child) for child in model][1::2] == [
            "LeakyReLU(negative_slope=0.3)",
            "Softplus(beta=2.0, threshold=20.0)",
        ]
        assert ordinary_linears(agrees(model)) == 0

    def test_device_and_dtype(self) -> None:
        assert {p.dtype for p in pyperc.MLP([2, 2], dtype=torch.float64).parameters()} == {torch.float64}
        assert {p.device.type for p in pyperc.MLP([2, 2], device="meta").parameters()} == {"meta"}

    def test_sizes_may_be_any_integers(self) -> None:
        assert len(pyperc.MLP(torch.tensor([4, 3, 2]))) == 3
        assert len(pyperc.MLP(size for size in (4, 3, 2))) == 3

    def test_indexing_and_slicing(self, model: pyperc.MLP) -> None:
        head = model[:2]
        assert type(head) is pyperc.nn.Sequential
        assert head[0] is model[0]
        assert len(head) == 2
        assert type(model[3:]) is pyperc.nn.Sequential
        assert type(model[-1]) is nn.Linear
        assert ordinary_linears(agrees(head)) == 0
        x = torch.randn(4, 6, dtype=torch.float64)
        torch.testing.assert_close(model[2:](head(x)), model(x))

    @pytest.mark.parametrize(
        ("sizes", "error", "text"),
        [
            ([], ValueError, r"at least the input's and the output's width, got \[\]"),
            ([5], ValueError, r"at least the input's and the output's width, got \[5\]"),
            ([5, 0], ValueError, r"sizes\[1\] must be positive, got 0"),
            ([-5, 3], ValueError, r"sizes\[0\] must be positive, got -5"),
            ([5, 2.0], TypeError, r"sizes\[1\] must be an integer, got 2.0"),
            ([5, "3"], TypeError, r"sizes\[1\] must be an integer, got '3'"),
            ([5, True], TypeError, r"sizes\[1\] must be an integer, got True"),
            (5, TypeError, "sizes must be a sequence of integers, got 5"),
            ("53", TypeError, r"sizes\[0\] must be an integer, got '5'"),
        ],
    )
    def test_bad_sizes_are_named(self, sizes: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            pyperc.MLP(sizes)

    @pytest.mark.parametrize("bias", [[True, False], "no", None], ids=str)
    def test_a_bias_for_each_layer_is_refused(self, bias: Any) -> None:
        with pytest.raises(TypeError, match=r"MLP: bias must be True or False, got "):
            pyperc.MLP([4, 3, 2], bias=bias)

    def test_bad_activations_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"activation must be one of identity, relu.*got 'mish'"):
            pyperc.MLP([2, 2], activation="mish")
        with pytest.raises(ValueError, match=r"activation must be one of identity, relu.*got 'mish'"):
            pyperc.MLP([2, 2], output_activation="mish")


class TestLinear:
    def test_is_an_nn_linear_and_its_activation(self) -> None:
        torch.manual_seed(0)
        fused = pyperc.Linear(6, 3, activation=("elu", {"alpha": 0.5}), dtype=torch.float64)
        torch.manual_seed(0)
        linear = nn.Linear(6, 3, dtype=torch.float64)
        assert list(fused.state_dict()) == list(linear.state_dict())
        x = torch.randn(4, 6, dtype=torch.float64)
        torch.testing.assert_close(fused(x), F.elu(linear(x), 0.5))
        assert isinstance(fused, nn.Linear)
        assert str(fused) == "Linear(in_features=6, out_features=3, bias=True, activation='elu', alpha=0.5)"

    def test_its_attributes_are_read_on_every_call(self) -> None:
        linear = pyperc.Linear(6, 3, activation=nn.LeakyReLU(0.1), dtype=torch.float64)
        model = pyperc.nn.Sequential(linear)
        x = torch.randn(4, 6, dtype=torch.float64)
        for slope in (0.1, 0.4):
            linear.activation_parameters = (slope,)
            for module in (linear, model):
                torch.testing.assert_close(module(x), F.leaky_relu(F.linear(x, linear.weight, linear.bias), slope))
        linear.activation, linear.activation_parameters = "tanh", ()
        torch.testing.assert_close(model(x), F.linear(x, linear.weight, linear.bias).tanh())

    def test_within_a_container(self) -> None:
        model = pyperc.nn.Sequential(
            pyperc.Linear(6, 5, activation="relu"), nn.Tanh(), pyperc.Linear(5, 3), nn.Sigmoid()
        )
        assert ordinary_linears(agrees(model.double())) == 0

    def test_hooks_parametrisations_and_copies(self) -> None:
        linear = pyperc.Linear(6, 3, activation="tanh", dtype=torch.float64)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(linear)))
        x = torch.randn(4, 6, dtype=torch.float64)
        torch.testing.assert_close(twin(x), linear(x))
        parametrizations.weight_norm(linear)
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias).tanh())
        agrees(pyperc.nn.Sequential(linear, nn.ReLU()), x)

    def test_bad_activation_is_named(self) -> None:
        with pytest.raises(ValueError, match="got 'mish'"):
            pyperc.Linear(2, 2, activation="mish")

    def test_an_activation_in_the_place_of_the_bias(self) -> None:
        with pytest.raises(TypeError, match=r"bias must be True or False, got 'relu'; .* keyword, activation='relu'"):
            pyperc.Linear(2, 2, "relu")


def hooked(**register: Callable[..., Any]) -> Callable[[pyperc.MLP], None]:
    def hang(model: pyperc.MLP) -> None:
        for method, hook in register.items():
            getattr(model[2], method)(hook)

    return hang


def lora(model: pyperc.MLP) -> None:
    class LoRA(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear
            self.down = nn.Parameter(torch.randn(2, linear.in_features, dtype=torch.float64))
            self.up = nn.Parameter(torch.randn(linear.out_features, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + x @ self.down.T @ self.up.T

    model[2] = LoRA(model[2])


def own_forward(model: pyperc.MLP) -> None:
    layer = model[2]
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)


def subclass(model: pyperc.MLP) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model[2].__class__ = Doubled


def between(child: nn.Module) -> Callable[[pyperc.MLP], None]:
    return lambda model: model.insert(3, child) and None


HUNG = {
    "forward hook": hooked(register_forward_hook=lambda module, args, output: 2 * output),
    "forward pre-hook": hooked(register_forward_pre_hook=lambda module, args: (2 * args[0],)),
    "full backward hook": hooked(register_full_backward_hook=lambda module, dx, dy: (3 * dx[0],)),
    "full backward pre-hook": hooked(register_full_backward_pre_hook=lambda module, dy: (3 * dy[0],)),
    "two hooks": hooked(
        register_forward_hook=lambda module, args, output: output.sin(),
        register_full_backward_hook=lambda module, dx, dy: (3 * dx[0],),
    ),
    "hook with keywords": lambda model: (
        model[2].register_forward_hook(lambda m, a, k, y: 2 * y, with_kwargs=True) and None
    ),
    "hook on an activation": lambda model: model[3].register_forward_hook(lambda m, a, y: 2 * y) and None,
    "weight_norm": lambda model: parametrizations.weight_norm(model[2]) and None,
    "spectral_norm": lambda model: parametrizations.spectral_norm(model[2]).eval() and None,
    "weight_norm of old": lambda model: torch.nn.utils.weight_norm(model[2]) and None,
    "pruning": lambda model: prune.l1_unstructured(model[2], "weight", 0.5) and None,
    "LoRA in its place": lora,
    "forward of its own": own_forward,
    "class of its own": subclass,
    "LayerNorm between": between(nn.LayerNorm(7, dtype=torch.float64)),
    "Dropout between": between(nn.Dropout(0.5)),
    "function between": between(nn.Softmax(-1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
class TestWhatHangsOnALayer:
    @pytest.mark.parametrize("called_before", [False, True], ids=["before the first call", "after a call"])
    @pytest.mark.parametrize("hang", HUNG.values(), ids=HUNG)
    def test_is_never_passed_over(
        self, model: pyperc.MLP, hang: Callable[[pyperc.MLP], None], called_before: bool
    ) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        if called_before:
            model(x)
            assert ordinary_linears(model(x)) == 0
        hang(model)
        assert ordinary_linears(agrees(model, x)) <= 1  # the others stay fused

    def test_is_fused_again_without_it(self, model: pyperc.MLP) -> None:
        handle = model[2].register_forward_hook(lambda module, args, output: 2 * output)
        assert ordinary_linears(agrees(model)) == 1
        handle.remove()
        assert ordinary_linears(agrees(model)) == 0
        parametrizations.weight_norm(model[4])
        assert ordinary_linears(agrees(model)) == 1
        torch.nn.utils.parametrize.remove_parametrizations(model[4], "weight")
        assert ordinary_linears(agrees(model)) == 0

    def test_a_hook_may_hang_one_on_a_later_layer(self, model: pyperc.MLP) -> None:
        model(torch.zeros(1, 6).double())
        seen: list[str] = []

        def first(module: nn.Module, args: Any, output: Tensor) -> None:
            model[4].register_forward_hook(lambda module, args, output: seen.append("later"))

        handle = model[0].register_forward_hook(first)
        model(torch.zeros(1, 6).double())
        handle.remove()
        assert seen == ["later"]

    def test_global_hooks_see_every_module(self, model: pyperc.MLP) -> None:
        model(torch.zeros(1, 6).double())
        seen: list[nn.Module] = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
        try:
            model(torch.zeros(1, 6).double())
        finally:
            handle.remove()
        assert seen == [*model, model]

    def test_hooks_on_the_container_run(self, model: pyperc.MLP) -> None:
        model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        model.register_forward_hook(lambda module, args, output: output + 1)
        gradients: list[Tensor] = []
        model.register_full_backward_hook(lambda module, dx, dy: gradients.append(dy[0]))
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        y = model(x)
        torch.testing.assert_close(y, nn.Sequential(*model)(2 * x) + 1)
        y.sum().backward()
        assert len(gradients) == 1
        assert ordinary_linears(y) == 0

    def test_hooks_on_parameters_run(self, model: pyperc.MLP) -> None:
        model[2].weight.register_hook(lambda dw: 2 * dw)
        agrees(model)

    def test_a_forward_patched_into_the_class_runs(self, model: pyperc.MLP, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        before = model(x)
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
        agrees(model, x)
        monkeypatch.undo()
        torch.testing.assert_close(model(x), before)

    @pytest.mark.parametrize("owner", [(nn.Module, "__call__"), (F, "linear")], ids=["Module.__call__", "F.linear"])
    def test_what_is_patched_into_torch_is_called(
        self, model: pyperc.MLP, monkeypatch: pytest.MonkeyPatch, owner: tuple[Any, str]
    ) -> None:
        model(torch.zeros(1, 6).double())
        seen: list[Any] = []
        original = getattr(*owner)

        def patched(*args: Any, **keywords: Any) -> Any:
            seen.append(args[0])
            return original(*args, **keywords)

        monkeypatch.setattr(*owner, patched)
        agrees(model)
        seen.clear()
        model(torch.zeros(1, 6).double())
        assert len(seen) == (8 if owner[0] is nn.Module else 4)

    def test_a_child_compiled_on_its_own_stays_so(self, model: pyperc.MLP) -> None:
        model(torch.zeros(1, 6).double())
        model[2].compile(backend="eager")
        assert ordinary_linears(agrees(model)) == 1


class TestWhatChanges:
    def test_a_changed_slope_is_seen(self) -> None:
        model = pyperc.nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 4), nn.GELU()).double()
        agrees(model)
        model[1].negative_slope = 0.6
        model[3].approximate = "tanh"
        assert ordinary_linears(agrees(model)) == 0

    def test_a_negative_slope_is_computed(self) -> None:
        agrees(pyperc.MLP([6, 5, 3], ("leaky_relu", {"negative_slope": -0.3}), nn.ELU(-0.5), dtype=torch.float64))

    def test_replaced_children(self, model: pyperc.MLP) -> None:
        agrees(model)
        model[3] = nn.ReLU()
        model[6] = nn.Linear(4, 2).double()
        assert agrees(model).shape == (5, 2)
        model[4] = nn.Identity()
        model[6] = nn.Linear(7, 2).double()
        assert ordinary_linears(agrees(model)) == 0

    def test_append_insert_extend_and_delete(self, model: pyperc.MLP) -> None:
        agrees(model)
        model.append(nn.ReLU())
        agrees(model)
        model.extend([nn.Linear(3, 8).double(), nn.Sigmoid()])
        agrees(model)
        model.insert(0, nn.Linear(6, 6).double())
        agrees(model)
        del model[0]
        del model[-2:]
        model.pop(7)
        assert ordinary_linears(agrees(model)) == 0
        assert len(model) == 7

    def test_sums_and_products_are_fused(self) -> None:
        a = pyperc.MLP([4, 4, 4], dtype=torch.float64)
        for model in (a + a, a + nn.Sequential(nn.ReLU()), a * 2, 2 * a):
            assert type(model) is pyperc.nn.Sequential
            agrees(model)

    def test_dtype_and_device_moves(self, model: pyperc.MLP) -> None:
        agrees(model)
        assert agrees(model.float()).dtype == torch.float32
        assert agrees(model.to(torch.float64)).dtype == torch.float64
        assert agrees(model.bfloat16()).dtype == torch.bfloat16
        assert model.to("meta")(torch.zeros(2, 6, device="meta", dtype=torch.bfloat16)).shape == (2, 3)

    def test_steps_of_an_optimiser(self, model: pyperc.MLP) -> None:
        plain = nn.Sequential(*copy.deepcopy(model))
        x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
        for network in (model, plain):
            optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
            for _ in range(5):
                optimiser.zero_grad()
                F.mse_loss(network(x), y).backward()
                optimiser.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict())


class TestParameters:
    def test_shared(self) -> None:
        linear = nn.Linear(6, 6).double()
        tied = nn.Linear(6, 6).double()
        tied.weight = linear.weight
        assert ordinary_linears(agrees(pyperc.nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh(), tied))) == 0

    def test_frozen_one_by_one(self, model: pyperc.MLP) -> None:
        model[2].weight.requires_grad_(False)
        model[4].bias.requires_grad_(False)
        model[6].requires_grad_(False)
        agrees(model)
        model(torch.zeros(2, 6).double()).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == [
            "2.weight",
            "4.bias",
            "6.weight",
            "6.bias",
        ]

    def test_gradients_accumulate(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        model(x).sum().backward()
        once = [p.grad.clone() for p in model.parameters()]
        model(x).sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in once])

    def test_plain_tensors_in_their_place(self, model: pyperc.MLP) -> None:
        agrees(model)
        weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        del model[2].weight
        model[2].weight = 2 * weight
        del model[4].bias
        model[4].register_buffer("bias", torch.ones(4).double())
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = nn.Sequential(*model)(x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(m(x).sum(), weight, retain_graph=True) for m in (model, nn.Sequential(*model)))
        )

    def test_a_bias_that_broadcasts(self, model: pyperc.MLP) -> None:
        model[2].bias = nn.Parameter(torch.randn(1, dtype=torch.float64))
        agrees(model)

    def test_functional_call(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        agrees(model)
        doubled = {name: 2 * p for name, p in model.named_parameters()}
        plain = nn.Sequential(*model)
        torch.testing.assert_close(*(torch.func.functional_call(m, doubled, x) for m in (model, plain)))

    def test_ensemble_of_stacked_parameters(self) -> None:
        models = [pyperc.MLP([6, 5, 3], dtype=torch.float64) for _ in range(4)]
        parameters, _ = torch.func.stack_module_state(models)
        x = torch.randn(5, 6, dtype=torch.float64)
        one = lambda parameters, x: torch.func.functional_call(models[0], parameters, x)  # noqa: E731
        stacked = torch.func.vmap(one, in_dims=(0, None))(parameters, x)
        torch.testing.assert_close(stacked, torch.stack([model(x) for model in models]))

    def test_per_sample_gradients(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda network, p, x: torch.func.functional_call(network, p, x).square().sum()  # noqa: E731
        fused, plain = (
            torch.func.vmap(torch.func.grad(lambda p, x, m=m: loss(m, p, x)), in_dims=(None, 0))(parameters, x)
            for m in (model, nn.Sequential(*model))
        )
        torch.testing.assert_close(fused, plain)


class TestCopies:
    def test_deepcopy_and_pickle(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(twin) is pyperc.MLP
            assert twin[0] is not model[0]
            torch.testing.assert_close(twin(x), expected)
            with torch.no_grad():
                twin[0].weight.zero_()
            torch.testing.assert_close(model(x), expected)

    def test_a_shallow_copy_keeps_the_children(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        model(x)
        twin = copy.copy(model)
        assert twin[0] is model[0]
        torch.testing.assert_close(twin(x), model(x))

    def test_nothing_kept_shows_in_the_state(self, model: pyperc.MLP) -> None:
        before = pickle.dumps(model)
        model(torch.zeros(2, 6).double())
        assert pickle.dumps(model) == before


class TestTheRestOfTorch:
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_derivatives_of_higher_order_and_forward_mode(self, model: pyperc.MLP) -> None:
        x, v = torch.randn(2, 5, 6, dtype=torch.float64)
        hessian = lambda m: torch.autograd.functional.hessian(lambda x: m(x).square().sum(), x)  # noqa: E731
        torch.testing.assert_close(hessian(model), hessian(nn.Sequential(*model)))
        jvp = lambda m: torch.func.jvp(m, (x,), (v,))  # noqa: E731
        torch.testing.assert_close(jvp(model), jvp(nn.Sequential(*model)))

    def test_checkpointing_and_saved_tensor_hooks(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        leaves = list(model.parameters())
        expected = results(nn.Sequential(*model), leaves, x)
        again = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # noqa: E731
        torch.testing.assert_close(results(again, leaves, x), expected)
        with torch.autograd.graph.save_on_cpu():
            torch.testing.assert_close(results(model, leaves, x), expected)

    def test_several_threads_at_once(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = nn.Sequential(*model)(x)

        def work(n: int) -> bool:
            if n % 10 == 0:
                model[n % 3].register_forward_hook(lambda *args: None).remove()
            return torch.allclose(model(x), expected)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(200)))

    def test_no_grad_and_inference_mode(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        expected = nn.Sequential(*model)(x).detach()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                y = model(x)
                assert not y.requires_grad
                torch.testing.assert_close(y, expected)

    def test_compile_records_one_operator(self, model: pyperc.MLP) -> None:
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        model.append(nn.LayerNorm(3).double())
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        x = torch.randn(5, 6, dtype=torch.float64)
        leaves = list(model.parameters())
        torch.testing.assert_close(results(compiled, leaves, x), results(nn.Sequential(*model), leaves, x))
        targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert targets.count(torch.ops.pyperc.mlp.default) == 1
        assert F.linear not in targets
        assert torch._C._nn.linear not in targets

    def test_export(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        exported = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(exported.module()(x), model(x))

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_jit_trace_records_the_layers(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        traced = torch.jit.trace(model, x)
        other = torch.randn(8, 6, dtype=torch.float64)
        torch.testing.assert_close(traced(other), model(other))
        assert str(traced.inlined_graph).count("aten::linear") == 4

    def test_symbolic_trace_records_the_layers(self, model: pyperc.MLP) -> None:
        x = torch.randn(5, 6, dtype=torch.float64)
        graph = torch.fx.symbolic_trace(model)
        assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * 7, "output"]
        torch.testing.assert_close(graph(x), model(x))

    def test_dispatch_modes_see_the_products(self, model: pyperc.MLP) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        x = torch.randn(5, 6, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 2 * 5 * (6 * 5 + 5 * 7 + 7 * 4 + 4 * 3)

    def test_function_modes_and_subclasses_see_the_products(self, model: pyperc.MLP) -> None:
        seen: list[Any] = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        class Watching(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                seen.append(func)
                return super().__torch_function__(func, types, args, kwargs)

        x = torch.randn(5, 6, dtype=torch.float64)
        expected = model(x)
        with Watch():
            torch.testing.assert_close(model(x), expected)
        assert seen.count(F.linear) == 4
        seen.clear()
        y = model(x.as_subclass(Watching))
        assert seen.count(F.linear) == 4
        assert isinstance(y, Watching)

    def test_a_default_device_keeps_it_fused(self, model: pyperc.MLP) -> None:
        with torch.device("cpu"):
            assert ordinary_linears(agrees(model)) == 0

    def test_autocast(self, model: pyperc.MLP) -> None:
        model, x = model.float(), torch.randn(5, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, nn.Sequential(*model)(x))

    @pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:Complex modules:UserWarning")
    def test_complex_and_nested_tensors_go_to_torch(self) -> None:
        agrees(pyperc.nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(torch.complex128))
        model = pyperc.MLP([6, 5, 3], dtype=torch.float64)
        parts = [torch.randn(n, 6, dtype=torch.float64) for n in (2, 4)]
        for layout in (torch.strided, torch.jagged):
            nested = torch.nested.nested_tensor(parts, layout=layout)
            for y, x in zip(model(nested).unbind(), parts, strict=True):
                torch.testing.assert_close(y, model(x))

    def test_what_torch_refuses_too_is_refused_in_our_words(self, model: pyperc.MLP) -> None:
        for x in (torch.zeros(5, 6), torch.zeros(5, 6, dtype=torch.int64), [1.0]):
            with pytest.raises(TypeError, match="mlp: "):
                model(x)
        with pytest.raises(ValueError, match=r"mlp: .*weights\[0\]"):
            model(torch.zeros(5, 7, dtype=torch.float64))

    def test_an_input_of_any_kind_reaches_a_first_child_that_takes_it(self) -> None:
        class Concatenate(nn.Module):
            def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
                return torch.cat(pair, -1)

        model = pyperc.nn.Sequential(Concatenate(), nn.Linear(6, 3), nn.ReLU()).double()
        pair = torch.randn(2, 5, 2, dtype=torch.float64).unbind()[0], torch.randn(5, 4, dtype=torch.float64)
        torch.testing.assert_close(model(pair), nn.Sequential(*model)(pair))

    def test_an_empty_container_returns_its_input(self) -> None:
        x = torch.randn(3)
        assert pyperc.nn.Sequential()(x) is x

    def test_activations_that_follow_no_linear_layer(self) -> None:
        model = pyperc.nn.Sequential(nn.ReLU(), nn.Linear(6, 5), nn.Identity(), nn.ReLU(), nn.Tanh(), nn.Identity())
        assert ordinary_linears(agrees(model.double(), torch.randn(5, 6).double())) == 0

    def test_in_place_activations(self) -> None:
        model = pyperc.nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ELU(inplace=True))
        assert ordinary_linears(agrees(model.double())) == 0

    def test_what_follows_may_work_in_place(self) -> None:
        """torch's LeakyReLU reads its derivative from its input, so what comes after may overwrite its output."""
        model = pyperc.nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(), nn.Dropout(0.5), nn.Linear(5, 3), nn.ReLU6(True))
        agrees(model.double())
        model[2].inplace = True
        agrees(model)
