"""Networks of DTensors: the shardings in which each process runs the operators on its own shards, as rules that torch
is told; the way in, which leaves every other sharding to torch's own operations; and the style ColumnThenRow.

Imported where the first DTensor is met: torch.distributed is not needed before, and takes half a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding, RuntimeSchemaInfo
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from pyperc import _C, functional
from pyperc.activation import Resolved, chain

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ColumnThenRow"]

_OPS = torch.ops.pyperc
_SAVED = {info.name: info.saved for info in _C.activations()}
_IDENTITY: Resolved = ("identity", ())
# torch 2.11 differentiates the sum over the processes only once, and silently wrong the second time.
_IS_SUM_DIFFERENTIABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
WHOLE, ROWS, COLUMNS, SUM = Replicate(), Shard(0), Shard(1), Partial()
FEATURES = Shard(-1)  # the last dimension, however many there are


class Kind(NamedTuple):
    """How one layer y = f(x w^T + b) is shared out along one dimension of the mesh, and with it its gradients."""

    name: str
    x: Placement
    w: Placement
    b: Placement
    y: Placement
    dx: Placement
    dw: Placement
    db: Placement


# Each process has seen a part of the batch, or of the outputs, where a gradient is a sum over the processes. The sum of
# a row must be made before anything but the identity is applied to it.
_WHOLE = Kind("whole", WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)
_BATCH = Kind("batch", ROWS, WHOLE, WHOLE, ROWS, ROWS, SUM, SUM)
_BELOW = Kind("whole", WHOLE, WHOLE, WHOLE, WHOLE, SUM, SUM, SUM)  # a column
_COLUMN = Kind("column", WHOLE, ROWS, ROWS, FEATURES, SUM, ROWS, ROWS)
_ROW = Kind("row", FEATURES, COLUMNS, SUM, SUM, FEATURES, COLUMNS, WHOLE)

Rule: TypeAlias = tuple[Kind, ...]  # the layers of one call, along one dimension of the mesh
Placements: TypeAlias = tuple[Placement, ...]  # of one tensor, along the dimensions of the mesh


def _rules(depth: int) -> list[Rule]:
    """Chains in which each y lies as the next x must. What was shared out by columns only a last row can read."""
    chains = [(_WHOLE,) * depth, (_BATCH,) * depth, (_BELOW,) * (depth - 1) + (_COLUMN,)]
    return [*chains, (_ROW,) if depth == 1 else (_BELOW,) * (depth - 2) + (_COLUMN, _ROW)]


def _at(placement: Placement, dims: int) -> Placement:
    return Shard(dims - 1) if placement == FEATURES else placement


@lru_cache(maxsize=1024)
def _fitting(
    dims: int, even: bool, x: Placements, weights: tuple[Placements, ...], biases: tuple[Placements | None, ...]
) -> tuple[Rule, ...] | None:
    """The rule along each dimension of the mesh, or None where the tensors lie in another way."""
    found = []
    for i in range(len(x)):
        for rule in _rules(len(weights)):
            if (
                _at(rule[0].x, dims) == x[i]
                and all(kind.w == w[i] for kind, w in zip(rule, weights, strict=True))
                # A whole bias is made a summand of its own without communication.
                and all(
                    b is None or kind.b == b[i] or (kind.b == SUM and b[i] == WHOLE)
                    for kind, b in zip(rule, biases, strict=True)
                )
                # What is kept for the backward pass is rows, of which each process must have its share.
                and (rule[0] is not _BATCH or (dims > 1 and (dims == 2 or even)))
            ):
                found.append(rule)
                break
        else:
            return None
    return tuple(found)


def _fit(x: Any, weights: Sequence[Any], biases: Sequence[Any]) -> tuple[Rule, ...] | None:
    """The same of DTensors, or of what stands for them in a rule."""
    parts = math.prod(x.device_mesh.size(i) for i, placement in enumerate(x.placements) if placement == ROWS)
    return _fitting(
        len(x.shape),
        bool(x.shape) and x.shape[0] % parts == 0,
        tuple(x.placements),
        tuple(tuple(w.placements) for w in weights),
        tuple(None if b is None else tuple(b.placements) for b in biases),
    )


def is_sharded(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """True for DTensors on one mesh. Others are torch's to refuse, or to take for replicated."""
    operands = [x, *weights, *(b for b in biases if b is not None)]
    return bool(weights) and all(isinstance(t, DTensor) and t.device_mesh == x.device_mesh for t in operands)  # type: ignore[attr-defined]


Observer: TypeAlias = Callable[[int, int, str | None], Any]


def call(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    layers: Sequence[Resolved],
    observer: Observer | None = None,
) -> Tensor:
    """x(L), each stretch of layers that has a rule in one call of the operators; `observer` is told start, stop, rule.

    Where tensors lie in another way, a layer is torch's own linear and activation, which know all of them.
    """
    if not is_sharded(x, weights, biases) or not _IS_SUM_DIFFERENTIABLE:
        return _C.mlp(x, weights, biases, chain(tuple(layers)))
    start = 0
    while start < len(weights):
        x = _summed(x)
        for stop in range(len(weights), start, -1):
            w, b = weights[start:stop], biases[start:stop]
            rule = _fit(x, w, b)
            if rule is not None:
                break
        own = tuple(layers[start:stop])
        if observer is not None:
            observer(start, stop, None if rule is None else describe(rule))
        if rule is None:
            x = functional.by_layers(x, w, b, own)
        elif own[-1] != _IDENTITY and any(kinds[-1].y == SUM for kinds in rule):
            x = _summed(_C.mlp_of_subclass(x, w, b, chain((*own[:-1], _IDENTITY))))
            x = _OPS.activation.default(x, own[-1][0], list(own[-1][1]))
        else:
            x = _C.mlp_of_subclass(x, w, b, chain(own))
        start = stop
    return x


def describe(rule: tuple[Rule, ...]) -> str:
    return " x ".join(", ".join(dict.fromkeys(kind.name for kind in kinds)) for kinds in rule)


def _summed(x: Any) -> Any:
    if not any(placement.is_partial() for placement in x.placements):
        return x
    return x.redistribute(placements=[WHOLE if placement.is_partial() else placement for placement in x.placements])


class ColumnThenRow(ParallelStyle):
    """For `parallelize_module`: shares out a fused network's layers, by columns and by rows in turn.

    Each pair of layers is then one native call in each process, on its share of the hidden width, and one sum over the
    processes; a last layer without partner is computed whole by all, and so is every other module of the network. The
    network takes and gives plain tensors that are the same in all processes, or lie as the layouts say. ColwiseParallel
    and RowwiseParallel on its layers give the same numbers, a call for each layer.

    Args:
        input_layouts: how a plain x lies over the processes: Replicate() (the default), the same in each, or Shard(0),
            rows of the batch in each; a DTensor says so itself. The whole of x is gathered in each process first.
        output_layouts: how y is to lie: Replicate() (the default), the same in each, or Shard(0).
        use_local_output: True (the default) gives y as a plain tensor, each process's part of it; False, as a DTensor.

    >>> import pyperc
    >>> import torch.distributed as dist
    >>> from torch.distributed.tensor.parallel import parallelize_module
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's task
    >>> mesh = dist.init_device_mesh("cpu", (1,))
    >>> model = parallelize_module(pyperc.MLP([4, 8, 2]), mesh, ColumnThenRow())
    >>> model[0].weight.placements, model[2].weight.placements
    ((Shard(dim=0),), (Shard(dim=1),))
    >>> model(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts or WHOLE, output_layouts or WHOLE
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
        for column, row in zip(linears[::2], linears[1::2], strict=False):
            self._share(column, device_mesh, ROWS, ROWS)
            self._share(row, device_mesh, COLUMNS, WHOLE)
        return distribute_module(module, device_mesh, None, self._take, self._give)

    def _share(self, linear: nn.Linear, mesh: DeviceMesh, weight: Placement, bias: Placement) -> None:
        for name, placement in (("weight", weight), ("bias", bias)):
            parameter = getattr(linear, name)
            if parameter is not None:
                shared = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
                linear.register_parameter(name, nn.Parameter(shared, requires_grad=parameter.requires_grad))

    def _take(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x, *others = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [self.input_layouts], run_check=False)
        return x.redistribute(placements=[WHOLE]), *others

    def _give(self, module: nn.Module, y: Any, mesh: DeviceMesh) -> Any:
        y = y.redistribute(placements=[self.output_layouts])
        return y.to_local() if self.use_local_output else y


# The rules as torch is told them: of what goes in they make where it must lie, and where the results then do.


class _Places:
    """Where the tensors of one call lie under a rule."""

    def __init__(self, rule: tuple[Rule, ...], x: DTensorSpec, activations: Sequence[str]) -> None:
        self.rule, self.dims, self.mesh, self.activations = rule, len(x.shape), x.mesh, activations

    def _spec(self, layer: int, what: str, dims: int, summed: bool = False) -> DTensorSpec:
        placements = [_at(getattr(kinds[layer], what), dims) for kinds in self.rule]
        return DTensorSpec(self.mesh, tuple(WHOLE if summed and p == SUM else p for p in placements))

    def x(self) -> DTensorSpec:
        return self._spec(0, "x", self.dims)

    def y(self) -> DTensorSpec:
        return self._spec(-1, "y", self.dims)

    def dy(self) -> DTensorSpec:
        return self._spec(-1, "y", self.dims, summed=True)

    def each(self, what: str) -> list[DTensorSpec]:
        return [self._spec(layer, what, 0) for layer in range(len(self.activations))]

    def saved(self, output: DTensorSpec) -> list[DTensorSpec]:
        """Of what mlp_forward returns: x(l), or s(l) where f' reads that, as rows of the batch; the output last."""
        specs = []
        for layer, name in enumerate(self.activations):
            is_last = layer + 1 == len(self.activations)
            if _SAVED[name] == "summation" or not is_last:
                specs.append(self._spec(layer, "y", 2))
            if is_last:
                specs.append(output)
        return specs


def _places(x: DTensorSpec, weights: Sequence[Any], biases: Sequence[Any], names: Sequence[str]) -> _Places | None:
    rule = _fit(x, weights, biases)
    if rule is None or (names[-1] != "identity" and any(kinds[-1].y == SUM for kinds in rule)):
        return None
    return _Places(rule, x, names)


def _moved(spec: Any, to: DTensorSpec | None = None) -> Any:
    """The tensor of a spec as it must lie: as `to`, or else whole."""
    if isinstance(spec, list | tuple):
        return type(spec)(_moved(s) for s in spec)
    if not isinstance(spec, DTensorSpec):
        return spec
    placements = (WHOLE,) * spec.mesh.ndim if to is None else to.placements
    return DTensorSpec(spec.mesh, placements, tensor_meta=spec.tensor_meta)


def _moved_all(specs: Any, to: Sequence[DTensorSpec]) -> Any:
    return type(specs)(None if s is None else _moved(s, t) for s, t in zip(specs, to, strict=True))


def _sharding(schema: OpSchema, results: Any, *wanted: Any) -> OutputSharding:
    """`wanted` is where the first arguments must lie. Without results: whole, then ask again."""
    arguments = (*wanted, *schema.args_schema[len(wanted) :])
    if results is not None and arguments == schema.args_schema:
        return OutputSharding(results)
    moved = OpSchema(schema.op, arguments, {}, schema_info=schema.schema_info)
    return OutputSharding(results, moved, needs_redistribute=True)


def _forward_rule(schema: OpSchema) -> OutputSharding:
    """Of mlp and mlp_forward."""
    arguments: Any = schema.args_schema
    x, weights, biases, names, _ = arguments
    places = _places(x, weights, biases, names)
    if places is None:
        return _sharding(schema, None, _moved(x), _moved(weights), _moved(biases))
    results = places.y() if schema.op == _OPS.mlp.default else places.saved(places.y())
    moved = _moved_all(weights, places.each("w")), _moved_all(biases, places.each("b"))
    return _sharding(schema, results, _moved(x, places.x()), *moved)


def _backward_rule(schema: OpSchema) -> OutputSharding:
    arguments: Any = schema.args_schema
    dy, x, weights, saved, names, _, needs = arguments
    places = _places(x, weights, [None] * len(weights), names)
    if places is None:
        return _sharding(schema, None, _moved(dy), _moved(x), _moved(weights), _moved(saved))
    gradients = [places._spec(0, "dx", places.dims), *places.each("dw"), *places.each("db")]
    results = [spec for spec, needed in zip(gradients, needs, strict=True) if needed]
    moved = _moved_all(weights, places.each("w")), _moved_all(saved, places.saved(places.dy()))
    return _sharding(schema, results, _moved(dy, places.dy()), _moved(x, places.x()), *moved)


def _register() -> None:
    register = DTensor._op_dispatcher.sharding_propagator.register_sharding_prop_rule
    # From the activations on, arguments belong to the key under which torch remembers what a rule said.
    for operator, rule, activations in (
        (_OPS.mlp, _forward_rule, 3),
        (_OPS.mlp_forward, _forward_rule, 3),
        (_OPS.mlp_backward, _backward_rule, 4),
    ):
        register(operator.default, rule, RuntimeSchemaInfo(static_argnum=activations, needs_pytree=True))


_register()
