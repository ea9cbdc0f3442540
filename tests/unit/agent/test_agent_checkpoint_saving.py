"""Saving: whole or not at all, told in one event, and outside of every step."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

import gradwatch
from gradwatch import conventions as names
from gradwatch.checkpoints import finding as checkpoints
from gradwatch.checkpoints import manifest
from gradwatch.checkpoints import writing as checkpoint_writing
from gradwatch.checkpoints.finding import verify
from gradwatch.settings import SettingsError
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]
PAUSE = 0.05
BIG, SMALL = 4096, 16


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()


def state(value: float, size: int = SMALL) -> dict[str, Any]:
    return {"value": value, "weights": torch.full((size,), value)}


def left_in(folder: Path) -> list[str]:
    """Whatever is there besides checkpoints and manifests."""
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def facts(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by name, computed apart from gradwatch."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        file.name if path.is_file() else file.relative_to(path).as_posix(): (
            len(data := file.read_bytes()),
            hashlib.sha256(data).hexdigest(),
        )
        for file in files
        if file.name != manifest.NAME
    }


def described(path: Path) -> dict[str, tuple[int, str]]:
    tree = json.loads(manifest.manifest_path(path).read_text())
    return {file["name"]: (file["size"], file["sha256"]) for file in tree["files"]}


def test_a_saved_file_loads_and_its_manifest_is_right(watching: Watching, tmp_path: Path) -> None:
    model, optimizer = make()
    path = tmp_path / "last.pt"
    with watching(model, optimizer, run_id="r", attempt=2, rank=3) as watch:
        step(model, optimizer)
        step(model, optimizer)
        watch.save_checkpoint(model.state_dict(), path)
    loaded = torch.load(path, weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert described(path) == facts(path)
    held = manifest.read(path)
    assert (held.step, held.run_id, held.attempt, held.rank) == (2, "r", 2, 3)
    assert held.torch == torch.__version__
    assert left_in(tmp_path) == []


def test_what_is_saved_is_what_torch_save_writes(watching: Watching, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    torch.save(state(1.0), tmp_path / "bare" / "last.pt")
    with watching(*make()) as watch:
        watch.save_checkpoint(state(1.0), tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "bare" / "last.pt").read_bytes()


def test_saving_is_told_with_size_step_and_duration(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    with watching(*make()) as watch:
        began = time.perf_counter()
        with watch.checkpoint(tmp_path / "model", step=7) as folder:
            folder.mkdir()
            (folder / "a.bin").write_bytes(b"12345")
            time.sleep(PAUSE)
            (folder / "b.bin").write_bytes(b"678")
        lasted = time.perf_counter() - began
    (told,) = exporter.find_events(names.CHECKPOINT_SAVED.name)
    assert told.attributes[names.STEP] == 7
    assert told.attributes[names.CHECKPOINT_SIZE] == 8
    assert told.attributes[names.CHECKPOINT_NAME] == f"{tmp_path.name}/model"
    assert PAUSE <= float(told.attributes[names.CHECKPOINT_DURATION]) <= lasted


def test_the_time_of_saving_belongs_to_no_step(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:
        step(model, optimizer)
        began = time.perf_counter()
        for number in range(3):
            with watch.checkpoint(tmp_path / f"{number}.pt") as file:
                torch.save(state(1.0), file)
                time.sleep(PAUSE)
            step(model, optimizer)
        lasted = time.perf_counter() - began
    durations = exporter.values(names.STEP_DURATION)
    assert len(durations) == 3
    assert sum(durations) <= lasted - 3 * PAUSE


class SaverError(Exception):
    pass


def test_a_failing_saver_is_told_passed_on_and_changes_nothing(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    planted = SaverError("no more tape")
    with watching(*make()) as watch:
        watch.save_checkpoint(state(1.0), path, step=1)
        before = path.read_bytes(), manifest.manifest_path(path).read_bytes()
        with pytest.raises(SaverError) as raised, watch.checkpoint(path, step=2) as file:
            torch.save(state(2.0), file)
            raise planted
        assert watch.run_id is not None
    assert raised.value is planted
    assert planted.__context__ is None
    assert (path.read_bytes(), manifest.manifest_path(path).read_bytes()) == before
    assert left_in(tmp_path) == []
    (told,) = exporter.find_events(names.CHECKPOINT_FAILED.name)
    assert str(told.attributes[names.EXCEPTION_TYPE]).endswith("SaverError")
    assert told.attributes[names.EXCEPTION_MESSAGE] == "no more tape"
    assert told.attributes[names.STEP] == 2


def test_an_interrupted_saver_leaves_the_checkpoint_before_and_is_no_failure(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    with watching(*make()) as watch:
        watch.save_checkpoint(state(1.0), path)
        with pytest.raises(KeyboardInterrupt), watch.checkpoint(path) as file:
            file.write_bytes(b"half")
            raise KeyboardInterrupt
    assert verify(path).state == "good"
    assert left_in(tmp_path) == []
    assert exporter.find_events(names.CHECKPOINT_FAILED.name) == []


@pytest.mark.parametrize("kind", ["closed", "disabled", "copied"])
def test_a_watch_that_watches_nothing_saves_all_the_same(
    watching: Watching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import copy

    if kind == "disabled":
        monkeypatch.setenv("GRADWATCH_DISABLED", "true")
    watch = watching(*make())
    if kind == "closed":
        watch.close()
    if kind == "copied":
        watch = copy.deepcopy(watch)
    path = tmp_path / "last.pt"
    watch.save_checkpoint(state(1.0), path)
    with pytest.raises(SaverError), watch.checkpoint(path) as file:
        file.write_bytes(b"half")
        raise SaverError
    assert torch.load(path)["value"] == 1.0
    assert (verify(path).state, manifest.read(path).step) == ("good", None)


def test_a_folder_takes_the_place_of_a_folder_as_a_whole(watching: Watching, tmp_path: Path) -> None:
    path = tmp_path / "model"
    with watching(*make()) as watch:
        for files in (("a", "old"), ("a", "b")):
            with watch.checkpoint(path) as folder:
                folder.mkdir()
                for name in files:
                    (folder / name).write_text(f"{files}")
    assert set(facts(path)) == {"a", "b"}
    assert described(path) == facts(path)
    assert left_in(tmp_path) == []


def test_a_folder_is_replaced_where_two_names_cannot_be_exchanged(
    watching: Watching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writing, "_rename_exchange", lambda *_: False)
    test_a_folder_takes_the_place_of_a_folder_as_a_whole(watching, tmp_path)


@pytest.mark.parametrize("first", ["file", "folder"])
def test_a_file_and_a_folder_can_take_each_others_place(watching: Watching, tmp_path: Path, first: str) -> None:
    path = tmp_path / "model"
    with watching(*make()) as watch:
        for kind in (first, "folder" if first == "file" else "file"):
            with watch.checkpoint(path) as place:
                if kind == "folder":
                    place.mkdir()
                    (place / "a").write_text("a")
                else:
                    place.write_text("b")
    assert verify(path).state == "good"
    assert checkpoints.find_all([tmp_path]) == [path]
    assert left_in(tmp_path) == []


def test_a_saver_that_writes_to_the_place_itself_gets_a_manifest(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    with watching(*make()) as watch:
        for value in (1.0, 2.0):
            with watch.checkpoint(path):
                torch.save(state(value), path)
    assert torch.load(path)["value"] == 2.0
    assert verify(path).state == "good"
    assert len(exporter.find_events(names.CHECKPOINT_SAVED.name)) == 2


def test_a_block_that_saves_nothing_is_a_failure_and_raises_nothing(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    with watching(*make()) as watch, watch.checkpoint(tmp_path / "last.pt"):
        pass
    (told,) = exporter.find_events(names.CHECKPOINT_FAILED.name)
    assert "nothing was written" in str(told.attributes[names.EXCEPTION_MESSAGE])
    assert list(tmp_path.glob("*.pt*")) == []


def test_a_link_stays_a_link_and_devices_stay_devices(watching: Watching, tmp_path: Path) -> None:
    (tmp_path / "latest.pt").symlink_to("real.pt")
    with watching(*make()) as watch:
        watch.save_checkpoint(state(1.0), tmp_path / "latest.pt")
        watch.save_checkpoint(state(2.0), tmp_path / "latest.pt")
        watch.save_checkpoint(state(3.0), "/dev/null")
    assert (tmp_path / "latest.pt").is_symlink()
    assert torch.load(tmp_path / "real.pt")["value"] == 2.0
    assert verify(tmp_path / "latest.pt").state == "good"
    assert not Path("/dev/null").is_file()


def test_names_that_are_no_text_and_links_to_nowhere_are_saved_too(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"model\xff")
    with watching(*make()) as watch, watch.checkpoint(path) as place:
        place.mkdir()
        (place / os.fsdecode(b"part\xfe.bin")).write_bytes(b"part")
        (place / "link").symlink_to("nowhere")
    assert verify(path).state == "good"
    assert described(path) == facts(path)
    (told,) = exporter.find_events(names.CHECKPOINT_SAVED.name)
    assert str(told.attributes[names.CHECKPOINT_NAME]).encode().decode().endswith("/model\ufffd")


def test_a_place_that_is_not_of_this_machine_is_refused_before_anything_is_saved(watching: Watching) -> None:
    with (
        watching(*make()) as watch,
        pytest.raises(ValueError, match="path of this machine"),
        watch.checkpoint("s3://bucket/last.pt"),
    ):
        raise AssertionError("the saver ran")


def test_a_full_disk_raises_what_it_would_have_raised_and_leaves_the_checkpoint_before(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with watching(*make()) as watch:
        watch.save_checkpoint(state(1.0), path, step=1)
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size, unlimited[1]))
        try:
            with pytest.raises(OSError) as full, watch.checkpoint(path, step=2) as file:
                file.write_bytes(bytes(10 * size))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert full.value.errno == errno.EFBIG
    assert (verify(path).state, manifest.read(path).step) == ("good", 1)
    assert left_in(tmp_path) == []
    assert len(exporter.find_events(names.CHECKPOINT_FAILED.name)) == 1


def test_a_disk_that_has_no_room_for_the_manifest_leaves_the_checkpoint_before(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watching(*make()) as watch:
        watch.save_checkpoint(state(1.0), path, step=1)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_writing, "_write", full)
            with pytest.raises(OSError, match="No space left"):
                watch.save_checkpoint(state(2.0), path, step=2)
    assert torch.load(path)["value"] == 1.0
    assert (verify(path).state, manifest.read(path).step) == ("good", 1)
    assert left_in(tmp_path) == []
    (told,) = exporter.find_events(names.CHECKPOINT_FAILED.name)
    assert "No space left" in str(told.attributes[names.EXCEPTION_MESSAGE])


def test_a_folder_that_holds_other_things_keeps_them(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    path = tmp_path / "experiment"
    (path / "logs").mkdir(parents=True)
    (path / "train.py").write_text("code")
    (path / "logs" / "events").write_text("log")
    torch.save(state(0.0), path / "older.pt")
    other = path.stat().st_ino
    with watching(*make()) as watch:
        for files in (("a.bin", "old.bin"), ("a.bin", "b.bin")):
            with watch.checkpoint(path) as folder:
                folder.mkdir()
                for name in files:
                    (folder / name).write_text(f"{files}")
            (path / "logs" / "events").write_text(f"log of {files}")  # and it need not stay as it was
    assert path.stat().st_ino == other  # whoever works in it still does
    assert set(facts(path)) == {"train.py", "logs/events", "older.pt", "a.bin", "b.bin"}
    assert set(described(path)) == {"a.bin", "b.bin"}
    assert (path / "a.bin").read_text() == "('a.bin', 'b.bin')"
    assert verify(path).state == "good"
    assert left_in(tmp_path) == []
    assert len(exporter.find_events(names.CHECKPOINT_SAVED.name)) == 2


def test_what_somebody_put_beside_a_checkpoint_is_kept_when_it_is_replaced(
    watching: Watching, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    with watching(*make()) as watch:
        for number in range(3):
            with watch.checkpoint(path) as folder:
                folder.mkdir()
                torch.save(state(number), folder / "model.pt")
            (path / "evaluation.json").write_text("{}")
    assert sorted(facts(path)) == ["evaluation.json", "model.pt"]
    assert torch.load(path / "model.pt")["value"] == 2
    assert verify(path).state == "good"


@pytest.mark.parametrize("kind", ["file over a folder", "folder over a file"])
def test_what_is_not_a_checkpoint_is_not_replaced_by_another_kind_of_thing(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "experiment"
    kept = path
    if kind == "file over a folder":
        path.mkdir()
        kept = path / "train.py"
    kept.write_text("code")
    with (
        watching(*make()) as watch,
        pytest.raises(OSError, match="experiment"),
        watch.checkpoint(path) as place,
    ):
        if kind == "folder over a file":
            place.mkdir()
        torch.save(state(1.0), place / "model.pt" if kind == "folder over a file" else place)
    assert kept.read_text() == "code"
    assert left_in(tmp_path) == []
    assert len(exporter.find_events(names.CHECKPOINT_FAILED.name)) == 1


def test_a_rank_that_only_makes_the_folder_does_not_take_the_place_of_what_the_first_saved(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with watching(*make()) as watch:
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            with watch.checkpoint(tmp_path / "last") as folder:
                (folder / "parts").mkdir(parents=True)
                if rank == 0:
                    torch.save(state(1.0), folder / "model.pt")
        assert torch.load(tmp_path / "last" / "model.pt")["value"] == 1.0
        assert len(exporter.find_events(names.CHECKPOINT_SAVED.name)) == 1
        assert exporter.find_events(names.CHECKPOINT_FAILED.name) == []
        monkeypatch.setenv("RANK", "0")  # whose saver should have saved something
        with watch.checkpoint(tmp_path / "last") as folder:
            folder.mkdir()
    assert len(exporter.find_events(names.CHECKPOINT_FAILED.name)) == 1
    assert verify(tmp_path / "last").state == "good"


def archive() -> bytes:
    torch.save(state(2.0), stream := io.BytesIO())
    return stream.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def plain_pickle() -> bytes:
    return pickle.dumps(list(range(1000)))


@pytest.mark.parametrize(
    ("name", "content"), [("a.pt", archive), ("a.safetensors", safetensors), ("a.ckpt", plain_pickle)]
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_half_a_file_whose_error_was_caught_is_told_and_not_published(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path, kind: str, name: str, content: Any
) -> None:
    path = tmp_path / (name if kind == "file" else "model")
    with watching(*make()) as watch:
        for whole in (True, False):
            with watch.checkpoint(path) as place:
                inner = place
                if kind == "folder":
                    place.mkdir()
                    inner = place / name
                inner.write_bytes(content() if whole else content()[:-3])
    assert (path if kind == "file" else path / name).read_bytes() == content()
    assert verify(path).state == "good"
    assert left_in(tmp_path) == []
    assert len(exporter.find_events(names.CHECKPOINT_SAVED.name)) == 1
    (told,) = exporter.find_events(names.CHECKPOINT_FAILED.name)
    assert "cannot be loaded" in str(told.attributes[names.EXCEPTION_MESSAGE])


def test_processes_with_the_same_number_do_not_write_into_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers of one machine, each of which has its own process 7."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    reading, writing = os.pipe()
    child = os.fork()
    ours = checkpoint_writing.stage(tmp_path / "last.pt")
    assert ours is not None
    if not child:
        os.write(writing, os.fsencode(ours.path))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 4096) != os.fsencode(ours.path)
    ours.discard()


def test_two_that_save_to_one_place_at_once_leave_the_whole_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stops between its manifest and its file, until the second is done or waits."""
    _write(tmp_path, "file", b"before", 0)
    halfway, done = threading.Event(), threading.Event()
    move = checkpoint_writing.Staging._move_manifest

    def slow(staging: Any, about: manifest.Manifest, to: Path) -> None:
        move(staging, about, to)
        if about.step == 1:
            halfway.set()
            done.wait(0.5)

    monkeypatch.setattr(checkpoint_writing.Staging, "_move_manifest", slow)
    first = threading.Thread(target=_write, args=(tmp_path, "file", b"the first", 1))
    first.start()
    assert halfway.wait(30)
    _write(tmp_path, "file", b"second", 2)
    done.set()
    first.join()
    held, problem = manifest.verified(tmp_path / "last")
    assert problem is None
    assert (held.step, (tmp_path / "last").read_bytes()) == (2, b"second")


def test_who_may_read_a_checkpoint_stays_as_it_was(watching: Watching, tmp_path: Path) -> None:
    with watching(*make()) as watch:
        for kind, mode in (("file", 0o600), ("folder", 0o750)):
            for again in (False, True):
                with watch.checkpoint(tmp_path / kind) as place:
                    if kind == "folder":
                        place.mkdir()
                    torch.save(state(1.0), place / "model.pt" if kind == "folder" else place)
                if not again:
                    (tmp_path / kind).chmod(mode)
            assert stat.S_IMODE((tmp_path / kind).stat().st_mode) == mode


def test_a_name_that_leaves_no_room_for_a_manifests_is_saved_without_one(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    file, folder = tmp_path / ("x" * 250 + ".pt"), tmp_path / ("y" * 255)
    with watching(*make()) as watch:
        for value in (1.0, 2.0):
            watch.save_checkpoint(state(value), file)
            with watch.checkpoint(folder) as place:
                place.mkdir()
                torch.save(state(value), place / "model.pt")
    assert torch.load(file)["value"] == torch.load(folder / "model.pt")["value"] == 2.0
    assert (verify(file).state, verify(folder).state) == ("unsigned", "good")
    assert left_in(tmp_path) == []
    told = exporter.find_events(names.CHECKPOINT_FAILED.name)
    assert ["too long" in str(each.attributes[names.EXCEPTION_MESSAGE]) for each in told] == [True, True]


KILLED_SAVER = """
import os, sys, torch, gradwatch
kind, folder = sys.argv[1:]
watch = gradwatch.watch()
watch.close()
step = 0
while True:
    step += 1
    state = {"value": step, "weights": torch.full((40_000,), float(step))}
    if kind == "file":
        watch.save_checkpoint(state, f"{folder}/last.pt", step=step)
    else:
        with watch.checkpoint(f"{folder}/last", step=step) as place:
            place.mkdir()
            for part in range(3):
                torch.save(state, place / f"{part}.pt")
    print(step, flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_at_any_moment_leaves_the_checkpoint_before_or_the_one_after(tmp_path: Path, kind: str) -> None:
    """Fifteen kills, each after a different number of saves and at a different moment within one."""
    script = tmp_path / "train.py"
    script.write_text(KILLED_SAVER)
    # One interpreter and one import of torch for all the kills: each saver is a fork of it.
    zygote = tmp_path / "zygote.py"
    zygote.write_text(f"""
import os, random, runpy, signal, sys, time, torch, gradwatch
torch.set_num_threads(1)
sys.argv = [{str(script)!r}, {kind!r}, sys.argv[1]]
random.seed(4)
for kill in range(15):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        runpy.run_path({str(script)!r}, run_name="__main__")
    os.close(writing)
    with os.fdopen(reading) as told:
        for _ in range(1 + kill % 3):
            told.readline()
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rest = [line for line in told.read().splitlines()]
    done = int(rest[-1]) if rest else 1 + kill % 3
    from gradwatch.checkpoints import finding as checkpoints
    found = checkpoints.latest_checkpoint(sys.argv[2])
    verdict = checkpoints.verify(found)
    inner = found if found.is_file() else found / "2.pt"
    print(done, verdict.state, verdict.manifest.step, torch.load(inner)["value"], flush=True)
""")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")},
        "GRADWATCH_DISABLED": "true",
        "GRADWATCH_TESTING": "1",
        "OMP_NUM_THREADS": "1",
    }
    told = subprocess.run(
        [sys.executable, str(zygote), str(folder)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    lines = [line.split() for line in told.stdout.splitlines()]
    assert len(lines) == 15
    for done, verdict, held, value in lines:
        assert verdict == "good"
        assert held == value
        assert int(done) <= int(held) <= int(done) + 1
    with gradwatch.watch(exporter=InMemoryExporter()) as watch:
        watch.save_checkpoint(state(0.0), folder / "next.pt")
    assert left_in(folder) == []  # what the killed ones left behind is gone


def _save_and_crash(folder: Path, kind: str, moment: int) -> bool:
    """Save in a child that dies at its n-th operation on files; whether it got that far."""
    child = os.fork()
    if not child:
        operations = itertools.count()

        def die_at_the_moment(event: str, _: object) -> None:
            files = event.startswith(("os.", "shutil.", "ctypes.dlsym")) or event == "open"
            if files and next(operations) == moment:
                os._exit(9)

        sys.addaudithook(die_at_the_moment)
        _write_second(folder, kind)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _write_first(folder: Path, kind: str) -> None:
    _write(folder, kind, b"first", 1)


def _write_second(folder: Path, kind: str) -> None:
    _write(folder, kind, b"the second one", 2)


def _write(folder: Path, kind: str, content: bytes, step: int) -> None:
    about = manifest.Manifest(files=(), saved_at=datetime.now(UTC), step=step)
    staging = checkpoint_writing.stage(folder / "last")
    assert staging is not None
    if kind == "file":
        staging.path.write_bytes(content)
    else:
        staging.path.mkdir()
        for name in ("a", "b"):
            (staging.path / name).write_bytes(content)
    staging.publish(about)
    staging.discard()


@pytest.mark.parametrize("kind", ["file", "folder", "folder without exchange"])
def test_a_crash_at_every_single_operation_leaves_a_checkpoint_that_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "folder without exchange":
        monkeypatch.setattr(checkpoint_writing, "_rename_exchange", lambda *_: False)
    held = []
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        _write_first(folder, kind)
        crashed = _save_and_crash(folder, kind, moment)
        found = gradwatch.latest_checkpoint(folder)
        assert found is not None, moment
        verdict = verify(found)
        assert verdict.state == "good", moment
        content = (found / "b" if found.is_dir() else found).read_bytes()
        assert verdict.manifest is not None
        assert content == {1: b"first", 2: b"the second one"}[verdict.manifest.step or 0]
        held.append(verdict.manifest.step)
        if not crashed:
            break
        _write(folder, kind, b"third", 3)  # and the next save is not disturbed
        assert (verify(folder / "last").state, left_in(folder)) == ("good", [])
    assert len(held) > 15
    assert held == sorted(held)
    assert (held[0], held[-1]) == (1, 2)


def test_a_crash_at_every_single_operation_keeps_what_else_is_in_the_folder_and_calls_no_mixture_good(
    tmp_path: Path,
) -> None:
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        (folder / "last").mkdir(parents=True)
        (folder / "last" / "train.py").write_text("code")
        _write_first(folder, "folder")
        crashed = _save_and_crash(folder, "folder", moment)
        assert (folder / "last" / "train.py").read_text() == "code"
        verdict = verify(folder / "last")
        if verdict.state == "good":
            assert verdict.manifest is not None
            content = {1: b"first", 2: b"the second one"}[verdict.manifest.step or 0]
            assert [(folder / "last" / name).read_bytes() for name in ("a", "b")] == [content] * 2, moment
        if not crashed:
            break
    assert verdict.state == "good"
    assert moment > 15


def test_what_a_living_process_is_writing_is_not_swept_away(tmp_path: Path) -> None:
    with gradwatch.watch(exporter=InMemoryExporter()) as watch, watch.checkpoint(tmp_path / "slow.pt") as slow:
        watch.save_checkpoint(state(1.0), tmp_path / "fast.pt")
        torch.save(state(2.0), slow)
    assert torch.load(tmp_path / "slow.pt")["value"] == 2.0
    assert torch.load(tmp_path / "fast.pt")["value"] == 1.0


def test_a_resumed_run_goes_on_with_the_step_of_the_checkpoint(
    watching: Watching, exporter: InMemoryExporter, tmp_path: Path
) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:
        for _ in range(3):
            step(model, optimizer)
        watch.save_checkpoint(model.state_dict(), tmp_path / "last.pt")
    found = gradwatch.latest_checkpoint(tmp_path)
    assert found == tmp_path / "last.pt"
    with watching(model, optimizer, resume=found) as watch:
        assert watch.step == 3
        step(model, optimizer)
    assert exporter.values(names.STEP_INDEX) == [0, 1, 2, 3]


def test_resuming_from_nothing_begins_at_zero_and_a_start_step_wins(watching: Watching, tmp_path: Path) -> None:
    assert gradwatch.latest_checkpoint(tmp_path) is None
    assert gradwatch.latest_checkpoint(tmp_path / "absent") is None
    with watching(*make(), resume=None) as watch:
        assert watch.step == 0
        watch.save_checkpoint(state(1.0), tmp_path / "last.pt", step=9)
    with watching(*make(), resume=tmp_path / "last.pt", start_step=5) as watch:
        assert watch.step == 5


def test_resuming_from_what_has_no_manifest_is_refused_in_one_line(watching: Watching, tmp_path: Path) -> None:
    torch.save(state(1.0), tmp_path / "bare.pt")
    with pytest.raises(SettingsError, match=r"resume=.*a checkpoint that gradwatch saved: there is no"):
        watching(*make(), resume=tmp_path / "bare.pt")


def _save_on_rank(rank: int, folder: str) -> None:
    os.environ["GRADWATCH_TESTING"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    exporter = InMemoryExporter()
    with gradwatch.watch(exporter=exporter, run_id="r") as watch:
        for value in (1.0, 2.0):
            with watch.checkpoint(f"{folder}/whole", shared=True) as place:
                # Large enough that each rank writes a part of its own.
                dcp.save({f"weights{rank}": torch.full((BIG,), value + rank)}, checkpoint_id=place)
            dist.barrier()
        with watch.checkpoint(f"{folder}/parts") as place:
            dcp.save({f"weights{rank}": torch.full((BIG,), 5.0 + rank)}, checkpoint_id=place)
        watch.save_checkpoint(state(rank), f"{folder}/own{rank}.pt")
        with watch.checkpoint(f"{folder}/first.pt") as file:
            if rank == 0:
                torch.save(state(7.0), file)
    told = [(event.name, dict(event.attributes)) for event in exporter.events]
    Path(folder, f"told{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_save_on_rank, (str(folder),), nprocs=2)
    return folder, [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(2)]


def outcomes(told: list[Any], name: str) -> list[str]:
    return [
        event
        for event, attributes in told
        if str(attributes.get(names.CHECKPOINT_NAME, "")).endswith(f"/{name}")
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ranks_save_one_distributed_checkpoint_that_the_first_puts_in_place(ranks: Any) -> None:
    folder, told = ranks
    whole = folder / "whole"
    assert described(whole) == facts(whole)
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= set(described(whole))
    loaded = {f"weights{rank}": torch.zeros(BIG) for rank in range(2)}
    dcp.load(loaded, checkpoint_id=whole, no_dist=True)
    assert [float(loaded[f"weights{rank}"].mean()) for rank in range(2)] == [2.0, 3.0]
    assert outcomes(told[0], "whole") == [names.CHECKPOINT_SAVED.name] * 2
    assert outcomes(told[1], "whole") == []


def test_each_rank_saves_what_is_its_own(ranks: Any) -> None:
    folder, told = ranks
    for rank in range(2):
        assert torch.load(folder / f"own{rank}.pt")["value"] == rank
        assert manifest.read(folder / f"own{rank}.pt").rank == rank
        assert outcomes(told[rank], f"own{rank}.pt") == [names.CHECKPOINT_SAVED.name]


def test_a_rank_that_leaves_saving_to_the_first_fails_at_nothing(ranks: Any) -> None:
    folder, told = ranks
    assert torch.load(folder / "first.pt")["value"] == 7.0
    assert outcomes(told[0], "first.pt") == [names.CHECKPOINT_SAVED.name]
    assert outcomes(told[1], "first.pt") == []


def test_parts_that_nobody_said_belong_together_are_all_kept_and_told(ranks: Any) -> None:
    folder, told = ranks
    assert not (folder / "parts").exists()
    assert (folder / "parts.rank0" / "__0_0.distcp").exists()
    assert (folder / "parts.rank1" / "__1_0.distcp").exists()
    for rank in range(2):
        assert outcomes(told[rank], "parts") == [names.CHECKPOINT_FAILED.name]


def test_nothing_is_left_behind_by_ranks(ranks: Any) -> None:
    folder, _ = ranks
    assert left_in(folder) == []
