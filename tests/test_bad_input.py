"""Bad input is refused with a Python exception that names the argument, what was expected and what came."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import pyperc
from pyperc import _C

F32, F64 = torch.float32, torch.float64
KINDS = ["mlp", "operator"]


def tensors(dtype: torch.dtype = F32) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """A good call of sizes 5, 7, 3: each test spoils one thing in it."""
    x = torch.ones(4, 5, dtype=dtype)
    return x, [torch.ones(7, 5, dtype=dtype), torch.ones(3, 7, dtype=dtype)], [torch.ones(7, dtype=dtype), None]


def call(kind: str, x: object, w: object, b: object, names: tuple[str, ...] = ("relu", "identity")) -> Tensor:
    if kind == "mlp":
        return _C.mlp(x, w, b, _C.Chain([(name, []) for name in names]))
    return torch.ops.pyperc.mlp(x, w, b, list(names), [])


@contextmanager
def refused(error: type[Exception] | tuple[type[Exception], ...], *texts: str) -> Iterator[None]:
    """An exception whose message holds each text (a regular expression of any case), on one readable line."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    for text in texts:
        assert re.search(text, message, re.IGNORECASE), f"{text!r} is not in {message!r}"
    first = message.splitlines()[0]
    assert "incompatible function arguments" not in first, message
    assert "INTERNAL ASSERT" not in message, message
    assert len(first) < 300, message


SHAPE = ("must|expected", "got")
# The operator's own errors reach Python through torch as RuntimeError at times; the text is the same.
VALUE, TYPE = (ValueError, RuntimeError), (TypeError, RuntimeError)


def error_of(kind: str, error: type[Exception]) -> type[Exception] | tuple[type[Exception], ...]:
    return error if kind == "mlp" else (error, RuntimeError)


each_way_in = pytest.mark.parametrize("kind", KINDS)


@each_way_in
@pytest.mark.parametrize("shape", [(4, 6), (5, 4), (4, 1), (1,), (5, 1), (4, 0)], ids=str)
def test_x_of_the_wrong_width(kind: str, shape: tuple[int, ...]) -> None:
    _, w, b = tensors()
    with refused(
        error_of(kind, ValueError),
        r"\bx\b",
        *SHAPE,
        r"\[\*, 5\]|\[\.\.\., 5\]|\b5\b",
        rf"\[{', '.join(map(str, shape))}\]",
    ):
        call(kind, torch.ones(shape), w, b)


@each_way_in
def test_x_without_dimensions(kind: str) -> None:
    _, w, b = tensors()
    with refused(error_of(kind, ValueError), r"\bx\b", *SHAPE, r"\[\]|0-d|0 dim|scalar"):
        call(kind, torch.tensor(1.0), w, b)


@each_way_in
def test_weights_that_do_not_chain(kind: str) -> None:
    x, w, b = tensors()
    w[1] = torch.ones(3, 8)
    with refused(
        error_of(kind, ValueError), r"weights\[1\]", *SHAPE, r"\[\*, 7\]", r"follow weights\[0\] \[7, 5\]", r"\[3, 8\]"
    ):
        call(kind, x, w, b)


@each_way_in
@pytest.mark.parametrize("shape", [(), (7,), (1, 7, 5)], ids=str)
def test_weights_that_are_no_matrices(kind: str, shape: tuple[int, ...]) -> None:
    x, w, b = tensors()
    w[0] = torch.ones(shape)
    with refused(error_of(kind, ValueError), r"weights\[0\]", *SHAPE, rf"\[{', '.join(map(str, shape))}\]"):
        call(kind, x, w, b)


@each_way_in
@pytest.mark.parametrize("shape", [(), (1,), (8,), (6,), (7, 1), (1, 7), (0,)], ids=str)
def test_a_bias_of_the_wrong_shape(kind: str, shape: tuple[int, ...]) -> None:
    """[1] included: nn.Linear would broadcast it silently."""
    x, w, _ = tensors()
    with refused(error_of(kind, ValueError), r"biases\[0\]", *SHAPE, r"\[7\]", rf"\[{', '.join(map(str, shape))}\]"):
        call(kind, x, w, [torch.ones(shape), None])


@each_way_in
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_wrong_number_of_biases(kind: str, count: int) -> None:
    x, w, _ = tensors()
    with refused(error_of(kind, ValueError), r"biases", r"\b2\b", rf"\b{count}\b"):
        call(kind, x, w, [None] * count)


@each_way_in
@pytest.mark.parametrize("names", [("relu",), ("relu",) * 3, ()], ids=len)
def test_the_wrong_number_of_activations(kind: str, names: tuple[str, ...]) -> None:
    x, w, b = tensors()
    with refused(error_of(kind, ValueError), r"activation|chain", r"\b2\b", rf"\b{len(names)}\b"):
        call(kind, x, w, b, names)


@each_way_in
def test_no_layers(kind: str) -> None:
    with refused(error_of(kind, ValueError), r"weights", "at least one|empty|no layers|0"):
        call(kind, torch.ones(2, 3), [], [], ())


WRONG_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128]
SHORT = {torch.int64: "long|int64", torch.int32: "int", torch.uint8: "byte|uint8", torch.bool: "bool"}


@each_way_in
@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "weights[1]", "biases[0]", "all"])
def test_dtypes_that_are_no_real_numbers(kind: str, dtype: torch.dtype, where: str) -> None:
    x, w, b = tensors()
    if where in ("x", "all"):
        x = x.to(dtype)
    if where in ("weights[1]", "all"):
        w[1] = w[1].to(dtype)
    if where in ("biases[0]", "all"):
        b[0] = b[0].to(dtype)
    if where == "all":
        w[0] = w[0].to(dtype)
    name = r"\bx\b" if where == "all" else re.escape(where) if where != "x" else r"\bx\b"
    with refused(error_of(kind, TypeError), name, "must|expected", SHORT.get(dtype, "complex")):
        call(kind, x, w, b)


@each_way_in
@pytest.mark.parametrize("where", ["x", "weights[0]", "weights[1]", "biases[0]"])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(kind: str, where: str, dtype: torch.dtype) -> None:
    x, w, b = tensors()
    if where == "x":
        x = x.to(dtype)
    elif where == "biases[0]":
        b[0] = b[0].to(dtype)
    else:
        w[int(where[-2])] = w[int(where[-2])].to(dtype)
    names = r"\bx\b|weights\[0\]" if where == "x" else re.escape(where)
    with refused(
        error_of(kind, TypeError), names, "must|expected", "float32|float", "double|float64|bfloat16|float16|half"
    ):
        call(kind, x, w, b)


@each_way_in
@pytest.mark.parametrize("where", ["x", "weights[1]", "biases[0]"])
def test_devices_that_differ(kind: str, where: str) -> None:
    x, w, b = tensors()
    if where == "x":
        x = x.to("meta")
    elif where == "biases[0]":
        b[0] = b[0].to("meta")
    else:
        w[1] = w[1].to("meta")
    names = r"\bx\b|weights\[0\]" if where == "x" else re.escape(where)
    with refused(error_of(kind, TypeError), names, "must|expected", "cpu", "meta"):
        call(kind, x, w, b)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse coo": lambda t: t.to_sparse(),
    "sparse csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
}


@each_way_in
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["x", "weights[0]"])
def test_layouts_that_are_not_strided(kind: str, layout: str, where: str) -> None:
    x, w, b = tensors()
    if where == "x":
        x = LAYOUTS[layout](x)
    else:
        w[0] = LAYOUTS[layout](w[0])
    name = r"\bx\b" if where == "x" else re.escape(where)
    with refused(error_of(kind, TypeError), name, "must|expected", "strided|dense", "sparse|mkldnn"):
        call(kind, x, w, b)


@pytest.mark.parametrize("where", ["x", "weights[0]"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_tensors(where: str) -> None:
    x, w, b = tensors()
    quantise = lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)  # noqa: E731
    if where == "x":
        x = quantise(x)
    else:
        w[0] = quantise(w[0])
    with refused(TypeError, re.escape(where), "must|expected", "quanti|qint8"):
        call("mlp", x, w, b)


@pytest.mark.parametrize("where", ["x", "weights", "weights[0]", "biases[0]", "biases"])
@pytest.mark.parametrize("wrong", [None, 3.0, "text", [[1.0]]], ids=str)
def test_arguments_that_are_no_tensors(where: str, wrong: object) -> None:
    if where == "biases[0]" and wrong is None:
        pytest.skip("None is no bias")
    x, w, b = tensors()
    if where == "x":
        x = wrong
    elif where == "weights":
        w = wrong
    elif where == "biases":
        b = wrong
    elif where == "weights[0]":
        w[0] = wrong
    else:
        b[0] = wrong
    with pytest.raises((TypeError, ValueError)) as caught:
        call("mlp", x, w, b)
    assert where.removesuffix("[0]") in str(caught.value)


@pytest.mark.parametrize("chain", [None, "relu", ["relu", "identity"], [("relu", []), ("identity", [])]], ids=str)
def test_a_chain_that_is_none(chain: object) -> None:
    x, w, b = tensors()
    with pytest.raises(TypeError):
        _C.mlp(x, w, b, chain)


# Chain


def test_an_unknown_activation_is_answered_with_the_names() -> None:
    with refused(ValueError, "'?swish'?", *(rf"\b{info.name}\b" for info in _C.activations())):
        _C.Chain([("relu", []), ("swish", [])])


@pytest.mark.parametrize("name", ["", "ReLU", "relu ", "relu\0", "leaky-relu"], ids=repr)
def test_a_name_must_be_exact(name: str) -> None:
    with refused(ValueError, "leaky_relu"):
        _C.Chain([(name, [])])


@pytest.mark.parametrize("info", _C.activations(), ids=lambda info: info.name)
def test_the_wrong_number_of_parameters(info: _C.ActivationInfo) -> None:
    for parameters in ([*info.defaults, 1.0], info.defaults[:-1] if info.defaults else [0.5]):
        with refused(ValueError, info.name, rf"\b{len(parameters)}\b", *info.parameters):
            _C.Chain([(info.name, parameters)])


def test_hardtanh_refuses_a_lower_bound_above_the_upper_one() -> None:
    x, w, b = tensors()
    for call in (
        lambda: _C.Chain([("hardtanh", [1.0, -2.0])]),
        lambda: _C.activation(x, "hardtanh", [1.0, -2.0]),
        lambda: pyperc.functional.linear(x, w[0], b[0], ("hardtanh", {"min_val": 1.0, "max_val": -2.0})),
    ):
        with refused(ValueError, "min_val of hardtanh must be at most max_val -2, got 1"):
            call()
    assert _C.activation(x, "hardtanh", [1.0, 1.0]).eq(1).all()


def test_a_chain_is_a_value() -> None:
    import copy
    import pickle

    layers = [("leaky_relu", [0.25]), ("tanh", []), ("hardtanh", [-2.0, 3.0])]
    chain = _C.Chain(layers)
    assert len(chain) == 3
    assert chain.names == ["leaky_relu", "tanh", "hardtanh"]
    assert chain.parameters == [[0.25], [], [-2.0, 3.0]]
    for twin in (_C.Chain(layers), pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain)):
        assert twin == chain
        assert hash(twin) == hash(chain)
    assert chain != _C.Chain([("leaky_relu", [0.5]), *layers[1:]])
    assert chain != _C.Chain(layers[:2])
    with pytest.raises((AttributeError, TypeError)):
        chain.names = []
    assert chain != "leaky_relu"


def test_the_operator_refuses_unknown_names_and_counts_of_parameters() -> None:
    x, w, b = tensors()
    with refused(VALUE, "swish", "leaky_relu"):
        torch.ops.pyperc.mlp(x, w, b, ["relu", "swish"], [])
    for parameters in ([], [0.1, 0.2]):
        with refused(VALUE, "parameters", r"\b1\b", rf"\b{len(parameters)}\b"):
            torch.ops.pyperc.mlp(x, w, b, ["leaky_relu", "identity"], parameters)


@pytest.mark.parametrize("name", ["swish", "", "leaky-relu"])
def test_activation_refuses_unknown_names(name: str) -> None:
    with refused(ValueError, "leaky_relu"):
        _C.activation(torch.ones(3), name, [])


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_activation_refuses_dtypes(dtype: torch.dtype) -> None:
    with refused(TypeError, "must|expected"):
        _C.activation(torch.ones(3).to(dtype), "relu", [])


# backward


def test_backward_refuses_a_gradient_of_another_shape_or_dtype() -> None:
    x, w, b = tensors()
    y = call("mlp", x.requires_grad_(), w, b)
    with pytest.raises(RuntimeError, match=r"Mismatch in shape|shape"):
        y.backward(torch.ones(4, 4), retain_graph=True)
    y.backward(torch.ones(4, 3))
    assert x.grad is not None


def test_the_backward_operator_refuses_what_does_not_fit() -> None:
    x, w, _ = tensors()
    b = [torch.ones(7), torch.ones(3)]
    names = ["relu", "identity"]
    saved = torch.ops.pyperc.mlp_forward(x, w, b, names, [])
    dy, needs = torch.ones(4, 3), [True] * 5
    good = torch.ops.pyperc.mlp_backward(dy, x, w, saved, names, [], needs)
    assert len(good) == 5
    for wrong in (torch.ones(4, 4), torch.ones(5, 3), torch.ones(3), torch.ones(4, 3, dtype=F64)):
        with refused((ValueError, TypeError, RuntimeError), r"\bdy\b", "must|expected"):
            torch.ops.pyperc.mlp_backward(wrong, x, w, saved, names, [], needs)
    with refused(VALUE, "needs", r"\b5\b", r"\b3\b"):
        torch.ops.pyperc.mlp_backward(dy, x, w, saved, names, [], needs[:3])
    for wrong in (saved[:-1], [*saved, saved[0]], []):
        with refused(VALUE, "saved", rf"\b{len(saved)}\b", rf"\b{len(wrong)}\b"):
            torch.ops.pyperc.mlp_backward(dy, x, w, wrong, names, [], needs)
    for spoiled in (saved[0][:, :-1], saved[0].double(), saved[0].to("meta"), saved[0][0]):
        with refused((ValueError, TypeError, RuntimeError), r"saved\[0\]"):
            torch.ops.pyperc.mlp_backward(dy, x, w, [spoiled, *saved[1:]], names, [], needs)
    with refused(VALUE, "weights"):
        torch.ops.pyperc.mlp_backward(dy, x, [], saved, names, [], needs)


# Instruction sets


def test_use_isa_refuses_unknown_names() -> None:
    before = _C.isa()
    with refused(ValueError, "sse9", *_C.isas_built()):
        _C.use_isa("sse9")
    assert _C.isa() == before


def test_isas_are_consistent() -> None:
    assert _C.isas_built()[0] == "scalar"
    assert set(_C.isas()) <= set(_C.isas_built())
    assert _C.isa() in _C.isas()
    for isa in _C.isas_built():
        for dtype in (F32, F64):
            mr, nr = _C.tile(isa, dtype)
            assert mr >= 1
            assert nr >= 1


def python(program: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYPERC_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", _C.isas())
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    result = python("from pyperc import _C; print(_C.isa())", name)
    assert result.stdout.strip() == name, result.stderr


def test_an_empty_environment_variable_means_the_best() -> None:
    result = python("from pyperc import _C; print(_C.isa())", "")
    assert result.stdout.strip() == _C.isas()[-1], result.stderr


def refusal(isa: str) -> str:
    result = python("from pyperc import _C; print(_C.isa())", isa)
    assert result.returncode == 1, f"exit status {result.returncode}, {result.stdout!r}"
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_in_the_environment_is_refused(name: str) -> None:
    last = refusal(name)
    for text in ("RuntimeError", "PYPERC_ISA", name, *_C.isas()):
        assert text in last


def test_an_instruction_set_that_the_processor_lacks_is_refused() -> None:
    lacking = [isa for isa in _C.isas_built() if isa not in _C.isas()]
    if not lacking:
        pytest.skip("this processor runs every instruction set that is built")
    last = refusal(lacking[0])
    for text in ("RuntimeError", "PYPERC_ISA", lacking[0], *_C.isas()):
        assert text in last
    with refused(ValueError, lacking[0], *_C.isas()):
        _C.use_isa(lacking[0])
