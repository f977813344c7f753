"""dx, dw and db by value against the formulas of back-propagation in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference import ACTIVATIONS, ALTERED, Activation, check, draw, exact, named, native, peak, results
from shapes import EVERY_DTYPE, LAYOUTS, awkward_sizes, networks_around_the_tile, spread_leads, strided

RELU, TANH, GELU, IDENTITY = named("relu"), named("tanh"), named("gelu"), named("identity")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)
def test_one_to_six_layers(isa: str, dtype: torch.dtype, activation: Activation, bias: bool) -> None:
    for net in networks_around_the_tile(isa, dtype, activation, bias):
        check(net)


@pytest.mark.parametrize("k", [1, 7, 33])
def test_sizes_around_the_tile(isa: str, dtype: torch.dtype, k: int) -> None:
    sizes = awkward_sizes(isa, dtype)
    for m in sizes:
        for n in sizes:
            check(draw([k, n], m, TANH, dtype, bias=n % 2 == 1, seed=m))


@EVERY_DTYPE
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 17, 1000])
def test_batches(isa: str, dtype: torch.dtype, batch: int) -> None:
    check(draw([37, 65, 10], batch, [RELU, IDENTITY], dtype))
    check(draw([10, 101, 1], batch, GELU, dtype))


@EVERY_DTYPE
def test_an_empty_batch_has_gradients_of_zero(dtype: torch.dtype) -> None:
    got = results(native, draw([37, 65, 10], 0, RELU, dtype))
    assert got["dx"].shape == (0, 37)
    assert all((value == 0).all() for name, value in got.items() if name not in ("y", "dx"))


@EVERY_DTYPE
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [[0, 40, 3], [1100, 0, 1100], [40, 1100, 0], [0, 0, 5], [40, 0, 1100, 1100]], ids=str)
def test_a_layer_of_width_0(dtype: torch.dtype, sizes: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    for batch in ((0,), (1,), (2, 150)):
        check(draw(sizes, batch, [GELU, RELU, RELU][: len(sizes) - 1], dtype))


@pytest.mark.parametrize("size", [1024, 1025, 2049])
@pytest.mark.parametrize("which", ["inputs", "outputs", "samples"])
def test_a_long_sum_spans_cache_blocks(isa: str, dtype: torch.dtype, which: str, size: int) -> None:
    k, n, m = {"inputs": (size, 45, 13), "outputs": (45, size, 13), "samples": (13, 45, size)}[which]
    check(draw([k, n], m, TANH, dtype))


def test_wide_layers_span_cache_blocks(isa: str, dtype: torch.dtype) -> None:
    check(draw([520, 530, 300], 70, RELU, dtype))
    check(draw([600, 513, 260], 300, TANH, dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("columns", [1024, 600])
def test_rows_4096_bytes_apart(isa: str, dtype: torch.dtype, columns: int) -> None:
    net = draw([columns, 80, 512], 50, TANH, dtype)
    net.x, net.w[0], net.dy = strided(net.x, 1024), strided(net.w[0], 1024), strided(net.dy, 1024)
    assert net.x.stride() == net.w[0].stride() == net.dy.stride() == (1024, 1)
    check(net)


@EVERY_DTYPE
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (3, [300, 260, 300]),
        (700, [40, 30, 50]),
        (64, [64, 64, 64]),
        (257, [17, 400]),
        (600, [20, 350]),
        (130, [256, 129, 120]),
        (5, [9, 7]),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "x".join(map(str, v)),
)
def test_threads(dtype: torch.dtype, batch: int, sizes: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    check(draw(sizes, batch, GELU, dtype))
    check(draw(sizes, batch, RELU, dtype))


@pytest.mark.parametrize("batch", [1, 5, 16, 17, 100])
def test_more_threads_than_there_is_work_for(dtype: torch.dtype, batch: int) -> None:
    torch.set_num_threads(9)
    check(draw([300, 7, 290, 300], batch, GELU, dtype))


def subsets() -> list[tuple[str, ...]]:
    names = ["dx", "dw[0]", "db[0]", "dw[1]", "db[1]"]
    return [c for size in range(1, 6) for c in itertools.combinations(names, size)]


@EVERY_DTYPE
@pytest.mark.parametrize("needed", subsets(), ids=" ".join)
@pytest.mark.parametrize("activation", [RELU, GELU], ids=str)
def test_each_subset_of_gradients(dtype: torch.dtype, activation: Activation, needed: tuple[str, ...]) -> None:
    net = draw([21, 34, 5], 18, activation, dtype)
    leaves = net.requires_grad(lambda name: name in needed)
    y = native(leaves)
    assert y.requires_grad
    y.backward(net.dy)
    got = {name: leaf.grad for name, leaf in leaves.leaves.items()}
    assert {name for name, grad in got.items() if grad is not None} == set(needed)
    check(net, {name: got[name] for name in needed})


@pytest.mark.parametrize("asked", subsets(), ids=" ".join)
def test_each_subset_asked_of_a_network_that_needs_all(dtype: torch.dtype, asked: tuple[str, ...]) -> None:
    net = draw([21, 34, 5], 18, TANH, dtype)
    leaves = net.requires_grad()
    got = torch.autograd.grad(native(leaves), [leaves.leaves[name] for name in asked], net.dy)
    check(net, dict(zip(asked, got, strict=True)))


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__doc__)
def test_layouts(isa: str, dtype: torch.dtype, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for m, k in [(2, 3), (17, 40), (70, 33)]:
        net = draw([k, 35, 4], m, GELU, dtype)
        check(replace(net, x=layout(net.x)))
        net = draw([k, 35], m, TANH, dtype)
        check(replace(net, w=[layout(net.w[0])], b=[layout(net.b[0].expand(3, -1))[1]]))


@EVERY_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__doc__)
@pytest.mark.parametrize("activation", [IDENTITY, RELU, GELU], ids=str)
def test_layouts_of_the_incoming_gradient(
    isa: str, dtype: torch.dtype, activation: Activation, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for m, n in [(3, 2), (17, 40), (70, 33)]:
        net = draw([11, n], m, activation, dtype)
        net.dy = layout(net.dy)
        check(net)


def test_the_expanded_gradient_of_a_sum(isa: str, dtype: torch.dtype) -> None:
    net = draw([11, 30, 33], 20, TANH, dtype)
    net.dy = torch.ones((), dtype=dtype).expand(20, 33)
    leaves = net.requires_grad()
    native(leaves).sum().backward()
    check(net, {name: leaf.grad for name, leaf in leaves.leaves.items()})


def test_gradients_through_views_of_the_output(isa: str, dtype: torch.dtype) -> None:
    net = draw([11, 30, 12], (4, 5), TANH, dtype)
    mask = torch.zeros(4, 5, 12, dtype=dtype)
    mask[:, ::2] = torch.randn(4, 3, 12, dtype=dtype)
    leaves = net.requires_grad()
    (native(leaves).transpose(0, 2)[:, ::2] * mask.transpose(0, 2)[:, ::2]).sum().backward()
    net.dy = mask
    check(net, {name: leaf.grad for name, leaf in leaves.leaves.items()})


@EVERY_DTYPE
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (2, 3, 1, 2), (2, 0, 3)], ids=str)
def test_leading_dimensions(isa: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    check(draw([9, 20, 4], lead, RELU, dtype))


def test_leading_dimensions_that_cannot_be_viewed_as_one(isa: str, dtype: torch.dtype) -> None:
    net = draw([9, 20, 4], (6, 5), TANH, dtype)
    net.x, net.dy = net.x.transpose(0, 1), net.dy.transpose(0, 1)
    check(net)


@pytest.mark.parametrize("lead", [(2, 1, 3), (2, 1, 1, 2), (1, 3, 1), (3, 1), (2, 3)], ids=str)
def test_leading_dimensions_of_size_one_between_others(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """The stride of a dimension of size one says nothing of how the rows lie."""
    for sizes in ([1, 1], [3, 4]):
        net = draw(sizes, lead, TANH, dtype)
        for x, dy in zip(spread_leads(net.x), spread_leads(net.dy), strict=True):
            check(replace(net, x=x))
            check(replace(net, dy=dy))


@pytest.mark.parametrize("bias", [[True, False, True], [False, True, False], [False, False, True]], ids=str)
def test_biases_of_some_layers(isa: str, dtype: torch.dtype, bias: list[bool]) -> None:
    check(draw([9, 20, 33, 4], 18, TANH, dtype, bias=bias))


def test_a_different_activation_in_each_layer(isa: str, dtype: torch.dtype) -> None:
    kinds = [a for a in ACTIVATIONS + ALTERED if a.name not in ("heaviside", "sign")]
    for first in range(0, len(kinds), 3):
        activations = [kinds[(first + i) % len(kinds)] for i in range(6)]
        check(draw([19, 20, 33, 40, 17, 50, 4], 18, activations, dtype))


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["heaviside", "sign"])
def test_nothing_passes_a_threshold_unit(isa: str, dtype: torch.dtype, name: str) -> None:
    got = results(native, draw([9, 20, 4], 18, [TANH, named(name)], dtype))
    assert all((value == 0).all() for key, value in got.items() if key != "y")
    got = results(native, draw([9, 20, 4], 18, [named(name), TANH], dtype))
    assert peak(got["dw[1]"]) > 0
    assert peak(got["dw[0]"]) == peak(got["dx"]) == 0


def test_the_tolerance_sees_a_wrong_element() -> None:
    """The check itself: an error of a thousandth of one gradient's scale in one element does not pass."""
    net = draw([64, 96, 33], 50, TANH, torch.float32)
    good = results(native, net)
    for name in good:
        bad = good[name].clone()
        bad.view(-1)[-1] += 1e-3 * peak(exact(net).values[name])
        with pytest.raises(AssertionError, match=name.replace("[", r"\[")):
            check(net, good | {name: bad})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("few", [1, 2, 3, 4, 5])
def test_products_of_few_terms(isa: str, dtype: torch.dtype, few: int, threads: int) -> None:
    """dw of few samples, and ds below few outputs: next to nothing but writing a matrix of some vectors and more."""
    torch.set_num_threads(threads)
    for activation, width in itertools.product(("relu", "gelu", "identity"), (35, 67, 301)):
        check(draw([33, width, few], 40, named(activation), dtype))
        check(draw([width, 150], few, named(activation), dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("outputs", [2, 15, 16, 17, 1100])
def test_one_input(isa: str, dtype: torch.dtype, outputs: int, threads: int) -> None:
    """dw of one column, which is computed as a row, and dx as sums along the rows of ds; w's rows lie apart, too."""
    torch.set_num_threads(threads)
    for batch in (1, 5, 70):
        net = draw([1, outputs], batch, named("tanh"), dtype)
        check(net)
        check(replace(net, x=strided(net.x, 3), w=[strided(w, 200) for w in net.w]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__doc__)
@pytest.mark.parametrize("inputs", [2, 15, 40, 1100])
def test_one_output(isa: str, dtype: torch.dtype, inputs: int, layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Forward as a row, or as sums along the rows of x; with a bias, which is one number for all of them."""
    for batch, kind in itertools.product((2, 33), ("identity", "gelu")):
        net = draw([inputs, 1], batch, named(kind), dtype)
        check(replace(net, x=layout(net.x)))
        check(replace(net, w=[net.w[0].repeat_interleave(3, 1)[:, ::3]]))
        check(replace(net, w=[net.w[0][:, :1].expand(1, inputs)]))
        check(draw([inputs, 1, 3], batch, named(kind), dtype))
