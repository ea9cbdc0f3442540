"""One tick: silence, findings, objectives; and what /metrics shows of it, on every database."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, func, select

from gradwatch import conventions as c
from gradwatch_collector.api.views import show_run
from gradwatch_collector.findings import Detection
from gradwatch_collector.findings.detection import Found
from gradwatch_collector.findings.silences import About, silence
from gradwatch_collector.records import Batch, EventRecord, ProcessKey, Received
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.runs.live import LiveRuns
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service import exposition, snapshot
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.service.exposition import RunMetrics
from gradwatch_collector.service.lease import Lease
from gradwatch_collector.service.upkeep import Upkeep
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.database_clock import DatabaseClock
from gradwatch_collector.storage.retention import EMBEDDED
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from gradwatch_slo.durations import Duration
from gradwatch_slo.objective import Objective
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.slices import Slicing
from gradwatch_slo.statistics import binomial_upper_tail
from tests.batches import at, batch, event, scalar, source
from tests.schemas import valid

HOUR = 3600


class Service:
    """A registry, an evaluator and /metrics over one database, with a clock that only moves when told."""

    def __init__(
        self,
        database: Engine,
        lost_after: float = 30,
        objectives: Sequence[Objective] = default_objectives().objectives,
    ) -> None:
        self.seconds = 0.0
        self.database = database
        self.registry = Registry(lost_after)
        self.live = LiveRuns()
        lease = Lease(database)
        self.evaluator = Evaluator(
            database,
            self.live,
            objectives,
            lease=lease,
            lost_after=lost_after,
            now=lambda: at(self.seconds),
        )
        upkeep = Upkeep(database, lease, DatabaseClock(), EMBEDDED)
        self.metrics = CollectorRegistry()
        self.metrics.register(RunMetrics(self.evaluator, self.live, upkeep))
        self.evaluator.tick()

    def receive(self, *batches: Batch) -> None:
        now = at(self.seconds)
        for received in batches:
            with transaction(self.database) as connection:
                (key,) = self.registry.resolve(connection, [(received.source, now)])
                self.registry.apply(connection, [Received(key, received, now)])
            self.live.update([Received(key, received, now)])

    def tick(self, seconds: float) -> None:
        """Evaluate every ten seconds up to a moment within the next two minutes, or jump there."""
        while 10 < seconds - self.seconds <= 120:
            self.seconds += 10
            self.evaluator.tick()
        self.seconds = seconds
        self.evaluator.tick()

    def samples(self, family: c.Family) -> dict[tuple[str, ...], float]:
        """Values of a family by its labels, in the order conventions declares them."""
        text = generate_latest(self.metrics).decode()
        found = {}
        for shown in text_string_to_metric_families(text):
            for sample in shown.samples:
                if sample.name == family.name:
                    assert set(sample.labels) == set(family.labels)
                    found[tuple(sample.labels[label] for label in family.labels)] = sample.value
        return found


@pytest.fixture
def service(database: Engine) -> Service:
    return Service(database)


def start(run_id: str, seconds: float = 0, **attributes: Any) -> Batch:
    return batch(source(run_id, instance=run_id, **attributes), event(c.RUN_STARTED, seconds))


def end(run_id: str, seconds: float, status: str, **attributes: Any) -> Batch:
    return batch(source(run_id, instance=run_id, **attributes), event(c.RUN_ENDED, seconds, 9, STATUS=status))


def labels(family: c.Family, **values: str) -> tuple[str, ...]:
    defaults: Mapping[str, str] = {"training_job": "digits", "tier": "experiment"}
    return tuple({**defaults, **values}.get(label, "") for label in family.labels)


def test_every_family_and_label_is_one_that_conventions_names(service: Service) -> None:
    service.receive(start("a"), batch(source("a", instance="a"), frames=[scalar(c.LOSS, [1], [0.5])]))
    service.tick(1)
    text = generate_latest(service.metrics).decode()
    named = {family.name.removesuffix("_total"): family for family in c.FAMILIES}
    for shown in text_string_to_metric_families(text):
        assert shown.name in named
        assert shown.type == named[shown.name].kind
        for sample in shown.samples:
            assert set(sample.labels) == set(named[shown.name].labels)


def test_a_live_run_shows_its_newest_values(service: Service) -> None:
    frames = [scalar(c.LOSS, [1, 2], [0.5, 0.25]), scalar(c.NONFINITE, [1, 2], [1, 2])]
    service.receive(start("a"), batch(source("a", instance="a"), frames=frames))
    service.tick(3)
    loss, nonfinite = c.family_of(c.LOSS), c.family_of(c.NONFINITE)
    assert service.samples(loss) == {labels(loss, run_id="a"): 0.25}
    assert service.samples(nonfinite) == {labels(nonfinite, run_id="a"): 3.0}
    assert service.samples(c.RUNS_LIVE) == {labels(c.RUNS_LIVE): 1.0}


def test_a_run_that_succeeded_leaves_no_series_of_its_own(service: Service) -> None:
    service.receive(start("a"))
    service.tick(1)
    service.receive(end("a", 2, "succeeded"))
    service.tick(3)
    assert service.samples(c.RUN_INFO) == {}
    assert service.samples(c.RUNS_LIVE) == {labels(c.RUNS_LIVE): 0.0}
    assert service.samples(c.RUNS_ENDED)[labels(c.RUNS_ENDED, status="succeeded")] == 1.0


def test_counters_exist_at_zero_before_the_first_failure(service: Service) -> None:
    service.receive(start("a"))
    service.tick(1)
    assert service.samples(c.RUNS_ENDED)[labels(c.RUNS_ENDED, status="failed")] == 0.0
    assert service.samples(c.FINDINGS_OPENED)[labels(c.FINDINGS_OPENED, rule="nonfinite")] == 0.0


def test_a_failed_run_is_shown_for_an_hour_and_its_finding_is_active(service: Service) -> None:
    service.receive(start("a", tier="production"), end("a", 2, "failed", tier="production"))
    service.tick(3)
    active = labels(c.FINDING_ACTIVE, run_id="a", rule="run_failed", severity="page", tier="production")
    assert service.samples(c.FINDING_ACTIVE) == {active: 1.0}
    service.tick(HOUR)
    assert active in service.samples(c.FINDING_ACTIVE)
    service.tick(HOUR + 3)
    assert service.samples(c.FINDING_ACTIVE) == {}
    assert service.samples(c.RUN_INFO) == {}
    assert (
        service.samples(c.FINDINGS_OPENED)[labels(c.FINDINGS_OPENED, rule="run_failed", tier="production")]
        == 1.0
    )


@pytest.mark.parametrize("status", ["failed", "lost"])
def test_an_ending_that_becomes_known_hours_late_is_found_and_pages_nobody(
    service: Service, status: str
) -> None:
    """The collector was away, or it comes from the disk of one that was killed long ago."""
    service.tick(2 * HOUR)
    service.receive(start("a", tier="production"))
    if status == "failed":
        service.receive(end("a", 2, "failed", tier="production"))
    service.tick(2 * HOUR + 11)
    ((run, found),) = service.evaluator.snapshot.findings
    assert (run.status, found.rule, found.severity) == (status, f"run_{status}", "ticket")
    service.tick(3 * HOUR + 12)
    assert service.evaluator.snapshot.findings == []


def test_a_run_that_was_heard_and_fell_silent_while_the_collector_was_away_pages_hours_later(
    service: Service,
) -> None:
    service.receive(start("a", tier="production"))
    service.tick(10)
    for seconds in (3 * HOUR, 3 * HOUR + 29, 3 * HOUR + 31):
        service.tick(seconds)
    ((run, found),) = service.evaluator.snapshot.findings
    assert (run.ended_at, found.rule, found.severity) == (at(0), "run_lost", "page")


@pytest.mark.parametrize(("lost_after", "every"), [(1, 1.01), (2, 1.01), (30, 16)])
def test_a_run_is_lost_however_long_a_tick_takes(database: Engine, lost_after: int, every: float) -> None:
    service = Service(database, lost_after)
    service.receive(start("a"))
    for tick in range(1, 6):
        service.seconds = tick * every
        service.evaluator.tick()
    assert [found.rule for _, found in service.evaluator.snapshot.findings] == ["run_lost"]


def test_a_detector_that_fails_keeps_no_run_alive(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Found:
        raise ZeroDivisionError

    monkeypatch.setattr(Detection, "look", broken)
    service.receive(start("a"))
    for seconds in range(5, 41, 5):
        with pytest.raises(ZeroDivisionError):
            service.tick(seconds)
    with service.database.connect() as connection:
        assert [run.status for run in load_runs(connection)] == ["lost"]


def test_a_nan_in_a_run_that_came_and_went_between_two_ticks_is_found(service: Service) -> None:
    service.receive(start("a"), end("a", 2, "succeeded"))
    with transaction(service.database) as connection:
        bad = Received(
            ProcessKey("a", 1, 0, "a"), batch(source("a"), event(c.NONFINITE_STEP, 1, 1, STEP=3)), at(2)
        )
        store(connection, SeriesIds(), [bad])
    service.tick(3)
    ((run, found),) = service.evaluator.snapshot.findings
    assert (run.run_id, found.rule, found.step) == ("a", "nonfinite", 3)
    assert service.samples(c.RUN_INFO) == {}
    service.tick(HOUR + 3)
    assert service.samples(c.FINDING_ACTIVE) == {}


def test_a_silent_run_is_lost_and_its_return_resolves_the_finding(service: Service) -> None:
    service.receive(start("a"))
    service.tick(30)
    assert service.evaluator.snapshot.findings == []
    service.tick(31)
    ((run, found),) = service.evaluator.snapshot.findings
    assert (run.status, found.rule) == ("lost", "run_lost")
    service.receive(batch(source("a", instance="a"), event(c.RUN_HEARTBEAT, 32, 1)))
    service.tick(33)
    assert service.evaluator.snapshot.findings == []


def test_silence_while_the_collector_was_away_does_not_count(service: Service) -> None:
    service.receive(start("a"))
    service.tick(10)
    service.tick(610)
    assert service.evaluator.snapshot.findings == []
    service.tick(640)
    assert service.evaluator.snapshot.findings == []
    service.tick(641)
    assert [found.rule for _, found in service.evaluator.snapshot.findings] == ["run_lost"]


@pytest.mark.parametrize("nonsense", ["abc", math.inf, math.nan, 1e300, 2**80, True, ["a"], {"a": 1}, None])
def test_nonsense_from_one_sender_stops_nothing_for_the_others(service: Service, nonsense: Any) -> None:
    odd = source("odd", instance="odd", deadline=nonsense, target=nonsense, model=nonsense, team=nonsense)
    named = ("STEP", "LAYER_NAME", "BORN_IN", "NONFINITE_STEPS", "NONFINITE_LAYERS", "NONFINITE_ELEMENTS")
    reports = [event(c.NONFINITE_STEP, n, n, **dict.fromkeys(named, nonsense)) for n in (1, 2)]
    ending = event(c.RUN_ENDED, 3, 3, **dict.fromkeys(("STEP", "STATUS", "REASON", "EXIT_CODE"), nonsense))
    bad = batch(odd, event(c.RUN_STARTED, 0), *reports, ending)
    for finite in (json_safe(bad), json_safe(batch(odd, event(c.RUN_HEARTBEAT, 4, 4, STEP=nonsense)))):
        service.receive(finite)
        with transaction(service.database) as connection:
            store(connection, SeriesIds(), [Received(ProcessKey("odd", 1, 0, "odd"), finite, at(5))])
    service.receive(start("fine"), end("fine", 2, "failed"))
    service.tick(6)
    found = {(run.run_id, seen.rule) for run, seen in service.evaluator.snapshot.findings}
    assert found == {("odd", "nonfinite"), ("odd", "run_failed"), ("fine", "run_failed")}
    with service.database.connect() as connection:
        shown = show_run(connection, "odd")
    valid(json.loads(json.dumps(shown, allow_nan=False)), "run-detail")


def json_safe(received: Batch) -> Batch:
    """What the receiver makes of attributes that JSON cannot hold: NaN and infinities become text."""

    def safe(attributes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in attributes.items()
        }

    return replace(
        received,
        source=replace(received.source, resource=safe(received.source.resource)),
        events=[replace(each, attributes=safe(each.attributes)) for each in received.events],
    )


def test_a_replay_of_older_values_does_not_overwrite_newer_ones(service: Service) -> None:
    service.receive(start("a"))
    for seconds, loss in ((100, 1.0), (50, 99.0)):
        late = scalar(c.LOGGED, [seconds], [loss], **{c.METRIC_NAME: "val_loss"})
        frames = [scalar(c.LOSS, [seconds], [loss]), late]
        service.receive(batch(source("a", instance="a"), frames=frames))
    service.tick(1)
    assert service.samples(c.family_of(c.LOSS)) == {labels(c.family_of(c.LOSS), run_id="a"): 1.0}
    assert service.samples(c.LAST_METRIC) == {labels(c.LAST_METRIC, name="val_loss"): 1.0}
    with service.database.connect() as connection:
        shown = show_run(connection, "a")
    assert shown is not None
    assert shown["last_loss"] == 1.0


def test_names_made_up_by_a_loop_do_not_flood_the_metrics(service: Service) -> None:
    frames = [scalar(c.LOGGED, [1], [0.5], **{c.METRIC_NAME: f"name{n}"}) for n in range(1000)]
    service.receive(start("a"), batch(source("a", instance="a"), frames=frames))
    service.tick(2)
    assert 10 <= len(service.samples(c.LAST_METRIC)) <= 100


def test_objectives_are_shown_with_verdict_budget_and_p_value(service: Service) -> None:
    for index in range(10):
        service.receive(start(f"r{index}"), end(f"r{index}", 100, "failed" if index < 6 else "succeeded"))
    service.tick(200)
    slo = {"slo": "training-success-rate", "training_job": ""}
    assert service.samples(c.SLO_VERDICT)[labels(c.SLO_VERDICT, **slo, verdict="breached")] == 1.0
    assert service.samples(c.SLO_VERDICT)[labels(c.SLO_VERDICT, **slo, verdict="met")] == 0.0
    assert service.samples(c.SLO_SLI)[labels(c.SLO_SLI, **slo)] == 0.4
    assert service.samples(c.SLO_EVENTS)[labels(c.SLO_EVENTS, **slo, quality="bad")] == 6.0
    assert service.samples(c.SLO_BUDGET_REMAINING)[labels(c.SLO_BUDGET_REMAINING, **slo)] == pytest.approx(-5.0)
    assert service.samples(c.SLO_P_VALUE)[labels(c.SLO_P_VALUE, **slo)] == pytest.approx(0.000146902, rel=1e-5)


def test_of_slices_that_are_bad_in_part_the_events_that_are_tested_are_shown(database: Engine) -> None:
    _, of_experiments, *_ = default_objectives().objectives
    service = Service(database, objectives=[replace(of_experiments, slicing=Slicing(Duration(1, "h")))])
    # In each of five hours two runs end, and one of these fails; then in one hour nine, all of which fail.
    for hour in range(6):
        service.seconds = hour * HOUR
        for number in range(9 if hour == 5 else 2):
            name, failed = f"r{hour}-{number}", hour == 5 or hour == number == 0
            told = end(name, service.seconds, "failed" if failed else "succeeded")
            service.receive(start(name, service.seconds), told)
    service.tick(8 * HOUR)
    slo = {"slo": "training-success-rate", "training_job": ""}
    shown = {
        family: service.samples(family)[labels(family, **slo)]
        for family in (c.SLO_SLI, c.SLO_BUDGET_REMAINING, c.SLO_P_VALUE)
    }
    # One hour and half of another are lost of six, and 0.6 may be; ten of 19 runs failed.
    assert shown[c.SLO_SLI] == 4.5 / 6
    assert shown[c.SLO_BUDGET_REMAINING] == pytest.approx(1 - 1.5 / 0.6)
    assert shown[c.SLO_P_VALUE] == binomial_upper_tail(10, 19, of_experiments.target)
    counted = service.samples(c.SLO_EVENTS)
    assert [counted[labels(c.SLO_EVENTS, **slo, quality=each)] for each in ("good", "bad")] == [9, 10]
    assert service.samples(c.SLO_VERDICT)[labels(c.SLO_VERDICT, **slo, verdict="breached")] == 1


def test_steps_show_how_fast_they_burn_their_budget(service: Service) -> None:
    for run_id, seconds, unhealthy in (("old", 100, 500), ("new", 5 * HOUR, 3)):
        service.seconds = seconds
        service.receive(start(run_id, seconds - 50, tier="production"), end(run_id, seconds, "succeeded"))
        with transaction(service.database) as connection:
            known = {"run_id": run_id, "observed_steps": 1000, "unhealthy_steps": unhealthy}
            connection.execute(schema.run_summary.insert().values(known))
    service.tick(5 * HOUR + 60)
    shown = service.samples(c.SLO_BURN_RATE)
    slo = {"slo": "gradient-health", "training_job": "", "tier": "production"}
    rates = {
        window: shown.get(labels(c.SLO_BURN_RATE, **slo, window=window))
        for window in ("5m", "1h", "30m", "6h", "2h", "1d", "3d")
    }
    # 3 of 1000 at a target of 99.9 %, and 503 of 2000 where the first run is looked back upon.
    assert {window for window, rate in rates.items() if rate == pytest.approx(3)} == {"5m", "30m", "1h", "2h"}
    assert {window for window, rate in rates.items() if rate == pytest.approx(251.5)} == {"6h", "1d", "3d"}
    # Nobody counted checkpoints, and objectives that count runs have no rates.
    assert {of[0] for of in shown} == {"gradient-health"}


def test_the_last_logged_metric_of_a_job_outlives_its_run(service: Service) -> None:
    logged = scalar(c.LOGGED, [1], [0.3], **{c.METRIC_NAME: "val_loss"})
    service.receive(start("a"), batch(source("a", instance="a"), frames=[logged]), end("a", 2, "succeeded"))
    service.tick(3)
    service.tick(4)
    assert service.samples(c.LAST_METRIC) == {labels(c.LAST_METRIC, name="val_loss"): 0.3}


def test_the_time_to_target_is_the_median_of_the_jobs_runs(service: Service) -> None:
    for index, seconds in enumerate((10, 20, 90)):
        run_id = f"r{index}"
        reached = batch(source(run_id, instance=run_id), event(c.TARGET_REACHED, seconds, 1))
        service.seconds = 100
        service.receive(start(run_id), reached, end(run_id, 95, "succeeded"))
    service.tick(120)
    assert service.samples(c.TIME_TO_TARGET) == {labels(c.TIME_TO_TARGET): 20.0}


def test_an_ending_before_this_evaluator_started_is_not_counted_again(service: Service) -> None:
    service.receive(start("a"), end("a", 2, "failed"))
    service.tick(3)
    restarted = Service(service.database)
    restarted.tick(4)
    assert restarted.samples(c.RUNS_ENDED)[labels(c.RUNS_ENDED, status="failed")] == 0.0
    assert len(restarted.evaluator.snapshot.findings) == 1


def test_only_of_the_newest_jobs_it_is_remembered_what_was_counted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_MAX_JOBS", 2)
    for number in range(4):
        service.tick(number * 2 * HOUR)
        told = start(f"r{number}", number * 2 * HOUR, model=f"m{number}")
        service.receive(told, end(f"r{number}", number * 2 * HOUR + 2, "failed", model=f"m{number}"))
        service.tick(number * 2 * HOUR + 3)
    counted = service.evaluator.snapshot
    assert {job[1] for job, _ in counted.ended} == {job[1] for job, _ in counted.opened} == {"m2", "m3"}
    ended = service.samples(c.RUNS_ENDED)
    assert {ended[labels(c.RUNS_ENDED, status="failed", model=model)] for model in ("m2", "m3")} == {1.0}


def fleet(service: Service, *tiers: str) -> list[Batch]:
    """Runs of these tiers that started, and what each says as a sign of life at the service's moment."""
    for number, tier in enumerate(tiers):
        service.receive(start(f"r{number}", tier=tier))
    return [
        batch(source(f"r{number}", instance=f"r{number}", tier=tier), event(c.RUN_HEARTBEAT, 100, 1))
        for number, tier in enumerate(tiers)
    ]


@pytest.mark.parametrize(
    ("tiers", "told_of", "severity"),
    [(["experiment"] * 5 + ["production"], "r5", "page"), (["experiment"] * 6, "r0", "ticket")],
)
def test_many_runs_silent_at_once_are_one_finding_until_all_are_heard(
    service: Service, tiers: list[str], told_of: str, severity: str
) -> None:
    signs = fleet(service, *tiers)
    service.tick(31)
    ((run, found),) = service.evaluator.snapshot.findings
    assert (run.run_id, found.rule, found.severity) == (told_of, "telemetry_outage", severity)
    assert (found.evidence["count"], found.evidence["silent"]) == (6, 6)
    assert sorted(found.evidence["runs"]) == [f"r{number}" for number in range(6)]
    active = labels(c.FINDING_ACTIVE, run_id=told_of, rule="telemetry_outage", severity=severity, tier=run.tier)
    assert service.samples(c.FINDING_ACTIVE) == {active: 1.0}
    service.tick(100)
    service.receive(*signs[1:])
    service.tick(101)
    ((run, found),) = service.evaluator.snapshot.findings
    assert (run.run_id, found.evidence["count"], found.evidence["silent"]) == (told_of, 6, 1)
    service.receive(signs[0])
    service.tick(102)
    assert service.evaluator.snapshot.findings == []
    with service.database.connect() as connection:
        for number in range(6):
            shown = show_run(connection, f"r{number}")
            assert shown is not None
            assert [entry["status"] for entry in shown["history"]] == ["running"]
        shown = show_run(connection, told_of)
        assert shown is not None
        assert [(found["rule"], found["state"]) for found in shown["findings"]] == [
            ("telemetry_outage", "resolved")
        ]


def test_an_open_outage_is_shown_with_each_of_its_runs(service: Service) -> None:
    fleet(service, *["experiment"] * 5)
    service.tick(31)
    with service.database.connect() as connection:
        shown = show_run(connection, "r3")
    assert shown is not None
    assert [found["rule"] for found in shown["findings"]] == ["telemetry_outage"]
    valid(json.loads(json.dumps(shown, allow_nan=False)), "run-detail")


def test_a_run_that_fell_silent_long_before_an_outage_is_lost_by_itself(service: Service) -> None:
    service.receive(start("early"))
    service.tick(20)
    fleet(service, *["experiment"] * 5)
    service.tick(51)
    found = {(run.run_id, seen.rule) for run, seen in service.evaluator.snapshot.findings}
    assert found == {("early", "run_lost"), ("r0", "telemetry_outage")}


def test_the_runs_of_an_outage_that_do_not_come_back_are_lost(service: Service) -> None:
    fleet(service, *["experiment"] * 5)
    service.tick(120)
    service.tick(240)
    service.tick(300)
    assert [found.rule for _, found in service.evaluator.snapshot.findings] == ["telemetry_outage"]
    service.tick(301)
    assert [found.rule for _, found in service.evaluator.snapshot.findings] == ["run_lost"] * 5


def test_replicas_of_the_collector_tell_one_outage(service: Service) -> None:
    other = Service(service.database)
    fleet(service, *["experiment"] * 5)
    for seconds in range(10, 51, 10):
        service.tick(seconds)
        other.tick(seconds)
    for each in (service, other):
        ((run, found),) = each.evaluator.snapshot.findings
        assert (run.run_id, found.rule) == ("r0", "telemetry_outage")


def test_collectors_that_do_not_judge_show_what_the_one_that_does_has_found(service: Service) -> None:
    other = Service(service.database)
    service.receive(start("a"), end("a", 2, "failed"))
    other.tick(3)
    assert other.evaluator.snapshot.findings == []
    service.tick(3)
    other.tick(4)
    for each in (service, other):
        ((run, found),) = each.evaluator.snapshot.findings
        assert (run.run_id, found.rule) == ("a", "run_failed")
        assert each.samples(c.FINDINGS_OPENED)[labels(c.FINDINGS_OPENED, rule="run_failed")] == 1.0
        assert each.samples(c.RUNS_ENDED)[labels(c.RUNS_ENDED, status="failed")] == 1.0


def test_a_finding_that_opens_again_is_counted_again(service: Service) -> None:
    lost = labels(c.FINDINGS_OPENED, rule="run_lost")
    service.receive(start("a"))
    service.tick(31)
    assert service.samples(c.FINDINGS_OPENED)[lost] == 1.0
    service.receive(batch(source("a", instance="a"), event(c.RUN_HEARTBEAT, 32, 1)))
    service.tick(33)
    service.tick(100)
    assert service.samples(c.FINDINGS_OPENED)[lost] == 2.0


def test_an_ending_that_is_committed_after_a_later_one_is_counted(service: Service) -> None:
    service.receive(start("early"), start("late"))
    service.tick(1)
    history = schema.run_history
    told = {"attempt": 1, "recorded_at": at(2), "status": "failed", "evidence": {}}
    with service.database.connect() as connection:
        newest = connection.scalar(select(func.max(history.c.history_id))) or 0
    for run_id, number in (("late", newest + 1002), ("early", newest + 1001)):
        with transaction(service.database) as connection:
            connection.execute(history.insert().values(history_id=number, run_id=run_id, **told))
        service.tick(3 if run_id == "late" else 4)
    assert service.samples(c.RUNS_ENDED)[labels(c.RUNS_ENDED, status="failed")] == 2.0
    service.tick(100)
    service.tick(200)
    assert service.evaluator.snapshot.counted is not None
    assert service.evaluator.snapshot.counted.settled >= newest + 1002


def test_values_of_a_run_that_sends_elsewhere_by_now_are_not_shown(service: Service) -> None:
    other = Service(service.database)
    loss = c.family_of(c.LOSS)
    service.receive(start("a"), batch(source("a", instance="a"), frames=[scalar(c.LOSS, [1], [0.5])]))
    service.tick(1)
    assert service.samples(loss) == {labels(loss, run_id="a"): 0.5}
    for seconds in range(10, 91, 20):
        other.seconds = seconds
        beat = event(c.RUN_HEARTBEAT, seconds, seconds)
        newer = scalar(c.LOSS, [seconds], [0.25])
        other.receive(batch(source("a", instance="a"), beat, frames=[newer]))
        service.tick(seconds)
        other.tick(seconds)
    assert service.samples(loss) == {}
    assert other.samples(loss) == {labels(loss, run_id="a"): 0.25}


def success_rate(service: Service) -> tuple[float, float]:
    """Good and bad runs of tier production, as the objective counts them."""
    counted = service.samples(c.SLO_EVENTS)
    slo = {"slo": "training-success-rate", "training_job": "", "tier": "production"}
    good, bad = (counted[labels(c.SLO_EVENTS, **slo, quality=quality)] for quality in ("good", "bad"))
    return good, bad


def test_the_success_rate_counts_endings_and_follows_their_corrections(service: Service) -> None:
    def tell(run_id: str, *events: EventRecord, **attributes: Any) -> None:
        told = source(run_id, instance=run_id, tier="production", attempt=1, **attributes)
        service.receive(batch(told, event(c.RUN_STARTED, 0), *events))

    def ending(status: str, reason: str | None = None, **told: Any) -> EventRecord:
        return event(c.RUN_ENDED, 100, 9, STATUS=status, REASON=reason, **told)

    service.seconds = 100
    tell("succeeded", ending("succeeded"))
    tell("failed", ending("failed", "ValueError"))
    tell("cancelled", ending("cancelled", "interrupted"))
    tell("preempted", ending("cancelled", "preempted"))
    tell("running", event(c.RUN_HEARTBEAT, 100, 1))
    tell("retried", ending("failed", "SIGKILL", WILL_RETRY=True))
    tell("silent", event(c.RUN_HEARTBEAT, 100, 1))
    service.tick(101)
    assert success_rate(service) == (1, 1)
    service.tick(120)
    for run_id in ("running", "retried"):
        service.receive(batch(source(run_id, instance=run_id, attempt=1), event(c.RUN_HEARTBEAT, 120, 2)))
    service.tick(132)
    assert success_rate(service) == (1, 2)  # silent is lost
    tell("silent", event(c.RUN_ENDED, 131, 9, STATUS="succeeded"))
    service.tick(140)
    assert success_rate(service) == (2, 1)
    service.tick(151)
    assert success_rate(service) == (2, 2)  # running is lost
    service.tick(270)
    service.tick(390)
    service.tick(421)
    assert success_rate(service) == (2, 3)  # nobody retried


def test_a_silenced_finding_raises_no_alert_until_the_silence_is_over(service: Service) -> None:
    service.receive(start("a"), end("a", 2, "failed"))
    with transaction(service.database) as connection:
        silence(connection, About(single_run="a"), at(60), "a test", now=at(0))
    service.tick(3)
    assert service.samples(c.FINDING_ACTIVE) == {}
    service.tick(61)
    assert list(service.samples(c.FINDING_ACTIVE)) == [
        ("a", "run_failed", "ticket", "", "experiment", "digits")
    ]


def test_of_more_findings_than_are_shown_a_page_is_the_last_to_go(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "MAX_RUNS", 2)
    service.receive(start("first", tier="production"), end("first", 2, "failed", tier="production"))
    for number in range(3):
        service.receive(start(f"later{number}", 1), end(f"later{number}", 2, "failed"))
    service.tick(3)
    shown = [
        dict(zip(c.FINDING_ACTIVE.labels, each, strict=True)) for each in service.samples(c.FINDING_ACTIVE)
    ]
    assert [each["severity"] for each in shown] == ["page", "ticket"]
