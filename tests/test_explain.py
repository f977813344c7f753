"""explain: what it says is what runs, and saying it changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_plan import FAR, PATHS
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pyperc
from pyperc import _C
from pyperc.explain import Layer


class Tower(nn.Module):
    """A fused container and a plain one, a lone pyperc.Linear, and a fused container that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = pyperc.fuse(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4)))
        self.plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.lone = pyperc.Linear(4, 3, activation="tanh")
        self.idle = pyperc.MLP([2, 2])

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.lone(self.plain(self.fused(scale * x)))


def lines(model: nn.Module, *inputs: Tensor) -> list[tuple[str, str, str]]:
    return [(layer.name, layer.call, layer.note) for layer in pyperc.explain(model, *inputs).layers]


def test_each_fused_layer_has_its_plan() -> None:
    layers = pyperc.explain(pyperc.MLP([6, 5, 4, 3], "tanh", "gelu"), torch.zeros(8, 6)).layers
    assert [(layer.name, layer.module, layer.activation) for layer in layers] == [
        ("0", "Linear(6, 5)", "tanh"),
        ("2", "Linear(5, 4)", "tanh"),
        ("4", "Linear(4, 3)", "gelu"),
    ]
    for layer, k, n in zip(layers, (6, 5, 4), (5, 4, 3), strict=True):
        assert (layer.call, layer.run, layer.path, layer.isa) == ("fused", 0, "native", pyperc._C.isa())
        assert layer.dtype == "float32"
        assert layer.threads >= 1
        assert layer.flops == 2 * 8 * k * n
        assert layer.tile
        assert layer.blocking
        assert layer.kernel
        assert layer.pack
    assert [layer.saved for layer in layers] == ["output", "output", "summation"]


@contextmanager
def forced(values: Mapping[str, int]) -> Iterator[None]:
    before = _C.thresholds()
    _C.set_thresholds(dict(values))
    try:
        yield
    finally:
        _C.set_thresholds(before)


def backward(model: nn.Module, *inputs: Tensor) -> list[Any]:
    return [layer.backward for layer in pyperc.explain(model, *inputs).layers]


@pytest.mark.parametrize(
    ("path", "threads", "split", "words"),
    [
        ("one thread", 1, "rows", "1 thread, dw is summed over the rows, 70 a chunk"),
        (
            "one thread, by layers",
            1,
            "layers",
            "1 thread, layer by layer, dw and then dx, by columns or by chunks",
        ),
        ("threads share rows, dw summed by rows", 2, "rows", "2 threads, each thread sums dw over its own rows, 35 a"),
        ("threads share rows, by layers", 2, "layers", "2 threads, layer by layer"),
        ("threads share columns", 2, "layers", "2 threads, layer by layer"),
    ],
)
def test_each_way_backward_is_named_where_it_is_forced(
    isa: str, path: str, threads: int, split: str, words: str
) -> None:
    torch.set_num_threads(2)
    model = pyperc.MLP([20, 33, 40, 7], "tanh")
    with forced(PATHS[path]):
        explanation = pyperc.explain(model, torch.zeros(70, 20))
    for layer in explanation.layers:
        assert layer.backward is not None
        assert (layer.backward.threads, layer.backward.split) == (threads, split)
    assert f"\n\nbackward of run 0: {words}" in str(explanation)


def test_the_chunk_of_the_way_backward(isa: str) -> None:
    torch.set_num_threads(1)
    rows = _C.tile(isa, torch.float32)[0]
    with forced({"least_chunk": rows, "most_chunk": rows, "chunk_bytes": 1}):
        assert {way.chunk for way in backward(pyperc.MLP([20, 33, 7], "relu"), torch.zeros(5 * rows, 20))} == {rows}


def test_16_bits_go_backward_block_by_block(isa: str) -> None:
    (way, _) = backward(pyperc.MLP([20, 33, 7], "relu", dtype=torch.bfloat16), torch.zeros(70, 20).bfloat16())
    assert (way.split, way.chunk) == ("layers", 0)
    assert str(way).endswith("dw and then dx, block by block")


def test_the_blocks_of_rows_of_a_long_batch() -> None:
    with forced({"rows_at_once": 30, "packed_bytes": -(1 << 40), "chunk_bytes": 1}):
        long, short = (pyperc.explain(pyperc.MLP([20, 33, 7]), torch.zeros(n, 20)).layers for n in (95, 45))
        (single,) = pyperc.explain(pyperc.MLP([20, 7]), torch.zeros(95, 20)).layers
    with forced({"rows_at_once": 30}):
        packed_together = pyperc.explain(pyperc.MLP([20, 33, 7]), torch.zeros(95, 20)).layers
    assert all("up to 3 blocks of the batch where no x is kept" in layer.blocking for layer in long)
    assert not any("of the batch" in layer.blocking for layer in (*short, single, *packed_together))


def test_backward_may_take_more_threads_than_forward() -> None:
    torch.set_num_threads(2)
    with forced({"parallel_flops": 2 * 64 * 32 * 32}):
        (layer,) = pyperc.explain(pyperc.MLP([32, 32]), torch.zeros(64, 32)).layers
    assert layer.backward is not None
    assert (layer.threads, layer.backward.threads) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_16_bits_sum_no_dw_by_rows(dtype: torch.dtype) -> None:
    with forced(PATHS["threads share rows, dw summed by rows"]):
        ways = backward(pyperc.MLP([20, 33, 7], dtype=dtype), torch.zeros(70, 20, dtype=dtype))
    assert {way.split for way in ways} == {"rows" if dtype.itemsize >= 4 else "layers"}


@pytest.mark.parametrize(
    ("batch", "sizes", "activation", "needs_dx", "split"),
    [
        (4096, [128, 128], "relu", True, "rows"),  # in what the first thread keeps
        (1024, [512, 512], "relu", True, "layers"),  # plain torch holds y, dw and dx
        (1024, [512, 512], "relu", False, "layers"),
        (4096, [256] * 4, "relu", True, "rows"),  # plain torch holds two ds more
        (1024, [256] * 5, "gelu", True, "rows"),  # ... and an x of each hidden layer
        (1024, [256] * 5, "identity", True, "layers"),  # ... and no ds
        (32, [64] * 4, "relu", True, "rows"),  # one thread, which adds up nothing
        (64, [64] * 4, "relu", True, "layers"),
    ],
    ids=str,
)
def test_the_way_backward_that_holds_no_more_than_plain_torch(
    batch: int, sizes: list[int], activation: str, needs_dx: bool, split: str
) -> None:
    torch.set_num_threads(2)
    x = torch.zeros(batch, sizes[0], requires_grad=needs_dx)
    assert {way.split for way in backward(pyperc.MLP(sizes, activation), x)} == {split}


def test_what_is_made_within_the_model_needs_dx() -> None:
    torch.set_num_threads(2)
    parts = [pyperc.MLP([256] * 4) for _ in range(2)]
    x = torch.zeros(1500, 256)
    with forced({"in_place_bytes": 0}):  # packed weights weigh, by the thresholds of every processor
        first, *_, last = backward(nn.Sequential(*parts), x)
        assert first == backward(parts[0], x)[0]
        assert last == backward(parts[1], x.requires_grad_())[0]
    assert first != last


@pytest.mark.parametrize(("in_place_bytes", "split"), [(0, "layers"), (2048, "rows")])
def test_packed_weights_that_are_more_than_a_thread_keeps(in_place_bytes: int, split: str) -> None:
    torch.set_num_threads(2)
    with forced({"in_place_bytes": in_place_bytes}):
        ways = backward(pyperc.MLP([256] * 4), torch.zeros(1500, 256, requires_grad=True))
    assert {way.split for way in ways} == {split}


def test_the_way_backward_does_not_depend_on_what_needs_it() -> None:
    model, x = pyperc.MLP([6, 5, 4]), torch.zeros(8, 6)
    want = backward(model, x.clone().requires_grad_())
    with torch.no_grad():
        assert backward(model.requires_grad_(False), x) == want
    assert None not in want


def test_runs_that_go_backward_in_one_way_share_a_line() -> None:
    with forced({"parallel_flops": FAR}):
        table = str(pyperc.explain(Tower(), torch.zeros(8, 6)))
    assert table.endswith("\n\nbackward of runs 0, 1, 2: 1 thread, dw is summed over the rows, 8 a chunk")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_width_goes_backward_by_torch() -> None:
    model = pyperc.fuse(nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 4)))
    explanation = pyperc.explain(model, torch.zeros(8, 6))
    assert {layer.call for layer in explanation.layers} == {"fused"}
    assert {layer.backward for layer in explanation.layers} == {None}
    assert "backward" not in str(explanation)


def test_a_tree_of_modules() -> None:
    assert lines(Tower(), torch.zeros(8, 6)) == [
        ("fused.0", "fused", ""),
        ("fused.2", "ordinary", "Dropout is not a layer that is fused"),
        ("fused.3", "fused", ""),
        ("plain", "candidate", "pyperc.fuse would fuse its linear layers"),
        ("lone", "fused", ""),
        ("idle.0", "ordinary", "the container was not called"),
    ]
    runs = [layer.run for layer in pyperc.explain(Tower(), torch.zeros(8, 6), scale=2.0).layers]
    assert runs == [0, None, 1, None, 2, None]


def test_reasons_for_ordinary_calls() -> None:
    model = pyperc.MLP([2] * 8, "leaky_relu")
    model[0].register_forward_hook(lambda *args: None)
    model[2].register_full_backward_pre_hook(lambda *args: None)
    parametrizations.weight_norm(model[4])
    model[6].forward = model[6].forward
    model[9].negative_slope = torch.tensor(0.1)
    model[12] = nn.LayerNorm(2)
    notes = {name: note for name, call, note in lines(model, torch.zeros(3, 2)) if call == "ordinary"}
    assert notes == {
        "0": "has a forward hook",
        "1": "an activation that follows no linear layer",
        "2": "has a backward pre hook",
        "3": "an activation that follows no linear layer",
        "4": "is parametrized",
        "5": "an activation that follows no linear layer",
        "6": "has a forward of its own",
        "7": "an activation that follows no linear layer",
        "9": "its parameters are not those of a listed activation",
        "12": "LayerNorm is not a layer that is fused",
    }


def test_reasons_that_hold_for_all_children() -> None:
    model = pyperc.MLP([2, 2])
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert lines(model, torch.zeros(3, 2)) == [("0", "ordinary", "a global module hook is registered")]
    finally:
        handle.remove()
    complex_model = pyperc.MLP([2, 2], dtype=torch.complex64)
    (layer,) = pyperc.explain(complex_model, torch.zeros(3, 2, dtype=torch.complex64)).layers
    assert layer.call == "ordinary"
    assert "complex" in layer.note.lower()


def test_the_reason_for_the_composition() -> None:
    (layer,) = pyperc.explain(pyperc.MLP([2, 2], device="meta"), torch.zeros(3, 2, device="meta")).layers
    assert (layer.call, layer.path) == ("fused", "aten")
    assert layer.note
    model = pyperc.MLP([2, 2, 2], ("leaky_relu", {"negative_slope": -0.5}))
    assert all(layer.path == "aten" and layer.note for layer in pyperc.explain(model, torch.zeros(3, 2)).layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_it_is_torchs_operations_in_their_dtype(dtype: torch.dtype) -> None:
    parts = [pyperc.MLP([4, 4, 4]), nn.Dropout(), pyperc.Linear(4, 3, activation="relu")]
    model, x = nn.Sequential(*parts).to(dtype), torch.zeros(5, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        came = str(model(x).dtype).removeprefix("torch.")
        layers = [layer for layer in pyperc.explain(model, x).layers if layer.call == "fused"]
    assert {(layer.path, layer.note, layer.dtype) for layer in layers} == {("aten", "autocast is on", came)}
    assert [(layer.name, layer.run, layer.backward, layer.isa) for layer in layers] == [
        ("0.0", 0, None, ""),
        ("0.2", 0, None, ""),
        ("2", 1, None, ""),
    ]
    assert {layer.path for layer in pyperc.explain(model, x).layers if layer.call == "fused"} == {"native"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm, self.on = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6), True


def helped(x: Tensor) -> Tensor:
    return x if x is None else torch.relu(x)


# What keeps a forward from being a straight line, the forward, and the reason as it is given.
FORWARDS: dict[str, tuple[Callable[..., Any], str]] = {
    "a branch": (
        lambda self, x: self.fc2(self.fc1(x)) if self.on else x,
        "its forward branches (if, and, or, while, with, try, assert)",
    ),
    "a function within": (
        lambda self, x: (lambda y: self.fc2(y))(self.fc1(x)),
        "its forward defines a function (def, lambda, comprehension)",
    ),
    "a branch in a function": (
        lambda self, x: self.fc2(helped(self.fc1(x))),
        "helped, which its forward calls, branches (if, and, or, while, with, try, assert)",
    ),
    "dropout by a function": (
        lambda self, x: self.fc2(F.dropout(self.fc1(x), 0.5, self.training)),
        "its forward calls dropout, which is neither a module nor a listed activation",
    ),
    "an unknown activation": (
        lambda self, x: self.fc2(F.mish(self.fc1(x))),
        "its forward calls mish, which is neither a module nor a listed activation",
    ),
    "an unknown method": (
        lambda self, x: self.fc2(self.fc1(x).cos()),
        "its forward calls cos, which is neither a module nor a listed activation",
    ),
    "an activation in place": (
        lambda self, x: self.fc2(F.relu(self.fc1(x), inplace=True)),
        "its forward calls relu in place",
    ),
    "a residual sum": (
        lambda self, x: x + self.fc2(torch.relu(self.fc1(x))),
        "its forward calls add, which is neither a module nor a listed activation",
    ),
    "an input used twice": (
        lambda self, x: (self.fc1(x), self.fc2(x))[1],
        "its forward uses x 2 times, not once",
    ),
    "a dictionary": (
        lambda self, x: {"y": self.fc2(torch.relu(self.fc1(x)))},
        "in its forward, what it returns does not follow from the result before it alone",
    ),
    "a default": (
        lambda self, x=None: self.fc2(torch.relu(self.fc1(x))),
        "its forward takes other than one argument without a default",
    ),
    "a number asked for": (
        lambda self, x: self.fc2(self.fc1(x)[: int(x.sum())]),
        "torch.fx cannot follow its forward: ",
    ),
    "layers alone": (
        lambda self, x: self.fc2(self.norm(self.fc1(x))),
        "none of its linear layers that may be fused has another or an activation after it",
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_module_that_is_not_fused_has_the_reason(name: str) -> None:
    forward, reason = FORWARDS[name]
    made = type("Made", (Block,), {"forward": forward})
    model = nn.ModuleDict({"inner": made()})
    model.forward = lambda x: model["inner"](x)
    assert type(pyperc.fuse(model)["inner"]) is made
    ((found, call, note),) = lines(model, torch.zeros(3, 6))
    assert (found, call) == ("inner", "ordinary")
    assert note.startswith(reason) if reason.endswith(": ") else note == reason


def test_reasons_of_modules_that_hold_their_layers_in_other_ways() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])])

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.parts[1][0](self.parts[0](x))
            return self.last

    class Own(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1][0](self.parts[0](x))

    own = pyperc.fuse(Own())
    own.forward = own.forward
    model = nn.Sequential(Listed(), own, nn.TransformerEncoderLayer(4, 2, 8))
    assert lines(model, torch.zeros(3, 4)) == [
        ("0", "ordinary", "its forward sets an attribute, an item or a global"),
        ("1", "ordinary", "has a forward of its own"),
        ("2", "ordinary", "pyperc.fuse leaves the forward of TransformerEncoderLayer to torch"),
        ("2.self_attn", "ordinary", "pyperc.fuse leaves the forward of MultiheadAttention to torch"),
    ]


def test_what_stands_in_a_container_has_its_lines_there_and_once() -> None:
    class Straight(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    class Outer(Block):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Straight()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.inner(torch.tanh(self.fc1(x))))

    class Residual(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc1(x)

    shared = pyperc.MLP([6, 6])
    model = pyperc.nn.Sequential(nn.Linear(6, 6), shared, pyperc.fuse(Outer()), Residual(), shared, nn.LayerNorm(6))
    x = torch.zeros(3, 6)
    assert [line[:2] for line in lines(model, x)] == [
        ("0", "fused"),
        ("1.0", "fused"),
        ("2.fc1", "fused"),
        ("2.inner.fc1", "fused"),
        ("2.inner.fc2", "fused"),
        ("2.fc2", "fused"),
        ("3", "ordinary"),
        ("5", "ordinary"),
    ]
    assert lines(Outer(), x) == [("", "candidate", "pyperc.fuse would fuse it")]


def test_an_input_is_asked_for() -> None:
    for model in (pyperc.MLP([2, 2]), pyperc.TrainStep(pyperc.MLP([2, 2]))):
        with pytest.raises(TypeError, match=r"explain: expected an example input after the model.*, got none"):
            pyperc.explain(model)

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pyperc.MLP([2, 2])

        def forward(self) -> Tensor:
            return self.net(torch.ones(3, 2))

    assert lines(Drawing()) == [("net.0", "fused", "")]


def test_it_changes_nothing() -> None:
    model = pyperc.nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)).train()
    model[2].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pyperc.explain(model, x)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_it_changes_nothing_when_the_model_raises() -> None:
    model = Tower().train()
    with pytest.raises(ValueError, match="weights"):
        pyperc.explain(model, torch.zeros(8, 7))
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert lines(model, torch.zeros(8, 6))


def test_a_container_that_is_called_twice_is_explained_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pyperc.MLP([4, 4])
            self.alias = self.net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.alias(x)[:2])

    (layer,) = pyperc.explain(Twice(), torch.zeros(8, 4)).layers
    assert layer.flops == 2 * 8 * 4 * 4


def test_a_layer_that_stands_twice_in_a_container() -> None:
    linear = nn.Linear(4, 4)
    model = pyperc.nn.Sequential(linear, nn.Tanh(), nn.LayerNorm(4), linear, nn.Tanh(), linear)
    assert [(layer.name, layer.run) for layer in pyperc.explain(model, torch.zeros(8, 4)).layers] == [
        ("0", 0),
        ("2", None),
        ("3", 1),
        ("5", 1),
    ]


def test_a_compiled_model_is_explained_as_the_model_in_it() -> None:
    model = pyperc.MLP([6, 5, 4])
    compiled = torch.compile(model, backend="eager")
    assert lines(compiled, torch.zeros(8, 6)) == lines(model, torch.zeros(8, 6))


def test_data_and_table() -> None:
    explanation = pyperc.explain(Tower(), torch.zeros(8, 6))
    data = json.loads(json.dumps(explanation.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in explanation.layers]
    assert all(dataclasses.is_dataclass(layer) for layer in explanation.layers)
    table = str(explanation).splitlines()
    assert table[0].split()[:3] == ["name", "module", "activation"]
    assert set(table[1]) == {"-", " "}
    lines_of_layers = table[2 : 2 + len(explanation.layers)]
    assert data["layers"][0]["backward"]["threads"] == 1
    assert table[2].startswith("fused.0  Linear(6, 5)")
    assert "relu" in table[2]
    column = table[0].index("call")
    assert [line[column:].split()[0] for line in lines_of_layers] == [layer.call for layer in explanation.layers]


def test_nothing_to_explain() -> None:
    explanation = pyperc.explain(nn.LayerNorm(2), torch.zeros(3, 2))
    assert explanation.layers == ()
    assert str(explanation) == "no linear layer was called"


def test_a_linear_layer_of_torch_alone() -> None:
    note = "alone it is not fused: a pyperc.Linear is, and an nn.Sequential after pyperc.fuse"
    assert lines(nn.Linear(2, 2), torch.zeros(3, 2)) == [("", "ordinary", note)]


def test_the_meaning_of_every_field_is_told() -> None:
    told = {words[0] for line in (Layer.__doc__ or "").splitlines() if (words := line.split())}
    assert {field.name for field in dataclasses.fields(Layer)} <= told


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"model must be an instance of torch\.nn\.Module, got int"):
        pyperc.explain(3, torch.zeros(1))
