"""pyperc.functional and the ways to write an activation, against F.linear and torch's own activations."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyperc
from pyperc import functional
from pyperc.activation import Activation, module, of_module, resolve

NAMES = pyperc.activations()


def tensors(*sizes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x [5, sizes[0]], and the weights and biases of a network of these sizes, all wanting gradients."""
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()  # noqa: E731
    pairs = list(itertools.pairwise(sizes))
    return make(5, sizes[0]), [make(n, k) for k, n in pairs], [make(n) for _, n in pairs]


def agree(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and, for a cotangent of random numbers, the gradient of every leaf."""
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, leaves, dy, True, materialize_grads=True) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_the_names_are_those_of_the_native_list() -> None:
    assert {"identity", "relu", "gelu_tanh", "heaviside", "sign"} <= set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_linear_agrees_with_the_module_of_the_activation(name: str, dtype: torch.dtype) -> None:
    x, (w,), (b,) = tensors(7, 3, dtype=dtype)
    expected = module(name)(F.linear(x, w, b))
    agree(functional.linear(x, w, b, name), expected, [x, w, b])
    agree(functional.linear(x, w, activation=name), module(name)(F.linear(x, w)), [x, w])


@pytest.mark.parametrize(
    "activation",
    [
        ("leaky_relu", {"negative_slope": 0.3}),
        ("elu", {"alpha": 0.7}),
        ("softplus", {"beta": 2, "threshold": 1.5}),
        ("hardtanh", {"min_val": -0.5, "max_val": 0.25}),
    ],
    ids=lambda activation: activation[0],
)
def test_parameters_of_an_activation_are_honoured(activation: tuple[str, dict[str, float]]) -> None:
    x, (w,), (b,) = tensors(7, 3)
    name, parameters = activation
    expected = getattr(F, name)(F.linear(x, w, b), **parameters)
    agree(functional.linear(x, w, b, activation), expected, [x, w, b])
    agree(functional.linear(x, w, b, module(activation)), expected, [x, w, b])


def test_mlp_agrees_with_a_loop_over_linear() -> None:
    x, w, b = tensors(6, 5, 4, 3)
    activations = ["tanh", ("leaky_relu", {"negative_slope": 0.2}), nn.GELU(approximate="tanh")]
    s = F.leaky_relu(F.linear(torch.tanh(F.linear(x, w[0], b[0])), w[1], None), 0.2)
    expected = F.gelu(F.linear(s, w[2], b[2]), approximate="tanh")
    agree(functional.mlp(x, w, [b[0], None, b[2]], activations), expected, [x, *w, b[0], b[2]])


@pytest.mark.parametrize("what", ["x", "weight", "bias"])
@pytest.mark.parametrize("trained", [False, True])
def test_lazily_negated_tensors_are_read_with_their_sign(what: str, trained: bool) -> None:
    numbers = {"x": torch.randn(5, 4), "weight": torch.randn(3, 4), "bias": torch.randn(3)}
    numbers["weight"].requires_grad_(trained)
    want = nn.functional.linear(**{name if name != "x" else "input": t for name, t in numbers.items()})
    numbers[what] = torch._neg_view(-numbers[what])
    assert numbers[what].is_neg()
    torch.testing.assert_close(pyperc.functional.linear(*numbers.values()), want)


def test_mlp_without_any_bias() -> None:
    x, w, _ = tensors(6, 5, 3)
    expected = F.linear(F.linear(x, w[0]).relu(), w[1])
    agree(functional.mlp(x, w, None, ["relu", "identity"]), expected, [x, *w])


def test_mlp_takes_any_leading_dimensions_and_iterables() -> None:
    x, w, b = tensors(6, 5, 3)
    folded = x.detach()[:4].reshape(2, 2, 6)
    expected = F.linear(F.linear(folded, w[0], b[0]).relu(), w[1], b[1])
    agree(functional.mlp(folded, (t for t in w), iter(b), ("relu", "identity")), expected, [*w, *b])
    torch.testing.assert_close(functional.mlp(folded[0, 0], w, b, ["relu", "identity"]), expected[0, 0])


def test_a_tensor_subclass_is_shown_the_call() -> None:
    seen = []

    class Watching(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x, w, b = tensors(6, 5, 3)
    y = functional.mlp(x.detach().as_subclass(Watching), w, b, ["relu", "identity"])
    assert functional.mlp in seen
    assert isinstance(y, Watching)
    torch.testing.assert_close(y.as_subclass(Tensor), functional.mlp(x, w, b, ["relu", "identity"]))
    y = functional.linear(x, w[0].detach().as_subclass(Watching), activation="tanh")
    assert functional.linear in seen
    assert isinstance(y, Watching)


def test_vmap_and_grad_of_torch_func() -> None:
    x, w, b = tensors(6, 5, 3)
    xs = torch.randn(4, 5, 6, dtype=x.dtype)

    def loss(f, x: Tensor, w0: Tensor) -> Tensor:
        return f(x, [w0, w[1].detach()], [b[0].detach(), b[1].detach()]).square().sum()

    fused = lambda x, w, b: functional.mlp(x, w, b, ["tanh", "identity"])  # noqa: E731
    plain = lambda x, w, b: F.linear(F.linear(x, w[0], b[0]).tanh(), w[1], b[1])  # noqa: E731
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda w0, x, f=f: loss(f, x, w0)), in_dims=(None, 0))(w[0].detach(), xs)
        for f in (fused, plain)
    ]
    torch.testing.assert_close(*per_sample)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jit_trace_records_the_call() -> None:
    x, w, b = tensors(6, 5, 3)
    w, b = [t.detach() for t in w], [t.detach() for t in b]
    traced = torch.jit.trace(lambda x: functional.mlp(x, w, b, ["relu", "identity"]), x.detach())
    other = torch.randn(9, 6, dtype=x.dtype)
    torch.testing.assert_close(traced(other), functional.mlp(other, w, b, ["relu", "identity"]))


def test_compile_records_one_operator() -> None:
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    x, w, b = tensors(6, 5, 3)
    f = torch.compile(
        lambda x: functional.mlp(x, w, b, ["relu", ("elu", {"alpha": 0.5})]), backend=backend, fullgraph=True
    )
    agree(f(x), F.elu(F.linear(F.linear(x, w[0], b[0]).relu(), w[1], b[1]), 0.5), [x, *w, *b])
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [
        torch.ops.pyperc.mlp.default
    ]


def test_bad_input_is_named() -> None:
    x, w, b = tensors(6, 5, 3)
    relu = ["relu", "identity"]
    cases = [
        (lambda: functional.mlp(x, w, b, "relu"), TypeError, "activations must be a sequence.*got 'relu'"),
        (
            lambda: functional.mlp(x, w, b, ["relu"]),
            ValueError,
            "activations must have one entry for each of the 2.*got 1",
        ),
        (lambda: functional.mlp(x, w, b[:1], relu), ValueError, "biases must have one entry for each of the 2.*got 1"),
        (lambda: functional.mlp(x, w[0], b, relu), TypeError, "weights must be a sequence of Tensors, got Tensor"),
        (lambda: functional.mlp(x, [w[0], None], b, relu), TypeError, r"weights\[1\] must be a Tensor, got NoneType"),
        (lambda: functional.mlp(x, w, [b[0], 1.0], relu), TypeError, r"biases\[1\] must be a Tensor, got float"),
        (lambda: functional.mlp([1.0], w, b, relu), TypeError, "x must be a Tensor, got list"),
        (lambda: functional.mlp(x, w, b, ["relu", "mish"]), ValueError, "one of identity, relu, .*got 'mish'"),
        (lambda: functional.linear(x, [1.0]), TypeError, "weight must be a Tensor, got list"),
        (lambda: functional.linear(x, w[0], 1.0), TypeError, "bias must be a Tensor or None, got float"),
        (lambda: functional.linear(x, w[0], activation=3), TypeError, "activation must be a name.*got 3"),
        (lambda: functional.mlp(x, w[::-1], b[::-1], relu), ValueError, r"weights\[0\]"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


class TestActivation:
    @pytest.mark.parametrize("name", NAMES)
    def test_the_module_of_a_name_resolves_to_that_name(self, name: str) -> None:
        assert of_module(module(name)) == resolve(name) == resolve(resolve(name)) == resolve(module(name))

    @pytest.mark.parametrize("name", NAMES)
    def test_by_name_it_computes_what_the_module_does(self, name: str) -> None:
        x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
        agree(Activation(name)(x), module(name)(x), [x])

    def test_torch_classes_follow_from_the_list(self) -> None:
        assert type(module("silu")) is nn.SiLU
        assert type(module("leaky_relu")) is nn.LeakyReLU
        assert type(module("identity")) is nn.Identity
        assert module("gelu").approximate == "none"
        assert module("gelu_tanh").approximate == "tanh"
        assert module(("softplus", {"beta": 3})).beta == 3
        assert type(module("heaviside")) is Activation

    def test_the_threshold_units_have_no_slope(self) -> None:
        x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        for name, expected in {"heaviside": [0.0, 1.0, 1.0], "sign": [-1.0, 1.0, 1.0]}.items():
            y = Activation(name)(x)
            assert y.tolist() == expected
            assert torch.autograd.grad(y.sum(), x, materialize_grads=True)[0].tolist() == [0.0, 0.0, 0.0]

    def test_a_subclass_is_another_activation(self) -> None:
        class Own(nn.ReLU):
            pass

        assert of_module(Own()) is None
        assert of_module(nn.ReLU6()) is None
        assert of_module(nn.PReLU()) is None

    def test_parameters_that_are_no_numbers_are_not_fused(self) -> None:
        leaky = nn.LeakyReLU(0.1)
        leaky.negative_slope = torch.tensor(0.1)
        assert of_module(leaky) is None
        gelu = nn.GELU()
        gelu.approximate = "other"
        assert of_module(gelu) is None

    def test_prints_copies_and_pickles(self) -> None:
        activation = pyperc.nn.Activation("hardtanh", min_val=-2)
        assert str(activation) == "Activation('hardtanh', min_val=-2, max_val=1)"
        for twin in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
            assert of_module(twin) == ("hardtanh", (-2.0, 1.0))

    def test_bad_input_is_named(self) -> None:
        cases = [
            (lambda: Activation("mish"), ValueError, "one of identity, relu,.* got 'mish'"),
            (lambda: Activation("relu", slope=1), ValueError, "a parameter of relu must be left out.*got 'slope'"),
            (lambda: Activation("elu", beta=1), ValueError, "a parameter of elu must be one of alpha, got 'beta'"),
            (lambda: Activation("elu", alpha="1"), TypeError, "alpha of elu must be a number, got str"),
            (lambda: resolve(("elu", (1.0, 2.0))), ValueError, "elu must have 1 parameters"),
            (lambda: resolve(nn.PReLU()), ValueError, "must compute one of identity.*got PReLU"),
            (lambda: resolve(None), TypeError, "activation must be a name.*got None"),
        ]
        for call, error, text in cases:
            with pytest.raises(error, match=text):
                call()
