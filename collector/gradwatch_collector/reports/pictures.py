"""Figures for pages: drawn by matplotlib, shown as SVG that takes its colours from the page.

matplotlib takes most of a second to import: only what draws imports this module.
"""

from __future__ import annotations

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter

from gradwatch_slo.problems import printable

Doubles = npt.NDArray[np.float64]

# Colours that stand for the page's own (`templates/base.html`), which has them for day, night and paper.
INK: Final = "#010101"
GRID: Final = "#020202"
LINE: Final = "#030303"
SECOND_LINE: Final = "#040404"
BAD: Final = "#050505"
_VARIABLES: Final = {
    INK: "var(--ink)",
    GRID: "var(--rule)",
    LINE: "var(--line)",
    SECOND_LINE: "var(--second-line)",
    BAD: "var(--bad)",
}
# A figure is as wide as a phone, a point being a pixel there: its letters can be read.
_WIDTH: Final = 360 / 72
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gradwatch",
    "text.parse_math": False,  # a layer may have dollars in its name
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "image.composite_image": False,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure. ``title`` is shown above it, ``description`` read to those who do not see it."""

    title: str
    description: str
    svg: Markup


class Ticks(Formatter):
    """The words at an axis, of all its ticks at once: ``words`` tells them apart (`apart.py`)."""

    def __init__(self, words: Callable[[Sequence[float]], list[str]]) -> None:
        self._words = words

    def __call__(self, value: float, pos: int | None = None) -> str:  # noqa: ARG002 - matplotlib's own
        """Return that of one by itself."""
        return self._words([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return those of all."""
        return self._words([float(each) for each in values])


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    """Give a figure, ``height`` inches high, in the style of the reports.

    What is written in it must be `printable`: XML holds no control characters.
    """
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The page's reader has the letters that matplotlib's own font has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def picture(figure: Figure, name: str, title: str, description: str) -> Picture:
    """Return a figure for a page, while it is being drawn. ``name``: what tells its parts' ids from others'."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(written.getvalue())  # noqa: S314 - matplotlib wrote it
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _settle(element, name)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    for tag, text in (("desc", description), ("title", title)):
        told = ET.Element(tag, {"id": f"{name}-{tag}"})
        told.text = printable(text)
        root.insert(0, told)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    # Every text in it is escaped.
    return Picture(title, description, Markup(ET.tostring(root, encoding="unicode")))  # noqa: S704


def thinned(x: Doubles, y: Doubles, most: int = 600) -> tuple[Doubles, Doubles]:
    """Return some ``most`` points of a line that keep its peaks: the least and the greatest of each stretch.

    A stretch in which nothing is finite remains as a gap.
    """
    if len(x) <= most:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
        else:
            kept.add(int(stretch[0]))
    places = np.array(sorted(kept))
    return x[places], y[places]


def is_wide(values: Doubles) -> bool:
    """Return whether positive values need a logarithmic scale to be told apart."""
    finite = values[np.isfinite(values)]
    return bool(len(finite)) and bool(finite.min() > 0) and bool(finite.max() / finite.min() > 50)


def _settle(element: ET.Element, name: str) -> None:
    """Make an element of an SVG file one of a page: no namespaces, ids of its own, the page's colours."""
    element.tag = _local(element.tag)
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id":
            value = f"{name}-{value}"
        elif value.startswith("#") and _local(key) == "href":
            value = f"#{name}-{value[1:]}"
        else:
            value = value.replace("url(#", f"url(#{name}-")
            for colour, variable in _VARIABLES.items():
                value = value.replace(colour, variable)
        element.attrib[_local(key)] = value


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
