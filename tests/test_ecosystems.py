"""Networks as other libraries make them: fused, explained, and equal. What may be absent has its structure here."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import close, plain, same_gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyperc

F64 = torch.float64
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def calls(model: nn.Module, *inputs: Any) -> list[str]:
    return [layer.call for layer in pyperc.explain(model, *inputs).layers]


def fused(other: nn.Module) -> nn.Module:
    return pyperc.fuse(copy.deepcopy(other))


# stable_baselines3.common.torch_layers, 2.x
def create_mlp(
    input_dim: int,
    output_dim: int,
    net_arch: list[int],
    activation_fn: type[nn.Module] = nn.ReLU,
    squash_output: bool = False,
    with_bias: bool = True,
    post_linear_modules: list[type[nn.Module]] | None = None,
) -> list[nn.Module]:
    modules: list[nn.Module] = []
    width = input_dim
    for size in net_arch:
        modules.append(nn.Linear(width, size, bias=with_bias))
        modules += [module(size) for module in post_linear_modules or ()]
        modules.append(activation_fn())
        width = size
    if output_dim > 0:
        modules.append(nn.Linear(width, output_dim, bias=with_bias))
    if squash_output:
        modules.append(nn.Tanh())
    return modules


class ActorCritic(nn.Module):
    """The structure of ActorCriticPolicy: an MLP extractor with two nets, and a head for each."""

    def __init__(self, make: Callable[..., list[nn.Module]]) -> None:
        super().__init__()
        self.mlp_extractor = nn.ModuleDict(
            {name: nn.Sequential(*make(6, -1, [64, 64], nn.Tanh)) for name in ("policy_net", "value_net")}
        )
        self.action_net, self.value_net = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, observation: Tensor) -> Tensor:
        policy = self.action_net(self.mlp_extractor["policy_net"](observation))
        return torch.cat([policy, self.value_net(self.mlp_extractor["value_net"](observation))], -1)


def test_stable_baselines3() -> None:
    try:
        from stable_baselines3.common.torch_layers import create_mlp as make
    except ImportError:
        make = create_mlp
    x = torch.randn(16, 6, dtype=F64)
    for other in (
        nn.Sequential(*make(6, 3, [16, 16], nn.ReLU, squash_output=True)).double(),
        nn.Sequential(*make(6, 3, [16], nn.ELU, with_bias=False)).double(),
        ActorCritic(make).double(),
    ):
        model = fused(other)
        same_gradients(model, other, x)
        # The policy itself calls the heads.
        assert {layer.call for layer in pyperc.explain(model, x).layers if layer.name} == {"fused"}
    normed = nn.Sequential(*make(6, 3, [16], post_linear_modules=[nn.LayerNorm])).double()
    same_gradients(fused(normed), normed, x)
    assert calls(fused(normed), x) == ["fused", "ordinary", "ordinary", "fused"]


def test_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="needs torchvision; test_fuse.py has the structure of its MLP")
    x = torch.randn(5, 6, dtype=F64)
    for options in ({}, {"norm_layer": nn.LayerNorm}, {"activation_layer": nn.GELU, "inplace": None}):
        other = ops.MLP(6, [16, 8, 3], **options).double().eval()
        model = fused(other)
        assert isinstance(model, ops.MLP)
        same_gradients(model, other, x)
        assert "fused" in calls(model, x)


def digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x[:400].astype("float32"), y[:400]


def test_scikit_learn_pipeline_through_skorch() -> None:
    skorch = pytest.importorskip("skorch", reason="needs skorch")
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = digits()

    def build(kind: type[nn.Module], **keywords: Any) -> Any:
        torch.manual_seed(0)
        return make_pipeline(
            StandardScaler(),
            skorch.NeuralNetClassifier(
                kind, criterion=nn.CrossEntropyLoss, max_epochs=5, lr=0.5, verbose=0, train_split=None, **keywords
            ),
        )

    class Plain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    mine = build(pyperc.MLP, module__sizes=[64, 32, 10]).fit(x, y)
    torch.manual_seed(0)
    torchs = build(Plain).fit(x, y)
    torch.testing.assert_close(
        torch.from_numpy(mine.predict_proba(x)), torch.from_numpy(torchs.predict_proba(x)), rtol=1e-5, atol=1e-6
    )
    assert mine.score(x, y) > 0.9
    assert pickle.loads(pickle.dumps(mine)).score(x, y) == mine.score(x, y)
    assert clone(mine).set_params(neuralnetclassifier__module__activation="tanh").fit(x, y).score(x, y) > 0.9


class LightningStyle(nn.Module):
    """What a LightningModule holds: the model as an attribute, training_step, configure_optimizers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.logged: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.logged.append(loss.item())
        return loss

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def test_a_lightning_style_module() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6, dtype=F64), torch.randint(0, 3, (64,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    model = LightningStyle(nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3))).double()
    curves = []
    for module in (fused(model), model):
        (optimizer,), (schedule,) = module.configure_optimizers()
        module.train()
        for _ in range(3):
            for i, batch in enumerate(loader):
                optimizer.zero_grad()
                module.training_step(batch, i).backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
            schedule.step()
        curves.append(module.logged)
        assert list(module.state_dict()) == [f"model.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")]
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-12, atol=1e-12)


class GELUActivation(nn.Module):
    """transformers.activations.GELUActivation: a module that holds a function."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.functional.gelu

    def forward(self, input: Tensor) -> Tensor:
        return self.act(input)


class CLIPMLP(nn.Module):
    """transformers' CLIPMLP, and with other names ViT's, BERT's and Whisper's."""

    def __init__(self) -> None:
        super().__init__()
        self.activation_fn = GELUActivation()
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 6)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        hidden_states = self.fc2(hidden_states)
        return hidden_states  # noqa: RET504


class FeedForward(nn.Module):
    """A feed-forward block with dropout, as in many transformers: a loop over a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(6, 12), nn.SiLU(), nn.Dropout(0.5), nn.Linear(12, 6), nn.Dropout(0.5)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class Handwritten(nn.Module):
    """The network of many a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.slope = 0.3

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = F.leaky_relu(self.second(x), self.slope)
        return F.log_softmax(self.third(x).tanh(), dim=-1)


class Encoder(nn.Module):
    """A pre-norm layer around a feed-forward block: what is no straight line itself holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), CLIPMLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(hidden_states=self.norm(x))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (CLIPMLP, ["fused"] * 2),
        (FeedForward, ["fused", "ordinary", "fused", "ordinary"]),
        (Handwritten, ["ordinary", "fused", "fused", "fused", "ordinary"]),
        (Encoder, ["fused"] * 2),
    ],
)  # fmt: skip
def test_feed_forward_blocks_that_are_no_sequential(make: Callable[[], nn.Module], expected: list[str]) -> None:
    other = make().double()
    assert "candidate" in calls(other, torch.randn(5, 6, dtype=F64))
    model = fused(other)
    assert isinstance(model, make)
    x = torch.randn(5, 6, dtype=F64)
    for _ in range(2):
        same_gradients(model.eval(), other.eval(), x)
    assert calls(model, x) == expected
    assert list(model.state_dict()) == list(other.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        close(copied(x), other(x))
    assert type(pyperc.unfuse(model)) is make
    assert not any("_pyperc" in key for module in model.modules() for key in module.__dict__)
    close(model(x), other(x))


class Traced:
    """A backend that keeps which operators of ours the last graph calls, and how many graphs there were."""

    def __init__(self) -> None:
        self.graphs, self.operators = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        self.operators = sum(node.target is torch.ops.pyperc.mlp.default for node in graph.graph.nodes)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@pytest.mark.parametrize(("make", "operators"), [(CLIPMLP, 1), (FeedForward, 2), (Handwritten, 1), (Encoder, 1)])
def test_a_block_is_fused_in_a_compiled_graph(make: Callable[[], nn.Module], operators: int) -> None:
    """Also where no eager call came before."""
    torch._dynamo.reset()
    other = make().double().eval()
    model, backend = fused(other), Traced()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 6, dtype=F64)
    close(compiled(x), other(x))
    assert backend.graphs == 1
    same_gradients(model, other, x, compiled)
    if TORCH < (2, 12):
        return
    assert backend.operators == operators
    program = torch.export.export(model, (x,))
    assert sum(node.target is torch.ops.pyperc.mlp.default for node in program.graph.nodes) == operators
    close(program.module()(x), other(x))
    torch._dynamo.reset()


def test_a_compiled_block_that_changes_is_compiled_anew() -> None:
    """From its own forward first, and fused again after an eager call."""
    torch._dynamo.reset()
    other = Handwritten().double()
    model, backend = fused(other), Traced()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(5, 6, dtype=F64)
    close(compiled(x), other(x))
    for network in (model, other):
        network.slope = 0.9
    close(compiled(x), other(x))
    assert backend.operators == 0
    model(x)
    close(compiled(x), other(x))
    assert backend.operators == (TORCH >= (2, 12))
    for network in (model, other):
        torch.manual_seed(1)
        network.second = nn.Linear(8, 8).double()
    close(compiled(x), other(x))
    for network in (model, other):
        network.forward = lambda x, network=network: type(network).forward(network, x) * 2
    close(compiled(x), other(x))
    torch._dynamo.reset()


def test_dropout_in_a_block_draws_what_it_always_did() -> None:
    other = FeedForward().double()
    model = fused(other)
    x = torch.randn(5, 6, dtype=F64)
    for mode in (True, False):
        model.train(mode)
        other.train(mode)
        results = []
        for network in (model, other):
            torch.manual_seed(4)
            results.append(network(x))
        close(*results)


def test_a_block_that_changes_is_looked_at_anew() -> None:
    other = Handwritten().double()
    model = fused(other)
    x = torch.randn(5, 6, dtype=F64)

    def agree() -> None:
        close(model(x), other(x))
        assert torch.isfinite(model(x)).all()

    agree()
    before = model(x)
    for network in (model, other):
        network.slope = 0.9
    agree()
    assert not torch.equal(model(x), before)
    for network in (model, other):
        torch.manual_seed(1)
        network.second = nn.Linear(8, 8).double()
    agree()
    for network in (model, other):
        network.first.register_forward_hook(lambda m, a, y: 2 * y)
    agree()
    for network in (model, other):
        network.forward = lambda x, network=network: type(network).forward(network, x) * 2
    close(model(x), other(x))


def test_hooks_on_a_module_within_a_block_run() -> None:
    other = CLIPMLP().double()
    model = fused(other)
    x = torch.randn(5, 6, dtype=F64)
    close(model(x), other(x))
    for network in (model, other):
        network.activation_fn.register_forward_hook(lambda m, a, y: 3 * y)
    close(model(x), other(x))
    for network in (model, other):
        network.activation_fn.act = torch.tanh
    same_gradients(model, other, x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.scale = nn.Linear(6, 6), nn.Linear(6, 6), True

    def forward(self, x: Tensor) -> Tensor:
        if self.scale:
            x = torch.tanh(self.fc1(x))
        return self.fc2(x)


class Helped(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Residual(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Counting(Branching):
    def forward(self, x: Tensor) -> Tensor:
        self.scale = not self.scale
        return self.fc2(torch.relu(self.fc1(x)))


class FunctionalDropout(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(torch.relu(self.fc1(x)), 0.5, self.training))


class TwoArguments(Branching):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("make", [Branching, Helped, Residual, Counting, FunctionalDropout, TwoArguments])
def test_what_may_go_another_way_is_left_alone(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert type(pyperc.fuse(model)) is make


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers; CLIPMLP above has the structure")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    other = transformers.ViTModel(config).eval()
    model = fused(other)
    x = torch.randn(2, 3, 8, 8)
    layers = [layer for layer in pyperc.explain(model, x).layers if layer.call == "fused"]
    assert {layer.name.split(".")[-1] for layer in layers} == {"fc1", "fc2"}
    with torch.no_grad():
        close(model(x).last_hidden_state, other(x).last_hidden_state, torch.float32)


def test_plain_undoes_all_of_it() -> None:
    for make in (CLIPMLP, FeedForward, Handwritten, Encoder):
        assert type(plain(fused(make()))) is make
