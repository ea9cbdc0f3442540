"""Options of ``gradwatch slo`` that say what is asked: which window, which groups, as of when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, get_args
from zoneinfo import ZoneInfo

import click

from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.periods import ChosenWindow, read_moment, read_window, read_zone
from gradwatch_slo.problems import one_of, suggestion
from gradwatch_slo.source import GroupField, Tier

T = TypeVar("T")
# No command takes longer to begin.
_A_COMMAND: Final = 60 * 1_000_000_000
FIELDS: Final[tuple[str, ...]] = get_args(GroupField)
# The one field whose values are known beforehand.
_TIERS: Final[tuple[str, ...]] = get_args(Tier)


def _read(read: Callable[..., T], *arguments: Any) -> T:
    """Read an option's value; what is expected becomes the error of the command line."""
    try:
        return read(*arguments)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _zone(_context: click.Context, _parameter: click.Parameter, name: str) -> ZoneInfo:
    return _read(read_zone, name)


def _fields(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    fields = tuple(text.split(","))
    for name in fields:
        if name not in FIELDS:
            hint = suggestion(name, FIELDS)
            raise click.BadParameter(f"found {name!r}, expected some of {', '.join(FIELDS)}, with commas{hint}")
    if len(set(fields)) < len(fields):
        raise click.BadParameter(f"found {text!r}, expected each field once")
    return fields


def _group(_context: click.Context, _parameter: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    group: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if name not in FIELDS or not sign or not value:
            hint = suggestion(name, FIELDS) if name not in FIELDS else ""
            message = f"found {pair!r}, expected FIELD=VALUE, such as team=vision, of {one_of(FIELDS)}{hint}"
            raise click.BadParameter(message)
        if name in group:
            raise click.BadParameter(f"found {name} twice, expected each field once")
        if name == "tier" and value not in _TIERS:
            hint = suggestion(value, _TIERS)
            raise click.BadParameter(f"found {pair!r}, expected a tier: {one_of(_TIERS)}{hint}")
        group[name] = value
    return group


zone_option: Final = click.option(
    "--time-zone",
    "zone",
    default="UTC",
    show_default=True,
    callback=_zone,
    # Others are read by it.
    is_eager=True,
    metavar="ZONE",
    help="In which periods and dates are meant, such as Europe/Berlin.",
)
window_option: Final = click.option(
    "--window",
    metavar="WINDOW",
    callback=lambda context, _, text: None if text is None else _read(read_window, text, _zone_of(context)),
    help="Instead of the objectives' own: a period (2026, 2026-Q4, 2026-10, 2026-10-05) or a duration (7d).",
)
group_by_option: Final = click.option(
    "--group-by",
    metavar="FIELDS",
    callback=_fields,
    help=f"Instead of the objectives' own: some of {', '.join(FIELDS)}, with commas.",
)
group_option: Final = click.option(
    "--group",
    multiple=True,
    metavar="FIELD=VALUE",
    callback=_group,
    help=f"Only runs of this group, such as team=vision; of {', '.join(FIELDS)}; repeatable.",
)
# Arrives in Unix nanoseconds.
as_of_option: Final = click.option(
    "--as-of",
    "as_of",
    metavar="DATE",
    callback=lambda context, _, text: _as_of(text, _zone_of(context)),
    help="As it was then, by what is known today: a date (its end) or RFC 3339 [default: now].",
)


def judged_at(window: ChosenWindow | None, as_of: int) -> int:
    """Return when to look at a window, in Unix nanoseconds.

    Raises:
        click.UsageError: it had not begun.
    """
    if window is None or window.last is None:
        return as_of
    try:
        return min(as_of, nanos(window.judged_at(moment(as_of))))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--window'") from error


def is_past(now: int) -> bool:
    """Return whether a moment (Unix nanoseconds) is not the one in which the command was given."""
    return now < time.time_ns() - _A_COMMAND


def _zone_of(context: click.Context) -> ZoneInfo:
    zone = context.params.get("zone")
    return zone if isinstance(zone, ZoneInfo) else ZoneInfo("UTC")


def _as_of(text: str | None, zone: ZoneInfo) -> int:
    now = time.time_ns()
    return now if text is None else min(now, nanos(_read(read_moment, text, zone, moment(now))))
