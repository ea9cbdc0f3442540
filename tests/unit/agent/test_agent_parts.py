"""The agent's small parts: settings, target, clock, histogram, budget, identity."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.clock import Clock
from gradwatch.export.aggregate import LayerAggregate, bucket_index
from gradwatch.export.exporter import ExportThread
from gradwatch.identity import Identity, git_commit
from gradwatch.loop.budget import MAX_INTERVAL, Budget
from gradwatch.safety import Throttle
from gradwatch.settings import DEFAULT_ENDPOINT, Settings, SettingsError
from gradwatch.target import Target
from gradwatch.testing import InMemoryExporter

NORMS = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)


# --- Settings --------------------------------------------------------------------------------------------


def test_a_keyword_beats_gradwatch_beats_otel_beats_the_default() -> None:
    otel = {"OTEL_SERVICE_NAME": "from-otel"}
    ours = {**otel, "GRADWATCH_JOB": "from-ours"}
    assert Settings.resolve({}, {}, "script").job == "script"
    assert Settings.resolve({}, otel, "script").job == "from-otel"
    assert Settings.resolve({"job": None}, ours, "script").job == "from-ours"
    assert Settings.resolve({"job": "said"}, ours, "script").job == "said"


def test_the_standard_variables_are_honoured() -> None:
    settings = Settings.resolve(
        {},
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector:4318/",
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abc,x=1",
            "OTEL_RESOURCE_ATTRIBUTES": "k8s.pod.name=p-0,service.name=named",
            "OTEL_SDK_DISABLED": "true",
        },
        "script",
    )
    assert settings.endpoint == "https://collector:4318"
    assert settings.headers == {"authorization": "Bearer abc", "x": "1"}
    assert settings.resource == {"k8s.pod.name": "p-0"}
    assert settings.job == "named"
    assert settings.disabled


def test_defaults() -> None:
    settings = Settings.resolve({}, {}, "script")
    assert settings.endpoint == DEFAULT_ENDPOINT
    assert (settings.tier, settings.overhead_budget) == ("experiment", 0.005)
    assert (settings.export_interval, settings.heartbeat_interval) == (5.0, 5.0)
    assert settings.capture_loss
    assert not settings.disabled


def test_signs_of_life_come_as_often_as_was_asked() -> None:
    beats = threading.Semaphore(0)
    thread = ExportThread(
        InMemoryExporter(), dict, lambda *_: [], beats.release, lambda: None, interval=math.inf, beat=0.01
    )
    thread.start()
    give_up = time.monotonic() + 30
    # Every five seconds, as by default, would take a minute.
    assert all(beats.acquire(timeout=give_up - time.monotonic()) for _ in range(12))
    thread.close(1)


@pytest.mark.parametrize(
    ("keywords", "environ", "named"),
    [
        ({"target": "val_loss=0.5"}, {}, "target='val_loss=0.5'"),
        ({"tier": "prod"}, {}, "tier='prod'"),
        ({"every": 0}, {}, "every=0"),
        ({"every": 1.5}, {}, "every=1.5"),
        ({"attempt": True}, {}, "attempt=True"),
        ({"deadline": -1}, {}, "deadline=-1"),
        ({"endpoint": "localhost:4318"}, {}, "endpoint='localhost:4318'"),
        ({"config": 3}, {}, "config=3"),
        ({}, {"GRADWATCH_RANK": "one"}, "GRADWATCH_RANK='one'"),
        ({}, {"GRADWATCH_CAPTURE_LOSS": "perhaps"}, "GRADWATCH_CAPTURE_LOSS='perhaps'"),
        ({}, {"GRADWATCH_OVERHEAD_BUDGET": "nan"}, "GRADWATCH_OVERHEAD_BUDGET='nan'"),
    ],
)
def test_a_bad_setting_is_one_clear_line(
    keywords: dict[str, object], environ: dict[str, str], named: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.resolve(keywords, environ, "script")
    message = str(caught.value)
    assert named in message
    assert "expected" in message
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "headers",
    [
        "authorization=Bearer%20s3cret-%E2%82%AC",
        "authorization=Bearer%20s3cret%0A",
        "s3cret token=x",
        "a=%20s3cret",
    ],
)
def test_a_header_that_cannot_be_sent_is_said_at_the_start_without_its_value(headers: str) -> None:
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_HEADERS") as caught:
        Settings.resolve({}, {"OTEL_EXPORTER_OTLP_HEADERS": headers}, "script")
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_in_an_endpoint_is_not_printed() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.resolve({"endpoint": "ftp://user:s3cret@collector"}, {}, "script")
    assert "s3cret" not in str(caught.value)


# --- Target ----------------------------------------------------------------------------------------------


@given(
    st.from_regex(r"[a-z_][a-z0-9_./-]{0,20}", fullmatch=True),
    st.sampled_from(["<=", ">=", "<", ">"]),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_target_survives_the_round_trip(metric: str, comparison: str, bound: float) -> None:
    target = Target(metric, comparison, bound)
    assert Target.parse(str(target)) == target
    assert Target.parse(f"  {metric} {comparison}  {bound!r} ") == target


@given(st.text(max_size=30))
def test_any_other_text_is_a_value_error_or_a_target(text: str) -> None:
    message = ""
    try:
        assert math.isfinite(Target.parse(text).bound)
    except ValueError as error:
        message = str(error)
    assert not message or repr(text) in message


def test_nan_never_reaches_a_target() -> None:
    assert not Target.parse("loss<=1").holds(math.nan)
    assert not Target.parse("loss>=1").holds(math.nan)
    assert Target.parse("accuracy>=0.9").holds(0.9)
    assert not Target.parse("accuracy>0.9").holds(0.9)


# --- Clock -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5)))
def test_a_stream_is_strictly_increasing_whatever_the_clocks_do(moves: list[int]) -> None:
    now = [1000]

    def monotonic() -> int:
        now[0] += moves.pop() if moves else 0
        return now[0]

    clock = Clock(lambda: 10**18, monotonic)
    times = [clock.now() for _ in range(20)]
    assert times == sorted(set(times))
    assert clock.branch().now() < times[-1] + 100


def test_a_wall_clock_that_jumps_moves_nothing() -> None:
    wall = [10**18]
    clock = Clock(lambda: wall[0], lambda: 7)
    wall[0] = 0
    assert clock.now() == 10**18


# --- Histogram -------------------------------------------------------------------------------------------


@given(st.floats(min_value=0.0, exclude_min=True, allow_nan=False, allow_infinity=False))
def test_a_value_is_inside_its_bucket(value: float) -> None:
    index = bucket_index(value)
    # Compared as logarithms with the rounding of one; the bounds themselves overflow a float.
    assert index / 8 <= math.log2(value) + 1e-9
    assert math.log2(value) <= (index + 1) / 8 + 1e-9


@given(st.integers(-1074, 1023))
def test_powers_of_two_are_upper_bounds_exactly(exponent: int) -> None:
    assert bucket_index(math.ldexp(1.0, exponent)) == 8 * exponent - 1


@given(st.lists(NORMS | st.sampled_from([0.0, 5e-324, math.inf, math.nan]), max_size=40))
def test_a_layer_aggregate_equals_the_dense_computation(norms: list[float]) -> None:
    aggregate = LayerAggregate()
    for norm in norms:
        aggregate.add(norm)
    finite = [norm for norm in norms if math.isfinite(norm)]
    point = aggregate.point(1, 2, {})
    if not finite:
        assert point is None
        return
    assert point is not None
    assert (point.total, point.minimum, point.maximum) == (len(finite), min(finite), max(finite))
    assert point.sum == pytest.approx(sum(finite))
    assert point.zero_count == finite.count(0.0)
    counts = {point.offset + i: n for i, n in enumerate(point.buckets) if n}
    dense: dict[int, int] = {}
    for norm in finite:
        if norm:
            dense[bucket_index(norm)] = dense.get(bucket_index(norm), 0) + 1
    assert counts == dense


# --- Budget ----------------------------------------------------------------------------------------------


def simulate(
    share: float, observed_cost: float, thin_cost: float, step: float, steps: int
) -> tuple[float, int]:
    budget, spent, observations, at, since = Budget(share, None, thin_cost * 1e9), 0.0, 0, 0, 0
    while at < steps:
        observations += 1
        interval = budget.next_interval(round(observed_cost * 1e9), since, round(since * step * 1e9))
        since = min(interval, steps - at)
        spent += observed_cost + (since - 1) * thin_cost
        at += since
    return spent / (steps * step), observations


@given(st.floats(1e-6, 1e-3), st.floats(1e-3, 1e-1))
def test_the_budget_holds_whatever_a_read_costs(observed_cost: float, step: float) -> None:
    steps = 5 * MAX_INTERVAL
    share, observations = simulate(0.005, observed_cost, 1e-6, step, steps)
    allowed = max(0.005, 1e-6 / step)
    # Three first reads to learn the cost, and one in a thousand however dear it is.
    assert share <= allowed + (3 / steps + 1 / MAX_INTERVAL) * observed_cost / step + 1e-9
    assert observations >= steps / MAX_INTERVAL


def test_a_cheap_read_is_made_every_step() -> None:
    assert simulate(0.005, 1e-5, 1e-6, 0.03, 1000)[1] == 1000


def test_the_time_of_our_own_threads_is_taken_from_the_budget() -> None:
    budget = Budget(0.005)
    for _ in range(20):
        unknown = budget.next_interval(spent=300_000, steps=1, lasted=30_000_000)
    budget.background = 0.0
    alone = budget.next_interval(spent=300_000, steps=1, lasted=30_000_000)
    budget.background = 140_000.0
    shared = budget.next_interval(spent=300_000, steps=1, lasted=30_000_000)
    # Allowed are 150 us a step, of which nothing is gone, then 140; and half, as long as nobody knows.
    assert (unknown, alone, shared) == (4, 2, 30)
    budget.background = 200_000.0
    assert budget.next_interval(spent=300_000, steps=1, lasted=30_000_000) == MAX_INTERVAL


def test_neither_the_first_read_nor_a_slow_one_thins_what_follows() -> None:
    def reads(*spent: int) -> int:
        budget = Budget(0.005, None, thin_cost=10_000.0)
        budget.background = 0.0
        intervals = [budget.next_interval(each, 1, 30_000_000) for each in (10**9, *spent)]
        assert intervals[:2] == [1, 1]  # three reads to learn what one costs
        return intervals[-1]

    ordinary = [290_000] * 40
    assert reads(*ordinary) == 2
    assert reads(*ordinary, 10**9) == 3  # taken for four times the mean, of which a tenth counts


def test_where_many_steps_lie_between_two_reads_their_time_is_shared_among_them() -> None:
    budget = Budget(0.005)
    budget.background = 0.0
    for _ in range(5):
        interval = budget.next_interval(300_000, 10, 10 * 6_000_000)
    assert interval == 10


def test_every_n_is_every_nth() -> None:
    budget = Budget(0.005, every=3)
    assert [budget.next_interval(10**9, 3, 1) for _ in range(4)] == [3, 3, 3, 3]


# --- Identity --------------------------------------------------------------------------------------------


def test_torchrun_says_who_we_are_unless_its_run_id_is_none() -> None:
    torchrun = {
        "TORCHELASTIC_RUN_ID": "job-7",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "RANK": "3",
        "WORLD_SIZE": "4",
    }
    identity = Identity.resolve(Settings.resolve({}, {}, "script"), torchrun)
    assert (identity.run_id, identity.attempt, identity.rank, identity.world_size) == ("job-7", 3, 3, 4)
    unnamed = Identity.resolve(Settings.resolve({}, {}, "script"), {**torchrun, "TORCHELASTIC_RUN_ID": "none"})
    assert unnamed.run_id != "none"
    told = Settings.resolve({"run_id": "mine", "attempt": "5", "rank": "1"}, {}, "script")
    identity = Identity.resolve(told, torchrun)
    assert (identity.run_id, identity.attempt, identity.rank) == ("mine", 5, 1)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_what_git_says(tmp_path: Path) -> None:
    def git(*arguments: str, where: Path = tmp_path) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=where, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    assert git_commit(tmp_path) is None
    git("commit", "-q", "--allow-empty", "-m", "one")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert git_commit(below) == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    git("worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other")
    git("commit", "-q", "--allow-empty", "-m", "two", where=tmp_path / "tree")
    assert git_commit(tmp_path / "tree") == git("rev-parse", "HEAD", where=tmp_path / "tree")


# --- Safety and import -----------------------------------------------------------------------------------


def test_one_message_a_minute() -> None:
    now = [0.0]
    throttle = Throttle(lambda: now[0])
    assert [throttle.allows() for _ in range(3)] == [True, False, False]
    now[0] = 61.0
    assert throttle.allows()
    assert throttle.total == 4


def test_import_gradwatch_imports_neither_torch_nor_opentelemetry() -> None:
    heavy = ("torch", "opentelemetry", "numpy")
    code = f"import sys, gradwatch, gradwatch.testing; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert output.stdout.strip() == "[]"
