"""``gradwatch collector serve``."""

from __future__ import annotations

import logging

import click

from gradwatch_collector.commands.options import AGE, database_option, open_database
from gradwatch_collector.database import describe
from gradwatch_collector.retention import policy_for
from gradwatch_collector.server import ListenError, ServerSettings, listen, serve


@click.group()
def collector() -> None:
    """Receive, store and evaluate telemetry."""


@collector.command("serve")
@database_option
@click.option(
    "--listen",
    "address",
    default="127.0.0.1:4318",
    show_default=True,
    metavar="HOST:PORT",
    help="HTTP address for OTLP, the API and /metrics. Port 0 takes a free one.",
)
@click.option(
    "--lost-after",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=1.0),
    metavar="SECONDS",
    help="Silence after which a running run is lost.",
)
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, help="Another Host header to accept; repeatable."
)
@click.option(
    "--keep-raw",
    type=AGE,
    metavar="AGE",
    help="How long numbers are kept as they were sent, and spans and logs: 12h, 7d, 4w or forever "
    "[default: 30d in SQLite, 7d in PostgreSQL].",
)
@click.option(
    "--keep-rollups",
    type=AGE,
    metavar="AGE",
    help="How long their roll-ups are kept, and events [default: 365d in SQLite, 90d in PostgreSQL].",
)
@click.option("--require-token", is_flag=True, help="Ask for a token on loopback too (behind a proxy, say).")
def serve_command(
    database: str,
    address: str,
    lost_after: float,
    allowed_hosts: tuple[str, ...],
    require_token: bool,
    **keep: int | None,
) -> None:
    """Serve OTLP/HTTP on /v1/*, the JSON API on /api/v1/*, and /metrics.

    \b
    Example:
      gradwatch collector serve --db sqlite:///gradwatch.db --listen 127.0.0.1:4318
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    host, port = _split(address)
    engine = open_database(database, upgrade_sqlite=True)
    policy = policy_for(engine.dialect.name, raw=keep["keep_raw"], rollups=keep["keep_rollups"])
    settings = ServerSettings(host, port, lost_after, allowed_hosts, require_token, policy)
    try:
        bound = listen(settings, engine)
    except ListenError as error:
        raise click.ClickException(str(error)) from error
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"gradwatch collector on http://{shown}:{bound.getsockname()[1]}, database {describe(engine)}")
    serve(engine, settings, bound)


def _split(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise click.BadParameter(f"{address!r} is not HOST:PORT, such as 127.0.0.1:4318", param_hint="--listen")
    return host.strip("[]"), int(port)
