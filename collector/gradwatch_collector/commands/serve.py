"""``gradwatch collector serve``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from gradwatch_collector.auth import Rates
from gradwatch_collector.commands.objective_files import files_option, load_objectives
from gradwatch_collector.commands.options import (
    AGE,
    FiniteRange,
    database_option,
    open_database,
    prices_option,
)
from gradwatch_collector.findings import RULES
from gradwatch_collector.findings.overrides import Override, OverridesError, read_overrides
from gradwatch_collector.otlp.memory import DEFAULT_MEMORY
from gradwatch_collector.service import logs
from gradwatch_collector.service.server import Address, ListenError, ServerSettings, listen, listen_grpc, serve
from gradwatch_collector.service.tls import TlsError, TlsFiles
from gradwatch_collector.storage.database import describe
from gradwatch_collector.storage.retention import policy_for
from gradwatch_slo.cost import PriceTable

_file = click.Path(dir_okay=False)
_rate = FiniteRange(min=0, min_open=True)


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
    type=FiniteRange(min=1.0, max=366 * 86_400.0),
    metavar="SECONDS",
    help="Silence after which a running run is lost.",
)
@click.option(
    "--memory",
    "memory_mib",
    default=DEFAULT_MEMORY >> 20,
    show_default=True,
    type=click.IntRange(min=256),
    metavar="MIB",
    help="Resident memory to stay under: what would take more is asked to come again later.",
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
@files_option
@prices_option
@click.option(
    "--findings",
    "overrides_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What to set anew of the rules, for jobs and tiers (YAML; docs/findings.md).",
)
@click.option("--require-token", is_flag=True, help="Ask for a token on loopback too (behind a proxy, say).")
@click.option(
    "--allow-anonymous", is_flag=True, help="Ask for no token on other addresses: let in whoever can connect."
)
@click.option("--tls-cert", type=_file, help="Certificate, PEM: serve HTTPS.")
@click.option("--tls-key", type=_file, help="Its key, PEM.")
@click.option(
    "--tls-client-ca", type=_file, help="Connect only clients with a certificate of this authority, PEM."
)
@click.option(
    "--token-requests", type=_rate, metavar="PER_SECOND", help="Requests a token may send [default: any]."
)
@click.option("--token-bytes", type=_rate, metavar="PER_SECOND", help="Bytes a token may send [default: any].")
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default=logs.FORMATS[0],
    show_default=True,
    help="Of what is logged on standard error.",
)
def serve_command(
    database: str,
    address: str,
    grpc_address: str,
    lost_after: float,
    memory_mib: int,
    allowed_hosts: tuple[str, ...],
    require_token: bool,
    allow_anonymous: bool,
    tls_cert: str | None,
    tls_key: str | None,
    tls_client_ca: str | None,
    token_requests: float | None,
    token_bytes: float | None,
    files: tuple[Path, ...],
    prices: PriceTable | None,
    overrides_file: Path | None,
    log_format: str,
    **keep: int | None,
) -> None:
    """Serve OTLP over HTTP (/v1/*) and gRPC, the run page on /, the JSON API on /api/v1/*, and /metrics.

    \b
    Example:
      gradwatch collector serve --db sqlite:///gradwatch.db --listen 127.0.0.1:4318
      gradwatch collector serve -f objectives/
    """
    if require_token and allow_anonymous:
        raise click.UsageError("--require-token and --allow-anonymous exclude each other")
    logs.configure(log_format)
    http = _address(address, "--listen")
    grpc_at = None if grpc_address == "off" else _address(grpc_address, "--grpc")
    tls = _tls(tls_cert, tls_key, tls_client_ca)
    overrides = _overrides(overrides_file)
    objectives = load_objectives(files).objectives
    engine = open_database(database, upgrade_sqlite=True)
    policy = policy_for(engine.dialect.name, raw=keep["keep_raw"], rollups=keep["keep_rollups"])
    settings = ServerSettings(
        http=http,
        grpc=grpc_at,
        lost_after=lost_after,
        memory=memory_mib << 20,
        allowed_hosts=allowed_hosts,
        require_token=require_token,
        allow_anonymous=allow_anonymous,
        rates=Rates(token_requests, token_bytes),
        tls=tls,
        policy=policy,
        prices=prices,
        overrides=overrides,
        objectives=objectives,
    )
    try:
        bound = listen(settings, engine)
        grpc = listen_grpc(settings, engine)
    except ListenError as error:
        raise click.ClickException(str(error)) from error
    scheme = "http" if settings.tls is None else "https"
    shown = f"{scheme}://{replace(settings.http, port=bound.getsockname()[1])}"
    if grpc is not None:
        shown += f", gRPC on {grpc.address}"
    click.echo(f"gradwatch collector on {shown}, database {describe(engine)}")
    serve(engine, settings, bound, grpc)


def _overrides(path: Path | None) -> Sequence[Override]:
    try:
        return () if path is None else read_overrides(path, RULES.values())
    except OverridesError as error:
        raise click.ClickException(str(error)) from error


def _tls(certificate: str | None, key: str | None, client_ca: str | None) -> TlsFiles | None:
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise click.UsageError("TLS needs both --tls-cert and --tls-key")
    files = TlsFiles(certificate, key, client_ca)
    try:
        files.check()
    except TlsError as error:
        raise click.ClickException(str(error)) from error
    return files


def _address(text: str, option: str) -> Address:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise click.BadParameter(f"{text!r} is not HOST:PORT, such as 127.0.0.1:4318", param_hint=option)
    return Address(host.strip("[]"), int(port))
