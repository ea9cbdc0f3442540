"""What was asked of the agent's cost, and whether the figures reach it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from overhead import figures
from overhead.contenders import DEFAULT, EVERY_STEP, WANDB
from overhead.estimates import Estimate
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

_BUDGET: Final = 0.005
_UNSAMPLED_SECONDS: Final = 2e-6
_WALL_DEFAULT: Final = 0.01
# When every step is observed: 1 % where a step takes 20 ms or more, which the GPTs do.
_WALL_EVERY_STEP: Final = {"MLP 34 k": 0.06, "ResNet-like": 0.03, "LSTM": 0.03}
_WALL_EVERY_LONG_STEP: Final = 0.01
_SECONDS_A_TENSOR: Final = 3e-6
_CLIP_RATIO: Final = 0.7
_CHEAPER_THAN_WANDB: Final = 100.0
_OWN_CLOCK_FACTOR: Final = 1.5
_SLICE_SECONDS: Final = 1e-3


@dataclass(frozen=True)
class Verdict:
    """One target on one model. ``is_met`` is None where the interval is wider than the target."""

    what: str
    model: str
    threads: int
    asked: str
    measured: str
    is_met: bool | None


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """All targets on all models; what was not measured is left out."""
    order: dict[str, list[Verdict]] = {}
    for result in results:
        for verdict in _verdicts(result):
            order.setdefault(verdict.what, []).append(verdict)
    return [verdict for same in order.values() for verdict in same]


def _verdicts(result: Result) -> Iterator[Verdict]:
    def at_most(what: str, limit: float, value: float | Estimate, unit: str, scale: float) -> Iterator[Verdict]:
        found = value if isinstance(value, Estimate) else Estimate(value, value, value)
        if math.isnan(found.median):
            return
        measured = _number(found.median * scale)
        if found.low < found.high:
            measured += f" [{_number(found.low * scale)}, {_number(found.high * scale)}]"
        is_resolved = (found.high - found.low) / 2 <= limit
        yield Verdict(
            what, result.model, result.threads, f"{_number(limit * scale)} {unit} or less".replace("  ", " "),
            f"{measured} {unit}".strip(), found.median <= limit if is_resolved else None,
        )  # fmt: skip

    blocks = result.short
    wall = _WALL_EVERY_STEP.get(result.model, _WALL_EVERY_LONG_STEP)
    every = figures.added(blocks, EVERY_STEP, figures.quick)
    own, derived = figures.own_clock(result, DEFAULT), figures.derived_default(result)
    mine = own - figures.background(result, DEFAULT)
    yield from at_most("default settings, own clock, training thread", _BUDGET, mine, "%", 100)
    yield from at_most("default settings, own clock, background threads with it", _BUDGET, own, "%", 100)
    yield from at_most(
        "default settings, upper end of the wall interval (long blocks)", _WALL_DEFAULT,
        figures.ratio(result.long, DEFAULT).high - 1, "%", 100,
    )  # fmt: skip
    yield from at_most(
        "default settings, upper end of the wall interval (short blocks)", _WALL_DEFAULT, derived.high, "%", 100
    )
    yield from at_most(
        "a step that is not observed",
        _UNSAMPLED_SECONDS,
        figures.added(blocks, UNSAMPLED, figures.quick),
        "us",
        1e6,
    )
    if derived.low > 0 and own > 0:
        factor = max(own / derived.median, derived.median / own)
        yield from at_most("own clock against measured cost, factor", _OWN_CLOCK_FACTOR, factor, "", 1)
    yield from at_most(
        "mean slice of the background threads",
        _SLICE_SECONDS,
        figures.slice_seconds(result, DEFAULT),
        "ms",
        1e3,
    )
    yield from at_most(
        "an observed step, beyond one pass over the gradients, a tensor", _SECONDS_A_TENSOR,
        every.scaled(1 / result.tensors, -result.one_pass / result.tensors), "us", 1e6,
    )  # fmt: skip
    yield from at_most(
        "observing every step, wall", wall,
        figures.ratio(blocks, EVERY_STEP, figures.quick).scaled(1.0, -1.0), "%", 100,
    )  # fmt: skip
    for case, clipping in result.clip.items():
        for name in (TORCH_CLIP_WATCHED, TORCH_CLIP_UNSAMPLED, OUR_CLIP, OUR_CLIP_UNSAMPLED):
            if name in clipping:
                found = figures.ratio(clipping, name, figures.clip, TORCH_CLIP, TORCH_CLIP_CONTROL)
                yield from at_most(f"{name}, {case}, of torch's time", _CLIP_RATIO, found, "", 1)
    if WANDB in result.long and every.low > 0:
        times = figures.added(result.long, WANDB).median / every.median
        yield Verdict(
            "times cheaper than wandb.watch, an observed step", result.model, result.threads,
            f"{_CHEAPER_THAN_WANDB:.0f} or more", f"{times:.0f}", times >= _CHEAPER_THAN_WANDB,
        )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.{2 if abs(value) < 100 else 0}f}"
