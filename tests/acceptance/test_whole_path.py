"""From an ordinary loop with one line in it to an SLO report, with real processes."""

from __future__ import annotations

import json
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.collector_process import Collector, collector, eventually, gradwatch, train
from tests.schemas import valid

TEN_LINES = """
import torch, gradwatch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
watch = gradwatch.watch(model, optimizer, job="ten-lines", target="val_loss<=1.0", deadline=60)
for step in range(STEPS):
    x = torch.randn(32, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    AFTER_STEP
watch.log(val_loss=loss)
print("weights", sum(p.double().sum().item() for p in model.parameters()))
"""


def script(folder: Path, steps: int = 100, after_step: str = "pass", without: bool = False) -> Path:
    text = TEN_LINES.replace("STEPS", str(steps)).replace("AFTER_STEP", after_step)
    if without:
        text = "\n".join(line for line in text.splitlines() if "watch" not in line).replace(
            "import torch, gradwatch", ""
        )
        text = "import torch\n" + text
    path = folder / f"train{abs(hash(text))}.py"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def serving(database: Engine) -> Iterator[Collector]:
    url = database.url.render_as_string(hide_password=False)
    with collector(url, "--lost-after", "3") as running:
        yield running


def test_ten_lines_and_the_one_line_become_a_run_with_layers_and_a_verdict(
    serving: Collector, tmp_path: Path
) -> None:
    process = train(script(tmp_path), serving, GRADWATCH_RUN_ID="ten")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    run = serving.await_status("ten", "succeeded")
    assert (run["job"], run["model"], run["last_step"]) == ("ten-lines", "Sequential", 99)
    assert run["target_reached_at"] is not None
    eventually(lambda: serving.show("ten")["layers"], "layers")

    def command(*arguments: str) -> Any:
        return json.loads(gradwatch(*arguments, "--format", "json", "--db", serving.database).stdout)

    shown = valid(command("runs", "show", "ten"), "run-detail")
    assert [layer["layer"] for layer in shown["layers"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(layer["steps_observed"] > 0 and layer["mean"] > 0 for layer in shown["layers"])
    assert {"training.run.started", "training.run.ended"} <= {event["name"] for event in shown["events"]}

    listed = valid(command("runs", "list"), "run-list")
    assert [row["run_id"] for row in listed["runs"]] == ["ten"]
    assert valid(serving.get("/api/v1/runs").json(), "run-list") == listed
    assert valid(serving.show("ten"), "run-detail") == shown

    report = valid(command("slo", "report"), "slo-report")
    by_name = {(o["name"], o["group"]["tier"]): o for o in report["objectives"]}
    assert by_name["training-success-rate", "experiment"]["good"] == 1
    assert by_name["time-to-convergence", "experiment"]["good"] == 1
    assert by_name["training-success-rate", "production"]["total"] == 0


def test_every_ending_is_reported_with_its_reason(serving: Collector, tmp_path: Path) -> None:
    endings = {
        "returns": ("pass", "succeeded", None),
        "raises": ("if step == 20: raise KeyError('missing')", "failed", "KeyError"),
        "exits-3": ("if step == 20: import sys; sys.exit(3)", "failed", "exit 3"),
        "exits-0": ("if step == 20: import sys; sys.exit(0)", "succeeded", None),
    }
    processes = [
        train(script(tmp_path, after_step=after_step), serving, GRADWATCH_RUN_ID=name)
        for name, (after_step, _, _) in endings.items()
    ]
    for process in processes:
        process.communicate(timeout=120)
    for name, (_, status, reason) in endings.items():
        run = serving.await_status(name, status)
        assert run["reason"] == reason, name


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (signal.SIGKILL, "lost", "heartbeat_timeout"),
        (signal.SIGTERM, "cancelled", "SIGTERM"),
        (signal.SIGINT, "cancelled", "interrupted"),
    ],
)
def test_a_signal_is_told_from_every_other(
    serving: Collector, tmp_path: Path, sent: signal.Signals, status: str, reason: str
) -> None:
    path = script(tmp_path, steps=1_000_000, after_step="import time; time.sleep(0.005)")
    process = train(path, serving, GRADWATCH_RUN_ID="signalled")
    eventually(lambda: (serving.runs().get("signalled") or {}).get("last_step"), "steps")
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == -sent
    run = serving.await_status("signalled", status)
    assert (run["reason"], run["last_step"] > 0) == (reason, True)


def test_a_nan_is_found_at_its_step_and_layer(serving: Collector, tmp_path: Path) -> None:
    plant = "if step == 30: model[0].weight.register_hook(lambda g: g * float('nan'))"
    process = train(script(tmp_path, after_step=plant), serving, GRADWATCH_RUN_ID="nan", GRADWATCH_EVERY="1")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    serving.await_status("nan", "succeeded")
    found = eventually(lambda: serving.show("nan")["findings"], "the finding")
    assert [(f["rule"], f["step"], f["layer"], f["rank"]) for f in found] == [("nonfinite", 31, "0.weight", 0)]
    assert found[0]["severity"] == "ticket"


def test_without_a_collector_training_gives_the_same_weights_and_exits_as_quickly(tmp_path: Path) -> None:
    bare = train(script(tmp_path, without=True), None)
    expected, _ = bare.communicate(timeout=60)
    watched = train(script(tmp_path), None, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    line = ""
    assert watched.stdout is not None
    for line in watched.stdout:
        if line.startswith("weights"):
            break
    trained_at = time.monotonic()
    watched.communicate(timeout=60)
    assert watched.returncode == 0
    assert line == expected.splitlines()[-1] + "\n"
    # The bound on the flush at exit is two seconds; the interpreter itself needs some time to end.
    assert time.monotonic() - trained_at < 2 + 3


def test_a_collector_that_starts_again_goes_on_where_it_was(database: Engine, tmp_path: Path) -> None:
    url = database.url.render_as_string(hide_password=False)
    path = script(tmp_path, steps=1_000_000, after_step="import time; time.sleep(0.005)")
    with collector(url, "--lost-after", "3") as first:
        process = train(path, first, GRADWATCH_RUN_ID="steady")
        eventually(lambda: (first.runs().get("steady") or {}).get("last_step"), "steps")
        address = first.url.removeprefix("http://")
    try:
        with collector(url, "--lost-after", "3", "--listen", address) as second:
            before = second.runs()["steady"]["last_step"]
            eventually(lambda: second.runs()["steady"]["last_step"] > before, "more steps")
            # What waited for the collector is no sign of life; what comes next is.
            second.await_status("steady", "running")
            process.terminate()
            process.communicate(timeout=30)
            second.await_status("steady", "cancelled")
    finally:
        process.kill()
        process.communicate()
