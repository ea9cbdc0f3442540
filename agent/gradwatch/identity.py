"""Who is speaking: the run, the attempt, the rank, and what a post-mortem will want to know about them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch

from gradwatch import conventions
from gradwatch.measures.memory import is_cuda_started
from gradwatch.safety import shielded
from gradwatch.settings import Settings
from gradwatch.supervisor.launch import attempt_of
from gradwatch.supervisor.progress import INSTANCE_VARIABLE
from gradwatch.telemetry import AttributeValue

# Ranks that watch at all do so within moments of each other; a rank 0 that does not must not hold up others.
_AGREEMENT_SECONDS: Final = 5.0

_runs_begun = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """One process of a run. ``attempt`` is None where only the collector can count."""

    run_id: str
    attempt: int | None
    rank: int
    world_size: int
    instance: str

    @classmethod
    def resolve(
        cls, settings: Settings, environ: Mapping[str, str] = os.environ, *, separate: bool = False
    ) -> Identity:
        """Ask the caller, then the launcher, then the process group; else choose.

        The launcher is not asked for the run of a ``with gradwatch.run():``, which is ``separate``.
        """
        global _runs_begun
        rank, world_size = _rank(settings, environ), _world_size(environ)
        launcher = None if separate else environ.get("TORCHELASTIC_RUN_ID")
        run_id = settings.run_id or (launcher if launcher not in {None, "", "none"} else None)
        _runs_begun += 1
        return cls(
            run_id=run_id or _agreed(rank, world_size, _runs_begun) or _new_id(),
            attempt=attempt_of(settings, environ),
            rank=rank,
            world_size=world_size,
            instance=str(uuid.uuid4()),
        )


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def _rank(settings: Settings, environ: Mapping[str, str]) -> int:
    if settings.rank is not None:
        return settings.rank
    if _distributed():
        return torch.distributed.get_rank()
    rank = environ.get("RANK", "")
    return int(rank) if rank.isdigit() else 0


def _world_size(environ: Mapping[str, str]) -> int:
    if _distributed():
        return torch.distributed.get_world_size()
    size = environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() else 1


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@shielded(None)
def _agreed(rank: int, world_size: int, count: int) -> str | None:
    """A run id that rank 0 makes and the others read from the process group's store."""
    if world_size < 2 or not _distributed():
        return None
    store = torch.distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way
    key = f"gradwatch/run/{count}"
    if rank == 0:
        run_id = _new_id()
        store.set(key, run_id)
        return run_id
    store.wait([key], timedelta(seconds=_AGREEMENT_SECONDS))
    return str(store.get(key).decode())


def resource_attributes(settings: Settings, identity: Identity, model: str | None) -> dict[str, AttributeValue]:
    """The OTLP resource of this process; what is not known is absent."""
    known: dict[str, AttributeValue | None] = {
        **settings.resource,
        conventions.SERVICE_NAME: settings.job,
        conventions.SERVICE_INSTANCE_ID: identity.instance,
        conventions.RUN_ID: identity.run_id,
        conventions.RUN_ATTEMPT: identity.attempt,
        conventions.RANK: identity.rank,
        conventions.WORLD_SIZE: identity.world_size,
        conventions.MODEL: settings.model or model,
        conventions.DATASET: settings.dataset,
        conventions.TEAM: settings.team,
        conventions.TIER: settings.tier,
        conventions.TARGET: str(settings.target) if settings.target else None,
        conventions.DEADLINE: settings.deadline,
        # Text: an unseeded generator has 64 unsigned bits, and OTLP integers are signed.
        conventions.SEED: str(torch.initial_seed()),
        conventions.DETERMINISTIC: torch.are_deterministic_algorithms_enabled(),
        conventions.GIT_COMMIT: git_commit(Path.cwd()),
        conventions.TORCH_VERSION: str(torch.__version__),
        conventions.CUDA_VERSION: torch.version.cuda,
        conventions.DEVICE_NAME: _device_name(),
        conventions.PYTHON_VERSION: platform.python_version(),
        conventions.CONFIG_HASH: _config_hash(settings.config) if settings.config is not None else None,
        conventions.HOST_NAME: socket.gethostname(),
        conventions.PROCESS_PID: os.getpid(),
        conventions.PARENT_PID: os.getppid(),
        conventions.SUPERVISOR_INSTANCE: os.environ.get(INSTANCE_VARIABLE),
        conventions.PROCESS_COMMAND: sys.argv[0] if sys.argv else None,
    }
    return {name: value for name, value in known.items() if value is not None and value != ""}


@shielded(None)
def _device_name() -> str | None:
    # Asking a CUDA that training has not started would create a context, hundreds of megabytes, in our name.
    if not (torch.cuda.is_available() and is_cuda_started()):
        return None
    return torch.cuda.get_device_name()


def _config_hash(config: Mapping[str, object]) -> str:
    try:
        canonical = json.dumps(config, sort_keys=True, default=str)
    except (TypeError, ValueError):  # keys of several types, or a structure that contains itself
        canonical = repr(sorted(map(repr, config.items())))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@shielded(None)
def git_commit(directory: Path) -> str | None:
    """Commit checked out in the directory or above it, read from git's own files: running git takes longer."""
    for folder in (directory, *directory.parents):
        entry = folder / ".git"
        if entry.is_file():  # a worktree or submodule points to its directory
            entry = folder / entry.read_text().removeprefix("gitdir:").strip()
        if not entry.is_dir():
            continue
        head = (entry / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        reference = head.removeprefix("ref:").strip()
        shared = entry / "commondir"
        for base in (entry, (entry / shared.read_text().strip()) if shared.exists() else entry):
            if (base / reference).is_file():
                return (base / reference).read_text().strip()
            packed = base / "packed-refs"
            for line in packed.read_text().splitlines() if packed.is_file() else ():
                commit, _, name = line.partition(" ")
                if name == reference:
                    return commit
        return None
    return None
