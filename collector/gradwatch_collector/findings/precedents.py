"""How the loss of earlier runs fell that went well: what a run of the same kind can be expected to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sqlalchemy import Connection, exists

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import levels_of
from gradwatch_collector.findings.predecessors import like
from gradwatch_collector.findings.run_view import Levels
from gradwatch_collector.runs.curves import Curve, read_curves
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

# Each costs a read of its whole loss.
MOST: Final = 5
# Nobody wishes that the next run is like one that had such a finding.
_ILL_LEARNING: Final = (
    c.RULE_NONFINITE, c.RULE_GRADIENT_EXPLOSION, c.RULE_VANISHING_GRADIENT, c.RULE_LOSS_SCALE_COLLAPSE,
    c.RULE_OVER_CLIPPING, c.RULE_NOISY_GRADIENTS, c.RULE_STALE_GRADIENTS, c.RULE_DIVERGENCE, c.RULE_PLATEAU,
    c.RULE_SLOW_CONVERGENCE, c.RULE_OVERFITTING, c.RULE_INPUT_SHIFT,
)  # fmt: skip


def load_precedents(connection: Connection, run: RunRow) -> Sequence[Levels]:
    """Read the training losses of at most 5 earlier runs, newest first; times are from their starts.

    Of the same job, model and data set, that succeeded in one attempt with one optimizer, and of which no
    finding says that they learned badly.
    """
    table, finding = schema.run.c, schema.finding.c
    earlier = load_runs(
        connection,
        *like(run),
        table.status == Status.SUCCEEDED,
        table.ended_at <= run.started_at,
        ~exists().where(finding.run_id == table.run_id, finding.rule.in_(_ILL_LEARNING)),
        limit=MOST,
    )
    losses = [(each, read_curves(connection, each.run_id, c.LOSS)) for each in earlier]
    return [_since_start(each, curves[0]) for each, curves in losses if len(curves) == 1]


def _since_start(run: RunRow, curve: Curve) -> Levels:
    known = levels_of(curve.times, curve.values, curve.finite + curve.nonfinite)
    return replace(known, times=known.times - run.started_at)
