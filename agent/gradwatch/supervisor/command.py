"""``gradwatch run``."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from gradwatch.settings import SettingsError
from gradwatch.supervisor.launch import Launch
from gradwatch.supervisor.retrying import RetryPolicy
from gradwatch.supervisor.supervision import Supervision


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("--job", help="What the runs have in common.  [default: the script's name]")
@click.option("--run-id", help="Id of the run.  [default: made]")
@click.option("--model", "model_name", help="Name of the model.")
@click.option("--dataset", help="Name of the data set.")
@click.option("--team", help="Owning team.")
@click.option("--tier", help="production or experiment.")
@click.option("--target", help="What the run tries to reach, such as 'val_loss<=0.5'.")
@click.option("--deadline", help="Seconds within which the target should hold.")
@click.option("--endpoint", help="Base URL of the collector.")
@click.option("--directory", help="Where undelivered telemetry is kept.")
@click.option(
    "--retries", default=0, show_default=True, type=click.IntRange(0), help="Attempts after one that failed."
)
@click.option(
    "--backoff",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.0),
    help="Seconds before the second attempt; doubles each time.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def run(command: tuple[str, ...], retries: int, backoff: float, **given: Any) -> None:
    """Run a command, watch what trains in it, and tell how it ended.

    Optimizers and models are found without a change of the code. Signals are passed on, the exit code is the
    command's. With `--retries` it is started again when it fails: killed by a signal, out of memory, or with an
    exit code; not when it is cancelled or preempted, was used wrongly, or fails twice in the same way.

    \b
    Example:
      gradwatch run --job mnist -- python train.py --lr 0.1
      gradwatch run --retries 3 -- torchrun --nproc-per-node 2 train.py
    """
    try:
        launch = Launch.resolve(command, given)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    code = Supervision(launch, RetryPolicy(retries, backoff), _say).run()
    _forget_unwritten()
    sys.exit(code)


def _say(line: str) -> None:
    # A full disk, a reader that is gone, a terminal that hung up: none of them is the command's failure.
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"gradwatch: {line}\n".encode(errors="backslashreplace"))


def _forget_unwritten() -> None:
    """What a log message left in the buffer of stderr would fail once more, and make the exit code 120."""
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = None  # which is what Python does where there is none
