"""For those who answer for the service: is training as reliable as promised, and what is going on."""

from __future__ import annotations

from typing import Final

from links import EXECUTIVE
from panels import (
    JOB_LEGEND,
    Dashboard,
    Panel,
    Query,
    Row,
    equal,
    newest,
    or_zero,
    over_replicas,
)
from stored import cost_per_epoch
from variables import EPOCH_STEPS, METRIC_FILTER, select

from gradwatch import conventions as names

_SUCCESS: Final = equal("slo", names.SLO_TRAINING_SUCCESS_RATE)
_GROUP: Final = f"{{{{slo}}}} {JOB_LEGEND} {{{{tier}}}} {{{{team}}}}"
_NO_OBJECTIVE: Final = "No objective is evaluated for this selection"


def _events(quality: str) -> str:
    # Without its own label the column falls into the same row as the objective's other numbers.
    counted = newest(names.SLO_EVENTS, equal("quality", quality))
    return f"sum without (quality) ({counted})"


def _live(tier: str) -> str:
    return or_zero(f"sum({newest(names.RUNS_LIVE, equal('tier', tier))})")


_OBJECTIVES: Final = Row(
    "Objectives",
    (
        Panel(
            kind="stat",
            title="Training success rate",
            description="Good runs of all counted runs in the objective's window. By default 99 % is promised"
            " for production and 90 % for experiments.",
            unit="percentunit",
            empty="No counted run in the window",
            queries=(Query(newest(names.SLO_SLI, _SUCCESS), _GROUP),),
            runbook="GradwatchSuccessRateBudget",
            width=6,
            base="red",
            thresholds=((0.9, "yellow"), (0.99, "green")),
        ),
        Panel(
            kind="stat",
            title="Error budget left",
            description="1 - bad / (n (1 - target)): 100 % is all of it; below zero more failed than promised.",
            unit="percentunit",
            empty=_NO_OBJECTIVE,
            queries=(Query(newest(names.SLO_BUDGET_REMAINING), _GROUP),),
            runbook="GradwatchSuccessRateBudget",
            width=6,
            base="red",
            thresholds=((0.0, "yellow"), (0.25, "green")),
        ),
        Panel(
            kind="table",
            title="Objectives",
            description="Every objective now, with its verdict. With few runs the share alone says little: the"
            " p-value is the probability of so many bad runs if the target held.",
            unit="none",
            empty=_NO_OBJECTIVE,
            queries=(
                Query(f"{newest(names.SLO_VERDICT)} == 1"),
                Query(newest(names.SLO_SLI), "SLI", "percentunit"),
                Query(newest(names.SLO_TARGET), "target", "percentunit"),
                Query(_events("good"), "good"),
                Query(_events("bad"), "bad"),
                Query(newest(names.SLO_BUDGET_REMAINING), "budget left", "percentunit"),
                Query(newest(names.SLO_P_VALUE), "p-value", "sci"),
            ),
            runbook="GradwatchObjectiveMissed",
            width=12,
        ),
        Panel(
            kind="timeseries",
            title="Success rate against its target",
            description="Share of good runs in the objective's window, as it was known at each time.",
            unit="percentunit",
            empty=_NO_OBJECTIVE,
            queries=(
                Query(newest(names.SLO_SLI, _SUCCESS), f"SLI {_GROUP}"),
                Query(newest(names.SLO_TARGET, _SUCCESS), f"target {_GROUP}"),
            ),
            width=12,
            most=1.0,
        ),
        Panel(
            kind="timeseries",
            title="Error budget left over time",
            description="Falls with every bad run, and recovers as bad runs leave the window.",
            unit="percentunit",
            empty=_NO_OBJECTIVE,
            queries=(Query(newest(names.SLO_BUDGET_REMAINING), _GROUP),),
            width=12,
            base="red",
            thresholds=((0.0, "green"),),
        ),
        Panel(
            kind="timeseries",
            title="Burn rate of the error budget",
            description="Error rate over each look-back, by the rate that the target allows: at 1 the budget is"
            " just spent at the end of the window.",
            unit="none",
            empty="No objective counts many events, and no alert policy asks for a burn rate",
            queries=(Query(newest(names.SLO_BURN_RATE), f"{_GROUP} {{{{window}}}}"),),
            runbook="GradwatchBudgetBurn",
            width=24,
        ),
    ),
)

_ACTIVITY: Final = Row(
    "Activity",
    (
        Panel(
            kind="stat",
            title="Active experiments",
            description="Runs of tier experiment that are live now.",
            unit="none",
            empty="No collector is scraped",
            queries=(Query(_live(names.TIER_EXPERIMENT)),),
            width=4,
            base="blue",
        ),
        Panel(
            kind="stat",
            title="Live production runs",
            description="Runs of tier production that are live now.",
            unit="none",
            empty="No collector is scraped",
            queries=(Query(_live(names.TIER_PRODUCTION)),),
            width=4,
            base="blue",
        ),
        Panel(
            kind="timeseries",
            title="Live runs",
            description="Runs that are live, by job.",
            unit="none",
            empty="No job in this selection",
            queries=(Query(newest(names.RUNS_LIVE), JOB_LEGEND),),
            width=8,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Runs ended",
            description="Runs that ended, by how they ended. An increase is scaled to the interval it was"
            " measured over, so that a single run may show as a fraction more or less than 1.",
            unit="none",
            empty="No job in this selection",
            queries=(
                Query(
                    "sum by (status)"
                    f" ({over_replicas(f'increase({select(names.RUNS_ENDED)}[$__rate_interval])')})",
                    "{{status}}",
                ),
            ),
            width=8,
            least=0,
            bars=True,
        ),
    ),
)

_MODELS: Final = Row(
    "Models",
    (
        Panel(
            kind="timeseries",
            title="Model validation metric",
            description="Last value of each metric given to `watch.log`, such as the validation loss, over the"
            " job's runs. Choose among them with the metric filter.",
            unit="none",
            empty="No run of this selection logged a metric",
            queries=(
                Query(newest(names.LAST_METRIC, f'name=~"${METRIC_FILTER}"'), f"{JOB_LEGEND} {{{{name}}}}"),
            ),
            width=12,
        ),
        Panel(
            kind="timeseries",
            title="Time to target",
            description="Median time from the start to the first time the target held, over the job's last 20"
            " runs that reached it.",
            unit="s",
            empty="No run of this selection reached a target",
            queries=(Query(newest(names.TIME_TO_TARGET), JOB_LEGEND),),
            width=12,
            least=0,
            runbook=names.RULE_ALERTS[names.RULE_SLOW_CONVERGENCE],
        ),
        cost_per_epoch(f"${{{EPOCH_STEPS}:sqlstring}}", width=24),
    ),
)

EXECUTIVE_DASHBOARD: Final = Dashboard(
    uid=EXECUTIVE,
    title="gradwatch / Executive",
    description="Is training as reliable as promised, and what is going on.",
    since="now-7d",
    refresh="1m",
    rows=(_OBJECTIVES, _ACTIVITY, _MODELS),
    metrics=True,
    epochs=True,
)
