"""Plays planned runs: a collector, training processes of their own, and an eye on what is found meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, select

from gradwatch_collector.demo.scenario import collector
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gym import control_group
from gym.families.ddp import NAME as DDP
from gym.families.ddp import RANKS
from gym.fault import STRONG
from gym.faults import KINDS
from gym.outcome import Found, Injection, Outcome
from gym.plan import PlannedRun
from gym.train import NOTE

# A machine with two cores is enough.
AT_ONCE: Final = 2
EXPORT_SECONDS: Final = 1.0
_STALL_SECONDS: Final = 3
_LOOK_SECONDS: Final = 0.2
_DEADLINE_SECONDS: Final = 300.0
# What hangs is left to hang for so long.
_HANG_SECONDS: Final = 12.0
# After the last run has ended, until the collector has judged it.
_SETTLING_SECONDS: Final = 10.0
DATABASE: Final = "gradwatch.db"


class Eye:
    """Looks into the database again and again, and remembers when each finding was first there and open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[int, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="gym-eye")

    def __enter__(self) -> Eye:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _look(self) -> None:
        known = 0
        while not self._closing.wait(_LOOK_SECONDS):
            with self._engine.connect() as connection:
                new = connection.execute(
                    select(schema.finding.c.finding_id).where(schema.finding.c.finding_id > known)
                ).scalars()
                for finding in new:
                    self._seen[finding] = time.time()
                    known = max(known, finding)

    def findings(self, runs: Sequence[str]) -> tuple[Found, ...]:
        """Return all that is stored of these runs."""
        finding = schema.finding.c
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(schema.finding).where(finding.run_id.in_(runs)).order_by(finding.finding_id)
            ).mappings()
            return tuple(
                Found(
                    run_id=row["run_id"],
                    attempt=row["attempt"],
                    rule=row["rule"],
                    severity=row["severity"],
                    state=row["state"],
                    step=row["step"],
                    layer=row["layer"],
                    born_in=row["born_in"],
                    seen=self._seen.get(row["finding_id"]),
                    evidence=dict(row["evidence"]),
                )
                for row in rows
            )


def play(
    planned: Sequence[PlannedRun],
    folder: Path,
    tell: Callable[[Outcome, float], None],
) -> list[Outcome]:
    """Train all, a few at a time, and return what was found of each, in their order.

    ``folder`` gets the database, the logs and what the runs save; ``tell`` is called with each run that has
    ended, what was found of it until then, and the seconds it took.
    """
    url = f"sqlite:///{folder / DATABASE}"
    with collector(url, folder / "collector.log") as server:
        engine = db.connect(url)
        with Eye(engine) as eye:
            ended: dict[str, tuple[tuple[int, ...], Injection | None]] = {}
            one_at_a_time = threading.Lock()

            def one(each: PlannedRun) -> None:
                began = time.monotonic()
                ended[each.run_id] = _play_one(each, folder / each.run_id, server.url)
                taken = time.monotonic() - began
                with one_at_a_time:
                    tell(Outcome(each, *ended[each.run_id], eye.findings(each.run_ids)), taken)

            for processes in (1, RANKS):
                with ThreadPoolExecutor(AT_ONCE // processes) as pool:
                    list(pool.map(one, [each for each in planned if _processes(each) == processes]))
            time.sleep(_SETTLING_SECONDS)
            outcomes = [Outcome(each, *ended[each.run_id], eye.findings(each.run_ids)) for each in planned]
        engine.dispose()
    return outcomes


def _processes(planned: PlannedRun) -> int:
    return RANKS if planned.family == DDP else 1


def _play_one(planned: PlannedRun, folder: Path, url: str) -> tuple[tuple[int, ...], Injection | None]:
    """Run its processes to their ends; return their exit codes, and when the fault came."""
    codes: list[int] = []
    for run_id in planned.run_ids:
        place = folder if run_id == planned.run_id else folder / run_id
        place.mkdir(parents=True)
        with _started(planned, run_id, place, url) as processes:
            _wait(planned, processes, place)
        codes += [process.returncode for process in processes]
        control_group.remove(place)
    return tuple(codes), injection(folder)


def injection(folder: Path) -> Injection | None:
    """Return when and where the first process of a run says that its fault came; None if it has not."""
    with suppress(FileNotFoundError):
        lines = (folder / NOTE).read_text().splitlines()
        return Injection(**json.loads(lines[0])) if lines else None
    return None


@contextmanager
def _started(
    planned: PlannedRun, run_id: str, folder: Path, url: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the run's processes; none is left when the block ends."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "GRADWATCH_RUN_ID": run_id,
        "GRADWATCH_DIR": str(folder / "state"),
        "GRADWATCH_EXPORT_INTERVAL": str(EXPORT_SECONDS),
        "GRADWATCH_HEARTBEAT_INTERVAL": "1",
        "GRADWATCH_STALL_AFTER": str(_STALL_SECONDS),
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
    }
    command = [sys.executable, "-m", "gym.train", planned.to_json(), str(folder)]
    if planned.retries is not None:
        supervisor = [sys.executable, "-m", "gradwatch.cli", "run", "--retries", str(planned.retries)]
        command = [
            *supervisor,
            "--backoff",
            "0.5",
            "--job",
            planned.job,
            "--tier",
            "production",
            "--",
            *command,
        ]
    ranks = _processes(planned)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            own = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            with (folder / f"rank{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment | own, stdout=log, stderr=log))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(planned: PlannedRun, processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for the ends; end what hangs, as somebody would."""
    hangs = planned.fault is not None and KINDS[planned.fault].hangs and planned.strength == STRONG
    give_up = time.monotonic() + _DEADLINE_SECONDS
    while any(process.poll() is None for process in processes):
        time.sleep(_LOOK_SECONDS)
        came = injection(folder) if hangs else None
        if time.monotonic() > give_up or (came is not None and time.time() > came.time + _HANG_SECONDS):
            for process in processes:
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(timeout=5)
            return
