"""The statements for Citus fit the schema: each table is placed, and every unique key can be kept."""

from __future__ import annotations

from click.testing import CliRunner
from sqlalchemy import PrimaryKeyConstraint, UniqueConstraint

from gradwatch.cli import main
from gradwatch_collector.storage import citus, schema

STATEMENTS = list(citus.statements())


def test_every_table_is_placed_once_and_what_it_refers_to_comes_first() -> None:
    placed = [line.split("'")[1] for line in STATEMENTS if line.startswith("SELECT create_")]
    assert sorted(placed) == sorted(schema.metadata.tables)
    for table in schema.metadata.tables.values():
        for key in table.foreign_keys:
            assert placed.index(key.column.table.name) < placed.index(table.name)


def test_runs_are_placed_by_run_numbers_by_series_and_the_rest_everywhere() -> None:
    by = {name: citus.placed_by(table) for name, table in schema.metadata.tables.items()}
    assert {name for name, column in by.items() if column == "series_id"} == {"frame", "block", "rollup"}
    assert {name for name, column in by.items() if column is None} >= {
        "metric",
        "attribute_set",
        "lease",
        "token",
    }
    assert "SELECT create_distributed_table('rollup', 'series_id', colocate_with => 'block');" in STATEMENTS


def test_every_unique_key_of_a_placed_table_holds_the_column_it_is_placed_by() -> None:
    widened = {
        line.split()[2]: line.partition("PRIMARY KEY (")[2].partition(")")[0].split(", ")
        for line in STATEMENTS
        if line.startswith("ALTER TABLE")
    }
    assert set(widened) == {"run_history", "finding", "series", "summary_due"}
    for table in schema.metadata.tables.values():
        column = citus.placed_by(table)
        for constraint in table.constraints:
            if column and isinstance(constraint, PrimaryKeyConstraint):
                held = [each.name for each in constraint.columns]
                assert widened.get(table.name, held)[-len(held) :] == held
                assert column in widened.get(table.name, held)
            elif column and isinstance(constraint, UniqueConstraint):
                assert column in constraint.columns


def test_the_command_prints_them() -> None:
    shown = CliRunner().invoke(main, ["db", "citus"])
    assert (shown.exit_code, shown.output.splitlines()) == (0, STATEMENTS)
