"""Every way in which training ends, in real processes before a real collector: what is told of it is true.

A row is one run: how it is started, what happens to it, and how it has to stand in the end. Each row's
processes are seen by two collectors, one on SQLite and one on PostgreSQL: importing torch is what takes long.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from gradwatch import conventions as c
from tests.collector_process import GRADWATCH, Collector, collector, environment, eventually, free_port
from tests.tee import tee

# As by default: torchrun takes most of it to start its workers again on a busy machine. The silence of those
# that are lost passes while the others train.
LOST_AFTER: Final = 30.0
# What may pass beyond that until a vanished run is known to be one.
DETECTED_WITHIN: Final = 5.0
AT_ONCE: Final = 4
ABOUT_ENDINGS: Final = frozenset({c.RULE_RUN_FAILED, c.RULE_RUN_LOST, c.RULE_TELEMETRY_OUTAGE})
HOUR: Final = 3600

TRAINING = """
import ctypes, os, resource, signal, sys, threading, time
import torch
from torch import nn
import gradwatch

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{before}
watch = gradwatch.watch(model, optimizer, job="endings")

def train(steps=5, model=model, optimizer=optimizer):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()

def ready():
    print("ready", os.getpid(), flush=True)

train()
{after}
"""

RANKS = """
import os, sys, time
import torch
import torch.distributed as dist
from torch import nn
import gradwatch

torch.set_num_threads(1)
restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
# A store of its own: torchrun's still holds the addresses of the workers before.
dist.init_process_group("gloo", init_method=f"file://{{sys.argv[0]}}-{{restart}}", rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
gradwatch.watch(model, optimizer, job="endings")
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    if step == 2 and rank == 1 and restart == 0:
        {dies}
dist.destroy_process_group()
"""

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Run by every Python that has it on its path, before anything else asks for the time.
WRONG_CLOCK = """
import os, time
_right, _ahead = time.time_ns, int(os.environ["CLOCK_AHEAD"]) * 10**9
time.time_ns = lambda: _right() + _ahead
time.time = lambda: time.time_ns() / 1e9
"""


@dataclass(frozen=True)
class Started:
    """A process under way: what was started, the process that trains (its child if it is supervised)."""

    process: subprocess.Popen[str]
    trains: int
    run_id: str
    collectors: Sequence[Collector]

    def send(self, *numbers: signal.Signals) -> None:
        """Send signals to what was started."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.3)  # of two that come together the later may overtake

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@dataclass(frozen=True)
class Start:
    """One process of a row.

    ``after`` and ``before`` the training begins to be watched; or ``ranks``, what rank 1 of two dies of; or
    another ``command``. ``run``: options of ``gradwatch run``, None without it. ``happens``: what is done to it
    once it says that it is ready and the collector knows it. ``says``: what it prints.
    """

    after: str = ""
    before: str = ""
    ranks: str = ""
    command: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    run: tuple[str, ...] | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    happens: Callable[[Started], object] | None = None
    code: int = 0
    says: str = ""


@dataclass(frozen=True)
class Row:
    """A run: its processes one after the other, and how it stands in the end.

    ``attempts``: status, reason, and whether it says ``will_retry``, of each, where there is more to say than
    the run's own. ``evidence``: words in the last attempt's. ``cause``: the rank that is the cause, where the
    collector has to know it.
    ``findings``: those that it had on the way. ``doubted``: seconds in which a rank may yet be heard
    that is not its supervisor's own child.
    """

    name: str
    starts: tuple[Start, ...]
    status: str
    reason: str | None = None
    attempts: tuple[tuple[str, str | None, bool], ...] = ()
    evidence: tuple[str, ...] = ()
    cause: int | None = None
    last_step: int | None = None
    history: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    doubted: float = 0.0

    @property
    def run_id(self) -> str:
        return self.name.replace(" ", "-").replace(".", "")

    @property
    def rules(self) -> set[str]:
        """The findings that are open in the end."""
        return {f"run_{self.status}"} if self.status in {"failed", "lost"} else set()


def killed(started: Started) -> None:
    os.kill(started.trains, signal.SIGKILL)


def one_of_two_killed(started: Started) -> None:
    """Once both ranks are known: nobody can name one that was never heard of."""
    for each in started.collectors:
        eventually(lambda each=each: each.runs()[started.run_id]["rank_count"] == 2, "both ranks to be known")
    killed(started)


def machine_lost(started: Started) -> None:
    os.kill(started.process.pid, signal.SIGKILL)
    os.kill(started.trains, signal.SIGKILL)


def found_hanging_and_stopped(started: Started) -> None:
    for each in started.collectors:
        stall = eventually(partial(stall_of, each, started.run_id), "the stall to be told")
        assert "lock.acquire()" in stall["attributes"][c.STACKS]
        assert each.runs()[started.run_id]["status"] == "running"
    started.send(signal.SIGTERM)


def stall_of(running: Collector, run_id: str) -> Any:
    return next((e for e in running.show(run_id)["events"] if e["name"] == c.STALLED.name), None)


def stopped_while_waiting(started: Started) -> None:
    for each in started.collectors:
        eventually(partial(promises_a_retry, each, started.run_id), "the promise of another attempt")
        assert each.runs()[started.run_id]["status"] == "running"
    started.send(signal.SIGTERM)


def promises_a_retry(running: Collector, run_id: str) -> bool:
    return bool(running.show(run_id)["attempts"][0]["will_retry"])


def closed_by_hand(started: Started) -> None:
    started.type("watch.close()")
    for each in started.collectors:
        each.await_status(started.run_id, "succeeded")
    assert started.process.poll() is None
    started.type("os._exit(5)")


def sent(*numbers: signal.Signals) -> Callable[[Started], None]:
    return lambda started: started.send(*numbers)


FAILED_ONCE: Final = "train()\nif os.environ['GRADWATCH_ATTEMPT'] == '1': raise ValueError('at first')"
WAITS = "ready(); time.sleep(600)"
RANK_WAITS = "print('ready', os.getpid(), flush=True); time.sleep(600)"
SAVES = """
def save(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
"""
NOTICED = "signal.signal(signal.SIGUSR1, lambda *_: print('noticed', flush=True))"
INTERACTIVE = ("-q", "-i")
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1

ROWS: Final = (
    # What takes longest, and what is lost.
    Row("_exit", (Start("ready(); os._exit(1)", happens=sent(), code=1),), "lost", "heartbeat_timeout"),
    Row("SIGKILL", (Start(WAITS, happens=killed, code=-9),), "lost", "heartbeat_timeout"),
    Row(
        "machine loss", (Start(WAITS, run=(), happens=machine_lost, code=-9),), "lost", "heartbeat_timeout",
        evidence=("silent_seconds",),
    ),
    # Several ranks.
    Row(
        "one rank fails", (Start(ranks="raise ValueError('only here')", code=1),), "failed", "ValueError",
        evidence=("only here",), cause=1,
    ),
    Row(
        "rank is killed", (Start(ranks=RANK_WAITS, happens=one_of_two_killed, code=1),), "failed",
        "heartbeat_timeout", cause=1,
    ),
    Row(
        "supervised rank is killed",
        (Start(ranks=RANK_WAITS, run=(), happens=one_of_two_killed, code=1),),
        "failed", "exit 1", evidence=("exit code 1",), cause=1, doubted=10.0,
    ),
    Row(
        "restarted by torchrun", (Start(ranks="raise ValueError('at first')", environ={"RESTARTS": "1"}),),
        "succeeded", last_step=4,
        attempts=(("failed", "ValueError", True), ("succeeded", None, False)),
        history=("running", "running", "succeeded"),
    ),
    Row(
        "supervised and restarted by torchrun",
        (Start(ranks="raise ValueError('at first')", run=(), environ={"RESTARTS": "1"}),),
        "succeeded", last_step=4,
        attempts=(("failed", "ValueError", True), ("succeeded", None, False)),
        history=("running", "running", "succeeded"),
    ),
    # Alone.
    Row("return", (Start(),), "succeeded", last_step=4),
    Row("return within 0.1 s", (Start(environ={"GRADWATCH_EXPORT_INTERVAL": "5"}),), "succeeded", last_step=4),
    Row(
        "exception", (Start("raise ValueError('too bad')", code=1),), "failed", "ValueError",
        evidence=("too bad",), cause=0,
    ),
    Row("exit 0", (Start("sys.exit(0)"),), "succeeded"),
    Row("exit 3", (Start("sys.exit(3)", code=3),), "failed", "exit 3", cause=0),
    Row("SIGINT", (Start(WAITS, happens=sent(INT), code=-2),), "cancelled", "interrupted"),
    Row("SIGTERM", (Start(WAITS, happens=sent(TERM), code=-15),), "cancelled", "SIGTERM"),
    Row(
        "SIGTERM with a handler", (Start(WAITS, SAVES, happens=sent(TERM), says="saved"),), "cancelled",
        "SIGTERM",
    ),
    Row(
        "SIGTERM in a long kernel",
        (
            Start(
                "a = torch.ones(8000, 8000); ready(); a @ a; print('finished')", happens=sent(TERM), code=-15
            ),
        ),
        "cancelled", "SIGTERM",
    ),
    Row(
        "hang",
        (
            Start(
                "lock = threading.Lock(); lock.acquire(); ready()\nlock.acquire()",
                environ={"GRADWATCH_STALL_AFTER": "1"}, happens=found_hanging_and_stopped, code=-15,
            ),
        ),
        "cancelled", "SIGTERM", history=("running", "cancelled"),
    ),
    Row(
        "notebook closed", (Start("ready()", python=INTERACTIVE, happens=closed_by_hand, code=5),), "succeeded"
    ),
    Row(
        "separate run within",
        (
            Start(
                "try:\n"
                "    with gradwatch.run(job='endings', run_id='a-run-of-its-own'):\n"
                "        other = nn.Linear(8, 2)\n"
                "        sgd = torch.optim.SGD(other.parameters(), lr=0.1)\n"
                "        gradwatch.watch(other, sgd)\n"
                "        train(3, other, sgd)\n"
                "        raise ValueError('a bad trial')\n"
                "except ValueError:\n"
                "    train()\n"
                "try:\n"
                "    with gradwatch.run(job='unnamed'):\n"
                "        other = nn.Linear(8, 2)\n"
                "        sgd = torch.optim.SGD(other.parameters(), lr=0.1)\n"
                "        gradwatch.watch(other, sgd, job='unnamed')\n"
                "        train(3, other, sgd)\n"
                "        raise ValueError('a bad trial too')\n"
                "except ValueError:\n"
                "    train()"
            ),
        ),
        "succeeded", last_step=14,
    ),
    Row("a run of its own", (), "failed", "ValueError", evidence=("a bad trial",), cause=0, last_step=2),
    # Under `gradwatch run`.
    Row(
        "supervised _exit", (Start("os._exit(1)", run=(), code=1),), "failed", "exit 1",
        evidence=("exit code 1",), cause=0,
    ),
    Row(
        "supervised SIGKILL", (Start(WAITS, run=(), happens=killed, code=137),), "failed", "SIGKILL",
        evidence=("killed by SIGKILL",), cause=0,
    ),
    Row("supervised SIGTERM", (Start(WAITS, run=(), happens=sent(TERM), code=143),), "cancelled", "SIGTERM"),
    Row(
        "segfault", (Start("ctypes.string_at(0)", run=(), code=139),), "failed", "segfault",
        evidence=("killed by SIGSEGV",), cause=0,
    ),
    Row(
        "notebook killed", (Start("ready()", python=INTERACTIVE, run=(), happens=killed, code=137),), "failed",
        "SIGKILL", evidence=("killed by SIGKILL",), cause=0,
    ),
    Row(
        "no Python", (Start(command=("sh", "-c", "exit 3"), run=(), code=3),), "failed", "exit 3",
        evidence=("exit code 3",),
    ),
    Row(
        "retried", (Start(FAILED_ONCE, run=("--retries", "1", "--backoff", "3")),), "succeeded",
        attempts=(("failed", "ValueError", True), ("succeeded", None, False)),
        history=("running", "running", "succeeded"),
    ),
    Row(
        "stopped before it is retried",
        (
            Start(
                "ready(); raise ValueError('at first')", run=("--retries", "1", "--backoff", "600"),
                happens=stopped_while_waiting, code=143,
            ),
        ),
        "failed", "ValueError", evidence=("at first",), cause=0, history=("running", "failed"),
    ),
    # The scheduler.
    Row(
        "preempted", (Start(WAITS, environ={"GRADWATCH_PREEMPTIBLE": "1"}, happens=sent(TERM), code=-15),),
        "cancelled", "preempted",
    ),
    Row(
        "preempted and resumed",
        (
            Start(
                WAITS, NOTICED, run=(), environ={"SLURM_JOB_ID": "7"}, happens=sent(USR1, TERM), code=143,
                says="noticed",
            ),
            Start(
                run=(), environ={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "GRADWATCH_START_STEP": "5"}
            ),
        ),
        "succeeded", last_step=9,
        attempts=(("cancelled", "preempted", False), ("succeeded", None, False)),
    ),
    Row(
        "failed and resumed",
        (
            Start("raise ValueError('the first time')", code=1),
            Start(environ={"GRADWATCH_START_STEP": "5"}),
        ),
        "succeeded", last_step=9,
        attempts=(("failed", "ValueError", False), ("succeeded", None, False)), findings=("run_failed",),
    ),
    # The clock.
    Row("clock ahead", (Start("time.sleep(7)", environ={"CLOCK_AHEAD": f"{HOUR}"}),), "succeeded"),
    Row(
        "clock behind",
        (Start("time.sleep(12); os._exit(1)", run=(), environ={"CLOCK_AHEAD": f"-{HOUR}"}, code=1),),
        "failed", "exit 1", cause=0,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Lived:
    """When a row's first process was started, and when its last one was gone (Unix seconds); what they left."""

    began: float
    ended: float
    left: tuple[tuple[int, str], ...]


class Stage:
    """Starts the processes of rows, and does to them what is to happen."""

    def __init__(self, endpoint: str, collectors: Sequence[Collector], folder: Path) -> None:
        self._endpoint = endpoint
        self._collectors = collectors
        self._folder = folder
        (folder / "sitecustomize.py").write_text(WRONG_CLOCK)

    def play(self, row: Row) -> Lived:
        """Have it happen, until the last process of the row is gone."""
        began = time.time()
        left = [self._play(row.run_id, start, number) for number, start in enumerate(row.starts)]
        return Lived(began, time.time(), tuple(left))

    def _play(self, run_id: str, start: Start, number: int) -> tuple[int, str]:
        with self.begin(run_id, start, number) as process:
            if start.happens is not None:
                start.happens(self.ready(run_id, process))
            output, errors = process.communicate(timeout=240)
        if process.returncode != start.code:
            print(f"{run_id}: {errors}")
        return process.returncode, output.strip()

    @contextmanager
    def begin(self, run_id: str, start: Start, number: int = 0) -> Iterator[subprocess.Popen[str]]:
        """Start a process; kill what is left of it in the end."""
        process = subprocess.Popen(
            self._command(run_id, start, number),
            env=environment(
                None,
                OTEL_EXPORTER_OTLP_ENDPOINT=self._endpoint,
                GRADWATCH_DIR=str(self._folder / "gradwatch"),
                GRADWATCH_RUN_ID=run_id,
                **({"PYTHONPATH": str(self._folder)} if "CLOCK_AHEAD" in start.environ else {}),
                **start.environ,
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def ready(self, run_id: str, process: subprocess.Popen[str]) -> Started:
        """Wait until it says that it is, and the collectors know it."""
        assert process.stdout is not None
        word, _, trains = process.stdout.readline().partition(" ")
        assert word == "ready", process.stderr and process.stderr.read()
        for each in self._collectors:
            each.await_status(run_id, "running")
        return Started(process, int(trains), run_id, self._collectors)

    def _command(self, run_id: str, start: Start, number: int) -> Sequence[str]:
        script = self._folder / f"{run_id}-{number}.py".replace(" ", "-")
        command: tuple[str, ...] = (sys.executable, *start.python, str(script))
        if start.ranks:
            script.write_text(RANKS.format(dies=start.ranks))
            command = (*TORCHRUN, "--max-restarts", start.environ.get("RESTARTS", "0"), str(script))
        elif start.command:
            command = start.command
        else:
            script.write_text(TRAINING.format(before=start.before, after=start.after))
        return command if start.run is None else (*GRADWATCH, "run", *start.run, "--", *command)


def unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def expected(row: Row) -> dict[str, Any]:
    """What is to be seen of a row; words that are to be found in texts, as they are."""
    attempts = row.attempts or ((row.status, row.reason, False),)
    return {
        "status": row.status,
        "reason": row.reason,
        "attempts": attempts,
        "cause": row.cause,
        "evidence": row.evidence,
        "findings": {*row.rules, *row.findings},
        "left": tuple((start.code, start.says) for start in row.starts),
        "moments": "true",
        **({"last_step": row.last_step} if row.last_step is not None else {}),
        **({"history": row.history} if row.history else {}),
    }


def seen(running: Collector, row: Row, lived: Lived) -> dict[str, Any]:
    """The same as the collector tells it."""
    shown = running.show(row.run_id)
    if "attempts" not in shown:
        return {"status": "unknown", "left": lived.left}
    attempts = list(reversed(shown["attempts"]))
    evidence = json.dumps(attempts[-1]["evidence"])
    words = tuple(word for word in row.evidence if word in evidence)
    return {
        "status": shown["status"],
        "reason": shown["reason"],
        "attempts": tuple((each["status"], each["reason"], each["will_retry"]) for each in attempts),
        "cause": cause_of(row, attempts[-1]) if shown["status"] == "failed" else None,
        "evidence": words if words == row.evidence else evidence,
        "findings": {found["rule"] for found in shown["findings"] if found["rule"] in ABOUT_ENDINGS},
        "left": lived.left,
        "moments": moments(shown, lived, row.doubted) if row.starts else "true",
        **({"last_step": shown["last_step"]} if row.last_step is not None else {}),
        **({"history": tuple(e["status"] for e in reversed(shown["history"]))} if row.history else {}),
    }


def cause_of(row: Row, attempt: Any) -> int | None:
    """The cause; as expected where a rank died before anybody but its supervisor had heard of it."""
    supervised = any(start.run is not None for start in row.starts)
    return row.cause if supervised and attempt["cause_rank"] is None else attempt["cause_rank"]


def moments(shown: Any, lived: Lived, doubted: float) -> str:
    """Whether start and end are when they were, and a loss was noticed in time."""
    started, ended = unix(shown["started_at"]), unix(shown["ended_at"])
    noticed = unix(shown["history"][0]["recorded_at"])
    silent = shown["reason"] == "heartbeat_timeout"
    late = (LOST_AFTER if silent else doubted) + DETECTED_WITHIN
    # An answer may be on its way while its process is killed.
    if lived.began <= started <= ended <= lived.ended + 1 and noticed - lived.ended <= late:
        return "true"
    return (
        f"from {started - lived.began:+.3f} s after the start to {ended - lived.ended:+.3f} s after the end, "
        f"noticed {noticed - lived.ended:.1f} s after it"
    )


def statuses(running: Collector) -> dict[str, tuple[str, str | None]]:
    return {run_id: (run["status"], run["reason"]) for run_id, run in running.runs().items()}


def play(endpoint: str, collectors: Sequence[Collector], folder: Path, rows: Sequence[Row]) -> list[Lived]:
    """Have all rows happen, and wait until they stand as they should, or should have long ago."""
    stage = Stage(endpoint, collectors, folder)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        lived = list(pool.map(stage.play, rows))
    patience = time.monotonic() + LOST_AFTER + DETECTED_WITHIN
    while time.monotonic() < patience:
        wanted = {row.run_id: (row.status, row.reason) for row in rows}
        if all(wanted.items() <= statuses(each).items() for each in collectors):
            break
        time.sleep(0.2)
    time.sleep(1.5)  # the findings of what ended last, or of what should have none
    return lived


def differences(running: Collector, rows: Sequence[Row], lived: Sequence[Lived]) -> list[str]:
    """What is not as it should be, a line each."""
    return [
        f"{row.name}: {name} should be {wanted}, is {found.get(name)}"
        for row, each in zip(rows, lived, strict=True)
        for found in [seen(running, row, each)]
        for name, wanted in expected(row).items()
        if found.get(name) != wanted
    ]


def found_active(running: Collector) -> set[str]:
    """Runs with a finding about their ending in the metrics."""
    return {
        line.partition('run_id="')[2].partition('"')[0]
        for line in running.get("/metrics").text.splitlines()
        if line.startswith("gradwatch_finding_active{") and any(f'"{rule}"' in line for rule in ABOUT_ENDINGS)
    }


@pytest.fixture
def databases(new_database: Callable[[str], str]) -> list[str]:
    """SQLite, and PostgreSQL where there is one."""
    urls = [new_database("sqlite")]
    with suppress(pytest.skip.Exception):
        urls.append(new_database("postgresql"))
    return urls


@pytest.fixture
def collectors(databases: list[str]) -> Iterator[list[Collector]]:
    with ExitStack() as stack:
        yield [stack.enter_context(collector(url, "--lost-after", str(LOST_AFTER))) for url in databases]


def test_every_ending(collectors: list[Collector], tmp_path: Path) -> None:
    with tee([each.url for each in collectors]) as endpoint:
        lived = play(endpoint, collectors, tmp_path, ROWS)
    for running in collectors:
        assert differences(running, ROWS, lived) == [], running.database
        # Nobody gave it an id, and that of its process is not its own.
        (unnamed,) = [run_id for run_id, run in running.runs().items() if run["job"] == "unnamed"]
        assert statuses(running)[unnamed] == ("failed", "ValueError")
        assert found_active(running) == {unnamed, *(row.run_id for row in ROWS if row.rules)}


def test_the_kernels_oom_kill(collectors: list[Collector], tmp_path: Path, limited: Path) -> None:
    # Longer than it takes until the supervisor looks where its child is.
    greedy = f"open('{limited}/cgroup.procs', 'w').write(str(os.getpid())); time.sleep(2); bytearray(256 << 20)"
    row = Row(
        "oom",
        (Start(greedy, run=(), code=137),),
        "failed",
        "oom_killed",
        evidence=("killed by SIGKILL",),
        cause=0,
    )
    with tee([each.url for each in collectors]) as endpoint:
        lived = play(endpoint, collectors, tmp_path, [row])
    for running in collectors:
        assert differences(running, [row], lived) == [], running.database


@pytest.fixture
def listening() -> tuple[str, ...]:
    """Options for collectors that listen at the same address, one after the other."""
    return ("--listen", f"127.0.0.1:{free_port()}")


def test_a_collector_that_is_started_anew_knows_what_ended_meanwhile(
    database_url: str, tmp_path: Path, listening: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        with collector(database_url, *listening) as first:
            stage = Stage(first.url, [first], tmp_path)
            on = "ready(); sys.stdin.readline()"
            starts = {
                "goes on": Start(on, run=()),
                "fails": Start(f"{on}; sys.exit(3)"),
                "killed": Start(WAITS, run=()),
            }
            begun = {
                run_id: stack.enter_context(stage.begin(run_id, start)) for run_id, start in starts.items()
            }
            ready = {run_id: stage.ready(run_id, process) for run_id, process in begun.items()}
        killed(ready["killed"])
        ready["fails"].type("")
        assert (begun["killed"].wait(60), begun["fails"].wait(60)) == (137, 3)
        with collector(database_url, *listening) as second:
            assert second.runs()["goes on"]["status"] == "running"
            ready["goes on"].type("")
            assert begun["goes on"].wait(60) == 0
            wanted = {
                "goes on": ("succeeded", None),
                "fails": ("failed", "exit 3"),
                "killed": ("failed", "SIGKILL"),
            }
            eventually(lambda: statuses(second) == wanted, "the endings that were kept")
            for run_id, (status, _) in wanted.items():
                history = [entry["status"] for entry in second.show(run_id)["history"]]
                assert history == [status, "running"]


def test_a_collector_that_comes_when_all_is_over_hears_of_it_from_the_next_run(
    database_url: str, tmp_path: Path, listening: tuple[str, ...]
) -> None:
    stage = Stage(f"http://{listening[1]}", [], tmp_path)
    spooled = (
        "while not list(__import__('pathlib').Path(os.environ['GRADWATCH_DIR']).rglob('*.segment')): train()"
    )
    with (
        stage.begin("fails", Start("sys.exit(3)", run=())) as fails,
        stage.begin("killed", Start(f"{spooled}\nready(); time.sleep(600)")) as process,
    ):
        killed(stage.ready("killed", process))
        died = time.time()
        assert (fails.wait(60), process.wait(60)) == (3, -9)
    lost_after = 4.0
    time.sleep(lost_after)  # else it is a sign of life
    with collector(database_url, *listening, "--lost-after", str(lost_after)) as running:
        with stage.begin("next", Start(command=("true",), run=())) as drains:
            assert drains.wait(60) == 0
        wanted = {
            "next": ("succeeded", None),
            "fails": ("failed", "exit 3"),
            "killed": ("lost", "heartbeat_timeout"),
        }
        eventually(lambda: statuses(running) == wanted, "the endings that were kept")
        assert unix(running.runs()["killed"]["ended_at"]) <= died
