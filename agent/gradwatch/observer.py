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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradwatch.budget import Budget
from gradwatch.clipping import ClipCapture
from gradwatch.clock import Clock
from gradwatch.device_ring import DeviceRing, Slot, is_capturing
from gradwatch.gradients import DeviceNorms, Reading
from gradwatch.loss import LossCapture
from gradwatch.nonfinite import Origin, Witnesses, first_in_backward, origin
from gradwatch.safety import internal_error, log
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord
from gradwatch.watched import Model, WatchedOptimizer, count_parameters, parameters_of, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


class StepSink(Protocol):
    """Where finished steps go; must return at once."""

    def step(self, record: StepRecord) -> None:
        """A step is complete."""

    def logged(self, value: LoggedValue) -> None:
        """A number given to ``watch.log``."""

    def nonfinite(self, step: NonfiniteStep) -> None:
        """A step was non-finite."""

    def wants_nonfinite_detail(self) -> bool:
        """Whether the next non-finite step becomes an event; only then it is worth a closer look."""


class _InFlight:
    """A step whose device values have not all arrived."""

    __slots__ = ("indices", "norms", "parts", "record")

    def __init__(self) -> None:
        self.record: StepRecord | None = None
        # ring, slot, indices of norms, number of losses, whether scale and found_inf follow
        self.parts: list[tuple[DeviceRing, Slot, Sequence[int], int, bool]] = []

    def arrived(self) -> bool:
        return all(slot.arrived() for _, slot, _, _, _ in self.parts)


class StepObserver:
    """Observes the steps of all watched optimizers of a run."""

    def __init__(
        self,
        sink: StepSink,
        clock: Clock,
        *,
        new_budget: Callable[[], Budget],
        capture_loss: bool = True,
        start_step: int = 0,
    ) -> None:
        self.step = start_step
        self._start_step = start_step
        self._sink = sink
        self._clock = clock
        self._log_clock = clock.branch()
        self._log_lock = threading.Lock()
        self._new_budget = new_budget
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
        self._last_end: int | None = None
        self._open: tuple[StepRecord, _InFlight | None] | None = None
        self._pending: deque[_InFlight] = deque()
        self._pending_logs: deque[tuple[str, int, DeviceRing, Slot]] = deque()
        self._rings: dict[torch.device, DeviceRing] = {}
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

    def remove(self) -> None:
        """Take everything off again, and hand over the last step."""
        for handle in self._handles:
            handle.remove()
        self._loss_capture.remove()
        self._clip_capture.remove()
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

        watched = WatchedOptimizer(optimizer, self._created, self._models, self._new_budget(), gone)
        if watched.reader.unreadable:
            log.warning(
                "missing instrumentation: %d of %d parameters are sharded or on a device whose gradients "
                "cannot be read; their norms and the global norm are not reported",
                watched.reader.unreadable, len(watched.reader.parameters),
            )  # fmt: skip
        self._created += 1
        self._watched[key] = watched
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
            else:
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
                self._look(optimizer, watched, before=False)
            self._end_step(optimizer, watched, start)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "optimizer post hook")

    def loss_seen(self, losses: list[Tensor]) -> None:
        """See ``LossSink``."""
        start = perf_counter_ns()
        self._epoch += 1
        base = self._closure_base
        if base is not None:
            # Each evaluation of a closure replaces the one before, as its gradients do.
            self._loss = base[0]
            del self._device_losses[base[1] :]
        for loss in losses:
            if loss.is_cpu:
                value = float(loss.item())
                self._loss = value if self._loss is None else self._loss + value
            elif loss.is_cuda:
                self._device_losses.append(loss.detach())
        self._spent_outside += perf_counter_ns() - start

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
                elif len(grads) == len(watched.reader.parameters):
                    watched.clip_total = total
            if watched.observe and (watched.reading is None or watched.reading_epoch != self._epoch):
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
        suspicious = not _finite(loss)
        if not watched.observe and not suspicious:
            return
        if suspicious and not watched.observe and not self._sink.wants_nonfinite_detail():
            watched.nonfinite = True
            self._sink.nonfinite(NonfiniteStep(self.step, loss=loss))
            return
        reading = watched.reading
        if reading is None or watched.reading_epoch != self._epoch:
            if watched.size != count_parameters(optimizer):
                watched.rebuild(optimizer, self._models)
            reading = watched.reading = watched.reader.read()
        if (suspicious or not math.isfinite(math.hypot(*reading.norms))) and not _overflowed(optimizer):
            self._judge(watched, reading, loss, before=before)

    def _end_step(
        self, optimizer: Optimizer, watched: WatchedOptimizer, start: int, *, skipped: bool = False
    ) -> None:
        if watched.order.learning:
            watched.order.settle()
        if self._pending or self._pending_logs:
            self._drain()
        now = self._clock.now()
        loss, self._loss = self._loss, None
        reading, watched.reading = watched.reading, None
        in_flight: _InFlight | None = None
        scale = 1.0
        if reading is not None or self._device_losses or self._given_loss is not None:
            loss, scale, skipped, in_flight = self._collect(optimizer, watched, reading, loss, skipped)
        total, clip_total = None, watched.clip_total
        watched.clip_total = None
        nonfinite, watched.nonfinite = watched.nonfinite and not skipped, False
        indices: Sequence[int] | None = None
        norms: Sequence[float] | None = None
        if reading is not None and not skipped:
            indices, norms = reading.indices, reading.norms
            if scale != 1.0:
                norms = [norm / scale for norm in norms]
            total = math.hypot(*norms)
            if not reading.complete:
                total = None
        elif clip_total is not None:
            total = clip_total
        step = self.step
        duration = None
        if watched.index == 0:
            self.step = step + 1
            if self._last_end is not None:
                duration = now - self._last_end
            self._last_end = now
        rates: tuple[float | None, ...] = tuple(_rate(group["lr"]) for group in optimizer.param_groups)
        if self._given_rate is not None:
            rates, self._given_rate = (self._given_rate,), None
        watched.last_loss = loss if _finite(loss) else None
        watched.last_step = step
        watched.previous_observed = reading is not None or skipped
        spent = watched.spent + self._spent_outside + perf_counter_ns() - start
        self._spent_outside = 0
        watched.spent = 0
        record = StepRecord(
            watched.index, step, now, duration, loss, rates, watched.layers, indices, norms, total, nonfinite,
            skipped, spent,
        )  # fmt: skip
        if self._open is not None:
            self._hand_over()
        self._open = (record, in_flight)
        watched.observe = watched.budget.observes_next(spent, duration, reading is not None)

    def _collect(
        self,
        optimizer: Optimizer,
        watched: WatchedOptimizer,
        reading: Reading | None,
        loss: float | None,
        skipped: bool,
    ) -> tuple[float | None, float, bool, _InFlight | None]:
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
        if isinstance(scale_tensor, torch.Tensor) and isinstance(found_tensor, torch.Tensor):
            if scale_tensor.device.type == "cpu":
                scale = float(scale_tensor.item())
                skipped = skipped or bool(found_tensor.item())
            else:
                scalars = (scale_tensor, found_tensor)
        if not losses and (reading is None or not reading.on_device):
            return loss, scale, skipped, None
        in_flight = _InFlight()
        on_device: dict[torch.device, list[DeviceNorms]] = {}
        for norms in reading.on_device if reading is not None else ():
            on_device.setdefault(norms.vector.device, []).append(norms)
        for tensor in losses:
            on_device.setdefault(tensor.device, [])
        for device, vectors in on_device.items():
            local = [tensor for tensor in losses if tensor.device == device]
            parts = [norms.vector for norms in vectors] + local
            if scalars is not None and vectors:
                parts += [tensor.to(device, non_blocking=True) for tensor in scalars]
            ring = self._ring(device, watched)
            slot = ring.send(parts)
            if slot is not None:
                indices = [index for norms in vectors for index in norms.indices]
                in_flight.parts.append((ring, slot, indices, len(local), scalars is not None and bool(vectors)))
        return loss, scale, skipped, in_flight if in_flight.parts else None

    def _ring(self, device: torch.device, watched: WatchedOptimizer | None = None) -> DeviceRing:
        ring = self._rings.get(device)
        if ring is None:
            parameters = watched.reader.parameters if watched is not None else ()
            wide = any(p.dtype in {torch.float64, torch.complex128} for p in parameters)
            ring = DeviceRing(device, len(parameters) + 16, torch.float64 if wide else torch.float32)
            self._rings[device] = ring
        return ring

    def _judge(self, watched: WatchedOptimizer, reading: Reading, loss: float | None, *, before: bool) -> None:
        """Look closer at a step whose loss or CPU gradients seem non-finite. Runs on such steps only."""
        norms = reading.norms
        suspects = [i for i, norm in zip(reading.indices, norms, strict=False) if not math.isfinite(norm)]
        bad = watched.reader.nonfinite(suspects)
        if len(bad) < len(suspects):
            # The L2 norm overflowed while every element is finite.
            fine = set(suspects).difference(bad)
            norms[:] = [
                watched.reader.exact_norm(i) if i in fine else norm
                for i, norm in zip(reading.indices, norms, strict=False)
            ]
        if not bad and _finite(loss):
            return
        watched.nonfinite = True
        order = watched.order.indices()
        poisoned, elsewhere = self._poisoned(watched) if before else (None, False)
        found = origin(Witnesses(loss, reading.indices, bad, poisoned, order))
        if elsewhere and not poisoned:
            found = Origin("parameters", None)
        self._sink.nonfinite(
            NonfiniteStep(
                self.step,
                layer=None if found.layer is None else watched.layers[found.layer],
                born_in=found.born_in,
                layers=len(bad),
                elements=watched.reader.nonfinite_elements(bad),
                loss=loss,
            )
        )

    def _poisoned(self, watched: WatchedOptimizer) -> tuple[Sequence[int], bool]:
        """Parameters of this optimizer that are bad before its step, and whether another one's are.

        Those that turned bad during a step nobody observed get their own report: the gradients are gone, but
        the update left their mask in the parameters.
        """
        mine: Sequence[int] = ()
        elsewhere = False
        for other in self._watched.values():
            bad = other.reader.nonfinite_parameters()
            if bad and not (other.poisoned or other.previous_observed) and other.last_loss is not None:
                everything = range(len(other.reader.parameters))
                layer = first_in_backward(bad, everything, other.order.indices())
                self._sink.nonfinite(
                    NonfiniteStep(
                        other.last_step,
                        layer=None if layer is None else other.layers[layer],
                        # An update that overflows leaves infinities; NaNs came with the gradients.
                        born_in="backward" if other.reader.has_nan_parameter(bad) else None,
                        layers=len(bad),
                        loss=other.last_loss,
                    )
                )
            other.poisoned = bool(bad)
            if other is watched:
                mine = bad
            else:
                elsewhere = elsewhere or bool(bad)
        return mine, elsewhere

    # --- What arrives late -----------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give the last step away: nobody can log a loss for it any more."""
        if self._open is None:
            return
        record, in_flight = self._open
        self._open = None
        if in_flight is not None:
            in_flight.record = record
            self._pending.append(in_flight)
        elif self._pending:
            waiting = _InFlight()  # steps leave in order
            waiting.record = record
            self._pending.append(waiting)
        else:
            self._sink.step(record)

    def _drain(self) -> None:
        while self._pending and self._pending[0].arrived():
            self._arrived(self._pending.popleft())
        while self._pending_logs and self._pending_logs[0][3].arrived():
            name, time, ring, slot = self._pending_logs.popleft()
            value = slot.values()[0]
            ring.recycle(slot)
            self._sink.logged(LoggedValue(name, time, value))

    def _arrived(self, in_flight: _InFlight) -> None:
        record = in_flight.record
        assert record is not None
        loss, indices, norms = record.loss, list(record.indices or ()), list(record.norms or ())
        skipped = record.skipped
        for ring, slot, where, losses, scaled in in_flight.parts:
            values = slot.values()
            ring.recycle(slot)
            scale = 1.0
            if scaled:
                scale, found_inf = values[-2:]
                skipped = skipped or found_inf != 0
            indices += where
            norms += [value / scale for value in values[: len(where)]]
            if losses and record.loss is None:
                loss = math.fsum([loss or 0.0, *values[len(where) : len(where) + losses]])
        observed = record.indices is not None and not skipped
        total = math.hypot(*norms) if observed and record.gradient_norm is not None else record.gradient_norm
        bad = [i for i, norm in zip(indices, norms, strict=True) if not math.isfinite(norm)]
        nonfinite = not skipped and (record.nonfinite or bool(bad) or not _finite(loss))
        if nonfinite and not record.nonfinite:
            self._judge_late(record, indices, bad, loss)
        self._sink.step(
            record._replace(
                loss=loss,
                indices=indices if observed else None,
                norms=norms if observed else None,
                gradient_norm=total,
                nonfinite=nonfinite,
                skipped=skipped,
            )
        )

    def _judge_late(
        self, record: StepRecord, indices: Sequence[int], bad: Sequence[int], loss: float | None
    ) -> None:
        order: Sequence[int] = ()
        for watched in self._watched.values():
            if watched.index == record.optimizer:
                order = watched.order.indices()
                watched.observe = True
        found = origin(Witnesses(loss, indices, bad, None, order))
        layer = None if found.layer is None else record.layers[found.layer]
        self._sink.nonfinite(NonfiniteStep(record.step, layer, found.born_in, len(bad), None, loss))

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
                ring = self._ring(number.device)
                slot = None if is_capturing() else ring.send([number])
                if slot is not None:
                    with self._log_lock:
                        self._pending_logs.append((name, self._log_clock.now(), ring, slot))

    def _between_steps(self) -> bool:
        """Whether nothing of the next step was seen yet: then a loss is meant for the last one."""
        return self._open is not None and self._loss is None and not self._device_losses

    def _log_loss(self, loss: float | Tensor) -> None:
        if self._open is None or not self._between_steps():
            self._given_loss = loss
            return
        record, in_flight = self._open
        if isinstance(loss, float):
            if not math.isfinite(loss) and not record.nonfinite and in_flight is None and not record.skipped:
                self._sink.nonfinite(NonfiniteStep(record.step, loss=loss))
                record = record._replace(nonfinite=True)
            self._open = (record._replace(loss=loss), in_flight)
        else:
            in_flight = in_flight or _InFlight()
            ring = self._ring(loss.device)
            slot = None if is_capturing() else ring.send([loss])
            if slot is not None:
                in_flight.parts = [(r, s, where, 0, scaled) for r, s, where, _, scaled in in_flight.parts]
                in_flight.parts.append((ring, slot, (), 1, False))
                self._open = (record._replace(loss=None), in_flight)

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
        self._hand_over()
        for _ in range(50):
            self._drain()
            if not self._pending and not self._pending_logs:
                return
            threading.Event().wait(0.002)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a scaler told a fused optimizer on the CPU to skip this step."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and found_inf.is_cpu and bool(found_inf.item())


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def _rate(value: Any) -> float | None:
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
