"""One watched optimizer: its parameters, their names and order, and the step it is in."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_not
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from gradwatch import conventions
from gradwatch.gradients.norms import GradientReader, Reading, layer_name, named_parameters
from gradwatch.gradients.seen import SeenGradients
from gradwatch.loop.budget import Budget
from gradwatch.loop.in_backward import StepsInBackward
from gradwatch.loop.own_passes import OwnPasses
from gradwatch.loop.step_log import StepLog
from gradwatch.nonfinite.update_check import UpdateTrust
from gradwatch.tensors.sharding import common_stride, is_distributed_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradwatch.nonfinite.forward_witness import DeviceWitness


_UNKNOWN: Final = object()
# Steps whose values may still be on their way from a device.
_DEVICE_STEPS_KEPT: Final = 8


class Steps(Protocol):
    """What is needed of an optimizer, or of what stands for one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters and options by group."""


class Model:
    """A watched module, held weakly, and the name in front of its layers once there are two."""

    __slots__ = ("name", "reference")

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.reference = weakref.ref(module)

    def layer_names(self, prefixed: bool) -> dict[int, str]:
        """Layer names by ``id`` of the parameter."""
        module = self.reference()
        if module is None:
            return {}
        names = named_parameters(module)
        return {key: f"{self.name}.{name}" for key, name in names.items()} if prefixed else names

    def qualified(self, name: str, *, prefixed: bool) -> str:
        """Layer name of one parameter."""
        return f"{self.name}.{layer_name(name)}" if prefixed else layer_name(name)

    def is_compiled(self) -> bool:
        """Whether its backward is one compiled graph, which hands gradients out in no telling order."""
        module = self.reference()
        return module is not None and (
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        )


@dataclass(slots=True)
class LateClip:
    """Clipping by a norm that is on a device; ``is_norm``: it is the L2 norm of one optimizer's gradients."""

    total: Tensor
    is_norm: bool
    max_norm: float | None = None


class BackwardOrder:
    """The order in which one backward pass reached the parameters, learned by hooks that remove themselves."""

    __slots__ = ("_handles", "_seen", "_size")

    def __init__(self, parameters: Sequence[Tensor], learn: bool) -> None:
        self._size = len(parameters)
        self._seen: dict[int, None] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note(index))  # type: ignore[no-untyped-call] # torch
            for index, parameter in enumerate(parameters)
            if learn and parameter.requires_grad and parameter.is_leaf and not is_distributed_tensor(parameter)
        ]

    def _note(self, index: int) -> Callable[[Tensor], None]:
        seen = self._seen
        return lambda _parameter: seen.setdefault(index)

    @property
    def learning(self) -> bool:
        """Whether hooks are still on the parameters."""
        return bool(self._handles)

    def settle(self) -> None:
        """Stop learning."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def indices(self) -> Sequence[int]:
        """All parameters: those seen, then the others, last registered first."""
        return [*self._seen, *(i for i in reversed(range(self._size)) if i not in self._seen)]


class WatchedOptimizer:
    """State of one optimizer between its hooks. Only the training thread touches it.

    The optimizer is held weakly: forgetting it, without ``close()``, frees its parameters too.
    """

    __slots__ = (
        "begun", "budget", "capturing", "clip_ratio", "clip_total", "counted", "depth", "ends", "frame",
        "index", "is_aligned", "is_elsewhere", "is_late", "is_never_thin", "kinds", "last_epoch", "last_known",
        "last_nonfinite", "last_observed", "last_step", "late_clip", "layers", "leads", "left", "local", "log",
        "looked", "losses", "may_be_thin", "memory", "nonfinite", "observe", "order", "own", "paused",
        "planned", "poisoned", "rate", "rates", "reader", "reading", "reading_epoch", "reference", "scale",
        "seen", "settled", "spent", "stock", "together", "told", "total", "trust", "unseen", "witness",
    )  # fmt: skip

    def __init__(
        self,
        optimizer: Steps,
        models: Sequence[Model],
        budget: Budget,
        log: StepLog,
        gone: Callable[[Any], None],
    ) -> None:
        self.reference: weakref.ref[Steps] = weakref.ref(optimizer, gone)
        self.budget = budget
        self.is_aligned = False
        self.use(log)
        self.frame: tuple[int, CodeType] | None = None
        self.depth = 0
        self.is_late = False
        self.capturing = False
        self.observe = True
        self.last_known = 0
        self.reading: Reading | None = None
        self.reading_epoch = 0
        # L2 norm of the reading, where it is all there is to say about the step's gradients.
        self.total: float | None = None
        # Of the clipping in the step in progress, None without; NaN where there is no one number to tell.
        self.clip_total: float | None = None
        self.clip_ratio: float | None = None
        self.late_clip: LateClip | None = None
        # What was clipped, to which all of these belong.
        self.seen: SeenGradients | None = None
        # None where all passes since the last step are its.
        self.own: OwnPasses | None = None
        # Nanoseconds of the step in progress that are not training's.
        self.paused = 0
        self.last_step = 0
        self.last_epoch = -1
        self.last_nonfinite = False
        self.last_observed = 0
        self.planned = self.left = 1
        self.counted = 0
        self.may_be_thin = False
        self.is_never_thin = False
        self.is_elsewhere = False
        # Of a single group, the very object, so that a step whose rate did not change is known by identity.
        self.rate: object = _UNKNOWN
        self.rates: tuple[float | None, ...] = ()
        self.trust = UpdateTrust()
        self.scale: Tensor | None = None
        self.local: Reading | None = None
        self.together: StepsInBackward | None = None
        self.unseen: bool | None = None
        self.nonfinite = False
        # Steps that had ended when one was told to be non-finite.
        self.told = -1
        self.poisoned = False
        # The first step after somebody looked at all parameters and found them good, and which state it was.
        self.looked = log.first_step
        self.memory = identity_of_state(optimizer)
        # Whether the parameters were good when this optimizer last let go of them.
        self.settled = True
        self.witness: DeviceWitness | None = None
        self.spent = 0
        self.order = BackwardOrder((), learn=False)
        self.rebuild(optimizer, models)

    def rebuild(self, optimizer: Steps, models: Sequence[Model], *, learn: bool = True) -> None:
        """Take stock of the optimizer's parameters and their names again."""
        parameters = parameters_of(optimizer)
        self.stock = _stock(optimizer)
        self.kinds = _kinds(self.stock)
        self.reader = GradientReader(parameters)
        # Whether it is known which of them hold infinities that are meant.
        self.begun = False
        self.log.keep = _DEVICE_STEPS_KEPT if self.reader.devices else 1
        self.order.settle()
        self.order = BackwardOrder(parameters, learn and not any(model.is_compiled() for model in models))
        self.rename(optimizer, models)

    def is_stale(self, optimizer: Steps) -> bool:
        """Whether parameters were added, taken away, replaced, or the model was converted since `rebuild`."""
        groups, stock = optimizer.param_groups, self.stock
        now = groups[0]["params"] if len(groups) == 1 else _stock(optimizer)
        return len(now) != len(stock) or any(map(is_not, now, stock)) or _kinds(now) != self.kinds

    def take_stock(self, models: Sequence[Model]) -> None:
        """Rebuild if that is needed."""
        optimizer = self.reference()
        if optimizer is not None and self.is_stale(optimizer):
            self.rebuild(optimizer, models)

    def rename(self, optimizer: Steps, models: Sequence[Model]) -> None:
        """Name the layers after the watched models; parameters of none are named by their place."""
        names: dict[int, str] = {}
        for model in models:
            for key, name in model.layer_names(prefixed=len(models) > 1).items():
                names.setdefault(key, name)
        self.layers = tuple(
            names.get(id(parameter), f"param_groups.{group}.{place}")
            for group, place, parameter in _places(optimizer)
        )

    @property
    def count(self) -> int:
        """Steps that ended; derived, so that a thin step has one number less to keep."""
        return self.counted + self.planned - self.left

    @property
    def last_end(self) -> int:
        """When the last step ended; 0 before the first."""
        ends = self.ends
        return ends[-1] if ends else 0

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step, if it was read and finite."""
        loss = self.losses[-1] if self.losses else None
        return loss if loss is not None and math.isfinite(loss) else None

    @property
    def previous_observed(self) -> bool:
        """Whether the gradients of the last step were looked at; before the first there were none."""
        return self.last_known == self.last_end

    def record_clip(self, now: int) -> None:
        """Write down the norm and the ratio of clipping, of a step that is not observed otherwise."""
        total, ratio = self.take_clip()
        if total is not None:
            self.log.column(conventions.GRADIENT_NORM).append(now, total)
        if ratio is not None:
            self.log.column(conventions.CLIP_RATIO).append(now, ratio)

    def unscale(self, inverse: Tensor) -> None:
        """What clipping found before the gradients were multiplied with this was that of scaled ones."""
        if self.own is not None:
            self.own.leave(self.reader.parameters)
        if self.reading is not None:
            self.reading = self.reading.unscaled(inverse.reciprocal())
        if self.clip_total is not None:
            self.clip_total *= float(inverse)
        if self.late_clip is not None:
            self.late_clip.is_norm = False

    def see_clipped(self) -> None:
        """Remember the gradients as clipping leaves them: one of them, or all where they are read."""
        parameters = self.reader.parameters
        self.seen = SeenGradients(parameters) if self.observe else SeenGradients.one_of(parameters)

    def forget_clip(self) -> None:
        """What clipping told, it told of other gradients than there are now."""
        self.reading = self.seen = None
        self.clip_total = self.clip_ratio = self.late_clip = None
        self.nonfinite = False

    def forget_replaced(self) -> None:
        """Forget what clipping told where other gradients were put in the clipped ones' place."""
        if self.seen is not None and self.seen.are_replaced():
            self.clip_total = self.clip_ratio = self.late_clip = None

    def take_clip(self) -> tuple[float | None, float | None]:
        """Norm before clipping and ratio, as far as there is one; the next step has its own."""
        self.forget_replaced()
        total, ratio = self.clip_total, self.clip_ratio
        self.clip_total = self.clip_ratio = self.late_clip = self.seen = None
        return (
            None if total is None or math.isnan(total) else total,
            None if ratio is None or math.isnan(ratio) else ratio,
        )

    def record_wait(self, now: int, waited: int) -> None:
        """Write down the nanoseconds of the step that went by waiting for data."""
        self.log.column(conventions.DATA_WAIT).append(now, waited / 1e9)

    def use(self, log: StepLog) -> None:
        """Write to this log from now on."""
        self.log = log
        self.index = log.index
        self.leads = log.leads
        self.ends = log.ends
        self.losses = log.losses

    def note_rates(self, now: int, optimizer: Steps) -> None:
        """Write down the learning rates if they changed."""
        groups = optimizer.param_groups
        rate = groups[0].get("lr")
        # A tensor may change and stay the same object.
        self.rate = rate if isinstance(rate, float) else _UNKNOWN
        rates = tuple(_rate(group.get("lr")) for group in groups)
        if rates != self.rates:
            self.rates = rates
            self.log.rates.append((now, rates))

    def note_given_rate(self, now: int, rate: float) -> None:
        """Write down a rate the user gave; the optimizer's own counts again at the next step."""
        self.rates = (rate,)
        self.rate = _UNKNOWN
        self.log.rates.append((now, self.rates))

    def plan_next(self, spent: int, now: int, observed: bool) -> None:
        """Decide when the next step is observed, after one that was not thin ended ``now``."""
        if observed:
            steps = self.planned - self.left if self.last_observed else 0
            self.counted += self.planned - self.left
            interval = self.budget.next_interval(spent, steps, now - self.last_observed)
            if self.is_aligned:
                # Shares of a norm, and the ranks' own norms, mean something beside those of the same step.
                stride = self.budget.every or common_stride(interval)
                interval = stride - self.counted % stride
            self.planned = self.left = interval
            self.last_observed = now
        self.left -= 1
        self.observe = self.left <= 0
        self.may_be_thin = not (
            self.observe or self.is_never_thin or self.reader.devices or self.order.learning
        )

    def owns(self, grads: Sequence[Tensor]) -> bool:
        """Whether some of these gradients are this optimizer's."""
        first = grads[0] if grads else None
        parameters = self.reader.parameters
        if first is None or not parameters or self.is_elsewhere:
            return False
        if parameters[0].grad is first:
            return True
        given = set(map(id, grads))
        return any(p.grad is not None and id(p.grad) in given for p in parameters)

    def steps_same_as(self, optimizer: Steps) -> bool:
        """Whether that one has the same parameters."""
        parameters = self.reader.parameters
        return len(parameters) == sum(len(group["params"]) for group in optimizer.param_groups) and (
            set(map(id, parameters)) == set(map(id, parameters_of(optimizer)))
        )

    def found_good(self, step: int) -> None:
        """Somebody looked at all parameters and found them good; ``step`` is next."""
        self.looked = step
        self.memory = identity_of_state(self.reference())

    def is_state_kept(self) -> bool:
        """Whether what the optimizer remembers has come of gradients alone since then: nobody loaded it."""
        return self.memory == identity_of_state(self.reference())

    def enter(self, frame: FrameType) -> None:
        """A step of this optimizer runs in this frame, which is not held: a step that raises would pin it."""
        self.frame = (id(frame), frame.f_code)

    def is_nested(self, frame: FrameType) -> bool:
        """Whether a hook fires inside this optimizer's own step (a subclass that calls ``super().step()``)."""
        if self.frame is None:
            return False
        caller: FrameType | None = frame.f_back
        while caller is not None:
            if (id(caller), caller.f_code) == self.frame:
                return True
            caller = caller.f_back
        return False  # an earlier step raised before its post hook


def identity_of_state(optimizer: Any) -> tuple[int, int]:
    """Tells an optimizer's state from one that ``load_state_dict`` put in its place."""
    return id(getattr(optimizer, "state", None)), id(getattr(optimizer, "param_groups", None))


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's and similar wrappers.

    Raises:
        TypeError: There is none.
    """
    inner = optimizer
    for _ in range(8):
        # Accelerate's is an Optimizer by name only: never initialised as one, so that no hook fires for it.
        if isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "_optimizer_step_pre_hooks"):
            return inner
        # torch's own PostLocalSGDOptimizer calls it `optim`.
        inner = getattr(inner, "optimizer", getattr(inner, "optim", None))
    raise TypeError(
        "gradwatch.watch: expected a torch.optim.Optimizer (or a wrapper with one in `.optimizer`), "
        f"got {type(optimizer).__name__}"
    )


def _places(optimizer: Steps) -> Iterable[tuple[int, int, Tensor]]:
    seen: set[int] = set()
    for group, options in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(options["params"]):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield group, place, parameter


def parameters_of(optimizer: Steps) -> tuple[Tensor, ...]:
    """All parameters of the optimizer, each once."""
    return tuple(parameter for _, _, parameter in _places(optimizer))


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        # A capturable optimizer keeps it on the device; reading it there would synchronise.
        return float(value.item()) if value.device.type == "cpu" else None
    return float(value)


def _kinds(parameters: Sequence[Tensor]) -> tuple[object, ...]:
    """Type and place of the first and the last: ``model.half()`` and ``.to()`` change all, and keep identities.

    To ask every one would cost four times as much as all else that is asked here.
    """
    ends = (parameters[0], parameters[-1]) if parameters else ()
    return tuple((parameter.dtype, parameter.device) for parameter in ends)


def _stock(optimizer: Steps) -> tuple[Tensor, ...]:
    return tuple(chain.from_iterable(group["params"] for group in optimizer.param_groups))
