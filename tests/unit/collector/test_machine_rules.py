"""Rules about memory, hangs, collectives, ranks, data and pace: what they see, and what they leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch import conventions as c
from gradwatch_collector.findings.predecessors import Predecessor
from gradwatch_collector.findings.rule import Sighting
from gradwatch_collector.findings.rules import (
    data_starvation,
    memory_growth,
    out_of_memory,
    repeated_failure,
    slow_collective,
    stalled,
    step_time_regression,
    straggler,
)
from gradwatch_collector.findings.run_view import Number, RunView
from gradwatch_slo.runs import Status
from tests.batches import at
from tests.run_views import RUNNING, event, number, view

GIB = 2**30
OVER = replace(RUNNING, status=Status.FAILED, ended_at=at(999))
MEMORY = {"DEVICE": "cuda:0"}


def seen(module: Any, given: RunView) -> Sighting | None:
    """What the rule sees with its defaults."""
    found: Sighting | None = module.detect(given, module.RULE.parameters)
    return found


def found(module: Any, given: RunView) -> Sighting:
    sighting = seen(module, given)
    assert sighting is not None
    return sighting


def noise(count: int, spread: float, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(0, spread, count)


# --- Memory ---------------------------------------------------------------------------------------------------


def on_device(allocated: Sequence[float], *, every: float = 5.0, limit: float = 80.0, **rest: Any) -> RunView:
    """A run that tells once an interval what it holds of its device, in GiB."""
    held = np.asarray(allocated, np.float64) * GIB
    numbers = {
        c.DEVICE_MEMORY_ALLOCATED: [number(held, every=every, **MEMORY)],
        c.DEVICE_MEMORY_LIMIT: [number([limit * GIB] * len(held), every=every, **MEMORY)],
        c.DEVICE_MEMORY_PEAK: [number(np.maximum.accumulate(held), every=every, **MEMORY)],
        c.DEVICE_MEMORY_FRAGMENTATION: [number([0.25] * len(held), every=every, **MEMORY)],
        c.PROCESS_MEMORY: [number([GIB] * len(held), every=every)],
    }
    return view(numbers, seconds=every * len(held), **rest)


def test_a_leak_is_seen_long_before_the_device_is_full() -> None:
    leak = 20 + 0.05 * np.arange(600) + noise(600, 0.5)  # GiB: 10 to 50 minutes in, 600 to go
    sighting = found(memory_growth, on_device(leak))
    told = sighting.evidence
    assert (sighting.rank, told["where"], told["fragmentation"]) == (0, "cuda:0", 0.25)
    assert told["full_in_seconds"] == pytest.approx(600 * 5, rel=0.2)
    assert told["bytes_per_hour"] == pytest.approx(36 * GIB, rel=0.2)
    assert told["headroom"] == pytest.approx(0.37, abs=0.03)


def test_a_leak_that_begins_late_is_seen_long_before_it_is_half_of_the_run() -> None:
    steady, leak = np.full(10_000, 20.0), 20 + 0.1 * np.arange(200)
    sighting = found(memory_growth, on_device([*steady, *leak]))
    assert sighting.since is not None
    assert sighting.since >= at(5 * 10_000 * 0.99)


def test_memory_of_a_process_is_held_against_that_of_its_host() -> None:
    rss, limit = [GIB * (1 + 0.1 * each) for each in range(100)], [16.0 * GIB] * 100
    told = {c.PROCESS_MEMORY: [number(rss, rank=3)], c.HOST_MEMORY_LIMIT: [number(limit, rank=3)]}
    sighting = found(memory_growth, view(told, seconds=100))
    assert (sighting.rank, sighting.evidence["where"]) == (3, "process")


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(20 + 40 * (1 - np.exp(-np.arange(400) / 20)), id="warm-up"),
        pytest.param(np.repeat([20, 30, 35, 38], 100), id="steps of a caching allocator"),
        pytest.param(40 + 15 * np.sin(np.arange(400) / 3), id="up and down with the batches"),
        pytest.param(np.repeat([20, 50], [20, 380]), id="one large batch"),
        pytest.param(20 + 0.001 * np.arange(400), id="full in days only"),
        pytest.param(20 + noise(400, 5), id="noise"),
        pytest.param(np.full(400, np.nan), id="nothing that is a number"),
        pytest.param([20, 30, 40], id="the first exports"),
    ],
)
def test_what_is_no_leak_is_left_alone(held: Sequence[float]) -> None:
    for until in range(1, len(held) + 1, 7):
        assert seen(memory_growth, on_device(held[:until])) is None


def test_a_run_that_is_over_leaks_no_more() -> None:
    assert seen(memory_growth, on_device(20 + 0.1 * np.arange(500), run=OVER)) is None


OOM = event(50, STEP=49, DEVICE="cuda:0", OOM_DURING="backward", OOM_REQUESTED=2 * GIB)


@pytest.mark.parametrize(
    ("seconds", "run", "recovered"),
    [(50, RUNNING, False), (100, RUNNING, True), (50, OVER, False)],
)
def test_memory_that_ran_out_is_told_with_what_was_asked_for(seconds: int, run: Any, recovered: bool) -> None:
    told = {c.DEVICE_MEMORY_FRAGMENTATION: [number([0.5], **MEMORY)]}
    sighting = found(out_of_memory, view(told, seconds=seconds, run=run, events={c.OUT_OF_MEMORY.name: [OOM]}))
    assert (sighting.step, sighting.since) == (49, at(50))
    assert sighting.evidence == {
        "device": "cuda:0", "during": "backward", "requested_bytes": 2 * GIB, "times": 1,
        "recovered": recovered, "fragmentation": 0.5,
    }  # fmt: skip


def test_a_run_that_went_on_for_an_hour_is_well_again() -> None:
    assert seen(out_of_memory, view(seconds=3700, events={c.OUT_OF_MEMORY.name: [OOM]})) is None


# --- Hangs ----------------------------------------------------------------------------------------------------

FORWARD = 'MainThread:\n  File "/job/train.py", line 12, in batches\n    time.sleep(1)\n'
BACKWARD = (
    'MainThread:\n  File "/torch/autograd/graph.py", line 829, in _engine_run_backward\n    return run()\n'
)
BARRIER = 'MainThread:\n  File "/torch/distributed/distributed_c10d.py", line 4, in barrier\n    work.wait()\n'
OTHERS = '\nexport:\n  File "/torch/distributed/distributed_c10d.py", line 4, in barrier\n    work.wait()\n'


def hanging(stacks: Mapping[int, str], *, ranks: int = 4, steps: Mapping[int, int] | None = None) -> RunView:
    """Ranks of which some say at second 100 that no step has ended since second 40."""
    ends = (steps or {}).get
    numbers = [number(range(ends(rank, 40)), rank=rank) for rank in range(ranks)]
    told = [
        event(100 + rank / 10, rank=rank, STEP=ends(rank, 40) - 1, STACKS=stack + OTHERS)
        for rank, stack in stacks.items()
    ]
    return view({c.STEP_INDEX: numbers}, seconds=101, events={c.STALLED.name: told})


def test_the_rank_that_does_not_wait_in_a_collective_is_the_guilty_one() -> None:
    sighting = found(stalled, hanging({0: BACKWARD, 1: BARRIER, 2: FORWARD, 3: BACKWARD}))
    assert (sighting.rank, sighting.step, sighting.since) == (2, 39, at(100))
    assert sighting.evidence == {
        "seconds_without_a_step": 60.2,
        "ranks_hanging": [0, 1, 2, 3],
        "ranks_in_a_collective": [0, 1, 3],
        "at": "/job/train.py:12 in batches",
    }


def test_where_all_wait_the_rank_with_the_fewest_steps_is_guilty() -> None:
    stacks = dict.fromkeys(range(3), BACKWARD)
    assert found(stalled, hanging(stacks, ranks=3, steps={1: 39})).rank == 1


def test_where_all_wait_that_say_anything_the_one_that_says_nothing_is_guilty() -> None:
    assert found(stalled, hanging({0: BACKWARD, 1: BACKWARD, 3: BARRIER})).rank == 2


def test_a_rank_that_waits_for_its_device_is_not_the_guilty_one_for_that() -> None:
    # Rank 0 reads the loss, which waits for the collective as the others do; rank 2 hangs in its data.
    stacks = {0: FORWARD, 1: BARRIER, 2: FORWARD, 3: BACKWARD}
    assert found(stalled, hanging(stacks)).rank is None
    assert found(stalled, hanging(stacks, steps={2: 38})).rank == 2


def test_where_nothing_tells_them_apart_no_rank_is_named() -> None:
    assert found(stalled, hanging(dict.fromkeys(range(4), BACKWARD))).rank is None


def test_a_single_process_that_hangs_is_named_with_where_it_is() -> None:
    sighting = found(stalled, hanging({0: FORWARD}, ranks=1))
    assert (sighting.rank, sighting.evidence["at"]) == (0, "/job/train.py:12 in batches")


def test_a_run_that_goes_on_hangs_no_more() -> None:
    told = [event(100, STEP=39, STACKS=FORWARD)]
    assert seen(stalled, view(seconds=200, events={c.STALLED.name: told})) is None


def test_a_run_that_was_ended_hangs_no_more() -> None:
    assert seen(stalled, replace(hanging({0: FORWARD}, ranks=1), run=OVER)) is None


# --- Collectives and ranks ------------------------------------------------------------------------------------

SUM, COUNT = f"{c.COLLECTIVE_DURATION.name} sum", f"{c.COLLECTIVE_DURATION.name} count"


def collectives(
    means: Mapping[int, Sequence[float]], operation: str = "all_reduce", *, calls: int = 10, **rest: Any
) -> RunView:
    """Ranks that tell each second how long ten operations took on average."""
    numbers: dict[str, Sequence[Number]] = {
        SUM: [
            number(np.multiply(each, calls), rank=rank, COLLECTIVE=operation) for rank, each in means.items()
        ],
        COUNT: [number([calls] * len(each), rank=rank, COLLECTIVE=operation) for rank, each in means.items()],
    }
    given = view(seconds=100, **rest)
    return replace(given, numbers={**given.numbers, **numbers})


QUICK, SLOW = 0.02, 0.08


def test_an_operation_that_became_slow_for_all_ranks_is_seen() -> None:
    means = [QUICK] * 40 + [SLOW] * 3
    sighting = found(slow_collective, collectives({0: means, 1: [*means[:-1], 2 * SLOW]}))
    assert (sighting.rank, sighting.step, sighting.since) == (None, 40, at(41))
    assert sighting.evidence == {
        "operation": "all_reduce", "seconds": SLOW, "usual_seconds": QUICK, "ratio": 4.0, "ranks": 2,
        "against": "the start of the run",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("means", "operation"),
    [
        pytest.param({0: [QUICK] * 40 + [SLOW] * 2}, "all_reduce", id="a spike"),
        pytest.param({0: [QUICK] * 40 + [SLOW] * 9, 1: [QUICK] * 49}, "all_reduce", id="waits for a late rank"),
        pytest.param({0: [SLOW] + [QUICK] * 40}, "all_reduce", id="slow while connections are made"),
        pytest.param({0: [1e-4] * 40 + [5e-4] * 9}, "all_reduce", id="too short to matter"),
        pytest.param({0: [QUICK] * 40 + [SLOW] * 9}, c.DDP_EXPOSED, id="a part of another"),
        pytest.param({0: [QUICK, SLOW, SLOW, SLOW]}, "all_reduce", id="nobody knows yet what is usual"),
        pytest.param({0: [QUICK] * 40 + [np.nan] * 9}, "all_reduce", id="no numbers"),
    ],
)
def test_an_operation_that_is_not_slow_is_left_alone(
    means: Mapping[int, Sequence[float]], operation: str
) -> None:
    assert seen(slow_collective, collectives(means, operation)) is None


def test_an_operation_that_was_slow_from_the_start_is_held_against_predecessors() -> None:
    earlier = [earlier_run(summary={"collective_p95": QUICK}) for _ in range(3)]
    sighting = found(slow_collective, collectives({0: [SLOW] * 9}, predecessors=earlier))
    assert sighting.evidence["against"] == "the 95th percentile of predecessors"
    assert seen(slow_collective, collectives({0: [SLOW] * 9}, predecessors=earlier[:2])) is None


def backwards(seconds: Mapping[int, Any], *, step: float = 0.1, every: float | None = None) -> RunView:
    """Ranks that tell of the backward of each step; all of their steps last equally long, for they wait."""
    return view(
        {
            c.PHASE_DURATION: [
                number(each, rank=rank, every=every or step, PHASE="backward") for rank, each in seconds.items()
            ],
            c.STEP_DURATION: [
                number([step] * len(each), rank=rank, every=every or step) for rank, each in seconds.items()
            ],
            c.DATA_WAIT: [
                number([0.01 * rank] * len(each), rank=rank, every=step) for rank, each in seconds.items()
            ],
            c.PROCESS_MEMORY: [number([1] * 40)],
        },
        seconds=40,
    )


def test_the_rank_that_waits_least_is_the_straggler() -> None:
    sighting = found(straggler, backwards({0: [0.06] * 300, 1: [0.07] * 300, 2: [0.02] * 300}))
    assert sighting.rank == 2
    assert sighting.evidence == {
        "others_wait_seconds": 0.065, "it_waits_seconds": 0.02, "share_of_step": 0.45, "step_seconds": 0.1,
        "by": "backward", "data_wait_seconds": 0.02,
    }  # fmt: skip


def test_a_straggler_is_seen_though_now_and_then_a_step_takes_longer() -> None:
    sighting = found(straggler, backwards({0: [1.2] * 60, 1: [0.2] * 60}, step=2.0, every=3.0))
    assert sighting.rank == 1


LEVEL = np.full(300, 0.06)


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param({0: LEVEL, 1: LEVEL + noise(300, 0.01)}, id="noise"),
        pytest.param({0: LEVEL, 1: np.where(np.arange(300) // 10 % 2, 0.02, 0.1)}, id="now one, now the other"),
        pytest.param({0: LEVEL, 1: np.where(np.arange(300) < 285, 0.06, 0.01)}, id="a spike"),
        pytest.param({0: LEVEL, 1: LEVEL - 0.02}, id="too little to matter"),
        pytest.param({0: LEVEL}, id="alone"),
        pytest.param({0: LEVEL[:5], 1: LEVEL[:5] / 9}, id="the first steps"),
    ],
)
def test_ranks_that_keep_pace_are_left_alone(seconds: Mapping[int, Any]) -> None:
    assert seen(straggler, backwards(seconds)) is None


@pytest.mark.parametrize(
    ("operation", "by"), [("all_reduce", "collective operations"), (c.DDP_ALL_REDUCE, "all-reduce")]
)
def test_without_phases_the_time_in_collectives_tells_who_is_late(operation: str, by: str) -> None:
    steps = {c.STEP_DURATION: [number([0.1] * 400, rank=rank, every=0.1) for rank in (0, 1)]}
    memory = {c.PROCESS_MEMORY: [number([1] * 40)]}
    told = collectives({0: [0.05] * 40, 1: [0.001] * 40}, operation)
    given = replace(told, numbers={**told.numbers, **view(steps | memory, seconds=40).numbers})
    sighting = found(straggler, given)
    assert (sighting.rank, sighting.evidence["by"]) == (1, by)


# --- Data and pace --------------------------------------------------------------------------------------------


def paced(steps: Sequence[float], waits: Sequence[float], **rest: Any) -> RunView:
    """A run that exports every five seconds and tells of each step how long it lasted and waited."""
    ends = np.cumsum(steps)
    told = {
        metric: [number(values, every=float(ends[-1]) / len(ends))]
        for metric, values in ((c.STEP_DURATION, steps), (c.DATA_WAIT, waits))
    }
    exports = max(int(ends[-1] / 5), 1)
    told[c.PROCESS_MEMORY] = [number([1] * exports, every=5)]
    return view(told, seconds=float(ends[-1]), **rest)


@pytest.mark.parametrize("step", [0.02, 0.5, 12.0])
def test_a_loop_that_waits_for_its_data_is_starved_at_any_pace(step: float) -> None:
    count = max(int(60 / step), 40)
    sighting = found(data_starvation, paced([step] * count, [0.6 * step] * count))
    assert sighting.evidence == pytest.approx({"share": 0.6, "wait_seconds": 0.6 * step, "step_seconds": step})


def test_workers_that_bring_their_batches_all_at_once_starve_it_too() -> None:
    found(data_starvation, paced([0.1] * 400, [0.25, 0, 0, 0] * 100))


@pytest.mark.parametrize(
    ("steps", "waits"),
    [
        pytest.param([0.1] * 400, [0.02] * 400, id="a little"),
        pytest.param([0.1] * 390 + [4.0] + [0.1] * 9, [0.01] * 390 + [3.9] + [0.01] * 9, id="an epoch begins"),
        pytest.param([0.001] * 9000, [0.0006] * 9000, id="steps of a toy"),
        pytest.param([0.1] * 5, [0.09] * 5, id="the first steps"),
        pytest.param([0.1] * 400, [np.nan] * 400, id="no numbers"),
        pytest.param([0.1] * 400, [0.09] * 340 + [0.001] * 60, id="not any more"),
    ],
)
def test_a_loop_that_gets_its_data_is_left_alone(steps: Sequence[float], waits: Sequence[float]) -> None:
    assert seen(data_starvation, paced(steps, waits)) is None


OLD = {c.TORCH_VERSION: "2.12", c.GIT_COMMIT: "aaaa", c.DEVICE_NAME: "H200"}
NEW = {**OLD, c.TORCH_VERSION: "2.13"}


def earlier_run(
    resource: Mapping[str, Any] | None = None,
    *,
    step: float = 0.1,
    summary: Mapping[str, Any] | None = None,
    errors: Sequence[str] = (),
) -> Predecessor:
    """A run of 1 000 steps that went on for twice the time that they took."""
    run = replace(RUNNING, status=Status.SUCCEEDED, started_at=at(-9000), ended_at=at(-9000 + 2000 * step))
    known = {"steps": 1000, "effective_time_ratio": 0.5} if summary is None else summary
    return Predecessor(run=run, resource=resource or {}, summary=known, errors=errors)


def test_steps_that_take_longer_with_a_new_version_are_seen_and_it_is_named() -> None:
    earlier = [earlier_run(OLD) for _ in range(4)]
    given = paced([0.16] * 500, [0.01] * 500, resource=NEW, predecessors=earlier)
    assert found(step_time_regression, given).evidence == {
        "step_seconds": 0.15, "usual_seconds": 0.1, "ratio": 1.5, "predecessors": 4,
        "changed": {"torch": "2.12 -> 2.13"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "waits", "resource", "earlier"),
    [
        pytest.param([0.11] * 500, 0.0, NEW, [earlier_run(OLD)] * 4, id="hardly slower"),
        pytest.param([0.16] * 500, 0.06, NEW, [earlier_run(OLD)] * 4, id="only waits for data"),
        pytest.param([0.16] * 500, 0.0, OLD, [earlier_run(OLD)] * 4, id="nothing changed"),
        pytest.param(
            [0.16] * 500, 0.0, {**NEW, c.DEVICE_NAME: "L4"}, [earlier_run(OLD)] * 4, id="other device"
        ),
        pytest.param([0.16] * 500, 0.0, NEW, [earlier_run(OLD)] * 2, id="too few to know"),
        pytest.param([0.16] * 100, 0.0, NEW, [earlier_run(OLD)] * 4, id="too few steps"),
        pytest.param(
            [0.16] * 500,
            0.0,
            NEW,
            [earlier_run(NEW), *[earlier_run(OLD)] * 4],
            id="the version is fast elsewhere",
        ),
        pytest.param([0.16] * 500, 0.0, NEW, [earlier_run(OLD, summary={})] * 4, id="not summarised"),
        pytest.param([9.0] + [0.1] * 499, 0.0, NEW, [earlier_run(OLD)] * 4, id="a slow first step"),
    ],
)
def test_steps_that_are_as_fast_as_ever_are_left_alone(
    steps: Sequence[float], waits: float, resource: Mapping[str, Any], earlier: Sequence[Predecessor]
) -> None:
    given = paced(steps, [waits] * len(steps), resource=resource, predecessors=earlier)
    assert seen(step_time_regression, given) is None


def test_the_same_error_three_times_is_a_repeated_failure_whatever_its_numbers() -> None:
    earlier = [earlier_run(errors=[f"KeyError: 'classes' at 0x7f{each}"]) for each in (1, 2)]
    given = view(errors=["ValueError: once", "KeyError: 'classes' at 0x7f33"], run=OVER, predecessors=earlier)
    told = found(repeated_failure, given).evidence
    assert told == {
        "error": "KeyError: 'classes' at 0x7f33", "times": 3, "attempts_of_this_run": 1, "runs": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("errors", "before"),
    [
        ((), ["a"] * 5),
        (["a"], ["a"]),
        (["a"], ["b", "b", "b"]),
        (["a", "a", "b"], ["b"]),
    ],
)
def test_errors_that_differ_are_no_repeated_failure(errors: Sequence[str], before: Sequence[str]) -> None:
    earlier = [earlier_run(errors=[error]) for error in before]
    assert seen(repeated_failure, view(errors=errors, run=OVER, predecessors=earlier)) is None


def test_a_retry_that_fails_of_the_same_is_a_repeated_failure_at_once() -> None:
    assert found(repeated_failure, view(errors=["a 1", "a 2"])).evidence["attempts_of_this_run"] == 2
