"""The collector's ``/metrics``: aggregates per job, and per run only while somebody may have to act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gradwatch import conventions as c
from gradwatch_collector.findings import RULES
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.runs.live import LiveRuns
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.service.snapshot import Snapshot
from gradwatch_collector.service.upkeep import Upkeep
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.runs import Status
from gradwatch_slo.verdict import Verdict

# 8 series a run render in 0.6 s for 10 000 runs (measured with prometheus-client): the sickest are enough, and
# of findings the loudest.
MAX_RUNS: Final = 1_000
_NANOS: Final = 1_000_000_000
_ENDINGS: Final = tuple(status for status in Status if status is not Status.RUNNING)

# A run that ended well needs no series of its own any more.
_SHOWN: Final = (Status.RUNNING, Status.FAILED, Status.LOST)

Sample = tuple[tuple[str, ...], float]


class RunMetrics(Collector):
    """Renders the evaluator's newest snapshot, live values and the database's size as Prometheus families."""

    def __init__(self, evaluator: Evaluator, live: LiveRuns, upkeep: Upkeep) -> None:
        self._evaluator = evaluator
        self._live = live
        self._upkeep = upkeep

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are fixed, and a check by rendering would cost a scrape at start."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every family of ``conventions.FAMILIES`` that rests on runs, findings or objectives."""
        snapshot = self._evaluator.snapshot
        runs = [run for run in snapshot.runs if run.status in _SHOWN][:MAX_RUNS]
        yield from self._run_families(runs, snapshot.headroom)
        yield from _job_families(snapshot, self._live)
        yield from _finding_families(snapshot)
        yield from _objective_families(snapshot.objectives)
        yield _family(
            c.SLO_BURN_RATE,
            [((*_slo_labels(r.name, r.group), r.look_back), r.rate) for r in snapshot.burn_rates],
        )
        yield _family(c.COLLECTOR_EVALUATED_TIMESTAMP, [((), snapshot.evaluated_at / _NANOS)])
        size = self._upkeep.database_size
        yield _family(c.COLLECTOR_DATABASE_SIZE, [] if size is None else [((), float(size))])

    def _run_families(self, runs: Iterable[RunRow], headroom: Mapping[str, float]) -> Iterator[Metric]:
        labelled = [(run, (run.run_id, *run.job_labels)) for run in runs]
        live = self._live
        for metric in c.RUN_GAUGES:
            values = ((labels, live.gauge(run.run_id, metric)) for run, labels in labelled)
            yield _family(c.family_of(metric), [(labels, v) for labels, v in values if v is not None])
        yield _family(
            c.RUN_INFO,
            [((*labels, run.status, run.reason or "", run.host or ""), 1.0) for run, labels in labelled],
        )
        yield _family(c.RUN_STARTED_TIMESTAMP, [(ls, run.started_at / _NANOS) for run, ls in labelled])
        yield _family(c.RUN_LAST_SEEN_TIMESTAMP, [(ls, run.last_seen_at / _NANOS) for run, ls in labelled])
        left = ((labels, headroom.get(run.run_id)) for run, labels in labelled)
        yield _family(c.RUN_MEMORY_HEADROOM, [(labels, v) for labels, v in left if v is not None])


def _job_families(snapshot: Snapshot, live: LiveRuns) -> Iterator[Metric]:
    running: dict[tuple[str, ...], float] = dict.fromkeys(snapshot.jobs, 0.0)
    for run in snapshot.runs:
        running[run.job_labels] += run.status is Status.RUNNING
    yield _family(c.RUNS_LIVE, running.items())
    # Counters exist at 0 for every job, or `increase()` would miss the first failure.
    yield _family(
        c.RUNS_ENDED,
        [((*job, status), float(snapshot.ended[job, status])) for job in snapshot.jobs for status in _ENDINGS],
    )
    yield _family(c.TIME_TO_TARGET, snapshot.time_to_target.items())
    yield _family(c.LAST_METRIC, live.job_metrics().items())


def _finding_families(snapshot: Snapshot) -> Iterator[Metric]:
    yield _family(
        c.FINDING_ACTIVE,
        [
            ((run.run_id, found.rule, found.severity, run.team or "", run.tier, run.job), 1.0)
            for run, found in snapshot.findings[:MAX_RUNS]
        ],
    )
    yield _family(
        c.FINDINGS_OPENED,
        [((*job, rule), float(snapshot.opened[job, rule])) for job in snapshot.jobs for rule in RULES],
    )


def _objective_families(reports: Iterable[ObjectiveReport]) -> Iterator[Metric]:
    labelled = [(report, _slo_labels(report.name, report.group)) for report in reports]
    yield _family(
        c.SLO_VERDICT,
        [((*ls, v), float(report.verdict is v)) for report, ls in labelled for v in Verdict],
    )
    yield _family(c.SLO_SLI, [(ls, float(r.sli)) for r, ls in labelled if r.sli is not None])
    yield _family(c.SLO_TARGET, [(ls, float(r.target)) for r, ls in labelled])
    yield _family(c.SLO_BUDGET_REMAINING, [(ls, float(r.budget_remaining)) for r, ls in labelled])
    yield _family(
        c.SLO_EVENTS,
        [
            ((*ls, quality), float(counted))
            for r, ls in labelled
            for quality, counted in (("good", r.events.good), ("bad", r.events.bad))
        ],
    )
    yield _family(c.SLO_P_VALUE, [(ls, r.p_value) for r, ls in labelled])


def _slo_labels(name: str, group: Mapping[str, str | None]) -> tuple[str, ...]:
    """Return the values of ``conventions.SLO_LABELS``; what an objective is not grouped by is empty."""
    return (name, *(group.get(field) or "" for field in ("job", *c.SLO_LABELS[2:])))


def _family(family: c.Family, samples: Iterable[Sample]) -> Metric:
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    rendered = make(family.name, family.description, labels=family.labels)
    for labels, value in samples:
        rendered.add_metric(labels, value)
    return rendered
