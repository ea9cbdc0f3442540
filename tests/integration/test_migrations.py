"""Migrations lead to the schema the code knows, on every database, and back."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from click.testing import CliRunner, Result
from sqlalchemy import Connection, Engine, inspect, select, text

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.auth import UNLIMITED, list_tokens
from gradwatch_collector.findings.silences import About, silence
from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.exclusions import What, exclude
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.records import Batch, EventRecord, Received, SpanRecord
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service import audit
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import packed, schema
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import DatabaseError, SchemaState
from gradwatch_collector.storage.retention import Policy, prune
from gradwatch_collector.storage.segments import DAY
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from gradwatch_slo.indicators import Selection, SuccessRate
from tests.batches import SECOND, at, batch, event, scalar, source
from tests.told_runs import tell as tell_at

DAYS = 86_400


def not_a_partition(name: str | None, kind: str, _parents: object) -> bool:
    return not (kind == "table" and name is not None and re.match("(frame|block|rollup)_d", name))


def structure(database: Engine) -> dict[str, object]:
    """What autogenerate does not compare: keys, uniqueness and nullability."""
    seen = inspect(database)
    found: dict[str, object] = {}
    for table in schema.metadata.tables:
        found[table] = (
            [(column["name"], column["nullable"]) for column in seen.get_columns(table)],
            seen.get_pk_constraint(table)["constrained_columns"],
            sorted((index["name"] or "", tuple(index["column_names"])) for index in seen.get_indexes(table)),
            sorted(tuple(unique["column_names"]) for unique in seen.get_unique_constraints(table)),
            sorted(tuple(key["constrained_columns"]) for key in seen.get_foreign_keys(table)),
        )
    return found


def test_migrations_and_models_agree(database: Engine) -> None:
    with database.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_name": not_a_partition, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []


def test_models_make_the_tables_that_migrations_make(database: Engine, empty_database: Engine) -> None:
    if database.dialect.name != empty_database.dialect.name:
        pytest.skip("these are of two kinds")
    with empty_database.begin() as connection:
        schema.metadata.create_all(connection)
    for table, (columns, *keys) in structure(empty_database).items():  # type: ignore[misc]
        migrated_columns, *migrated_keys = structure(database)[table]  # type: ignore[misc]
        # Columns that came later come last.
        assert (table, sorted(columns), keys) == (table, sorted(migrated_columns), migrated_keys)


def test_an_upgrade_is_applied_once_and_can_be_taken_back(empty_database: Engine) -> None:
    assert db.schema_version(empty_database).state is SchemaState.EMPTY
    applied = db.upgrade(empty_database)
    assert applied
    assert db.upgrade(empty_database) == []
    assert db.schema_version(empty_database).state is SchemaState.CURRENT
    db.downgrade(empty_database, "base")
    assert set(inspect(empty_database).get_table_names()) == {"alembic_version"}
    assert db.upgrade(empty_database) == applied


def test_processes_of_before_were_last_heard_at_their_last_sign_of_life(database: Engine) -> None:
    db.downgrade(database, "0002_checkpoint")
    with db.transaction(database) as connection:
        connection.execute(
            text(
                "INSERT INTO process (run_id, attempt, rank, instance, status, evidence, started_at,"
                " last_seen_at, last_loss_nonfinite, is_run, resource)"
                " VALUES ('r', 1, 0, 'i', 'running', '{}', 1, 7, false, true, '{}')"
            )
        )
    db.upgrade(database)
    with database.connect() as connection:
        (row,) = connection.execute(select(schema.process)).mappings()
    assert (row["heard_at"], row["clock"], row["will_retry"]) == (7, {}, False)


def token(name: str, **columns: object) -> dict[str, object]:
    return {"name": name, "digest": name.encode(), "team": None, "created_at": 1, "revoked_at": None, **columns}


def test_what_runs_of_before_were_compared_with_follows_from_what_came_of_it(database: Engine) -> None:
    rows = (
        {
            "run_id": "a",
            "collective_p95": 0.3,
            "collective_p95_ratio": 1.5,
            "step_cost": 5.0,
            "step_cost_ratio": 0.5,
        }
        | {"quality": -0.5, "quality_delta": -0.25},
        {"run_id": "b", "collective_p95": 0.3, "step_cost": 0.0, "step_cost_ratio": 0.0}
        | {"quality": -1.7976931348623157e308, "quality_delta": -1.7976931348623157e308},
    )
    db.downgrade(database, "0013_views_for_dashboards")
    with db.transaction(database) as connection:
        for row in rows:
            connection.execute(
                text(f"INSERT INTO run_summary ({', '.join(row)}) VALUES (:{', :'.join(row)})"), row
            )
    db.upgrade(database)
    known = schema.run_summary.c
    with database.connect() as connection:
        found = connection.execute(
            select(
                known.collective_p95_usual, known.step_cost_usual, known.quality_before, known.compared
            ).order_by(known.run_id)
        ).all()
    assert found == [(pytest.approx(0.2), 10.0, -0.25, True), (None, None, None, True)]


def test_a_target_of_before_stays_when_a_later_attempt_reaches_it_again(database: Engine) -> None:
    def told(attempt: int, started: float, *events: EventRecord) -> None:
        sender = source("run", attempt=attempt, instance=str(attempt), target="val_loss<=0.5")
        for each in (event(c.RUN_STARTED, started), *events):
            tell_at(database, batch(sender, each), (each.time - at(0)) / SECOND + 0.1)

    told(1, 0, event(c.TARGET_REACHED, 100, 1), event(c.RUN_ENDED, 200, 2, STATUS="failed"))
    db.downgrade(database, "0013_views_for_dashboards")
    with database.connect() as connection:
        (clock,) = connection.scalars(select(schema.process.c.clock))
    assert not any(name.startswith("reached") for name in clock)  # what older collectors do not know
    db.upgrade(database)
    told(2, 300, event(c.TARGET_REACHED, 5000, 1), event(c.RUN_ENDED, 6000, 2, STATUS="succeeded"))
    with database.connect() as connection:
        (row,) = connection.execute(select(schema.run)).mappings()
    assert (row["attempt"], row["target_reached_at"]) == (2, at(100))


def test_tokens_of_before_may_do_what_they_could(database: Engine) -> None:
    db.downgrade(database, "0004_series_by_metric")
    with db.transaction(database) as connection:
        connection.execute(
            text("INSERT INTO token (name, digest, team, created_at) VALUES ('old', :digest, 'vision', 1)"),
            {"digest": b"x"},
        )
    db.upgrade(database)
    with database.connect() as connection:
        (row,) = list_tokens(connection)
    assert (row.name, row.team, list(row.roles), row.state(2)) == ("old", "vision", ["ingest", "read"], "valid")
    assert (row.rates, row.expires_at, row.last_used_at) == (UNLIMITED, None, None)


def test_a_token_that_would_gain_by_a_downgrade_ends_with_it(database: Engine) -> None:
    with db.transaction(database) as connection:
        connection.execute(
            schema.token.insert(),
            [
                token("both", roles="ingest,read", expires_at=None),
                token("admin", roles="admin", expires_at=None),
                token("reader", roles="read", expires_at=None),
                token("sender", roles="ingest", expires_at=None),
                token("guest", roles="admin", expires_at=2),
                token("gone", roles="read", expires_at=None, revoked_at=7),
            ],
        )
    db.downgrade(database, "0004_series_by_metric")
    with database.connect() as connection:
        rows = connection.execute(text("SELECT name, revoked_at FROM token")).all()
    assert {name for name, revoked_at in rows if revoked_at is None} == {"both", "admin"}
    assert dict(row for row in rows if row[1] is not None)["gone"] == 7


def receive(database: Engine, received: Batch, seconds: float) -> None:
    with db.transaction(database) as connection:
        registry = Registry()
        (key,) = registry.resolve(connection, [(received.source, at(seconds))])
        group = [Received(key, received, at(seconds))]
        store(connection, SeriesIds(), group)
        registry.apply(connection, group)


def compact_all(database: Engine) -> None:
    with db.transaction(database) as connection:
        assert not compact(connection, at(100 * DAYS)).more


def fill(database: Engine) -> None:
    """Put rows into every table, with values that no migration would make up."""
    numbers = [
        scalar(c.LOSS, range(300), range(300)),
        scalar(c.LEARNING_RATE, range(3), [0.1, math.inf, math.nan]),
    ]
    receive(database, batch(source(team="vision"), event(c.RUN_STARTED, 0), frames=numbers), 300)
    compact_all(database)
    prune(lambda: db.transaction(database), Policy(raw=DAY, rollups=90 * DAY), at(9 * DAYS))
    whole, one = scalar(c.STEP_INDEX, [9 * DAYS], [1]), scalar(c.STEP_DURATION, [9 * DAYS], [1])
    kinds = [
        *(replace(each, times=each.times + 9 * DAY) for each in numbers),
        replace(whole, values=np.array([[2**60 + 1]])),
        replace(one, values=None, packed=(packed.join([b"buckets"]),)),
    ]
    receive(database, batch(source(), frames=kinds), 9 * DAYS)
    compact_all(database)
    span = SpanRecord("ab" * 16, "cd" * 8, "ef" * 8, "step", 1, at(1), at(2), 2, {"a": 1}, [{"name": "e"}])
    told = (
        event(c.CHECKPOINT_SAVED, 9 * DAYS, 1, STEP=1),
        event(c.NONFINITE_STEP, 9 * DAYS, 2, STEP=2),
        event(c.RUN_ENDED, 9 * DAYS, 3, STATUS="failed"),
    )
    frames = (scalar(c.LOSS, [10 * DAYS], [0.1]), scalar(c.LEARNING_RATE, [10 * DAYS, 10 * DAYS + 1], [1, 2]))
    receive(database, Batch(source(), frames, told, (span,)), 10 * DAYS)
    with db.transaction(database) as connection:
        connection.execute(schema.run.update().values(outage_at=7))
        connection.execute(schema.attempt.update().values(evidence={"signal": 9}))
        connection.execute(
            schema.process.update().values(
                clock={"offset": 5}, will_retry=True, heard_at=6, memory_headroom=0.25, last_loss_at=8
            )
        )
        connection.execute(
            schema.finding.insert().values(
                run_id="run", attempt=1, rule="nonfinite", severity="ticket", state="resolved", rank=0, step=2,
                layer="a", born_in="loss", first_seen=1, last_seen=2, resolved_at=3, evidence={"step": 2},
            )
        )  # fmt: skip
        connection.execute(
            schema.token.insert(),
            [
                token("all", roles="admin", expires_at=None),
                token("gone", roles="read", expires_at=2, revoked_at=7),
            ],
        )
        audit.record(connection, "somebody@here", "token.created", "all", {"roles": ["admin"]}, now=at(0))
        count_objectives(connection)


def count_objectives(connection: Connection) -> None:
    """An hour of runs that was counted, one that has changed since, and what else objectives keep."""
    success = Indicator(SuccessRate(), Selection(), ("team",))
    for now in (9 * DAYS, 12 * DAYS):
        keep_counted(connection, [success], at(now))
    connection.execute(schema.run.update().values(baseline=7))
    connection.execute(schema.run_summary.insert().values(run_id="run", steps=2, quality=0.5))
    exclude(connection, What(single_run="run"), "a test", now=at(0))
    silence(connection, About(single_run="run"), at(60), "a test", now=at(0))
    connection.execute(
        schema.finding.update().values(acknowledged_at=at(1), acknowledged_by="me", note="on it")
    )


ALL: Final = frozenset({"*"})
# What taking a migration back cannot keep: columns, or all of a table. (Nor some spans and tokens, which have
# tests of their own.)
LOST: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "0014_what_is_usual": {
        "run_summary": frozenset(
            {"collective_p95_usual", "step_cost_usual", "quality_before", "currency", "compared"}
        )
    },
    "0011_findings_in_hand": {
        "silence": ALL,
        "finding": frozenset({"acknowledged_at", "acknowledged_by", "note"}),
    },
    "0009_objectives": {
        "slo_indicator": ALL,
        "slo_count": ALL,
        "run_change": ALL,
        "exclusion": ALL,
        "run_summary": ALL,
        "summary_due": ALL,
        "run": frozenset({"baseline"}),
    },
    "0007_storage_life": {"rollup": ALL, "lease": ALL, "process": frozenset({"memory_headroom"})},
    "0005_access": {
        "audit": ALL,
        "token": frozenset({"roles", "requests_per_second", "bytes_per_second", "expires_at", "last_used_at"}),
    },
    "0003_endings": {
        "run": frozenset({"outage_at"}),
        "attempt": frozenset({"evidence"}),
        "process": frozenset({"heard_at", "clock", "will_retry"}),
    },
    "0002_checkpoint": {"checkpoint": ALL},
}


Dump = Mapping[str, list[dict[str, object]]]


def columns_of(database: Engine) -> dict[str, list[str]]:
    columns = {name: table.c.keys() for name, table in schema.metadata.tables.items()}
    if database.dialect.name == "postgresql":
        columns["sample"] = ["run_id", "metric", "field", "attributes", "nanos", "value"]
    return columns


def without_lost(columns: Mapping[str, list[str]], revision: str) -> dict[str, list[str]]:
    lost = LOST.get(revision, {})
    return {
        table: [name for name in names if name not in lost.get(table, ())]
        for table, names in columns.items()
        if lost.get(table) != ALL
    }


def dump(database: Engine, columns: Mapping[str, list[str]]) -> Dump:
    """Every row, as the driver reads it; what a downgrade itself adds to the audit log is left out."""
    found = {}
    with database.connect() as connection:
        for table, names in columns.items():
            quoted = ", ".join(f'"{name}"' for name in names)
            where = "WHERE action <> 'db.downgraded'" if table == "audit" else ""
            read = connection.exec_driver_sql(f"SELECT {quoted} FROM {table} {where}")
            found[table] = [dict(zip(names, map(plain, row), strict=True)) for row in read]
    return found


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


def sorted_rows(dumped: Dump, columns: Mapping[str, list[str]]) -> dict[str, list[str]]:
    # As text: NaN is then equal to itself.
    return {
        table: sorted(repr([row[name] for name in names]) for row in dumped[table])
        for table, names in columns.items()
    }


def test_every_row_survives_every_migration_down_and_up(database: Engine) -> None:
    fill(database)
    kept = columns_of(database)
    before = dump(database, kept)
    assert [table for table, held in before.items() if not held] == []

    def assert_kept() -> None:
        assert sorted_rows(dump(database, kept), kept) == sorted_rows(before, kept)

    steps = [step.revision for step in db.steps_back(database, "0001")]
    for revision, following in pairwise([*steps, "0001"]):
        db.downgrade(database, following)
        kept = without_lost(kept, revision)
        assert_kept()
    for revision in reversed(steps):
        assert db._apply_next(database) == revision
        assert_kept()
    db.require_current(database)


def test_spans_of_one_id_are_one_where_there_is_no_room_for_more(database: Engine) -> None:
    def span(**columns: object) -> dict[str, object]:
        ids = {"trace_id": "01" * 16, "span_id": "02" * 8, "run_id": "a", "attempt": 1, "rank": 0}
        times = {"kind": 0, "start": 1, "end": 2, "status": 0}
        return {**ids, **times, "name": "step", "attributes": {}, "events": [], **columns}

    def spans() -> list[tuple[object, ...]]:
        columns = schema.span.c
        query = select(columns.span_id, columns.run_id, columns.rank).order_by(*schema.span.primary_key)
        with database.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    with db.transaction(database) as connection:
        sent = [span(), span(rank=1), span(run_id="b"), span(span_id="03" * 8, run_id="b")]
        connection.execute(schema.span.insert(), sent)
    db.downgrade(database, "0007_storage_life")
    kept = [("02" * 8, "a", 0), ("03" * 8, "b", 0)]
    assert spans() == kept
    db.upgrade(database)
    assert spans() == kept


def test_collectors_that_start_together_migrate_once(empty_database: Engine) -> None:
    start = threading.Barrier(3)

    def upgrade_one(_: int) -> list[str]:
        start.wait()
        return db.upgrade(empty_database)

    with ThreadPoolExecutor(3) as pool:
        applied = list(pool.map(upgrade_one, range(3)))
    # Each migration is a transaction of its own: they may take turns, but none is applied twice.
    revisions = [revision for each in applied for revision in each]
    assert len(revisions) == len(set(revisions))
    assert db.schema_version(empty_database).state is SchemaState.CURRENT


def test_a_failing_migration_leaves_nothing_behind(empty_database: Engine) -> None:
    with db.transaction(empty_database) as connection:
        connection.execute(text("CREATE TABLE span (mine INTEGER)"))
    with pytest.raises(DatabaseError, match="cannot upgrade"):
        db.upgrade(empty_database)
    assert inspect(empty_database).get_table_names() == ["span"]


def test_a_database_of_somebody_else_is_left_alone(empty_database: Engine) -> None:
    with db.transaction(empty_database) as connection:
        connection.execute(text("CREATE TABLE run (mine INTEGER)"))
    with pytest.raises(DatabaseError, match="choose another database"):
        db.upgrade(empty_database)


def test_a_newer_schema_is_refused_with_what_to_do(database: Engine) -> None:
    with db.transaction(database) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for refused in (db.require_current, db.upgrade):
        with pytest.raises(DatabaseError, match=r"has schema 9999.*: upgrade gradwatch"):
            refused(database)


def test_a_current_database_is_known_without_looking_at_migrations(database: Engine) -> None:
    assert db.schema_version(database).head == db.REVISION
    url = database.url.render_as_string(hide_password=False)
    code = f"""
import sys
from gradwatch_collector.storage import database as db
db.require_current(db.connect({url!r}))
sys.exit("alembic" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_empty_database_is_refused_with_the_command_to_run(empty_database: Engine) -> None:
    with pytest.raises(DatabaseError, match="run `gradwatch db upgrade"):
        db.require_current(empty_database)


def test_sqlite_is_set_up_before_its_first_table(tmp_path: Path) -> None:
    engine = db.connect(f"sqlite:///{tmp_path}/new.db")
    db.upgrade(engine)
    with engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("page_size", "auto_vacuum", "journal_mode", "synchronous", "foreign_keys")
        }
    engine.dispose()
    incremental, full = 2, 2
    assert settings == {
        "page_size": 8192,
        "auto_vacuum": incremental,
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
    }


def test_db_status_tells_before_and_after_db_upgrade(empty_database: Engine) -> None:
    url = empty_database.url.render_as_string(hide_password=False)
    before = CliRunner().invoke(main, ["db", "status", "--db", url])
    upgrade = CliRunner().invoke(main, ["db", "upgrade"], env={"GRADWATCH_DB": url})
    again = CliRunner().invoke(main, ["db", "upgrade", "--db", url])
    after = CliRunner().invoke(main, ["db", "status", "--db", url])
    assert (before.exit_code, upgrade.exit_code, again.exit_code, after.exit_code) == (1, 0, 0, 0)
    assert ": empty " in before.output
    assert "applied" in upgrade.output
    assert "already up to date" in again.output
    assert ": current " in after.output


def downgrade(database_url: str, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(main, ["db", "downgrade", "--db", database_url, *arguments], input=answer)


def test_db_downgrade_says_what_is_lost_and_asks(database: Engine, database_url: str) -> None:
    newest = db.schema_version(database).current
    declined = downgrade(database_url, "0006_history_by_time", answer="n\n")
    assert declined.exit_code == 1
    assert "takes 0008_spans_of_runs back, and loses of spans with the same ids all but one" in declined.output
    assert "takes 0007_storage_life back, and loses roll-ups; processes' memory headroom" in declined.output
    assert db.schema_version(database).current == newest
    done = downgrade(database_url, "0006_history_by_time", answer="y\n")
    assert (done.exit_code, done.output.splitlines()[-1].split(": ")[-1]) == (0, "schema 0006_history_by_time")
    assert db.schema_version(database).current == "0006_history_by_time"
    with database.connect() as connection:
        newest_entry, *_ = audit.entries(connection, 1)
    assert (newest_entry.action, newest_entry.subject) == ("db.downgraded", "0006_history_by_time")
    again = downgrade(database_url, "0006_history_by_time")
    assert (again.exit_code, "already at schema" in again.output) == (0, True)


def test_db_downgrade_needs_no_answer_where_it_is_told_so(database: Engine, database_url: str) -> None:
    done = downgrade(database_url, "base", "--yes")
    assert done.exit_code == 0, done.output
    assert "takes 0001 back, and loses all that is stored" in done.output
    assert set(inspect(database).get_table_names()) == {"alembic_version"}


@pytest.mark.parametrize("revision", ["0099_never", "0008_spans_of_runs", "-1"])
def test_a_schema_that_is_none_of_those_before_is_refused_with_those_that_are(
    database: Engine, database_url: str, revision: str
) -> None:
    db.downgrade(database, "0003_endings")
    refused = downgrade(database_url, "--yes", "--", revision)
    assert refused.exit_code == 1
    assert refused.output.count("\n") == 1
    assert refused.output.endswith(f"to {revision!r}: choose 0002_checkpoint, 0001, base\n")
    assert db.schema_version(database).current == "0003_endings"


def test_a_downgrade_that_fails_says_why_in_one_line_and_changes_nothing(
    database: Engine, database_url: str
) -> None:
    with db.transaction(database) as connection:
        connection.execute(text("DROP INDEX run_history_recorded_at_idx"))
    newest = db.schema_version(database).current
    failed = downgrade(database_url, "0001", "--yes")
    assert failed.exit_code == 1
    assert re.match(r"Error: cannot downgrade .*run_history_recorded_at_idx", failed.output.splitlines()[-1])
    assert db.schema_version(database).current == newest


def test_every_migration_says_what_taking_it_back_loses(database: Engine) -> None:
    losses = {step.revision: step.loses for step in db.steps_back(database, "base")}
    script = ScriptDirectory.from_config(db._config())
    assert list(losses) == [revision.revision for revision in script.walk_revisions()]
    assert [revision for revision, loses in losses.items() if not loses] == [
        "0013_views_for_dashboards",
        "0012_corrupt_checkpoints",
        "0010_indexes_for_objectives",
        "0006_history_by_time",
        "0004_series_by_metric",
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://host/name", "unknown kind of database 'mysql'"),
        ("not a url://", "cannot be read|unknown kind"),
        ("sqlite://", "SQLite needs a file"),
        ("sqlite:////nowhere/at/all.db", "the folder /nowhere/at does not exist"),
        ("postgresql://user:secret@127.0.0.1:1/name", "cannot open"),
        ("postgresql://user@127.0.0.1:1/name?password=secret", "cannot open"),
    ],
)
def test_an_unusable_url_is_one_line_without_a_password(url: str, message: str) -> None:
    with pytest.raises(DatabaseError, match=message) as refused:
        db.connect(url)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_plain_path_names_a_sqlite_file(tmp_path: Path) -> None:
    engine = db.connect(str(tmp_path / "runs.db"))
    assert engine.dialect.name == "sqlite"
    engine.dispose()
    with pytest.raises(DatabaseError, match="there is no database at"):
        db.connect(str(tmp_path / "other.db"), must_exist=True)
    assert not (tmp_path / "other.db").exists()
