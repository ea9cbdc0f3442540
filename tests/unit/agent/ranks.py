"""Two real processes with a gloo group, and what their loops told: each runs once bare and once watched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gradwatch
from gradwatch.testing import InMemoryExporter

RANKS = 2
# Importing these takes a rank four seconds, so all of them are forked from one process that did nothing else.
forkserver.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "pytest", "opentelemetry.sdk"])

Watch = Callable[..., AbstractContextManager[Any]]


@dataclass
class Truth:
    """What a dense computation says, step by step: norms by layer, this rank's own total, the loss."""

    norms: list[dict[str, float]] = field(default_factory=list)
    local: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass
class Told:
    """One loop on one rank: what was exported, the truth, and the final weights bare and watched."""

    exporter: InMemoryExporter
    truth: Truth
    bare: list[bytes]
    watched: list[bytes]


Loop = Callable[[int, Watch, Truth], Mapping[str, torch.Tensor]]


def prepare_ranks() -> None:
    """Begin to import what ranks need, beside what runs now."""
    forkserver.ensure_running()


def run_ranks(main: Callable[..., None], *arguments: Any) -> None:
    """Run ``main(rank, *arguments)`` in processes of their own, with the environment as it is now."""
    mp.start_processes(  # type: ignore[no-untyped-call] # torch
        _begin, (main, dict(os.environ), arguments), nprocs=RANKS, start_method="forkserver"
    )


def _begin(rank: int, main: Callable[..., None], environ: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    main(rank, *arguments)


def on_ranks(loops: Mapping[str, Loop], folder: Path, settings: Mapping[str, Any]) -> dict[str, list[Told]]:
    """Run the loops on every rank, one after the other; by loop, what each rank told."""
    run_ranks(_rank, dict(loops), str(folder), dict(settings))
    told = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [one[name] for one in told] for name in loops}


def _rank(rank: int, loops: dict[str, Loop], folder: str, settings: dict[str, Any]) -> None:
    os.environ["GRADWATCH_TESTING"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    told = {}
    for name, loop in loops.items():
        exporter = InMemoryExporter()
        given = {"every": 1, "rank": rank, "exporter": exporter, **settings.get(name, {})}

        def watch(*objects: Any, given: dict[str, Any] = given) -> Any:
            return gradwatch.watch(*objects, **given)

        torch.manual_seed(7)
        bare = _bits(loop(rank, lambda *_: nullcontext(), Truth()))
        torch.manual_seed(7)
        truth = Truth()
        told[name] = Told(exporter, truth, bare, _bits(loop(rank, watch, truth)))
    torch.save(told, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _bits(weights: Mapping[str, torch.Tensor]) -> list[bytes]:
    whole = (w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights.values())
    return [w.detach().numpy().tobytes() for w in whole]
