"""What a run is compared with is kept beside it, and processes know when their target was reached."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014_what_is_usual"
down_revision = "0013_views_for_dashboards"
branch_labels = None
depends_on = None
loses = "what runs were compared with"

# What runs knew of their targets is theirs no more: it is derived from what each process told by its own clock.
_TOLD = """
FROM (
    SELECT e.run_id, e.attempt, e.rank, e.instance,
           min(e.time) AS time, min(e.received_at) AS told_at, min(r.target_reached_at) AS ours
    FROM event e JOIN run r ON r.run_id = e.run_id
    WHERE e.name = 'training.target.reached' AND r.target_reached_at IS NOT NULL
    GROUP BY e.run_id, e.attempt, e.rank, e.instance
) t
WHERE process.run_id = t.run_id AND process.attempt = t.attempt AND process.rank = t.rank
  AND process.instance = t.instance
"""
_TELL = {
    "sqlite": "UPDATE process SET clock = json_set(clock, '$.reached', t.time, '$.reached_told_at', t.told_at,"
    " '$.reached_at', t.ours)",
    "postgresql": "UPDATE process SET clock = clock || jsonb_build_object('reached', t.time, 'reached_told_at',"
    " t.told_at, 'reached_at', t.ours)",
}
_FORGET = {
    "sqlite": "UPDATE process SET clock = json_remove(clock, '$.reached', '$.reached_told_at', '$.reached_at')"
    " WHERE json_type(clock, '$.reached') IS NOT NULL",
    "postgresql": "UPDATE process SET clock = clock - 'reached' - 'reached_told_at' - 'reached_at'"
    " WHERE clock -> 'reached' IS NOT NULL",
}
_VALUES = ("collective_p95_usual", "step_cost_usual", "quality_before")


def upgrade() -> None:
    for name in _VALUES:
        op.add_column("run_summary", sa.Column(name, sa.Double()))
    op.add_column("run_summary", sa.Column("currency", sa.Text()))
    op.add_column("run_summary", sa.Column("compared", sa.Boolean(), nullable=False, server_default=sa.true()))
    # What is beyond these is no measurement, and a quotient of it no number.
    for name in ("collective_p95", "step_cost"):
        op.execute(
            f"UPDATE run_summary SET {name}_usual = {name} / {name}_ratio"  # noqa: S608 - our names
            f" WHERE {name}_ratio BETWEEN 1e-100 AND 1e100 AND {name} <= 1e100"
        )
    # What diverged has a quality of -1.8e308, and its difference is none.
    op.execute(
        "UPDATE run_summary SET quality_before = quality - quality_delta"
        " WHERE abs(quality) < 1e300 AND abs(quality_delta) < 1e300"
    )
    op.execute(_TELL[op.get_bind().dialect.name] + _TOLD)


def downgrade() -> None:
    op.execute(_FORGET[op.get_bind().dialect.name])
    with op.batch_alter_table("run_summary") as table:
        for name in (*_VALUES, "currency", "compared"):
            table.drop_column(name)
