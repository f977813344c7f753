"""State by value: state_dict both ways, files, copies, parametrisations, pruning, tied and lazy parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import close, pair, plain, same_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyperc

F64 = torch.float64


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6, dtype=F64)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_state_dict_both_ways(x: Tensor, assign: bool) -> None:
    model, other = pair()
    source = nn.Sequential(*(copy.deepcopy(list(pair()[1]))))
    assert list(model.state_dict()) == list(source.state_dict())
    model(x)  # what is kept of the first call must not outlive the parameters
    model.load_state_dict(source.state_dict(), assign=assign)
    same_gradients(model, source, x)
    other.load_state_dict(model.state_dict(), assign=assign)
    same_gradients(model, other, x)
    assert (model[0].weight.data_ptr() == source[0].weight.data_ptr()) == assign


def test_strict_and_partial_loading(x: Tensor) -> None:
    model, _ = pair()
    other, _ = pair()
    some = {name: t for name, t in other.state_dict().items() if name.startswith("0.")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(some)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**other.state_dict(), "8.weight": torch.zeros(1)})
    keys = model.load_state_dict({**some, "more": torch.zeros(1)}, strict=False)
    assert keys.missing_keys == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert keys.unexpected_keys == ["more"]
    assert torch.equal(model[0].weight, other[0].weight)
    same_gradients(model, plain(model), x)


def test_onto_another_dtype_and_prefix() -> None:
    model, _ = pair(dtype=torch.float32)
    outer = nn.ModuleDict({"net": pair()[0]})
    outer.load_state_dict({f"net.{name}": t for name, t in model.state_dict().items()})
    assert outer["net"][0].weight.dtype == F64
    close(outer["net"][0].weight.float(), model[0].weight, torch.float32)


def test_weights_only_files_and_safetensors(x: Tensor, tmp_path: Path) -> None:
    model, other = pair()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh, _ = pair()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True, mmap=True))
    same_gradients(fresh, other, x)
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    fresh, _ = pair()
    safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))
    same_gradients(fresh, other, x)
    plainly = plain(pair()[0])
    plainly.load_state_dict(safetensors.load_file(str(tmp_path / "model.safetensors")))
    same_gradients(fresh, plainly, x)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_are_their_own(x: Tensor, copied: Callable[[nn.Module], nn.Module]) -> None:
    for model in (pair()[0], pyperc.fuse(nn.Sequential(nn.Linear(6, 5), nn.ELU(0.3), nn.LayerNorm(5)).double())):
        model(x)
        other = copied(model)
        assert type(other) is type(model)
        same_gradients(other, plain(model), x)
        with torch.no_grad():
            other[0].weight.add_(1)
        same_gradients(other, plain(other), x)
        assert not torch.equal(other(x), model(x))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def symmetric(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[2], "weight", Symmetric())


def spectral(model: nn.Sequential) -> None:
    parametrizations.spectral_norm(model[2]).eval()


def structured(model: nn.Sequential) -> None:
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(model[4], "bias", 1)


def everywhere(model: nn.Sequential) -> None:
    layers = [(model[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.4)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "parametrize": symmetric,
    "spectral_norm": spectral,
    "pruning": structured,
    "pruning everywhere": everywhere,
    "weight_norm": lambda model: parametrizations.weight_norm(model[2]),
    "orthogonal": lambda model: parametrizations.orthogonal(model[2]),
    "weight_norm of old": lambda model: nn.utils.weight_norm(model[2]),
    "spectral_norm of old": lambda model: nn.utils.spectral_norm(model[2]).eval(),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parametrised_and_pruned_layers_train_as_plain_ones(x: Tensor, change: Callable[[Any], Any]) -> None:
    model = pyperc.MLP([6, 7, 7, 3], "tanh", dtype=F64)
    model(x)
    other = plain(model)
    for network in (model, other):
        torch.manual_seed(1)
        change(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    close(model.state_dict(), other.state_dict())
    close(model(x), other(x))


def test_pruning_that_is_made_permanent_is_fused_again(x: Tensor) -> None:
    model, _ = pair()
    prune.l1_unstructured(model[2], "weight", 0.5)
    want = model(x)
    prune.remove(model[2], "weight")
    close(model(x), want)
    assert [layer.call for layer in pyperc.explain(model, x).layers] == ["fused"] * 3


def test_tied_weights_share_their_gradient(x: Tensor) -> None:
    model = pyperc.MLP([6, 6, 6, 6], "tanh", dtype=F64)
    model[2].weight = model[0].weight
    model[4] = model[0]
    other = plain(model)
    assert len(list(model.parameters())) == len(list(other.parameters())) == 3
    same_gradients(model, other, x)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_an_autoencoder_whose_decoder_is_the_transposed_encoder(x: Tensor) -> None:
    class Transposed(nn.Module):
        def __init__(self, encoder: nn.Linear) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.encoder.weight.t())

    encoder = nn.Linear(6, 4).double()
    model = pyperc.fuse(nn.Sequential(encoder, nn.Sigmoid(), Transposed(encoder), nn.Tanh()))
    same_gradients(model, plain(model), x)


def test_lazy_layers_before_and_after_their_first_call(x: Tensor) -> None:
    model = pyperc.fuse(nn.Sequential(nn.LazyLinear(7, dtype=F64), nn.ReLU(), nn.LazyLinear(3, dtype=F64)))
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    assert type(model) is pyperc.nn.Sequential
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    other = nn.Sequential(nn.LazyLinear(7, dtype=F64), nn.ReLU(), nn.LazyLinear(3, dtype=F64))
    close(y, other(x))
    assert type(model[0]) is nn.Linear
    same_gradients(model, other, x)
    assert [layer.call for layer in pyperc.explain(model, x).layers] == ["fused"] * 2


def test_a_lazy_model_takes_its_shapes_from_a_state_dict(x: Tensor) -> None:
    source, other = pair((6, 9, 3), "relu")
    model = pyperc.fuse(nn.Sequential(nn.LazyLinear(9, dtype=F64), nn.ReLU(), nn.LazyLinear(3, dtype=F64)))
    model.load_state_dict(source.state_dict())
    close(model(x), other(x))
    same_gradients(model, other, x)


def test_meta_device_and_to_empty(x: Tensor) -> None:
    source, other = pair()
    with torch.device("meta"):
        model = pyperc.MLP([6, 9, 7, 3], "tanh", dtype=F64)
    assert model(torch.empty(5, 6, dtype=F64, device="meta")).shape == (5, 3)
    model.to_empty(device=x.device)
    model.load_state_dict(source.state_dict())
    same_gradients(model, other, x)
    with torch.device("meta"):
        model = pyperc.MLP([6, 9, 7, 3], "tanh", dtype=F64)
    model.load_state_dict(source.state_dict(), assign=True)
    same_gradients(model, other, x)
    skipped = torch.nn.utils.skip_init(pyperc.Linear, 6, 9, activation="tanh", dtype=F64)
    skipped.load_state_dict(source[0].state_dict())
    close(skipped(x), other[:2](x))


def test_functional_call_with_other_parameters_and_a_subset(x: Tensor) -> None:
    model, _ = pair()
    other, _ = pair()
    parameters = dict(other.named_parameters())
    close(torch.func.functional_call(model, parameters, (x,)), other(x))
    some = {name: t for name, t in parameters.items() if name.startswith("2.")}
    mixed = plain(model)
    mixed.load_state_dict(some, strict=False)
    close(torch.func.functional_call(model, some, (x,)), mixed(x))
    same_gradients(model, plain(model), x)


def test_an_ensemble_of_stacked_parameters(x: Tensor) -> None:
    models = [pair()[0] for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    close(torch.func.vmap(call, (0, 0, None))(parameters, buffers, x), torch.stack([plain(m)(x) for m in models]))

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return call(parameters, {}, x).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(models[1].named_parameters()), x)
    other = plain(models[1])
    for i in range(len(x)):
        gradients = torch.autograd.grad(other(x[i]).square().sum(), list(other.parameters()))
        close([g[i] for g in per_sample.values()], list(gradients))


def test_parameters_as_one_vector(x: Tensor) -> None:
    model, other = pair()
    vector = nn.utils.parameters_to_vector(other.parameters()) * 1.5
    nn.utils.vector_to_parameters(vector, model.parameters())
    nn.utils.vector_to_parameters(vector, other.parameters())
    same_gradients(model, other, x)


def test_shared_memory(x: Tensor) -> None:
    model, other = pair()
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    same_gradients(model, other, x)
