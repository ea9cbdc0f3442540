"""What a child is told: which run and attempt it is, and where the agent's hook is to be found.

``torchrun`` counts its own restarts, in its workers only. Under a supervisor the two counts add up: a worker is
in attempt ``GRADWATCH_ATTEMPT`` plus its restart count, and the next attempt comes after the last that any
worker was in.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

from gradwatch.settings import Settings, SettingsError
from gradwatch.supervisor.progress import FOLDER_VARIABLE, INSTANCE_VARIABLE

ATTACH_FOLDER: Final = Path(__file__).with_name("attach")
# How launchers tell a process how many there are of it.
_SIZE_VARIABLES: Final = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True, slots=True)
class Launch:
    """A command and what is the same for all attempts at it.

    Attributes:
        given: Settings that were given as options, by keyword of ``watch()``.
        restarts: Restarts of the launcher around us, which its other processes have in their environment too.
    """

    command: tuple[str, ...]
    given: Mapping[str, Any]
    environ: Mapping[str, str]
    settings: Settings
    run_id: str
    restarts: int

    @classmethod
    def resolve(
        cls, command: Sequence[str], given: Mapping[str, Any], environ: Mapping[str, str] = os.environ
    ) -> Launch:
        """Find out what run this is.

        Raises:
            SettingsError: A setting cannot be used, or several processes would make a run of their own each.
        """
        settings = Settings.resolve(given, environ, job_of(command))
        restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "")
        return cls(
            tuple(command),
            {name: value for name, value in given.items() if value is not None},
            environ,
            settings,
            settings.run_id or _shared_run_id(environ) or uuid.uuid4().hex[:16],
            int(restarts) if restarts.isdigit() else 0,
        )

    @property
    def first_attempt(self) -> int:
        """1-based. Slurm starts a job that it put back into the queue again, and counts."""
        requeued = self.environ.get("SLURM_RESTART_COUNT", "")
        first = self.settings.attempt or 1 + (int(requeued) if requeued.isdigit() else 0)
        return first + self.restarts

    def child_environ(self, attempt: int, folder: Path | None, instance: str | None = None) -> dict[str, str]:
        """The environment of an attempt.

        ``folder`` is where the child tells how far it came, ``instance`` who speaks for it from outside.
        """
        told = {f"GRADWATCH_{name.upper()}": str(value) for name, value in self.given.items()}
        told |= {
            "GRADWATCH_JOB": self.settings.job,
            "GRADWATCH_RUN_ID": self.run_id,
            "GRADWATCH_ATTEMPT": str(attempt - self.restarts),
        }
        if folder is not None:
            told[FOLDER_VARIABLE] = str(folder)
        if instance is not None:
            told[INSTANCE_VARIABLE] = instance
        if not self.settings.disabled:
            others = self.environ.get("PYTHONPATH")
            told["PYTHONPATH"] = os.pathsep.join([str(ATTACH_FOLDER), *([others] if others else [])])
        return {**self.environ, **told}


def attempt_of(settings: Settings, environ: Mapping[str, str] = os.environ) -> int | None:
    """The attempt that a training process is in; None if only the collector can count."""
    restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "")
    count = int(restarts) if restarts.isdigit() else None
    if settings.attempt is None:
        return None if count is None else count + 1
    is_supervised = FOLDER_VARIABLE in environ and environ.get("GRADWATCH_ATTEMPT") == str(settings.attempt)
    return settings.attempt + (count or 0 if is_supervised else 0)


def will_be_restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun starts its workers again once one of them, such as this process, has failed."""
    restarts, most = (environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return restarts.isdigit() and most.isdigit() and int(restarts) < int(most)


def job_of(command: Sequence[str]) -> str:
    """What to call the job of a command: the script in it, else the module, else the program."""
    for word in command:
        if word.endswith((".py", ".sh")):
            return PurePath(word).stem
    modules = [module for option, module in itertools.pairwise(command) if option == "-m"]
    return modules[-1].rpartition(".")[2] if modules else PurePath(command[0]).name


def _shared_run_id(environ: Mapping[str, str]) -> str | None:
    """What all processes know that a launcher around us started."""
    launcher = environ.get("TORCHELASTIC_RUN_ID")
    if launcher not in {None, "", "none"}:
        return launcher
    sizes = {name: environ.get(name, "") for name in _SIZE_VARIABLES}
    size, name = max((int(size) if size.isdigit() else 0, name) for name, size in sizes.items())
    if size < 2:
        return None
    if name == "SLURM_STEP_NUM_TASKS" and {"SLURM_JOB_ID", "SLURM_STEP_ID"} <= environ.keys():
        return f"slurm-{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    raise SettingsError(
        f"gradwatch: {name}={size}: this is one of several processes, and each would make a run of its own: "
        "expected --run-id or GRADWATCH_RUN_ID"
    )
