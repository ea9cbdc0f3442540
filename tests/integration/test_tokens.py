"""Tokens in a database: what they allow, until when, and whose runs they may touch."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from sqlalchemy import Connection, Engine, select, text

from gradwatch import conventions as c
from gradwatch_collector.api import views
from gradwatch_collector.api.metric_catalog import list_metrics
from gradwatch_collector.api.run_list import list_runs
from gradwatch_collector.auth import (
    Grant,
    Guard,
    Limits,
    Owners,
    Rates,
    Role,
    TokenExistsError,
    Tokens,
    UnknownTokenError,
    create_token,
    has_tokens,
    list_tokens,
    revoke_token,
)
from gradwatch_collector.otlp.attributes import source_of
from gradwatch_collector.otlp.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from gradwatch_collector.records import Batch, SpanRecord
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.service import audit
from gradwatch_collector.service.ingest import Ingest
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from tests.batches import SECOND, START, at, batch, event, scalar, source
from tests.collector_process import eventually

VISION, SPEECH = (Grant(name=team, team=team, roles=frozenset({Role.INGEST})) for team in ("vision", "speech"))
ANYBODY = Grant(name="fleet", roles=frozenset({Role.INGEST}))


class Clock:
    def __init__(self) -> None:
        self.nanos = START

    def __call__(self) -> int:
        return self.nanos


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(database: Engine, clock: Clock) -> Tokens:
    return Tokens(database, clock)


def create(database: Engine, name: str = "ci", *roles: Role, **options: object) -> str:
    with db.transaction(database) as connection:
        return create_token(connection, name, roles or [Role.INGEST], now=START, **options)  # type: ignore[arg-type]


def revoke(database: Engine, name: str = "ci") -> None:
    with db.transaction(database) as connection:
        revoke_token(connection, name, START)


def test_a_token_grants_what_it_was_created_with(database: Engine, tokens: Tokens) -> None:
    token = create(database, "ci", Role.READ, Role.INGEST, team="vision", rates=Rates(bytes=5.0))
    grant = tokens.grant(token)
    assert grant == Grant(
        name="ci", team="vision", roles=frozenset({Role.INGEST, Role.READ}), rates=Rates(None, 5.0)
    )


def test_a_role_allows_itself_and_admin_allows_everything() -> None:
    def allowed(*roles: Role) -> set[Role]:
        return {role for role in Role if Grant(name="x", roles=frozenset(roles)).allows(role)}

    assert allowed(Role.INGEST) == {Role.INGEST}
    assert allowed(Role.READ) == {Role.READ}
    assert allowed(Role.INGEST, Role.READ) == {Role.INGEST, Role.READ}
    assert allowed(Role.ADMIN) == set(Role)


def test_only_the_hash_of_a_token_is_stored(database: Engine) -> None:
    token = create(database)
    with database.connect() as connection:
        (row,) = connection.execute(select(schema.token)).all()
    assert token not in repr(row)
    assert token.removeprefix("gw_") not in repr(row)


def test_a_name_is_given_once_even_if_its_token_was_revoked(database: Engine) -> None:
    create(database)
    revoke(database)
    with pytest.raises(TokenExistsError, match="exists already"):
        create(database)


def test_a_revoked_token_stops_working_within_ten_seconds(
    database: Engine, tokens: Tokens, clock: Clock
) -> None:
    token = create(database)
    assert tokens.grant(token) is not None
    revoke(database)
    clock.nanos += 10 * SECOND
    assert tokens.grant(token) is None
    with database.connect() as connection:
        assert not has_tokens(connection, clock())


@pytest.mark.parametrize("name", ["nobody", "ci"])
def test_only_a_token_that_is_there_and_not_yet_revoked_can_be_revoked(database: Engine, name: str) -> None:
    create(database)
    revoke(database)
    with pytest.raises(UnknownTokenError, match="gradwatch token list"):
        revoke(database, name)


def test_a_token_expires_on_time_though_it_is_remembered(
    database: Engine, tokens: Tokens, clock: Clock
) -> None:
    token = create(database, expires_at=START + 5 * SECOND)
    clock.nanos += 5 * SECOND - 1
    assert tokens.grant(token) is not None
    assert tokens.remembers(token)
    clock.nanos += 1
    assert tokens.grant(token) is None
    with database.connect() as connection:
        assert has_tokens(connection, clock() - 1)
        assert not has_tokens(connection, clock())
        assert [row.state(clock()) for row in list_tokens(connection)] == ["expired"]


def test_answers_are_remembered_for_ten_seconds_and_not_by_a_clock_set_back(
    database: Engine, tokens: Tokens, clock: Clock
) -> None:
    token = create(database)
    assert not tokens.remembers(token)
    tokens.grant(token)
    clock.nanos += 10 * SECOND - 1
    assert tokens.remembers(token)
    for moved in (1, -11 * SECOND):
        clock.nanos += moved
        assert not tokens.remembers(token)


def last_used(database: Engine) -> int | None:
    with database.connect() as connection:
        (row,) = list_tokens(connection)
    return row.last_used_at


def test_a_use_is_noted_once_a_minute(database: Engine, tokens: Tokens, clock: Clock) -> None:
    token = create(database)
    assert last_used(database) is None
    tokens.grant(token)
    assert last_used(database) == START
    clock.nanos += 59 * SECOND
    tokens.grant(token)
    assert last_used(database) == START
    clock.nanos += 10 * SECOND
    tokens.grant(token)
    assert last_used(database) == clock()


def test_a_token_works_where_its_use_cannot_be_noted(
    database: Engine, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    token = create(database)
    with db.transaction(database) as connection:
        if connection.dialect.name == "sqlite":
            connection.execute(
                text(
                    "CREATE TRIGGER full BEFORE UPDATE ON token BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
                )
            )
        else:
            connection.execute(text("ALTER TABLE token ADD CHECK (last_used_at IS NULL)"))
    assert tokens.grant(token) is not None
    assert "cannot note that a token was used" in caplog.text


def test_the_guard_tells_unknown_from_forbidden_from_away(database: Engine, clock: Clock) -> None:
    guard = Guard(Tokens(database, clock), Limits())
    authorization = f"Bearer {create(database, 'reader', Role.READ)}"
    assert guard.admit(authorization, Role.READ).name == "reader"
    with pytest.raises(ForbiddenError, match="token 'reader' is for read, not ingest"):
        guard.admit(authorization, Role.INGEST)
    for wrong in (None, "", "Bearer", "Bearer gw_wrong", f"Basic {authorization[7:]}"):
        with pytest.raises(UnauthenticatedError):
            guard.admit(wrong, Role.READ)
    with db.transaction(database) as connection:
        connection.execute(text("ALTER TABLE token RENAME TO gone"))
    assert guard.admit(authorization, Role.READ).name == "reader"
    clock.nanos += 10 * SECOND
    with pytest.raises(UnavailableError):
        guard.admit(authorization, Role.READ)


def test_tokens_that_are_made_up_have_no_valid_one_forgotten(
    database: Engine, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwatch_collector.auth.tokens._MOST_REMEMBERED", 5)
    token = create(database)
    assert tokens.grant(token) is not None
    for number in range(20):
        assert tokens.grant(f"gw_{number}") is None
    assert tokens.remembers(token)
    assert tokens.remembers("gw_19")
    assert not tokens.remembers("gw_0")


def test_what_is_no_token_is_refused_without_the_database(database: Engine, tokens: Tokens) -> None:
    with db.transaction(database) as connection:
        connection.execute(text("ALTER TABLE token RENAME TO gone"))
    assert tokens.grant("") is None
    assert tokens.grant("nonsense") is None
    assert tokens.remembers("nonsense")


def test_tokens_that_are_made_up_take_the_turn_of_nobody_who_is_known(database: Engine, clock: Clock) -> None:
    guard = Guard(Tokens(database, clock), Limits())
    known = f"Bearer {create(database)}"
    assert guard.admit(known, Role.INGEST).name == "ci"
    clock.nanos += 10 * SECOND  # it has to be looked up again

    async def ask() -> list[Grant | BaseException]:
        made_up = [guard.admit_async(f"Bearer gw_{number}", Role.INGEST) for number in range(300)]
        return await asyncio.gather(*made_up, guard.admit_async(known, Role.INGEST), return_exceptions=True)

    *strangers, grant = asyncio.run(ask())
    assert isinstance(grant, Grant)
    assert Counter(map(type, strangers)) == {UnauthenticatedError: 100, UnavailableError: 200}


# --- Teams ---------------------------------------------------------------------------------------------


@contextmanager
def ingesting(database: Engine) -> Iterator[Ingest]:
    ingest = Ingest(database, Registry())
    ingest.start()
    try:
        yield ingest
    finally:
        ingest.stop()


def send(ingest: Ingest, grant: Grant, *batches: Batch) -> None:
    ingest.put(grant.stamp(batches), 1, at(0)).result(30)


def start(run_id: str, instance: str = "one", **attributes: str) -> Batch:
    return batch(source(run_id, instance=instance, **attributes), event(c.RUN_STARTED, 0))


def teams(database: Engine) -> dict[str, str | None]:
    with database.connect() as connection:
        return {run["run_id"]: run["team"] for run in list_runs(connection)["runs"]}


def test_a_tokens_team_wins_over_what_telemetry_claims(database: Engine) -> None:
    with ingesting(database) as ingest:
        send(ingest, VISION, start("a", team="speech"), start("b"))
        send(ingest, ANYBODY, start("c", team="speech"))
    assert teams(database) == {"a": "vision", "b": "vision", "c": "speech"}


def test_teams_whose_senders_describe_themselves_alike_do_not_share_what_is_no_run(database: Engine) -> None:
    nameless = source_of(Resource())
    with ingesting(database) as ingest:
        for grant in (VISION, SPEECH):
            send(ingest, grant, Batch(nameless))
    with database.connect() as connection:
        rows = connection.execute(select(schema.process.c.run_id, schema.process.c.resource)).all()
    assert {row.resource[c.TEAM] for row in rows} == {"vision", "speech"}
    assert len({row.run_id for row in rows}) == 2


@pytest.mark.parametrize("instance", ["one", "another"])
def test_a_teams_token_cannot_touch_another_teams_run(database: Engine, instance: str) -> None:
    with ingesting(database) as ingest:
        send(ingest, VISION, start("a"))
        ended = batch(source("a", instance=instance), event(c.RUN_ENDED, 1, 1, STATUS="failed"))
        with pytest.raises(ForbiddenError, match="run 'a' is another team's"):
            send(ingest, SPEECH, start("mine"), ended)
        send(ingest, VISION, batch(source("a"), event(c.RUN_HEARTBEAT, 2, 2)))
    with database.connect() as connection:
        shown = views.show_run(connection, "a")
    assert shown is not None
    assert (shown["status"], shown["team"]) == ("running", "vision")
    assert teams(database) == {"a": "vision"}


def test_what_is_not_yet_a_run_belongs_to_whom_it_came_from(database: Engine) -> None:
    with ingesting(database) as ingest:
        send(ingest, VISION, batch(source("a", instance="early")))
        with pytest.raises(ForbiddenError):
            send(ingest, SPEECH, start("a"))
        send(ingest, VISION, start("a"))
    assert teams(database) == {"a": "vision"}


@pytest.mark.postgresql
def test_of_two_teams_that_start_one_run_at_once_one_is_refused(new_database: Callable[[str], str]) -> None:
    database = db.connect(new_database("postgresql"))
    registry = Registry()

    def begin(grant: Grant, connection: Connection) -> None:
        (stamped,) = grant.stamp([start("a")])
        take_turns(connection, [stamped.source.run_id])
        Owners().require(connection, [stamped.source])
        registry.resolve(connection, [(stamped.source, at(0))])

    def late() -> None:
        with db.transaction(database) as connection:
            begin(SPEECH, connection)

    with ThreadPoolExecutor(1) as pool:
        with db.transaction(database) as connection:
            begin(VISION, connection)
            other = pool.submit(late)
            eventually(lambda: waits_for_a_lock(database), "the other team to wait")
        with pytest.raises(ForbiddenError):
            other.result(30)
    database.dispose()


def waits_for_a_lock(database: Engine) -> bool:
    with database.connect() as connection:
        waiting = connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
    return bool(waiting)


def test_a_run_without_a_team_goes_on_with_a_teams_token(database: Engine) -> None:
    with ingesting(database) as ingest:
        send(ingest, ANYBODY, start("a"))
        send(ingest, VISION, batch(source("a"), event(c.RUN_ENDED, 1, 1, STATUS="succeeded")))
    with database.connect() as connection:
        assert list_runs(connection)["runs"][0]["status"] == "succeeded"


def test_a_refused_request_does_not_cost_those_that_share_its_commit(database: Engine) -> None:
    with ingesting(database) as ingest:
        send(ingest, VISION, start("a"))
    ingest = Ingest(database, Registry())
    waiting = [ingest.put(grant.stamp([start(run)]), 1, at(0)) for grant, run in ((SPEECH, "a"), (SPEECH, "b"))]
    ingest.start()
    ingest.stop()
    assert isinstance(waiting[0].exception(), ForbiddenError)
    assert waiting[1].exception() is None
    assert teams(database) == {"a": "vision", "b": "speech"}


def commit_together(database: Engine, *sent: tuple[Grant, Batch]) -> list[BaseException | None]:
    """What is said to each request, all of them having waited for one commit."""
    ingest = Ingest(database, Registry())
    waiting = [ingest.put(grant.stamp([each]), 1, at(0)) for grant, each in sent]
    ingest.start()
    ingest.stop()
    return [request.exception() for request in waiting]


@pytest.mark.parametrize("first", [VISION, ANYBODY])
def test_of_two_teams_that_name_a_run_in_one_commit_the_first_has_it(database: Engine, first: Grant) -> None:
    ours, theirs = start("a", team="vision"), start("a", instance="another")
    kept, refused = commit_together(database, (first, ours), (SPEECH, theirs))
    assert kept is None
    assert isinstance(refused, ForbiddenError)
    assert teams(database) == {"a": "vision"}
    with ingesting(database) as ingest:
        send(ingest, VISION, batch(source("a"), event(c.RUN_ENDED, 1, 1, STATUS="succeeded")))


def test_ids_of_one_teams_spans_are_not_in_the_way_of_anothers(database: Engine) -> None:
    span = SpanRecord("01" * 16, "02" * 8, None, "step", 0, at(0), at(1), 0, {}, [])
    with ingesting(database) as ingest:
        for grant, run_id in ((VISION, "a"), (SPEECH, "b"), (SPEECH, "b")):
            send(ingest, grant, replace(start(run_id), spans=[span]))
    with database.connect() as connection:
        found = connection.scalars(select(schema.span.c.run_id).order_by(schema.span.c.run_id)).all()
    assert found == ["a", "b"]


def test_a_run_that_was_pruned_may_be_another_teams_half_a_day_later(database: Engine) -> None:
    hours = 0.0
    owners = Owners(lambda: hours * 3600)
    (ours,), (theirs,) = VISION.stamp([start("a")]), SPEECH.stamp([start("a")])
    with ingesting(database) as ingest:
        send(ingest, VISION, start("a"))
    with db.transaction(database) as connection:
        owners.require(connection, [ours.source])
        for table in (schema.run, schema.process):
            connection.execute(table.delete())
    with ingesting(database) as ingest:
        send(ingest, SPEECH, start("a"))
    hours = 13
    with database.connect() as connection:
        owners.require(connection, [theirs.source])
        with pytest.raises(ForbiddenError):
            owners.require(connection, [ours.source])


def test_a_team_is_shown_its_own_runs_and_nothing_of_others(database: Engine) -> None:
    with ingesting(database) as ingest:
        send(ingest, VISION, start("a"))
        send(ingest, SPEECH, start("b"))
    with db.transaction(database) as connection:
        connection.execute(
            schema.finding.insert().values(
                run_id="b",
                attempt=1,
                rule=c.RULE_TELEMETRY_OUTAGE,
                severity="ticket",
                state="open",
                first_seen=START,
                last_seen=START,
                evidence={"count": 2, "silent": 2, "runs": ["a", "b"]},
            )
        )
        assert [run["run_id"] for run in list_runs(connection, team="vision")["runs"]] == ["a"]
        assert views.show_run(connection, "b", "vision") is None
        mine = views.show_run(connection, "a", "vision")
        everybodys = views.show_run(connection, "a")
    assert mine is not None
    assert everybodys is not None
    assert everybodys["findings"][0]["evidence"]["runs"] == ["a", "b"]
    assert mine["findings"][0]["evidence"] == {"runs": ["a"]}
    assert mine["findings"][0]["run_id"] == "a"


def test_a_team_is_shown_its_telemetry_that_is_no_run_and_nothing_of_others(database: Engine) -> None:
    plain = source_of(Resource())
    with ingesting(database) as ingest:
        for grant, metrics in ((VISION, (c.LOSS, c.STEP_INDEX)), (SPEECH, (c.LOSS, c.LEARNING_RATE))):
            frames = [scalar(metric, [1], [1.0]) for metric in metrics]
            send(ingest, grant, batch(plain, frames=frames), replace(start(f"{grant.name}-run"), frames=frames))
    with database.connect() as connection:
        ids = {
            row.resource[c.TEAM]: row.run_id
            for row in connection.execute(select(schema.process).where(~schema.process.c.is_run))
        }
        listed = list_metrics(connection, team="vision")["metrics"]
        assert {metric["name"] for metric in listed} == {c.LOSS.name, c.STEP_INDEX.name}
        for metric in listed:
            assert {each["run_id"] for each in metric["sources"]} == {ids["vision"], "vision-run"}
        assert list_metrics(connection, team="vision", run_id=ids["speech"])["metrics"] == []
        assert list_metrics(connection, team="vision", name=c.LEARNING_RATE.name)["metrics"] == []
        shown = {run_id: views.is_shown(connection, run_id, "vision") for run_id in (*ids.values(), "none")}
    assert shown == {ids["vision"]: True, ids["speech"]: False, "none": False}


# --- The audit log -------------------------------------------------------------------------------------


def test_an_act_that_is_rolled_back_is_not_written_down(database: Engine) -> None:
    def act(fails: bool) -> None:
        with db.transaction(database) as connection:
            audit.record(connection, "somebody@here", "token.revoked", "ci", {"team": "vision"}, now=START)
            if fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        act(fails=True)
    act(fails=False)
    with database.connect() as connection:
        newest, *older = audit.entries(connection, 10)
    assert newest == audit.Entry(START, "somebody@here", "token.revoked", "ci", {"team": "vision"})
    assert [entry.action for entry in older] == ["db.upgraded"]


def test_changes_of_the_schema_are_written_down(empty_database: Engine) -> None:
    applied = db.upgrade(empty_database, now=lambda: START)
    db.upgrade(empty_database, now=lambda: START + 1)
    db.downgrade(empty_database, "0004_series_by_metric")
    db.upgrade(empty_database, now=lambda: START + 2)
    with empty_database.connect() as connection:
        entries = audit.entries(connection, 10)
    assert [(entry.action, entry.recorded_at) for entry in entries] == [("db.upgraded", START + 2)]
    assert entries[0].details == {"applied": applied[applied.index("0005_access") :]}
    assert entries[0].actor == audit.operator()


def test_a_downgrade_that_leaves_the_log_is_in_it(database: Engine) -> None:
    with database.connect() as connection:
        before = len(audit.entries(connection, 10))
    db.downgrade(database, "0005_access", now=lambda: START)
    with database.connect() as connection:
        newest, *older = audit.entries(connection, 10)
    assert len(older) == before
    assert (newest.action, newest.subject, newest.recorded_at) == ("db.downgraded", "0005_access", START)
