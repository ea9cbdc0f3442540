"""Tokens have roles, limits, an expiry and a last use; administrative acts are written down."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0005_access"
down_revision = "0004_series_by_metric"
branch_labels = None
depends_on = None
loses = "the audit log; roles, limits and expiry of tokens, of which those that would gain by it are revoked"

_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_JSON = sa.JSON().with_variant(JSONB(), "postgresql")
_ADDED = ("roles", "requests_per_second", "bytes_per_second", "expires_at", "last_used_at")


def upgrade() -> None:
    # Until now every token could do both.
    op.add_column("token", sa.Column("roles", sa.Text(), nullable=False, server_default="ingest,read"))
    op.add_column("token", sa.Column("requests_per_second", sa.Double()))
    op.add_column("token", sa.Column("bytes_per_second", sa.Double()))
    op.add_column("token", sa.Column("expires_at", sa.BigInteger()))
    op.add_column("token", sa.Column("last_used_at", sa.BigInteger()))
    op.create_table(
        "audit",
        sa.Column("audit_id", _ROW_ID, nullable=False),
        sa.Column("recorded_at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("details", _JSON, nullable=False),
        sa.PrimaryKeyConstraint("audit_id", name="audit_pkey"),
    )


def downgrade() -> None:
    # Before, every token could do everything with every run, for ever: those that may do less end here.
    token = sa.table("token", *(sa.column(name) for name in ("roles", "team", "expires_at", "revoked_at")))
    as_before = token.c.roles.contains("admin") | (token.c.roles == "ingest,read")
    op.execute(
        sa.update(token)
        .where(token.c.revoked_at.is_(None), ~as_before | token.c.expires_at.is_not(None))
        .values(revoked_at=time.time_ns())
    )
    op.drop_table("audit")
    for column in reversed(_ADDED):
        op.drop_column("token", column)
