"""Measuring blocks of steps, and interleaving the blocks of several contenders."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from overhead.models import Workload
from overhead.sink import Sink

Attach = Callable[[Workload], AbstractContextManager[object]]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One way to run the loop, and how long its blocks are.

    Attributes:
        name: What the report calls it.
        attach: Context in which its steps run; entering and leaving it is not timed.
        seconds: Least length of a block.
        steps: Least number of steps in it.
        pause_seconds: Rest after attaching, so that what it set off on other threads is over.
        warm_seconds: Untimed run after that.
        warm_steps: Least number of untimed steps.
        rounds: Takes part in this many rounds only; None in all.
    """

    name: str
    attach: Attach
    seconds: float
    steps: int = 3
    pause_seconds: float = 0.0
    warm_seconds: float = 0.0
    warm_steps: int = 2
    rounds: int | None = None


@dataclass(frozen=True)
class Block:
    """One measured block.

    Attributes:
        round: Blocks of one round are compared with each other.
        mean: Seconds a step, everything included.
        quick: Seconds of the lower-quartile step: blind to interruptions, and to what happens rarely, and twice
            as steady as the median. On a device the mean, because single steps only enqueue work.
        cpu: CPU seconds of the process a step, all threads.
        background: CPU seconds a step of threads and child processes that the contender started.
        slices: Scheduler slices of those threads a step.
        clip: Seconds of the lower-quartile call of ``Workload.clip``.
        observed: Share of the steps whose gradients gradwatch read, the warm-up included.
        overheads: What it exported as ``gradwatch.agent.overhead``, the warm-up's included.
    """

    round: int
    steps: int
    mean: float
    quick: float
    cpu: float
    background: float
    slices: float
    clip: float
    observed: float
    overheads: tuple[float, ...]


Blocks = dict[str, list[Block]]


def interleave(
    workload: Workload,
    arms: Sequence[Arm],
    sink: Sink,
    *,
    rounds: int = 1,
    seconds: float = 0.0,
    tell: Tell = lambda _: None,
) -> Blocks:
    """Run blocks of all arms in shuffled order, ``rounds`` times and for ``seconds``, whichever is longer."""
    blocks: Blocks = {arm.name: [] for arm in arms}
    shuffler = random.Random(1)  # noqa: S311 - statistics, not secrets
    end = time.perf_counter() + seconds
    index = 0
    while index < rounds or time.perf_counter() < end:
        present = [arm for arm in arms if arm.rounds is None or index < arm.rounds]
        shuffler.shuffle(present)
        for arm in present:
            tell(f"round {index + 1}: {arm.name}")
            blocks[arm.name].append(_measure(workload, arm, sink, index))
        index += 1
    return blocks


def _measure(workload: Workload, arm: Arm, sink: Sink, index: int) -> Block:
    others = set(_threads())
    with arm.attach(workload):
        time.sleep(arm.pause_seconds)
        warm = len(run(workload, arm.warm_seconds, arm.warm_steps))
        workload.synchronize()
        workload.clip_seconds.clear()
        background = Background(_threads() - others, {sink.pid})
        cpu, start = time.process_time(), time.perf_counter()
        durations = run(workload, arm.seconds, arm.steps)
        workload.synchronize()
        mean = (time.perf_counter() - start) / len(durations)
        cpu = (time.process_time() - cpu) / len(durations)
        spent, slices = background.since()
        clip = float(np.quantile(workload.clip_seconds, 0.25)) if workload.clip_seconds else math.nan
    # Only now: all that the steps led to has arrived, and decoding it disturbs nothing.
    received = sink.take()
    steps = len(durations)
    quick = mean if workload.device.type == "cuda" else float(np.quantile(durations, 0.25))
    return Block(
        index, steps, mean, quick, cpu,
        spent / steps, slices / steps, clip, received.observed / (steps + warm), received.overheads,
    )  # fmt: skip


def run(workload: Workload, seconds: float, steps: int) -> list[float]:
    """Step for at least so long and so often; seconds of each step."""
    step, clock = workload.step, time.perf_counter
    durations: list[float] = []
    before = clock()
    end = before + seconds
    while before < end or len(durations) < steps:
        step()
        now = clock()
        durations.append(now - before)
        before = now
    return durations


class Background:
    """CPU clock of some threads of this process, and of all its children but ``excluded``."""

    def __init__(self, threads: Collection[int], excluded: Collection[int]) -> None:
        self._threads = threads
        self._excluded = excluded
        self._start = self._read()

    def since(self) -> tuple[float, int]:
        """CPU seconds since the start, and how many scheduler slices the threads ran for them."""
        seconds, slices = self._read()
        return max(0.0, seconds - self._start[0]), slices - self._start[1]

    def _read(self) -> tuple[float, int]:
        seconds, slices = 0.0, 0
        for thread in self._threads:
            # Nanoseconds on a CPU, nanoseconds waited for one, slices: Documentation/scheduler/sched-stats.rst.
            with contextlib.suppress(OSError):
                spent, _, count = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
                seconds += int(spent) / 1e9
                slices += int(count)
        for child in psutil.Process().children(recursive=True):
            if child.pid not in self._excluded:
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    seconds += times.user + times.system
        return seconds, slices


def _threads() -> set[int]:
    return {thread.id for thread in psutil.Process().threads()}
