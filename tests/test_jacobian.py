"""The network's Jacobian and its products with a vector, against torch.func on the plain network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import close, pair, plain
from reference import ACTIVATIONS, ALTERED, Activation
from torch import Tensor, nn
from torch.func import jacrev, vmap

import pyperc
from pyperc.functional import jacobian, jvp, vjp

F64 = torch.float64
WIDE_TO_NARROW, NARROW_TO_WIDE = (7, 9, 5, 2), (2, 9, 5, 7)


def network(activation: Activation, sizes: tuple[int, ...], dtype: torch.dtype = F64) -> tuple[pyperc.MLP, nn.Module]:
    keywords = dict(zip(activation.keywords, activation.parameters, strict=True))
    model = pyperc.MLP(sizes, (activation.name, keywords), (activation.name, keywords), dtype=dtype)
    return model, plain(model)


@pytest.mark.parametrize("sizes", [WIDE_TO_NARROW, NARROW_TO_WIDE, (4, 3)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS + ALTERED, ids=str)
def test_every_activation_both_ways_round(activation: Activation, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    model, other = network(activation, sizes, dtype)
    x = torch.randn(6, sizes[0], dtype=dtype)
    want = vmap(jacrev(other))(x)
    dx, dy = torch.randn_like(x), torch.randn(6, sizes[-1], dtype=dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(jacobian(model, x), want, dtype)
            close(vjp(model, x, dy), (other(x), torch.einsum("boi,bo->bi", want, dy)), dtype)
            close(jvp(model, x, dx), (other(x), torch.einsum("boi,bi->bo", want, dx)), dtype)


@pytest.mark.parametrize("sizes", [WIDE_TO_NARROW, NARROW_TO_WIDE], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
@torch.no_grad()
def test_leading_dimensions(lead: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    model, other = pair(sizes)
    x, dx, dy = (torch.randn(*lead, width, dtype=F64) for width in (sizes[0], sizes[0], sizes[-1]))
    J = jacobian(model, x)
    assert J.shape == (*lead, sizes[-1], sizes[0])
    rows = x.reshape(-1, sizes[0])
    if rows.numel():
        close(J.reshape(-1, *J.shape[-2:]), vmap(jacrev(other))(rows))
    close(vjp(model, x, dy)[1], (dy.unsqueeze(-2) @ J).squeeze(-2))
    close(jvp(model, x, dx)[1], (J @ dx.unsqueeze(-1)).squeeze(-1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 4, 3), (3, 0, 4), (3, 4, 0)], ids=str)
def test_a_layer_of_width_0(sizes: tuple[int, ...]) -> None:
    model = pyperc.fuse(nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:])))
    x, dy = torch.randn(5, sizes[0]), torch.randn(5, sizes[-1])
    J = jacobian(model, x)
    assert torch.equal(J, torch.zeros(5, sizes[-1], sizes[0]))
    close(vjp(model, x, dy), (plain(model)(x), torch.zeros_like(x)), x.dtype)
    close(jvp(model, x, x), (plain(model)(x), torch.zeros_like(dy)), x.dtype)


@torch.no_grad()
def test_a_batch_of_several_pieces_and_threads() -> None:
    model, other = pair((24, 64, 8), "gelu", torch.float32)
    x = torch.randn(1500, 24)
    want = vmap(jacrev(other))(x)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        close(jacobian(model, x), want, torch.float32)
    close(jacobian(model, x.t().contiguous().t()), want, torch.float32)


@torch.no_grad()
def test_the_result_is_memory_of_its_own() -> None:
    model = pyperc.MLP([3, 2])
    jacobian(model, torch.randn(1, 3)).zero_()
    assert model[0].weight.count_nonzero() == 6
    model.requires_grad_(True)
    with torch.enable_grad():
        jacobian(model, torch.randn(1, 3)).zero_()
    assert model[0].weight.count_nonzero() == 6


@pytest.mark.parametrize("sizes", [WIDE_TO_NARROW, NARROW_TO_WIDE], ids=str)
@pytest.mark.parametrize("name", ["tanh", "gelu", "softplus"])
def test_it_has_derivatives_where_gradients_are_recorded(name: str, sizes: tuple[int, ...]) -> None:
    model, other = pair(sizes, name)
    x = torch.randn(4, sizes[0], dtype=F64, requires_grad=True)
    dx, dy = torch.randn(4, sizes[0], dtype=F64), torch.randn(4, sizes[-1], dtype=F64, requires_grad=True)
    J = vmap(jacrev(other))(x)
    want = {
        "jacobian": J,
        "vjp": torch.einsum("boi,bo->bi", J, dy),
        "jvp": torch.einsum("boi,bi->bo", J, dx),
    }
    got = {"jacobian": jacobian(model, x), "vjp": vjp(model, x, dy)[1], "jvp": jvp(model, x, dx)[1]}
    for kind, value in got.items():
        leaves = torch.autograd.grad(value.square().sum(), [x, *model.parameters()], materialize_grads=True)
        plainly = torch.autograd.grad(
            want[kind].square().sum(), [x, *other.parameters()], retain_graph=True, materialize_grads=True
        )
        assert leaves[1].abs().max() > 1e-3
        close(leaves, plainly)


def test_without_gradients_there_is_none() -> None:
    model, _ = pair()
    with torch.no_grad():
        assert not jacobian(model, torch.randn(2, 6, dtype=F64)).requires_grad


def test_under_transforms_autocast_compile_and_forward_mode() -> None:
    model, other = pair()
    x = torch.randn(5, 6, dtype=F64)
    want = vmap(jacrev(other))(x)
    close(vmap(lambda row: jacobian(model, row))(x), want)
    close(torch.func.jacfwd(lambda row: jacobian(model, row))(x[0]), torch.func.jacfwd(jacrev(other))(x[0]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: jacobian(model, x) * 1.0, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 3, 2):
        close(compiled(x[:batch]), want[:batch])
    half, plain_half = pair(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        J = jacobian(half, x.float())
    assert (J.float() - vmap(jacrev(plain_half))(x.float())).abs().max() < 0.05


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precisions(half: torch.dtype) -> None:
    model, other = pair(dtype=half)
    x = torch.randn(5, 6, dtype=half)
    J = jacobian(model, x)
    assert J.dtype == half
    assert (J.double() - vmap(jacrev(other.double()))(x.double())).abs().max() < 0.02


def test_a_linear_layer_and_a_fused_container() -> None:
    x = torch.randn(5, 4, dtype=F64)
    layer = pyperc.Linear(4, 3, activation="sigmoid", dtype=F64)
    close(
        jacobian(layer, x), vmap(jacrev(lambda x: torch.sigmoid(nn.functional.linear(x, layer.weight, layer.bias))))(x)
    )
    model = pyperc.fuse(nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.ELU(0.5), nn.Linear(3, 2)).double())
    close(jacobian(model, x), vmap(jacrev(plain(model)))(x))


class Doubled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    model = pyperc.MLP([4, 3, 2])
    model.register_forward_hook(lambda module, args, y: 2 * y)
    return model


def hooked_within() -> nn.Module:
    model = pyperc.MLP([4, 3, 2])
    model[2].register_forward_hook(lambda module, args, y: 2 * y)
    return model


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Linear(4, 3), TypeError, "jacobian: model must be a fused container .* got Linear"),
        (nn.Sequential(nn.Linear(4, 3)), TypeError, "got Sequential"),
        (pyperc.fuse(Doubled(nn.Linear(4, 3))), ValueError, "got a forward of its own"),
        (hooked(), ValueError, "no forward hooks"),
        (hooked_within(), ValueError, r"got child 2 \(Linear\): has a forward hook"),
        (
            pyperc.nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
            ValueError,
            r"child 1 \(LayerNorm\): LayerNorm is not",
        ),
        (pyperc.nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU()), ValueError, r"got child 2 \(ReLU\)"),
        (pyperc.nn.Sequential(), ValueError, "got no child"),
    ],
)
def test_what_is_not_one_network_is_refused(model: nn.Module, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        jacobian(model, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, 5),), ValueError, r"x must be \[..., 4\]"),
        ((torch.zeros(2, 4, dtype=torch.int64),), TypeError, "x must have a floating dtype"),
        (([1.0, 2.0, 3.0, 4.0],), TypeError, "jacobian: x must be a Tensor, got list"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        jacobian(pyperc.MLP([4, 3]), *arguments)


def test_bad_vectors_are_named() -> None:
    model, x = pyperc.MLP([4, 3]), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"vjp: dy must be \[2, 3\], got \[2, 4\]"):
        vjp(model, x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"jvp: dx must be \[2, 4\], got \[2, 3\]"):
        jvp(model, x, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="jvp: dx must have x's dtype"):
        jvp(model, x, torch.zeros(2, 4, dtype=F64))


def test_relu_at_its_kink_is_torchs() -> None:
    model = pyperc.MLP([3, 3], output_activation="relu", bias=False, dtype=F64)
    x = torch.zeros(2, 3, dtype=F64)
    close(jacobian(model, x), vmap(jacrev(plain(model)))(x))
