"""The operators registered with torch: opcheck, Meta and fake tensors, torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import ACTIVATIONS, ALTERED, Activation, Network, check, draw, named, native, results
from small import F64, same
from torch import Tensor
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

TANH, RELU, GELU = named("tanh"), named("relu"), named("gelu")


def op(net: Network) -> Tensor:
    return torch.ops.pyperc.mlp(*net.op_arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)
def test_the_operator_is_the_function(dtype: torch.dtype, activation: Activation) -> None:
    net = draw([9, 20, 5], (2, 3), activation, dtype)
    got, want = results(op, net), results(native, net)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("activation", [TANH, GELU, RELU, named("identity")], ids=str)
def test_the_two_halves_of_the_operator(activation: Activation) -> None:
    """mlp_forward gives what backward reads, the output last; mlp_backward gives the gradients that are needed.

    With grad mode on they are differentiable, and so the composition; in inference mode they are the kernels.
    """
    net = draw([9, 20, 5], 6, activation, F64)
    want = results(native, net)
    x, w, b, names, parameters = net.op_arguments
    order = ["dx", "dw[0]", "dw[1]", "db[0]", "db[1]"]
    for inference in (True, False):
        with torch.inference_mode(inference):
            saved = torch.ops.pyperc.mlp_forward(x, w, b, names, parameters)
            same(saved[-1], want["y"])
            for needed in itertools.product([True, False], repeat=5):
                got = torch.ops.pyperc.mlp_backward(net.dy, x, w, saved, names, parameters, needed)
                same(tuple(got), tuple(want[name] for name in itertools.compress(order, needed)))


@pytest.mark.parametrize("activation", [TANH, RELU, GELU, named("leaky_relu")], ids=str)
@pytest.mark.parametrize("bias", [[True, True], [True, False]], ids=["bias", "one bias"])
def test_opcheck(activation: Activation, bias: list[bool]) -> None:
    net = draw([9, 20, 5], (2, 3), activation, F64, bias=bias)
    pytest.importorskip("expecttest", reason="needs expecttest, which opcheck imports")
    torch.library.opcheck(torch.ops.pyperc.mlp.default, net.requires_grad().op_arguments)
    torch.library.opcheck(torch.ops.pyperc.mlp.default, net.op_arguments)


def test_opcheck_of_forward_and_backward() -> None:
    pytest.importorskip("expecttest", reason="needs expecttest, which opcheck imports")
    for activation in (TANH, GELU):
        net = draw([9, 20, 5], 6, activation, F64)
        x, w, b, names, parameters = net.op_arguments
        torch.library.opcheck(torch.ops.pyperc.mlp_forward.default, (x, w, b, names, parameters))
        saved = torch.ops.pyperc.mlp_forward(x, w, b, names, parameters)
        torch.library.opcheck(
            torch.ops.pyperc.mlp_backward.default, (net.dy, x, w, saved, names, parameters, [True] * 5)
        )


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_meta_tensors_have_the_shapes(lead: tuple[int, ...]) -> None:
    net = draw([9, 20, 5], lead, TANH, torch.float32)
    meta = Network(
        net.x.to("meta"),
        [w.to("meta") for w in net.w],
        [b.to("meta") for b in net.b],
        net.activations,
        net.dy.to("meta"),
    )
    for forward in (native, op):
        got = results(forward, meta)
        assert {name: (t.shape, t.dtype, t.device.type) for name, t in got.items()} == {
            name: (t.shape, t.dtype, "meta") for name, t in results(native, net).items()
        }


def test_fake_tensors() -> None:
    net = draw([9, 20, 5], (2, 3), GELU, torch.float32)
    with FakeTensorMode() as mode:
        leaf = {name: mode.from_tensor(t) for name, t in net.leaves.items()}
        fake = Network(
            leaf["dx"],
            [leaf["dw[0]"], leaf["dw[1]"]],
            [leaf["db[0]"], leaf["db[1]"]],
            net.activations,
            mode.from_tensor(net.dy),
        )
        for forward in (native, op):
            got = results(forward, fake)
            assert got["y"].shape == (2, 3, 5)
            assert got["dw[0]"].shape == (20, 9)


@pytest.mark.parametrize("activation", [TANH, RELU, GELU, named("softplus")], ids=str)
def test_compile_with_a_dynamic_batch(activation: Activation) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(net_x: Tensor, w: list[Tensor], b: list[Tensor], names: list[str], parameters: list[float]) -> Tensor:
        return torch.ops.pyperc.mlp(net_x, w, b, names, parameters) * 1.0

    for batch in (4, 9, 17):
        net = draw([9, 20, 5], batch, activation, F64)
        check(net, results(lambda n: compiled(*n.op_arguments), net))


def test_make_fx_traces_the_operator() -> None:
    net = draw([9, 20, 5], 6, TANH, F64)
    x, w, b, names, parameters = net.op_arguments
    graph = make_fx(lambda x: torch.ops.pyperc.mlp(x, w, b, names, parameters))(x)
    assert any("pyperc" in str(node.target) for node in graph.graph.nodes)
    same(graph(x), native(net))


def test_torchs_own_table_of_decompositions_is_left_alone() -> None:
    """Where the variable CI is set, inductor refuses an operator with both a fallback and an entry in that table."""
    names = ("mlp", "mlp_forward", "mlp_backward", "activation")
    assert get_decompositions([getattr(torch.ops.pyperc, name).default for name in names]) == {}
