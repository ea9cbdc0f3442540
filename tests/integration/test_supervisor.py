"""`gradwatch run` around real processes: what it tells of their end is true, and nothing of it reaches them."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradwatch import conventions as names
from tests.collector_process import GRADWATCH, eventually
from tests.otlp_sink import OtlpSink, ReceivedEvent, otlp_sink

started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    while started:
        with started.pop() as process:
            process.kill()


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


@pytest.fixture
def supervise(sink: OtlpSink, tmp_path: Path) -> Any:
    """Start a command under supervision."""

    def start(*words: str, prefix: tuple[str, ...] = (), environ: Any = (), **options: Any) -> Any:
        process = subprocess.Popen(
            [*prefix, *GRADWATCH, "run", *words],
            env={
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint,
                "GRADWATCH_TESTING": "1",
                "GRADWATCH_DIR": str(tmp_path / "gradwatch"),
                "GRADWATCH_EVERY": "1",
                "OMP_NUM_THREADS": "1",
                **dict(environ),
            },
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
            text=True,
        )
        started.append(process)
        return process

    return start


def finish(process: subprocess.Popen[str], text: str | None = None) -> tuple[int, str, str]:
    output, errors = process.communicate(text, timeout=240)
    return process.returncode, output, errors


def told(sink: OtlpSink, name: str = names.RUN_ENDED.name) -> list[ReceivedEvent]:
    """What supervisors said."""
    return [event for event in sink.find(name) if event.resource.get(names.SUPERVISOR)]


def ending(sink: OtlpSink) -> dict[str, Any]:
    (event,) = told(sink)
    return event.attributes


@pytest.mark.parametrize(
    ("command", "code", "status", "reason"),
    [
        pytest.param("exit 0", 0, "succeeded", None, id="exit 0"),
        pytest.param("exit 3", 3, "failed", "exit 3", id="exit 3"),
        pytest.param('exec python -c "import os; os._exit(1)"', 1, "failed", "exit 1", id="os._exit"),
        pytest.param("kill -KILL $$", 137, "failed", "SIGKILL", id="SIGKILL"),
        pytest.param("ulimit -c 0; kill -SEGV $$", 139, "failed", "segfault", id="segfault"),
        pytest.param("ulimit -c 0; kill -ABRT $$", 134, "failed", "SIGABRT", id="abort"),
        pytest.param("kill -TERM $$", 143, "cancelled", "SIGTERM", id="SIGTERM"),
    ],
)
def test_an_ending_is_passed_on_and_told(
    sink: OtlpSink, supervise: Any, command: str, code: int, status: str, reason: str | None
) -> None:
    returncode, _, errors = finish(supervise("--job", "endings", "--", "sh", "-c", command))
    assert (returncode, errors) == (code, "")
    # An ending may overtake what waits, the start included.
    in_order = sorted(sink.events, key=lambda event: event.attributes[names.EVENT_SEQUENCE])
    assert [event.name for event in in_order if event.name != names.RUN_HEARTBEAT.name] == [
        names.RUN_STARTED.name,
        names.RUN_ENDED.name,
    ]
    attributes = ending(sink)
    assert (attributes[names.STATUS], attributes.get(names.REASON)) == (status, reason)
    assert attributes[names.EXIT_CODE] == code
    assert attributes[names.EVIDENCE]
    assert names.WILL_RETRY not in attributes
    resource = told(sink)[0].resource
    assert resource[names.SERVICE_NAME] == "endings"
    assert resource[names.RUN_ATTEMPT] == 1
    assert names.RANK not in resource
    assert names.TIER not in resource  # nobody said


def test_a_command_that_cannot_be_started_fails_as_in_a_shell(sink: OtlpSink, supervise: Any) -> None:
    returncode, _, errors = finish(supervise("--retries", "3", "--", "no-such-command"))
    assert returncode == 127
    assert "no-such-command: No such file" in errors
    assert ending(sink)[names.REASON] == "exit 127"


def test_what_is_read_and_written_is_not_touched(supervise: Any) -> None:
    command = "cat; echo problem >&2; echo $GRADWATCH_RUN_ID $GRADWATCH_ATTEMPT $GRADWATCH_TIER"
    process = supervise("--run-id", "mine", "--tier", "production", "--", "sh", "-c", command)
    assert finish(process, "in\n") == (0, "in\nmine 1 production\n", "problem\n")


def test_without_a_collector_the_command_runs_all_the_same(supervise: Any) -> None:
    process = supervise("--endpoint", "http://127.0.0.1:9", "--", "sh", "-c", "echo done; exit 5")
    returncode, output, errors = finish(process)
    assert (returncode, output) == (5, "done\n")
    assert "training goes on" in errors


@pytest.mark.parametrize("place", ["a full disk", "a closed pipe", "a hung-up terminal"])
def test_who_cannot_be_told_gets_the_exit_code_and_the_retries_all_the_same(
    sink: OtlpSink, supervise: Any, place: str
) -> None:
    if place == "a full disk":
        end, unwritable = os.pipe()
        os.dup2(os.open("/dev/full", os.O_WRONLY), unwritable)
    elif place == "a closed pipe":
        end, unwritable = os.pipe()
    else:
        end, unwritable = pty.openpty()
    os.close(end)
    command = ("--retries", "2", "--backoff", "0.1", "--", "sh", "-c", "exit $((GRADWATCH_ATTEMPT + 3))")
    process = supervise(*command, stderr=unwritable)
    os.close(unwritable)
    assert process.wait(120) == 6
    reasons = [event.attributes[names.REASON] for event in told(sink)]
    assert reasons == ["exit 4", "exit 5", "exit 6"]


@pytest.mark.parametrize(
    "hook",
    [
        "class Old:\n    def find_module(self, *_): return None\nsys.meta_path.insert(0, Old())",
        """class Around:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, *a): return self.finder.find_spec(*a)
sys.meta_path[:] = map(Around, sys.meta_path)""",
    ],
    ids=["without find_spec", "around everybody's"],
)
def test_import_hooks_of_others_are_none_of_ours(supervise: Any, hook: str) -> None:
    process = supervise("--", "python", "-c", f"import sys\n{hook}\nimport torch.optim\nprint('fine')")
    assert finish(process) == (0, "fine\n", "")


COUNT_SIGNALS = """
import signal, sys, time
came = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
    signal.signal(number, lambda number, _: came.append(signal.Signals(number).name))
print("ready", flush=True)
end = time.monotonic() + 60
while not came and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)  # for one that comes twice
print(*came, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT"])
def test_a_signal_reaches_the_command_once(supervise: Any, name: str) -> None:
    process = supervise("--", sys.executable, "-c", COUNT_SIGNALS)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[name])
    returncode, output, _ = finish(process)
    assert (returncode, output) == (7, f"{name}\n")


COUNT_INTERRUPTS = """
import signal, sys, time
came = []
signal.signal(signal.SIGINT, lambda *_: came.append("SIGINT"))
signal.signal(signal.SIGUSR1, lambda *_: came.append("enough"))
print("ready", flush=True)
while "enough" not in came:
    time.sleep(0.01)
print(came.count("SIGINT"), flush=True)
sys.exit(7)
"""


def test_ctrl_c_at_a_terminal_reaches_the_command_once(sink: OtlpSink, supervise: Any) -> None:
    ours, theirs = pty.openpty()
    code = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    own_terminal = (sys.executable, "-c", code)
    process = supervise("--", sys.executable, "-c", COUNT_INTERRUPTS, prefix=own_terminal, stdin=theirs)
    os.close(theirs)
    assert process.stdout.readline() == "ready\n"
    for _ in range(10):  # of two that come close together, the kernel makes one
        os.write(ours, b"\x03")
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    returncode, output, errors = finish(process)
    os.close(ours)
    assert (returncode, output) == (7, "10\n"), errors
    assert (ending(sink)[names.STATUS], ending(sink)[names.REASON]) == ("cancelled", "interrupted")


@pytest.mark.parametrize(("preemptible", "reason"), [("0", "SIGTERM"), ("1", "preempted")])
def test_sigterm_is_passed_on_and_told(sink: OtlpSink, supervise: Any, preemptible: str, reason: str) -> None:
    environ = {"GRADWATCH_PREEMPTIBLE": preemptible}
    process = supervise("--retries", "3", "--", "sh", "-c", "echo ready; exec sleep 60", environ=environ)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert finish(process)[0] == 143
    assert (ending(sink)[names.STATUS], ending(sink)[names.REASON]) == ("cancelled", reason)


def test_a_supervisor_that_is_killed_takes_nobody_along(supervise: Any, tmp_path: Path) -> None:
    command = f"echo $$; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; touch {tmp_path}/done"
    process = supervise("--", "sh", "-c", command)
    assert int(process.stdout.readline()) > 0
    process.kill()
    process.wait(timeout=60)
    (tmp_path / "go").touch()
    eventually((tmp_path / "done").exists, "the command to go on")


def test_the_kernels_oom_kill_is_told_from_any_other(sink: OtlpSink, supervise: Any, limited: Path) -> None:
    # Longer than it takes until the supervisor looks where its child is.
    greedy = f"echo $$ > {limited}/cgroup.procs; sleep 2; exec {sys.executable} -c 'bytearray(256 << 20)'"
    returncode, _, _ = finish(supervise("--", "sh", "-c", greedy))
    assert returncode == 137
    assert (ending(sink)[names.STATUS], ending(sink)[names.REASON]) == ("failed", "oom_killed")
    evidence = ending(sink)[names.EVIDENCE]
    assert "oom_kill 0 -> 1" in evidence or "Killed process" in evidence


def test_failures_are_tried_again_until_one_attempt_succeeds(
    sink: OtlpSink, supervise: Any, tmp_path: Path
) -> None:
    command = f"""
    echo $GRADWATCH_ATTEMPT >> {tmp_path}/attempts
    case $GRADWATCH_ATTEMPT in 1) exit 1;; 2) kill -KILL $$;; esac
    """
    process = supervise("--retries", "5", "--backoff", "0.1", "--run-id", "again", "--", "sh", "-c", command)
    returncode, _, errors = finish(process)
    assert returncode == 0
    assert (tmp_path / "attempts").read_text().split() == ["1", "2", "3"]
    assert errors.count("begins in") == 2
    ended = sorted(told(sink), key=lambda event: event.time)
    assert [
        (e.resource[names.RUN_ATTEMPT], e.attributes[names.STATUS], e.attributes.get(names.WILL_RETRY))
        for e in ended
    ] == [(1, "failed", True), (2, "failed", True), (3, "succeeded", None)]
    assert {event.resource[names.RUN_ID] for event in ended} == {"again"}
    assert len({event.resource[names.SERVICE_INSTANCE_ID] for event in ended}) == 3


def test_the_same_failure_twice_is_not_tried_a_third_time(sink: OtlpSink, supervise: Any) -> None:
    returncode, _, errors = finish(supervise("--retries", "5", "--backoff", "0", "--", "sh", "-c", "exit 4"))
    assert returncode == 4
    assert "failed twice in the same way" in errors
    assert sorted(e.resource[names.RUN_ATTEMPT] for e in told(sink)) == [1, 2]
    last = max(told(sink), key=lambda event: event.time)
    assert names.WILL_RETRY not in last.attributes


DIFFERENT = """
import gradwatch, os, torch
model = torch.nn.Linear(2, 1)
gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
attempt = int(os.environ["GRADWATCH_ATTEMPT"])
if attempt < 3:
    raise [ConnectionError, FileNotFoundError][attempt - 1]
"""
NAMED = """
import gradwatch, os, signal, torch
model = torch.nn.Linear(2, 1)
gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), run_id="by-the-script")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_another_exception_is_another_failure(supervise: Any) -> None:
    process = supervise("--retries", "5", "--backoff", "0.1", "--", "python", "-c", DIFFERENT)
    returncode, _, errors = finish(process)
    assert (returncode, errors.count("begins in")) == (0, 2)


def test_a_command_that_names_its_run_itself_is_one_run(sink: OtlpSink, supervise: Any) -> None:
    process = supervise("--run-id", "told", "--", "python", "-c", NAMED)
    assert finish(process)[0] == 137
    ends = {event.resource[names.RUN_ID]: event.attributes for event in told(sink)}
    assert ends["told"][names.STATUS] == "cancelled"
    assert "by-the-script" in ends["told"][names.EVIDENCE]
    assert (ends["by-the-script"][names.STATUS], ends["by-the-script"][names.REASON]) == ("failed", "SIGKILL")


def test_who_is_stopped_while_waiting_says_that_there_is_no_other_attempt(
    sink: OtlpSink, supervise: Any
) -> None:
    process = supervise("--retries", "5", "--backoff", "600", "--", "sh", "-c", "exit 4")
    assert "attempt 2 begins in" in process.stderr.readline()
    process.terminate()
    assert finish(process)[0] == 143
    first, last = sorted(told(sink), key=lambda event: event.time)
    assert first.attributes[names.WILL_RETRY] is True
    assert (last.attributes[names.STATUS], last.attributes[names.REASON]) == ("cancelled", "SIGTERM")
    assert names.WILL_RETRY not in last.attributes


def test_what_the_dead_left_is_delivered(sink: OtlpSink, supervise: Any) -> None:
    dying = """
    import os, signal
    from gradwatch.export.exporters import otlp_exporter
    from gradwatch.settings import Settings
    from gradwatch.telemetry import Event
    exporter = otlp_exporter(Settings.resolve({}), lambda: None)
    exporter.send_events({"service.name": "dead"}, [Event("left behind", 1, {})])
    exporter.keep()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    assert finish(supervise("--", sys.executable, "-c", textwrap.dedent(dying)))[0] == 137
    assert [event.resource["service.name"] for event in sink.find("left behind")] == ["dead"]


# --- Training --------------------------------------------------------------------------------------------

TRAINING = """
import os, sys
import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
optimizer = torch.optim.Adam(model.parameters())
if "WATCHES" in os.environ:
    import gradwatch
    gradwatch.watch(model, optimizer)
for step in range(7):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
raise ValueError("after seven steps")
"""


def layers(sink: OtlpSink) -> Counter[str]:
    found: Counter[str] = Counter()
    for metric in sink.metrics:
        if metric.name == names.LAYER_GRADIENT_NORM.name:
            for point in metric.exponential_histogram.data_points:
                found[point.attributes[0].value.string_value] += point.count
    return found


def test_without_a_change_of_the_code_it_is_as_if_the_script_watched(
    sink: OtlpSink, supervise: Any, tmp_path: Path
) -> None:
    script = tmp_path / "fit.py"
    script.write_text(TRAINING)
    seen = []
    for environ in ({}, {"WATCHES": "1"}):
        returncode, _, errors = finish(supervise("--", sys.executable, str(script), environ=environ))
        assert returncode == 1
        assert "ValueError: after seven steps" in errors
        (own,) = [e for e in sink.find(names.RUN_ENDED.name) if names.RANK in e.resource]
        (outside,) = told(sink)
        same = (names.RUN_ID, names.RUN_ATTEMPT, names.SERVICE_NAME)
        assert [own.resource[name] for name in same] == [outside.resource[name] for name in same]
        assert own.resource[names.SUPERVISOR_INSTANCE] == outside.resource[names.SERVICE_INSTANCE_ID]
        assert own.resource[names.PARENT_PID] == outside.resource[names.PROCESS_PID]
        assert own.attributes[names.REASON] == "ValueError"
        assert outside.attributes[names.REASON] == "exit 1"
        assert outside.attributes[names.STEP] == 6
        steps, losses = sink.values(names.STEP_INDEX.name), sink.values(names.LOSS.name)
        seen.append((steps, losses, layers(sink), own.resource[names.MODEL], own.resource[names.SERVICE_NAME]))
        sink.events.clear()
        sink.metrics.clear()
    assert seen[0] == seen[1]
    assert seen[0][0] == list(range(7))
    assert set(seen[0][2]) == {"0.weight", "0.bias", "1.weight", "1.bias"}


RANKS = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn

torch.set_num_threads(1)
restart, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["RANK"])
# A store of its own: torchrun's still holds the addresses of the workers before.
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-{restart}", rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    optimizer.zero_grad()
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    if step == 2 and restart == "0":
        raise RuntimeError("only the first time")
dist.destroy_process_group()
"""


def test_the_ranks_of_torchrun_are_one_run_and_its_restarts_are_attempts(
    sink: OtlpSink, supervise: Any, tmp_path: Path
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    began = time.time_ns()
    returncode, _, errors = finish(
        supervise("--", *torchrun, "--max-restarts", "1", str(script), str(tmp_path / "store"))
    )
    assert returncode == 0, errors
    ranks = [e for e in sink.find(names.RUN_STARTED.name) if names.RANK in e.resource]
    assert {(e.resource[names.RUN_ATTEMPT], e.resource[names.RANK]) for e in ranks} == {
        (1, 0), (1, 1), (2, 0), (2, 1)
    }  # fmt: skip
    (last,) = told(sink)
    assert (last.resource[names.RUN_ATTEMPT], last.attributes[names.STATUS]) == (2, "succeeded")
    assert {e.resource[names.RUN_ID] for e in ranks} == {last.resource[names.RUN_ID]}
    assert {e.resource[names.SERVICE_NAME] for e in (*ranks, last)} == {"ranks"}
    assert {e.resource[names.SUPERVISOR_INSTANCE] for e in ranks} == {last.resource[names.SERVICE_INSTANCE_ID]}
    assert last.resource[names.PROCESS_PID] not in {e.resource[names.PARENT_PID] for e in ranks}
    assert last.attributes[names.STEP] == 4
    assert all(event.time > began for event in ranks)
