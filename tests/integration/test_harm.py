"""Whatever fails around training, training comes out the same, bit for bit, and ends by itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.testing import InMemoryExporter
from tests.faulty_servers import RECEIVERS, answering, faulty_server, unused_endpoint

STEPS = 200


@pytest.fixture(autouse=True)
def as_in_production(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Errors of gradwatch's own surface in other tests; here it is shown that they do not.
    for name in list(os.environ):
        if name.startswith(("GRADWATCH_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRADWATCH_DIR", str(tmp_path / "gradwatch"))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def train(
    make: Callable[[], nn.Module] = network,
    attach: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda _model, _optimizer: None,
    each_step: Callable[[Any, int], None] = lambda _watch, _step: None,
    width: int = 6,
    optimize: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    steps: int = STEPS,
) -> bytes:
    """Weights after training, as bytes."""
    torch.manual_seed(7)
    model = make()
    optimizer = optimize(model.parameters(), lr=0.01, foreach=True)
    watch = attach(model, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        each_step(watch, step)
    if watch is not None:
        watch.close()
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


@pytest.fixture(scope="module")
def expected() -> bytes:
    return train()


def watching(**settings: Any) -> Callable[[nn.Module, torch.optim.Optimizer], gradwatch.Watch]:
    """Attach with exports so frequent that the fault is met many times."""
    return lambda model, optimizer: gradwatch.watch(
        model, optimizer, job="harm", **{"export_interval": 0.05, "every": 2, **settings}
    )


@pytest.mark.parametrize("receiver", RECEIVERS.values(), ids=RECEIVERS)
def test_a_collector_that_fails_changes_nothing(
    receiver: Callable[[], AbstractContextManager[str]], expected: bytes
) -> None:
    with receiver() as endpoint:
        assert train(attach=watching(endpoint=endpoint)) == expected


class Raising:
    """An exporter that cannot do anything."""

    def send_events(self, *_: Any) -> bool:
        raise ValueError("events")

    def send_metrics(self, *_: Any) -> bool:
        raise MemoryError("metrics")

    def close(self) -> None:
        raise RuntimeError("close")


def test_an_exporter_that_raises_changes_nothing(expected: bytes) -> None:
    assert train(attach=watching(exporter=Raising())) == expected


def nvml_hangs() -> None:
    time.sleep(60.0)


def nvml_fails() -> None:
    raise OSError("no driver")


@pytest.mark.parametrize("init", [nvml_hangs, nvml_fails, None], ids=["hangs", "fails", "is missing"])
def test_nvml_that_does_not_work_changes_nothing_and_signs_of_life_go_on(
    monkeypatch: pytest.MonkeyPatch, init: Callable[[], None] | None, expected: bytes
) -> None:
    broken = types.ModuleType("pynvml")
    broken.NVMLError = OSError  # type: ignore[attr-defined]
    broken.nvmlInit = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", None if init is None else broken)  # type: ignore[arg-type]
    # One card, as torch would tell of it: what is asked of NVML is what is asked where there is one.
    properties = types.SimpleNamespace(
        name="A card", total_memory=1 << 30, uuid="00000000-0000-0000-0000-000000000000"
    )
    for name, value in {
        "is_available": True, "is_initialized": True, "device_count": 1, "get_device_properties": properties,
        "memory_allocated": 1, "memory_reserved": 2, "max_memory_reserved": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"gradwatch.measures.memory.torch.cuda.{name}", lambda *_, value=value: value)
    told = InMemoryExporter()
    assert train(attach=watching(exporter=told)) == expected
    assert len(told.values(names.STEP_INDEX)) == STEPS


def test_a_clock_that_jumps_backwards_changes_nothing(monkeypatch: pytest.MonkeyPatch, expected: bytes) -> None:
    now = time.time_ns()
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time_ns", lambda: now - next(jumps) * 3_600_000_000_000)
    monkeypatch.setattr(time, "time", lambda: (now - next(jumps) * 3_600_000_000_000) / 1e9)
    told = InMemoryExporter()
    assert train(attach=watching(exporter=told)) == expected
    times = [point.time for point in told.points(names.STEP_INDEX)]
    assert len(times) == STEPS
    assert all(one < other for one, other in pairwise(times))


def test_names_in_any_script_and_of_any_length_change_nothing(expected: bytes) -> None:
    def make() -> nn.Module:
        plain = network()
        named = nn.Sequential()
        for name, module in zip(
            ("слой 层 طبقة \N{ROCKET}\udcff", "x" * 1000, "\n\t'\"\\{}%s"), plain, strict=True
        ):
            named.add_module(name, module)
        return named

    with faulty_server(answering(200)) as endpoint:
        assert train(make, watching(endpoint=endpoint)) == expected


def test_odd_things_logged_change_nothing(expected: bytes) -> None:
    odd = {
        "nan": float("nan"), "text": "0.5 maybe", "none": None, "meta": torch.empty((), device="meta"),
        "many": torch.ones(3), "huge": 10**400, "complex": 1j, "self": object(), "lr": "fast",
        "loss": float("inf"), "слой\udcff": 1.0,
    }  # fmt: skip

    def log_them(watch: gradwatch.Watch, _step: int) -> None:
        watch.log(**odd)

    assert train(attach=watching(endpoint=unused_endpoint()), each_step=log_them) == expected


def test_logging_from_many_threads_changes_nothing_and_loses_nothing(expected: bytes) -> None:
    told = InMemoryExporter()
    threads: list[threading.Thread] = []

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> gradwatch.Watch:
        watch = watching(exporter=told)(model, optimizer)

        def shout(number: int) -> None:
            for value in range(500):
                watch.log(**{f"thread_{number}": value})

        threads.extend(threading.Thread(target=shout, args=(number,)) for number in range(8))
        for thread in threads:
            thread.start()
        return watch

    def join_at_the_end(_watch: gradwatch.Watch, step: int) -> None:
        if step == STEPS - 1:
            for thread in threads:
                thread.join()

    assert train(attach=attach, each_step=join_at_the_end) == expected
    assert len(told.points(names.LOGGED)) == 8 * 500


def test_a_fork_in_the_middle_changes_nothing(expected: bytes) -> None:
    def fork_now_and_then(_watch: gradwatch.Watch, step: int) -> None:
        if step % 50 == 0:
            child = os.fork()
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

    with faulty_server(answering(503)) as endpoint:
        assert train(attach=watching(endpoint=endpoint), each_step=fork_now_and_then) == expected


class Layers(nn.Module):
    """Very many tiny parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.cells = nn.ParameterList(nn.Parameter(torch.randn(1)) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean() + torch.cat(list(self.cells)).square().sum()


def test_ten_thousand_layers_change_nothing() -> None:
    def make() -> nn.Module:
        return Layers(10_000)

    with faulty_server(answering(200)) as endpoint:
        watching_it = watching(endpoint=endpoint, export_interval=1.0)
        # A step of Adam takes 0.2 s.
        watched = train(make, watching_it, optimize=torch.optim.SGD, steps=20)
    assert watched == train(make, optimize=torch.optim.SGD, steps=20)


def test_a_spool_full_of_rubbish_changes_nothing(tmp_path: Path, expected: bytes) -> None:
    endpoint = unused_endpoint()
    assert train(attach=watching(endpoint=endpoint, directory=tmp_path / "host")) == expected
    segments = list((tmp_path / "host" / "spool").rglob("*.segment"))
    assert segments, "nothing was spooled"
    for place, segment in enumerate(segments):
        content = bytearray(segment.read_bytes())
        content[len(content) // 2] ^= 0xFF
        segment.write_bytes(content if place % 2 else os.urandom(1000))
        (segment.parent / f"{segment.stem}-more.segment").mkdir()
    assert train(attach=watching(endpoint=endpoint, directory=tmp_path / "host")) == expected


def test_a_spool_that_two_processes_share_changes_nothing(tmp_path: Path, expected: bytes) -> None:
    code = CHILD.format(before="", after="", steps=STEPS)
    environment = {
        **os.environ, "GRADWATCH_ENDPOINT": unused_endpoint(), "GRADWATCH_DIR": str(tmp_path / "host"),
    }  # fmt: skip
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    told = [child.communicate(timeout=60)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert told == [hashlib.sha256(expected).hexdigest()] * 2


CHILD = """
import hashlib, os, sys, threading
import torch
from torch import nn
torch.manual_seed(7)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=True)
{before}
import gradwatch
watch = gradwatch.watch(model, optimizer, job="harm", every=2, export_interval=0.05)
for step in range({steps}):
    optimizer.zero_grad()
    model(torch.randn(4, 6)).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(hashlib.sha256(weights).hexdigest(), flush=True)
{after}
"""

NO_THREADS = """
def refuse(self): raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
"""
NO_FILES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""
AT_SHUTDOWN = """
import atexit
class Late:
    def __del__(self):
        watch.log(late=1.0); watch.step; watch.run_id; watch.close()
late = Late()
def step_late():
    optimizer.zero_grad(); model(torch.randn(4, 6)).square().mean().backward(); optimizer.step()
atexit.register(step_late)
"""
ANOTHER_THREAD = """
def train(model, optimizer):
    for step in range(4000):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
other = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
thread = threading.Thread(target=train, args=(other, torch.optim.SGD(other.parameters(), lr=0.01)))
thread.start()
train(model, optimizer)
thread.join()
"""
SURROUNDINGS: dict[str, tuple[str, str, dict[str, str]]] = {
    "no threads allowed": (NO_THREADS, "", {}),
    "steps while the interpreter shuts down": ("", AT_SHUTDOWN, {}),
    "another thread trains, too": ("", ANOTHER_THREAD, {}),
    "standard streams closed": ("", "sys.stdout.close(); sys.stderr.close()", {}),
    "no temporary folder, no home": (
        "", "", dict.fromkeys(("TMPDIR", "HOME", "XDG_STATE_HOME"), "/nowhere"),
    ),
    "a file where the folder should be": ("", "", {"GRADWATCH_DIR": "/dev/null/gradwatch"}),
    "file descriptors used up": (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))", "", {},
    ),
    "no file may grow": (NO_FILES, "", {}),
}  # fmt: skip


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_poor_surroundings_change_nothing(
    surroundings: tuple[str, str, dict[str, str]], expected: bytes
) -> None:
    before, after, environment = surroundings
    code = textwrap.dedent(CHILD).format(before=before, after=after, steps=STEPS)
    read, write = os.pipe()  # no file, so that a limit on files does not matter to what is said
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read)
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "GRADWATCH_ENDPOINT": unused_endpoint(), **environment},
        )  # fmt: skip
        os.close(write)
        _, complaints = child.communicate(timeout=60)
        told = os.read(read, 1000).decode().strip()
    assert child.returncode == 0, complaints
    assert "Exception ignored" not in complaints
    assert "Exception in thread" not in complaints
    assert told == hashlib.sha256(expected).hexdigest()
