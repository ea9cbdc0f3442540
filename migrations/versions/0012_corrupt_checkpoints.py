"""An index of checkpoints that were found corrupt: every tick looks for them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012_corrupt_checkpoints"
down_revision = "0011_findings_in_hand"
branch_labels = None
depends_on = None
loses = ""

_CORRUPT = sa.text("state = 'corrupt'")


def upgrade() -> None:
    op.create_index(
        "checkpoint_corrupt_idx", "checkpoint", ["time"], sqlite_where=_CORRUPT, postgresql_where=_CORRUPT
    )


def downgrade() -> None:
    op.drop_index("checkpoint_corrupt_idx", "checkpoint")
