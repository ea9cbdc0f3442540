"""Panels about what is stored: every value and every run there is, live or over, as PostgreSQL has them."""

from __future__ import annotations

from typing import Final

from panels import LAYER_COLUMN, NORM_COLUMN, STEP_COLUMN, Annotation, Panel, Sql
from postgres import THE_RUN, THESE_RUNS, chosen, literal, moment, told

from gradwatch import conventions as names

NO_DATABASE: Final = "Nothing is stored of this selection and time; needs the PostgreSQL data source"

_LONGEST: Final = (names.COLLECTIVE_DURATION.name, "max")
_BUCKET: Final = "$__timeGroupAlias(time, $__interval)"
_NEWEST: Final = "ORDER BY 1 DESC LIMIT 200"
# Grafana's names for them; a time is shown as one without.
_CHECKPOINT_UNITS: Final = {"size": "bytes", "duration": "s"}


def _attribute(name: str, column: str) -> str:
    return f"attributes ->> {literal(name)} AS {column}"


def curve(
    metric: names.Metric,
    title: str,
    description: str,
    unit: str,
    *,
    by: str | None = None,
    runbook: str | None = None,
    logarithmic: bool = False,
    width: int = 12,
) -> Panel:
    """A metric of the run as it was sent, the highest over ranks; one line for each value of an attribute."""
    return Panel(
        kind="timeseries",
        title=title,
        description=description,
        unit=unit,
        empty=NO_DATABASE,
        # Lines of several are named by what they differ in.
        queries=(Sql(_curve(metric, by), legend=title if by is None else ""),),
        width=width,
        logarithmic=logarithmic,
        runbook=runbook,
    )


def _curve(metric: names.Metric, by: str | None) -> str:
    from_where = told(THE_RUN, (metric.name, "value"))
    if by is None:
        return f"SELECT {_BUCKET}, max(value) AS value {from_where} GROUP BY 1 ORDER BY 1"
    # Labels are read once for each line and bucket, not once for each value.
    return (
        f"WITH told AS (SELECT {_BUCKET}, set_id, position, max(value) AS value {from_where} GROUP BY 1, 2, 3)"
        f" SELECT time, coalesce({_by(by)}, 'all') AS metric, max(value) AS value"
        " FROM told JOIN labels USING (set_id, position) GROUP BY 1, 2 ORDER BY 1"
    )


def _by(attribute: str) -> str:
    return f"attributes ->> {literal(attribute)}"


def layer_norms(*, height: int = 12) -> Panel:
    """The heat map of gradient norms."""
    return Panel(
        kind="heatmap",
        title="Gradient norms by layer",
        description="Largest L2 norm of each layer's gradient over the steps of the newest run chosen, in"
        " decades: -3 is 0.001, and all below -12 is -12. The first layer is on top. A row that turns cold is"
        " vanishing, a column that turns hot an explosion, a gap has no finite norm.",
        unit="none",
        empty=NO_DATABASE,
        queries=(Sql(_LAYER_NORMS),),
        width=24,
        height=height,
        runbook=names.RULE_ALERTS[names.RULE_GRADIENT_EXPLOSION],
    )


_MOMENT: Final = "nanos / (SELECT nanoseconds FROM moment)"
_STEP: Final = names.STEP_INDEX.name
_WHOLE: Final = names.LAYER_GRADIENT_NORM.name
_SHARD: Final = names.LAYER_GRADIENT_SHARD_SQUARE.name
# Every layer has a row in every column, or columns that have none would draw the others too wide. There are a
# hundred of them, and fewer where few norms were told. Values are gathered by two hundred moments of the run
# first, each of the last step that had ended by then: an hour of 300 layers takes three seconds. Ranks send the
# squares of their shards of a layer at each step, which are its norm once those of all ranks are there; that
# needs every value at once, and is only asked for where there are shards.
_LAYER_NORMS: Final = f"""\
WITH moment AS MATERIALIZED (
  SELECT greatest(least($__unixEpochNanoTo(), last_seen_at) - greatest($__unixEpochNanoFrom(), started_at), 0)
    / 200 + 1 AS nanoseconds
  FROM run WHERE run_id IN {THE_RUN}
), told AS (
  SELECT attempt, {_MOMENT} AS moment, set_id, position, max(value) AS norm, NULL::float8 AS step
  {told(THE_RUN, (_WHOLE, "max"))} GROUP BY 1, 2, 3, 4
  UNION ALL
  SELECT attempt, {_MOMENT}, NULL, NULL, NULL, max(value) {told(THE_RUN, (_STEP, "value"))} GROUP BY 1, 2
), shard AS (
  SELECT metric, attempt, rank, set_id, position, value,
    max(CASE metric WHEN {literal(_STEP)} THEN value END)
      OVER (PARTITION BY attempt, rank ORDER BY nanos) AS step
  {told(THE_RUN, (_STEP, "value"), (_SHARD, "value"))}
    AND EXISTS (SELECT {told(THE_RUN, (_SHARD, "value"))})
), norm AS (
  SELECT reached AS step, set_id, position, norm FROM (
    SELECT *, max(step) OVER (PARTITION BY attempt ORDER BY moment) AS reached FROM told
  ) AS placed WHERE reached IS NOT NULL AND norm IS NOT NULL
  UNION ALL
  SELECT step, set_id, position, sqrt(sum(value)) FROM shard
  WHERE metric = {literal(_SHARD)} AND step IS NOT NULL
  GROUP BY attempt, step, set_id, position
  HAVING count(DISTINCT rank) = (SELECT rank_count FROM run WHERE run_id IN {THE_RUN})
), scale AS (
  SELECT min(step) AS first, max(step) AS last,
    ceil((max(step) - min(step) + 1) / least(100, greatest(count(DISTINCT step) / 2, 1))) AS width
  FROM norm
), cell AS (
  SELECT floor((step - first) / width)::int AS number, set_id, position,
    max(CASE WHEN norm < 'infinity' THEN log(greatest(norm, 1e-12)) END) AS norm
  FROM norm CROSS JOIN scale GROUP BY 1, 2, 3
), layer AS MATERIALIZED (
  SELECT set_id, position, {_by(names.LAYER_NAME)} AS name
  FROM labels WHERE set_id IN (SELECT DISTINCT set_id FROM cell)
), grid AS (
  SELECT number, name, position, norm FROM cell JOIN layer USING (set_id, position)
  UNION ALL
  SELECT number, name, position, NULL FROM scale
  CROSS JOIN generate_series(0, floor((last - first) / width)::int) AS number CROSS JOIN layer
)
SELECT first + width * number AS {STEP_COLUMN}, name AS {LAYER_COLUMN}, max(norm) AS {NORM_COLUMN}
FROM grid CROSS JOIN scale GROUP BY 1, 2 ORDER BY 1, min(position), 2"""


def nonfinite_log(*, width: int = 24) -> Panel:
    """Every batch that went bad, as it was told."""
    query = (
        f"SELECT {moment('event.time', 'time')}, run_id, attempt, rank, {_attribute(names.STEP, 'step')},"
        f" {_attribute(names.LAYER_NAME, 'layer')}, {_attribute(names.BORN_IN, 'born_in')},"
        f" {_attribute(names.LOSS_VALUE, 'loss')}, {_attribute(names.NONFINITE_LAYERS, 'layers')},"
        f" {_attribute(names.NONFINITE_ELEMENTS, 'elements')}, {_attribute(names.NONFINITE_STEPS, 'so_far')}"
        f" FROM event WHERE run_id IN {THESE_RUNS} AND name = {literal(names.NONFINITE_STEP.name)}"
        f" AND $__unixEpochNanoFilter(event.time) {_NEWEST}"
    )
    return Panel(
        kind="table",
        title="Non-finite batches",
        description="Each batch whose loss or gradient was NaN or infinite: its first layer in backward order,"
        " where the value was born, and how many layers and elements had one. Of many the first ten are told,"
        " then the hundredth, the thousandth and so on.",
        unit="none",
        empty="No batch of this selection and time went bad; needs the PostgreSQL data source",
        queries=(Sql(query),),
        width=width,
        runbook=names.RULE_ALERTS[names.RULE_NONFINITE],
    )


def checkpoints(*, width: int = 24) -> Panel:
    """Attempts to save or verify."""
    query = (
        f"SELECT {moment('checkpoint.time', 'time')}, run_id, checkpoint.state, step, checkpoint.name, size,"
        " seconds AS duration, error"
        f" FROM checkpoint WHERE run_id IN {THESE_RUNS} AND $__unixEpochNanoFilter(checkpoint.time) {_NEWEST}"
    )
    return Panel(
        kind="table",
        title="Recent checkpoints",
        description="Checkpoints that were saved, verified, failed or were found corrupt, the newest first. A"
        " run can go on from the newest one that is saved or verified.",
        unit="none",
        empty="No checkpoint in this selection and time; needs the PostgreSQL data source",
        queries=(Sql(query, units=_CHECKPOINT_UNITS),),
        width=width,
        runbook=names.RULE_ALERTS[names.RULE_CHECKPOINT_FAILED],
    )


def _longest_collectives(runs: str, column: str, shown: str) -> str:
    """Longest operation of each kind in each stretch of time, by a column of `trend` as it is ``shown``."""
    return (
        f"WITH told AS (SELECT {_BUCKET}, {column}, set_id, position, max(value) AS value"
        f" {told(runs, _LONGEST)} GROUP BY 1, 2, 3, 4)"
        f" SELECT time, {shown}, {_by(names.COLLECTIVE)} AS operation, max(value) AS value"
        " FROM told JOIN labels USING (set_id, position) GROUP BY 1, 2, 3 ORDER BY 1"
    )


def collectives_of_runs(*, width: int = 24) -> Panel:
    """Which run waits for its network."""
    query = _longest_collectives(THESE_RUNS, "run_id", "run_id")
    return Panel(
        kind="timeseries",
        title="Collective latency",
        description="Longest collective operation of each run and kind, over its ranks. The slow rank is on the"
        " debug dashboard.",
        unit="s",
        empty="No run of this selection and time told of collectives; needs the PostgreSQL data source",
        queries=(Sql(query, "${__field.labels.run_id} ${__field.labels.operation}"),),
        width=width,
        least=0,
        runbook=names.RULE_ALERTS[names.RULE_SLOW_COLLECTIVE],
    )


def collectives_of_ranks(*, width: int = 12) -> Panel:
    """Which rank the others wait for: its own operations are the short ones."""
    query = _longest_collectives(THE_RUN, "rank", "rank::text AS rank")
    return Panel(
        kind="timeseries",
        title="Network latency",
        description="Longest collective operation of each rank and kind, of the newest run chosen. The others"
        " wait for the slowest rank, whose own operations are therefore the short ones.",
        unit="s",
        empty="The run told of no collectives in this time; needs the PostgreSQL data source",
        queries=(Sql(query, "rank ${__field.labels.rank} ${__field.labels.operation}"),),
        width=width,
        least=0,
        runbook=names.RULE_ALERTS[names.RULE_STRAGGLER],
    )


def runs(*, title: str, width: int = 24) -> Panel:
    """Runs of the selection, live or over."""
    query = (
        f"SELECT {moment('started_at', 'started')}, run_id, job, model, dataset, team, tier, status, reason,"
        " (coalesce(ended_at, last_seen_at) - started_at) / 1e9 AS duration, last_step,"
        " CASE WHEN last_loss_nonfinite THEN NULL ELSE last_loss END AS last_loss, host, commit"
        f" FROM run WHERE {chosen()} AND started_at <= $__unixEpochNanoTo()"
        f" AND last_seen_at >= $__unixEpochNanoFrom() {_NEWEST}"
    )
    return Panel(
        kind="table",
        title=title,
        description="Runs of the selection that were there at some time of those shown, live or over, the"
        " newest first.",
        unit="none",
        empty=NO_DATABASE,
        queries=(Sql(query, units={"duration": "s"}),),
        width=width,
    )


def cost_per_epoch(steps: str, *, width: int = 12) -> Panel:
    """What training costs; ``steps`` is Grafana's expression for how many an epoch has."""
    query = (
        f"SELECT {moment('ended_at', 'time')}, concat_ws(' ', job, model, dataset) AS metric,"
        f" step_cost / 1000 * {steps}::numeric::float8 AS value"
        f" FROM run JOIN run_summary USING (run_id) WHERE {chosen()}"
        " AND $__unixEpochNanoFilter(ended_at) AND step_cost IS NOT NULL ORDER BY 1"
    )
    return Panel(
        kind="timeseries",
        title="Cost per epoch",
        description="What an epoch of so many steps cost in each run that ended, in the currency of the price"
        " table. Agents tell of steps and not of epochs: say above how many steps one has. A rise of 20 % is a"
        " ticket.",
        unit="none",
        empty="No run with a known price ended in this time; needs `gradwatch collector serve --prices`, and"
        " the PostgreSQL data source",
        queries=(Sql(query),),
        width=width,
        least=0,
        runbook=names.RULE_ALERTS[names.RULE_SWEEP_COST],
    )


CHECKPOINT_MARKS: Final = Annotation(
    name="Checkpoints",
    colour="blue",
    query=Sql(
        f"SELECT {moment('checkpoint.time', 'time')},"
        " concat_ws(' ', 'checkpoint', checkpoint.state, 'at step', checkpoint.step, 'of', run_id) AS text,"
        " checkpoint.state AS tags"
        f" FROM checkpoint WHERE run_id IN {THESE_RUNS} AND $__unixEpochNanoFilter(checkpoint.time)"
        " ORDER BY 1 DESC LIMIT 200"
    ),
)
