-- The role by which Grafana reads a gradwatch database: what dashboards show, and no tokens. May be run again.
--   psql --set=password=SECRET --file=reader.sql "$URL"
SELECT NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'grafana') AS missing \gset
\if :missing
CREATE ROLE grafana LOGIN;
\endif
ALTER ROLE grafana PASSWORD :'password';
ALTER ROLE grafana SET default_transaction_read_only = on;
-- A look at too much ends before it is in the way of the collector.
ALTER ROLE grafana SET statement_timeout = '30s';
GRANT SELECT ON run, run_summary, attempt, event, checkpoint, finding, sample, trend, labels TO grafana;
