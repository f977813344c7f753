"""The output of a network by value against float64: activations, dtypes, sizes around the tiles, layouts, threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference import ACTIVATIONS, ALTERED, Activation, Network, check_forward, draw, formula, named, native
from shapes import EVERY_DTYPE, LAYOUTS, awkward_sizes, networks_around_the_tile, spread_leads, strided

from pyperc import _C

RELU, TANH, GELU = named("relu"), named("tanh"), named("gelu")


@pytest.mark.parametrize("info", _C.activations(), ids=lambda info: info.name)
def test_every_activation_has_a_reference(info: _C.ActivationInfo) -> None:
    assert callable(formula(info.name, info.parameters))
    assert info.saved in ("nothing", "output", "summation")
    assert len(info.parameters) == len(info.defaults)


def test_an_activation_without_a_reference_is_named() -> None:
    with pytest.raises(LookupError, match=r"'unheard_of' has no reference.*tests/reference\.py.*slope=\.\.\."):
        formula("unheard_of", ["slope"])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)
def test_one_to_six_layers(isa: str, dtype: torch.dtype, activation: Activation, bias: bool) -> None:
    for net in networks_around_the_tile(isa, dtype, activation, bias):
        assert _C.plan(net.x, net.w, net.b, net.chain)["path"] == "native"
        check_forward(net)


@pytest.mark.parametrize("k", [1, 2, 7, 16, 33, 130])
def test_sizes_around_the_tile(isa: str, dtype: torch.dtype, k: int) -> None:
    sizes = awkward_sizes(isa, dtype)
    for m in sizes:
        for n in sizes:
            check_forward(draw([k, n], m, TANH, dtype, bias=n % 2 == 1, seed=m))


@EVERY_DTYPE
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 17, 1000])
def test_batches(isa: str, dtype: torch.dtype, batch: int) -> None:
    check_forward(draw([37, 65, 10], batch, [RELU, named("identity")], dtype))
    check_forward(draw([10, 101, 1], batch, GELU, dtype))


@pytest.mark.parametrize("k", [1024, 1025, 2048, 2049, 4100])
@pytest.mark.parametrize("m", [1, 5, 70])
def test_a_long_sum_spans_cache_blocks(isa: str, dtype: torch.dtype, m: int, k: int) -> None:
    check_forward(draw([k, 45], m, RELU, dtype))


@pytest.mark.parametrize("sizes", [[13, 1100], [1100, 13], [520, 530, 7]], ids=lambda s: "x".join(map(str, s)))
def test_wide_layers_span_cache_blocks(isa: str, dtype: torch.dtype, sizes: list[int]) -> None:
    check_forward(draw(sizes, 70, RELU, dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("columns", [1024, 1000, 600])
def test_rows_4096_bytes_apart(isa: str, dtype: torch.dtype, columns: int) -> None:
    net = draw([columns, 80, 33], 50, [TANH, TANH], dtype)
    net.x = strided(net.x, 1024)
    net.w[0] = strided(net.w[0], 1024)
    assert net.x.stride() == net.w[0].stride() == (1024, 1)
    check_forward(net)


@EVERY_DTYPE
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[300, 260, 300], [64, 64, 64], [17, 900]], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("batch", [3, 64, 700])
def test_threads(dtype: torch.dtype, batch: int, sizes: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    check_forward(draw(sizes, batch, GELU, dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__doc__)
def test_layouts_of_the_input(isa: str, dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for m, k in [(2, 3), (17, 40), (70, 33)]:
        net = draw([k, 35, 4], m, TANH, dtype)
        net.x = layout(net.x)
        check_forward(net)


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__doc__)
def test_layouts_of_the_weights_and_biases(
    isa: str, dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for sizes in ([33, 40], [2, 3], [40, 7]):
        net = draw(sizes, 19, TANH, dtype)
        check_forward(replace(net, w=[layout(net.w[0])], b=[layout(net.b[0].expand(3, -1))[1]]))
        check_forward(replace(net, b=[torch.randn(2 * sizes[1], dtype=dtype)[::2]]))
        check_forward(replace(net, b=[torch.randn(1, dtype=dtype).expand(sizes[1])]))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (2, 3, 1, 2), (2, 0, 3), (1, 1)], ids=str)
def test_leading_dimensions(isa: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    net = draw([9, 20, 4], lead, RELU, dtype)
    check_forward(net)
    assert native(net).shape == (*lead, 4)


@EVERY_DTYPE
def test_leading_dimensions_that_cannot_be_viewed_as_one(isa: str, dtype: torch.dtype) -> None:
    net = draw([9, 20, 4], (6, 5), TANH, dtype)
    net.x = net.x.transpose(0, 1)
    net.dy = net.dy.transpose(0, 1)
    check_forward(net)


@pytest.mark.parametrize("lead", [(2, 1, 3), (2, 1, 1, 2), (1, 3, 1), (3, 1), (2, 3)], ids=str)
def test_leading_dimensions_of_size_one_between_others(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """The stride of a dimension of size one says nothing of how the rows lie."""
    for sizes in ([1, 1], [3, 4]):
        net = draw(sizes, lead, TANH, dtype)
        for x in spread_leads(net.x):
            check_forward(replace(net, x=x))


@EVERY_DTYPE
@pytest.mark.parametrize("bias", [[True, False, True], [False, True, False], [False, False, True]], ids=str)
def test_biases_of_some_layers(isa: str, dtype: torch.dtype, bias: list[bool]) -> None:
    check_forward(draw([9, 20, 33, 4], 18, TANH, dtype, bias=bias))


def test_a_different_activation_in_each_layer(isa: str, dtype: torch.dtype) -> None:
    kinds = ACTIVATIONS + ALTERED
    for first in range(0, len(kinds), 3):
        activations = [kinds[(first + i) % len(kinds)] for i in range(6)]
        check_forward(draw([19, 20, 33, 40, 17, 50, 4], 18, activations, dtype))


def test_the_output_is_an_ordinary_tensor(isa: str, dtype: torch.dtype) -> None:
    net = draw([9, 20, 6], (4, 5), TANH, dtype)
    y = native(net)
    assert y.is_contiguous()
    assert y.storage_offset() == 0
    assert torch.equal(y.view(20, 6)[7], y[1, 2])
    assert torch.equal(y.transpose(0, 2)[3, 4], y[:, 4, 3])
    again = native(net)
    assert again.data_ptr() != y.data_ptr()
    y.zero_()
    assert peak_of(again) > 0


@EVERY_DTYPE
def test_the_output_of_an_identity_network_is_no_alias_of_its_input(isa: str, dtype: torch.dtype) -> None:
    net = Network(
        torch.randn(3, 3, dtype=dtype),
        [torch.eye(3, dtype=dtype)],
        [None],
        [named("identity")],
        torch.ones(3, 3, dtype=dtype),
    )
    y = native(net)
    assert torch.equal(y, net.x)
    assert y.data_ptr() != net.x.data_ptr()


def test_inputs_are_left_alone(isa: str, dtype: torch.dtype) -> None:
    net = draw([33, 40, 7], 19, RELU, dtype)
    before = {name: tensor.clone() for name, tensor in net.leaves.items()}
    native(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.leaves.items())


def test_an_affine_network_is_one_affine_layer(isa: str, dtype: torch.dtype) -> None:
    """Lecture 3.4: with an affine f the whole network is affine, w = w(2) w(1) and b = w(2) b(1) + b(2)."""
    net = draw([30, 40, 20], 25, named("identity"), dtype)
    w, b = net.w[1] @ net.w[0], net.w[1] @ net.b[0] + net.b[1]
    collapsed = _C.mlp(net.x, [w], [b], _C.Chain([("identity", [])]))
    torch.testing.assert_close(native(net), collapsed)


@EVERY_DTYPE
def test_threshold_units_compute_boolean_functions(isa: str, dtype: torch.dtype) -> None:
    """Lecture 3.1: or is 1{u + v - 0.5 >= 0}, and is 1{u + v - 1.5 >= 0}, not is 1{-u + 0.5 >= 0}.

    At 0 the unit is 1 and sign is +1.
    """
    uv = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=dtype)
    w, b = torch.tensor([[1, 1], [1, 1], [-1, 0]], dtype=dtype), torch.tensor([-0.5, -1.5, 0.5], dtype=dtype)
    got = _C.mlp(uv, [w], [b], _C.Chain([("heaviside", [])]))
    assert got.tolist() == [[0, 0, 1], [1, 0, 1], [1, 0, 0], [1, 1, 0]]
    zero = torch.zeros(5, 3, dtype=dtype)
    for name in ("heaviside", "sign"):
        assert (_C.mlp(zero, [torch.ones(37, 3, dtype=dtype)], [None], _C.Chain([(name, [])])) == 1).all()


def peak_of(t: torch.Tensor) -> float:
    return t.abs().max().item()
