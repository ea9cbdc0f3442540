"""An index over the history by when it was recorded: findings tell of endings that became known lately."""

from __future__ import annotations

from alembic import op

revision = "0006_history_by_time"
down_revision = "0005_access"
branch_labels = None
depends_on = None
loses = ""


def upgrade() -> None:
    op.create_index("run_history_recorded_at_idx", "run_history", ["recorded_at"])


def downgrade() -> None:
    op.drop_index("run_history_recorded_at_idx", "run_history")
