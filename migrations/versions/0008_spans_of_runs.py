"""Spans under the process that sent them, so that nobody's ids are in another's way."""

from __future__ import annotations

from alembic import op

revision = "0008_spans_of_runs"
down_revision = "0007_storage_life"
branch_labels = None
depends_on = None
loses = "of spans with the same ids all but one"


def upgrade() -> None:
    _key("trace_id", "span_id", "run_id", "attempt", "rank")


def downgrade() -> None:
    """Take the schema back; of spans with the same ids it has room for one."""
    op.execute(
        "DELETE FROM span WHERE EXISTS (SELECT 1 FROM span AS other"
        " WHERE (other.trace_id, other.span_id) = (span.trace_id, span.span_id)"
        " AND (other.run_id, other.attempt, other.rank) < (span.run_id, span.attempt, span.rank))"
    )
    _key("trace_id", "span_id")


def _key(*columns: str) -> None:
    with op.batch_alter_table("span") as batch:
        batch.drop_constraint("span_pkey", type_="primary")
        batch.create_primary_key("span_pkey", list(columns))
