"""What is known of a sender's clock, when it was last heard, retries, and outages that many runs share."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003_endings"
down_revision = "0002_checkpoint"
branch_labels = None
depends_on = None
loses = "what is known of senders' clocks, outages, the evidence of attempts' endings, who will be retried"

_JSON = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("run", sa.Column("outage_at", sa.BigInteger()))
    op.add_column("attempt", sa.Column("evidence", _JSON, nullable=False, server_default="{}"))
    op.add_column("process", sa.Column("heard_at", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("process", sa.Column("clock", _JSON, nullable=False, server_default="{}"))
    op.add_column("process", sa.Column("will_retry", sa.Boolean(), nullable=False, server_default=sa.false()))
    # Until now any batch was a sign of life.
    op.execute("UPDATE process SET heard_at = last_seen_at")
    op.drop_index("process_status_last_seen_at_idx", "process")
    op.create_index("process_status_heard_at_idx", "process", ["status", "heard_at"])


def downgrade() -> None:
    op.drop_index("process_status_heard_at_idx", "process")
    op.create_index("process_status_last_seen_at_idx", "process", ["status", "last_seen_at"])
    for column in ("will_retry", "clock", "heard_at"):
        op.drop_column("process", column)
    op.drop_column("attempt", "evidence")
    op.drop_column("run", "outage_at")
