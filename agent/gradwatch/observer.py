"""What happens on the training thread: hooks around every optimizer step, and nothing else.

torch's global optimizer hooks are used: they cover wrappers without hook methods, put nothing on the
optimizer that pickle or deepcopy could meet, and fire for subclasses. Reading happens in the pre hook
(in the post hook for closures, whose pre hook would see the previous evaluation's gradients), counting in the
post hook.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradwatch.arrivals import Arrivals, InFlight
from gradwatch.budget import Budget
from gradwatch.clipping import ClipCapture
from gradwatch.clock import Clock
from gradwatch.compiling import stay_untraced
from gradwatch.device_ring import is_capturing
from gradwatch.gradients import Reading
from gradwatch.in_backward import StepsInBackward, backward_in_progress
from gradwatch.local_norms import LocalNorms
from gradwatch.loss import LossCapture
from gradwatch.manual import ManualSteps
from gradwatch.missing import NO_GRADIENTS, PENDING_SUMS, STRANGERS, unreadable, why_unseen
from gradwatch.safety import internal_error, log
from gradwatch.sharding import common_stride, is_distributed_tensor
from gradwatch.suspects import Suspects, is_finite
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord, StepSink
from gradwatch.watched import Model, Steps, WatchedOptimizer, parameters_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


# At the end, values on a device are asked for this often, 2 ms apart, before they are given up.
_LAST_QUERIES: Final = 50
# Steps of optimizers that train nothing watched, after which a run without any other is told to be unseen.
_STRANGE_STEPS: Final = 10


class StepObserver:
    """Observes the steps of all watched optimizers of a run."""

    def __init__(
        self,
        sink: StepSink,
        clock: Clock,
        *,
        overhead_budget: float = 0.005,
        every: int | None = None,
        capture_loss: bool = True,
        start_step: int = 0,
    ) -> None:
        self.step = start_step
        self._start_step = start_step
        self._sink = sink
        self._clock = clock
        self._log_clock = clock.branch()
        self._log_lock = threading.Lock()
        self._overhead_budget = overhead_budget
        self._every = every
        self._suspicious = False
        self._strange_steps = 0
        self._absorbed = 0
        self._pauses = 0
        self._paused_at = 0
        self._models: list[Model] = []
        self._watched: dict[int, WatchedOptimizer] = {}
        self._created = 0
        self._adopts: Callable[[Optimizer], bool] | None = None
        self._refused: set[int] = set()
        self._loss: float | None = None
        self._device_losses: list[Tensor] = []
        self._closure_base: tuple[float | None, int] | None = None
        self._given_loss: float | Tensor | None = None
        self._given_rate: float | None = None
        self._epoch = 0
        self._begun = 0
        self._spent_outside = 0
        self._open: tuple[StepRecord, InFlight | None] | None = None
        self._suspects = Suspects(sink, self._watched)
        self._arrivals = Arrivals(sink, self._suspects)
        self.follows_backward = False
        self._averages = False
        self._local_norms = LocalNorms(self._read_local_norms)
        self._together: StepsInBackward | None = None
        self._manual: tuple[ManualSteps, WatchedOptimizer] | None = None
        self._loss_capture = LossCapture(self, capture_loss)
        self._clip_capture = ClipCapture(self)
        self._handles: list[Any] = []

    # --- Attaching -------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks in place."""
        stay_untraced()
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._loss_capture.install()
        self._clip_capture.install()

    def remove(self) -> None:
        """Take everything off again, and hand over the last step."""
        for handle in self._handles:
            handle.remove()
        self._loss_capture.remove()
        self._clip_capture.remove()
        self._settle_manual()
        for watched in self._watched.values():
            watched.order.settle()
        self.finish()
        self._local_norms.clear()
        self._together = None
        self._watched.clear()
        self._adopts = None
        self._models.clear()

    def add_model(self, model: nn.Module, name: str) -> bool:
        """Name layers after this module from now on; with a second one, put the models' names in front.

        False when it is known already.
        """
        if any(known.reference() is model for known in self._models):
            return False
        taken = {known.name for known in self._models}
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        self._models.append(Model(unique, model))
        self._local_norms.add(model)
        self._choose_what_to_hear()
        for watched in self._watched.values():
            optimizer = watched.reference()
            if optimizer is not None:
                watched.rename(optimizer, self._models)
        return True

    def add_optimizer(self, optimizer: Optimizer) -> bool:
        """Watch this optimizer. False when it is watched already."""
        key = id(optimizer)
        if key in self._watched:
            return False

        def gone(_reference: object) -> None:
            self._watched.pop(key, None)

        watched = WatchedOptimizer(
            optimizer, self._created, self._models, Budget(self._overhead_budget, self._every), gone
        )
        if watched.reader.unreadable:
            self._sink.missing(self.step, unreadable(watched.reader.unreadable, len(watched.reader.parameters)))
        self._created += 1
        self._watched[key] = watched
        self._settle_manual()
        self._choose_what_to_hear()
        for each in self._watched.values():
            each.budget.share = self._overhead_budget / len(self._watched)
        return True

    def forget(self, optimizers: Sequence[Optimizer]) -> None:
        """Watch these no longer."""
        for optimizer in optimizers:
            watched = self._watched.pop(id(optimizer), None)
            if watched is not None:
                watched.order.settle()

    def adopt_optimizers(self) -> None:
        """Also watch optimizers nobody named, once they step a watched model (any model, without one)."""

        def adopts(optimizer: Optimizer) -> bool:
            mine = {id(p) for p in parameters_of(optimizer)}
            if any(mine & {id(p) for p in other.reader.parameters} for other in self._watched.values()):
                return False  # the inner half of an optimizer that is watched
            return not self._models or any(mine & model.layer_names(False).keys() for model in self._models)

        self._adopts = adopts
        self._choose_what_to_hear()

    def _choose_what_to_hear(self) -> None:
        # Without an optimizer only the backward passes can tell of steps.
        manual = self._adopts is not None and bool(self._models) and not self._watched
        self._averages = bool(self._local_norms)
        self.follows_backward = manual or self._averages

    # --- Time that is not training's -------------------------------------------------------------------

    def pause(self) -> None:
        """Take nothing for training's, and no time for its steps', until as many calls of `resume`."""
        if not self._pauses:
            self._paused_at = perf_counter_ns()
        self._pauses += 1

    def resume(self) -> None:
        """See `pause`."""
        self._pauses -= 1
        if not self._pauses:
            lasted = perf_counter_ns() - self._paused_at
            manual = () if self._manual is None else (self._manual[1],)
            for watched in (*self._watched.values(), *manual):
                if watched.last_end is not None:
                    watched.last_end += lasted

    @property
    def last_step(self) -> int | None:
        """Index of the last step that ended; None before the first."""
        return self.step - 1 if self.step > self._start_step else None

    @property
    def optimizer_count(self) -> int:
        """Optimizers watched so far; those that step inside backward are one."""
        return self._created - self._absorbed

    def _find(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        if self._together is not None and optimizer in self._together:
            return self._watched[id(self._together)]
        watched = self._watched.get(id(optimizer))
        if watched is None and self._adopts is not None and id(optimizer) not in self._refused:
            if self._adopts(optimizer):
                self.add_optimizer(optimizer)
                return self._watched[id(optimizer)]
            self._refused.add(id(optimizer))
        if watched is None and not self._watched and self._models:
            self._strange_steps += 1
            if self._strange_steps == _STRANGE_STEPS:
                self._sink.missing(self.step, STRANGERS)
        return watched

    # --- Hooks: every line here is paid for at every step -----------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = perf_counter_ns()
        try:
            watched = self._watched.get(id(optimizer)) or self._find(optimizer)
            if watched is None or self._pauses:
                return
            if watched.together is None and watched.last_end is None and backward_in_progress() is not None:
                watched = self._join(optimizer, watched)
            if watched.together is not None:
                observe = (watched.observe or self._suspicious) and not _is_captured(watched)
                watched.together.before_step(optimizer, observe=observe)
                watched.spent += perf_counter_ns() - start
                return
            frame = sys._getframe(1)  # noqa: SLF001 - the step's own frame, to know nested calls
            if watched.frame is not None and watched.is_nested(frame):
                watched.depth += 1
                return
            watched.frame = frame
            watched.depth = 0
            self._begun += 1
            if watched.reader.devices and is_capturing():
                watched.capturing = True
                return
            watched.capturing = False
            if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
                watched.is_late = True
                watched.reading = None
                self._closure_base = (self._loss, len(self._device_losses))
            elif watched.observe or self._suspicious:
                self._look(optimizer, watched, before=True)
            watched.spent = perf_counter_ns() - start
        except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
            internal_error(error, "optimizer pre hook")

    def _after_step(self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        start = perf_counter_ns()
        try:
            watched = self._watched.get(id(optimizer))
            if watched is None or self._pauses:
                return
            if watched.depth:
                watched.depth -= 1
                return
            watched.frame = None
            if watched.capturing:
                return
            if watched.is_late:
                watched.is_late = False
                self._closure_base = None
                if watched.observe or self._suspicious:
                    self._look(optimizer, watched, before=False)
            self._end_step(optimizer, watched, start)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "optimizer post hook")

    def loss_seen(self, losses: list[Tensor]) -> None:
        """See ``LossSink``."""
        if self._pauses:
            return
        start = perf_counter_ns()
        self._epoch += 1
        if self._manual is not None:
            self._end_manual_step(start)
        elif self._loss is not None or self._device_losses:
            self._drop_discarded()
        base = self._closure_base
        if base is not None:
            # Each evaluation of a closure replaces the one before, as its gradients do.
            self._loss = base[0]
            del self._device_losses[base[1] :]
        for loss in losses:
            if loss.is_cpu:
                value = float(loss.item())
                self._loss = value if self._loss is None else self._loss + value
                if not math.isfinite(value):
                    self._suspicious = True
            elif loss.is_cuda:
                self._device_losses.append(loss.detach())
        self._spent_outside += perf_counter_ns() - start

    def _drop_discarded(self) -> None:
        """Forget the loss of a batch that was thrown away: `zero_grad()` came instead of a step."""
        for watched in self._watched.values():
            if any(p.grad is not None for p in watched.reader.parameters):
                return
        self._loss = None
        self._device_losses.clear()
        self._suspicious = False
        for watched in self._watched.values():
            watched.reading = watched.clip_total = None

    def before_clipping(self, grads: Sequence[Tensor], total_norm: Tensor | None) -> None:
        """See ``ClipSink``."""
        if self._pauses:
            return
        # Of a distributed total one rank may hold a summand only, and reading it is a collective.
        if total_norm is not None and is_distributed_tensor(total_norm):
            total_norm = None
        start = perf_counter_ns()
        for watched in self._watched.values():
            if not watched.owns(grads):
                continue
            if total_norm is not None and total_norm.device.type == "cpu":
                # torch has just paid for it: every clipped step is checked, observed or not.
                total = float(total_norm.item())
                if not math.isfinite(total):
                    watched.observe = True
                elif len(grads) == len(watched.reader.parameters) and watched.clip_epoch != self._epoch:
                    watched.clip_total = total  # the first after a backward: a second sees clipped gradients
                    watched.clip_epoch = self._epoch
            if watched.observe and (watched.reading is None or watched.reading_epoch != self._epoch):
                self._take_stock(watched)
                watched.reading = watched.reader.read()
                watched.reading_epoch = self._epoch
        self._spent_outside += perf_counter_ns() - start

    def steps_begun(self) -> int:
        """See ``LossSink``."""
        return self._begun

    def backward_begins(self, tensors: Any) -> None:
        """See ``LossSink``."""
        if not self._local_norms or self._pauses:
            return
        if any(each.observe and not _is_captured(each) for each in self._watched.values()):
            self._local_norms.before_backward(tensors)

    def backward_ended(self) -> None:
        """See ``LossSink``."""
        if self._pauses or self._watched or self._adopts is None:
            return
        if self._manual is None:
            models = [module for model in self._models if (module := model.reference()) is not None]
            made = ManualSteps([p for module in models for p in module.parameters()])
            budget = Budget(self._overhead_budget, self._every)
            self._manual = made, WatchedOptimizer(made, 0, self._models, budget, lambda _: None)
        steps, watched = self._manual
        steps.backward_ended()
        watched.reading = None
        if (watched.observe or self._suspicious) and not _is_captured(watched):
            self._look(steps, watched, before=True)

    def _end_manual_step(self, start: int) -> None:
        if self._manual is not None and self._manual[0].stepped():
            self._end_step(*self._manual, start)

    def _settle_manual(self) -> None:
        """The run ends, or an optimizer has come: the last backward was a step, or belongs to the optimizer."""
        if self._manual is not None:
            if self._manual[0].pending and not self._watched:
                self._end_step(*self._manual, perf_counter_ns())
            self._manual[1].order.settle()
            self._manual = None

    def _read_local_norms(self, averaged: set[int]) -> None:
        start = perf_counter_ns()
        for watched in self._watched.values():
            if watched.observe and any(id(p) in averaged for p in watched.reader.parameters):
                watched.local = watched.reader.read()
        self._spent_outside += perf_counter_ns() - start

    def _join(self, optimizer: Optimizer, watched: WatchedOptimizer) -> WatchedOptimizer:
        """An optimizer that steps inside backward is one of many, which are watched as one."""
        del self._watched[id(optimizer)]
        watched.order.settle()
        if self._together is None:
            self._together = StepsInBackward(self._end_step_in_backward, self._forget_together)
            self._watched[id(self._together)] = watched
            watched.together = self._together
            watched.reference = weakref.ref(self._together)
            joined = watched
        else:
            joined = self._watched[id(self._together)]
            joined.index = min(joined.index, watched.index)
            self._absorbed += 1
        self._together.add(optimizer, watched.reader.parameters)
        for each in self._watched.values():
            each.budget.share = self._overhead_budget / len(self._watched)
        return joined

    def _forget_together(self) -> None:
        if self._together is not None:
            self._watched.pop(id(self._together), None)
            self._together = None

    def _end_step_in_backward(self) -> None:
        start = perf_counter_ns()
        try:
            together = self._together
            if together is None or self._pauses:
                return
            watched = self._watched[id(together)]
            if watched.is_stale(together):
                watched.rebuild(together, self._models, learn=False)
            watched.reading = together.reading()
            if watched.reading is not None:
                loss = self._given_loss if isinstance(self._given_loss, float) else self._loss
                watched.nonfinite = self._suspects.gone(self.step, watched, watched.reading, loss)
            self._end_step(together, watched, start)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "end of backward")

    def scaling(self, optimizer: object, scale: Tensor, unscaled: bool) -> None:
        """See ``LossSink``."""
        inner = unwrap(optimizer)
        watched = self._watched.get(id(inner)) or self._find(inner)
        if watched is None or self._pauses:
            return
        watched.scale = scale
        if not unscaled and not getattr(inner, "_step_supports_amp_scaling", False):
            # Clipped while still scaled: what was read then is as many times too large.
            if watched.reading is not None:
                watched.reading = watched.reading.unscaled(scale)
            if watched.clip_total is not None:
                watched.clip_total /= float(scale)

    def skipped_by_scaler(self, optimizer: object) -> None:
        """See ``LossSink``. The step counts, and its overflow is the scaler's business, not a finding."""
        inner = unwrap(optimizer)
        watched = self._watched.get(id(inner))
        if watched is not None and not self._pauses:
            watched.reading = None
            self._end_step(inner, watched, perf_counter_ns(), skipped=True)

    # --- One step --------------------------------------------------------------------------------------

    def _look(self, optimizer: Steps, watched: WatchedOptimizer, *, before: bool) -> None:
        """Read the gradients of a step that is observed or seems non-finite, ``before`` its update or after."""
        loss = self._given_loss if isinstance(self._given_loss, float) else self._loss
        suspicious = not is_finite(loss)
        if suspicious and not watched.observe and not self._sink.wants_nonfinite_detail():
            watched.nonfinite = True
            self._sink.nonfinite(NonfiniteStep(self.step, loss=loss))
            return
        reading = watched.reading
        if reading is None or watched.reading_epoch != self._epoch:
            self._take_stock(watched)
            reading = watched.reading = watched.reader.read()
        if (suspicious or not math.isfinite(math.hypot(*reading.norms))) and not _overflowed(optimizer):
            self._suspects.on_host(self.step, watched, reading, loss, before=before)

    def _judge_skipped(self, loss: float | None) -> bool:
        # The scaler's own overflow is no finding. But scaling cannot make the loss as it was before non-finite.
        if is_finite(loss):
            return False
        self._sink.nonfinite(NonfiniteStep(self.step, loss=loss))
        return True

    def _take_stock(self, watched: WatchedOptimizer) -> None:
        optimizer = watched.reference()
        if optimizer is not None and watched.is_stale(optimizer):
            watched.rebuild(optimizer, self._models)

    def _end_step(
        self, optimizer: Steps, watched: WatchedOptimizer, start: int, *, skipped: bool = False
    ) -> None:
        if watched.order.learning:
            watched.order.settle()
        if self._arrivals:
            self._arrivals.drain()
        now = self._clock.now()
        loss, self._loss = self._loss, None
        self._suspicious = False
        reading, watched.reading = watched.reading, None
        in_flight: InFlight | None = None
        scale = 1.0
        loss_scale = local_norm = None
        scaler = watched.scale
        if reading is not None or self._device_losses or self._given_loss is not None or scaler is not None:
            loss, scale, skipped, in_flight = self._collect(optimizer, watched, reading, loss, skipped)
            loss_scale, local_norm = _on_host(watched, skipped)
            watched.scale = watched.local = None
            if reading is not None and not self._is_reportable(watched, reading, in_flight):
                reading = None
        total, clip_total = None, watched.clip_total
        watched.clip_total = None
        nonfinite = self._judge_skipped(loss) if skipped else watched.nonfinite
        watched.nonfinite = False
        indices: Sequence[int] | None = None
        norms: Sequence[float] | None = None
        if reading is not None and not skipped:
            indices, norms = reading.indices, reading.norms
            if scale != 1.0:
                norms = [norm / scale for norm in norms]
            total = math.hypot(*norms) if reading.complete else None
        elif clip_total is not None:
            total = clip_total
        step = self.step
        duration = None if watched.last_end is None else now - watched.last_end
        watched.last_end = now
        if watched.index == 0:
            self.step = step + 1
        rates = _rates(optimizer)
        if self._given_rate is not None:
            rates, self._given_rate = (self._given_rate,), None
        watched.last_loss = loss if is_finite(loss) else None
        watched.last_step = step
        watched.previous_observed = reading is not None or skipped
        spent = watched.spent + self._spent_outside + perf_counter_ns() - start
        self._spent_outside = 0
        watched.spent = 0
        record = StepRecord(
            watched.index, step, now, duration, loss, rates, watched.layers, indices, norms, total, nonfinite,
            skipped, spent, watched.reader.sharded, loss_scale, local_norm,
        )  # fmt: skip
        if self._open is not None:
            self._arrivals.add(*self._open)
        self._open = (record, in_flight)
        watched.observe = watched.budget.observes_next(spent, duration, reading is not None)
        if watched.reader.sharded or self._averages:
            self._observe_with_other_ranks(watched)

    def _observe_with_other_ranks(self, watched: WatchedOptimizer) -> None:
        """Shares of a norm, and the ranks' own norms, mean something beside those of the same step."""
        if watched.previous_observed:
            watched.stride = self._every or common_stride(watched.budget.interval())
        watched.steps += 1
        watched.observe = watched.steps % watched.stride == 0

    def _collect(
        self,
        optimizer: Steps,
        watched: WatchedOptimizer,
        reading: Reading | None,
        loss: float | None,
        skipped: bool,
    ) -> tuple[float | None, float, bool, InFlight | None]:
        """The slower half of a step's end: device values, a fused optimizer's scale, a given loss."""
        losses, self._device_losses = self._device_losses, []
        given, self._given_loss = self._given_loss, None
        if isinstance(given, float):
            loss, losses = given, []
        elif given is not None:
            loss, losses = None, [given]
        # Fused optimizers get scaled gradients, and the scaler's verdict as a tensor.
        scale_tensor = getattr(optimizer, "grad_scale", None)
        found_tensor = getattr(optimizer, "found_inf", None)
        scale = 1.0
        scalars: dict[str, Tensor] = {}
        # After `unscale_` there is no scale, only the verdict.
        if isinstance(found_tensor, torch.Tensor):
            if found_tensor.is_cpu:
                scale = 1.0 if scale_tensor is None else float(scale_tensor)
                skipped = skipped or bool(found_tensor.item())
            else:
                scalars["found_inf"] = found_tensor
                if scale_tensor is not None:
                    scalars["grad_scale"] = scale_tensor
        if watched.scale is not None and not watched.scale.is_cpu:
            scalars["loss_scale"] = watched.scale
        if watched.local is not None and watched.local.on_device:
            scalars["local_norm"] = watched.local.total_on_device()
        on_device = reading.on_device if reading is not None else ()
        in_flight = self._arrivals.send(on_device, losses, scalars) if on_device or losses or scalars else None
        return loss, scale, skipped, in_flight

    def _is_reportable(self, watched: WatchedOptimizer, reading: Reading, in_flight: InFlight | None) -> bool:
        """Whether there is anything to report; a norm of zero over no gradients would be a lie."""
        if watched.unseen is None:
            reason = self._why_unseen(watched)
            watched.unseen = reason is not None
            if reason is not None:
                self._sink.missing(self.step, reason)
        if watched.unseen:
            return False
        if watched.reader.sharded and not reading.complete:
            self._sink.missing(self.step, PENDING_SUMS)
        if reading.on_device:
            return in_flight is not None
        if not reading.indices:
            self._sink.missing(self.step, NO_GRADIENTS)
        return bool(reading.indices)

    def _why_unseen(self, watched: WatchedOptimizer) -> str | None:
        modules = [module for model in self._models if (module := model.reference()) is not None]
        return why_unseen(
            watched.reader.parameters,
            [parameter for module in modules for parameter in module.parameters()],
            [parameter for each in self._watched.values() for parameter in each.reader.parameters],
        )

    # --- What the user says ------------------------------------------------------------------------------

    def log(self, values: Mapping[str, object]) -> None:
        """Take ``watch.log(**values)``; tensors on a device travel through the ring."""
        for name, raw in values.items():
            number = _number(raw)
            if number is None:
                log.warning("watch.log(%s=...): expected one number, got %s", name, type(raw).__name__)
            elif name == "loss":
                self._log_loss(number)
            elif name == "lr" and isinstance(number, float):
                self._log_rate(number)
            elif isinstance(number, float):
                with self._log_lock:
                    self._sink.logged(LoggedValue(name, self._log_clock.now(), number))
            else:
                if not is_capturing():
                    self._arrivals.send_logged(name, self._log_clock.now(), number)

    def _between_steps(self) -> bool:
        """Whether nothing of the next step was seen yet: then a loss is meant for the last one."""
        return self._open is not None and self._loss is None and not self._device_losses

    def _log_loss(self, loss: float | Tensor) -> None:
        if self._open is None or not self._between_steps():
            self._given_loss = loss
            self._suspicious = isinstance(loss, float) and not math.isfinite(loss)
            return
        record, in_flight = self._open
        if isinstance(loss, float):
            if not math.isfinite(loss) and not record.nonfinite and in_flight is None and not record.skipped:
                self._sink.nonfinite(NonfiniteStep(record.step, loss=loss))
                record = record._replace(nonfinite=True)
            self._open = (record._replace(loss=loss), in_flight)
        else:
            sent = self._arrivals.send((), [loss], {})
            if sent is not None:
                # What was captured no longer counts: norms stay, losses are the new one's.
                kept = [replace(part, losses=0) for part in in_flight.parts] if in_flight is not None else []
                self._open = (record._replace(loss=None), InFlight(kept + sent.parts))

    def _log_rate(self, rate: float) -> None:
        if self._open is None or not self._between_steps():
            self._given_rate = rate
        else:
            record, in_flight = self._open
            self._open = (record._replace(learning_rates=(rate,)), in_flight)

    def remove_in_child(self) -> None:
        """After a fork: take the hooks off, and touch neither devices nor the sink."""
        for handle in self._handles:
            handle.remove()
        self._loss_capture.remove()
        self._clip_capture.remove()
        self._watched.clear()
        self._adopts = None

    def finish(self) -> None:
        """Hand over what there is. Device values that have not arrived are asked for, briefly."""
        if self._open is not None:
            self._arrivals.add(*self._open)
            self._open = None
        for _ in range(_LAST_QUERIES):
            self._arrivals.drain()
            if not self._arrivals:
                return
            time.sleep(0.002)


def _is_captured(watched: WatchedOptimizer) -> bool:
    """Whether what is done to these gradients now would become part of a CUDA graph."""
    return bool(watched.reader.devices) and is_capturing()


def _on_host(watched: WatchedOptimizer, skipped: bool) -> tuple[float | None, float | None]:
    """Loss scale, and norm of this rank's own gradients, where they are on the host."""
    scale = float(watched.scale) if watched.scale is not None and watched.scale.is_cpu else None
    local = watched.local
    if local is None or not local.indices or skipped:
        return scale, None
    return scale, math.hypot(*local.norms) / (scale or 1.0)


def _overflowed(optimizer: Steps) -> bool:
    """Whether a scaler told a fused optimizer on the CPU to skip this step."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and found_inf.is_cpu and bool(found_inf.item())


def _rates(optimizer: Steps) -> tuple[float | None, ...]:
    groups = optimizer.param_groups
    rate = groups[0].get("lr")
    if len(groups) == 1 and type(rate) is float:
        return (rate,)
    # Optimizers that choose their own rate have none, or one that is None.
    return tuple(_rate(group.get("lr")) for group in groups)


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        # A capturable optimizer keeps it on the device; reading it there would synchronise.
        return float(value.item()) if value.device.type == "cpu" else None
    return float(value)


def _number(raw: object) -> float | Tensor | None:
    if isinstance(raw, torch.Tensor):
        if raw.numel() != 1:
            return None
        return float(raw.item()) if raw.device.type == "cpu" else raw.detach() if raw.is_cuda else None
    if isinstance(raw, (str, bytes)):
        return None
    try:
        return float(raw)  # type: ignore[arg-type] # numpy scalars, Decimal, Fraction: anything with __float__
    except (TypeError, ValueError, OverflowError):
        return None
