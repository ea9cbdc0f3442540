"""Leases, roll-ups, blocks partitioned by day on PostgreSQL, and indexes to find old events and spans by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007_storage_life"
down_revision = "0006_history_by_time"
branch_labels = None
depends_on = None
loses = "roll-ups; processes' memory headroom"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
FLOAT32S = sa.LargeBinary().with_variant(postgresql.ARRAY(sa.REAL()), "postgresql")
FLOAT64S = sa.LargeBinary().with_variant(postgresql.ARRAY(sa.Double()), "postgresql")
INT64S = sa.LargeBinary().with_variant(postgresql.ARRAY(sa.BigInteger()), "postgresql")
PAYLOAD = ("times", "f32", "f64", "i64", "packed")


def upgrade() -> None:
    op.create_table(
        "lease",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("done_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="lease_pkey"),
    )
    op.execute("INSERT INTO lease (name, holder, term, expires_at, done_at) VALUES ('evaluator', '', 0, 0, 0)")
    op.add_column("process", sa.Column("memory_headroom", sa.Double()))
    op.create_index("event_received_at_idx", "event", ["received_at"])
    op.create_index("span_start_idx", "span", ["start"])
    _create("rollup", sa.Column("statistic", sa.Text(), nullable=False))
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE TABLE rollup_default PARTITION OF rollup DEFAULT")
        _store_plainly("rollup")
        _store_plainly("rollup_default")
        sample = _take_view()
        # The blocks that are there become the default partition: nothing is copied.
        op.execute("ALTER TABLE block RENAME TO block_default")
        op.execute("ALTER TABLE block_default RENAME CONSTRAINT block_pkey TO block_default_pkey")
        _create("block")
        _store_plainly("block")
        op.execute("ALTER TABLE block ATTACH PARTITION block_default DEFAULT")
        op.execute(f"CREATE VIEW sample AS {sample}")


def downgrade() -> None:
    """Take the schema back; roll-ups have no place in it and are lost."""
    if op.get_bind().dialect.name == "postgresql":
        sample = _take_view()
        op.execute("ALTER TABLE block RENAME TO block_partitioned")
        op.execute("ALTER TABLE block_partitioned RENAME CONSTRAINT block_pkey TO block_partitioned_pkey")
        _create("block", partitioned=False)
        _store_plainly("block")
        op.execute("INSERT INTO block SELECT * FROM block_partitioned")
        op.execute("DROP TABLE block_partitioned")
        op.execute(f"CREATE VIEW sample AS {sample}")
    op.drop_table("rollup")
    op.drop_index("span_start_idx", "span")
    op.drop_index("event_received_at_idx", "event")
    op.drop_column("process", "memory_headroom")
    op.drop_table("lease")


def _create(table: str, *statistic: sa.Column[str], partitioned: bool = True) -> None:
    key = ("series_id", *(column.name for column in statistic), "time")
    op.create_table(
        table,
        sa.Column("series_id", ROW_ID, autoincrement=False, nullable=False),
        *statistic,
        sa.Column("time", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("last_time", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("times", INT64S),
        sa.Column("f32", FLOAT32S),
        sa.Column("f64", FLOAT64S),
        sa.Column("i64", INT64S),
        sa.Column("packed", sa.LargeBinary()),
        sa.PrimaryKeyConstraint(*key, name=f"{table}_pkey"),
        postgresql_partition_by="RANGE (time)" if partitioned else None,
    )


def _store_plainly(table: str) -> None:
    # As in the first schema: values do not compress, and plain arrays need not be inflated to be read.
    for column in PAYLOAD:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STORAGE EXTERNAL")


def _take_view() -> str:
    """Drop the view, which would go on looking at the table that is renamed; return its definition."""
    definition: str = op.get_bind().scalar(sa.text("SELECT pg_get_viewdef('sample'::regclass)"))
    op.execute("DROP VIEW sample")
    return definition
