"""The first thing a newcomer does."""

from __future__ import annotations

import json
from pathlib import Path

from tests.collector_process import gradwatch


def test_the_demo_gives_every_run_its_right_verdict_and_says_where_to_look_next(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = gradwatch("demo", "--directory", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NaN in demo-nan: first at step 40, layer 2.weight" in done.stdout
    assert "training-success-rate" in done.stdout
    assert "2 of 9 runs failed; the budget allows 0" in done.stdout
    database = f"sqlite:///{folder / 'gradwatch.db'}"
    assert f"gradwatch runs show demo-nan --db {database}" in done.stdout
    listed = json.loads(gradwatch("runs", "list", "--db", database, "--format", "json").stdout)
    standing = {run["run_id"]: (run["status"], run["reason"]) for run in listed["runs"]}
    assert standing == {
        "demo-killed": ("lost", "heartbeat_timeout"),
        "demo-crash": ("failed", "IndexError"),
        **{
            f"demo-{name}": ("succeeded", None)
            for name in ("nan", "plateau", "mlp-1", "mlp-2", "mlp-3", "cnn-1", "cnn-2")
        },
    }
    reached = {run["run_id"] for run in listed["runs"] if run["target_reached_at"]}
    assert {f"demo-{name}" for name in ("mlp-1", "mlp-2", "mlp-3", "cnn-1", "cnn-2")} <= reached
    assert "demo-plateau" not in reached
    report = gradwatch("slo", "report", "--db", database, "--format", "json")
    assert "not summarised" not in report.stderr
    counted = {each["name"]: each["total"] for each in json.loads(report.stdout)["objectives"] if each["total"]}
    assert counted["finite-training"] == counted["memory-headroom"] == 9


def test_the_demo_does_not_touch_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "gradwatch.db").write_text("precious")
    done = gradwatch("demo", "--directory", str(tmp_path))
    assert done.returncode == 1
    assert (tmp_path / "gradwatch.db").read_text() == "precious"
