"""TrainStep: what a user holds; which engine runs is decided here."""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyperc.step.autograd import Autograd, Reading
from pyperc.step.graphed import Graphed
from pyperc.step.native import Handover, Native
from pyperc.step.network import NotNative
from pyperc.step.objective import Loss, Objective
from pyperc.step.optimizer import Masters, as_groups, check_closure, check_owner, make, plain, take_schedules

if TYPE_CHECKING:
    from pyperc.explain import Explanation

T = TypeVar("T")


def _never() -> bool:
    return False


def _checked(order: Tensor, rows: int) -> Tensor:
    """Indexing takes negative rows for others."""
    for row in map(int, order.aminmax()):
        if not 0 <= row < rows:
            raise IndexError(f"step: order must hold rows from 0 to {rows - 1}, got {row}")
    return order


class TrainStep:
    """One step of training, loss = step(x, y): forward, loss, backward and the update of the model's own Parameters.

        s = model(x),  l = loss(s, y),  g = dl/dw,  w <- w - lr update(g)

    After any number of steps the parameters are those of the loop in plain torch (zero_grad, forward, backward,
    optimizer.step), to rounding. No .grad is read or written.

    Args:
        model: a network. One that is a single run of linear layers, activations and Dropout (`pyperc.MLP`, what
            `pyperc.fuse` made, an nn.Sequential) takes the native engine, any other autograd; `explain` says why.
        loss: "cross_entropy", "mse", "logistic", "hinge" or "squared_hinge" (see `pyperc.functional`), an
            nn.CrossEntropyLoss or nn.MSELoss, or any function of scores and target that returns one number. The
            targets of "logistic" and of the hinges are -1 and +1.
        optimizer: "sgd", "adam" or "adamw", or one of torch.optim over the model's parameters.
        lr: a number, or a function of the number of steps taken before. Where it is not given it is torch's default,
            1e-3 for "sgd", "adam" and "adamw" alike; "sgd" usually wants more.
        params: torch's parameter groups, [{"params": ..., "lr": ...}, ...]; all parameters where it is not given.
            Frozen ones (requires_grad=False) stay as they are.
        reduction: "mean" (the default), which divides by the sum of the weights, or "sum".
        weight: for cross_entropy of the classes, [classes]; for a loss of single numbers of the outputs, [out]. None,
            the default, weighs all alike.
        label_smoothing, ignore_index: as torch.nn.CrossEntropyLoss has them, 0 and -100 by default.
        threshold: of the hinge losses, 1 by default.
        scale, shift: the model is given x * scale + shift; numbers (1 and 0 by default), or tensors that broadcast.
            uint8 images count as numbers: scale=1 / 255.
        clip_grad_norm: the 2-norm of all gradients together is cut down to this before the update; None, the default,
            leaves them.
        on_nan: "raise" for a FloatingPointError where a loss is NaN or infinite, with the number of the step,
            before anything is changed; "ignore" (the default) goes on, as torch does.
        options: those of torch's optimizer, by its names and with its defaults: momentum, dampening, weight_decay,
            nesterov, maximize for sgd; betas, eps, weight_decay, amsgrad, maximize for adam and adamw.

    Raises TypeError or ValueError that names the argument. EE-559, lectures 3.5 and 3.6.

    >>> import pyperc, torch
    >>> model = pyperc.MLP([4, 8, 3])
    >>> step = TrainStep(model, "cross_entropy", "sgd", lr=0.5, momentum=0.9)
    >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
    >>> losses = [float(step(x, y)) for _ in range(50)]
    >>> losses[-1] < losses[0], step.steps
    (True, 50)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        optimizer: str | Optimizer = "sgd",
        lr: float | Tensor | Callable[[int], float] | None = None,
        *,
        params: Iterable[Any] | None = None,
        reduction: str | None = None,
        weight: Tensor | None = None,
        label_smoothing: float | None = None,
        ignore_index: int | None = None,
        threshold: float | None = None,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        clip_grad_norm: float | None = None,
        on_nan: str = "ignore",
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"TrainStep: model must be an instance of torch.nn.Module, got {type(model).__name__}")
        if on_nan not in ("ignore", "raise"):
            raise ValueError(f"TrainStep: on_nan must be ignore or raise, got {on_nan!r}")
        lr, clip_grad_norm, options = plain((lr, clip_grad_norm, options))
        if clip_grad_norm is not None and not isinstance(clip_grad_norm, int | float):
            raise TypeError(f"TrainStep: clip_grad_norm must be a number or None, got {clip_grad_norm!r}")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"TrainStep: clip_grad_norm must be positive, got {clip_grad_norm}")
        self.model = model
        self.loss = Objective(
            loss,
            reduction=reduction,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            threshold=threshold,
        )
        self._masters, self._schedules = Masters(()), {}
        if isinstance(optimizer, Optimizer):
            given = [*options, *(name for name, value in (("lr", lr), ("params", params)) if value is not None)]
            if given:
                raise TypeError(f"TrainStep: {given[0]} belongs to the optimizer, which was given with its own")
            check_closure(optimizer)
            check_owner("optimizer", model, optimizer.param_groups)
            self.optimizer = optimizer
        else:
            groups = as_groups(model, params)
            self._schedules = take_schedules(groups, lr)
            self._masters = Masters(p for group in groups for p in group["params"])
            for group in groups:
                group["params"] = [self._masters.of.get(p, p) for p in group["params"]]
            self.optimizer = make(optimizer, groups, options if lr is None or callable(lr) else {"lr": lr, **options})
        engine = Graphed if next(model.parameters()).device.type == "cuda" else Autograd
        self._autograd = engine(
            Reading(model, scale, shift),
            self.loss,
            self.optimizer,
            self._masters,
            clip_grad_norm,
            raises=on_nan == "raise",
        )
        self._steps = 0
        self.batches = 0
        self._native: Native | None = None
        self._call: Any = None  # the native call, where nothing is to be prepared before it
        self._refused: Callable[[], bool] = _never  # whether the last refusal to bind still holds
        self._hang_on_optimizer()

    def __call__(self, x: Any, y: Any, weight: Tensor | None = None) -> Tensor:
        """One step. The loss before it, detached: for 16-bit models in float32.

        x is what the model takes, [*, in]; float32, float64 and uint8 are converted to its dtype. y is for
        cross_entropy int64 classes [*] or probabilities [*, classes]; for the other losses it has the shape of the
        scores, [*, out], and the model's dtype: [n, 1], not [n], for one output. `weight` [*] multiplies the samples'
        losses, and their mean divides by its sum.

        Raises TypeError or ValueError that names x, y or weight, IndexError for a class that is none, and with
        on_nan="raise" FloatingPointError; nothing is updated then. Also what the model raises.

        >>> import pyperc, torch
        >>> step = TrainStep(pyperc.MLP([4, 1]), "mse", "adam")
        >>> step(torch.randn(16, 4), torch.randn(16, 1)).shape
        torch.Size([])
        """
        call = self._call
        if call is not None:
            with contextlib.suppress(TypeError, ValueError):  # raised again below, unless something has changed
                loss: Tensor | None = call(x, y, weight)
                if loss is not None:
                    return loss
        self._prepare()
        loss = self._by_either(lambda native: native.step(x, y, weight), lambda: self._by_autograd(x, y, weight))
        self._masters.written()
        return loss

    def _by_autograd(self, x: Any, y: Any, weight: Tensor | None) -> Tensor:
        loss = self._autograd.step(x, y, weight, self._steps)
        self._steps += 1
        return loss

    def gradients(self, x: Any, y: Any, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its gradient for each parameter that is trained, by name; nothing is updated.

        Neither clipping nor weight decay is in them, and they are not negated by `maximize`. Arguments and errors are
        those of a step.

        >>> import pyperc, torch
        >>> step = TrainStep(pyperc.MLP([4, 3]))
        >>> loss, gradients = step.gradients(torch.randn(16, 4), torch.randint(3, (16,)))
        >>> {name: [*gradient.shape] for name, gradient in gradients.items()}, step.steps
        ({'0.weight': [3, 4], '0.bias': [3]}, 0)
        """
        self._prepare()
        loss, gradients = self._by_either(
            lambda native: native.gradients(x, y, weight), lambda: self._autograd.gradients(x, y, weight)
        )
        return loss, {name: gradients[p] for name, p in self.model.named_parameters() if p in gradients}

    def epoch(
        self,
        x: Tensor,
        y: Tensor,
        order: Tensor | None,
        batch_size: int,
        losses: Tensor,
        begin: int = 0,
        seconds: float = math.inf,
        weight: Tensor | None = None,
    ) -> int:
        """Steps over the batches begin, begin + 1, ... of an epoch; the number of the batch that is next.

        Batch b is rows order[b size : (b + 1) size] of x, y and weight; the last may be shorter. `order` is int64, None
        for the rows as they lie. losses[b], float64, is written for each; its length is the number of batches. No batch
        begins when `seconds` are over, the first apart; `batches` is the next one even where an exception came between.

        Raises what a step raises, of the batch that it came in; the batches before it have been taken.

        >>> import pyperc, torch
        >>> step = TrainStep(pyperc.MLP([4, 8, 3]), "cross_entropy", "adam")
        >>> x, y, losses = torch.randn(100, 4), torch.randint(3, (100,)), torch.zeros(4, dtype=torch.float64)
        >>> step.epoch(x, y, torch.randperm(100), 32, losses), step.steps
        (4, 4)
        """
        self._prepare()
        self.batches, end = begin, time.perf_counter() + seconds
        rates = self._rates(begin, len(losses)) if self._schedules else None

        def natively(native: Native) -> bool | None:
            try:
                return native.step.epoch(x, y, order, batch_size, losses, begin, seconds, weight, rates) >= 0 or None
            finally:
                self.batches = native.step.batches
                self._masters.written()

        def batch_by_batch() -> bool:
            while self.batches < len(losses):
                span = slice(self.batches * batch_size, (self.batches + 1) * batch_size)
                rows = span if order is None else _checked(order[span], len(x))
                losses[self.batches] = self(x[rows], y[rows], None if weight is None else weight[rows])
                self.batches += 1
                if time.perf_counter() > end:
                    break
            return True

        self._by_either(natively, batch_by_batch)
        return self.batches

    def _rates(self, begin: int, end: int) -> Tensor:
        """The learning rates of the batches from `begin` on, which is the next step, [batches, groups]."""
        rates = torch.tensor([float(group["lr"]) for group in self.param_groups], dtype=torch.float64).repeat(end, 1)
        for group, schedule in self._schedules.items():
            for batch in range(begin, end):
                rates[batch, group] = schedule(self.steps + batch - begin)
        return rates

    def _prepare(self) -> None:
        """What must be up to date before the parameters are read."""
        for group, schedule in self._schedules.items():
            self.optimizer.param_groups[group]["lr"] = schedule(self.steps)
        self._masters.read()

    def _by_either(self, natively: Callable[[Native], T | None], otherwise: Callable[[], T]) -> T:
        """natively(engine), the engine made anew where something has changed; otherwise() where there is none.

        Tensors that the engine refuses, sparse ones or of a subclass, may be torch's to take: where torch refuses as
        well, the native words are the clearer.
        """
        if self._native is not None:
            with contextlib.suppress(TypeError, ValueError):
                result = self._by(self._native, natively)
                if result is not None:
                    return result
        refusal: Exception | None = None
        native = None if self._refused() else self._bind()
        if native is not None:
            try:
                result = self._by(native, natively)
            except (TypeError, ValueError) as error:
                refusal, result = error, None
            if result is not None:
                return result
            self._give_back()
        try:
            return otherwise()
        except (TypeError, ValueError, RuntimeError, IndexError):
            if refusal is None:
                raise
            raise refusal from None

    def _by(self, native: Native, natively: Callable[[Native], T | None]) -> T | None:
        try:
            return natively(native)
        finally:
            if native.incomplete:
                self._write_state()

    def _bind(self) -> Native | None:
        """The native engine for the model and the optimizer as they are now; None where it is none."""
        for hook in self.optimizer._optimizer_step_pre_hooks.values():
            if isinstance(hook, Handover):  # this step's, and those of others that share the optimizer
                hook()
        try:
            self._native = Native(self._autograd, self._steps)
        except NotNative as reason:
            self._refused = reason.holds
            return None
        self._refused = _never
        ready = not (self._schedules or self._masters.of or self._native.incomplete)
        self._call = self._native.step if ready else None
        return self._native

    def _give_back(self) -> None:
        """The optimizer's state is up to date, and the native engine gone: somebody else may go on."""
        native, self._native, self._call = self._native, None, None
        if native is not None:
            native.write_state()
            if native.step.steps > native.begin:
                self._autograd.norm = native.step.norm
            self._steps = native.step.steps

    def _write_state(self) -> None:
        if self._native is not None and self._native.write_state():
            self._give_back()  # the next step's engine watches what is new

    def _hang_on_optimizer(self) -> None:
        self.optimizer.register_state_dict_pre_hook(Handover(weakref.WeakMethod(self._write_state)))
        self.optimizer.register_step_pre_hook(Handover(weakref.WeakMethod(self._give_back)))

    def __getstate__(self) -> dict[str, Any]:
        self._give_back()
        return {**self.__dict__, "_refused": _never}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hang_on_optimizer()

    @property
    def engine(self) -> str:
        """Which engine the next step takes: "native", "autograd" or "cuda graph"."""
        return self.choice()[0]

    def choice(self) -> tuple[str, str]:
        """The engine's name, and why it is not the native one: by an attempt, of which the step keeps nothing."""
        try:
            return Native(self._autograd, self.steps).name, ""
        except NotNative as reason:
            return self._autograd.name, str(reason)

    @property
    def steps(self) -> int:
        """How many steps were taken; with the state it is saved and loaded."""
        return self._steps if self._native is None else int(self._native.step.steps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's: hyperparameters that are written here hold from the next step on."""
        return self.optimizer.param_groups

    @property
    def grad_norm(self) -> float:
        """The norm of the last step's gradients before they were clipped; NaN without clip_grad_norm.

        `gradients` is no step and leaves it as it is.
        """
        native = self._native
        return float(self._autograd.norm if native is None or native.step.steps == native.begin else native.step.norm)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, which torch's optimizer of the same kind loads as it is; with the number of steps, and
        the float32 masters of 16-bit parameters. The parameters are the model's to save."""
        state = {**self.optimizer.state_dict(), "steps": self.steps}
        if self._masters.of:
            state["masters"] = [master.detach() for master in self._masters.of.values()]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, or the state_dict of torch's optimizer of the same kind.

        From the model's state, this one and that of torch's random generator a run resumes with bit-identical results.
        """
        self._give_back()
        self.optimizer.load_state_dict(state_dict)
        if "masters" in state_dict:
            self._masters.load(state_dict["masters"])
        counts = [int(state["step"]) for state in state_dict["state"].values() if "step" in state]
        self._steps = int(state_dict.get("steps", max(counts, default=0)))

    def release(self) -> None:
        """Gives the memory of the workspaces back; the next step takes it again."""
        self._autograd.release()
        if self._native is not None:
            self._native.step.release()

    def explain(self, *inputs: Any) -> Explanation:
        """What `pyperc.explain(step, *inputs)` returns."""
        from pyperc.explain import explain  # which imports this package

        return explain(self, *inputs)

    def __repr__(self) -> str:
        name = self.loss.name or self.loss.function
        return f"TrainStep({type(self.model).__name__}, {name}, {type(self.optimizer).__name__}, steps={self.steps})"
