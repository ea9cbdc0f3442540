"""Figures keep the peaks of what they draw, and become parts of a page."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradwatch_collector.reports import pictures
from gradwatch_slo.problems import printable

values = st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=2_000)


@given(values, st.integers(4, 200))
def test_a_line_that_is_thinned_keeps_its_peaks_its_ends_and_its_order(told: list[float], most: int) -> None:
    x, y = np.arange(len(told), dtype=np.float64), np.array(told)
    thin_x, thin_y = pictures.thinned(x, y, most)
    assert len(thin_x) <= max(len(x) if len(x) <= most else 0, most + 2)
    assert (np.diff(thin_x) > 0).all()
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int)])
    if np.isfinite(y).any():
        assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (np.nanmin(y), np.nanmax(y))


def test_what_is_not_finite_for_long_stays_a_gap() -> None:
    y = np.ones(1_000)
    y[300:700] = np.nan
    _, thin = pictures.thinned(np.arange(1_000.0), y, 100)
    assert np.isnan(thin).any()


def draw(name: str, label: str) -> pictures.Picture:
    with pictures.drawing(2.0) as figure:
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], color=pictures.LINE, marker="o", label=printable(label))
        axes.legend()
        return pictures.picture(figure, name, label, label)


def test_a_picture_has_colours_of_the_page_ids_of_its_own_and_text_that_is_escaped() -> None:
    one, other = draw("one", "a < b & $c$ 層\x1b"), draw("other", "plain")
    assert set(re.findall(r' id="([^"]*)"', one.svg)).isdisjoint(re.findall(r' id="([^"]*)"', other.svg))
    assert "a &lt; b &amp; $c$ 層\\x1b" in one.svg
    assert one.svg.startswith("<svg ")
    assert 'role="img"' in one.svg
    assert "xmlns" not in one.svg
    assert "var(--line)" in one.svg
    assert not re.search("#0[1-5]0[1-5]0[1-5]", one.svg)


def test_the_same_picture_is_the_same_text() -> None:
    assert draw("one", "x").svg == draw("one", "x").svg
