"""What a run is compared with is kept beside it, and of which currency its cost is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014_what_is_usual"
down_revision = "0013_views_for_dashboards"
branch_labels = None
depends_on = None
loses = "what runs were compared with"

_VALUES = ("collective_p95_usual", "step_cost_usual", "quality_before")


def upgrade() -> None:
    for name in _VALUES:
        op.add_column("run_summary", sa.Column(name, sa.Double()))
    op.add_column("run_summary", sa.Column("currency", sa.Text()))
    op.add_column("run_summary", sa.Column("compared", sa.Boolean(), nullable=False, server_default=sa.true()))
    # A ratio beyond 1e-300 is no measurement, and its inverse no number.
    for name in ("collective_p95", "step_cost"):
        op.execute(
            f"UPDATE run_summary SET {name}_usual = {name} / {name}_ratio"  # noqa: S608 - our names
            f" WHERE {name}_ratio BETWEEN 1e-300 AND 1e300 AND {name} <= 1e7"
        )
    # What diverged has a quality of -1.8e308, and its difference is none.
    op.execute(
        "UPDATE run_summary SET quality_before = quality - quality_delta"
        " WHERE abs(quality) < 1e300 AND abs(quality_delta) < 1e300"
    )


def downgrade() -> None:
    with op.batch_alter_table("run_summary") as table:
        for name in (*_VALUES, "currency", "compared"):
            table.drop_column(name)
