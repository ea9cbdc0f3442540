"""The pictures of one run: loss, learning rate, gradient norms, step time and memory over its steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.api.layer_map import LayerMap, layer_map
from gradwatch_collector.api.layer_maps import nonfinite_marks
from gradwatch_collector.reports import apart, wording
from gradwatch_collector.reports.pictures import (
    BAD,
    GRID,
    LINE,
    SECOND_LINE,
    Doubles,
    Picture,
    Ticks,
    drawing,
    is_wide,
    picture,
    thinned,
)
from gradwatch_collector.runs.curves import Curve, read_curves, read_gradient_norms, read_step_clock
from gradwatch_collector.runs.nonfinite_steps import Mark, nonfinite_told
from gradwatch_slo.problems import printable

_HEIGHT: Final = 2.2
_MOST_MARKS: Final = 300
_MOST_LINES: Final = 16
_FEW: Final = 40
_MOST_ROWS: Final = 400
_ROWS_NAMED: Final = 24
_LONGEST_NAME: Final = 28
_HEADROOM_WANTED: Final = 0.1

_Words = Callable[[float], str]
_Span = tuple[float, float]


def run_pictures(
    connection: Connection, run_id: str, attempt: int, bad_steps: Sequence[int]
) -> Iterator[Picture]:
    """Yield the pictures of which there is anything to show; the heat map is of ``attempt``.

    ``bad_steps``: steps that are known to have had a non-finite loss or gradient.
    """
    clock = read_step_clock(connection, run_id)
    loss, rate = (read_curves(connection, run_id, metric, clock) for metric in (c.LOSS, c.LEARNING_RATE))
    bad = np.unique([*map(float, bad_steps), *_nonfinite_steps(loss)])
    span = _span(read_curves(connection, run_id, c.STEP_INDEX, clock) or loss)
    if loss:
        yield _loss_picture(loss, rate, bad, span)
    norms = read_gradient_norms(connection, run_id, clock)
    if norms:
        yield _norm_picture(norms, bad, span)
    durations = read_curves(connection, run_id, c.STEP_DURATION, clock)
    if durations:
        yield _duration_picture(durations, span)
    headroom = read_curves(connection, run_id, c.DEVICE_MEMORY_HEADROOM, clock, every_rank=True)
    if headroom:
        yield _headroom_picture(headroom, span)
    told = layer_map(connection, run_id, attempt, clock)
    marks = nonfinite_marks(told, nonfinite_told(connection, run_id, attempt))
    if told is not None or marks:
        title = "Gradient norms by layer, largest of each stretch"
        layers = _with_marks(told or _without_norms(marks), marks)
        yield _layers_picture(layers, marks, f"{title} of attempt {attempt}" if attempt > 1 else title)


def _span(curves: Iterable[Curve]) -> _Span:
    """Return the first and the last step, from where to where all pictures go."""
    steps = np.concatenate([np.empty(0), *(each.steps[np.isfinite(each.steps)] for each in curves)])
    return (float(steps.min()), float(steps.max())) if len(steps) else (0.0, 1.0)


def _nonfinite_steps(curves: Iterable[Curve]) -> Doubles:
    return np.concatenate([np.empty(0), *(each.steps[each.nonfinite > 0] for each in curves)])


def _loss_picture(loss: Sequence[Curve], rate: Sequence[Curve], bad: Doubles, span: _Span) -> Picture:
    with drawing(_HEIGHT + 1.0 if rate else _HEIGHT) as figure:
        if rate:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
            _draw(lower, rate, apart.numbers, SECOND_LINE)
            lower.set_ylabel("learning rate")
            _steps(lower, span)
        else:
            upper = figure.subplots()
            _steps(upper, span)
        _draw(upper, loss, apart.numbers)
        upper.set_ylabel("loss")
        _mark(upper, bad)
        title = "Loss and learning rate" if rate else "Loss"
        return picture(figure, "loss", title, _described("The loss", loss, wording.number, bad))


def _norm_picture(norms: Sequence[Curve], bad: Doubles, span: _Span) -> Picture:
    bad = np.union1d(bad, _nonfinite_steps(norms))
    title = "Global gradient norm, before clipping"
    with drawing(_HEIGHT) as figure:
        axes = figure.subplots()
        _draw(axes, norms, apart.numbers)
        _steps(axes, span)
        _mark(axes, bad)
        return picture(figure, "norm", title, _described("The norm", norms, wording.number, bad))


def _duration_picture(durations: Sequence[Curve], span: _Span) -> Picture:
    with drawing(_HEIGHT) as figure:
        axes = figure.subplots()
        _draw(axes, durations, apart.durations)
        _steps(axes, span)
        told = _described("The time of a step", durations, wording.duration, np.empty(0))
        return picture(figure, "duration", "Step time", told)


def _headroom_picture(curves: Sequence[Curve], span: _Span) -> Picture:
    by_least = sorted(curves, key=lambda each: float(np.nanmin(each.least, initial=np.inf)))
    tightest, *others = by_least[:_MOST_LINES]
    where = f"rank {tightest.rank}, {printable(str(tightest.attributes.get(c.DEVICE, '?')))}"
    with drawing(_HEIGHT) as figure:
        axes = figure.subplots()
        if others:
            _draw(axes, others, apart.numbers, GRID)
        _draw(axes, [tightest], apart.numbers)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
        axes.axhline(_HEADROOM_WANTED, color=BAD, linestyle=":", linewidth=1)
        _steps(axes, span)
        return picture(
            figure,
            "headroom",
            f"Memory headroom, tightest: {where}",
            _described("The part of the memory that was never used", [tightest], wording.share, np.empty(0)),
        )


def _draw(
    axes: Axes, curves: Sequence[Curve], words: Callable[[Sequence[float]], list[str]], colour: str = LINE
) -> None:
    """Draw each curve as a line, a few values as points as well; rolled-up stretches by their means."""
    for curve in curves[:_MOST_LINES]:
        known = np.isfinite(curve.steps)
        x, y = thinned(curve.steps[known], curve.values[known])
        axes.plot(x, y, color=colour, marker="." if len(x) <= _FEW else "", markersize=6)
    if is_wide(np.concatenate([curve.values for curve in curves])):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Ticks(words))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))


def _steps(axes: Axes, span: _Span) -> None:
    first, last = span
    margin = max(last - first, 1.0) * 0.03
    axes.set_xlim(first - margin, last + margin)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark(axes: Axes, bad: Doubles) -> None:
    """Mark steps that were not finite: the first by a line, each by a stroke at the bottom."""
    if not len(bad):
        return
    axes.axvline(float(bad[0]), color=BAD, linestyle="--", linewidth=1)
    shown = bad[np.linspace(0, len(bad) - 1, min(len(bad), _MOST_MARKS)).astype(int)]
    axes.plot(
        shown,
        np.full(len(shown), 0.03),
        color=BAD,
        linestyle="",
        marker="|",
        markersize=6,
        transform=axes.get_xaxis_transform(),
    )
    axes.text(
        float(bad[0]),
        1.0,
        f" NaN or Inf from step {bad[0]:g}",
        color=BAD,
        fontsize=9,
        va="bottom",
        ha="left" if _is_left(axes, float(bad[0])) else "right",
        transform=axes.get_xaxis_transform(),
    )


def _is_left(axes: Axes, x: float) -> bool:
    low, high = axes.get_xlim()
    return x < (low + high) / 2


def _described(what: str, curves: Sequence[Curve], words: _Words, bad: Doubles) -> str:
    finite = list(chain.from_iterable(each.values[np.isfinite(each.values)].tolist() for each in curves))
    if not finite:
        told = f"{what} was never finite."
    else:
        told = f"{what}: first {words(finite[0])}, last {words(finite[-1])}, "
        told += f"lowest {words(min(finite))}, highest {words(max(finite))}."
    return f"{told} NaN or Inf from step {bad[0]:g} on, {len(bad)} steps known." if len(bad) else told


def _without_norms(marks: Collection[Mark]) -> LayerMap:
    """Return the map of an attempt of which no norm was stored: each step that is known as bad is a stretch."""
    ends = np.unique([float(step) for _, step in marks])
    return LayerMap((), ends, np.empty((0, len(ends))), np.zeros((0, len(ends)), bool))


def _with_marks(layers: LayerMap, marks: Collection[Mark]) -> LayerMap:
    """Return the map with the marks in their cells; layers that were never finite are at the end."""
    names = (*layers.layers, *sorted({layer for layer, _ in marks}.difference(layers.layers)))
    row_of = {name: row for row, name in enumerate(names)}
    added = ((0, len(names) - len(layers.layers)), (0, 0))
    nonfinite = np.pad(layers.nonfinite, added)
    if not layers.is_timed:  # among seconds, steps have no place
        whole = np.floor(layers.ends)
        for layer, step in marks:
            nonfinite[row_of[layer], min(int(np.searchsorted(whole, step)), len(whole) - 1)] = True
    values = np.pad(layers.values, added, constant_values=np.nan)
    return LayerMap(names, layers.ends, values, nonfinite, layers.is_timed)


def _layers_picture(layers: LayerMap, marks: Collection[Mark], title: str) -> Picture:
    names = [printable(name) for name in layers.layers[:_MOST_ROWS]]
    values, nonfinite = layers.values[:_MOST_ROWS], layers.nonfinite[:_MOST_ROWS]
    norm = _norm(values)
    with drawing(min(1.2 + 0.2 * min(len(names), _ROWS_NAMED), 6.0)) as figure:
        axes = figure.subplots()
        axes.grid(visible=False)
        image = axes.imshow(
            # A logarithm has no place for zero, which is a norm like others.
            np.ma.masked_invalid(np.maximum(values, norm.vmin or 0.0)),
            aspect="auto",
            interpolation="none",
            cmap="viridis_r",
            norm=norm,
            extent=(0, values.shape[1], len(names), 0),
        )
        row, column = np.nonzero(nonfinite)
        axes.plot(
            column + 0.5,
            row + 0.5,
            color=BAD,
            linestyle="",
            marker="s",
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        every = -(-len(names) // _ROWS_NAMED)
        axes.set_yticks(np.arange(0, len(names), every) + 0.5, [_short(name) for name in names[::every]])
        axes.tick_params(axis="y", length=0, labelsize=8)
        _name_ends(axes, layers)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        if isinstance(image.norm, LogNorm):
            is_narrow = float(image.norm.vmax or 1) < 100 * float(image.norm.vmin or 1)
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,), numticks=6))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: wording.number(value)))
        bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))
        return picture(figure, "layers", title, _layers_described(layers, len(names), marks))


def _layers_described(layers: LayerMap, shown: int, marks: Collection[Mark]) -> str:
    """Return a map in words; of layers beyond ``shown`` they tell as well."""
    count = len(layers.layers)
    words = f"{count} layers over time" if shown == count else f"{shown} of {count} layers over time"
    if marks:
        words += f"; red where a norm was NaN or Inf: at least {len(marks)} known"
        words += "." if layers.is_timed else f", the first at step {min(step for _, step in marks)}."
    else:
        words += "; none is known to have been NaN or Inf."
    seen = layers.values[np.isfinite(layers.values)]
    if seen.size:
        words += f" Norms from {wording.number(float(seen.min()))} to {wording.number(float(seen.max()))}"
        zeros = int(np.count_nonzero(seen == 0))
        words += f", exactly zero in {zeros} of {seen.size} cells." if zeros else "."
    return words


def _norm(values: Doubles) -> Normalize:
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Normalize(0, 1)
    low, high = float(positive.min()), float(positive.max())
    # Some layers' norms are a billionth of others': what is below is as pale as it gets.
    return LogNorm(max(low, high * 1e-8), high if high > low else low * 1.01)


def _name_ends(axes: Axes, layers: LayerMap) -> None:
    at = np.unique(np.linspace(0, len(layers.ends) - 1, 6).astype(int))
    axes.set_xlabel("up to second" if layers.is_timed else "up to step")
    axes.set_xticks(at + 0.5, [f"{end:.0f}" for end in layers.ends[at]])


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
