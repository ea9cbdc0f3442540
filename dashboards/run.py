"""For one run, live or long over: how it stands, what it learned and what it took, as it is stored."""

from __future__ import annotations

from typing import Final

from links import RUN
from panels import Annotation, Dashboard, Panel, Row, Sql
from postgres import THE_RUN, moment, told
from stored import (
    CHECKPOINT_MARKS,
    NO_DATABASE,
    checkpoints,
    collectives_of_ranks,
    curve,
    layer_norms,
    nonfinite_log,
    runs,
)

from gradwatch import conventions as names

_NOT_YET: Final = "Known once the run is over"
_STATUS_COLOURS: Final = (
    ("running", "blue"),
    ("succeeded", "green"),
    ("failed", "red"),
    ("lost", "red"),
    ("cancelled", "yellow"),
)
_OF_RUN: Final = f"FROM run WHERE run_id IN {THE_RUN}"
_OF_SUMMARY: Final = f"FROM run_summary WHERE run_id IN {THE_RUN}"


def _stat(
    title: str,
    description: str,
    unit: str,
    sql: str,
    *,
    empty: str = NO_DATABASE,
    base: str = "blue",
    thresholds: tuple[tuple[float, str], ...] = (),
    colours: tuple[tuple[str, str], ...] = (),
    runbook: str | None = None,
) -> Panel:
    return Panel(
        kind="stat",
        title=title,
        description=description,
        unit=unit,
        empty=empty,
        queries=(Sql(sql),),
        width=4,
        height=4,
        base=base,
        thresholds=thresholds,
        colours=colours,
        runbook=runbook,
    )


_STANDS: Final = Row(
    "How it stands",
    (
        _stat(
            "Run",
            "The run that this page is about: of several that the filters let through, the newest.",
            "string",
            f"SELECT run_id {_OF_RUN}",
        ),
        _stat(
            "Status",
            "How the run stands, or how it ended.",
            "string",
            f"SELECT status {_OF_RUN}",
            colours=_STATUS_COLOURS,
            runbook=names.RULE_ALERTS[names.RULE_RUN_FAILED],
        ),
        _stat(
            "Duration",
            "From the start to the end, or to the last sign of life.",
            "s",
            f"SELECT (coalesce(ended_at, last_seen_at) - started_at) / 1e9 AS duration {_OF_RUN}",
        ),
        _stat("Last step", "The last step that ended.", "none", f"SELECT last_step {_OF_RUN}"),
        _stat(
            "Open findings",
            "What is wrong with the run now.",
            "none",
            f"SELECT count(*) AS open FROM finding WHERE run_id IN {THE_RUN} AND state = 'open'",
            base="green",
            thresholds=((1, "red"),),
        ),
        _stat(
            "Effective training time",
            "Time of steps that counted, by the time that the run took over all its attempts. The objective is"
            " 90 %.",
            "percentunit",
            f"SELECT effective_time_ratio {_OF_SUMMARY}",
            empty=_NOT_YET,
            base="red",
            thresholds=((0.8, "yellow"), (0.9, "green")),
        ),
        Panel(
            kind="table",
            title="Findings",
            description="All that was found of the run, with step, layer and evidence. The rule leads to its"
            " runbook.",
            unit="none",
            empty="Nothing was found",
            queries=(
                Sql(
                    f"SELECT {moment('first_seen', 'first_seen')}, {moment('last_seen', 'last_seen')}, rule,"
                    " severity, state, attempt, rank, step, layer, born_in, acknowledged_by,"
                    " evidence::text AS evidence"
                    f" FROM finding WHERE run_id IN {THE_RUN} ORDER BY 1 DESC LIMIT 200"
                ),
            ),
            width=24,
        ),
        Panel(
            kind="table",
            title="Attempts",
            description="Each attempt, how it ended and which rank was the cause.",
            unit="none",
            empty=NO_DATABASE,
            queries=(
                Sql(
                    f"SELECT {moment('started_at', 'started')}, {moment('ended_at', 'ended')}, attempt, status,"
                    " reason, cause_rank, rank_count, will_retry"
                    f" FROM attempt WHERE run_id IN {THE_RUN} ORDER BY attempt DESC LIMIT 200"
                ),
            ),
            width=12,
        ),
        Panel(
            kind="table",
            title="Summary",
            description="What is known of the run as a whole: steps, those that were not finite or skipped, use"
            " of its devices, 95th percentile of its collectives, least memory left, cost of a thousand steps.",
            unit="none",
            empty=_NOT_YET,
            queries=(
                Sql(
                    "SELECT steps, nonfinite_steps, skipped_steps, checkpoints, failed_checkpoints,"
                    " gpu_utilization, collective_p95, memory_headroom, step_cost, quality, quality_delta"
                    f" {_OF_SUMMARY}",
                    units={
                        "gpu_utilization": "percentunit",
                        "memory_headroom": "percentunit",
                        "collective_p95": "s",
                    },
                ),
            ),
            width=12,
        ),
    ),
)

_LEARNING: Final = Row(
    "Learning",
    (
        curve(names.LOSS, "Loss", "Loss, the highest over ranks; gaps are NaN.", "none"),
        curve(
            names.GRADIENT_NORM,
            "Gradient norm",
            "L2 norm over all gradients before clipping. Logarithmic.",
            "none",
            logarithmic=True,
        ),
        curve(names.LEARNING_RATE, "Learning rate", "Learning rate.", "sci"),
        curve(
            names.LOGGED,
            "Logged metrics",
            "Metrics given to `watch.log`, such as the validation loss.",
            "none",
            by=names.METRIC_NAME,
        ),
        layer_norms(),
        nonfinite_log(),
    ),
)

_SPEED: Final = Row(
    "Speed",
    (
        curve(
            names.STEP_DURATION, "Step duration", "From one step's end to the next, of the slowest rank.", "s"
        ),
        curve(
            names.PHASE_DURATION,
            "Step time by phase",
            "Time of forward, backward and optimizer, of the slowest rank.",
            "s",
            by=names.PHASE,
        ),
        curve(
            names.DATA_WAIT,
            "Data wait",
            "Time of a step that training waited for its data loaders, of the slowest rank.",
            "s",
            runbook=names.RULE_ALERTS[names.RULE_DATA_STARVATION],
        ),
        collectives_of_ranks(),
    ),
)

_MEMORY: Final = Row(
    "Memory and devices",
    (
        Panel(
            kind="timeseries",
            title="Memory headroom",
            description="(limit - peak) / limit of the tightest device; of the host for a run without devices."
            " Below 10 % is a finding.",
            unit="percentunit",
            empty=NO_DATABASE,
            queries=(
                Sql(
                    "SELECT $__timeGroupAlias(time, $__interval), min(value) AS value"
                    f" {told(THE_RUN, (names.DEVICE_MEMORY_HEADROOM.name, 'value'))} GROUP BY 1 ORDER BY 1",
                    legend="Memory headroom",
                ),
            ),
            width=8,
            base="red",
            thresholds=((0.1, "green"),),
            least=0,
            most=1,
            runbook=names.RULE_ALERTS[names.RULE_MEMORY_HEADROOM],
        ),
        curve(
            names.PROCESS_MEMORY,
            "Host memory",
            "Resident memory of the process, of the largest rank.",
            "bytes",
            width=8,
        ),
        curve(
            names.DEVICE_MEMORY_PEAK,
            "GPU memory",
            "GPU runs only: peak reserved by torch's allocator, by device, the highest over ranks.",
            "bytes",
            by=names.DEVICE,
            width=8,
        ),
        curve(
            names.HW_GPU_UTILIZATION,
            "GPU utilization",
            "GPU runs only: share of time in which a kernel ran, by device.",
            "percentunit",
            by=names.DEVICE,
        ),
        checkpoints(width=12),
    ),
)

_OTHERS: Final = Row("Other runs", (runs(title="Runs of this selection"),))

_FINDING_MARKS: Final = Annotation(
    name="Findings",
    colour="red",
    query=Sql(
        f"SELECT {moment('first_seen', 'time')}, {moment('coalesce(resolved_at, last_seen)', 'timeend')},"
        " concat_ws(' ', rule, 'step', step, layer) AS text, concat(rule, ',', severity) AS tags"
        f" FROM finding WHERE run_id IN {THE_RUN} ORDER BY 1 DESC LIMIT 200"
    ),
)

RUN_DASHBOARD: Final = Dashboard(
    uid=RUN,
    title="gradwatch / Run",
    description="One run, live or over: how it stands, how it learned, and what it took.",
    since="now-1h",
    refresh="30s",
    rows=(_STANDS, _LEARNING, _SPEED, _MEMORY, _OTHERS),
    annotations=(_FINDING_MARKS, CHECKPOINT_MARKS),
    stored=True,
)
