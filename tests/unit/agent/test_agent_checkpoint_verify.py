"""Verifying: every kind of damage is found and named, and nothing that a file holds is executed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import gradwatch
from gradwatch import conventions as c
from gradwatch.checkpoints import manifest
from gradwatch.checkpoints.finding import find_all, latest_checkpoint, verify
from gradwatch.checkpoints.formats import problem_of_file
from gradwatch.checkpoints.manifest import FileRecord, Manifest, ManifestError
from gradwatch.cli import main
from gradwatch.testing import InMemoryExporter

Damage = Callable[[Path], None]


@pytest.fixture
def watch() -> Any:
    with gradwatch.watch(exporter=InMemoryExporter(), run_id="r") as opened:
        yield opened


def tensors() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.randn(300)
    return {
        "float": shared, "view": shared[10:20], "half": torch.ones(5, dtype=torch.bfloat16),
        "long": torch.arange(7), "text": "x", "nested": [1, {"y": torch.zeros(2, 3)}],
    }  # fmt: skip


def safetensors(path: Path, **changes: Any) -> None:
    """One file by the format's own description: 8 bytes of length, a JSON header, the tensors."""
    header = {
        "__metadata__": {"made": "here"},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]},
        "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    } | changes
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(range(28)))


def truncate(path: Path, share: float = 0.7) -> None:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 0x40
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [(truncate, "truncated"), (flip, "altered"), (append, "altered"), (Path.unlink, "missing")],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_every_damage_to_what_was_saved_is_found_and_named(
    watch: Any, tmp_path: Path, kind: str, damage: Damage, fault: str
) -> None:
    path = tmp_path / "last.pt"
    with watch.checkpoint(path) as place:
        inner = place
        if kind == "folder":
            place.mkdir()
            (place / "other").write_bytes(b"whole")
            inner = place / "model.pt"
        torch.save(tensors(), inner)
    assert verify(path).state == "good"
    damage(path if kind == "file" else path / "model.pt")
    (found,) = find_all([tmp_path])
    verdict = verify(found)
    assert (verdict.state, verdict.problem and verdict.problem.fault) == ("bad", fault)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "pickle"])
def test_a_file_without_a_manifest_that_was_cut_off_is_found_by_its_format(
    tmp_path: Path, kind: str, share: float
) -> None:
    path = tmp_path / "bare.pt"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        safetensors(path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"weights": list(range(1000))}))
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=kind == "zip")
    assert verify(path).problem is None
    assert verify(path).state == "unsigned"
    truncate(path, share)
    problem = verify(path).problem
    assert problem is not None
    assert problem.fault in {"truncated", "unloadable"}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.6])
def test_a_flipped_bit_in_an_archive_is_found_by_its_checksums(tmp_path: Path, share: float) -> None:
    path = tmp_path / "bare.pt"
    torch.save({"weights": torch.randn(5000)}, path)
    flip(path, share)
    problem = problem_of_file(path)
    assert problem is not None
    assert problem.fault in {"altered", "unloadable"}


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The same archive with records changed, or left out, and the right checksums."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in records.items():
            changed = change(name, content)
            if changed is not None:
                new.writestr(name, changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, content: None if name.endswith("data/1") else content,
        lambda name, content: content[:-1] if name.endswith("data/0") else content,
        lambda name, content: content[:-1] if name.endswith("data.pkl") else content,
        lambda name, content: b"\xff" * 20 if name.endswith("data.pkl") else content,
    ],
    ids=["record missing", "record short", "pickle cut off", "no pickle"],
)
def test_an_archive_with_right_checksums_that_torch_cannot_load_is_found(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "bare.pt"
    torch.save(tensors(), path)
    rewrite(path, lambda _, content: content)
    assert problem_of_file(path) is None
    rewrite(path, change)
    with pytest.raises(Exception):  # noqa: B017 - torch has many
        torch.load(path, weights_only=True)
    assert problem_of_file(path) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"b": {"dtype": "F32", "shape": [2, 4], "data_offsets": [4, 28]}},
        {"b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}},
        {"b": {"dtype": "F32", "shape": [2, 3]}},
        {"c": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}},
    ],
    ids=["shape", "hole", "no place", "too much"],
)
def test_safetensors_whose_header_does_not_fit_are_found(tmp_path: Path, changes: Any) -> None:
    path = tmp_path / "bare.safetensors"
    safetensors(path)
    assert problem_of_file(path) is None
    safetensors(path, **changes)
    assert problem_of_file(path) is not None


def test_a_file_that_is_something_else_is_unloadable(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("<html>404 Not Found</html>")
    verdict = verify(path)
    assert verdict.problem is not None
    assert verdict.problem.fault == "unloadable"


@given(
    content=st.binary(max_size=200), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
)
def test_no_content_whatever_raises(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    for name in ("x.pt", "x.safetensors"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(start + content)
        problem_of_file(path)


def test_what_is_whole_but_holds_nothing_to_load_is_unloadable(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    (tmp_path / "number.pt").write_bytes(pickle.dumps(1, protocol=2))
    for path in tmp_path.iterdir():
        with pytest.raises(Exception):  # noqa: B017 - torch has many
            torch.load(path, weights_only=False)
        problem = problem_of_file(path)
        assert problem is not None, path.name
        assert problem.fault == "unloadable"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_weights_that_were_cut_off_are_found_in_the_older_format_too(tmp_path: Path) -> None:
    path = tmp_path / "bare.pt"
    quantized = torch.quantize_per_tensor(torch.randn(5000), 0.1, 0, torch.qint8)
    torch.save({"weights": quantized}, path, _use_new_zipfile_serialization=False)
    assert problem_of_file(path) is None
    path.write_bytes(path.read_bytes()[:-2000])
    problem = problem_of_file(path)
    assert problem is not None
    assert problem.fault == "truncated"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_bad_where_a_file_that_it_lists_is_short_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "distributed"
    dcp.save({"first": torch.randn(1000), "length": torch.randn(10)}, checkpoint_id=path, no_dist=True)
    assert verify(path).state == "unsigned"
    (part,) = path.glob("*.distcp")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    problem = verify(path).problem
    assert problem is not None
    assert (problem.fault, problem.evidence) == (
        "truncated",
        f"{part.name} has {len(whole) - 1} of {len(whole)} bytes",
    )
    part.unlink()
    problem = verify(path).problem
    assert problem is not None
    assert problem.fault == "missing"


def test_a_sharded_model_is_bad_where_a_shard_is_missing(tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    for shard in shards:
        safetensors(tmp_path / shard)
    assert {verify(path).state for path in find_all([tmp_path])} == {"unsigned"}
    (tmp_path / shards[1]).unlink()
    problems = {path: problem for path in find_all([tmp_path]) if (problem := verify(path).problem) is not None}
    assert [(path, problem.fault) for path, problem in problems.items()] == [(index, "missing")]


def test_one_hostile_file_does_not_keep_the_others_from_being_verified(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "good.pt")
    (tmp_path / "list.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    (tmp_path / "null.safetensors.index.json").write_text("null")
    os.mkfifo(tmp_path / "pipe.pt")
    folder(watch, tmp_path / "named", 1)
    inner = tmp_path / "named" / manifest.NAME
    inner.write_text(inner.read_text().replace('"name": "model.pt"', '"name": "\\ud800"'))
    folder(watch, tmp_path / "signed", 1)
    (tmp_path / "signed" / manifest.NAME).unlink()
    os.mkfifo(tmp_path / "signed" / manifest.NAME)
    result = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path), "--format", "json"])
    assert result.exit_code == 1
    states = {Path(each["path"]).name: each["state"] for each in json.loads(result.stdout)["checkpoints"]}
    assert states.pop("good.pt") == "good"
    assert states == dict.fromkeys(
        ["list.safetensors", "null.safetensors.index.json", "pipe.pt", "named", "signed"], "bad"
    )
    assert latest_checkpoint(tmp_path) == tmp_path / "good.pt"


def folder(watch: Any, path: Path, step: int) -> None:
    with watch.checkpoint(path, step=step) as place:
        place.mkdir()
        torch.save(tensors(), place / "model.pt")
        (place / "empty").touch()


def test_an_empty_file_that_became_a_pipe_is_not_waited_for(watch: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        folder(watch, tmp_path / f"step{step}", step)
    (tmp_path / "step2" / "empty").unlink()
    os.mkfifo(tmp_path / "step2" / "empty")
    assert latest_checkpoint(tmp_path) == tmp_path / "step1"


def test_a_folder_that_may_not_be_entered_is_passed_over(watch: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        watch.save_checkpoint(tensors(), top / "good.pt")
        watch.save_checkpoint(tensors(), top / "private" / "deep" / "model.pt")
        top.chmod(0o755)
        (top / "private").chmod(0o644)
        child = os.fork()
        if not child:
            if not os.geteuid():  # who may do anything
                os.setgid(65534)
                os.setuid(65534)
            os._exit(0 if latest_checkpoint(top) == top / "good.pt" else 1)
        assert os.waitpid(child, 0)[1] == 0
        (top / "private").chmod(0o755)


class Bomb:
    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path(self.witness).touch, ())


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "in a folder"])
def test_what_a_pickle_would_do_when_loaded_is_not_done(watch: Any, tmp_path: Path, kind: str) -> None:
    witness = tmp_path / "executed"
    path = tmp_path / "bomb.pt"
    bomb = {"weights": torch.ones(3), "bomb": Bomb(str(witness))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(str(witness))))
    elif kind == "in a folder":
        with watch.checkpoint(tmp_path / "folder") as place:
            place.mkdir()
            (place / ".metadata").write_bytes(pickle.dumps(Bomb(str(witness))))
            torch.save(bomb, place / "bomb.pt")
        path = tmp_path / "folder" / "bomb.pt"
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=kind == "zip")
    result = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path)])
    assert result.exit_code == 0, result.output
    latest_checkpoint(tmp_path)
    assert not witness.exists()
    loaded = path.read_bytes()
    if kind == "pickle":
        pickle.loads(loaded)
    else:
        torch.load(io.BytesIO(loaded), weights_only=False)
    assert witness.exists()  # it would have


NOTHING = st.none()
TEXTS = st.one_of(st.none(), st.text(max_size=20))
NUMBERS = st.one_of(st.none(), st.integers(0, 2**62))
RECORDS = st.builds(
    FileRecord,
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9).filter(
        lambda part: part not in {".", ".."}), min_size=1, max_size=3).map("/".join),
    st.integers(0, 2**62),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
)  # fmt: skip


def manifests(previous: Any = NOTHING) -> Any:
    return st.builds(
        Manifest,
        files=st.lists(RECORDS, max_size=4).map(tuple),
        saved_at=st.datetimes(timezones=st.just(UTC)),
        step=NUMBERS, run_id=TEXTS, attempt=NUMBERS, rank=NUMBERS, torch=TEXTS, previous=previous,
    )  # fmt: skip


@given(manifests(st.one_of(st.none(), manifests())))
def test_a_manifest_is_read_back_as_it_was_written(written: Manifest) -> None:
    assert Manifest.loads(written.dumps()) == written
    assert json.loads(written.dumps())["format"] == 1


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["format", "files", "saved_at", "previous", "step", "name"]), inner, max_size=5),
))  # fmt: skip
def test_what_is_no_manifest_is_refused_in_one_line(tree: Any) -> None:
    with pytest.raises(ManifestError) as refused:
        Manifest.loads(json.dumps({"format": 1, **tree} if isinstance(tree, dict) else tree))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_cannot_point_out_of_its_checkpoint(name: str) -> None:
    written = Manifest(files=(FileRecord(name, 1, "0" * 64),), saved_at=datetime.now(UTC))
    with pytest.raises(ManifestError, match="outside"):
        Manifest.loads(written.dumps())


def test_a_manifest_of_a_later_version_is_told_as_such(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "last.pt")
    beside = manifest.manifest_path(tmp_path / "last.pt")
    beside.write_text(beside.read_text().replace('"format": 1', '"format": 2'))
    verdict = verify(tmp_path / "last.pt")
    assert verdict.problem is not None
    assert verdict.problem.evidence == "the manifest has format 2, this gradwatch reads 1"


def test_the_newest_that_verifies_is_the_latest(watch: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        watch.save_checkpoint(tensors(), tmp_path / f"step{step}" / "model.pt", step=step)
    torch.save(tensors(), tmp_path / "bare.pt")
    newest = tmp_path / "step3" / "model.pt"
    assert latest_checkpoint(tmp_path) == newest
    flip(newest)
    assert latest_checkpoint(tmp_path) == tmp_path / "step2" / "model.pt"
    truncate(tmp_path / "step2" / "model.pt")
    assert latest_checkpoint(str(tmp_path)) == tmp_path / "step1" / "model.pt"


def signed(path: Path, **changes: Any) -> Path:
    """The same checkpoint with a manifest that says otherwise, and of whatever is there now."""
    held = dataclasses.replace(manifest.read(path), files=manifest.describe(path), **changes)
    manifest.manifest_path(path).write_text(held.dumps())
    return path


def test_a_clock_that_was_ahead_once_does_not_hide_what_the_run_saved_later(watch: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        watch.save_checkpoint(tensors(), tmp_path / f"{step}.pt", step=step)
    signed(tmp_path / "2.pt", saved_at=datetime.now(UTC) + timedelta(days=400))
    assert latest_checkpoint(tmp_path) == tmp_path / "3.pt"


@pytest.mark.parametrize("who", [{"run_id": "before"}, {"attempt": 1}], ids=["another run", "attempt before"])
def test_more_steps_of_what_came_before_are_not_newer(watch: Any, tmp_path: Path, who: dict[str, Any]) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "long.pt", step=1000)
    watch.save_checkpoint(tensors(), tmp_path / "short.pt", step=10)
    signed(tmp_path / "short.pt", attempt=2)
    signed(tmp_path / "long.pt", **who)
    assert latest_checkpoint(tmp_path) == tmp_path / "short.pt"


def test_the_latest_is_never_one_that_verify_calls_bad(watch: Any, tmp_path: Path) -> None:
    for step in (1, 2):
        watch.save_checkpoint(tensors(), tmp_path / f"{step}.pt", step=step)
    truncate(tmp_path / "2.pt")
    signed(tmp_path / "2.pt")  # cut off before it was signed: its checksum is right
    assert verify(tmp_path / "2.pt").state == "bad"
    assert latest_checkpoint(tmp_path) == tmp_path / "1.pt"


def told(exporter: InMemoryExporter) -> list[tuple[str, Any, str]]:
    """What was told of checkpoints that were read again: the event, the step, the kind of the fault."""
    return [
        (
            event.name,
            event.attributes[c.STEP],
            str(event.attributes.get(c.CHECKPOINT_FAULT, "")).partition(":")[0],
        )
        for event in exporter.events
        if event.name in (c.CHECKPOINT_VERIFIED.name, c.CHECKPOINT_CORRUPT.name)
    ]


def test_what_the_latest_was_looked_for_among_is_told_by_the_run_that_is_open(tmp_path: Path) -> None:
    exporter = InMemoryExporter()
    with gradwatch.watch(exporter=exporter) as watch:
        for step in (1, 2, 3):
            watch.save_checkpoint(tensors(), tmp_path / f"{step}.pt", step=step)
        truncate(tmp_path / "2.pt")
        flip(tmp_path / "3.pt")
        assert latest_checkpoint(tmp_path) == tmp_path / "1.pt"
    corrupt, good = c.CHECKPOINT_CORRUPT.name, c.CHECKPOINT_VERIFIED.name
    assert told(exporter) == [(corrupt, 2, "truncated"), (corrupt, 3, "altered"), (good, 1, "")]
    first = next(event for event in exporter.events if event.name == corrupt)
    assert first.attributes[c.CHECKPOINT_NAME] == f"{tmp_path.name}/2.pt"
    assert "2.pt" in str(first.attributes[c.CHECKPOINT_FAULT])


def test_what_is_found_before_a_run_begins_is_told_once_by_the_first_one(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "1.pt", step=1)
    watch.close()
    flip(tmp_path / "1.pt")
    assert latest_checkpoint(tmp_path) is None
    first, second = InMemoryExporter(), InMemoryExporter()
    for exporter in (first, second):
        gradwatch.watch(exporter=exporter).close()
    assert told(first) == [(c.CHECKPOINT_CORRUPT.name, 1, "altered")]
    assert told(second) == []


def test_a_checkpoint_that_was_removed_but_for_its_manifest_is_not_corrupt(tmp_path: Path) -> None:
    exporter = InMemoryExporter()
    with gradwatch.watch(exporter=exporter) as watch:
        watch.save_checkpoint(tensors(), tmp_path / "1.pt", step=1)
        (tmp_path / "1.pt").unlink()
        assert latest_checkpoint(tmp_path) is None
    assert told(exporter) == []


def test_weights_that_were_added_to_a_checkpoint_make_it_bad_and_notes_do_not(
    watch: Any, tmp_path: Path
) -> None:
    folder(watch, tmp_path / "model", 1)
    (tmp_path / "model" / "notes.txt").write_text("the best so far")
    assert verify(tmp_path / "model").state == "good"
    safetensors(tmp_path / "model" / "model.safetensors")
    problem = verify(tmp_path / "model").problem
    assert problem is not None
    assert (problem.fault, problem.evidence) == (
        "altered",
        "model.safetensors was not there when it was written",
    )


def test_a_file_of_a_format_of_its_own_is_good_whatever_its_bytes(watch: Any, tmp_path: Path) -> None:
    with watch.checkpoint(tmp_path / "own.bin") as file:
        file.write_bytes(b"8 bytes:{and so on")
    assert verify(tmp_path / "own.bin").state == "good"


def test_a_checkpoint_can_be_moved_with_its_manifest(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "last.pt", step=4)
    (tmp_path / "last.pt").rename(tmp_path / "best.pt")
    (tmp_path / "last.pt.manifest.json").rename(tmp_path / "best.pt.manifest.json")
    assert verify(tmp_path / "best.pt").state == "good"
    assert latest_checkpoint(tmp_path) == tmp_path / "best.pt"


def test_a_folder_is_searched_and_each_checkpoint_found_once(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "a.pt")
    watch.save_checkpoint(tensors(), tmp_path / "odd name")
    torch.save(tensors(), tmp_path / "bare.ckpt")
    with watch.checkpoint(tmp_path / "deep" / "model") as place:
        place.mkdir()
        torch.save(tensors(), place / "part.pt")
    (tmp_path / "notes.txt").write_text("nothing to see")
    found = [tmp_path / "a.pt", tmp_path / "bare.ckpt", tmp_path / "deep" / "model", tmp_path / "odd name"]
    assert find_all([tmp_path]) == found
    assert find_all([tmp_path / "a.pt", tmp_path / "a.pt.manifest.json", tmp_path / "a.pt"]) == found[:1]


def test_links_that_go_round_in_circles_are_not_followed(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "inner" / "last.pt")
    (tmp_path / "inner" / "again").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    assert find_all([tmp_path]) == [tmp_path / "inner" / "last.pt"]


def test_the_command_prints_what_it_found_and_fails_where_anything_is_bad(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "good.pt", step=12)
    watch.save_checkpoint(tensors(), tmp_path / "worse.pt")
    torch.save(tensors(), tmp_path / "bare.pt")
    whole = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path)])
    assert whole.exit_code == 0, whole.output
    truncate(tmp_path / "worse.pt")
    result = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path), "--format", "json"])
    assert result.exit_code == 1
    bare, good, worse = json.loads(result.stdout)["checkpoints"]
    assert (good["state"], good["step"], good["run_id"], good["fault"]) == ("good", 12, "r", None)
    assert good["bytes"] == (tmp_path / "good.pt").stat().st_size
    assert datetime.fromisoformat(good["saved_at"]).tzinfo is not None
    assert (bare["state"], bare["step"], bare["fault"]) == ("unsigned", None, None)
    assert (worse["state"], worse["fault"], worse["path"]) == ("bad", "truncated", str(tmp_path / "worse.pt"))
    table = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path)])
    assert table.exit_code == 1
    assert any(
        "bad" in line and "worse.pt" in line and "truncated" in line for line in table.stdout.splitlines()
    )


def test_the_command_fails_where_there_is_nothing_to_verify(tmp_path: Path) -> None:
    empty = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path)])
    assert (empty.exit_code, empty.stderr) == (1, f"Error: no checkpoints in {tmp_path}\n")
    absent = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path / "absent")])
    assert absent.exit_code == 2


def test_verifying_imports_neither_torch_nor_sql(watch: Any, tmp_path: Path) -> None:
    watch.save_checkpoint(tensors(), tmp_path / "last.pt")
    code = f"""
import sys
from gradwatch.cli import main
try:
    main(["checkpoint", "verify", {str(tmp_path)!r}])
except SystemExit as ended:
    assert ended.code in (None, 0), ended.code
assert not {{"torch", "numpy", "sqlalchemy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "good" in done.stdout
