"""Checkpoints: one row for every attempt to save one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002_checkpoint"
down_revision = "0001"
branch_labels = None
depends_on = None
loses = "the record of checkpoints"


def upgrade() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("time", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("step", sa.BigInteger()),
        sa.Column("size", sa.BigInteger()),
        sa.Column("seconds", sa.Double()),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("run_id", "attempt", "rank", "instance", "sequence", name="checkpoint_pkey"),
    )
    op.create_index("checkpoint_run_id_time_idx", "checkpoint", ["run_id", "time"])
    op.create_index("checkpoint_time_idx", "checkpoint", ["time"])


def downgrade() -> None:
    op.drop_table("checkpoint")
