"""Views for dashboards: numbers at whatever resolution is left of them, and what they are about."""

from __future__ import annotations

from alembic import op

revision = "0013_views_for_dashboards"
down_revision = "0012_corrupt_checkpoints"
branch_labels = None
depends_on = None
loses = ""

# One row a value, like `sample`, and where values were rolled up one row a bucket: its largest, at the last of
# its times. `since` and `until` bound the stored row it comes from: a condition on them keeps others from being
# read, which one on `nanos` does not. All of 1.5 million values (300 layers) took 0.5 s, where a fifth of them
# took `sample` 3 s: an array is fetched once and not once a value, and labels can be joined after aggregation.
# A sample that was sent again after it was compacted shows twice until the next compaction.
TREND_VIEW = """
CREATE VIEW trend AS
SELECT s.run_id, s.attempt, s.rank, m.name AS metric, s.field, s.set_id,
       ((v.ordinality - 1) / p.count)::int AS position, p.since, p.until, t.nanos,
       to_timestamp(t.nanos / 1e9) AS time, v.value
FROM series s
JOIN metric m USING (metric_id)
CROSS JOIN LATERAL (
    SELECT time AS since, coalesce(times[count], time) AS until, count, times || '{}'::bigint[] AS times,
           coalesce(f64, f32::float8[], i64::float8[]) AS numbers
    FROM frame WHERE frame.series_id = s.series_id
    UNION ALL
    SELECT time, last_time, count, times || '{}'::bigint[], coalesce(f64, f32::float8[], i64::float8[])
    FROM block WHERE block.series_id = s.series_id
    UNION ALL
    SELECT time, last_time, count, times || '{}'::bigint[], coalesce(f64, f32::float8[], i64::float8[])
    FROM rollup WHERE rollup.series_id = s.series_id AND rollup.statistic = 'max'
) p
CROSS JOIN LATERAL unnest(p.numbers) WITH ORDINALITY AS v (value, ordinality)
CROSS JOIN LATERAL (SELECT coalesce(p.times[(v.ordinality - 1) % p.count + 1], p.since) AS nanos) t
"""
LABELS_VIEW = """
CREATE VIEW labels AS
SELECT set_id, (e.ordinality - 1)::int AS position, e.attributes
FROM attribute_set CROSS JOIN LATERAL jsonb_array_elements(points) WITH ORDINALITY AS e (attributes, ordinality)
"""


def upgrade() -> None:
    # As `sample`: SQLite has no arrays that SQL could take apart, and Grafana no data source for it.
    if op.get_bind().dialect.name == "postgresql":
        op.execute(TREND_VIEW)
        op.execute(LABELS_VIEW)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP VIEW labels")
        op.execute("DROP VIEW trend")
