"""One process of one training run: an ordinary loop, watched, and what goes wrong with it.

    python -m gym.train PLANNED_RUN FOLDER

It writes ``injected.json`` into the folder when the fault comes: step, Unix time, and where a NaN is born.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed
from torch import Tensor

import gradwatch
from gym.families import FAMILIES
from gym.fault import STRONG, Fault
from gym.faults import KINDS
from gym.plan import PlannedRun
from gym.training import Recipe, Training, Turn

TEAM: Final = "gym"
CHECKPOINTS: Final = 6
NOTE: Final = "injected.json"


class Loop:
    """Trains what a family built, and lets a fault have its way with every step."""

    def __init__(self, training: Training, recipe: Recipe, fault: Fault, watch: gradwatch.Watch) -> None:
        self._training, self._recipe, self._fault, self._watch = training, recipe, fault, watch
        self._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=100, enabled=recipe.half)

    def run(self) -> None:
        """Take all steps."""
        batches, every = iter(self._training.batches), max(self._recipe.steps // CHECKPOINTS, 1)
        for step in range(self._recipe.steps):
            self._fault.now = step
            if step == self._fault.step:
                self._note()
            self._fault.begin()
            batch = self._fault.batch(next(batches))
            for turn in self._training.turns:
                self._update(turn, self._loss(turn, batch))
            for schedule in self._training.schedules:
                schedule.step()
            if (step + 1) % self._training.every == 0:
                with self._watch.evaluation(), torch.no_grad():
                    self._watch.log(**self._training.evaluate())
            if (step + 1) % every == 0 and self._fault.rank == 0:
                self._checkpoint(step + 1)

    def _loss(self, turn: Turn, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16, enabled=self._recipe.half):
            return self._fault.loss(turn.loss(batch))

    def _update(self, turn: Turn, loss: Tensor) -> None:
        turn.optimizer.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call] # torch's
        told = self._fault.gradients(self._training)
        if told:
            self._watch.log(**told)
        if self._training.clip is not None or self._recipe.guarded:
            self._scaler.unscale_(turn.optimizer)
            limit = math.inf if self._training.clip is None else self._training.clip
            norm = torch.nn.utils.clip_grad_norm_(turn.model.parameters(), limit)
            if self._recipe.guarded and not torch.isfinite(norm):
                return
        self._scaler.step(turn.optimizer)
        self._scaler.update()

    def _checkpoint(self, step: int) -> None:
        state = {name: model.state_dict() for name, model in self._training.models.items()}
        path = self._fault.folder / "checkpoints" / f"step{step}.pt"
        path.parent.mkdir(exist_ok=True)
        # A loop that can go on without this checkpoint does.
        with suppress(OSError), self._watch.checkpoint(path) as place:
            self._fault.save(lambda where: _write(state, where), place or path)
        if path.exists():
            self._fault.saved(path)
            gradwatch.latest_checkpoint(path.parent)

    def _note(self) -> None:
        born = self._fault.birthplace
        note = {
            "step": self._fault.step,
            "time": time.time(),
            "born_in": born and born.born_in,
            "layer": born and born.layer,
        }
        if self._fault.rank == 0:
            with (self._fault.folder / NOTE).open("a") as notes:
                notes.write(json.dumps(note) + "\n")


def _write(state: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)


def fault_of(planned: PlannedRun, steps: int, rank: int, folder: Path) -> Fault:
    """Make a run's fault; that of a healthy run never comes and changes nothing."""
    make = Fault if planned.fault is None else KINDS[planned.fault].make
    return make(
        step=-1 if planned.fault is None else round(planned.place * steps),
        is_strong=planned.strength == STRONG,
        chance=random.Random(planned.seed),  # noqa: S311 - a draw
        rank=rank,
        folder=folder,
    )


def _configuration(recipe: Recipe, planned: PlannedRun) -> dict[str, object]:
    """Hyper-parameters, and what else tells runs of one kind from those of another."""
    known = {each.name: getattr(recipe, each.name) for each in fields(recipe) if each.name != "fetching"}
    return {**known, "family": planned.family, "fault": planned.fault, "strength": planned.strength}


def prepare(planned: PlannedRun, steps: int, rank: int, folder: Path) -> tuple[Training, Recipe, Fault]:
    """Build what a run trains, as its fault wants it."""
    fault = fault_of(planned, steps, rank, folder)
    recipe = fault.cook(Recipe(planned.data, steps, half=planned.half))
    if recipe.seeded:
        torch.manual_seed(planned.seed)
        np.random.seed(planned.seed)
        random.seed(planned.seed)
    training = FAMILIES[planned.family].build(recipe)
    if recipe.decay:
        training.decay(recipe.steps)
    fault.install(training)
    return training, recipe, fault


def main(planned: PlannedRun, folder: Path) -> None:
    """Train."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        ranks = int(os.environ["WORLD_SIZE"])
        meeting = f"file://{folder / 'ranks'}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    pace = 1.0 if planned.fault is None else KINDS[planned.fault].pace
    training, recipe, fault = prepare(planned, round(FAMILIES[planned.family].STEPS * pace), rank, folder)
    models = training.models
    watch = gradwatch.watch(
        models if len(models) > 1 else next(iter(models.values())),
        [turn.optimizer for turn in training.turns],
        job=planned.job,
        model_name=planned.family,
        dataset=planned.data,
        team=TEAM,
        tier="production",
        config=_configuration(recipe, planned),
    )
    Loop(training, recipe, fault, watch).run()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(PlannedRun.from_json(sys.argv[1]), Path(sys.argv[2]))
