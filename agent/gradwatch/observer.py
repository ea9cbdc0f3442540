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
from gradwatch.device_ring import is_capturing
from gradwatch.forward_witness import ForwardWitness
from gradwatch.gradients import Reading
from gradwatch.loss import LossCapture
from gradwatch.safety import internal_error, log
from gradwatch.suspects import Suspects, is_finite
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord, StepSink
from gradwatch.watched import Model, WatchedOptimizer, parameters_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


# At the end, values on a device are asked for this often, 2 ms apart, before they are given up.
_LAST_QUERIES: Final = 50


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
        self._warned = False
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
        self._forward = ForwardWitness()
        self._suspects = Suspects(sink, self._watched, self._models, self._forward)
        self._arrivals = Arrivals(sink, self._suspects)
        self._loss_capture = LossCapture(self, capture_loss)
        self._clip_capture = ClipCapture(self)
        self._handles: list[Any] = []

    # --- Attaching -------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks in place."""
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._loss_capture.install()
        self._clip_capture.install()
        self._forward.arm(True)

    def remove(self) -> None:
        """Take everything off again, and hand over the last step."""
        for handle in self._handles:
            handle.remove()
        self._loss_capture.remove()
        self._clip_capture.remove()
        self._forward.remove()
        for watched in self._watched.values():
            watched.order.settle()
        self.finish()
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
        self._forward.add(model)
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
            log.warning(
                "missing instrumentation: %d of %d parameters are sharded or on a device whose gradients "
                "cannot be read; their norms and the global norm are not reported",
                watched.reader.unreadable, len(watched.reader.parameters),
            )  # fmt: skip
        self._created += 1
        self._watched[key] = watched
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

    @property
    def last_step(self) -> int | None:
        """Index of the last step that ended; None before the first."""
        return self.step - 1 if self.step > self._start_step else None

    @property
    def optimizer_count(self) -> int:
        """Optimizers watched so far."""
        return self._created

    def _find(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        watched = self._watched.get(id(optimizer))
        if watched is None and self._adopts is not None and id(optimizer) not in self._refused:
            if self._adopts(optimizer):
                self.add_optimizer(optimizer)
                return self._watched[id(optimizer)]
            self._refused.add(id(optimizer))
        return watched

    # --- Hooks: every line here is paid for at every step -----------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = perf_counter_ns()
        try:
            watched = self._watched.get(id(optimizer)) or self._find(optimizer)
            if watched is None:
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
            if watched is None:
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

    def loss_seen(self, losses: list[Tensor], roots: list[Tensor]) -> None:
        """See ``LossSink``."""
        start = perf_counter_ns()
        self._epoch += 1
        if self._suspects.evidence is not None:
            self._suspects.loss_seen(self._begun)
        if self._loss is not None or self._device_losses:
            self._drop_discarded()
        base = self._closure_base
        if base is not None:
            # Each evaluation of a closure replaces the one before, as its gradients do.
            self._loss = base[0]
            del self._device_losses[base[1] :]
        for loss, root in zip(losses, roots, strict=True):
            if loss.is_cpu:
                value = float(loss.item())
                self._loss = value if self._loss is None else self._loss + value
                if not math.isfinite(value):
                    self._suspicious = True
                    self._suspects.loss_is_bad(root, self._begun)
            elif loss.is_cuda:
                self._device_losses.append(loss.detach())
        self._forward.epoch = self._epoch
        self._spent_outside += perf_counter_ns() - start

    def _drop_discarded(self) -> None:
        """Forget the loss of a batch that was thrown away: `zero_grad()` came instead of a step."""
        for watched in self._watched.values():
            if any(p.grad is not None for p in watched.reader.parameters):
                return
        self._loss = None
        self._device_losses.clear()
        self._suspicious = False
        self._suspects.discard()
        for watched in self._watched.values():
            watched.reading = watched.clip_total = None

    def before_clipping(self, grads: Sequence[Tensor], total_norm: Tensor | None) -> None:
        """See ``ClipSink``."""
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

    def skipped_by_scaler(self, optimizer: object) -> None:
        """See ``LossSink``. The step counts, and its overflow is the scaler's business, not a finding."""
        inner = unwrap(optimizer)
        watched = self._watched.get(id(inner))
        if watched is not None:
            watched.reading = None
            self._end_step(inner, watched, perf_counter_ns(), skipped=True)

    # --- One step --------------------------------------------------------------------------------------

    def _look(self, optimizer: Optimizer, watched: WatchedOptimizer, *, before: bool) -> None:
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
        if before and watched.reader.devices:
            watched.witness = self._suspects.witness(watched, watched.reader.parameter_norms())
        if (suspicious or not math.isfinite(math.hypot(*reading.norms))) and not _overflowed(optimizer):
            self._suspects.on_host(self.step, watched, reading, loss, before=before)

    def _judge_skipped(self, watched: WatchedOptimizer, loss: float | None) -> bool:
        # The scaler's own overflow is no finding. But scaling cannot make the loss as it was before non-finite.
        if loss is None or math.isfinite(loss):
            return False
        self._suspects.skipped(self.step, watched, loss)
        return True

    def _take_stock(self, watched: WatchedOptimizer) -> None:
        optimizer = watched.reference()
        if optimizer is not None and watched.is_stale(optimizer):
            watched.rebuild(optimizer, self._models)

    def _end_step(
        self, optimizer: Optimizer, watched: WatchedOptimizer, start: int, *, skipped: bool = False
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
        if reading is not None or self._device_losses or self._given_loss is not None:
            loss, scale, skipped, in_flight = self._collect(optimizer, watched, reading, loss, skipped)
            if reading is not None and not self._is_reportable(reading, in_flight):
                reading = None
        total, clip_total = None, watched.clip_total
        watched.clip_total = None
        nonfinite = self._judge_skipped(watched, loss) if skipped else watched.nonfinite
        watched.nonfinite = False
        indices: Sequence[int] | None = None
        norms: Sequence[float] | None = None
        if reading is not None and not skipped:
            indices, norms = reading.indices, _unscaled(reading.norms, scale)
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
        watched.last_epoch = self._epoch
        watched.last_step = step
        watched.previous_observed = reading is not None or skipped
        if reading is not None or nonfinite or skipped:
            nonfinite = self._suspects.step_ended(step, optimizer, watched, total, nonfinite, skipped)
        else:
            watched.settled = False
        spent = watched.spent + self._spent_outside + perf_counter_ns() - start
        self._spent_outside = 0
        watched.spent = 0
        record = StepRecord(
            watched.index, step, now, duration, loss, rates, watched.layers, indices, norms, total, nonfinite,
            skipped, spent,
        )  # fmt: skip
        if self._open is not None:
            self._arrivals.add(*self._open)
        self._open = (record, in_flight)
        watched.observe = watched.budget.observes_next(spent, duration, reading is not None)
        if watched.observe or self._forward.armed:
            self._forward.next_step(self._begun, self._watched.values())

    def _collect(
        self,
        optimizer: Optimizer,
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
        scalars: tuple[Tensor, Tensor] | None = None
        # After `unscale_` there is no scale, only the verdict.
        if isinstance(found_tensor, torch.Tensor):
            if found_tensor.is_cpu:
                scale = 1.0 if scale_tensor is None else float(scale_tensor)
                skipped = skipped or bool(found_tensor.item())
            else:
                scalars = (found_tensor.new_ones(()) if scale_tensor is None else scale_tensor, found_tensor)
        on_device = reading.on_device if reading is not None else ()
        witness, watched.witness = watched.witness, None
        in_flight = self._arrivals.send(on_device, losses, scalars, witness) if on_device or losses else None
        return loss, scale, skipped, in_flight

    def _is_reportable(self, reading: Reading, in_flight: InFlight | None) -> bool:
        """Whether there is anything to report; a norm of zero over no gradients would be a lie."""
        if reading.on_device:
            return in_flight is not None
        if reading.indices:
            return True
        if not self._warned:
            self._warned = True
            log.warning(
                "missing instrumentation: an optimizer stepped and none of its parameters has a `.grad`; "
                "no gradient norms are reported (loops that keep gradients elsewhere are not supported yet)"
            )
        return False

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
            sent = self._arrivals.send((), [loss], None)
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
        self._forward.remove()
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


def _unscaled(norms: list[float], scale: float) -> list[float]:
    return norms if scale == 1.0 else [norm / scale for norm in norms]


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a scaler told a fused optimizer on the CPU to skip this step."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and found_inf.is_cpu and bool(found_inf.item())


def _rates(optimizer: Optimizer) -> tuple[float | None, ...]:
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
