"""What is known of the step in progress, before any optimizer has taken it."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class StepInProgress:
    """Written where backward is called, by the user and by the hooks; read when a step ends.

    Attributes:
        loss: Loss on the host, summed over the backward passes since the last step; None before the first.
        passes: Backward passes ever begun.
        thread: The thread that trains, by which alone anything of this is told; None before the first step.
        busy: Whether a loss on the host is not simply the step's: then somebody has to think about it.
        pauses: How often training was paused (evaluation, checkpoint) and not resumed.
        device_losses: Losses on devices, detached.
        given_loss: What the user says the loss is.
        given_rate: What the user says the learning rate is.
        suspicious: Whether the loss is not finite.
        scaled: Whether a loss scaler was ever seen at work, who is the judge of bad gradients then.
        spent: Nanoseconds spent outside of the optimizer's hooks.
    """

    __slots__ = (
        "busy", "device_losses", "given_loss", "given_rate", "loss", "passes", "pauses", "scaled", "spent",
        "suspicious", "thread",
    )  # fmt: skip

    def __init__(self) -> None:
        self.thread: int | None = None
        self.loss: float | None = None
        self.passes = 0
        self.busy = False
        self.pauses = 0
        self.device_losses: list[Tensor] = []
        self.given_loss: float | Tensor | None = None
        self.given_rate: float | None = None
        self.suspicious = False
        self.scaled = False
        self.spent = 0

    @property
    def is_elsewhere(self) -> bool:
        """Whether another thread calls than the one that trains.

        What it does is none of this run's, and to look at gradients meanwhile, which autograd writes without
        Python's lock, would end the process.
        """
        return self.thread is not None and self.thread != get_ident()

    @property
    def host_loss(self) -> float | None:
        """The loss as far as it is on the host."""
        return self.given_loss if isinstance(self.given_loss, float) else self.loss
