"""What test_distributed.py runs in each of two processes: functions of the mesh that raise where something is wrong."""

from __future__ import annotations

import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain import close, plain
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import pyperc

F64 = torch.float64
Check = Callable[[DeviceMesh, Path], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def network(activation: str = "gelu") -> pyperc.MLP:
    torch.manual_seed(7)
    return pyperc.MLP([6, 8, 10, 4], activation, dtype=F64)


def batch() -> Tensor:
    return torch.randn(8, 6, dtype=F64, generator=torch.Generator().manual_seed(8))


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(y: Tensor) -> Tensor:
    return y.sin().mean()


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def same_parameters(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(full(p).detach(), q.detach())


def same_gradients(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(full(p.grad), q.grad)


@check
def data_parallel(mesh: DeviceMesh, folder: Path) -> None:
    for options in ({}, {"gradient_as_bucket_view": True, "static_graph": True}, {"find_unused_parameters": True}):
        model, other = network(), plain(network())
        parallel = DistributedDataParallel(model, **options)
        loss_of(other(batch())).backward()
        loss_of(parallel(mine(batch()))).backward()
        same_gradients(model, other)


@check
def data_parallel_with_accumulated_gradients(mesh: DeviceMesh, folder: Path) -> None:
    model, other = network(), plain(network())
    parallel = DistributedDataParallel(model)
    for part in batch().chunk(2):
        (loss_of(other(part)) / 2).backward()
    first, second = (mine(part) for part in batch().chunk(2))
    with parallel.no_sync():
        (loss_of(parallel(first)) / 2).backward()
    (loss_of(parallel(second)) / 2).backward()
    same_gradients(model, other)


def trained(model: nn.Module, x: Tensor, share: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(share(x))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def sharded(mesh: DeviceMesh, layer_by_layer: bool) -> nn.Module:
    model = network()
    if layer_by_layer:
        for layer in model[::2]:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@check
def fully_sharded(mesh: DeviceMesh, folder: Path) -> None:
    for layer_by_layer in (False, True):
        model, other = sharded(mesh, layer_by_layer), plain(network())
        assert isinstance(model[0].weight, DTensor)
        loss_of(other(batch())).backward()
        loss_of(model(mine(batch()))).backward()
        same_gradients(model, other)
        trained(model, batch(), mine)
        trained(other, batch(), lambda x: x)
        same_parameters(model, other)


@check
def fully_sharded_as_a_whole_is_one_native_call(mesh: DeviceMesh, folder: Path) -> None:
    model = fully_shard(network(), mesh=mesh)
    y = model(mine(batch()))
    nodes, names = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert "MlpBackward" in names
    assert not any("Addmm" in name for name in names)


@check
def tensor_parallel(mesh: DeviceMesh, folder: Path) -> None:
    other = plain(network("relu"))
    model = parallelize_module(network("relu"), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert model[0].weight.placements == (Shard(0),)
    x, z = batch().requires_grad_(), batch().requires_grad_()
    with CommDebugMode() as communication:
        y = model(x)
    assert communication.get_total_counts() == 1  # the sum after the rows
    close(y, other(z))
    loss_of(y).backward()
    loss_of(other(z)).backward()
    same_gradients(model, other)
    close(x.grad, z.grad)


@check
def tensors_that_are_distributed_by_hand(mesh: DeviceMesh, folder: Path) -> None:
    """Column then row, without hooks: the network of DTensors is composed of operations that have sharding rules."""
    other = plain(network("tanh"))
    loss_of(other(batch())).backward()
    model = network("tanh")
    for layer, placement in zip(model[::2], (Shard(0), Shard(1), Replicate()), strict=True):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [placement]))
        bias = Shard(0) if placement == Shard(0) else Replicate()
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [bias]))
    weights, biases = [m.weight for m in model[::2]], [m.bias for m in model[::2]]

    def function(x: Tensor) -> Tensor:
        return pyperc.functional.mlp(x, weights, biases, ["tanh", "tanh", "identity"])

    x = distribute_tensor(batch(), mesh, [Replicate()])
    for run in (model, function):
        model.zero_grad()
        y = run(x)
        assert isinstance(y, DTensor)
        close(y.full_tensor(), other(batch()))
        loss_of(y).backward()
        same_gradients(model, other)
        with torch.no_grad():
            close(run(x).full_tensor(), other(batch()))
    split = distribute_tensor(batch(), mesh, [Shard(0)])
    close(pyperc.functional.mlp(split, weights, biases, ["tanh", "tanh", "identity"]).full_tensor(), other(batch()))


@check
def compiled_and_data_parallel(mesh: DeviceMesh, folder: Path) -> None:
    model, other = network(), plain(network())
    parallel = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    loss_of(other(batch())).backward()
    loss_of(parallel(mine(batch()))).backward()
    same_gradients(model, other)


@check
def distributed_checkpoint(mesh: DeviceMesh, folder: Path) -> None:
    model = sharded(mesh, True)
    trained(model, batch(), mine)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=str(folder / "checkpoint"))
    # Into another sharding, and into one process's plain network.
    fresh = sharded(mesh, False)
    state = {"model": get_model_state_dict(fresh)}
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    set_model_state_dict(fresh, state["model"])
    other = plain(network())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    same_parameters(model, other)
    same_parameters(fresh, other)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    close({name: full(t) for name, t in whole.items()}, other.state_dict())
    assert not torch.equal(other[0].weight, copy.deepcopy(network())[0].weight)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, function in CHECKS.items():
        torch.manual_seed(rank)
        try:
            function(mesh, folder)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
