"""The backward passes since the last step: which of them it is made of, and what their losses add up to.

Hooks tell of backward passes and of steps; nothing tells of gradients that are cleared in between. So before
each pass that is not the first, the gradients themselves are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Final

import torch

from gradwatch.loop.own_passes import OwnPasses
from gradwatch.loop.roster import Roster
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.loop.user_log import UserLog
from gradwatch.loop.watched import WatchedOptimizer
from gradwatch.nonfinite.suspects import Suspects, is_finite

if TYPE_CHECKING:
    from torch import Tensor

# Losses on devices that are kept for a step that may not come: all batches may be left out from now on.
_MOST_PASSES: Final = 64


class BackwardPasses:
    """Keeps the losses of the passes since the last step. Training thread only.

    Args:
        told_apart: Called when the optimizers' passes begin or end to be told apart.

    Attributes:
        closure: In a step that has a closure, the loss before it and the number of those on devices; else None.
        apart: Whether some optimizer has passes of its own, see ``OwnPasses``.
    """

    def __init__(
        self,
        progress: StepInProgress,
        roster: Roster,
        suspects: Suspects,
        user_log: UserLog,
        told_apart: Callable[[], None],
    ) -> None:
        self._progress = progress
        self._roster = roster
        self._suspects = suspects
        self._user_log = user_log
        self._told_apart = told_apart
        self.closure: tuple[float | None, int] | None = None
        self.apart = False

    # --- A pass ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A pass begins before a step, and is not the first or inside of a closure."""
        if self._progress.loss is not None or self._progress.device_losses:
            self._judge_earlier()
        if self.closure is not None:
            # Each evaluation of a closure replaces the one before, as its gradients do.
            self._return_to(self.closure)

    def add(self, loss: float) -> None:
        """Its loss, on the host."""
        self._progress.loss = loss if self._progress.loss is None else self._progress.loss + loss
        if self.apart:
            for watched in self._roster.watched.values():
                if watched.own is not None:
                    watched.own.add(loss)

    def end(self) -> None:
        """It ran to its end."""
        if self.apart:
            for watched in self._roster.watched.values():
                if watched.own is not None:
                    watched.own.leave(watched.reader.parameters)

    def _judge_earlier(self) -> None:
        """Were the gradients of earlier passes cleared meanwhile?"""
        here = [watched for watched in self._roster.watched.values() if not watched.is_elsewhere]
        cleared = [watched for watched in here if not _hold_something(watched.reader.parameters)]
        if not cleared and here:
            return  # micro-batches
        bad = self._progress.suspicious
        if len(cleared) == len(here):
            if self._is_kept_for_copies():
                return
            self.discard()
            if self.closure is not None:
                self.closure = (None, 0)  # what came before the closure is not in this step, either
            if self.closure is not None or not self._roster.watched:
                self.forget()
                return
            del self._progress.device_losses[:-_MOST_PASSES]
        if self.closure is None:
            for watched in cleared:
                told = bad or (watched.own is not None and watched.own.told)
                watched.own = OwnPasses(len(self._progress.device_losses), told=told)
            self.apart = True
            self._told_apart()

    def _is_kept_for_copies(self) -> bool:
        """An optimizer of copies in full precision gets its gradients later than the model has them."""
        stepped = {id(p) for watched in self._roster.watched.values() for p in watched.reader.parameters}
        trained = [tuple(module.parameters()) for module in self._roster.modules]
        return any(stepped.isdisjoint(map(id, each)) and _hold_something(each) for each in trained)

    def _return_to(self, base: tuple[float | None, int]) -> None:
        self._progress.loss, count = base
        del self._progress.device_losses[count:]

    # --- A closure ---------------------------------------------------------------------------------------

    def enter_closure(self) -> None:
        """A step begins that runs its passes itself."""
        self.closure = (self._progress.loss, len(self._progress.device_losses))

    def leave_raised_closure(self, frame: FrameType) -> None:
        """No hook follows a step whose closure raised: it is over if ``frame`` is not inside it."""
        late = [watched for watched in self._roster.everyone() if watched.is_late]
        if self.closure is not None and not any(watched.is_nested(frame) for watched in late):
            self.tell_discarded()
            for watched in late:
                watched.is_late = False
                watched.told = -1
            self._return_to(self.closure)
            self.closure = None

    # --- No step comes -----------------------------------------------------------------------------------

    def discard(self) -> None:
        """A batch was thrown away: `zero_grad()` came instead of a step."""
        if self.closure is None:  # within one, an evaluation only makes room for the next
            self.tell_discarded()
        self._progress.suspicious = False
        self._user_log.discard()
        self._suspects.discard()
        for watched in self._roster.everyone():
            watched.forget_clip()
            watched.told = -1

    def forget(self) -> None:
        """No loss so far is of the step to come."""
        self._progress.loss = None
        self._progress.device_losses.clear()

    def tell_discarded(self) -> None:
        """Report a bad loss whose step does not come, at the index that this would have had."""
        watched = self._roster.leader
        # What was given may be the next batch's already.
        bad = [loss for loss in (self._progress.loss, self._progress.host_loss) if not is_finite(loss)]
        if self._progress.suspicious and watched is not None and bad and bad[0] is not None:
            self.tell_skipped(watched, bad[0])
        self._progress.suspicious = False

    def tell_skipped(self, watched: WatchedOptimizer, loss: float) -> None:
        """Report a bad loss that no update was made from, once a batch."""
        if watched.told != watched.count:
            watched.told = watched.count
            self._suspects.skipped(self._roster.step, watched, loss)

    # --- The step ----------------------------------------------------------------------------------------

    def loss_of(self, watched: WatchedOptimizer) -> float | None:
        """The loss of the passes that are this optimizer's, as far as it is on the host."""
        if watched.own is None or self._progress.given_loss is not None:
            return self._progress.host_loss
        return watched.own.loss

    def take_loss(self, watched: WatchedOptimizer) -> float | None:
        """The same, where its step ends; the next begins with none. Losses on devices are left there."""
        loss, self._progress.loss = self._progress.loss, None
        if self.apart:
            own = watched.own
            if own is not None and not own.is_all(loss):
                loss = own.loss
                del self._progress.device_losses[: own.before]
            if is_finite(loss):
                self.tell_discarded()
            for each in self._roster.everyone():
                each.own = None
            self.apart = False
            self._told_apart()
        self._progress.suspicious = False
        return loss


def _hold_something(parameters: Sequence[Tensor]) -> bool:
    """Whether any of their gradients was kept."""
    # From the last: that of a head's bias is small, and hardly ever zero.
    return any(_is_kept(grad) for p in reversed(parameters) if (grad := p.grad) is not None)


def _is_kept(grad: Tensor) -> bool:
    """Whether this was not set to zero. One on a device was not: to look at it would be to wait for it."""
    if type(grad) is not torch.Tensor or not grad.is_cpu or grad.layout is not torch.strided:
        return True
    # A NaN is not zero. What backward has just made and nobody has written into was not set to zero, but is it.
    return bool(torch.count_nonzero(grad)) or grad._version == 0  # noqa: SLF001
