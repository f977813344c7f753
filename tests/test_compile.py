"""torch.compile and compiled autograd by value: no graph break, no recompilation that plain torch would not make."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._inductor.config
from plain import close, gradients, pair, plain, same_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyperc

BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") or shutil.which("clang++") else [])]
F64 = torch.float64


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Nor read back from a disk, where graphs of an older build may lie: their key does not hold our operators."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_and_inference_with_every_batch_size(backend: str) -> None:
    model, other = pair(activation="gelu")
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for lead in (4, 9, 17):
        same_gradients(model, other, torch.randn(lead, 6, dtype=F64), compiled)
    with torch.no_grad():
        x = torch.randn(5, 6, dtype=F64)
        close(compiled(x), other(x))


@pytest.mark.parametrize("name", ["identity", "relu", "elu", "softplus", "silu", "hardtanh", "gelu_tanh"])
def test_activations_with_and_without_parameters(name: str) -> None:
    model, other = pair(activation=name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same_gradients(model, other, torch.randn(4, 6, dtype=F64), compiled)


class Larger(nn.Module):
    """A model with fused containers among other things."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU())
        self.second = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.out = pyperc.Linear(4, 2, activation="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(x + self.first(x)).relu()) * x.sum(-1, keepdim=True)


def test_inside_a_larger_model() -> None:
    other = Larger().double()
    model = pyperc.fuse(plain(other))
    compiled = torch.compile(model, fullgraph=True, backend=BACKENDS[-1])
    same_gradients(model, other, torch.randn(3, 5, 6, dtype=F64), compiled)


def test_dynamo_sees_one_graph_and_one_operator_for_a_network() -> None:
    model, _ = pair()
    explained = torch._dynamo.explain(model)(torch.randn(4, 6, dtype=F64))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1
    called = [node.target for graph in explained.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.pyperc.mlp.default]
    larger = pyperc.fuse(Larger().double())
    assert torch._dynamo.explain(larger)(torch.randn(4, 6, dtype=F64)).graph_break_count == 0


def test_the_compiled_backward_is_one_operator() -> None:
    model, _ = pair()
    graphs: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if "pyperc" in str(node.target)])
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    torch.compile(model, backend=backend)(torch.randn(4, 6, dtype=F64)).sum().backward()
    assert graphs == [["pyperc.mlp_forward.default"], ["pyperc.mlp_backward.default"]]


def frames_compiled(model: nn.Module, dynamic: bool | None) -> int:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=dynamic)
    for batch in (4, 9, 17, 3, 33):
        compiled(torch.randn(batch, 6, dtype=F64)).sum().backward()
    return counter.frame_count


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_recompilation_beyond_torchs_own(dynamic: bool | None) -> None:
    model, other = pair()
    assert frames_compiled(model, dynamic) == frames_compiled(other, dynamic)


def test_recompiles_when_a_layer_changes() -> None:
    model = pyperc.nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 4)).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6, dtype=F64)
    close(compiled(x), plain(model)(x))
    model[1].negative_slope = 0.6
    close(compiled(x), plain(model)(x))
    model[1] = nn.SiLU()
    close(compiled(x), plain(model)(x))


def test_under_autocast() -> None:
    model, other = pair(dtype=torch.float32)
    x = torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(x), other(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert (got.float() - want.float()).abs().max() < 0.02


def test_a_compiled_step_of_training() -> None:
    model, other = pair(dtype=torch.float32)
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    losses: list[list[float]] = []
    for network in (model, other):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        loss_of = torch.compile(
            lambda x, y, network=network: nn.functional.mse_loss(network(x), y), backend="aot_eager"
        )
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["relu", "gelu", "identity", "sigmoid", "heaviside"])
def test_compiled_autograd_of_an_eager_graph(name: str) -> None:
    """The node MlpBackward is recorded whole, once for all batch sizes."""
    model, other = pair(activation=name)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for batch in (4, 7, 5):
        x = torch.randn(batch, 6, dtype=F64)
        want = gradients(other, other.parameters(), x)
        with torch._dynamo.compiled_autograd._enable(
            lambda graph: torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=True)
        ):
            got = gradients(model, model.parameters(), x)
        close(got, want)
    assert counters["compiled_autograd"]["captures"] == 1
    assert not counters["graph_break"]


def test_compiled_autograd_where_some_need_a_gradient_and_a_bias_is_missing() -> None:
    model = pyperc.nn.Sequential(nn.Linear(6, 5, bias=False), nn.GELU(), nn.Linear(5, 4), nn.Tanh()).double()
    model[2].weight.requires_grad_(False)
    other = plain(model)
    x = torch.randn(3, 2, 6, dtype=F64)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        got = torch.autograd.grad(model(x).sin().sum(), [p for p in model.parameters() if p.requires_grad])
    close(got, torch.autograd.grad(other(x).sin().sum(), [p for p in other.parameters() if p.requires_grad]))


def test_compiled_autograd_under_torch_compile() -> None:
    model, other = pair()
    x = torch.randn(4, 6, dtype=F64)
    want = gradients(other, other.parameters(), x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(model, backend="aot_eager")
        close(gradients(compiled, model.parameters(), x), want)
