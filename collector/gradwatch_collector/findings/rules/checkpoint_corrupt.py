"""A checkpoint that is not what was saved any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from sqlalchemy import RowMapping, exists, select

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs.checkpoints import CORRUPT, SAVED, VERIFIED, record_of
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.runs import Status

# What is over is looked into as well, by `gradwatch checkpoint verify` every night, say.
_REMEMBERED: Final = 3600 * 1_000_000_000
_MOST_NAMED: Final = 16


def detect(scene: Scene, parameters_of: ParametersOf) -> Iterator[Observation]:
    """Yield every attempt with a checkpoint that was found corrupt, if it is live or that is of the last hour.

    Not once something was saved under its name again, or it was found good.
    """
    bad = _corrupt(scene)
    ids = sorted({row["run_id"] for row in bad})
    runs = {
        run.run_id: run
        for some in batched(ids)
        for run in load_runs(scene.connection, schema.run.c.run_id.in_(some))
    }
    for (run_id, attempt), group in groupby(bad, key=lambda row: (row["run_id"], row["attempt"])):
        rows, run = list(group), runs.get(run_id)
        if run is None or parameters_of(run) is None:
            continue
        last, record = rows[-1], record_of(scene.connection, run_id)
        yield Observation(
            run_id=run_id,
            attempt=attempt,
            rule=c.RULE_CHECKPOINT_CORRUPT,
            severity=Severity.for_tier(run.tier),
            first_seen=rows[0]["time"],
            last_seen=last["time"],
            rank=None if last["rank"] == NO_RANK else last["rank"],
            step=last["step"],
            evidence={
                "checkpoint": last["name"],
                "fault": last["error"],
                "bytes": last["size"],
                "corrupt": list(dict.fromkeys(row["name"] for row in rows))[:_MOST_NAMED],
                "last_good_step": record.last_good_step,
                # When the corrupt one was found: what changes with each tick is no evidence.
                "last_good_age_seconds": record.age_seconds(last["time"]),
            },
        )


def _corrupt(scene: Scene) -> Sequence[RowMapping]:
    bad, run, later = schema.checkpoint.c, schema.run.c, schema.checkpoint.alias().c
    since = exists().where(
        later.run_id == bad.run_id,
        later.name == bad.name,
        later.state.in_((SAVED, VERIFIED)),
        later.time > bad.time,
    )
    query = (
        select(schema.checkpoint)
        .join(schema.run, run.run_id == bad.run_id)
        .where(
            bad.state == CORRUPT,
            (bad.time >= scene.now - _REMEMBERED) | (run.status == Status.RUNNING),
            ~since,
        )
        .order_by(bad.run_id, bad.attempt, bad.time, bad.sequence)
    )
    return scene.connection.execute(query).mappings().all()


RULE = SceneRule(
    name=c.RULE_CHECKPOINT_CORRUPT,
    severity=Severity.PAGE,
    detect=detect,
    cause="The checkpoint was cut or changed after it had been saved: a full or failing disk, a copy that "
    "broke off, or another program that wrote to it.",
    action="Resume from the last good one, which `gradwatch.latest_checkpoint` returns; find out with "
    "`gradwatch checkpoint verify PATH` which others are bad, and look at the disk before more is saved to "
    "it.",
)
