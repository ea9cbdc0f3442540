"""The ``gradwatch`` command: subcommands are loaded by name, so that none costs what another needs."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from importlib.metadata import version
from typing import Any, Final

import click

# Name -> where the click command lives, and what it does. Strings, not imports: the agent installs without
# SQL and the collector without torch, and `gradwatch --help` costs neither.
COMMANDS: Final = {
    "alerts": ("gradwatch_collector.commands.export:alerts", "Copy the Prometheus rules and runbooks."),
    "audit": ("gradwatch_collector.commands.audit:audit", "Who did what to the service."),
    "checkpoint": ("gradwatch.checkpoints.command:checkpoint", "Are the checkpoints whole?"),
    "collector": ("gradwatch_collector.commands.serve:collector", "Receive, store and evaluate telemetry."),
    "dashboards": ("gradwatch_collector.commands.export:dashboards", "Copy the Grafana dashboards."),
    "db": ("gradwatch_collector.commands.db:db", "Create and migrate the database."),
    "demo": ("gradwatch_collector.commands.demo:demo", "See the whole thing on this machine."),
    "findings": (
        "gradwatch_collector.commands.findings:findings",
        "What is wrong with runs, who has it in hand.",
    ),
    "metrics": ("gradwatch_collector.commands.metrics:metrics", "Metrics of runs and all other senders."),
    "replay": (
        "gradwatch.reproduction.command:replay",
        "Run a captured step again, find where it went bad.",
    ),
    "run": ("gradwatch.supervisor.command:run", "Run a command, watch it, tell how it ended."),
    "runs": ("gradwatch_collector.commands.runs:runs", "What ran, and how it ended."),
    "slo": ("gradwatch_collector.commands.slo:slo", "Is the training service healthy?"),
    "token": ("gradwatch_collector.commands.token:token", "Access tokens of the collector."),
}


_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Utf8(click.types.StringParamType):
    """Text; names of files, and what is passed on to another command, may be any bytes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it; bytes that are no text arrive as surrogates, which no database takes."""
        text = super().convert(value, param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"found {os.fsencode(text)!r}, expected UTF-8", param, ctx)
        return text


def _expect_text(command: click.Command) -> None:
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = _Utf8()
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        _expect_text(each)


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is asked for."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run a command: letters that the output lacks are escaped, and where it finds no room is one line."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().main(*arguments, **settings)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            sys.stdout = None  # what is left in its buffer would fail once more, and make the exit code 120
            click.ClickException(f"what is written finds no room: {error.strerror}").show()
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of the subcommands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a subcommand; say which extra is missing when it cannot be."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"`gradwatch {cmd_name}` needs the package {error.name!r}: pip install 'gradwatch[collector]'"
            ) from error
        assert isinstance(command, click.Command)
        _expect_text(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the subcommands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("gradwatch"), prog_name="gradwatch")
def main() -> None:
    """Watch PyTorch training: gradients, NaNs, run endings, SLOs.

    Start with `gradwatch demo`, or run `gradwatch collector serve` and put
    `gradwatch.watch(model, optimizer)` into a training script.
    """


if __name__ == "__main__":
    sys.exit(main())
