"""``gradwatch alerts export`` and ``gradwatch dashboards export``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
import yaml

from gradwatch.assets import asset_dir
from gradwatch_collector.commands.kubernetes import alertmanager_config, prometheus_rule
from gradwatch_collector.commands.web_address import WEB_ADDRESS

# Expressions and sentences are not to be folded.
_ONE_LINE: Final = 10_000

_directory = click.argument("directory", type=click.Path(file_okay=False, path_type=Path))


@click.group()
def alerts() -> None:
    """Prometheus rules, Alertmanager configuration and runbooks."""


@alerts.command("export")
@_directory
@click.option(
    "--format",
    "form",
    type=click.Choice(["prometheus", "kubernetes"]),
    default="prometheus",
    show_default=True,
    help="Files for the servers, or objects for the Prometheus operator.",
)
def export_alerts(directory: Path, form: str) -> None:
    """Copy rules, configurations and runbooks into DIRECTORY.

    For Kubernetes a PrometheusRule and an AlertmanagerConfig are written; runbooks stay where links lead.

    \b
    Example:
      gradwatch alerts export /etc/prometheus/gradwatch
      gradwatch alerts export manifests/ --format kubernetes
    """
    if form == "kubernetes":
        _export_objects(directory)
    else:
        _export("alerts", directory)


@click.group()
def dashboards() -> None:
    """Grafana dashboards and provisioning files."""


@dashboards.command("export")
@_directory
@click.option(
    "--collector-url",
    default=None,
    type=WEB_ADDRESS,
    help="Where browsers reach the collector, whose run pages panels lead to [default: http://127.0.0.1:4318].",
)
@click.option(
    "--runbook-url",
    default=None,
    type=WEB_ADDRESS,
    help="Folder of runbooks that panels lead to [default: ours].",
)
def export_dashboards(directory: Path, collector_url: str | None, runbook_url: str | None) -> None:
    """Copy dashboards and provisioning files into DIRECTORY.

    \b
    Example:
      gradwatch dashboards export /etc/gradwatch/dashboards --collector-url https://gradwatch.example.org
    """
    addresses = {"collector": collector_url, "runbooks": runbook_url}
    told = {name: url for name, url in addresses.items() if url is not None}
    _export("dashboards", directory)
    if told:
        try:
            for path in sorted((directory / "grafana").glob("*.json")):
                _set_constants(path, told)
        except OSError as error:
            raise _cannot_write(directory, error) from error


def _set_constants(path: Path, values: Mapping[str, str]) -> None:
    """Give constants of a dashboard other values."""
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "constant" and variable["name"] in values:
            variable["query"] = values[variable["name"]]
    path.write_text(json.dumps(dashboard, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _export_objects(directory: Path) -> None:
    source = asset_dir("alerts")
    objects = {
        "prometheus-rule.yaml": prometheus_rule("gradwatch", _read(source / "rules" / "gradwatch.rules.yaml")),
        "alertmanager-config.yaml": alertmanager_config("gradwatch", _read(source / "alertmanager.yaml")),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in objects.items():
            text = yaml.safe_dump(content, sort_keys=False, width=_ONE_LINE, allow_unicode=True)
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    click.echo(f"{' and '.join(objects)} written to {directory}")


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _export(name: str, directory: Path) -> None:
    try:
        shutil.copytree(
            asset_dir(name),
            directory,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.py", "__pycache__", "tests"),
        )
    except OSError as error:
        raise _cannot_write(directory, error) from error
    click.echo(f"{name} copied to {directory}")


def _cannot_write(directory: Path, error: OSError) -> click.ClickException:
    return click.ClickException(f"cannot write {directory}: {error.strerror or error}")
