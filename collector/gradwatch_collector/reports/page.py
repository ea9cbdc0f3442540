"""Pages of one file, for people to pass on: nothing in them comes from another host."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gradwatch_collector.reports.wording import clock_time
from gradwatch_slo.problems import printable


def render_page(template: str, **content: Any) -> str:
    """Return the page of one of ``templates/``; every text in ``content`` is escaped."""
    return _environment().get_template(template).render(**content)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gradwatch_collector.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Telemetry may hold what no page may: half a surrogate pair, letters that turn the reading direction.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["clock_time"] = clock_time
    return environment
