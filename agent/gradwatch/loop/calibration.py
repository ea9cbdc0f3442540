"""What a step costs that is not observed: measured in this process, with the hooks against without them.

A clock inside the hooks would miss the way there and back, and in a loop of nothing but hooks everything they
touch stays in the processor's caches, which is five times faster than between a forward and a backward pass. So
a few dozen steps of a tiny model are run, on and off in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import chain
from time import perf_counter_ns
from typing import Final

import torch

from gradwatch.clock import Clock
from gradwatch.loop.loss import LossCapture
from gradwatch.loop.observer import StepObserver
from gradwatch.loop.step_log import StepLog
from gradwatch.safety import shielded
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord

# 10 ms in all. The median of so many differences is good to about 10 %.
_PAIRS: Final = 48
_WARM_UP: Final = 4
# Where it cannot be measured: what a 2-core virtual machine showed.
_TYPICAL: Final = 6_000.0


class _Nowhere:
    """A sink that keeps nothing."""

    def open_log(self, optimizer: int, first_step: int) -> StepLog:
        return StepLog(optimizer, first_step)

    def step(self, record: StepRecord) -> None: ...

    def logged(self, value: LoggedValue) -> None: ...

    def nonfinite(self, step: NonfiniteStep) -> None: ...

    def missing(self, step: int, reason: str) -> None: ...

    nonfinite_seen = False

    def wants_nonfinite_detail(self) -> bool:
        return False


@shielded(_TYPICAL)
def thin_cost() -> float:
    """Nanoseconds that hooks and wrappers add to a step that is not observed."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # No random numbers: training's must come out the same.
        weight = torch.full((16, 16), 0.01, dtype=torch.float32, device="cpu", requires_grad=True)
        batch = torch.ones((16, 16), dtype=torch.float32, device="cpu")
        optimizer = torch.optim.SGD([weight], lr=0.1)
        observer = StepObserver(_Nowhere(), Clock())
        backward: Callable[..., None] = torch.autograd.backward
        watched_backward = LossCapture(observer, True, observer.measures.phases).wrap_backward(backward)
        hook = observer.observe_thinly(optimizer)

        def step(on: bool) -> int:
            weight.grad = None
            start = perf_counter_ns()
            loss = torch.tanh(torch.tanh(batch @ weight) @ weight).mean()
            (watched_backward if on else backward)(loss, None, None, False, None)
            # As torch walks through them.
            for each in chain({}.values(), {0: hook}.values() if on else ()):
                each(optimizer, (optimizer,), {})
            return perf_counter_ns() - start

        for _ in range(_WARM_UP):
            step(True), step(False)
        # Whoever goes second finds warmer caches: take turns.
        differences = [
            step(True) - step(False) if pair % 2 else -(step(False) - step(True)) for pair in range(_PAIRS)
        ]
        return max(0.0, statistics.median(differences))
