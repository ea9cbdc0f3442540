"""What clipping tells of a step: norms as they were before it, and by how much gradients were made smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING

from gradwatch.gradients.clipping import Total, clip_ratio
from gradwatch.gradients.norms import are_plain
from gradwatch.gradients.seen import SeenGradients
from gradwatch.loop.roster import Roster
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.loop.watched import LateClip, WatchedOptimizer
from gradwatch.tensors.device_ring import is_capturing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class ClipWitness:
    """Hears of clipping (``ClipSink``), and writes down what it means for the watched optimizers.

    Args:
        observe: Has this optimizer's step observed, though it was to be left out.
        look_at_once: Looks at its bad gradients now, since their step may not come, or will not (``raises``).
    """

    def __init__(
        self,
        roster: Roster,
        progress: StepInProgress,
        observe: Callable[[WatchedOptimizer], None],
        look_at_once: Callable[[WatchedOptimizer, bool], None],
    ) -> None:
        self._roster = roster
        self._progress = progress
        self._observe = observe
        self._look_at_once = look_at_once
        # Whose gradients, all of them, are about to be clipped.
        self._owner: WatchedOptimizer | None = None

    def before_clipping(
        self,
        grads: Sequence[Tensor],
        total: Total | None,
        norms: Sequence[Tensor] | None,
        *,
        is_l2: bool = True,
        raises: bool = False,
    ) -> None:
        """See ``ClipSink``."""
        owner, self._owner = self._owner, None
        if self._progress.pauses or self._progress.is_elsewhere:
            return
        for watched in self._roster.watched.values():
            whole = watched is owner
            if not whole:
                watched.take_stock(self._roster.models)
                if not watched.owns(grads):
                    continue
            _compare(watched)
            # A second time sees clipped gradients.
            first, finite = watched.clip_total is None, not isinstance(total, float) or math.isfinite(total)
            if not finite:
                # It is paid for already: every clipped step is checked, observed or not.
                self._observe(watched)
            elif first and total is not None and not (watched.reader.devices and is_capturing()):
                self._note(watched, grads, total, norms, whole=whole, is_l2=is_l2)
            if watched.observe and (watched.reading is None or watched.reading_epoch != self._progress.passes):
                start = perf_counter_ns()
                if whole:
                    watched.reading = watched.reader.read_from(norms)
                else:
                    watched.reading = watched.reader.read()
                watched.reading_epoch = self._progress.passes
                self._progress.spent += perf_counter_ns() - start
            if not finite:
                self._look_at_once(watched, raises)
                if first and is_l2:
                    watched.clip_total = _finite_total(watched)
            watched.seen = SeenGradients.one_of(watched.reader.parameters)

    def _note(
        self,
        watched: WatchedOptimizer,
        grads: Sequence[Tensor],
        total: Total,
        norms: Sequence[Tensor] | None,
        *,
        whole: bool,
        is_l2: bool,
    ) -> None:
        """Write down the norm that clipping found, as far as it is this optimizer's."""
        known: Total = total if is_l2 else math.nan
        on_host = norms if isinstance(total, float) else None
        share = known if whole else watched.reader.share_of(grads, known, on_host)
        watched.clip_total = share if isinstance(share, float) else math.nan
        if share is None:  # of gradients clipped in parts there is no one norm, and no one ratio
            watched.clip_ratio = math.nan
        elif not isinstance(total, float):
            watched.late_clip = LateClip(total, is_norm=share is total)

    def knows_alike(self, grads: Sequence[Tensor]) -> bool:
        """See ``ClipSink``."""
        if self._progress.is_elsewhere:
            return False
        for watched in self._roster.watched.values():
            if watched.reader.alike and watched.reader.are_all(grads):
                before = watched.reader
                watched.take_stock(self._roster.models)
                if watched.reader is before:
                    self._owner = watched
                    return True
        return False

    def gradients_alike(self, optimizer: Optimizer) -> list[Tensor] | None:
        """See ``ClipSink``."""
        watched = self._roster.watched.get(id(optimizer))
        if watched is None or self._progress.is_elsewhere:
            return None
        watched.take_stock(self._roster.models)
        grads = watched.reader.gradients()
        if not watched.reader.alike or not are_plain(grads):
            return None
        self._owner = watched
        return grads

    def clipped(self, grads: Sequence[Tensor], max_norm: float, total: Total | None) -> None:
        """See ``ClipSink``."""
        if total is None or self._progress.pauses or self._progress.is_elsewhere:
            return
        for watched in self._roster.watched.values():
            if watched.seen is None or not watched.owns(grads):
                continue
            watched.see_clipped()
            if watched.own is not None:
                watched.own.leave(watched.reader.parameters)
            if watched.clip_total is None:
                continue
            late = watched.late_clip
            if isinstance(total, float) and late is None:
                ratio = clip_ratio(max_norm, total)
                watched.clip_ratio = ratio if watched.clip_ratio is None else watched.clip_ratio * ratio
            elif late is not None and late.total is total and late.max_norm is None:
                late.max_norm = max_norm
            else:  # a second time, on a device
                watched.clip_ratio, watched.late_clip = math.nan, None


def _compare(watched: WatchedOptimizer) -> None:
    """With the gradients that were seen before these are clipped."""
    if watched.own is not None:
        watched.own.look()
    if watched.seen is not None and not watched.seen.are_as_seen():
        watched.forget_clip()  # of a batch thrown away, or of the micro-batches so far


def _finite_total(watched: WatchedOptimizer) -> float | None:
    """Norm of gradients of which only torch's own total overflowed; None where they are bad."""
    reading = watched.reading
    total = math.hypot(*reading.norms) if reading is not None and reading.complete else math.nan
    return total if math.isfinite(total) else None
