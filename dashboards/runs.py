"""Panels about runs that more than one dashboard shows."""

from __future__ import annotations

from typing import Final

from panels import RUN_LEGEND, Annotation, Panel, Query, newest, over_replicas
from variables import select

from gradwatch import conventions as names

NO_RUN: Final = "No live run in this selection"


def nonfinite_steps(*, width: int) -> Panel:
    """NaN and Inf by run."""
    return Panel(
        kind="timeseries",
        title="Non-finite steps",
        description="Steps with a NaN or infinite loss or gradient, by run, as they are added. What a run told"
        " before it was scraped twice is missing, and so is all of a short one: they are among the non-finite"
        " batches.",
        unit="none",
        empty=NO_RUN,
        queries=(
            Query(
                over_replicas(f"increase({select(names.family_of(names.NONFINITE))}[$__rate_interval])", "sum"),
                RUN_LEGEND,
            ),
        ),
        width=width,
        thresholds=((1, "red"),),
        least=0,
        bars=True,
        runbook=names.RULE_ALERTS[names.RULE_NONFINITE],
    )


def memory_headroom(*, width: int) -> Panel:
    """How close each run is to running out of memory."""
    return Panel(
        kind="timeseries",
        title="Memory headroom",
        description="(limit - peak) / limit of the run's tightest device; of the host for a run without"
        " devices. Below 10 % is a finding.",
        unit="percentunit",
        empty=NO_RUN,
        queries=(Query(newest(names.RUN_MEMORY_HEADROOM), RUN_LEGEND),),
        width=width,
        base="red",
        thresholds=((0.1, "green"),),
        least=0,
        most=1,
        runbook=names.RULE_ALERTS[names.RULE_MEMORY_HEADROOM],
    )


FINDING_MARKS: Final = Annotation(
    name="Findings", colour="red", query=Query(newest(names.FINDING_ACTIVE), "{{rule}} ({{severity}})")
)
