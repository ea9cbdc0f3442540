"""The markdown that goes into ``docs/benchmarks.md``."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

import gradwatch
from overhead import figures
from overhead.contenders import BARE, CONTROL, DEFAULT, EVERY_STEP
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
from overhead.targets import Verdict, verdicts

Row = Sequence[str]
_WORDS: Final = {True: "met", False: "**missed**", None: "not resolved"}


def machine(device: str) -> str:
    """Date, machine and versions, in one sentence."""
    load = f", load {os.getloadavg()[0]:.2f} at the start" if hasattr(os, "getloadavg") else ""
    card = f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device == "cuda" else ""
    packages = [f"{name} {found}" for name in ("wandb", "tensorboard") if (found := _version(name))]
    return (
        f"{time.strftime('%Y-%m-%d')}: {_processor()}, {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release()}{load}{card}; "
        + ", ".join(
            [
                f"gradwatch {_commit()}",
                f"Python {platform.python_version()}",
                f"torch {torch.__version__}",
                *packages,
            ]
        )
        + "."
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the gradwatch that is imported, else its version."""
    folder = Path(gradwatch.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or _version("gradwatch") or "of no version"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def report(results: Sequence[Result], notes: Sequence[str]) -> str:
    """All tables."""
    parts = [*notes]
    for threads in dict.fromkeys(result.threads for result in results):
        chosen = [result for result in results if result.threads == threads]
        title = f"{threads} thread{'s' if threads > 1 else ''}"
        parts += [
            f"### Long blocks, {title}",
            _table(
                ("model", "step", "", "wall [95 %]", "A/A control", "CPU of the process", "us a tensor",
                 "own clock", "observed", "background CPU (mean slice)"),
                [row for result in chosen for row in _long(result)],
            ),
            f"### Short blocks, {title}",
            _table(
                ("model", "step", "A/A control", "step not observed", "observed step", "a tensor", "one pass",
                 "observed step, wall", "default settings, derived", "own clock / derived"),
                [_short(result) for result in chosen],
            ),
            f"### Clipping, {title}",
            _table(
                ("model", "", "", "us a call", "of torch's [95 %]", "A/A control", "step of torch's [95 %]"),
                [row for result in chosen for row in _clip(result)],
            ),
        ]  # fmt: skip
    parts += [
        "### What was asked",
        _table(("", "model", "threads", "asked", "measured", ""), _asked(verdicts(results))),
    ]
    return "\n\n".join(parts)


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
            _percent(figures.own_clock(result, name)) if ours else "",
            _share(share) if ours else "",
            _percent(figures.background(result, name))
            + ("" if math.isnan(slices) else f" ({slices * 1e3:.2f} ms)"),
        )


def _short(result: Result) -> Row:
    blocks = result.short
    unsampled = figures.added(blocks, UNSAMPLED, figures.quick)
    every = figures.added(blocks, EVERY_STEP, figures.quick)
    derived = figures.derived_default(result)
    own = figures.own_clock(result, DEFAULT)
    return (
        f"{result.model} ({result.tensors} tensors)",
        f"{figures.middle(blocks[BARE], figures.quick) * 1e3:.3f} ms",
        _change(figures.ratio(blocks, CONTROL, figures.quick)),
        _micros(unsampled),
        _micros(every),
        f"{every.median * 1e6 / result.tensors:.1f} us",
        "" if math.isnan(result.one_pass) else f"{result.one_pass * 1e6:.0f} us",
        _change(figures.ratio(blocks, EVERY_STEP, figures.quick)),
        _change(derived.scaled(1.0, 1.0)),
        f"{own / derived.median:.2f}" if derived.median > 0 else "",
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


def _asked(found: Sequence[Verdict]) -> list[Row]:
    return [(v.what, v.model, str(v.threads), v.asked, v.measured, _WORDS[v.is_met]) for v in found]


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
