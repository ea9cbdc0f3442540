"""What objectives count by the hour, which hours changed, what is excluded; runs' baselines and summaries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009_objectives"
down_revision = "0008_spans_of_runs"
branch_labels = None
depends_on = None
loses = "exclusions; baselines of runs"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
GOOD = sa.text("status = 'succeeded' AND target_reached_at IS NOT NULL")
SUCCEEDED = sa.text("status = 'succeeded'")
COUNTS = (
    "steps",
    "observed_steps",
    "unhealthy_steps",
    "nonfinite_steps",
    "skipped_steps",
    "checkpoints",
    "failed_checkpoints",
)
VALUES = (
    "gpu_utilization",
    "collective_p95",
    "collective_p95_ratio",
    "memory_headroom",
    "step_cost",
    "step_cost_ratio",
    "quality",
    "quality_delta",
    "effective_time_ratio",
)


def upgrade() -> None:
    op.add_column("run", sa.Column("baseline", sa.BigInteger()))
    op.create_index(
        "run_good_idx",
        "run",
        ["job", "model", "dataset", "ended_at"],
        sqlite_where=GOOD,
        postgresql_where=GOOD,
    )
    op.create_index(
        "run_succeeded_idx",
        "run",
        ["job", "model", "dataset", "ended_at"],
        sqlite_where=SUCCEEDED,
        postgresql_where=SUCCEEDED,
    )
    op.create_table(
        "slo_indicator",
        sa.Column("indicator_id", ROW_ID, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("counted_from", sa.BigInteger(), nullable=False),
        sa.Column("counted_to", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("indicator_id", name="slo_indicator_pkey"),
        sa.UniqueConstraint("key", name="slo_indicator_key_key"),
    )
    op.create_table(
        "slo_count",
        sa.Column("indicator_id", ROW_ID, nullable=False),
        sa.Column("hour", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("job", sa.Text()),
        sa.Column("model", sa.Text()),
        sa.Column("dataset", sa.Text()),
        sa.Column("team", sa.Text()),
        sa.Column("tier", sa.Text()),
        sa.Column("good", sa.BigInteger(), nullable=False),
        sa.Column("bad", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("indicator_id", "hour", "number", name="slo_count_pkey"),
        sa.ForeignKeyConstraint(
            ["indicator_id"], ["slo_indicator.indicator_id"], name="slo_count_indicator_id_fkey"
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "run_change",
        sa.Column("change_id", ROW_ID, nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("change_id", name="run_change_pkey"),
    )
    op.create_table(
        "exclusion",
        sa.Column("exclusion_id", ROW_ID, nullable=False),
        sa.Column("single_run", sa.Text()),
        sa.Column("start", sa.BigInteger()),
        sa.Column("end", sa.BigInteger()),
        sa.Column("fields", JSON, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.Column("withdrawn_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("exclusion_id", name="exclusion_pkey"),
    )
    op.create_index("exclusion_single_run_idx", "exclusion", ["single_run"])
    op.create_table(
        "run_summary",
        sa.Column("run_id", sa.Text(), nullable=False),
        *(sa.Column(name, sa.BigInteger()) for name in COUNTS),
        *(sa.Column(name, sa.Double()) for name in VALUES),
        sa.PrimaryKeyConstraint("run_id", name="run_summary_pkey"),
    )
    op.create_table(
        "summary_due",
        sa.Column("due_id", ROW_ID, nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("told_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("due_id", name="summary_due_pkey"),
    )
    op.create_index("summary_due_run_id_idx", "summary_due", ["run_id"])
    # In the order in which they ended, as runs are compared with those before them.
    op.execute(
        "INSERT INTO summary_due (run_id, told_at) "
        "SELECT run_id, 0 FROM run WHERE status <> 'running' ORDER BY ended_at"
    )


def downgrade() -> None:
    """Take the schema back; exclusions have no place in it and are lost."""
    op.drop_table("summary_due")
    op.drop_table("run_summary")
    op.drop_table("exclusion")
    op.drop_table("run_change")
    op.drop_table("slo_count")
    op.drop_table("slo_indicator")
    op.drop_index("run_succeeded_idx", "run")
    op.drop_index("run_good_idx", "run")
    op.drop_column("run", "baseline")
