"""The losses: values, gradients and derivatives of higher order against torch's own, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyperc.functional as P
from pyperc import _C

LOSSES = {
    "mse": (P.mse_loss, lambda s, y: (s - y) ** 2),
    "logistic": (P.logistic_loss, lambda s, y: F.softplus(-y * s)),
    "hinge": (P.hinge_loss, lambda s, y: F.relu(1 - y * s)),
    "hinge of the perceptron": (
        lambda s, y, **keywords: P.hinge_loss(s, y, threshold=0.0, **keywords),
        lambda s, y: F.relu(-y * s),
    ),
    "squared_hinge": (P.squared_hinge_loss, lambda s, y: F.relu(1 - y * s) ** 2),
}


def reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """torch's reductions of weighted losses."""
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    divisor = loss.numel() if weight is None else weight.expand(loss.shape).sum()
    return loss.sum() / divisor if reduction == "mean" else loss.sum()


def test_every_loss_of_the_list_is_a_function_and_is_tested() -> None:
    elements = {info.name for info in _C.losses() if info.over == "element"}
    assert elements == {name.split()[0] for name in LOSSES}
    assert [info.name for info in _C.losses() if info.over == "row"] == ["cross_entropy"]


REDUCTIONS = [(reduction, weighted) for reduction in ("mean", "sum", "none") for weighted in (False, True)]


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1031,)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(isa: str, dtype: torch.dtype, name: str, shape: tuple[int, ...]) -> None:
    loss, reference = LOSSES[name]
    for reduction, weighted in REDUCTIONS:
        s = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
        y = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0).to(dtype)
        weight = torch.rand(shape, dtype=dtype) if weighted else None
        ours, theirs = loss(s, y, weight=weight, reduction=reduction), reduced(reference(s, y), weight, reduction)
        torch.testing.assert_close(ours, theirs)
        same_gradients(lambda s: loss(s, y, weight=weight, reduction=reduction), ours, theirs, s)  # noqa: B023


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 3, 16), (40, 37)], ids=str)
def test_cross_entropy(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for reduction, weighted in REDUCTIONS:
        s = (5 * torch.randn(shape, dtype=dtype)).requires_grad_()
        y = torch.randint(shape[-1], shape[:-1])
        weight = torch.rand(shape[-1], dtype=dtype) if weighted else None
        ours = P.cross_entropy(s, y, weight, reduction)
        theirs = F.cross_entropy(s.movedim(-1, 1), y, weight, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        same_gradients(lambda s: P.cross_entropy(s, y, weight, reduction), ours, theirs, s)  # noqa: B023


def same_gradients(loss: Callable[[Tensor], Tensor], ours: Tensor, theirs: Tensor, s: Tensor) -> None:
    """From the native pass, and from the composition that create_graph asks for."""
    dy = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, s, dy)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, s, dy)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(loss(s), s, dy, create_graph=True)[0], expected)


@pytest.mark.parametrize("name", ["mse", "logistic", "squared_hinge"])
def test_second_derivatives(name: str) -> None:
    loss, _ = LOSSES[name]
    s = torch.randn(6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -1, 1, 1, -1, -1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, y), s)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, y, reduction="none"), s)


def test_second_derivatives_of_cross_entropy() -> None:
    s = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda s: P.cross_entropy(s, torch.tensor([0, 2, 1, 2])), s)


def test_a_target_that_wants_a_gradient_has_one() -> None:
    s, y = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, y: P.mse_loss(s, y), (s, y))


@pytest.mark.parametrize("name", LOSSES)
def test_scores_that_are_their_own_target_or_weight_have_both_gradients(name: str) -> None:
    loss, _ = LOSSES[name]
    s = torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss(s, s), s)
    assert torch.autograd.gradcheck(lambda s: loss(s, -torch.ones_like(s), weight=s), s)


def test_large_margins_neither_overflow_nor_vanish(isa: str, dtype: torch.dtype) -> None:
    s = torch.tensor([-1000.0, 1000.0, 0.0, float("nan")], dtype=dtype, requires_grad=True)
    value = P.logistic_loss(s, torch.ones_like(s), reduction="none")
    torch.testing.assert_close(value.detach(), F.softplus(-s.detach()), equal_nan=True)
    value.sum().backward()
    torch.testing.assert_close(s.grad, -torch.sigmoid(-s.detach()), equal_nan=True)


def test_at_the_kink_a_sample_counts() -> None:
    """The perceptron algorithm changes its weights where y s = 0."""
    s = torch.zeros(1, requires_grad=True)
    P.hinge_loss(s, torch.ones(1), threshold=0.0).backward()
    assert s.grad.item() == -1


def test_transforms_tangents_and_the_compiler_see_through() -> None:
    y = torch.tensor([1.0, -1.0, 1.0])
    s = torch.randn(4, 3)
    expected = -y * torch.sigmoid(-y * s) / 3
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda s: P.logistic_loss(s, y)))(s), expected)
    _, tangent = torch.func.jvp(lambda s: P.logistic_loss(s, y), (s[0],), (torch.ones(3),))
    torch.testing.assert_close(tangent, expected[0].sum())
    compiled = torch.compile(lambda s: P.logistic_loss(s, y), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(s[0]), P.logistic_loss(s[0], y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_composed(dtype: torch.dtype) -> None:
    s, y = torch.randn(9).to(dtype), torch.ones(9, dtype=dtype)
    torch.testing.assert_close(P.squared_hinge_loss(s, y), (F.relu(1 - s) ** 2).mean())


def test_empty_and_strided_inputs() -> None:
    assert P.mse_loss(torch.empty(0), torch.empty(0)).isnan()
    assert P.mse_loss(torch.empty(0), torch.empty(0), reduction="sum") == 0
    s = torch.randn(6, 4)[:, ::2]
    torch.testing.assert_close(P.mse_loss(s, torch.ones(6, 2)), F.mse_loss(s, torch.ones(6, 2)))
    weight = torch.rand(2)
    torch.testing.assert_close(
        P.mse_loss(s, torch.ones(6, 2), weight), ((s - 1) ** 2 * weight).sum() / weight.expand(6, 2).sum()
    )


def test_several_threads_add_in_order() -> None:
    s, y = torch.randn(200_003), torch.ones(200_003)
    torch.set_num_threads(2)
    first = P.logistic_loss(s, y)
    assert all(torch.equal(first, P.logistic_loss(s, y)) for _ in range(3))
    torch.testing.assert_close(first, F.softplus(-s).mean())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: P.mse_loss(s, s[:2]), ValueError, r"target must be of input's shape \[3\], got \[2\]"),
        (lambda s: P.mse_loss(s, s.double()), TypeError, r"target must have input's dtype torch.float32"),
        (lambda s: P.mse_loss(s, [1.0]), TypeError, r"target must be a Tensor, got list"),
        (lambda s: P.mse_loss(s.long(), s), TypeError, r"input must be a dense floating tensor, got torch.int64"),
        (lambda s: P.hinge_loss(s, s, reduction="all"), ValueError, r"reduction must be one of mean, sum, none"),
        (lambda s: P.hinge_loss(s, s, torch.ones(2)), ValueError, r"weight must broadcast to input's shape \[3\]"),
        (lambda s: P.cross_entropy(s[None], torch.tensor([3])), ValueError, r"classes from 0 to 2, got 3 to 3"),
        (lambda s: P.cross_entropy(s[None], torch.tensor([0.0])), TypeError, r"target must be int64"),
        (lambda s: P.cross_entropy(s, torch.tensor([0])), ValueError, r"input must be \[\*, classes\]"),
        (lambda s: P.cross_entropy(s[None], torch.tensor([0]), s[:2]), ValueError, r"weight must be \[3\]"),
        (lambda s: torch.ops.pyperc.loss(s, s, "hinge", []), ValueError, r"hinge takes 1 parameters \(threshold\)"),
        (lambda s: torch.ops.pyperc.loss(s, s, "huber", []), ValueError, r"must be one of mse, logistic"),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(3))
