"""The tables of ``docs/benchmarks.md``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

from overhead import figures
from overhead.contenders import BARE, CONTROL, DEFAULT, EVERY_STEP
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
from overhead.results import Results
from overhead.targets import TARGETS, By, Target, Verdict, verdicts

Row = Sequence[str]
_NOTHING: Final = "Not measured."
_WORDS: Final = {True: "met", False: "**missed**", None: "not resolved"}


def parts(results: Results) -> dict[str, str]:
    """The generated parts of the page, by name."""
    measured = results.in_order()
    memory = list(results.memory.values())
    found = verdicts(measured, memory)
    return {
        "summary": _table(("asked", "", "judged by", "reached", ""), [_summary(t, found) for t in TARGETS]),
        "overhead": "\n\n".join(_overhead(measured)) if measured else _NOTHING,
        "memory": "\n\n".join(text for each in memory for text in _memory(each)) or _NOTHING,
        "verdicts": _table(("", "", "case", "asked", "measured [95 %]", ""), [_verdict(v) for v in found]),
    }


def _summary(target: Target, found: Sequence[Verdict]) -> Row:
    """One thing asked, over everything that was measured: met if it is met everywhere."""
    mine = [verdict for verdict in found if verdict.target is target]
    if not mine:
        return (target.what, target.asked, target.by, "", "not measured")
    resolved = [verdict for verdict in mine if verdict.is_met is not None]
    said = []
    for is_met in (False, None):
        places = [_place(verdict) for verdict in mine if verdict.is_met is is_met]
        if places:
            where = "everywhere" if len(places) == len(mine) > 1 else f"in {len(places)} of {len(mine)}"
            said.append(f"{_WORDS[is_met]} {where}" if len(mine) > 1 else _WORDS[is_met])
    return (
        target.what,
        target.asked,
        target.by,
        _range(target, resolved),
        ", ".join(said) or ("met everywhere" if len(mine) > 1 else "met"),
    )


def _range(target: Target, resolved: Sequence[Verdict]) -> str:
    """From the best to the worst, and where that is."""
    if not resolved or target.is_question:
        return ""
    ordered = sorted(resolved, key=lambda verdict: verdict.judged, reverse=target.at_least)
    best, worst = ordered[0], ordered[-1]
    if best is worst:
        return f"{_number(worst.judged)} {target.unit}".strip()
    text = f"{_number(best.judged)} to {_number(worst.judged)} {target.unit}".strip()
    return f"{text} ({_place(worst)})"


def _place(verdict: Verdict) -> str:
    return ", ".join(filter(None, (verdict.where, verdict.case)))


def _verdict(verdict: Verdict) -> Row:
    target, found = verdict.target, verdict.found
    if target.is_question:
        measured = "yes" if verdict.is_met else "no"
    elif math.isnan(found.median):
        measured = ""
    else:
        measured = _number(found.median * target.scale)
        if not math.isnan(found.low):
            measured += f" [{_number(found.low * target.scale)}, {_number(found.high * target.scale)}]"
        measured = f"{measured} {target.unit}".strip()
    asked = target.asked if target.by is not By.UPPER else f"{target.asked}, upper end"
    return (target.what, verdict.where, verdict.case, asked, measured, _WORDS[verdict.is_met])


def _overhead(results: Sequence[Result]) -> Iterator[str]:
    yield "\n".join(f"- {line}" for line in _origins(results))
    for (device, threads), some in itertools.groupby(results, key=lambda each: (each.device, each.threads)):
        chosen = list(some)
        title = f"{threads} thread{'s' if threads > 1 else ''}" + ("" if device == "cpu" else f", {device}")
        yield f"#### Long blocks, {title}"
        yield _table(
            ("model", "step", "", "wall [95 %]", "A/A control", "CPU of the process", "us a tensor",
             "own clock", "observed", "background CPU (mean slice)"),
            [row for result in chosen for row in _long(result)],
        )  # fmt: skip
        yield f"#### Short blocks, {title}"
        yield _table(
            ("model", "step", "A/A control", "step not observed", "observed step", "a tensor", "one pass",
             "observed step, wall", "default settings, derived", "own clock / measured"),
            [_short(result) for result in chosen],
        )  # fmt: skip
        yield f"#### Clipping, {title}"
        yield _table(
            ("model", "", "", "us a call", "of torch's [95 %]", "A/A control", "step of torch's [95 %]"),
            [row for result in chosen for row in _clip(result)],
        )


def _origins(results: Sequence[Result]) -> Iterator[str]:
    """Where and when each was measured, and what is wrong with it."""
    for machine, some in itertools.groupby(
        sorted(results, key=lambda each: each.machine), key=lambda each: each.machine
    ):
        names = ", ".join(f"{each.model} ({each.threads})" for each in some)
        yield f"{names}: {machine}"
    for result in results:
        for said in result.ill:
            yield f"**Not to be trusted**: {result.model} ({result.threads}): gradwatch said {said!r}."
        if result.synchronises:
            yield f"**Synchronises**: {result.model}: {result.synchronises}"


def _memory(result: MemoryResult) -> Iterator[str]:
    bare, watched = result.bare, result.watched
    yield result.machine
    yield (
        f"{result.model}, {result.warm_up} + {result.steps} steps, one thread, {result.device}; "
        "a process of its own for each column."
    )
    ours, nothing = (sorted(each)[len(each) // 2] for each in (result.import_ours, result.import_bare))
    rows = [
        ("resident, the median of the last tenth", _mib(bare.late), _mib(watched.late)),
        ("peak (VmHWM)", _mib(bare.peak), _mib(watched.peak)),
        (f"added by {result.warm_up} steps of warm-up", _mib(bare.warmed), _mib(watched.warmed)),
        (
            f"slope over the {result.steps} steps after it, KiB in 1000 steps",
            f"{bare.slope * 1000 / 1024:+.3f}",
            f"{watched.slope * 1000 / 1024:+.3f}",
        ),
        (
            f"an interpreter that does nothing / imports gradwatch, median of {len(result.import_ours)}",
            f"{nothing * 1e3:.0f} ms",
            f"{ours * 1e3:.0f} ms",
        ),
    ]
    yield _table(("", "no hook", "watched"), rows)
    if result.device_memory is not None:
        taken = result.device_memory
        yield (
            f"Device memory for 1000 tensors, above the bare loop: {_mib(taken.held)} held between steps, "
            f"{_mib(taken.peak)} at the peak of the optimizer's step, {_mib(taken.driver)} by the driver's "
            "count."
        )


def _mib(bytes_: float) -> str:
    return f"{bytes_ / MIB:.2f} MiB"


def _long(result: Result) -> Iterator[Row]:
    control = _change(figures.ratio(result.long, CONTROL))
    step = f"{figures.bare_step(result) * 1e3:.2f} ms"
    for name in result.long:
        if name in (BARE, CONTROL):
            continue
        ours = name in (EVERY_STEP, DEFAULT)
        share = figures.observed(result) if name == DEFAULT else 1.0
        slices = figures.slice_seconds(result, name)
        yield (
            f"{result.model} ({result.tensors} tensors)",
            step,
            name,
            _change(figures.ratio(result.long, name)),
            control,
            _change(figures.ratio(result.long, name, figures.cpu)),
            f"{figures.added(result.long, name).median * 1e6 / result.tensors:.1f}",
            _percent(figures.own_clock(result, name).median) if ours else "",
            _share(share) if ours else "",
            _percent(figures.background(result, name))
            + ("" if math.isnan(slices) else f" ({slices * 1e3:.2f} ms)"),
        )


def _short(result: Result) -> Row:
    blocks = result.short
    unsampled = figures.added(blocks, UNSAMPLED, figures.quick)
    every = figures.added(blocks, EVERY_STEP, figures.quick)
    derived = figures.derived_default(result)
    factor = figures.own_against_cost(result)
    return (
        f"{result.model} ({result.tensors} tensors)",
        f"{figures.middle(blocks[BARE], figures.quick) * 1e3:.3f} ms",
        _change(figures.ratio(blocks, CONTROL, figures.quick)),
        _micros(unsampled),
        _micros(every),
        f"{every.median * 1e6 / result.tensors:.1f} us",
        f"{result.one_pass * 1e6:.0f} us",
        _change(figures.ratio(blocks, EVERY_STEP, figures.quick)),
        _change(derived.scaled(1.0, 1.0)),
        "" if math.isnan(factor.median) else f"{factor.median:.2f}",
    )


def _clip(result: Result) -> Iterator[Row]:
    base = (TORCH_CLIP, TORCH_CLIP_CONTROL)
    names = (TORCH_CLIP, TORCH_CLIP_WATCHED, TORCH_CLIP_UNSAMPLED, OUR_CLIP, OUR_CLIP_UNSAMPLED)
    for case, blocks in result.clip.items():
        control = _times(figures.ratio(blocks, TORCH_CLIP_CONTROL, figures.clip, *base))
        for name in names:
            if name not in blocks:
                continue
            first = name == TORCH_CLIP
            yield (
                f"{result.model} ({result.tensors} tensors)",
                case,
                name,
                f"{figures.middle(blocks[name], figures.clip) * 1e6:.1f}",
                "" if first else _times(figures.ratio(blocks, name, figures.clip, *base)),
                "" if first else control,
                "" if first else _change(figures.ratio(blocks, name, figures.quick, *base)),
            )


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share * 100:.2f} %"


def _share(share: float) -> str:
    return "" if not share > 0 else "all" if share > 0.99 else f"1 in {1 / share:.0f}"


def _change(ratio: Estimate) -> str:
    if math.isnan(ratio.median):
        return ""
    change = ratio.scaled(100.0, -100.0)
    return _with_interval(change, "+.0f" if abs(change.median) >= 100 else "+.2f", " %")


def _times(ratio: Estimate) -> str:
    return _with_interval(ratio, ".2f")


def _micros(seconds: Estimate) -> str:
    return _with_interval(seconds.scaled(1e6), ".1f", " us")


def _with_interval(value: Estimate, form: str, unit: str = "") -> str:
    interval = "" if math.isnan(value.low) else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.median:{form}}{unit}{interval}"


def _number(value: float) -> str:
    return f"{value:.{2 if abs(value) < 100 else 0}f}"
