"""What holds for every rule about a run: whatever a sender tells, none raises or warns."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradwatch import conventions as c
from gradwatch_collector.findings import RUN_RULES
from gradwatch_collector.findings.predecessors import Predecessor
from gradwatch_collector.findings.rule import RunRule
from gradwatch_collector.findings.run_view import CheckpointSeen, EventSeen, Layers, Number, RunView
from gradwatch_collector.findings.track import Track
from gradwatch_collector.records import Times
from gradwatch_slo.runs import Status
from tests.batches import SECOND, at
from tests.run_views import RUNNING, number

NAMES = [
    *(metric.name for metric in c.METRICS),
    *(f"{c.COLLECTIVE_DURATION.name} {field}" for field in ("sum", "count", "max")),
]
TEXT = st.sampled_from(
    ["", "cuda:0", "backward", "all_reduce", c.DDP_ALL_REDUCE, "2.13", "MainThread:\n\n", "x" * 999]
)
WHOLE = st.integers(-(2**63), 2**63 - 1)
ODD: Any = st.one_of(
    TEXT, st.booleans(), WHOLE, st.floats(), st.none(), st.lists(WHOLE, max_size=2), st.just({})
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from([*c.ATTRIBUTES, c.TORCH_VERSION, c.DEVICE_NAME, c.WORLD_SIZE, c.GIT_COMMIT]),
    ODD,
    max_size=4,
)
RANK = st.integers(0, 3)
RIGHT = {c.DEVICE: "cuda:0", c.PHASE: "backward", c.COLLECTIVE: "all_reduce"}
BROKEN = (np.nan, np.inf, -np.inf, -1.0, 0.0, -0.0, 5e-324, 1e300, -1e300, sys.float_info.max)


def numbers(seed: int) -> dict[str, list[Number]]:
    """What a few ranks tell of each metric: a level and a slope, and here and there what breaks sums.

    Drawn by one seed: drawn value by value, hardly any rule would ever see all that it needs.
    """
    chance = np.random.default_rng(seed)
    ranks, count = chance.integers(1, 4), chance.choice([1, 20, 100, 900])
    times = at(0) + chance.choice([1, SECOND // 20, SECOND]) * np.arange(1, count + 1)
    return {
        name: [_number(chance, rank, times) for rank in range(ranks)] for name in NAMES if chance.random() < 0.9
    }


def _number(chance: np.random.Generator, rank: int, times: Times) -> Number:
    count = len(times)
    values = chance.choice([0.02, 0.1, 1.0, 1e9]) * (1 + chance.choice([0, 0.01, -0.01, 1]) * np.arange(count))
    if chance.random() < 0.3:
        start, end = np.sort(chance.integers(0, count + 1, 2))
        values[start:end] = chance.choice(BROKEN)
    kept, track = times[: count if chance.random() < 0.9 else count // 2], Track()
    track.add(kept, values[: len(kept)])
    return Number(rank, RIGHT, track.recent(), track.course())


@st.composite
def layers(draw: st.DrawFn) -> Layers:
    count, length = draw(st.integers(0, 4)), draw(st.integers(0, 32))
    values = np.array(draw(st.lists(st.floats(), min_size=count * length, max_size=count * length)))
    times = at(0) + SECOND * np.arange(length)
    return Layers(
        draw(RANK),
        draw(ATTRIBUTES),
        [f"l{each}" for each in range(count)],
        times,
        values.reshape(count, length),
    )


EVENTS = st.builds(EventSeen, RANK, st.integers(0, at(10_000)), ATTRIBUTES)
CHECKPOINTS = st.builds(
    CheckpointSeen,
    RANK, st.integers(0, at(10_000)), st.sampled_from(["saved", "failed", "verified", "corrupt", "?"]),
    st.none() | TEXT, st.none() | WHOLE, st.none() | WHOLE, st.none() | st.floats(), st.none() | TEXT,
)  # fmt: skip
RUNS = st.builds(
    lambda status, tier, ended: replace(RUNNING, status=status, tier=tier, ended_at=ended, rank_count=4),
    st.just(Status.RUNNING) | st.sampled_from(Status),
    st.sampled_from(["production", "experiment"]), st.none() | st.just(at(500)),
)  # fmt: skip
SUMMARIES = st.dictionaries(
    st.sampled_from(["steps", "effective_time_ratio", "collective_p95", "quality", "step_cost"]),
    st.none() | st.floats() | WHOLE,
)
PREDECESSORS = st.builds(
    Predecessor, run=RUNS, resource=ATTRIBUTES, summary=SUMMARIES, errors=st.lists(TEXT, max_size=3)
)
VIEWS = st.builds(
    RunView,
    run=RUNS,
    now=st.integers(0, at(20_000)),
    resource=ATTRIBUTES,
    numbers=st.integers(0, 2**32).map(numbers),
    layers=st.dictionaries(
        st.sampled_from([f"{c.LAYER_GRADIENT_NORM.name} {each}" for each in ("max", "mean", "sum")]),
        st.lists(layers(), max_size=2),
    ),
    events=st.dictionaries(st.sampled_from([each.name for each in c.EVENTS]), st.lists(EVENTS, max_size=4)),
    checkpoints=st.lists(CHECKPOINTS, max_size=8),
    errors=st.lists(TEXT, max_size=4),
    predecessors=st.lists(PREDECESSORS, max_size=5),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(VIEWS)
def test_no_rule_raises_whatever_it_is_told(view: RunView) -> None:
    for rule in RUN_RULES:
        found = rule.detect(view, rule.parameters)
        if found is not None:
            floats = [value for value in found.evidence.values() if isinstance(value, float)]
            assert all(map(math.isfinite, floats)), rule.name


@pytest.mark.parametrize("rule", RUN_RULES, ids=lambda rule: rule.name)
def test_no_rule_raises_where_points_are_told_apart_by_what_is_no_text(rule: RunRule) -> None:
    odd: dict[str, Any] = {name: [1, {"a": 2}] for name in c.ATTRIBUTES}
    told = replace(number(np.linspace(2.0, 1.0, 600).tolist()), attributes=odd)
    rule.detect(RunView(run=RUNNING, now=at(600), numbers={name: [told] for name in NAMES}), rule.parameters)


@pytest.mark.parametrize("rule", RUN_RULES, ids=lambda rule: rule.name)
def test_a_run_of_which_nothing_is_known_has_no_finding(rule: RunRule) -> None:
    assert rule.detect(RunView(run=RUNNING, now=RUNNING.started_at), rule.parameters) is None


@pytest.mark.parametrize("rule", RUN_RULES, ids=lambda rule: rule.name)
def test_every_parameter_is_documented_and_what_is_said_of_a_rule_is_in_sentences(rule: RunRule) -> None:
    documented = type(rule.parameters).__doc__ or ""
    for each in fields(rule.parameters):
        assert f"``{each.name}``" in documented or f"    {each.name}: " in documented, each.name
    assert rule.cause.endswith(".")
    assert rule.action.endswith(".")
    assert rule.name in c.RULE_ALERTS
