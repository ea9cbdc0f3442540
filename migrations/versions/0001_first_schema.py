"""The first schema: runs, events, findings, interned series, frames and blocks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None
loses = "all that is stored"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
FLOAT32S = sa.LargeBinary().with_variant(postgresql.ARRAY(sa.REAL()), "postgresql")
FLOAT64S = sa.LargeBinary().with_variant(postgresql.ARRAY(sa.Double()), "postgresql")
INT64S = sa.LargeBinary().with_variant(postgresql.ARRAY(sa.BigInteger()), "postgresql")

# One row a value, for Grafana and for people: what frames and blocks hold, by the attributes of its point. A
# sample that was sent again after it was compacted shows twice until the next compaction. Filter by `nanos`,
# which partitions and keys know, as well as by run and metric.
SAMPLE_VIEW = """
CREATE VIEW sample AS
SELECT s.run_id, s.attempt, s.rank, m.name AS metric, m.unit, s.field,
       a.points -> ((v.position - 1) / p.count)::int AS attributes,
       to_timestamp(t.nanos / 1e9) AS time, t.nanos, v.value
FROM series s
JOIN metric m USING (metric_id)
JOIN attribute_set a USING (set_id)
JOIN (
    SELECT series_id, time, count, times, f32, f64, i64 FROM frame
    UNION ALL
    SELECT series_id, time, count, times, f32, f64, i64 FROM block
) p USING (series_id)
CROSS JOIN LATERAL unnest(coalesce(p.f64, p.f32::float8[], p.i64::float8[]))
    WITH ORDINALITY AS v (value, position)
CROSS JOIN LATERAL (
    SELECT coalesce(p.times[(v.position - 1) % p.count + 1], p.time) AS nanos
) t
"""


def upgrade() -> None:
    op.create_table(
        "attempt",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("cause_rank", sa.Integer()),
        sa.Column("rank_count", sa.Integer(), nullable=False),
        sa.Column("will_retry", sa.Boolean(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("run_id", "attempt", name="attempt_pkey"),
    )
    op.create_table(
        "attribute_set",
        sa.Column("set_id", ROW_ID, nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("points", JSON, nullable=False),
        sa.PrimaryKeyConstraint("set_id", name="attribute_set_pkey"),
        sa.UniqueConstraint("digest", name="attribute_set_digest_key"),
    )
    op.create_table(
        "block",
        sa.Column("series_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("time", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("last_time", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("times", INT64S),
        sa.Column("f32", FLOAT32S),
        sa.Column("f64", FLOAT64S),
        sa.Column("i64", INT64S),
        sa.Column("packed", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("series_id", "time", name="block_pkey"),
    )
    op.create_table(
        "event",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("severity", sa.Integer(), nullable=False),
        sa.Column("body", sa.Text()),
        sa.Column("attributes", JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "attempt", "rank", "instance", "sequence", name="event_pkey"),
    )
    op.create_index("event_run_id_time_idx", "event", ["run_id", "time"])
    op.create_table(
        "finding",
        sa.Column("finding_id", ROW_ID, nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("rank", sa.Integer()),
        sa.Column("step", sa.BigInteger()),
        sa.Column("layer", sa.Text()),
        sa.Column("born_in", sa.Text()),
        sa.Column("first_seen", sa.BigInteger(), nullable=False),
        sa.Column("last_seen", sa.BigInteger(), nullable=False),
        sa.Column("resolved_at", sa.BigInteger()),
        sa.Column("evidence", JSON, nullable=False),
        sa.PrimaryKeyConstraint("finding_id", name="finding_pkey"),
        sa.UniqueConstraint("run_id", "attempt", "rule", name="finding_run_id_attempt_rule_key"),
    )
    op.create_index("finding_state_last_seen_idx", "finding", ["state", "last_seen"])
    op.create_table(
        "frame",
        sa.Column("series_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("time", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("times", INT64S),
        sa.Column("f32", FLOAT32S),
        sa.Column("f64", FLOAT64S),
        sa.Column("i64", INT64S),
        sa.Column("packed", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("series_id", "time", name="frame_pkey"),
        postgresql_partition_by="RANGE (time)",
    )
    op.create_table(
        "metric",
        sa.Column("metric_id", ROW_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("temporality", sa.Integer(), nullable=False),
        sa.Column("monotonic", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("metric_id", name="metric_pkey"),
        sa.UniqueConstraint(
            "name",
            "unit",
            "kind",
            "temporality",
            "monotonic",
            name="metric_name_unit_kind_temporality_monotonic_key",
        ),
    )
    op.create_table(
        "process",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("exit_code", sa.BigInteger()),
        sa.Column("evidence", JSON, nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger()),
        sa.Column("last_loss", sa.Double()),
        sa.Column("last_loss_nonfinite", sa.Boolean(), nullable=False),
        sa.Column("last_loss_at", sa.BigInteger()),
        sa.Column("is_run", sa.Boolean(), nullable=False),
        sa.Column("resource", JSON, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "attempt", "rank", "instance", name="process_pkey"),
    )
    op.create_index("process_status_last_seen_at_idx", "process", ["status", "last_seen_at"])
    op.create_table(
        "run",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("job", sa.Text(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("dataset", sa.Text()),
        sa.Column("team", sa.Text()),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank_count", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger()),
        sa.Column("last_loss", sa.Double()),
        sa.Column("last_loss_nonfinite", sa.Boolean(), nullable=False),
        sa.Column("host", sa.Text()),
        sa.Column("commit", sa.Text()),
        sa.Column("target", sa.Text()),
        sa.Column("deadline_seconds", sa.Double()),
        sa.Column("target_reached_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("run_id", name="run_pkey"),
    )
    op.create_index("run_ended_at_idx", "run", ["ended_at"])
    op.create_index("run_job_started_at_idx", "run", ["job", "started_at"])
    op.create_index("run_started_at_run_id_idx", "run", ["started_at", "run_id"])
    op.create_index("run_status_idx", "run", ["status"])
    op.create_table(
        "run_history",
        sa.Column("history_id", ROW_ID, nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("evidence", JSON, nullable=False),
        sa.PrimaryKeyConstraint("history_id", name="run_history_pkey"),
    )
    op.create_index("run_history_run_id_history_id_idx", "run_history", ["run_id", "history_id"])
    op.create_table(
        "span",
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column("span_id", sa.Text(), nullable=False),
        sa.Column("parent_span_id", sa.Text()),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("end", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("attributes", JSON, nullable=False),
        sa.Column("events", JSON, nullable=False),
        sa.PrimaryKeyConstraint("trace_id", "span_id", name="span_pkey"),
    )
    op.create_index("span_run_id_start_idx", "span", ["run_id", "start"])
    op.create_table(
        "token",
        sa.Column("token_id", ROW_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("team", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("token_id", name="token_pkey"),
        sa.UniqueConstraint("digest", name="token_digest_key"),
        sa.UniqueConstraint("name", name="token_name_key"),
    )
    op.create_table(
        "series",
        sa.Column("series_id", ROW_ID, nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("metric_id", ROW_ID, nullable=False),
        sa.Column("field", sa.Text(), nullable=False),
        sa.Column("set_id", ROW_ID, nullable=False),
        sa.ForeignKeyConstraint(["metric_id"], ["metric.metric_id"], name="series_metric_id_fkey"),
        sa.ForeignKeyConstraint(["set_id"], ["attribute_set.set_id"], name="series_set_id_fkey"),
        sa.PrimaryKeyConstraint("series_id", name="series_pkey"),
        sa.UniqueConstraint(
            "run_id",
            "attempt",
            "rank",
            "metric_id",
            "field",
            "set_id",
            name="series_run_id_attempt_rank_metric_id_field_set_id_key",
        ),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE TABLE frame_default PARTITION OF frame DEFAULT")
        # Values do not compress, and arrays stored plainly need not be inflated to be read.
        for table in ("frame", "frame_default", "block"):
            for column in ("times", "f32", "f64", "i64", "packed"):
                op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")
        op.execute(SAMPLE_VIEW)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP VIEW sample")
    for table in (
        "series",
        "token",
        "span",
        "run_history",
        "run",
        "process",
        "metric",
        "frame",
        "finding",
        "event",
        "block",
        "attribute_set",
        "attempt",
    ):
        op.drop_table(table)
