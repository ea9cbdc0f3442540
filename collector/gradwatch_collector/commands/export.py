"""``gradwatch alerts export`` and ``gradwatch dashboards export``."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from gradwatch.assets import asset_dir

_directory = click.argument("directory", type=click.Path(file_okay=False, path_type=Path))


@click.group()
def alerts() -> None:
    """Prometheus rules, Alertmanager configuration and runbooks."""


@alerts.command("export")
@_directory
def export_alerts(directory: Path) -> None:
    """Copy rules, configurations and runbooks into DIRECTORY.

    \b
    Example:
      gradwatch alerts export /etc/prometheus/gradwatch
    """
    _export("alerts", directory)


@click.group()
def dashboards() -> None:
    """Grafana dashboards and provisioning files."""


@dashboards.command("export")
@_directory
def export_dashboards(directory: Path) -> None:
    """Copy dashboards and provisioning files into DIRECTORY.

    \b
    Example:
      gradwatch dashboards export /etc/grafana/gradwatch
    """
    _export("dashboards", directory)


def _export(name: str, directory: Path) -> None:
    try:
        shutil.copytree(
            asset_dir(name),
            directory,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.py", "__pycache__", "tests"),
        )
    except OSError as error:
        raise click.ClickException(f"cannot write {directory}: {error.strerror or error}") from error
    click.echo(f"{name} copied to {directory}")
