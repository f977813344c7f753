"""The native passes of the linear models against plain torch, on every instruction set and at awkward sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyperc import _C

ROWS = [1, 7, 8, 9, 61]
COLUMNS = [1, 5, 16, 67]


def close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 2e-5 if ours.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_logistic_objective(isa: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    weighted = columns % 2 == 1
    x = torch.randn(rows, columns + 3, dtype=dtype)[:, :columns]
    y = torch.where(torch.rand(rows) < 0.5, -1.0, 1.0).to(dtype)
    weight = torch.rand(rows, dtype=dtype) if weighted else None
    w, b = torch.randn(1, columns, dtype=dtype), torch.randn(1, dtype=dtype)
    value, dw, db = _C.linear_objective(x, w, b, y, weight, None, "logistic", [])
    p = [t.double().requires_grad_() for t in (w, b)]
    loss = F.softplus(-y.double() * F.linear(x.double(), *p)[:, 0])
    total = (loss if weight is None else loss * weight.double()).sum()
    gradients = torch.autograd.grad(total, p)
    close(torch.tensor(value, dtype=dtype), total.detach())
    close(dw, gradients[0])
    close(db, gradients[1])


@pytest.mark.parametrize("classes", [2, 3, 10, 17])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_hinge"])
def test_objectives_of_several_classes(isa: str, dtype: torch.dtype, loss: str, rows: int, classes: int) -> None:
    columns = 19
    x, weight = torch.randn(rows, columns, dtype=dtype), torch.rand(rows, dtype=dtype)
    target = torch.randint(classes, (rows,))
    w, b = torch.randn(classes, columns, dtype=dtype), torch.randn(classes, dtype=dtype)
    p = [t.double().requires_grad_() for t in (w, b)]
    s = F.linear(x.double(), *p)
    if loss == "cross_entropy":
        value, dw, db = _C.linear_objective(x, w, b, target, weight, None, loss, [])
        total = (F.cross_entropy(s, target, reduction="none") * weight.double()).sum()
    else:
        positive = torch.rand(classes, dtype=dtype)
        value, dw, db = _C.linear_objective(x, w, b, target, weight, positive, loss, [1.0])
        own = F.one_hot(target, classes).double()
        factors = weight.double()[:, None] * torch.where(own == 1, positive.double(), 1.0)
        total = (F.relu(1 - (2 * own - 1) * s) ** 2 * factors).sum()
    gradients = torch.autograd.grad(total, p)
    close(torch.tensor(value, dtype=dtype), total.detach())
    close(dw, gradients[0])
    close(db, gradients[1])


def test_threads_add_their_sums_in_order() -> None:
    x, y, w = torch.randn(5003, 40), torch.ones(5003), torch.randn(1, 40)
    torch.set_num_threads(2)
    first = _C.linear_objective(x, w, None, y, None, None, "logistic", [])
    again = _C.linear_objective(x, w, None, y, None, None, "logistic", [])
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    torch.set_num_threads(1)
    alone = _C.linear_objective(x, w, None, y, None, None, "logistic", [])
    torch.testing.assert_close(first[1], alone[1], rtol=1e-5, atol=1e-4)


def plain_perceptron(x: Tensor, y: Tensor, w: Tensor, b: Tensor, order: list[int]) -> int:
    """The lecture's inner loop."""
    changes = 0
    for i in order:
        if y[i] * (x[i].dot(w) + b) <= 0:
            w += y[i] * x[i]
            b += y[i]
            changes += 1
    return changes


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("columns", [1, 17, 40])
def test_perceptron_epochs_are_the_lectures(isa: str, dtype: torch.dtype, columns: int, shuffled: bool) -> None:
    # Whole numbers, so that sums are exact in any order.
    x = torch.randint(-3, 4, (57, columns)).to(dtype)
    target = torch.randint(2, (57,))
    y = (2 * target - 1).to(dtype)
    w, b = torch.zeros(1, columns, dtype=dtype), torch.zeros(1, dtype=dtype)
    expected_w, expected_b = w[0].clone(), b[0].clone()
    scores = torch.empty(57, 1, dtype=dtype)
    for _ in range(4):
        order = torch.randperm(57) if shuffled else None
        before = x @ expected_w + expected_b
        changes = _C.perceptron_epoch(x, target, w, b, [1], 1.0, order, None, None, None, scores, None, 0)
        expected = plain_perceptron(x, y, expected_w, expected_b, list(range(57)) if order is None else order.tolist())
        assert changes == [expected]
        assert torch.equal(scores[:, 0], before)
        assert torch.equal(w[0], expected_w)
        assert torch.equal(b[0], expected_b)


def test_products_are_those_of_the_stored_features(isa: str, dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (40, 9)).to(dtype)
    target = torch.randint(3, (40,))
    first, begin = torch.tensor([1, 4, 8], dtype=torch.int32), torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    second = torch.tensor([0, 5, 4, 2, 2, 7], dtype=torch.int32)
    firsts = first.long().repeat_interleave(begin.diff().long())
    stored = torch.cat([x, x[:, firsts] * x[:, second.long()]], 1)
    state = [
        (torch.zeros(3, 15, dtype=dtype), torch.zeros(3, dtype=dtype), torch.empty(40, 3, dtype=dtype))
        for _ in range(2)
    ]
    for _ in range(3):
        counts = [
            _C.perceptron_epoch(data, target, w, b, [0, 1, 2], 1.0, None, None, None, products, scores, None, 0)
            for (data, products), (w, b, scores) in zip(
                [(x, (first, begin, second)), (stored, None)], state, strict=True
            )
        ]
        assert counts[0] == counts[1]
    for ours, theirs in zip(*state, strict=True):
        assert torch.equal(ours, theirs)


def test_the_average_is_that_of_all_steps() -> None:
    x, target = torch.randint(-3, 4, (30, 4)).double(), torch.randint(2, (30,))
    w, b = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sums = torch.zeros_like(w), torch.zeros_like(b)
    _C.perceptron_epoch(x, target, w, b, [1], 0.5, None, None, None, None, None, sums, 0)
    plain, bias, total = torch.zeros(4).double(), torch.zeros(()).double(), torch.zeros(4).double()
    for i in range(30):
        plain_perceptron(0.5 * x, (2.0 * target - 1).double(), plain, bias, [])
        y = 2.0 * target[i] - 1
        if y * (x[i].dot(plain) + bias) <= 0:
            plain += 0.5 * y * x[i]
            bias += 0.5 * y
        total += plain
    torch.testing.assert_close(w[0] - sums[0][0] / 30, total / 30)


@pytest.mark.parametrize("bias", [0.0, 1.0], ids=["through the origin", "with a bias"])
def test_dual_descent_closes_the_duality_gap(isa: str, dtype: torch.dtype, bias: float) -> None:
    x = torch.randn(80, 6, dtype=dtype)
    y = torch.sign(x[:, 0] + 0.5 * torch.randn(80, dtype=dtype) + 0.3)
    upper = torch.full((80,), 0.7, dtype=dtype)
    w, b = torch.zeros(6, dtype=dtype), torch.zeros(1, dtype=torch.float64)
    alpha = torch.zeros(80, dtype=torch.float64)
    epochs, violation = _C.dual_descent(x, y, upper, bias, w, b, alpha, 5000, 1e-5, 0)
    assert epochs < 5000
    assert violation <= 1e-5
    norm = 0.5 * w.double().square().sum() + (0.5 * b.square().sum() if bias else 0)
    primal = norm + 0.7 * F.relu(1 - y.double() * (x.double() @ w.double() + b)).sum()
    torch.testing.assert_close(primal, alpha.sum() - norm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: _C.linear_objective(x, x[:1], None, x[:, 0], None, None, "huber", []), "must be one of mse"),
        (lambda x: _C.linear_objective(x, x[:1, :2], None, x[:, 0], None, None, "mse", []), r"w must be of shape \[1"),
        (
            lambda x: _C.linear_objective(x, x[:2], None, torch.tensor([0, 1, 2]), None, None, "cross_entropy", []),
            "target must hold classes from 0 to 1, got 2",
        ),
        (
            lambda x: _C.perceptron_epoch(
                x,
                torch.zeros(3, dtype=torch.int64),
                torch.zeros(1, 5),
                None,
                [1],
                1.0,
                None,
                None,
                None,
                tuple(torch.tensor(t, dtype=torch.int32) for t in ([9], [0, 1], [0])),
                None,
                None,
                0,
            ),
            "products: must be groups of pairs of columns below 4",
        ),
    ],
    ids=["unknown loss", "narrow weights", "unknown class", "product outside of x"],
)
def test_the_passes_refuse_what_does_not_fit(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 4))
