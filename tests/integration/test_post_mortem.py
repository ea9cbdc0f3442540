"""After a run went bad: its black box is in the collector, and its bundle replays in another process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradwatch import conventions as names
from gradwatch.life.flight_recorder import decode
from tests.collector_process import GRADWATCH, collector, environment, eventually, gradwatch, train
from tests.otlp_sink import ReceivedEvent, otlp_sink

# A model that people write: a custom module in the middle, whose input drifts out of its domain at step 7.
MODEL = """
import torch
from torch import nn

class Compress(nn.Module):
    def forward(self, x, shift):
        return torch.sqrt(x.abs() - shift)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.compress = Compress()
        self.head = nn.Linear(16, 2)

    def forward(self, x, *, shift):
        return {"logits": self.head(self.compress(self.encoder(x), shift))}
"""

SCRIPT = """
import torch
import gradwatch
from planted import Net

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.AdamW(model.parameters())
gradwatch.watch(model, optimizer, run_id="planted", capture="on_nonfinite")
for step in range(10):
    optimizer.zero_grad()
    logits = model(torch.randn(16, 8), shift=0.1 if step == 7 else -0.1)["logits"]
    torch.nn.functional.cross_entropy(logits, torch.randint(2, (16,))).backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(MODEL)
    (folder / "train.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def bundle_saved(place: Path) -> ReceivedEvent:
    """What a training process said before it went on."""
    with otlp_sink() as sink:
        settings = {
            **environment(None),
            "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint,
            "GRADWATCH_DIR": str(place),
        }
        subprocess.run([sys.executable, "train.py"], cwd=place, env=settings, check=True, timeout=120)
        (event,) = sink.find(names.BUNDLE_SAVED.name)
        return event


def replay(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GRADWATCH, "replay", *arguments],
        cwd=place, env=environment(None), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_planted_nan_is_replayed_in_another_process_and_blamed_on_the_same_module(
    place: Path, bundle_saved: ReceivedEvent
) -> None:
    assert bundle_saved.attributes[names.STEP] == 7
    bundle = bundle_saved.attributes[names.BUNDLE_PATH]
    assert bundle == str(place / "bundle-planted-r0-step7.pt")

    told = replay(place, bundle, "--format", "json")
    assert (told.returncode, told.stderr) == (0, "")
    found: dict[str, Any] = json.loads(told.stdout)
    assert (found["born_in"], found["layer"], found["step"]) == ("forward", "compress", 7)
    assert (found["exact"], found["loss"], found["loss_nonfinite"], found["notes"]) == (True, None, True, [])
    differences = found["finite_differences"]
    assert differences["module"] == "compress"
    assert {element["outcome"] for element in differences["elements"]} == {"non-finite", "ok"}

    table = replay(place, bundle, "--model", "planted:Net", "--check", "encoder.0")
    assert (table.returncode, table.stderr) == (0, "")
    assert "born in  forward\nlayer    compress\n" in table.stdout
    assert "finite differences of encoder.0" in table.stdout
    assert "\x1b" not in table.stdout


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"nonsense", (), "bundle"),
        (b"", (), "bundle"),
        (None, ("--model", "planted:Nothing"), "Nothing"),
        (None, ("--check", "nowhere"), "the step calls no module 'nowhere'"),
        (None, ("--device", "cuda:77"), "CUDA"),
        (None, ("--device", "toaster"), "toaster"),
        (None, ("--loss", "planted:nothing"), "nothing"),
    ],
)
def test_what_cannot_be_replayed_is_one_clear_line(
    place: Path, bundle_saved: ReceivedEvent, content: bytes | None, arguments: tuple[str, ...], message: str
) -> None:
    bundle = str(bundle_saved.attributes[names.BUNDLE_PATH])
    if content is not None:
        (place / "nonsense.pt").write_bytes(content)
        bundle = str(place / "nonsense.pt")
    done = replay(place, bundle, *arguments)
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_the_collector_keeps_the_black_box_and_tells_what_is_in_it(place: Path) -> None:
    with collector(f"sqlite:///{place}/runs.db") as serving:
        process = train(place / "train.py", serving)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        serving.await_status("planted", "succeeded")

        def black_box() -> Any:
            events = serving.show("planted")["events"]
            return next((event for event in events if event["name"] == names.FLIGHT_RECORD.name), None)

        event = eventually(black_box, "the black box")
        shown = gradwatch("runs", "show", "planted", "--db", serving.database, "--format", "json")
        listed = [e for e in json.loads(shown.stdout)["events"] if e["name"] == names.FLIGHT_RECORD.name]
        assert listed == [event]
        text = gradwatch("runs", "show", "planted", "--db", serving.database).stdout
    held = decode(base64.b64decode(event["attributes"][names.FLIGHT_DATA]))
    (ring,) = held["optimizers"].values()
    steps = event["attributes"][names.FLIGHT_STEPS]
    assert ring["step"] == list(range(steps))
    assert f"nonfinite: flight record of {steps} steps, 0 to {steps - 1}, {len(ring['layers'])} layers" in text
    assert event["attributes"][names.FLIGHT_DATA] not in text
    assert names.BUNDLE_SAVED.name in text
