"""Properties of any network that hypothesis can draw: values, gradients, bits that do not depend on strides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from reference import (
    ACTIVATIONS,
    ALTERED,
    NearKinksError,
    Network,
    check,
    check_forward,
    draw,
    native,
    near_a_kink,
    results,
)
from shapes import instruction_set
from torch import Tensor

from pyperc import _C

# Without a database nothing is written beside the tests; a failure prints the blob that repeats it.
THOROUGH = settings(
    max_examples=80,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129]))
LEADS = st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.tuples(st.integers(1, 90))


@st.composite
def layouts(draw_: st.DrawFn, t: Tensor) -> Tensor:
    """The same values in memory of other strides: permuted, with gaps, at an offset; or some dimensions expanded."""
    order = draw_(st.permutations(range(t.dim())))
    steps = [draw_(st.integers(1, 3)) for _ in order]
    offset = draw_(st.integers(0, 3))
    shape = [t.shape[d] * step for d, step in zip(order, steps, strict=True)]
    size = 1
    for n in shape:
        size *= n
    store = torch.full((size + offset,), torch.nan, dtype=t.dtype)[offset:].view(shape)
    view = store[tuple(slice(None, None, step) for step in steps)].permute([order.index(d) for d in range(t.dim())])
    view.copy_(t)
    expanded = draw_(st.sets(st.integers(0, max(t.dim() - 1, 0)), max_size=t.dim()))
    for d in expanded if t.numel() else ():
        view = view.narrow(d, 0, 1).expand(view.shape)
    return view


@st.composite
def networks(draw_: st.DrawFn, most_layers: int = 4) -> Network:
    sizes = draw_(st.lists(SIZES, min_size=2, max_size=1 + most_layers))
    layers = len(sizes) - 1
    dtype = draw_(st.sampled_from([torch.float32, torch.float64]))
    kinds = draw_(st.lists(st.sampled_from(ACTIVATIONS + ALTERED), min_size=layers, max_size=layers))
    bias = draw_(st.lists(st.booleans(), min_size=layers, max_size=layers))
    lead, seed = draw_(LEADS), draw_(st.integers(0, 1 << 16))
    try:
        return draw(sizes, lead, kinds, dtype, bias=bias, seed=seed)
    except NearKinksError:
        reject()


@st.composite
def strided(draw_: st.DrawFn) -> Network:
    """Any strides for what flows through, of which the order of a sum is independent."""
    net = draw_(networks())
    b = [None if b is None else draw_(layouts(b)) for b in net.b]
    return Network(draw_(layouts(net.x)), net.w, b, net.activations, draw_(layouts(net.dy)))


@st.composite
def strided_weights(draw_: st.DrawFn) -> Network:
    """One layer: where weights are expanded, the rounding of the units before is no longer independent."""
    net = draw_(networks(most_layers=1))
    net.w = [draw_(layouts(w)) for w in net.w]
    return net


def contiguous(net: Network) -> Network:
    w, b = ([None if t is None else t.contiguous() for t in tensors] for tensors in (net.w, net.b))
    return Network(net.x.contiguous(), w, b, net.activations, net.dy.contiguous())


@THOROUGH
@given(net=networks(), threads=st.integers(1, 3), isa=st.sampled_from(_C.isas()))
def test_values_and_gradients(net: Network, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    with instruction_set(isa):
        check(net)
        check_forward(net)


@THOROUGH
@given(net=strided(), threads=st.integers(1, 3), isa=st.sampled_from(_C.isas()))
def test_strides_change_no_bit(net: Network, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    with instruction_set(isa):
        got, want = results(native, net), results(native, contiguous(net))
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name}: {net}"


@THOROUGH
@given(net=strided_weights(), threads=st.integers(1, 3), isa=st.sampled_from(_C.isas()))
def test_strides_of_the_weights_change_no_value(net: Network, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    assume(not near_a_kink(net, max(max(w.shape) for w in net.w) * torch.finfo(torch.float32).eps).any())
    with instruction_set(isa):
        check(net)


@THOROUGH
@given(net=networks(), isa=st.sampled_from(_C.isas()), factor=st.sampled_from([-2.0, 0.0, 0.5, 4.0]))
def test_gradients_are_linear_in_the_incoming_gradient(net: Network, isa: str, factor: float) -> None:
    """Powers of two scale every term exactly, so that the bits agree."""
    with instruction_set(isa):
        once = results(native, net)
        net.dy = net.dy * factor
        scaled = results(native, net)
    for name in once:
        assert torch.equal(scaled[name], once[name] * (1 if name == "y" else factor)), f"{name}: {net}"
