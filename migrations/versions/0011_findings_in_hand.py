"""Who has a finding in hand, and which findings are to raise no alert for a while."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011_findings_in_hand"
down_revision = "0010_indexes_for_objectives"
branch_labels = None
depends_on = None
loses = "who acknowledged findings, and silences"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_COLUMNS = (("acknowledged_at", sa.BigInteger()), ("acknowledged_by", sa.Text()), ("note", sa.Text()))


def upgrade() -> None:
    for name, type_ in _COLUMNS:
        op.add_column("finding", sa.Column(name, type_))
    op.create_table(
        "silence",
        sa.Column("silence_id", ROW_ID, nullable=False),
        sa.Column("single_run", sa.Text()),
        sa.Column("job", sa.Text()),
        sa.Column("rule", sa.Text()),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("silence_id", name="silence_pkey"),
    )
    op.create_index("silence_until_idx", "silence", ["until"])


def downgrade() -> None:
    op.drop_table("silence")
    with op.batch_alter_table("finding") as batch:
        for name, _ in _COLUMNS:
            batch.drop_column(name)
