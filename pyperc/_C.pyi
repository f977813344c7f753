"""The native module: what `pyperc` calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

class ActivationInfo:
    """One entry of the list of activations, csrc/core/activations.h."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> list[str]: ...
    @property
    def defaults(self) -> list[float]: ...
    @property
    def saved(self) -> str:
        """What the derivative reads: "output", "summation" or "nothing"."""

def activations() -> list[ActivationInfo]: ...

class Chain:
    """The activations of a network, layer by layer: (name, values of its parameters) each. Immutable."""

    def __init__(self, layers: Sequence[tuple[str, Sequence[float]]]) -> None: ...
    def __len__(self) -> int: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def parameters(self) -> list[list[float]]: ...

def mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], chain: Chain) -> Tensor:
    """x [*, sizes[0]], weights[l] [sizes[l+1], sizes[l]], biases[l] [sizes[l+1]] or None; with derivatives."""

def mlp_of_subclass(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], chain: Chain) -> Tensor:
    """mlp for tensors of a subclass that has rules for the operators, which its __torch_dispatch__ is shown."""

class Run:
    """A fused run of modules, kept for the next call.

    `watched`: (owner, attribute, value) that must still hold. `empty`: dictionaries that must be empty. `members`:
    (module, is linear, reader of its settings or None, settings). A call gives the output, or None where the run in
    `modules`, a container's dictionary, is another one by now or somebody wants to be shown its calls.
    """

    def __init__(
        self,
        watched: tuple[tuple[Any, str, Any], ...],
        empty: tuple[dict[Any, Any], ...],
        members: tuple[tuple[Any, bool, Any, Any], ...],
        chain: Chain,
        start: int,
        count: int,
    ) -> None: ...
    def __call__(self, modules: dict[str, Any], x: Any) -> Tensor | None: ...

class OptimizerInfo:
    """One entry of the list of optimisers, csrc/core/optimizers.h."""

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> list[tuple[str, float]]:
        """Names, as in torch's groups of parameters, and defaults; one name for each number that it holds."""

    @property
    def states(self) -> list[str]:
        """Names of each parameter's tensors, as in torch's state."""

def optimizers() -> list[OptimizerInfo]: ...

class Step:
    """The loss of a batch, its gradient and the update of the network in one call.

    Parameters are counted through the weights, then the biases: `group_of` (-1: none), `state` (tensors in the order of
    `OptimizerInfo.states`, used in place) and `counts` (updates so far, which are counted in it where it is a tensor)
    have an entry for each. `groups` are torch's dictionaries, read on every call. `dropout`: the probability after each
    layer's activation. A call gives the loss before the update; or None where an entry of `watched`, (dictionary, key,
    value or None), is another object by now, where a dictionary or list of `sizes`, (it, number of entries), has
    another size or holds other objects than at first, where a parameter trains for the first time, and where autograd
    has to take the step, as somebody is shown operations (a TorchDispatchMode, autocast, jit.trace) or a parameter has
    a hook.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        chain: Chain,
        dropout: Sequence[float],
        loss: str,
        loss_parameters: Sequence[float],
        optimizer: str,
        groups: Sequence[dict[str, Any]],
        group_of: Sequence[int],
        state: Sequence[Sequence[Tensor | None]],
        counts: Sequence[int | Tensor],
        *,
        reduction: str = "mean",
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        max_norm: float = ...,
        on_nan: str = "raise",
        generator: torch.Generator | None = None,
        masters: Sequence[Tensor | None] | None = None,
        watched: Sequence[tuple[dict[Any, Any], Any, Any]] = (),
        sizes: Sequence[tuple[dict[Any, Any] | list[Any], int]] = (),
    ) -> None: ...
    def __call__(self, x: Tensor, y: Tensor, weight: Tensor | None = None, /) -> Tensor | None: ...
    def gradients(
        self, x: Tensor, y: Tensor, weight: Tensor | None = None, /
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The loss and its gradients; nothing is updated. (None, []) where a call would give None."""

    def epoch(
        self,
        X: Tensor,
        y: Tensor,
        order: Tensor | None,
        batch_size: int,
        losses: Tensor,
        begin: int = 0,
        seconds: float = ...,
        weight: Tensor | None = None,
        lr: Tensor | None = None,
    ) -> int:
        """Steps over the batches from `begin` on, rows order[b * batch_size ...] of X; the next batch, or -1.

        It returns after the batch in which `seconds` are over. `losses` (float64) has an entry for each batch and is
        written; `lr` (float64) may give each batch and group a rate.
        """

    def set_input(self, scale: float | Tensor, shift: float | Tensor) -> None:
        """x is read as x * scale + shift."""

    def release(self) -> None:
        """Gives the workspace back; the next call takes it again."""

    steps: int
    @property
    def workspace(self) -> int:
        """Bytes held."""

    @property
    def kept(self) -> int:
        """Bytes of activations that the last call kept for its backward pass."""

    @property
    def counts(self) -> list[int]: ...
    @property
    def batches(self) -> int:
        """The next batch of the last epoch."""

    @property
    def norm(self) -> float:
        """The gradients' norm in the last call, before clipping; NaN without max_norm."""

def composed_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], chain: Chain
) -> list[Tensor]:
    """What the operator pyperc::mlp_forward returns, by torch's own operations."""

def composed_backward(
    dy: Tensor, x: Tensor, weights: Sequence[Tensor], saved: Sequence[Tensor], chain: Chain, needs: Sequence[bool]
) -> list[Tensor]:
    """What the operator pyperc::mlp_backward returns, by torch's own operations."""

def composed_activation(x: Tensor, name: str, parameters: Sequence[float]) -> Tensor: ...
def activation(x: Tensor, name: str, parameters: Sequence[float] = ...) -> Tensor:
    """The elementwise kernel of the ISA in use, on any dtype that has kernels, without autograd."""

def plan(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], chain: Chain) -> dict[str, Any]:
    """How the call runs: `path`, `reason`, `dtype`, `layers`; where it is native, also `isa` and `threads`.

    On the CPU `backward` too, the plan that a backward pass takes: `threads`, `split` (GradientSplit of
    csrc/cpu/plan.h: "rows" or "layers") and `chunk`, in rows, 0 in 16 bits, which go block by block.
    """

def isas_built() -> list[str]: ...
def isas() -> list[str]:
    """Those of isas_built that this processor runs, ascending."""

def isa() -> str:
    """The one in use: the best, or what the environment variable PYPERC_ISA names. RuntimeError if it cannot be had."""

def use_isa(name: str) -> None: ...
def tile(isa: str, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of the microkernel's tile."""

def round_trip() -> float:
    """Nanoseconds of a cache line's way to the farthest of torch's threads and back; 0 with one thread."""

def probe(seconds: float = ...) -> float:
    """Peak of fused multiply-adds on torch's threads, GF/s in float32."""

def thresholds(device: str = ...) -> dict[str, int]:
    """The plan's thresholds for the ISA in use, by the names of csrc/cpu/plan.h; of another device its plan's."""

def set_thresholds(values: dict[str, int], device: str = ...) -> None:
    """For tests, which force a path with them, and for tuning; not while a network is running."""

def reset_thresholds() -> None:
    """Of every ISA, as csrc/cpu/plan.h has them."""

def build() -> dict[str, Any]: ...

class LossInfo:
    """One entry of the list of losses, csrc/core/losses.h."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> list[str]: ...
    @property
    def defaults(self) -> list[float]: ...
    @property
    def over(self) -> str:
        """What it reads at once: "element", one score, or "row", the scores of all classes."""

def losses() -> list[LossInfo]: ...
def loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    name: str,
    parameters: Sequence[float],
    sum: bool,
    scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """weight * loss of each element or row, or their sum, and weight * scale * derivative; contiguous CPU tensors."""

def linear_objective(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    positive: Tensor | None,
    name: str,
    parameters: Sequence[float],
) -> tuple[float, Tensor, Tensor]:
    """The sum of weight * loss of s = x w^T + b, dw [classes, columns] and db [classes]; x is read once.

    target: numbers in x's dtype for an element-wise loss with one row of w, else classes, int64; `positive` [classes]
    multiplies the weight of a class's own samples, one against the rest.
    """

def perceptron_epoch(
    x: Tensor,
    target: Tensor,
    w: Tensor,
    b: Tensor | None,
    positive: Sequence[int],
    eta: float,
    order: Tensor | None,
    weight: Tensor | None,
    own: Tensor | None,
    products: tuple[Tensor, Tensor, Tensor] | None,
    scores: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    step: int,
) -> list[int]:
    """One epoch of the perceptron algorithm for each class; writes w, b, scores and sums; the changes of each class.

    scores [rows, classes] are those of the weights that the epoch began with. sums grow by step * change. products,
    int32: first [groups], begin [groups + 1], second [pairs]; first[g] is paired with second[begin[g]:begin[g + 1]].
    """

def dual_descent(
    x: Tensor,
    y: Tensor,
    upper: Tensor,
    bias: float,
    w: Tensor,
    b: Tensor,
    alpha: Tensor,
    max_epochs: int,
    tolerance: float,
    seed: int,
) -> tuple[int, float]:
    """Dual coordinate descent for the hinge; writes w, b and alpha; the epochs taken and the violation of the last."""
