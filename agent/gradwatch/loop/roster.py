"""Which models and optimizers are watched, and whose steps are the run's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from gradwatch.loop.budget import Budget
from gradwatch.loop.missing import STRANGERS, unreadable
from gradwatch.loop.step_log import StepLog
from gradwatch.loop.step_sink import StepSink
from gradwatch.loop.watched import Model, Steps, WatchedOptimizer, parameters_of
from gradwatch.redaction import redact_name

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# Steps of optimizers that train nothing watched, after which a run without any other is told to be unseen.
_STRANGE_STEPS: Final = 10


class Roster:
    """The watched models and optimizers of a run. The first optimizer leads: its steps are the run's.

    Attributes:
        models: In the order in which they came.
        watched: Optimizers by ``id``.
        hookless: What stands for an optimizer in a loop that has none.
        adopts: Whether optimizers that nobody named are watched too, once they step a watched model (any model,
            without one).
        thin_cost: Nanoseconds that a step costs which is not observed.
    """

    def __init__(self, sink: StepSink, start_step: int, overhead_budget: float, every: int | None) -> None:
        self._sink = sink
        self._start_step = start_step
        self._overhead_budget = overhead_budget
        self._every = every
        self.thin_cost = 0.0
        self.models: list[Model] = []
        self.watched: dict[int, WatchedOptimizer] = {}
        self.hookless: WatchedOptimizer | None = None
        self.adopts = False
        # Steps of earlier leaders; the count of the one there is goes on from there.
        self._steps_before = 0
        self.leader: WatchedOptimizer | None = None
        self._created = 0
        self._refused: set[int] = set()
        # Key of the watched one, by the optimizer within that steps for it.
        self._inner: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._strange_steps = 0

    # --- Steps -----------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Index of the step in progress."""
        count = 0 if self.leader is None else self.leader.count
        return self._start_step + self._steps_before + count

    @property
    def last_step(self) -> int | None:
        """Index of the last step that ended; None before the first."""
        step = self.step
        return step - 1 if step > self._start_step else None

    def last_step_of(self, watched: WatchedOptimizer) -> int:
        """Index of the last step of this optimizer."""
        return self.step - 1 if watched.leads else watched.last_step

    @property
    def steps_ended(self) -> int:
        """Steps of all optimizers."""
        return self._steps_before + sum([watched.count for watched in self.everyone()])

    @property
    def modules(self) -> list[nn.Module]:
        """The watched models that are still there."""
        return [module for model in self.models if (module := model.reference()) is not None]

    def everyone(self) -> tuple[WatchedOptimizer, ...]:
        """All optimizers, and what stands for one."""
        return (*self.watched.values(), *(() if self.hookless is None else (self.hookless,)))

    # --- Who is on it ----------------------------------------------------------------------------------

    @property
    def optimizer_count(self) -> int:
        """Optimizers watched so far; those that step inside backward are one."""
        return self._created

    def optimizers(self) -> list[Optimizer]:
        """Those that are watched, in the order in which they came."""
        watched = [one for each in self.watched.values() if (one := each.reference()) is not None]
        return [one for one in watched if isinstance(one, torch.optim.Optimizer)]

    def add_model(self, model: nn.Module, name: str) -> str | None:
        """Name layers after this module from now on; with a second one, put the models' names in front.

        Returns:
            The model's own name, by which no other goes; None when it is known already.
        """
        if any(known.reference() is model for known in self.models):
            return None
        taken = {known.name for known in self.models}
        unique = name = redact_name(name)
        number = 1
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        self.models.append(Model(unique, model))
        for watched in self.watched.values():
            optimizer = watched.reference()
            if optimizer is not None:
                watched.rename(optimizer, self.models)
        return unique

    def add(self, optimizer: Optimizer, log: StepLog | None) -> WatchedOptimizer:
        """Watch this optimizer, which goes on with a log there is or with one of its own."""
        key = id(optimizer)

        def gone(_reference: object) -> None:
            self.drop(key)

        watched = self._new(optimizer, log or self._sink.open_log(self._created, self.step), gone)
        reader = watched.reader
        if reader.unreadable:
            self._sink.missing(self.step, unreadable(reader.unreadable, len(reader.parameters)))
        self._created += 1
        self.watched[key] = watched
        if self.leader is None:
            self.lead(watched)
        self.share_budget()
        return watched

    def add_hookless(self, steps: Steps) -> WatchedOptimizer:
        """Watch a loop that has no optimizer."""
        self.hookless = self._new(steps, self._sink.open_log(0, self.step), lambda _: None)
        self.hookless.is_never_thin = True
        self.lead(self.hookless)
        return self.hookless

    def drop_hookless(self) -> None:
        """An optimizer has come, or the run ends; steps go on from there."""
        if self.hookless is not None:
            self._steps_before += self.hookless.count
            self.hookless = self.leader = None

    def _new(self, steps: Steps, log: StepLog, gone: Callable[[object], None]) -> WatchedOptimizer:
        budget = Budget(self._overhead_budget, self._every, self.thin_cost)
        return WatchedOptimizer(steps, self.models, budget, log, gone)

    def drop(self, key: int) -> WatchedOptimizer | None:
        """Watch the optimizer with this ``id`` no longer."""
        watched = self.watched.pop(key, None)
        if watched is not None:
            watched.log.closed = True
            if watched is self.leader:
                self._steps_before += watched.count
                self.leader = None
                if self.watched:
                    self.lead(min(self.watched.values(), key=lambda each: each.index))
        return watched

    def lead(self, watched: WatchedOptimizer) -> None:
        """This optimizer's steps are the run's from now on; they go on where the last leader's ended."""
        step = self.step
        self.leader = watched
        self._steps_before -= watched.count
        watched.leads = watched.log.leads = True
        watched.log.first_step = step - len(watched.ends)

    def merge(self, watched: WatchedOptimizer, into: WatchedOptimizer) -> None:
        """What was watched as one more optimizer turned out to be part of another."""
        if watched.index < into.index:
            into.use(watched.log)
        self._created -= 1
        if self.leader is watched:
            self.leader = None
            self.lead(into)

    def share_budget(self) -> None:
        """Give all optimizers the same part of it."""
        for each in self.watched.values():
            each.budget.share = self._overhead_budget / len(self.watched)

    def is_adoptable(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that is not watched steps what is."""
        if id(optimizer) in self._refused:
            return False
        mine = {id(p) for p in parameters_of(optimizer)}
        inner = any(mine & {id(p) for p in other.reader.parameters} for other in self.watched.values())
        trains = not self.models or any(mine & model.layer_names(False).keys() for model in self.models)
        if inner or not trains:
            self._refused.add(id(optimizer))
            return False
        return True

    def find(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        """How this optimizer is watched, or the one around it that it steps for."""
        key = self._inner.get(optimizer) if self._inner else None
        return self.watched.get(id(optimizer) if key is None else key)

    def find_around(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        """The watched optimizer that this one, which nobody named, steps for from now on.

        As in sharpness-aware minimisation: its ``step`` is never called, and the optimizer within, which has
        the same parameters, is stepped by another method of it.
        """
        for key, watched in self.watched.items():
            if watched.count or watched.frame is not None:
                continue
            if watched.steps_same_as(optimizer):
                self._inner[optimizer] = key
                return watched
        return None

    def note_stranger(self) -> None:
        """An optimizer stepped that is not watched; tell once, if no other does."""
        if not self.watched and self.models:
            self._strange_steps += 1
            if self._strange_steps == _STRANGE_STEPS:
                self._sink.missing(self.step, STRANGERS)

    def clear(self) -> None:
        """Watch nothing."""
        self._steps_before, self.leader = self.step - self._start_step, None
        self.watched.clear()
        self._inner.clear()
        self.adopts = False
        self.models.clear()
