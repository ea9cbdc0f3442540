"""For whoever debugs a run: how it learns, how fast, and what it uses. Choose one run, or few."""

from __future__ import annotations

from typing import Final

from links import DEBUG
from panels import RUN_LEGEND, Dashboard, Panel, Query, Row, newest
from runs import FINDING_MARKS, NO_RUN, memory_headroom, nonfinite_steps
from stored import CHECKPOINT_MARKS, collectives_of_ranks, layer_norms, nonfinite_log, runs

from gradwatch import conventions as names

_NO_GPU: Final = "No run of this selection uses a GPU"


def _latest(metric: names.Metric) -> str:
    return newest(names.family_of(metric))


def _line(metric: names.Metric, title: str, description: str, unit: str, *, logarithmic: bool = False) -> Panel:
    return Panel(
        kind="timeseries",
        title=title,
        description=description,
        unit=unit,
        empty=NO_RUN,
        queries=(Query(_latest(metric), RUN_LEGEND),),
        width=12,
        logarithmic=logarithmic,
    )


_RUN: Final = Row(
    "Run",
    (
        Panel(
            kind="table",
            title="Runs",
            description="Status, reason and host of each run that is live, or failed or was lost within the"
            " last hour.",
            unit="none",
            empty=NO_RUN,
            queries=(
                Query(newest(names.RUN_INFO)),
                # Grafana counts time in milliseconds.
                Query(f"{newest(names.RUN_STARTED_TIMESTAMP)} * 1000", "started", "dateTimeFromNow"),
                Query(f"{newest(names.RUN_LAST_SEEN_TIMESTAMP)} * 1000", "last seen", "dateTimeFromNow"),
            ),
            width=16,
        ),
        Panel(
            kind="table",
            title="Findings",
            description="Open findings of the runs. `gradwatch runs show RUN` has step, layer, evidence and"
            " what to do.",
            unit="none",
            empty="Nothing is wrong",
            queries=(Query(f"{newest(names.FINDING_ACTIVE)} == 1"),),
            width=8,
        ),
    ),
)

_LEARNING: Final = Row(
    "Learning",
    (
        _line(names.LOSS, "Loss", "Loss of the newest step, the highest over ranks; gaps are NaN.", "none"),
        _line(
            names.GRADIENT_NORM,
            "Gradient norm",
            "L2 norm over all gradients before clipping, of the newest observed step. Logarithmic: a jump of a"
            " decade is an explosion, a steady fall over decades vanishing gradients.",
            "none",
            logarithmic=True,
        ),
        _line(names.LEARNING_RATE, "Learning rate", "Learning rate of the newest step.", "sci"),
        nonfinite_steps(width=12),
    ),
)

_LAYERS: Final = Row("Layers", (layer_norms(), nonfinite_log()))

_SPEED: Final = Row(
    "Speed",
    (
        _line(names.STEP_INDEX, "Step", "Optimizer steps so far. Flat means stalled.", "none"),
        _line(
            names.STEP_DURATION,
            "Step duration",
            "From the end of one optimizer step to the end of the next, of the slowest rank.",
            "s",
        ),
        Panel(
            kind="timeseries",
            title="Overhead of gradwatch",
            description="Share of the step time that the agent spent on the training thread. Its budget is 0.5"
            " %.",
            unit="percentunit",
            empty=NO_RUN,
            queries=(Query(_latest(names.AGENT_OVERHEAD), RUN_LEGEND),),
            width=12,
            thresholds=((0.005, "yellow"), (0.05, "red")),
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="GPU utilization",
            description="GPU runs only: share of time in which a kernel ran, of the busiest device. Below 80 %"
            " the device waits for data, for other ranks or for the host.",
            unit="percentunit",
            empty=_NO_GPU,
            queries=(Query(_latest(names.HW_GPU_UTILIZATION), RUN_LEGEND),),
            runbook=names.RULE_ALERTS[names.RULE_DATA_STARVATION],
            width=12,
            base="yellow",
            thresholds=((0.8, "green"),),
            least=0,
            most=1,
        ),
        collectives_of_ranks(width=24),
    ),
)

_MEMORY: Final = Row(
    "Memory",
    (
        memory_headroom(width=8),
        Panel(
            kind="timeseries",
            title="Host memory",
            description="Resident memory of the process, and the memory of its host (of its cgroup if lower).",
            unit="bytes",
            empty=NO_RUN,
            queries=(
                Query(_latest(names.PROCESS_MEMORY), f"used {RUN_LEGEND}"),
                Query(_latest(names.HOST_MEMORY_LIMIT), f"limit {RUN_LEGEND}"),
            ),
            width=8,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="GPU memory",
            description="GPU runs only: held by tensors, peak reserved by torch's allocator, and the device's"
            " memory; the highest over the run's devices.",
            unit="bytes",
            empty=_NO_GPU,
            queries=(
                Query(_latest(names.DEVICE_MEMORY_ALLOCATED), f"allocated {RUN_LEGEND}"),
                Query(_latest(names.DEVICE_MEMORY_PEAK), f"peak {RUN_LEGEND}"),
                Query(_latest(names.DEVICE_MEMORY_LIMIT), f"limit {RUN_LEGEND}"),
            ),
            width=8,
            least=0,
        ),
    ),
)

_STORED: Final = Row("Stored", (runs(title="Runs at this time"),))

DEBUG_DASHBOARD: Final = Dashboard(
    uid=DEBUG,
    title="gradwatch / Debug",
    description="How a run learns, how fast, and what it uses.",
    since="now-1h",
    refresh="10s",
    rows=(_RUN, _LEARNING, _LAYERS, _SPEED, _MEMORY, _STORED),
    annotations=(FINDING_MARKS, CHECKPOINT_MARKS),
)
