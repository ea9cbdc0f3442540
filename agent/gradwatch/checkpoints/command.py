"""``gradwatch checkpoint``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from gradwatch.checkpoints.finding import Verdict, find_all, verify
from gradwatch.redaction import redact_text

# Without one of them nothing is sent: who only looks at a disk need not have a collector.
_ENDPOINTS: Final = ("GRADWATCH_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@click.group()
def checkpoint() -> None:
    """Checkpoints on disk."""


@checkpoint.command("verify")
@click.argument(
    "paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(exists=True, path_type=Path)
)
@click.option(
    "--endpoint",
    metavar="URL",
    help="The collector that is told of checkpoints whose manifests name their runs; without it the one that "
    "GRADWATCH_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT names, or none.",
)
@click.option("--format", "output", default="table", show_default=True, type=click.Choice(["table", "json"]))
def verify_command(paths: Sequence[Path], endpoint: str | None, output: str) -> None:
    """Find checkpoints that are truncated, altered, missing or cannot be loaded.

    Every byte is read, and nothing in it is executed. Folders are searched. A checkpoint is `good` if it is
    what its manifest says, `unsigned` if it has no manifest and only its format could be looked at. The exit
    code is 1 if any is `bad`.

    \b
    Example:
      gradwatch checkpoint verify checkpoints/ --format json
    """
    found = find_all(paths)
    if not found:
        raise click.ClickException(f"no checkpoints in {', '.join(map(str, paths))}")
    verdicts = list(_with_progress(found))
    _report(verdicts, endpoint)
    if output == "json":
        document = {"checkpoints": [_json(verdict) for verdict in verdicts]}
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        click.echo()
    else:
        _print(verdicts)
    if any(verdict.problem is not None for verdict in verdicts):
        sys.exit(1)


def _report(verdicts: Sequence[Verdict], endpoint: str | None) -> None:
    if endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    from gradwatch.checkpoints.reporting import report
    from gradwatch.settings import Settings, SettingsError

    try:
        settings = Settings.resolve({"endpoint": endpoint})
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    if not settings.disabled and not report(verdicts, settings):
        click.echo(f"{redact_text(settings.endpoint)} was not told of it yet", err=True)


def _with_progress(found: Sequence[Path]) -> Sequence[Verdict]:
    if not sys.stderr.isatty():
        return [verify(path) for path in found]
    with click.progressbar(found, label="verifying", file=sys.stderr) as shown:
        return [verify(path) for path in shown]


def _json(verdict: Verdict) -> dict[str, Any]:
    manifest, problem = verdict.manifest, verdict.problem
    return {
        "path": _printable(str(verdict.path)),
        "state": verdict.state,
        "fault": None if problem is None else problem.fault.value,
        "evidence": None if problem is None else _printable(problem.evidence),
        "step": None if manifest is None else manifest.step,
        "run_id": None if manifest is None else manifest.run_id,
        "attempt": None if manifest is None else manifest.attempt,
        "rank": None if manifest is None else manifest.rank,
        "saved_at": None if manifest is None else _moment(manifest.saved_at.isoformat(timespec="microseconds")),
        "bytes": None if manifest is None else manifest.size,
    }


def _moment(text: str) -> str:
    return text.replace("+00:00", "Z")


def _print(verdicts: Sequence[Verdict]) -> None:
    rows = [("STATE", "STEP", "BYTES", "SAVED", "CHECKPOINT", "WHY")]
    for verdict in verdicts:
        told = _json(verdict)
        rows.append(
            (
                told["state"],
                "" if told["step"] is None else str(told["step"]),
                "" if told["bytes"] is None else str(told["bytes"]),
                (told["saved_at"] or "")[:19].replace("T", " "),
                told["path"],
                "" if told["fault"] is None else f"{told['fault']}: {told['evidence']}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _printable(text: str) -> str:
    # Names of files are somebody else's text: nothing that a terminal would obey, nothing that is no text.
    return "".join(letter if letter.isprintable() else "?" for letter in text)
