"""Who sent a metric can be found from the metric."""

from __future__ import annotations

from alembic import op

revision = "0004_series_by_metric"
down_revision = "0003_endings"
branch_labels = None
depends_on = None
loses = ""


def upgrade() -> None:
    op.create_index("series_metric_id_series_id_idx", "series", ["metric_id", "series_id"])


def downgrade() -> None:
    op.drop_index("series_metric_id_series_id_idx", "series")
