"""Runs all rules over all runs: what is wrong now."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.findings.figures import SECOND
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.overrides import Override, parameters_of
from gradwatch_collector.findings.rule import ParametersOf, Rule, RunRule, SceneRule, Sighting
from gradwatch_collector.findings.rules import RUN_RULES, SCENE_RULES
from gradwatch_collector.findings.run_reader import RunReader
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.runs.facts import RunRow

logger = logging.getLogger(__name__)

_RunKey = tuple[str, int]  # run and attempt


@dataclass(frozen=True, slots=True)
class Found:
    """What is wrong now; ``unread``: runs that there was no time for yet, of which nobody knows."""

    observations: Sequence[Observation]
    unread: Collection[str]


class Detection:
    """Keeps in memory what was read of runs and what their rules saw last. Not thread-safe."""

    def __init__(
        self,
        overrides: Sequence[Override] = (),
        *,
        scene_rules: Sequence[SceneRule] = SCENE_RULES,
        run_rules: Sequence[RunRule] = RUN_RULES,
    ) -> None:
        self._scene_rules = [(rule, parameters_of(rule, overrides)) for rule in scene_rules]
        self._run_rules = [(rule, parameters_of(rule, overrides)) for rule in run_rules]
        self._reader = RunReader()
        self._seen: dict[_RunKey, list[Observation]] = {}
        # By rule about all runs: when it was asked, and what it saw.
        self._scenes: dict[str, tuple[int, list[Observation]]] = {}
        self._broken: set[str] = set()

    def look(self, connection: Connection, runs: Sequence[RunRow], now: int, more: Callable[[], bool]) -> Found:
        """Return everything that is wrong with runs that are live or of an ending of the last hour.

        Runs of which there is no news, and those for which there is no time any more (``more``), are as they
        were. ``now`` in Unix nanoseconds; best on a connection whose statements tell of one moment.
        """
        scene = Scene(connection, now, runs)
        found = [each for rule, of in self._scene_rules for each in self._on_scene(rule, of, scene)]
        current = {(run.run_id, run.attempt) for run in runs}
        self._seen = {key: seen for key, seen in self._seen.items() if key in current}
        for view in self._reader.read(connection, runs, now, more):
            self._seen[view.run.run_id, view.run.attempt] = self._of(view)
        return Found(
            [*found, *(each for seen in self._seen.values() for each in seen)],
            {run_id for run_id, _ in current - self._seen.keys()},
        )

    def _on_scene(self, rule: SceneRule, of: ParametersOf, scene: Scene) -> list[Observation]:
        asked, seen = self._scenes.get(rule.name, (None, []))
        if asked is None or not 0 <= scene.now - asked < rule.every * SECOND:
            try:
                seen = list(rule.detect(scene, of))
            except SQLAlchemyError:
                raise
            except Exception as error:  # noqa: BLE001 - told
                self._tell_broken(rule, "all runs", error)
            self._scenes[rule.name] = scene.now, seen
        return seen

    def _of(self, view: RunView) -> list[Observation]:
        return [
            _observation(rule, view, sighting)
            for rule, of in self._run_rules
            if (sighting := self._sighting(rule, of, view)) is not None
        ]

    def _sighting(self, rule: RunRule, of: ParametersOf, view: RunView) -> Sighting | None:
        parameters = of(view.run)
        if parameters is None:
            return None
        try:
            return rule.detect(view, parameters)
        except Exception as error:  # noqa: BLE001 - told
            self._tell_broken(rule, f"run {view.run.run_id}", error)
            return None

    def _tell_broken(self, rule: Rule, what: str, error: Exception) -> None:
        """Numbers of a kind that nobody thought of must not silence all other rules and runs."""
        if rule.name not in self._broken:
            self._broken.add(rule.name)
            logger.error("rule %s failed on %s; told once", rule.name, what, exc_info=error)


def _observation(rule: RunRule, view: RunView, sighting: Sighting) -> Observation:
    severity = sighting.severity or rule.severity
    if severity is Severity.PAGE:
        severity = Severity.for_tier(view.run.tier)
    return Observation(
        run_id=view.run.run_id,
        attempt=view.run.attempt,
        rule=rule.name,
        severity=severity,
        first_seen=view.now if sighting.since is None else sighting.since,
        last_seen=view.now,
        rank=sighting.rank,
        step=None if sighting.step is None else int(sighting.step),
        layer=sighting.layer,
        evidence=_plain(sighting.evidence),
    )


def _plain(value: Any) -> Any:
    """Return what JSON can hold: numpy's numbers as Python's, and those that are not finite as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
