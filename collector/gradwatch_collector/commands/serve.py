"""``gradwatch collector serve``."""

from __future__ import annotations

import logging
from dataclasses import replace

import click

from gradwatch_collector.commands.options import database_option, open_database
from gradwatch_collector.database import describe
from gradwatch_collector.server import Address, ListenError, ServerSettings, listen, listen_grpc, serve


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
    "--grpc",
    "grpc_address",
    default="127.0.0.1:4317",
    show_default=True,
    metavar="HOST:PORT|off",
    help="gRPC address for OTLP. `off` serves none.",
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
@click.option("--require-token", is_flag=True, help="Ask for a token on loopback too (behind a proxy, say).")
def serve_command(
    database: str,
    address: str,
    grpc_address: str,
    lost_after: float,
    allowed_hosts: tuple[str, ...],
    require_token: bool,
) -> None:
    """Serve OTLP over HTTP (/v1/*) and gRPC, the JSON API on /api/v1/*, and /metrics.

    \b
    Example:
      gradwatch collector serve --db sqlite:///gradwatch.db --listen 127.0.0.1:4318
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = ServerSettings(
        http=_address(address, "--listen"),
        grpc=None if grpc_address == "off" else _address(grpc_address, "--grpc"),
        lost_after=lost_after,
        allowed_hosts=allowed_hosts,
        require_token=require_token,
    )
    engine = open_database(database, upgrade_sqlite=True)
    try:
        bound = listen(settings, engine)
        grpc = listen_grpc(settings, engine)
    except ListenError as error:
        raise click.ClickException(str(error)) from error
    shown = f"http://{replace(settings.http, port=bound.getsockname()[1])}"
    if grpc is not None:
        shown += f", gRPC on {grpc.address}"
    click.echo(f"gradwatch collector on {shown}, database {describe(engine)}")
    serve(engine, settings, bound, grpc)


def _address(text: str, option: str) -> Address:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, such as 127.0.0.1:4318", param_hint=option)
    return Address(host.strip("[]"), int(port))
