"""torch.export, AOTInductor and ONNX: the exported network by value, with a batch of any size."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import close, pair, plain
from reference import ACTIVATIONS, Activation
from torch import nn
from torch.export import Dim

import pyperc

F64 = torch.float64
DYNAMIC = ({0: Dim("batch", min=1, max=1024)},)


def operators(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def mixed() -> nn.Module:
    return pyperc.fuse(
        nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 4), nn.ELU(0.5)).double()
    )


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_save_and_load_with_a_dynamic_batch(strict: bool) -> None:
    for model in (pair()[0], mixed()):
        program = torch.export.export(model, (torch.randn(4, 6, dtype=F64),), dynamic_shapes=DYNAMIC, strict=strict)
        assert "pyperc.mlp.default" in operators(program)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        for batch in (1, 4, 11):
            x = torch.randn(batch, 6, dtype=F64)
            want = plain(model)(x)
            close(program.module()(x), want)
            close(loaded.module()(x), want)


def test_an_exported_module_can_be_trained() -> None:
    model, other = pair()
    program = torch.export.export(model, (torch.randn(4, 6, dtype=F64),), dynamic_shapes=DYNAMIC)
    module = program.module()
    x = torch.randn(5, 6, dtype=F64)
    close(
        torch.autograd.grad(module(x).sin().sum(), list(module.parameters())),
        torch.autograd.grad(other(x).sin().sum(), list(other.parameters())),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_decomposed_it_is_plain_torch(activation: Activation) -> None:
    keywords = dict(zip(activation.keywords, activation.parameters, strict=True))
    model = pyperc.MLP([6, 5, 4], (activation.name, keywords), dtype=F64)
    program = torch.export.export(model, (torch.randn(4, 6, dtype=F64),), dynamic_shapes=DYNAMIC)
    table = torch.export.default_decompositions()
    table.update(pyperc.decompositions())
    for plainly in (program.run_decompositions(pyperc.decompositions()), program.run_decompositions(table)):
        assert all(name.startswith("aten.") for name in operators(plainly))
        x = torch.randn(7, 6, dtype=F64)
        close(plainly.module()(x), plain(model)(x))


def test_unfused_it_is_plain_torch() -> None:
    model, other = pair()
    x = torch.randn(4, 6, dtype=F64)
    program = torch.export.export(pyperc.unfuse(model), (x,))
    assert operators(program) == {"aten.linear.default", "aten.tanh.default"}
    close(program.module()(x), other(x))


@pytest.mark.parametrize("lead", [(), (6,), (2, 3)], ids=str)
def test_the_decompositions_have_the_kernels_shapes(lead: tuple[int, ...]) -> None:
    table = pyperc.decompositions()
    weights = [torch.randn(5, 4, dtype=F64), torch.randn(3, 5, dtype=F64)]
    biases = [torch.randn(5, dtype=F64), None]
    x, dy = torch.randn(*lead, 4, dtype=F64), torch.randn(*lead, 3, dtype=F64)
    for names in (["gelu", "tanh"], ["relu", "silu"]):
        saved = torch.ops.pyperc.mlp_forward(x, weights, biases, names, [])
        close(table[torch.ops.pyperc.mlp_forward.default](x, weights, biases, names, []), saved)
        needs = [True, True, True, True, False]
        arguments = (dy, x, weights, saved, names, [], needs)
        close(table[torch.ops.pyperc.mlp_backward.default](*arguments), torch.ops.pyperc.mlp_backward(*arguments))


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_aot_inductor_package_that_holds_the_operator(tmp_path: Path) -> None:
    model, other = pair(dtype=torch.float32)
    program = torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=DYNAMIC)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (1, 4, 11):
        x = torch.randn(batch, 6)
        close(compiled(x), other(x).detach(), torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_is_a_plain_graph_that_onnxruntime_runs(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    heads = [pyperc.MLP([6, 5, 4], (a.name, dict(zip(a.keywords, a.parameters, strict=True)))) for a in ACTIVATIONS]
    model = Side(heads).eval()
    onnx = torch.onnx.export(
        model, (torch.randn(4, 6),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False, input_names=["x"]
    )
    assert {node.domain for node in onnx.model.graph} <= {"", "ai.onnx"}
    onnx.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 4, 9):
        x = torch.randn(batch, 6)
        (got,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), plain(model)(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnx_of_an_exported_program_that_is_decomposed_first() -> None:
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    model, other = pair((6, 5, 4), "gelu", torch.float32)
    x = torch.randn(4, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=DYNAMIC).run_decompositions(pyperc.decompositions())
    onnx = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert {node.domain for node in onnx.model.graph} <= {"", "ai.onnx"}
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), other(x).detach(), rtol=1e-5, atol=1e-6)


class Side(nn.Module):
    """Networks side by side."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([head(x) for head in self.heads])
