"""What differs between runs: what they were told to do, with what, how it went, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.records import Attributes
from gradwatch_collector.runs.cost import run_cost
from gradwatch_collector.runs.curves import Curve, read_curves, read_gradient_norms, read_step_clock, spread
from gradwatch_collector.runs.effective_time import effective_time
from gradwatch_collector.runs.environment import environment
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.runs import Status

Value = str | int | float | bool | None
_NANOS: Final = 1_000_000_000

# Of which process of which run the telemetry is: never the same twice.
_IDENTITY: Final = frozenset(
    {
        c.SERVICE_INSTANCE_ID, c.RUN_ID, c.RUN_ATTEMPT, c.RANK, c.PROCESS_PID, c.PARENT_PID, c.SUPERVISOR,
        c.SUPERVISOR_INSTANCE,
    }
)  # fmt: skip
# Told by columns of the run, under their own names.
_COLUMNS: Final = frozenset(
    {c.SERVICE_NAME, c.MODEL, c.DATASET, c.TEAM, c.TIER, c.TARGET, c.DEADLINE, c.GIT_COMMIT}
)
_CONFIGURATION: Final = {
    c.CONFIG_HASH: "hyper-parameters (hash)",
    c.SEED: "seed",
    c.DETERMINISTIC: "deterministic",
    c.PROCESS_COMMAND: "command",
    c.HOST_NAME: "host",
    c.DEVICE_NAME: "device",
}
_VERSIONS: Final = {c.PYTHON_VERSION: "Python", c.TORCH_VERSION: "torch", c.CUDA_VERSION: "CUDA"}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing about one run. ``unit``: OpenTelemetry's (`s`, `h`, `1`) or a currency; None of words."""

    section: str
    name: str
    value: Value
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """One thing about every run compared, in their order; the first is what the others are compared with."""

    section: str
    name: str
    unit: str | None
    values: tuple[Value, ...]

    @property
    def differs(self) -> bool:
        """Whether not all runs have the same. NaN is the same as NaN."""
        return any(not _same(self.values[0], value) for value in self.values[1:])

    def change(self, index: int) -> float | None:
        """Return how much a number is above the first run's, as a share of it; None where that says nothing."""
        first, value = self.values[0], self.values[index]
        if self.unit is None or not (isinstance(first, int | float) and isinstance(value, int | float)):
            return None
        if index == 0 or not (math.isfinite(first) and math.isfinite(value)) or first == 0:
            return None
        relative = (value - first) / abs(first)
        return float(relative) if math.isfinite(relative) else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs side by side, the first being the reference, and all that is known of them."""

    runs: tuple[RunRow, ...]
    facts: tuple[Compared, ...]

    @property
    def differences(self) -> tuple[Compared, ...]:
        """What is not the same in all runs."""
        return tuple(fact for fact in self.facts if fact.differs)


def compare(connection: Connection, runs: Sequence[RunRow], prices: PriceTable | None) -> Comparison:
    """Put runs side by side. The first is the reference."""
    described = [{(fact.section, fact.name): fact for fact in _facts(connection, run, prices)} for run in runs]
    # In the order of the first, what only others have at the end of its section.
    places = list(dict.fromkeys(place for facts in described for place in facts))
    sections = list(dict.fromkeys(section for section, _ in places))
    places.sort(key=lambda place: sections.index(place[0]))
    return Comparison(tuple(runs), tuple(_compared(place, described) for place in places))


def last_good_run(connection: Connection, row: RunRow) -> str | None:
    """Return the last run of the same job, model and dataset that succeeded before this one started."""
    run = schema.run.c
    found: str | None = connection.scalar(
        select(run.run_id)
        .where(
            run.job == row.job,
            run.model.is_not_distinct_from(row.model),
            run.dataset.is_not_distinct_from(row.dataset),
            run.status == Status.SUCCEEDED,
            run.ended_at <= row.started_at,
            run.run_id != row.run_id,
        )
        .order_by(run.ended_at.desc(), run.run_id)
        .limit(1)
    )
    return found


def _compared(place: tuple[str, str], described: Sequence[dict[tuple[str, str], Fact]]) -> Compared:
    told = [facts.get(place) for facts in described]
    unit = next((fact.unit for fact in told if fact is not None), None)
    return Compared(*place, unit, tuple(None if fact is None else fact.value for fact in told))


def _same(one: Value, other: Value) -> bool:
    # Only NaN differs from itself.
    return one == other or (one != one and other != other)


def _facts(connection: Connection, run: RunRow, prices: PriceTable | None) -> Iterator[Fact]:
    resource = environment(connection, run.run_id, run.attempt)
    yield from _configuration(run, resource)
    rates = read_curves(connection, run.run_id, c.LEARNING_RATE)
    if rates:
        yield Fact("configuration", "learning rate (first)", _first(rates), "{learning_rate}")
        yield Fact("configuration", "learning rate (last)", _last(rates), "{learning_rate}")
    for name, shown in _VERSIONS.items():
        yield Fact("versions", shown, _plain(resource.get(name)))
    yield Fact("code", "commit", run.commit)
    yield from _outcome(connection, run)
    yield from _losses(connection, run)
    yield from _norms(connection, run)
    yield from _time(connection, run)
    yield from _costs(connection, run, prices)


def _configuration(run: RunRow, resource: Attributes) -> Iterator[Fact]:
    for name in ("job", "model", "dataset", "team", "tier", "target"):
        yield Fact("run", name, getattr(run, name))
    yield Fact("run", "deadline", run.deadline_seconds, "s")
    yield Fact("configuration", "ranks", run.rank_count, "{rank}")
    for name, shown in _CONFIGURATION.items():
        yield Fact("configuration", shown, _plain(resource.get(name)))
    known = {*_IDENTITY, *_COLUMNS, *_CONFIGURATION, *_VERSIONS, c.WORLD_SIZE}
    # What people add by OTEL_RESOURCE_ATTRIBUTES is there to tell runs apart.
    for name in sorted(resource.keys() - known):
        yield Fact("configuration", name, _plain(resource[name]))


def _plain(value: Any) -> Value:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _outcome(connection: Connection, run: RunRow) -> Iterator[Fact]:
    yield Fact("outcome", "status", run.status.value)
    yield Fact("outcome", "reason", run.reason)
    yield Fact("outcome", "attempts", _attempts(connection, run.run_id), "{attempt}")
    yield Fact("outcome", "steps", None if run.last_step is None else run.last_step + 1, "{step}")
    if run.target is not None:
        yield Fact("outcome", "target reached", run.target_reached_at is not None)
    finding = schema.finding.c
    rows = connection.execute(
        select(finding.rule, finding.attempt, finding.step)
        .where(finding.run_id == run.run_id)
        .order_by(finding.attempt, finding.rule)
    ).all()
    yield Fact("outcome", "findings", ", ".join(sorted({row.rule for row in rows})) or None)
    first_bad = next((row.step for row in rows if row.rule == c.RULE_NONFINITE), None)
    yield Fact("outcome", "first non-finite step", first_bad, "{step}")


def _attempts(connection: Connection, run_id: str) -> int:
    attempt = schema.attempt.c
    return len(connection.scalars(select(attempt.attempt).where(attempt.run_id == run_id)).all())


def _losses(connection: Connection, run: RunRow) -> Iterator[Fact]:
    last = float("nan") if run.last_loss_nonfinite else run.last_loss
    yield Fact("loss", "loss (last)", last, c.LOSS.unit)
    found = spread(read_curves(connection, run.run_id, c.LOSS))
    yield Fact("loss", "loss (lowest)", None if found is None else found.minimum, c.LOSS.unit)
    logged: dict[str, list[Curve]] = {}
    for curve in read_curves(connection, run.run_id, c.LOGGED):
        logged.setdefault(str(curve.attributes.get(c.METRIC_NAME)), []).append(curve)
    for name, curves in sorted(logged.items()):
        yield Fact("loss", f"{name} (last)", _last(curves), c.LOGGED.unit)


def _norms(connection: Connection, run: RunRow) -> Iterator[Fact]:
    clock = read_step_clock(connection, run.run_id)
    found = spread(read_gradient_norms(connection, run.run_id, clock))
    median, highest = (None, None) if found is None else (found.median, found.maximum)
    yield Fact("norms", "gradient norm (median)", median, c.GRADIENT_NORM.unit)
    yield Fact("norms", "gradient norm (highest)", highest, c.GRADIENT_NORM.unit)
    clipped = spread(read_curves(connection, run.run_id, c.CLIP_RATIO))
    if clipped is not None:
        yield Fact("norms", "clip ratio (median)", clipped.median, "1")


def _time(connection: Connection, run: RunRow) -> Iterator[Fact]:
    ended = run.last_seen_at if run.ended_at is None else run.ended_at
    yield Fact("time", "duration", max(0, ended - run.started_at) / _NANOS, "s")
    if run.target_reached_at is not None:
        yield Fact("time", "time to target", max(0, run.target_reached_at - run.started_at) / _NANOS, "s")
    found = spread(read_curves(connection, run.run_id, c.STEP_DURATION))
    yield Fact("time", "step time (median)", None if found is None else found.median, "s")
    spent = effective_time(connection, run)
    if spent is not None and spent.wall > 0:
        yield Fact("time", "effective training time", spent.ratio, "1")
        yield Fact("time", "waiting for data", spent.waiting / spent.wall, "1")
    headroom = spread(read_curves(connection, run.run_id, c.DEVICE_MEMORY_HEADROOM, every_rank=True))
    yield Fact("memory", "headroom (lowest)", None if headroom is None else headroom.minimum, "1")


def _costs(connection: Connection, run: RunRow, prices: PriceTable | None) -> Iterator[Fact]:
    found = run_cost(connection, run.run_id, prices)
    for what, hours in found.hours.items():
        yield Fact("cost", f"time on {what}", float(hours), "h")
    if found.currency is not None:
        yield Fact("cost", "cost", None if found.amount is None else float(found.amount), found.currency)


def _first(curves: Sequence[Curve]) -> float:
    return float(min(curves, key=lambda curve: curve.times[0]).values[0])


def _last(curves: Sequence[Curve]) -> float:
    return max(curves, key=lambda curve: curve.times[-1]).last
