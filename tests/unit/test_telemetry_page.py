"""docs/telemetry.md lists exactly what conventions names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch import conventions as c

PAGE = Path(__file__).parents[2] / "docs" / "telemetry.md"


def rows(heading: str) -> list[list[str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_every_metric_is_listed_with_kind_unit_and_attributes() -> None:
    listed = {(row[0], row[1], row[2], named(row[3])) for row in rows("Metrics")}
    assert listed == {(f"`{m.name}`", m.kind, f"`{m.unit}`", m.attributes) for m in c.METRICS}


def test_every_event_is_listed_with_its_attributes() -> None:
    assert {(row[0], named(row[1])) for row in rows("Events")} == {
        (f"`{e.name}`", e.attributes) for e in c.EVENTS
    }


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("Resource attributes", set(c.RESOURCE_ATTRIBUTES)),
        ("Attributes of points and events", set(c.ATTRIBUTES)),
        ("The collector's /metrics", {family.name for family in c.FAMILIES}),
    ],
)
def test_every_name_is_listed(heading: str, names: set[str]) -> None:
    assert {named(row[0])[0] for row in rows(heading)} == names


def test_every_attribute_of_a_metric_or_event_is_explained() -> None:
    used = {name for defined in (*c.METRICS, *c.EVENTS) for name in defined.attributes}
    assert used <= set(c.ATTRIBUTES) | set(c.RESOURCE_ATTRIBUTES)


def test_every_metric_and_event_in_conventions_is_in_the_lists() -> None:
    defined = [value for value in vars(c).values() if isinstance(value, c.Metric | c.Event | c.Family)]
    assert {d.name for d in defined} <= {d.name for d in (*c.METRICS, *c.EVENTS, *c.FAMILIES)}
