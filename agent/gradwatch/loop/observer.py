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
from collections.abc import Callable, Sequence
from threading import get_ident
from time import monotonic_ns, perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradwatch.clock import Clock
from gradwatch.gradients.clip_witness import ClipWitness
from gradwatch.gradients.clipping import ClipCapture
from gradwatch.gradients.local_norms import LocalNorms
from gradwatch.gradients.norms import Reading
from gradwatch.loop.arrivals import Arrivals, InFlight
from gradwatch.loop.compiling import CompileWatch, stay_untraced
from gradwatch.loop.in_backward import StepsInBackward, backward_in_progress
from gradwatch.loop.loss import LossCapture
from gradwatch.loop.manual import ManualSteps
from gradwatch.loop.missing import ELSEWHERE, NO_GRADIENTS, PENDING_SUMS, why_unseen
from gradwatch.loop.passes import BackwardPasses
from gradwatch.loop.roster import Roster
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.loop.step_sink import StepSink
from gradwatch.loop.user_log import UserLog
from gradwatch.loop.watched import Steps, WatchedOptimizer, unwrap
from gradwatch.measures.measures import Measures
from gradwatch.nonfinite.forward_witness import ForwardWitness
from gradwatch.nonfinite.suspects import Suspects, is_finite
from gradwatch.safety import internal_error, shielded
from gradwatch.telemetry import NonfiniteStep, StepRecord
from gradwatch.tensors.device_ring import is_capturing

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from gradwatch.loop.step_log import StepLog


# Reading all parameters costs as much as reading all gradients.
_CHECK_NANOSECONDS: Final = 5_000_000_000
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
        inputs: bool = True,
        collectives: bool = False,
        nvtx: str | None = None,
    ) -> None:
        self._sink = sink
        self._anchor = clock.anchor
        self.roster = Roster(sink, start_step, overhead_budget, every)
        # The same, since a look-up is paid for at every step.
        self._watched, self._models = self.roster.watched, self.roster.models
        self.progress = StepInProgress()
        # Something unusual awaits the next step end: a bad loss, a number from the user. Then no step is thin.
        self._alert = False
        self._paused_at = 0
        self._checked = perf_counter_ns()
        self._forward = ForwardWitness(self.progress)
        self.compile_watch = CompileWatch()
        self.compile_watch.tell(self._forward.leave_alone)
        self._suspects = Suspects(sink, self._watched, self._models, self._forward)
        self._arrivals = Arrivals(sink, self._suspects)
        self.user_log = UserLog(
            sink, self.roster, self.progress, self._arrivals, clock.branch(), self._raise_alert
        )
        self._passes = BackwardPasses(
            self.progress, self.roster, self._suspects, self.user_log, self._passes_told_apart
        )
        self.measures = Measures(
            self._arrivals, self._models, start=clock.now(), inputs=inputs, collectives=collectives, nvtx=nvtx
        )
        self.compile_watch.tell(self.measures.leave_models_alone)
        self._waits = self.measures.waits
        self.follows_backward = False
        self._local_norms = LocalNorms(self._read_local_norms)
        self._together: StepsInBackward | None = None
        self._manual: ManualSteps | None = None
        self._loss_capture = LossCapture(self, capture_loss, self.measures.phases)
        self.clip_capture = ClipCapture(
            ClipWitness(self.roster, self.progress, self._observe, self._look_at_once)
        )
        self._pre_hook: RemovableHandle | None = None
        self._post_hook: RemovableHandle | None = None

    # --- Attaching -------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks in place."""
        stay_untraced()
        self._pre_hook = register_optimizer_step_pre_hook(self._before_step)
        self._post_hook = register_optimizer_step_post_hook(self._after_step)
        self._loss_capture.install()
        self.clip_capture.install()
        self.measures.install(self.roster.step)
        self.compile_watch.install()
        self._forward.arm(True)

    def remove(self) -> None:
        """Take everything off again, and hand over the last step."""
        self._take_hooks_off()
        self.measures.remove()
        self._settle_manual(ended=True)
        self.tell_unfinished()
        for watched in self._watched.values():
            watched.order.settle()
        self.finish()
        self._check_parameters()
        self._local_norms.clear()
        for watched in self._watched.values():
            watched.log.closed = True
        self._together = None
        self.roster.clear()

    def _take_hooks_off(self) -> None:
        for handle in (self._pre_hook, self._post_hook):
            if handle is not None:
                handle.remove()
        self._pre_hook = self._post_hook = None
        self._loss_capture.remove()
        self.clip_capture.remove()
        self._forward.remove()
        self.compile_watch.remove()

    def add_model(self, model: nn.Module, name: str) -> bool:
        """See ``Roster.add_model``. False when it is known already."""
        unique = self.roster.add_model(model, name)
        if unique is None:
            return False
        self.measures.add_model(model, unique)
        self._forward.add(model)
        self._local_norms.add(model)
        self._choose_what_to_hear()
        return True

    def add_optimizer(self, optimizer: Optimizer) -> bool:
        """Watch this optimizer. False when it is watched already."""
        if id(optimizer) in self._watched:
            return False
        watched = self.roster.add(optimizer, self._settle_manual(ended=False))
        watched.is_never_thin = self.measures.nvtx is not None
        self._choose_what_to_hear()
        if self._post_hook is not None:
            self._tend_pre_hook()
        return True

    def adopt_optimizers(self) -> None:
        """Also watch optimizers nobody named, see ``Roster.adopts``."""
        self.roster.adopts = True
        self._choose_what_to_hear()

    def note_background(self, cost: float | None) -> None:
        """Our other threads take so many nanoseconds a step, if that is known. Called by one of them."""
        for watched in list(self._watched.values()):
            watched.budget.background = cost

    def observe_thinly(self, optimizer: Optimizer) -> Callable[..., None]:
        """For calibration: watch an optimizer, observe none of its steps; the hook that ends them."""
        self.add_optimizer(optimizer)
        watched = self._watched[id(optimizer)]
        watched.order.settle()
        watched.left = self.measures.look_at = sys.maxsize
        watched.observe, watched.may_be_thin = False, True
        return self._after_step

    def forget(self, optimizers: Sequence[Optimizer]) -> None:
        """Watch these no longer."""
        for optimizer in optimizers:
            watched = self.roster.drop(id(optimizer))
            if watched is not None:
                watched.order.settle()

    def _passes_told_apart(self) -> None:
        self._choose_what_to_hear()
        if self._passes.apart:
            self._raise_alert()

    def _choose_what_to_hear(self) -> None:
        # Without an optimizer only the backward passes can tell of steps.
        manual = self.roster.adopts and bool(self._models) and not self._watched
        averages = bool(self._local_norms)
        self.follows_backward = manual or averages or self._passes.apart
        for watched in self._watched.values():
            watched.is_aligned = averages or watched.reader.sharded

    # --- Time that is not training's -------------------------------------------------------------------

    def pause(self) -> None:
        """Take nothing for training's, and no time for its steps', until as many calls of `resume`."""
        if not self.progress.pauses:
            self._paused_at = perf_counter_ns()
            self.measures.suspend()
        self.progress.pauses += 1
        self._tend_busy()
        self._raise_alert()

    def resume(self) -> None:
        """See `pause`."""
        self.progress.pauses -= 1
        if not self.progress.pauses:
            lasted = perf_counter_ns() - self._paused_at
            for watched in self.roster.everyone():
                watched.paused += lasted
                watched.may_be_thin = False
                if watched.last_observed:
                    watched.last_observed += lasted
            self.measures.resume()
        self._tend_busy()
        self._raise_alert()

    def _find(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        if self._together is not None and optimizer in self._together:
            return self._watched[id(self._together)]
        watched = self.roster.find(optimizer)
        if watched is None and not self.progress.pauses and backward_in_progress() is None:
            watched = self.roster.find_around(optimizer)
        may_adopt = self.roster.adopts and not self.progress.is_elsewhere
        if watched is None and may_adopt and self.roster.is_adoptable(optimizer):
            self.add_optimizer(optimizer)
            return self._watched[id(optimizer)]
        if watched is None:
            self.roster.note_stranger()
        return watched

    # --- Hooks: every line here is paid for at every step -----------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Registered only while some step may have to be looked at before its update, see `_tend_pre_hook`."""
        try:
            watched = self._watched.get(id(optimizer)) or self._find(optimizer)
            if watched is None:
                self._look_within(optimizer)
            elif not watched.may_be_thin or self._alert:
                self._before_full_step(optimizer, watched, args, kwargs)
        except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
            internal_error(error, "optimizer pre hook")

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            watched = self._watched.get(id(optimizer)) or self._find(optimizer)
            if watched is None:
                return
            if not watched.may_be_thin or self._alert or len(args) != 1 or kwargs:
                self._after_full_step(optimizer, watched)
                return
            # A thin step: two appends, and a few questions that are nearly always answered no.
            now = monotonic_ns() + self._anchor
            state = self.progress
            watched.losses.append(state.loss)
            state.loss = None
            groups = optimizer.param_groups
            if groups[0].get("lr") is not watched.rate or len(groups) != 1:
                watched.note_rates(now, optimizer)
            if watched.clip_total is not None:
                watched.record_clip(now)
            if not watched.leads:
                watched.last_step = self.roster.step
            elif self._waits.seen:
                watched.record_wait(now, self._waits.take())
            watched.ends.append(now)
            watched.left = left = watched.left - 1
            if left <= 0:
                self._observe(watched)
                self._measure(watched, now)
            elif now >= self.measures.look_at and watched.leads:
                self._measure(watched, now)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "optimizer post hook")

    def _tend_pre_hook(self) -> None:
        """Have torch call before steps only when there is something to do: an idle call costs 2 us."""
        wanted = self._alert or not all(
            watched.may_be_thin or watched.is_elsewhere for watched in self._watched.values()
        )
        if wanted and self._pre_hook is None:
            self._pre_hook = register_optimizer_step_pre_hook(self._before_step)
        elif not wanted and self._pre_hook is not None and self._watched:
            self._pre_hook.remove()
            self._pre_hook = None

    def _observe(self, watched: WatchedOptimizer) -> None:
        """Observe this optimizer's next step, whatever was planned."""
        watched.observe = True
        watched.may_be_thin = False
        self._tend_pre_hook()

    def _raise_alert(self) -> None:
        """Let the next step be a full one."""
        self._alert = True
        self._tend_pre_hook()

    def _before_full_step(
        self,
        optimizer: Optimizer,
        watched: WatchedOptimizer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        start = perf_counter_ns()
        if self.progress.pauses or self._steps_elsewhere(watched):
            return
        if not watched.begun and not self.progress.suspicious:
            self._suspects.begin(self.roster.step, watched)
        if watched.together is None and not watched.count and backward_in_progress() is not None:
            watched = self._join(optimizer, watched)
        if watched.together is not None:
            observe = (watched.observe or self.progress.suspicious) and not _is_captured(watched)
            watched.together.before_step(optimizer, observe=observe)
            watched.spent += perf_counter_ns() - start
            return
        frame = sys._getframe(2)  # noqa: SLF001 - the step's own frame
        if watched.frame is not None and watched.is_nested(frame):
            watched.depth += 1
            watched.is_never_thin = True
            return
        watched.enter(frame)
        watched.depth = 0
        if watched.reader.devices and is_capturing():
            watched.capturing = True
            return
        watched.capturing = False
        if self._passes.closure is not None:
            self._passes.leave_raised_closure(frame)
            self._tend_busy()
        if watched.own is not None:
            watched.own.look()
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            watched.is_late = watched.is_never_thin = True
            watched.reading = None
            self._passes.enter_closure()
            self._tend_busy()
        elif watched.observe or self.progress.suspicious:
            self._look(optimizer, watched, before=True)
        if watched.observe or self.measures.phases.observed:
            self.measures.before_step(watched)
        watched.spent = perf_counter_ns() - start

    def _after_full_step(self, optimizer: Optimizer, watched: WatchedOptimizer) -> None:
        start = perf_counter_ns()
        if self.progress.pauses or watched.together is not None or self._steps_elsewhere(watched):
            return
        if watched.depth:
            watched.depth -= 1
            return
        watched.frame = None
        if watched.capturing:
            return
        if watched.observe or self.measures.phases.observed:
            self.measures.after_step(watched)
        if watched.is_late:
            watched.is_late = False
            self._passes.closure = None
            self._tend_busy()
            if watched.observe or self.progress.suspicious:
                self._look(optimizer, watched, before=False)
        self._end_step(optimizer, watched, start)

    def _steps_elsewhere(self, watched: WatchedOptimizer) -> bool:
        """Whether this optimizer is stepped beside training, which is where the first optimizer steps.

        Nothing is told of it: losses and steps of two threads cannot be told apart, and gradients that another
        thread's backward writes must not be read.
        """
        thread, leader = get_ident(), self.roster.leader
        if watched.leads or leader is None or not leader.count or not self.progress.is_elsewhere:
            self.progress.thread = thread
            watched.is_elsewhere = False
        elif not watched.is_elsewhere and not any(
            t.ident == self.progress.thread for t in threading.enumerate()
        ):
            self.progress.thread = thread  # training went on in another thread
        elif not watched.is_elsewhere:
            watched.is_elsewhere = True
            self._sink.missing(self.roster.step, ELSEWHERE)
            self._tend_pre_hook()
        return watched.is_elsewhere

    def loss_seen(self, losses: list[Tensor], roots: list[Tensor]) -> None:
        """See ``LossSink``."""
        if self.progress.pauses:
            return
        start = perf_counter_ns()
        self._begin_backward()
        for loss, root in zip(losses, roots, strict=True):
            self.progress.scaled |= loss is not root
            if loss.is_cpu:
                value = float(loss.item())
                self.user_log.backward_begins(value)
                self._tend_busy()
                self._add_loss(value, root)
            elif loss.is_cuda:
                self.progress.device_losses.append(loss.detach())
                self._tend_busy()
        if self.progress.busy:
            self._tend_busy()
        self.progress.passes += 1
        self.progress.spent += perf_counter_ns() - start

    def _begin_backward(self) -> None:
        if self._suspects.evidence is not None:
            self._suspects.loss_seen(self.roster.steps_ended)
            self._tend_busy()
        if self._passes.closure is not None:
            self._passes.leave_raised_closure(sys._getframe(2))  # noqa: SLF001 - the step's frame is among its callers
            self._tend_busy()
        if self._manual is not None:
            self._end_manual_step(perf_counter_ns())
        else:
            self._passes.begin()

    def _tend_busy(self) -> None:
        """A pause, losses on a device, a closure, steps that no hook tells of, or an earlier loss in doubt."""
        self.progress.busy = bool(
            self.progress.pauses
            or self.progress.device_losses
            or self._passes.closure
            or self._manual
            or self._suspects.evidence
            or self.user_log.in_doubt
        )

    def _add_loss(self, value: float, root: Tensor) -> None:
        self._passes.add(value)
        if not math.isfinite(value):
            self.progress.suspicious = True
            self._raise_alert()
            self._note_last_steps()
            self._suspects.loss_is_bad(self.roster.step, root, self.roster.steps_ended)
            self._tend_busy()

    def last_end(self, optimizer: object) -> int | None:
        """See ``LossSink``."""
        watched = self.roster.find(unwrap(optimizer))
        return None if watched is None else watched.last_end

    def backward_begins(self, tensors: Any) -> None:
        """See ``LossSink``."""
        if not self._local_norms or self.progress.pauses:
            return
        if any(each.observe and not _is_captured(each) for each in self._watched.values()):
            self._local_norms.before_backward(tensors)

    def backward_ended(self) -> None:
        """See ``LossSink``."""
        if not self.progress.pauses:
            self._passes.end()
        if self.progress.pauses or self._watched or not self.roster.adopts:
            return
        if self._manual is None:
            self._manual = ManualSteps([p for module in self.roster.modules for p in module.parameters()])
            self.roster.add_hookless(self._manual)
            self.progress.thread = get_ident()
            self._tend_busy()
        self._manual.backward_ended()
        watched = self.roster.hookless
        if watched is not None:
            watched.reading = None
            if not watched.begun and not self.progress.suspicious:
                self._suspects.begin(self.roster.step, watched)
            if (watched.observe or self.progress.suspicious) and not _is_captured(watched):
                self._look(self._manual, watched, before=True)

    def _end_manual_step(self, start: int) -> None:
        watched = self.roster.hookless
        if self._manual is None or watched is None:
            return
        stepped = self._manual.stepped()
        if stepped:
            self._end_step(self._manual, watched, start)
        elif stepped is False:
            self._passes.discard()
            self._passes.forget()

    def _settle_manual(self, *, ended: bool) -> StepLog | None:
        """No more steps without an optimizer. ``ended``: the last backward was one; else it is an optimizer's.

        Returns:
            The log of these steps.
        """
        steps, watched = self._manual, self.roster.hookless
        if steps is None or watched is None:
            return None
        if steps.pending and ended:
            self._end_step(steps, watched, perf_counter_ns())
        watched.log.closed = ended
        watched.order.settle()
        self._manual = None
        self.roster.drop_hookless()
        self._tend_busy()
        return watched.log

    def _read_local_norms(self, averaged: set[int]) -> None:
        start = perf_counter_ns()
        for watched in self._watched.values():
            if watched.observe and any(id(p) in averaged for p in watched.reader.parameters):
                watched.local = watched.reader.read()
        self.progress.spent += perf_counter_ns() - start

    def _join(self, optimizer: Optimizer, watched: WatchedOptimizer) -> WatchedOptimizer:
        """An optimizer that steps inside backward is one of many, which are watched as one."""
        del self._watched[id(optimizer)]
        watched.order.settle()
        watched.is_never_thin = True
        if self._together is None:
            self._together = StepsInBackward(self._end_step_in_backward, self._forget_together)
            self._watched[id(self._together)] = watched
            watched.together = self._together
            watched.reference = weakref.ref(self._together)
            joined = watched
        else:
            joined = self._watched[id(self._together)]
            self.roster.merge(watched, joined)
        self._together.add(optimizer, watched.reader.parameters)
        self.roster.share_budget()
        return joined

    def _forget_together(self) -> None:
        if self._together is not None:
            self.roster.drop(id(self._together))
            self._together = None

    def _end_step_in_backward(self) -> None:
        start = perf_counter_ns()
        try:
            together = self._together
            if together is None or self.progress.pauses:
                return
            watched = self._watched[id(together)]
            if watched.is_stale(together):
                watched.rebuild(together, self._models, learn=False)
            watched.reading = together.reading()
            if watched.reading is not None:
                loss = self.progress.host_loss
                watched.nonfinite = self._suspects.gone(self.roster.step, watched, watched.reading, loss)
            self._end_step(together, watched, start)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "end of backward")

    def unscaled(self, optimizer: object, inverse: Tensor) -> None:
        """See ``LossSink``."""
        watched = self.roster.find(unwrap(optimizer))
        if watched is not None and not self.progress.pauses:
            self.progress.scaled = True
            watched.unscale(inverse)

    def scaling(self, optimizer: object, scale: Tensor) -> None:
        """See ``LossSink``."""
        inner = unwrap(optimizer)
        watched = self._watched.get(id(inner)) or self._find(inner)
        if watched is None or self.progress.pauses:
            return
        watched.scale = scale
        watched.is_never_thin = True
        self._raise_alert()

    def skipped_by_scaler(self, optimizer: object) -> None:
        """See ``LossSink``. The step counts, and its overflow is the scaler's business, not a finding."""
        inner = unwrap(optimizer)
        watched = self.roster.find(inner)
        if watched is not None and not self.progress.pauses:
            watched.reading = None
            self._end_step(inner, watched, perf_counter_ns(), skipped=True)

    # --- One step --------------------------------------------------------------------------------------

    def _look(self, optimizer: Steps, watched: WatchedOptimizer, *, before: bool) -> None:
        """Read the gradients of a step that is observed or seems non-finite, ``before`` its update or after."""
        loss = self._passes.loss_of(watched)
        suspicious = not is_finite(loss)
        if suspicious and not watched.observe and not self._sink.wants_nonfinite_detail():
            watched.nonfinite = True
            if watched.told != watched.count:
                watched.told = watched.count
                self._sink.nonfinite(NonfiniteStep(self.roster.step, loss=loss))
            return
        reading = watched.reading = self._read(watched)
        if before and watched.reader.devices:
            watched.witness = self._suspects.witness(watched, watched.reader.parameter_norms())
        total = math.hypot(*reading.norms)
        if suspicious or not math.isfinite(total):
            own = watched.own
            if watched.told == watched.count or (own is not None and own.is_known_to_be_bad):
                watched.nonfinite = True
            elif not _overflowed(optimizer):
                self._note_last_steps()
                self._suspects.on_host(self.roster.step, watched, reading, loss, before=before)
                watched.told = watched.count if watched.nonfinite else watched.told
        elif reading.indices and reading.complete and not (reading.on_device or watched.reader.sharded):
            watched.total = total

    def _read(self, watched: WatchedOptimizer) -> Reading:
        """Norms of the gradients; those from before clipping, if it is them that were clipped."""
        known, seen = watched.reading, watched.seen
        if known is not None and watched.reading_epoch == self.progress.passes:
            if seen is None or seen.are_as_seen():
                return known
            if not seen.are_replaced():
                # Averaged by hand, given noise: told is what was there before. But what is bad by now is bad.
                now = watched.reader.read()
                good = math.isfinite(math.hypot(*known.norms)) and math.isfinite(math.hypot(*now.norms))
                return known if good and now.indices == known.indices else now
        watched.take_stock(self._models)
        return watched.reader.read()

    def _look_within(self, optimizer: Optimizer) -> None:
        """An optimizer steps inside of one that has a closure: it may be that one's update, as in SAM.

        Only now are its gradients there: not before the closure, and maybe cleared when the step has ended.
        """
        for watched in self._watched.values():
            if watched.is_late and watched.observe and watched.steps_same_as(optimizer):
                watched.reading, watched.reading_epoch = watched.reader.read(), self.progress.passes

    def _look_at_once(self, watched: WatchedOptimizer, raises: bool) -> None:
        """Bad gradients are clipped: often the step does not come, and never where clipping ``raises``.

        They are no finding yet where a scaler will judge them, or a closure replace them.
        """
        optimizer = watched.reference()
        if optimizer is not None and (raises or not (self.progress.scaled or self._passes.closure)):
            self._look(optimizer, watched, before=True)

    @shielded(None)
    def tell_unfinished(self) -> None:
        """The run ends: report a loss that was not finite, and whose step will not come."""
        self._passes.tell_discarded()

    def _note_last_steps(self) -> None:
        """What a thin step leaves out, for a closer look at what it left behind."""
        if self.roster.leader is not None:
            self.roster.leader.last_step = self.roster.step - 1
        for watched in self._watched.values():
            if not watched.previous_observed:
                watched.settled = False

    def _check_parameters(self) -> None:
        """Find a NaN that came in a step nobody observed, and that no loss has met since."""
        self._checked = perf_counter_ns()
        for watched in self._watched.values():
            if watched.count and not self._sink.nonfinite_seen:
                self._suspects.check(self.roster.step - 1, watched)

    def _judge_skipped(self, watched: WatchedOptimizer, loss: float | None) -> bool:
        # The scaler's own overflow is no finding. But scaling cannot make the loss as it was before non-finite.
        if loss is None or math.isfinite(loss):
            return False
        self._passes.tell_skipped(watched, loss)
        return True

    def _end_step(
        self, optimizer: Steps, watched: WatchedOptimizer, start: int, *, skipped: bool = False
    ) -> None:
        if watched.order.learning:
            watched.order.settle()
        if self._arrivals:
            self._arrivals.drain()
        now = monotonic_ns() + self._anchor
        loss = self._passes.take_loss(watched)
        reading, watched.reading = watched.reading, None
        total, watched.total = watched.total, None
        if reading is not None and total is not None and self._is_plain(optimizer, watched):
            watched.log.observe(now, watched.layers, reading.indices, reading.norms, total)
            if watched.clip_total is not None:
                watched.clip_total = math.nan  # it is the norm just written
                watched.record_clip(now)
            if optimizer.param_groups[0].get("lr") is not watched.rate or len(optimizer.param_groups) != 1:
                watched.note_rates(now, optimizer)
            nonfinite = self._suspects.step_ended(self.roster.step, optimizer, watched, total)
            if nonfinite:
                watched.log.marks.append((now, True, False))
            self._count(watched, start, now, loss, observed=True, nonfinite=nonfinite)
            return
        in_flight: InFlight | None = None
        scale = 1.0
        loss_scale = local_norm = None
        watched.forget_replaced()
        scaler = watched.scale
        if (
            reading is not None
            or self.progress.device_losses
            or self.progress.given_loss is not None
            or scaler is not None
            or watched.late_clip is not None
        ):
            loss, scale, skipped, in_flight = self._collect(optimizer, watched, reading, loss, skipped)
            loss_scale, local_norm = _on_host(watched, skipped)
            watched.scale = watched.local = None
            if reading is not None and not self._is_reportable(watched, reading, in_flight):
                reading = None
        total, ratio = watched.take_clip()
        total = None if total is None else total / scale
        nonfinite = self._judge_skipped(watched, loss) if skipped else watched.nonfinite
        watched.nonfinite = False
        indices: Sequence[int] | None = None
        norms: Sequence[float] | None = None
        if skipped:
            total = ratio = None
        elif reading is not None:
            indices, norms = reading.indices, reading.scaled_down(scale)
            total = math.hypot(*norms) if reading.complete else None
        step = self.roster.step
        self._note_rates(watched, now, optimizer)
        watched.settled = nonfinite or skipped
        if reading is not None and not watched.settled:
            nonfinite = self._suspects.step_ended(step, optimizer, watched, total)
        late = loss if in_flight is not None else None
        record = StepRecord(
            watched.index, step, now, late, watched.layers, indices, norms, total, nonfinite, skipped,
            ratio, watched.reader.sharded, loss_scale, local_norm,
        )  # fmt: skip
        self._arrivals.hand_over(record, in_flight)
        # A loss that is still on its way comes later, with the record.
        loss = None if in_flight is not None else loss
        self._count(
            watched, start, now, loss, observed=reading is not None, nonfinite=nonfinite, skipped=skipped
        )

    def _is_plain(self, optimizer: Steps, watched: WatchedOptimizer) -> bool:
        """Whether there is nothing to a step beyond good gradients on the host, read before its update."""
        return not (
            watched.unseen is not False
            or watched.scale is not None
            or watched.local is not None
            or watched.nonfinite
            or self.progress.device_losses
            or self.progress.given_loss is not None
            or self.progress.given_rate is not None
            or self._arrivals.holds_step
            or self._arrivals
            or hasattr(optimizer, "found_inf")
        )

    def _count(
        self,
        watched: WatchedOptimizer,
        start: int,
        now: int,
        loss: float | None,
        *,
        observed: bool,
        nonfinite: bool,
        skipped: bool = False,
    ) -> None:
        """Count a step that ended ``now``, and plan the next. The clock has run for it since ``start``."""
        watched.last_step = self.roster.step
        watched.last_epoch = self.progress.passes
        watched.last_nonfinite = nonfinite
        if nonfinite:  # what it has left behind is told with it
            watched.poisoned = bool(self._suspects.bad_parameters(watched))
        if observed or skipped:
            watched.last_known = now
        watched.losses.append(loss)
        watched.ends.append(now)
        if watched.paused:
            watched.log.pauses.append((now, watched.paused))
            watched.paused = 0
        self._alert = False
        was_observed = watched.observe
        spent = watched.spent + self.progress.spent + perf_counter_ns() - start
        self.progress.spent = watched.spent = 0
        watched.log.spent += spent
        watched.plan_next(spent, now, observed)
        if watched.may_be_thin or self._pre_hook is None:
            self._tend_pre_hook()
        if watched.log.is_full():
            watched.use(self._sink.open_log(watched.index, self.roster.step))
        if self._waits.seen and watched.leads:
            watched.record_wait(now, self._waits.take())
        if was_observed and perf_counter_ns() - self._checked > _CHECK_NANOSECONDS:
            self._check_parameters()
        is_looked_at = watched.leads and (self.measures.nvtx is not None or now >= self.measures.look_at)
        if was_observed or watched.observe or is_looked_at:
            self._measure(watched, now, skipped=skipped)

    def _measure(self, watched: WatchedOptimizer, now: int, *, skipped: bool = False) -> None:
        """Tell the measurements that a step ended, of which or of whose successor they want to know."""
        if watched.observe or self._forward.armed:
            everyone = self.roster.everyone()
            observed = watched.observe or any(each.observe for each in everyone)
            self._forward.next_step(self.roster.steps_ended, len(everyone), observed=observed)
        self.progress.spent += self.measures.step_ended(
            watched,
            now,
            self.roster.step,
            optimizers=self.roster.optimizer_count,
            skipped=skipped,
        )

    def _note_rates(self, watched: WatchedOptimizer, now: int, optimizer: Steps) -> None:
        if self.progress.given_rate is not None:
            watched.note_given_rate(now, self.progress.given_rate)
            self.progress.given_rate = None
        else:
            watched.note_rates(now, optimizer)

    def _collect(
        self,
        optimizer: Steps,
        watched: WatchedOptimizer,
        reading: Reading | None,
        loss: float | None,
        skipped: bool,
    ) -> tuple[float | None, float, bool, InFlight | None]:
        """The slower half of a step's end: device values, a fused optimizer's scale, a given loss."""
        losses, self.progress.device_losses = self.progress.device_losses, []
        given, self.progress.given_loss = self.progress.given_loss, None
        self._tend_busy()
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
        if watched.late_clip is not None:
            scalars["clip_total"] = watched.late_clip.total
        on_device = reading.on_device if reading is not None else ()
        witness, watched.witness = watched.witness, None
        anything = on_device or losses or scalars
        in_flight = self._arrivals.send(on_device, losses, scalars, witness) if anything else None
        if in_flight is not None:
            in_flight.clip = watched.late_clip
        return loss, scale, skipped, in_flight

    def _is_reportable(self, watched: WatchedOptimizer, reading: Reading, in_flight: InFlight | None) -> bool:
        """Whether there is anything to report; a norm of zero over no gradients would be a lie."""
        if watched.unseen is None:
            reason = self._why_unseen(watched)
            watched.unseen = reason is not None
            if reason is not None:
                self._sink.missing(self.roster.step, reason)
        if watched.unseen:
            return False
        if watched.reader.sharded and not reading.complete:
            self._sink.missing(self.roster.step, PENDING_SUMS)
        if reading.on_device:
            return in_flight is not None
        if not reading.indices and not watched.last_known:  # later it may be a batch that is left out
            self._sink.missing(self.roster.step, NO_GRADIENTS)
        return bool(reading.indices)

    def _why_unseen(self, watched: WatchedOptimizer) -> str | None:
        return why_unseen(
            watched.reader.parameters,
            [parameter for module in self.roster.modules for parameter in module.parameters()],
            [parameter for each in self._watched.values() for parameter in each.reader.parameters],
        )

    def remove_in_child(self) -> None:
        """After a fork: take the hooks off, and touch neither devices nor the sink."""
        self._take_hooks_off()
        self.measures.remove_in_child()
        self._watched.clear()
        self.roster.adopts = False

    def finish(self) -> None:
        """Hand over what there is. Device values that have not arrived are asked for, briefly."""
        self.user_log.settle()
        self._arrivals.close_step()
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
