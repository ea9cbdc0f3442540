"""``gradwatch slo interruptions``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from zoneinfo import ZoneInfo

import click

from gradwatch_collector.commands.options import database_option, format_option, open_database
from gradwatch_collector.commands.slo_options import (
    as_of_option,
    group_option,
    judged_at,
    window_option,
    zone_option,
)
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_collector.runs.interruptions import interruptions_of
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo.durations import Duration
from gradwatch_slo.interruptions import Interruptions
from gradwatch_slo.periods import ChosenWindow
from gradwatch_slo.report import rfc3339
from gradwatch_slo.windows import TimeWindow, Window
from gradwatch_slo.wording import counted, length

_DEFAULT = ChosenWindow(TimeWindow(Duration(28, "d")))


@click.command("interruptions")
@database_option
@format_option("text", "json")
@window_option
@zone_option
@group_option
@as_of_option
def interruptions_command(
    database: str,
    output: str,
    window: ChosenWindow | None,
    zone: ZoneInfo,  # noqa: ARG001 - window and date are read by it
    group: Mapping[str, str],
    as_of: int,
) -> None:
    """Tell how often training was interrupted, and how soon that was noticed and made good.

    Mean time to interrupt, to detect and to recover, over attempts that failed, were lost or preempted; over 28
    days, unless a window is named.

    \b
    Example:
      gradwatch slo interruptions --window 2026-10 --group team=vision
    """
    chosen = window or _DEFAULT
    now = judged_at(chosen, as_of)
    span = chosen.window.at(moment(now))
    conditions = [schema.run.c[name] == value for name, value in group.items()]
    engine = open_database(database)
    with of_one_moment(engine).connect() as connection:
        found = interruptions_of(connection, nanos(span.start), min(nanos(span.end), now), *conditions)
    if output == "json":
        click.echo(json.dumps(_json(found, span), indent=2))
        return
    interruptions, attempts = counted(found.interruptions, "interruption"), counted(found.attempts, "attempt")
    click.echo(f"{interruptions} of {attempts}, which ran for {_hours(found.running)} in all")
    for name, mean, of in (
        ("interrupt", found.mean_time_to_interrupt, found.interruptions),
        ("detect", found.mean_time_to_detect, found.detected),
        ("recover", found.mean_time_to_recover, found.recovered),
    ):
        click.echo(f"mean time to {name}: {'unknown' if mean is None else f'{_length(mean)} (of {of})'}")


def _json(found: Interruptions, span: Window) -> dict[str, object]:
    seconds = {
        name: None if value is None else value / 1e9
        for name, value in (
            ("mean_time_to_interrupt", found.mean_time_to_interrupt),
            ("mean_time_to_detect", found.mean_time_to_detect),
            ("mean_time_to_recover", found.mean_time_to_recover),
            ("running", found.running),
        )
    }
    return {
        "from": rfc3339(span.start),
        "to": rfc3339(span.end),
        "attempts": found.attempts,
        "interruptions": found.interruptions,
        "detected": found.detected,
        "recovered": found.recovered,
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }


def _hours(nanoseconds: int) -> str:
    return f"{nanoseconds / 3.6e12:,.1f} h"


def _length(nanoseconds: float) -> str:
    return length(timedelta(microseconds=nanoseconds / 1000))
