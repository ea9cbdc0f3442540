"""The tables, once: migrations are checked against them.

Moments are BIGINT Unix nanoseconds in UTC: exact, the same in SQLite and PostgreSQL, and free of naive
datetimes. Column types that differ between the two databases say so with a variant.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    REAL,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    }
)

# SQLite only auto-increments a plain INTEGER primary key.
RowId = BigInteger().with_variant(Integer(), "sqlite")
Json = JSON().with_variant(JSONB(), "postgresql")
# Vectors: compressed bytes in SQLite, arrays that SQL can unnest in PostgreSQL.
Float32s = LargeBinary().with_variant(ARRAY(REAL), "postgresql")
Float64s = LargeBinary().with_variant(ARRAY(Double), "postgresql")
Int64s = LargeBinary().with_variant(ARRAY(BigInteger), "postgresql")

# --- Runs ----------------------------------------------------------------------------------------------

run = Table(
    "run",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("job", Text, nullable=False),
    Column("model", Text),
    Column("dataset", Text),
    Column("team", Text),
    Column("tier", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("attempt", Integer, nullable=False),
    Column("rank_count", Integer, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("last_seen_at", BigInteger, nullable=False),
    Column("last_step", BigInteger),
    Column("last_loss", Double),
    Column("last_loss_nonfinite", Boolean, nullable=False),
    Column("host", Text),
    Column("commit", Text),
    Column("target", Text),
    Column("deadline_seconds", Double),
    Column("target_reached_at", BigInteger),
    # How long it may take to its target by what its predecessors took: nanoseconds, frozen at the start.
    Column("baseline", BigInteger),
    # When the outage was noticed in which the run fell silent with many others.
    Column("outage_at", BigInteger),
    Index(None, "status"),
    Index(None, "ended_at"),
    Index(None, "job", "started_at"),
    Index(None, "job", "ended_at"),
    Index(None, "started_at", "run_id"),
    # Looked at in every tick, and empty as a rule.
    Index(
        None,
        "outage_at",
        sqlite_where=text("outage_at IS NOT NULL"),
        postgresql_where=text("outage_at IS NOT NULL"),
    ),
    # What a baseline is made of, newest last.
    Index(
        "run_good_idx",
        "job",
        "model",
        "dataset",
        "ended_at",
        sqlite_where=text("status = 'succeeded' AND target_reached_at IS NOT NULL"),
        postgresql_where=text("status = 'succeeded' AND target_reached_at IS NOT NULL"),
    ),
    # What a run's summary is compared with.
    Index(
        "run_succeeded_idx",
        "job",
        "model",
        "dataset",
        "ended_at",
        sqlite_where=text("status = 'succeeded'"),
        postgresql_where=text("status = 'succeeded'"),
    ),
)

attempt = Table(
    "attempt",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("cause_rank", Integer),
    Column("rank_count", Integer, nullable=False),
    Column("will_retry", Boolean, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("evidence", Json, nullable=False),
)

# One operating-system process of a run. Also kept for telemetry that belongs to no run. A supervisor has
# rank -1.
process = Table(
    "process",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("instance", Text, primary_key=True),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("exit_code", BigInteger),
    Column("evidence", Json, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("last_seen_at", BigInteger, nullable=False),
    Column("last_step", BigInteger),
    Column("last_loss", Double),
    Column("last_loss_nonfinite", Boolean, nullable=False),
    Column("last_loss_at", BigInteger),
    # What is left of its tightest device's memory, as a share of the limit; of the host's without devices.
    Column("memory_headroom", Double),
    # When the newest batch was received; `last_seen_at` is when the process was last known to live.
    Column("heard_at", BigInteger, nullable=False),
    # What is known of its clock (`clocks.py`).
    Column("clock", Json, nullable=False),
    Column("will_retry", Boolean, nullable=False),
    # False until the first training.run.* event: until then it is telemetry, not a run.
    Column("is_run", Boolean, nullable=False),
    Column("resource", Json, nullable=False),
    Index(None, "status", "heard_at"),
)

# Every change of a run's status, with its evidence; corrections are appended, nothing is overwritten.
run_history = Table(
    "run_history",
    metadata,
    Column("history_id", RowId, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("recorded_at", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    Column("evidence", Json, nullable=False),
    Index(None, "run_id", "history_id"),
    Index(None, "recorded_at"),
)

event = Table(
    "event",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("instance", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("received_at", BigInteger, nullable=False),
    Column("severity", Integer, nullable=False),
    Column("body", Text),
    Column("attributes", Json, nullable=False),
    Index(None, "run_id", "time"),
    Index(None, "received_at"),
)

# Every attempt to save or verify a checkpoint: what the events say, in columns.
checkpoint = Table(
    "checkpoint",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("instance", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("time", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("name", Text),
    Column("step", BigInteger),
    Column("size", BigInteger),
    Column("seconds", Double),
    Column("error", Text),
    Index(None, "run_id", "time"),
    Index(None, "time"),
    # What every tick looks for.
    Index(
        "checkpoint_corrupt_idx",
        "time",
        sqlite_where=text("state = 'corrupt'"),
        postgresql_where=text("state = 'corrupt'"),
    ),
)

span = Table(
    "span",
    metadata,
    Column("trace_id", Text, primary_key=True),
    Column("span_id", Text, primary_key=True),
    Column("parent_span_id", Text),
    # Ids are the senders' own: nobody can keep another's span out by sending one of the same ids first.
    Column("run_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("rank", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("kind", Integer, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("end", BigInteger, nullable=False),
    Column("status", Integer, nullable=False),
    Column("attributes", Json, nullable=False),
    Column("events", Json, nullable=False),
    Index(None, "run_id", "start"),
    Index(None, "start"),
)

finding = Table(
    "finding",
    metadata,
    Column("finding_id", RowId, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("rule", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("rank", Integer),
    Column("step", BigInteger),
    Column("layer", Text),
    Column("born_in", Text),
    Column("first_seen", BigInteger, nullable=False),
    Column("last_seen", BigInteger, nullable=False),
    Column("resolved_at", BigInteger),
    Column("evidence", Json, nullable=False),
    # Who has it in hand.
    Column("acknowledged_at", BigInteger),
    Column("acknowledged_by", Text),
    Column("note", Text),
    UniqueConstraint("run_id", "attempt", "rule"),
    Index(None, "state", "last_seen"),
)

# Findings that raise no alert until a moment: of one run, of jobs (a shell pattern), of a rule; NULL is any.
silence = Table(
    "silence",
    metadata,
    Column("silence_id", RowId, primary_key=True),
    Column("single_run", Text),
    Column("job", Text),
    Column("rule", Text),
    Column("until", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("recorded_at", BigInteger, nullable=False),
    Index(None, "until"),
)

# --- Objectives: what their indicators counted, so that a report need not read every run there ever was ------

# What an SLI counts, and by which fields: `key` spells it out. `hour` rows of it are complete from the hour
# `counted_from` up to and without `counted_to`, but for the hours that `run_change` names.
slo_indicator = Table(
    "slo_indicator",
    metadata,
    Column("indicator_id", RowId, primary_key=True),
    Column("key", Text, nullable=False, unique=True),
    Column("counted_from", BigInteger, nullable=False),
    Column("counted_to", BigInteger, nullable=False),
)

# Of the runs that ended within an hour (UTC, numbered from 1970) and one group of them. Fields that the
# indicator does not group by are NULL, and hours without any count have no row.
slo_count = Table(
    "slo_count",
    metadata,
    Column("indicator_id", RowId, ForeignKey(slo_indicator.c.indicator_id), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("job", Text),
    Column("model", Text),
    Column("dataset", Text),
    Column("team", Text),
    Column("tier", Text),
    Column("good", BigInteger, nullable=False),
    Column("bad", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Hours of which something is not as it was counted. Rows are only added, and removed by whoever counts them
# anew: a row that is there already could be taken away while somebody relies on it.
run_change = Table(
    "run_change",
    metadata,
    Column("change_id", RowId, primary_key=True),
    Column("hour", BigInteger, nullable=False),
)

# Runs that no objective counts, and why: a single one, or those that ended from `start` (inclusive) to `end`
# (exclusive) and match `fields`.
exclusion = Table(
    "exclusion",
    metadata,
    Column("exclusion_id", RowId, primary_key=True),
    Column("single_run", Text),
    Column("start", BigInteger),
    Column("end", BigInteger),
    Column("fields", Json, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("recorded_at", BigInteger, nullable=False),
    Column("withdrawn_at", BigInteger),
    Index(None, "single_run"),
)

# What is known of an ended run beyond how it ended (`runs/summary.py`); NULL is not known.
run_summary = Table(
    "run_summary",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("steps", BigInteger),
    Column("observed_steps", BigInteger),
    Column("unhealthy_steps", BigInteger),
    Column("nonfinite_steps", BigInteger),
    Column("skipped_steps", BigInteger),
    Column("checkpoints", BigInteger),
    Column("failed_checkpoints", BigInteger),
    Column("gpu_utilization", Double),
    Column("collective_p95", Double),
    Column("collective_p95_usual", Double),
    Column("collective_p95_ratio", Double),
    Column("memory_headroom", Double),
    Column("step_cost", Double),
    Column("currency", Text),
    Column("step_cost_usual", Double),
    Column("step_cost_ratio", Double),
    Column("quality", Double),
    Column("quality_before", Double),
    Column("quality_delta", Double),
    Column("effective_time_ratio", Double),
    # Whether what was usual was looked up: it stays as it was then.
    Column("compared", Boolean, nullable=False, server_default=true()),
)

# Ended runs whose summary is not there, or of which more has become known since. As in `run_change`, rows are
# only added, and removed by whoever has summarised what they tell of.
summary_due = Table(
    "summary_due",
    metadata,
    Column("due_id", RowId, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("told_at", BigInteger, nullable=False),
    Index(None, "run_id"),
)

# --- Numbers: interned series, frames as they arrive, blocks after compaction, roll-ups after that -----

metric = Table(
    "metric",
    metadata,
    Column("metric_id", RowId, primary_key=True),
    Column("name", Text, nullable=False),
    Column("unit", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("temporality", Integer, nullable=False),
    Column("monotonic", Boolean, nullable=False),
    UniqueConstraint("name", "unit", "kind", "temporality", "monotonic"),
)

attribute_set = Table(
    "attribute_set",
    metadata,
    Column("set_id", RowId, primary_key=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("width", Integer, nullable=False),
    Column("points", Json, nullable=False),
)

series = Table(
    "series",
    metadata,
    Column("series_id", RowId, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("metric_id", RowId, ForeignKey(metric.c.metric_id), nullable=False),
    Column("field", Text, nullable=False),
    Column("set_id", RowId, ForeignKey(attribute_set.c.set_id), nullable=False),
    UniqueConstraint("run_id", "attempt", "rank", "metric_id", "field", "set_id"),
    # Who sent a metric, newest first.
    Index(None, "metric_id", "series_id"),
)


def _payload() -> list[Column[object]]:
    # Exactly one of f32, f64, i64, packed is set: the column is the type. Values are layer-major:
    # all times of the first point, then all of the second.
    return [
        Column("count", Integer, nullable=False),
        Column("times", Int64s),  # NULL when count is 1: then it is the key's time
        Column("f32", Float32s),
        Column("f64", Float64s),
        Column("i64", Int64s),
        Column("packed", LargeBinary),
    ]


# Append table; PostgreSQL partitions it by time (the first migration and `partitions.py`).
frame = Table(
    "frame",
    metadata,
    Column("series_id", RowId, primary_key=True, autoincrement=False),
    Column("time", BigInteger, primary_key=True, autoincrement=False),
    *_payload(),
    postgresql_partition_by="RANGE (time)",
)

# No block reaches into the next day (UTC), so that a day's partition holds that day and nothing else.
block = Table(
    "block",
    metadata,
    Column("series_id", RowId, primary_key=True, autoincrement=False),
    Column("time", BigInteger, primary_key=True, autoincrement=False),
    Column("last_time", BigInteger, nullable=False),
    *_payload(),
    postgresql_partition_by="RANGE (time)",
)

# What is left of blocks that were pruned: a statistic of every 64 times of a series (`rollups.py`), under the
# last of them.
rollup = Table(
    "rollup",
    metadata,
    Column("series_id", RowId, primary_key=True, autoincrement=False),
    Column("statistic", Text, primary_key=True),
    Column("time", BigInteger, primary_key=True, autoincrement=False),
    Column("last_time", BigInteger, nullable=False),
    *_payload(),
    postgresql_partition_by="RANGE (time)",
)

# --- Collectors that share the database ----------------------------------------------------------------

# Who may do what only one may (`lease.py`). The term grows with every holder.
lease = Table(
    "lease",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    # When a holder last did what the lease is for.
    Column("done_at", BigInteger, nullable=False),
)

# --- Access --------------------------------------------------------------------------------------------

token = Table(
    "token",
    metadata,
    Column("token_id", RowId, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("team", Text),
    # Comma-separated, in the order of `auth.Role`.
    Column("roles", Text, nullable=False),
    Column("requests_per_second", Double),
    Column("bytes_per_second", Double),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    # To the minute.
    Column("last_used_at", BigInteger),
    Column("revoked_at", BigInteger),
)

# What people did to the service; rows are only ever added.
audit = Table(
    "audit",
    metadata,
    Column("audit_id", RowId, primary_key=True),
    Column("recorded_at", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("details", Json, nullable=False),
)
