"""From measured blocks to ratios, costs and own clocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

from overhead.blocks import Block, Blocks
from overhead.contenders import BARE, CONTROL, DEFAULT, EVERY_STEP
from overhead.estimates import NOTHING, Estimate, estimate, quotient
from overhead.plan import UNSAMPLED, Result

Value = Callable[[Block], float]


def mean(block: Block) -> float:
    """Seconds a step, everything included."""
    return block.mean


def quick(block: Block) -> float:
    """Seconds of the lower-quartile step."""
    return block.quick


def clip(block: Block) -> float:
    """Seconds of the lower-quartile clipping call."""
    return block.clip


def cpu(block: Block) -> float:
    """CPU seconds of the process a step."""
    return block.cpu


def middle(blocks: list[Block], value: Value) -> float:
    """Median over blocks; NaN without any."""
    return statistics.median(map(value, blocks)) if blocks else math.nan


def pairs(blocks: Blocks, name: str, value: Value, base: str, control: str) -> Iterator[tuple[float, float]]:
    """Each block's value, with the base's of the same round: the mean of base and control.

    The control itself is compared with the base alone.
    """
    bases, controls = ({b.round: value(b) for b in blocks[one]} for one in (base, control))
    for block in blocks.get(name, []):
        first = bases[block.round]
        yield value(block), first if name == control else (first + controls[block.round]) / 2


def ratio(blocks: Blocks, name: str, value: Value = mean, base: str = BARE, control: str = CONTROL) -> Estimate:
    """Value relative to the base."""
    return estimate([a / b for a, b in pairs(blocks, name, value, base, control)])


def differences(blocks: Blocks, name: str, value: Value = mean) -> list[float]:
    """Seconds a step above the loop without a hook, by round."""
    return [a - b for a, b in pairs(blocks, name, value, BARE, CONTROL)]


def added(blocks: Blocks, name: str, value: Value = mean) -> Estimate:
    """Seconds a step above the loop without a hook."""
    return estimate(differences(blocks, name, value))


def own_clock(result: Result, name: str) -> Estimate:
    """The exported ``gradwatch.agent.overhead``, by block: both kinds of threads; NaN where there was none."""
    return estimate([statistics.median(b.overheads) for b in result.long[name] if b.overheads])


def own_clock_training(result: Result, name: str) -> Estimate:
    """The same without what the background threads are measured to take: the training thread."""
    return estimate([statistics.median(b.overheads) - _background(b) for b in result.long[name] if b.overheads])


def background(result: Result, name: str) -> float:
    """CPU of threads and processes of the contender's own, as a share of step time."""
    return middle(result.long[name], _background)


def _background(block: Block) -> float:
    return block.background / block.mean


def cheaper_than(result: Result, peer: str) -> Estimate:
    """How many times more a peer adds to a step than observing it: long blocks both, exports included."""
    blocks = result.long
    return quotient(differences(blocks, peer), differences(blocks, EVERY_STEP))


def slice_seconds(result: Result, name: str) -> float:
    """Mean length of the slices in which that CPU time was used."""
    blocks = result.long[name]
    slices = sum(block.slices * block.steps for block in blocks)
    return sum(block.background * block.steps for block in blocks) / slices if slices else math.nan


def observed(result: Result) -> float:
    """Share of steps that the default settings observe."""
    return middle(result.long[DEFAULT], lambda block: block.observed)


def bare_step(result: Result) -> float:
    """Seconds of a step without a hook."""
    return middle(result.long[BARE], mean)


def derived_default(result: Result) -> Estimate:
    """Share of step time that the default settings cost the training thread, from the short blocks."""
    return estimate(_derived(result))


def _derived(result: Result) -> list[float]:
    """By round: each step costs what one that is not observed does; an observed one costs the rest on top."""
    share = observed(result)
    seldom = pairs(result.short, UNSAMPLED, quick, BARE, CONTROL)
    often = pairs(result.short, EVERY_STEP, quick, BARE, CONTROL)
    return [
        ((1 - share) * unsampled + share * sampled) / base - 1
        for (unsampled, base), (sampled, _) in zip(seldom, often, strict=True)
    ]


def own_against_cost(result: Result) -> Estimate:
    """The exported overhead and what is measured, the larger in terms of the other.

    Measured: the training thread's cost in short blocks, and the processor time of the background threads, both
    of which the exported figure counts.
    """
    exported = [statistics.median(b.overheads) for b in result.long[DEFAULT] if b.overheads]
    of_threads = background(result, DEFAULT)
    found = quotient(exported, [cost + of_threads for cost in _derived(result)])
    if not found.low > 0:
        return NOTHING
    either_way = [max(value, 1 / value) for value in (found.median, found.low, found.high)]
    nearest = 1.0 if found.low <= 1 <= found.high else min(either_way[1:])
    return Estimate(either_way[0], nearest, max(either_way[1:]))
