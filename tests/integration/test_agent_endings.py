"""Real child processes, a real OTLP receiver: every ending is told truthfully, and in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradwatch import conventions as names
from gradwatch.life.flight_recorder import decode
from tests.collector_process import free_port
from tests.otlp_sink import OtlpSink, otlp_sink

LOOP = """
import os, sys, signal, time
from sys import exit as early_exit
import torch
from torch import nn
import gradwatch

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{before}
watch = gradwatch.watch(model, optimizer, job="endings", every=1)
def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
train(5)
{after}
"""


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path / "gradwatch"))
    yield
    while started:
        with started.pop() as process:
            process.kill()


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


def start(
    endpoint: str, after: str = "", before: str = "", flags: tuple[str, ...] = (), **environ: str
) -> subprocess.Popen[str]:
    code = LOOP.format(before=textwrap.dedent(before), after=textwrap.dedent(after))
    process = subprocess.Popen(
        [sys.executable, *flags, "-c", code],
        env={
            "PATH": "/usr/bin:/bin",
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "GRADWATCH_TESTING": "1",
            "GRADWATCH_DIR": os.environ["GRADWATCH_DIR"],
            **environ,
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def ended(sink: OtlpSink) -> dict[str, Any]:
    events = sink.find(names.RUN_ENDED.name)
    assert len(events) == 1, sink.names()
    return events[0].attributes


@pytest.mark.parametrize(
    ("after", "code", "status", "reason"),
    [
        pytest.param("", 0, "succeeded", None, id="return"),
        pytest.param("sys.exit(0)", 0, "succeeded", None, id="exit 0"),
        pytest.param("sys.exit(3)", 3, "failed", "exit 3", id="exit 3"),
        pytest.param("sys.exit('no data')", 1, "failed", "exit 1", id="exit with a message"),
        pytest.param("early_exit(7)", 7, "failed", "exit 7", id="an exit bound before watch"),
        pytest.param(
            """
            class Terminated(Exception):
                pass
            def handler(*_):
                raise Terminated("asked to end")
            signal.signal(signal.SIGTERM, handler)
            os.kill(os.getpid(), signal.SIGTERM)
            """,
            1, "cancelled", "SIGTERM", id="an exception in answer to SIGTERM",
        ),
        pytest.param("raise RuntimeError('boom')", 1, "failed", "RuntimeError", id="exception"),
        pytest.param(
            "sys.excepthook = lambda *_: print('my own report')\nraise ValueError('boom')",
            1, "failed", "ValueError", id="an exception under a hook of somebody else's",
        ),
        pytest.param(
            "sys.excepthook = lambda *_: None\nraise KeyboardInterrupt",
            -2, "cancelled", "interrupted", id="KeyboardInterrupt under a hook of somebody else's",
        ),
        pytest.param(
            """
            def handled():
                try:
                    raise ValueError("handled")
                except ValueError as error:
                    sys.last_value = error
            handled()
            """,
            0, "succeeded", None, id="an exception that a debugger was shown",
        ),
        pytest.param("helper.leave()", 3, "failed", "exit 3", id="an exit bound in a module"),
        pytest.param(
            """
            def parse():
                try:
                    sys.exit(2)
                except SystemExit:
                    raise ValueError("bad words") from None
            try:
                parse()
            except ValueError:
                pass
            """,
            0, "succeeded", None, id="an exit made into an exception that was caught",
        ),
        pytest.param(
            """
            class Odd(Exception):
                def __str__(self):
                    raise LookupError("no text")
            raise Odd
            """,
            1, "failed", "__main__.Odd", id="an exception whose text raises",
        ),
        pytest.param("raise KeyboardInterrupt", -2, "cancelled", "interrupted", id="KeyboardInterrupt"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -2, "cancelled", "interrupted", id="SIGINT"
        ),
        pytest.param(
            """
            try:
                sys.exit(3)
            except SystemExit:
                pass
            """,
            0, "succeeded", None, id="a caught exit at the top",
        ),
        pytest.param(
            """
            def careful():
                try:
                    sys.exit(3)
                except SystemExit:
                    return
            careful()
            """,
            0, "succeeded", None, id="a caught exit further down",
        ),
        pytest.param(
            """
            try:
                try:
                    sys.exit(4)
                finally:
                    train(1)
            finally:
                with torch.no_grad():
                    train
            """,
            4, "failed", "exit 4", id="an exit through finally",
        ),
        pytest.param(
            """
            def careful():
                try:
                    sys.exit(5)
                except BaseException:
                    train(1)
                    raise
            careful()
            """,
            5, "failed", "exit 5", id="an exit caught and raised again",
        ),
        pytest.param(
            """
            import threading
            thread = threading.Thread(target=sys.exit, args=(3,))
            thread.start()
            thread.join()
            """,
            0, "succeeded", None, id="an exit of a thread",
        ),
        pytest.param("watch.close(); sys.exit(3)", 3, "succeeded", None, id="closed before"),
    ],
)  # fmt: skip
def test_an_ending(
    sink: OtlpSink, tmp_path: Path, after: str, code: int, status: str, reason: str | None
) -> None:
    (tmp_path / "helper.py").write_text("from sys import exit\ndef leave(): exit(3)\n")
    returncode, errors = finish(start(sink.endpoint, after, "import helper", PYTHONPATH=str(tmp_path)))
    assert returncode == code, errors
    event = ended(sink)
    assert event[names.STATUS] == status
    assert event.get(names.REASON) == reason
    if reason == "RuntimeError":
        assert event[names.EXCEPTION_TYPE] == "RuntimeError"
        assert event[names.EXCEPTION_MESSAGE] == "boom"
        assert "RuntimeError: boom" in errors
    if "Terminated" in after:
        assert event[names.EXCEPTION_MESSAGE] == "asked to end"
        assert "Terminated: asked to end" in errors


def test_a_wrong_word_at_a_prompt_ends_nothing(sink: OtlpSink) -> None:
    process = start(sink.endpoint, "print('ready', flush=True)", flags=("-q", "-i"))
    _, errors = process.communicate("no_such_name\ntrain(3)\nwatch.close()\n", timeout=60)
    assert "NameError" in errors
    event = ended(sink)
    assert (event[names.STATUS], event[names.STEP]) == ("succeeded", 7)


@pytest.mark.parametrize(
    ("environ", "encoding"),
    [({}, ""), ({"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"}, "gzip")],
    ids=["on this machine", "compressed"],
)
def test_a_short_run_delivers_everything(sink: OtlpSink, environ: dict[str, str], encoding: str) -> None:
    returncode, errors = finish(start(sink.endpoint, **environ))
    assert (returncode, errors) == (0, "")
    assert sink.names() == [names.RUN_STARTED.name, names.RUN_ENDED.name]
    assert [event.attributes[names.EVENT_SEQUENCE] for event in sink.events] == [0, 1]
    assert sink.values(names.STEP_INDEX.name) == [0, 1, 2, 3, 4]
    assert len(sink.values(names.LOSS.name)) == 5
    (layers,) = [metric for metric in sink.metrics if metric.name == names.LAYER_GRADIENT_NORM.name]
    points = {p.attributes[0].value.string_value: p for p in layers.exponential_histogram.data_points}
    assert set(points) == {"weight", "bias"}
    point = points["weight"]
    assert (point.count, point.scale, point.zero_threshold) == (5, 3, 0.0)
    assert sum(point.positive.bucket_counts) == 5
    assert 0 < point.start_time_unix_nano < point.time_unix_nano
    assert sink.encodings == {encoding}
    resource = sink.events[0].resource
    assert resource[names.SERVICE_NAME] == "endings"
    assert resource[names.MODEL] == "Linear"
    assert resource[names.TIER] == "experiment"
    assert resource[names.RANK] == 0


@pytest.mark.parametrize(
    ("environ", "reason"), [({}, "SIGTERM"), ({"GRADWATCH_PREEMPTIBLE": "1"}, "preempted")]
)
def test_sigterm_in_the_middle_of_a_long_call(sink: OtlpSink, environ: dict[str, str], reason: str) -> None:
    """The call takes many seconds; a Python-level handler would wait for it."""
    long_call = """
    big = torch.randn(6000, 6000)
    print("now", flush=True)
    while True:
        big @ big
    """
    process = start(sink.endpoint, long_call, **environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGTERM)
    event = sink.wait_for_event(names.RUN_ENDED.name, timeout=10.0)
    assert event.attributes[names.STATUS] == "cancelled"
    assert event.attributes[names.REASON] == reason
    returncode, _ = finish(process)
    assert returncode == -signal.SIGTERM


@pytest.mark.parametrize(("notice", "reason"), [("SIGUSR1", "preempted"), ("SIGCONT", "SIGTERM")])
def test_slurms_notice_before_sigterm_means_preemption(sink: OtlpSink, notice: str, reason: str) -> None:
    """SIGCONT comes before SIGTERM when a job is cancelled, too."""
    handled = f"signal.signal(signal.{notice}, lambda *_: None)"
    signals = f"""
    os.kill(os.getpid(), signal.{notice})
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    """
    returncode, _ = finish(start(sink.endpoint, signals, handled, SLURM_JOB_ID="7"))
    assert returncode == -signal.SIGTERM
    assert (ended(sink)[names.STATUS], ended(sink)[names.REASON]) == ("cancelled", reason)


@pytest.mark.parametrize(
    ("after", "trigger"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", "SIGTERM", id="SIGTERM"),
        pytest.param("raise RuntimeError('boom')", "exception", id="exception"),
        pytest.param("sys.exit(3)", "exception", id="exit 3"),
        pytest.param("torch.empty(2**46, dtype=torch.uint8)", "oom", id="out of memory"),
        pytest.param("model.weight.data.fill_(float('nan')); train(2)", "nonfinite", id="NaN"),
    ],
)
def test_the_black_box_of_a_dying_process_is_sent_and_written(
    sink: OtlpSink, tmp_path: Path, after: str, trigger: str
) -> None:
    _, errors = finish(start(sink.endpoint, after, GRADWATCH_RUN_ID="dying"))
    (event,) = sink.find(names.FLIGHT_RECORD.name)
    assert event.attributes[names.FLIGHT_TRIGGER] == trigger, errors
    sent = decode(event.attributes[names.FLIGHT_DATA])
    steps = sent["optimizers"][0]["step"]
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert event.attributes[names.FLIGHT_STEPS] == len(steps)
    assert set(sent["optimizers"][0]["norms"]) == {"weight", "bias"}
    assert None not in sent["optimizers"][0]["norms"]["weight"]
    (file,) = (tmp_path / "gradwatch").glob(f"flight-dying-r0-{trigger}-*.json.gz")
    assert decode(file.read_bytes())["optimizers"][0]["step"] == steps
    assert ended(sink)[names.STATUS] == {"SIGTERM": "cancelled", "nonfinite": "succeeded"}.get(
        trigger, "failed"
    )


USER_HANDLER = """
def mine(number, frame):
    os.write(1, b"user handler\\n")  # print is not re-entrant
    sys.exit(0)
signal.signal(signal.SIGTERM, mine)
"""


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_users_own_sigterm_handler_runs(sink: OtlpSink, place: str) -> None:
    wait = "print('now', flush=True)\nwhile True: time.sleep(0.01)"
    if place == "before":
        process = start(sink.endpoint, wait, USER_HANDLER)
    else:
        process = start(sink.endpoint, USER_HANDLER + wait)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGTERM)
    answer = process.stdout.readline()
    assert answer == "user handler\n", process.communicate(timeout=60)
    returncode, errors = finish(process)
    assert returncode == 0, errors
    event = ended(sink)
    assert (event[names.STATUS], event[names.REASON]) == ("cancelled", "SIGTERM")


@pytest.mark.parametrize(
    ("work", "status", "reason"),
    [
        ("pass", "succeeded", None),
        ("raise ValueError('in the child')", "failed", "ValueError"),
        ("sys.exit(3)", "failed", "exit 3"),
    ],
)
def test_a_forked_child_that_watches_for_itself_tells_its_own_ending(
    sink: OtlpSink, work: str, status: str, reason: str | None
) -> None:
    fork = f"""
    import multiprocessing
    def work():
        mine = gradwatch.watch(nn.Linear(8, 2), run_id="child")
        {work}
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    """
    returncode, _ = finish(start(sink.endpoint, fork))
    assert returncode == 0
    child, parent = (event.attributes for event in sink.find(names.RUN_ENDED.name))
    assert (child[names.STATUS], child.get(names.REASON)) == (status, reason)
    assert parent[names.STATUS] == "succeeded"


def test_an_exception_handled_before_watch_is_not_the_ending_of_a_retry(sink: OtlpSink) -> None:
    retry = """
    watch.close()
    try:
        raise MemoryError("first try")
    except MemoryError:
        watch = gradwatch.watch(model, optimizer, run_id="again")
        train(2)
        watch.close()
    """
    returncode, errors = finish(start(sink.endpoint, retry))
    assert returncode == 0, errors
    assert [e.attributes[names.STATUS] for e in sink.find(names.RUN_ENDED.name)] == ["succeeded", "succeeded"]


def test_a_handler_that_calls_the_one_before_it_decides_whether_the_process_lives(sink: OtlpSink) -> None:
    chain = """
    before = signal.getsignal(signal.SIGTERM)
    def mine(number, frame):
        if callable(before):
            before(number, frame)
    signal.signal(signal.SIGTERM, mine)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)
    train(3)
    print("saved")
    """
    process = start(sink.endpoint, chain)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "saved\n"), errors


def test_without_a_thread_to_listen_for_sigterm_the_rest_is_told_as_ever(sink: OtlpSink) -> None:
    one_thread = """
    import threading
    start = threading.Thread.start
    def start_or_refuse(self):
        if self.name == "gradwatch-sigterm":
            raise RuntimeError("can't start new thread")
        start(self)
    threading.Thread.start = start_or_refuse
    """
    assert finish(start(sink.endpoint, "train(3)", one_thread)) == (0, "")
    assert (ended(sink)[names.STATUS], ended(sink)[names.STEP]) == ("succeeded", 7)


def test_an_ignored_sigterm_stays_ignored(sink: OtlpSink) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    returncode, errors = finish(start(sink.endpoint, "os.kill(os.getpid(), signal.SIGTERM); train(3)", ignore))
    assert returncode == 0, errors
    assert ended(sink)[names.STATUS] == "succeeded"


def test_a_child_of_a_watched_process_dies_of_sigterm_and_says_nothing(sink: OtlpSink) -> None:
    fork = """
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(1)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    train(2)
    """
    returncode, errors = finish(start(sink.endpoint, fork))
    assert returncode == 0, errors
    assert ended(sink)[names.STATUS] == "succeeded"
    assert sink.values(names.STEP_INDEX.name) == list(range(7))


def test_spawned_ranks_watch_for_themselves(sink: OtlpSink, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            import torch.distributed as dist
            import gradwatch

            def rank_main(rank, store):
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
                model = torch.nn.Linear(4, 2)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                gradwatch.watch(model, optimizer)
                model(torch.randn(3, 4)).sum().backward()
                optimizer.step()
                dist.destroy_process_group()

            if __name__ == "__main__":
                import sys
                torch.multiprocessing.spawn(rank_main, (sys.argv[1],), nprocs=2)
            """
        )
    )
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        env={
            "PATH": "/usr/bin:/bin",
            "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint,
            "GRADWATCH_TESTING": "1",
            "GRADWATCH_DIR": str(tmp_path),
        },
        check=True,
        timeout=120,
        capture_output=True,
    )
    started = sink.find(names.RUN_STARTED.name)
    assert sorted(event.resource[names.RANK] for event in started) == [0, 1]
    assert len({event.resource[names.RUN_ID] for event in started}) == 1
    assert (
        sorted(event.attributes[names.STATUS] for event in sink.find(names.RUN_ENDED.name)) == ["succeeded"] * 2
    )


def test_without_a_collector_training_is_the_same_and_says_so_once() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    weights = "train(50); print(model.weight.detach().numpy().tobytes().hex())"
    outputs = []
    environ: dict[str, str]
    for environ in ({}, {"GRADWATCH_DISABLED": "1"}):
        process = start(nowhere, weights, GRADWATCH_EXPORT_INTERVAL="0.01", **environ)
        began = time.monotonic()
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert time.monotonic() - began < 30  # a bound on hanging, not a measurement
        outputs.append((output, errors))
    (watched, said), (bare, silence) = outputs
    assert watched == bare
    assert silence == ""
    assert said.count("\n") == 1
    assert nowhere in said
    assert "training goes on" in said


def test_a_collector_that_comes_later_gets_everything(sink: OtlpSink) -> None:
    sink.status = 503
    wait = """
    print("now", flush=True)
    sys.stdin.readline()
    """
    process = start(sink.endpoint, wait, GRADWATCH_EXPORT_INTERVAL="0.05")
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    with sink.arrived:
        assert sink.arrived.wait_for(lambda: bool(sink.encodings), 20.0)
        assert sink.events == []
        sink.status = 200
    sink.wait_for_event(names.RUN_STARTED.name)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert sink.names() == [names.RUN_STARTED.name, names.RUN_ENDED.name]
    assert sink.values(names.STEP_INDEX.name) == [0, 1, 2, 3, 4]
