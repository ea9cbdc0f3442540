"""Writes docs/telemetry.md from ``gradwatch.conventions``.

python docs/build.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from gradwatch import conventions as c

PAGE = Path(__file__).with_name("telemetry.md")

INTRODUCTION = """\
# Telemetry

<!-- Written by docs/build.py from gradwatch.conventions; change that and run `make format`. -->

What a watched process sends over OTLP, and what the collector shows on `/metrics`. OpenTelemetry's own names
are used where they exist. Any OTLP backend can take this; any OTLP client can feed the collector.

Per-step scalars (loss, learning rate, step, step duration, global gradient norm) are gauges with the exact time
the step ended: the same time for all scalars of a step, so that they line up. Per-layer norms are delta
exponential histograms over an export interval. NaN and infinities are sent and stored as what they are.
"""


EVENTS_NOTE = f"""\
Log records with an event name. An event is stored once for each (run, attempt, rank, instance,
`{c.EVENT_SEQUENCE}`).
"""

FAMILIES_NOTE = """\
Per-run series exist while a run is live, and for one hour after it failed or was lost; at most 1000 runs, the
sickest first.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join(
        [
            INTRODUCTION,
            "## Resource attributes\n",
            table(("attribute", "meaning"), ([code(n), text] for n, text in c.RESOURCE_ATTRIBUTES.items())),
            "## Metrics\n",
            table(
                ("metric", "kind", "unit", "attributes", "meaning"),
                ([code(m.name), m.kind, code(m.unit), codes(m.attributes), m.description] for m in c.METRICS),
            ),
            "## Events\n",
            EVENTS_NOTE,
            table(
                ("event", "attributes", "meaning"),
                ([code(e.name), codes(e.attributes), e.description] for e in c.EVENTS),
            ),
            "## Attributes of points and events\n",
            table(("attribute", "meaning"), ([code(n), text] for n, text in c.ATTRIBUTES.items())),
            "## The collector's /metrics\n",
            FAMILIES_NOTE,
            table(
                ("family", "kind", "labels", "meaning"),
                ([code(f.name), f.kind, codes(f.labels), f.description] for f in c.FAMILIES),
            ),
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"


def code(text: str) -> str:
    """Return text as code."""
    return f"`{text}`"


def codes(names: Iterable[str]) -> str:
    """Return names as code, separated by commas."""
    return ", ".join(map(code, names))


def main() -> int:
    """Write the page, or with ``--check`` say whether it is up to date."""
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text() == page():
            return 0
        print(f"{PAGE.name} is out of date: run `make format`", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
