"""What was asked of the agent's cost, and whether the figures reach it.

A figure is judged as was asked: by the upper end of its 95 % interval where that was asked for, else by its
median. Where half the interval is wider than the target itself, the figure says neither yes nor no.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from overhead import figures
from overhead.contenders import DEFAULT, EVERY_STEP, WANDB
from overhead.estimates import Estimate
from overhead.memory import MIB, MemoryResult
from overhead.plan import (
    OUR_CLIP,
    OUR_CLIP_UNSAMPLED,
    TORCH_CLIP,
    TORCH_CLIP_CONTROL,
    TORCH_CLIP_UNSAMPLED,
    TORCH_CLIP_WATCHED,
    UNSAMPLED,
    Result,
)


class By(StrEnum):
    """What of a figure is compared with the target."""

    MEDIAN = "median"
    UPPER = "upper end of the 95 % interval"
    MEAN = "mean"
    FIGURE = "the figure itself"


@dataclass(frozen=True)
class Target:
    """One thing asked. ``scale`` turns a figure into ``unit``; with ``at_least``, more is better."""

    what: str
    limit: float
    unit: str
    scale: float
    by: By = By.MEDIAN
    at_least: bool = False
    # Half an interval that is wider says nothing; None for the limit itself.
    resolution: float | None = None

    @property
    def is_question(self) -> bool:
        """Whether the answer is yes or no: of faults, none is allowed."""
        return self.limit == 0

    @property
    def asked(self) -> str:
        """The limit, in words."""
        if self.is_question:
            return "yes"
        return f"{self.limit * self.scale:g} {self.unit} or {'more' if self.at_least else 'less'}".replace(
            "  ", " "
        )


_PERCENT: Final = ("%", 100.0)
_PLAIN: Final = ("", 1.0)
OWN_TRAINING: Final = Target("default settings: own clock, training thread", 0.005, *_PERCENT)
OWN: Final = Target("default settings: own clock, background threads' processor time with it", 0.005, *_PERCENT)
UNOBSERVED: Final = Target("default settings: a step that is not observed", 2e-6, "us", 1e6)
WALL_DEFAULT: Final = Target(
    "default settings: wall, everything in it (long blocks)", 0.01, *_PERCENT, By.UPPER
)
WALL_DEFAULT_SHORT: Final = Target(
    "default settings: wall of the training thread (short blocks)", 0.01, *_PERCENT, By.UPPER
)
SLICES: Final = Target(
    "default settings: slices of the background threads, on average", 1e-3, "ms", 1e3, By.MEAN
)
OWN_AGAINST_COST: Final = Target(
    "exported overhead against what is measured, factor either way", 1.5, *_PLAIN, resolution=0.5
)
OBSERVED: Final = Target("an observed step, beyond one pass over the gradients, a tensor", 3e-6, "us", 1e6)
WALL_LONG_STEPS: Final = Target("observing every step: wall, steps of 20 ms and more", 0.01, *_PERCENT)
WALL_CONV_LSTM: Final = Target("observing every step: wall, convolutional net and LSTM", 0.03, *_PERCENT)
WALL_MLP: Final = Target("observing every step: wall, the 1 ms MLP", 0.06, *_PERCENT)
CLIP: Final = Target("clipping: time of the call, of torch's", 0.7, *_PLAIN)
# A loop that clips is not slower: as far as 1 % tells.
CLIPPING_LOOP: Final = Target("clipping: wall of the loop, of torch's unwatched", 1.0, *_PLAIN, resolution=0.01)
IDENTICAL: Final = Target("clipping: bit-identical to torch's result", 0.0, *_PLAIN, By.FIGURE)
WANDB_TIMES: Final = Target(
    "times cheaper than wandb.watch(log_freq=1), an observed step", 100.0, *_PLAIN, at_least=True
)
RESIDENT: Final = Target("resident memory above the bare loop", 40 * MIB, "MiB", 1 / MIB, By.MEDIAN)
FLAT: Final = Target("memory flat: growth in 100 000 steps", MIB, "MiB", 1 / MIB, By.MEDIAN)
IMPORT: Final = Target("`import gradwatch`, without torch", 0.150, "ms", 1e3)
DEVICE: Final = Target("device memory for 1000 tensors", MIB, "MiB", 1 / MIB, By.FIGURE)
NO_SYNCHRONISATION: Final = Target('`torch.cuda.set_sync_debug_mode("error")` passes', 0.0, *_PLAIN, By.FIGURE)
# As the tables list them: all that was asked.
TARGETS: Final = (
    OWN_TRAINING, OWN, UNOBSERVED, WALL_DEFAULT, WALL_DEFAULT_SHORT, SLICES, OWN_AGAINST_COST, OBSERVED,
    WALL_LONG_STEPS, WALL_CONV_LSTM, WALL_MLP, CLIP, CLIPPING_LOOP, IDENTICAL, WANDB_TIMES, RESIDENT, FLAT,
    IMPORT, DEVICE, NO_SYNCHRONISATION,
)  # fmt: skip
_WALL: Final = {"mlp": WALL_MLP, "conv": WALL_CONV_LSTM, "lstm": WALL_CONV_LSTM}


@dataclass(frozen=True)
class Verdict:
    """A target in one place. ``is_met`` is None where a figure is too unsteady to say."""

    target: Target
    where: str
    case: str
    found: Estimate

    @property
    def judged(self) -> float:
        """The value that is compared, in the target's unit."""
        return (self.found.high if self.target.by is By.UPPER else self.found.median) * self.target.scale

    @property
    def is_met(self) -> bool | None:
        """Whether it is reached."""
        target = self.target
        if math.isnan(self.found.median):
            return None
        limit = target.limit * target.scale
        has_interval = self.found.low < self.found.high
        if target.by is By.UPPER:
            return self.judged <= limit if has_interval else None
        if has_interval:
            half = (self.found.high - self.found.low) / 2
            if half > (target.limit if target.resolution is None else target.resolution):
                return None
        return self.judged >= limit if target.at_least else self.judged <= limit


def verdicts(results: Sequence[Result], memory: Sequence[MemoryResult]) -> list[Verdict]:
    """All targets wherever they were measured, in the order of ``TARGETS``."""
    found = [verdict for result in results for verdict in _of(result)]
    found += [verdict for result in memory for verdict in _of_memory(result)]
    return sorted(found, key=lambda verdict: TARGETS.index(verdict.target))


def _of(result: Result) -> Iterator[Verdict]:
    where = f"{result.model}, {result.threads} thread{'s' if result.threads > 1 else ''}"
    if result.device != "cpu":
        where += f", {result.device}"
    long, short = result.long, result.short

    def verdict(target: Target, found: Estimate | float, case: str = "") -> Verdict:
        return Verdict(target, where, case, found if isinstance(found, Estimate) else _exactly(found))

    yield verdict(OWN_TRAINING, figures.own_clock_training(result, DEFAULT))
    yield verdict(OWN, figures.own_clock(result, DEFAULT))
    yield verdict(UNOBSERVED, figures.added(short, UNSAMPLED, figures.quick))
    yield verdict(WALL_DEFAULT, figures.ratio(long, DEFAULT).scaled(1.0, -1.0))
    yield verdict(WALL_DEFAULT_SHORT, figures.derived_default(result))
    yield verdict(SLICES, figures.slice_seconds(result, DEFAULT))
    yield verdict(OWN_AGAINST_COST, figures.own_against_cost(result))
    every = figures.added(short, EVERY_STEP, figures.quick)
    yield verdict(OBSERVED, every.scaled(1 / result.tensors, -result.one_pass / result.tensors))
    wall = _WALL.get(result.key, WALL_LONG_STEPS)
    yield verdict(wall, figures.ratio(long, EVERY_STEP).scaled(1.0, -1.0), "everything (long blocks)")
    yield verdict(
        wall, figures.ratio(short, EVERY_STEP, figures.quick).scaled(1.0, -1.0),
        "training thread (short blocks)",
    )  # fmt: skip
    for case, blocks in result.clip.items():
        for name in (TORCH_CLIP_WATCHED, TORCH_CLIP_UNSAMPLED, OUR_CLIP, OUR_CLIP_UNSAMPLED):
            if name in blocks:
                base = (TORCH_CLIP, TORCH_CLIP_CONTROL)
                told = f"{name}, {case}"
                yield verdict(CLIP, figures.ratio(blocks, name, figures.clip, *base), told)
                yield verdict(CLIPPING_LOOP, figures.ratio(blocks, name, figures.quick, *base), told)
    if result.clips_identically is not None:
        yield verdict(IDENTICAL, float(not result.clips_identically))
    if WANDB in long:
        yield verdict(WANDB_TIMES, figures.cheaper_than(result, WANDB))
    if result.synchronises is not None:
        yield verdict(NO_SYNCHRONISATION, float(bool(result.synchronises)))


def _of_memory(result: MemoryResult) -> Iterator[Verdict]:
    where = f"{result.model}, {result.device}"
    yield Verdict(RESIDENT, where, "", _exactly(result.above))
    yield Verdict(FLAT, where, "", _exactly(result.growth))
    yield Verdict(IMPORT, "", "", _exactly(result.import_seconds))
    if result.device_memory is not None:
        taken = max(result.device_memory.held, result.device_memory.peak)
        yield Verdict(DEVICE, result.device, "", _exactly(taken))


def _exactly(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)
