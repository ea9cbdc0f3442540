"""``gradwatch token``."""

from __future__ import annotations

import json
import time
from typing import Final

import click
from rich.console import Console

from gradwatch import conventions as c
from gradwatch_collector.api.shapes import timestamp
from gradwatch_collector.auth import (
    Rates,
    Role,
    TokenExistsError,
    TokenRow,
    UnknownTokenError,
    create_token,
    list_tokens,
    revoke_token,
)
from gradwatch_collector.commands.options import FiniteRange, database_option, format_option, open_database
from gradwatch_collector.runs.facts import described
from gradwatch_collector.service import audit
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.durations import parse_length
from gradwatch_slo.tables import print_table

_rate = FiniteRange(min=0, min_open=True)
_LONGEST_SECONDS: Final = 100 * 366 * 86_400


@click.group()
def token() -> None:
    """Access tokens of the collector."""


def _nanoseconds(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        seconds = int(parse_length(value).total_seconds())
    except (ValueError, OverflowError):
        seconds = 0
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise click.BadParameter(f"{value!r} is not a length of time such as 90d or 12h")
    return seconds * 1_000_000_000


def _label(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    # A run's team is stored so; a token's that is not would be no run's.
    if value is not None and described({c.TEAM: value})["team"] != value:
        raise click.BadParameter("a team's name has 1 to 256 characters")
    return value


@token.command("create")
@click.argument("name")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([role.value for role in Role]),
    default=[Role.INGEST.value],
    show_default=True,
    help="ingest sends telemetry, read reads the API and /metrics, admin may do all; repeatable.",
)
@click.option(
    "--team",
    callback=_label,
    help="Team that telemetry sent with the token belongs to, whatever it claims; the token reads and writes "
    "that team's runs only.",
)
@click.option(
    "--expires-in", "lifetime", callback=_nanoseconds, metavar="TIME", help="Such as 90d [default: never]."
)
@click.option("--requests-per-second", type=_rate, help="[default: what the collector was started with]")
@click.option("--bytes-per-second", type=_rate, help="[default: what the collector was started with]")
@database_option
def create(
    name: str,
    roles: tuple[str, ...],
    team: str | None,
    lifetime: int | None,
    requests_per_second: float | None,
    bytes_per_second: float | None,
    database: str,
) -> None:
    """Create a token called NAME and print it; it is stored hashed and cannot be shown again.

    \b
    Example:
      gradwatch token create ci --team vision --expires-in 90d
      OTEL_EXPORTER_OTLP_HEADERS="Authorization=Bearer gw_..." python train.py
    """
    engine = open_database(database, upgrade_sqlite=True)
    now = time.time_ns()
    expires_at = None if lifetime is None else now + lifetime
    details = {"roles": sorted(roles), "team": team, "expires_at": timestamp(expires_at)}
    try:
        with transaction(engine) as connection:
            created = create_token(
                connection,
                name,
                map(Role, roles),
                team=team,
                expires_at=expires_at,
                rates=Rates(requests_per_second, bytes_per_second),
                now=now,
            )
            audit.record(connection, audit.operator(), "token.created", name, details, now=now)
    except TokenExistsError as error:
        raise click.ClickException(str(error)) from error
    click.echo(created)


@token.command("list")
@database_option
@format_option("table", "json")
def list_command(database: str, output: str) -> None:
    """List tokens, newest first: what each is for, and when it was last used.

    \b
    Example:
      gradwatch token list --format json
    """
    engine = open_database(database)
    now = time.time_ns()
    with engine.connect() as connection:
        found = list_tokens(connection)
    if output == "json":
        click.echo(json.dumps([_json(row, now) for row in found], indent=2))
        return
    print_table(
        Console(),
        ("NAME", "ROLES", "TEAM", "STATE", "CREATED", "EXPIRES", "LAST USED"),
        [
            (
                row.name,
                ",".join(row.roles),
                row.team or "",
                row.state(now),
                _shown(row.created_at),
                _shown(row.expires_at),
                _shown(row.last_used_at),
            )
            for row in found
        ],
    )


@token.command("revoke")
@click.argument("name")
@database_option
def revoke(name: str, database: str) -> None:
    """Revoke the token called NAME; collectors stop taking it within ten seconds.

    \b
    Example:
      gradwatch token revoke ci
    """
    engine = open_database(database)
    now = time.time_ns()
    try:
        with transaction(engine) as connection:
            revoke_token(connection, name, now)
            audit.record(connection, audit.operator(), "token.revoked", name, now=now)
    except UnknownTokenError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"token {name} is revoked")


def _json(row: TokenRow, now: int) -> dict[str, object]:
    return {
        "name": row.name,
        "roles": list(row.roles),
        "team": row.team,
        "state": row.state(now),
        "requests_per_second": row.rates.requests,
        "bytes_per_second": row.rates.bytes,
        "created_at": timestamp(row.created_at),
        "expires_at": timestamp(row.expires_at),
        "last_used_at": timestamp(row.last_used_at),
        "revoked_at": timestamp(row.revoked_at),
    }


def _shown(moment: int | None) -> str:
    return "" if moment is None else str(timestamp(moment))[:19].replace("T", " ")
