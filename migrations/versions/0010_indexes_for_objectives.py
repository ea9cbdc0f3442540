"""Indexes that keep a tick and objectives of single jobs from reading all runs there ever were."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010_indexes_for_objectives"
down_revision = "0009_objectives"
branch_labels = None
depends_on = None
loses = ""

_IN_OUTAGE = sa.text("outage_at IS NOT NULL")


def upgrade() -> None:
    op.create_index("run_job_ended_at_idx", "run", ["job", "ended_at"])
    op.create_index(
        "run_outage_at_idx", "run", ["outage_at"], sqlite_where=_IN_OUTAGE, postgresql_where=_IN_OUTAGE
    )


def downgrade() -> None:
    op.drop_index("run_outage_at_idx", "run")
    op.drop_index("run_job_ended_at_idx", "run")
