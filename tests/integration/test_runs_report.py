"""``gradwatch runs report`` tells what happened when, why, and what changed, as Markdown and as one page."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.image import imread
from sqlalchemy import Engine, update

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.retention import Policy, prune
from gradwatch_slo.problems import printable
from tests.batches import SECOND, at, event, frame, scalar
from tests.browser import chromium, needs_chromium
from tests.collector_process import collector, train
from tests.pages import HOSTILE, Page, live
from tests.told_runs import flight_record, look, tell_run

NAN = float("nan")
DAY = 86_400 * 1_000_000_000
GONE_BAD = [2.0, 1.5, 1.2, 1.0, NAN, NAN]

TRAINED_TO_NAN = """
import os, torch, gradwatch

model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
gradwatch.watch(model, optimizer)
for step in range(80):
    optimizer.zero_grad()
    loss = model(torch.ones(8, 4)).square().mean() * (float("nan") if step == int(os.environ["SINCE"]) else 1)
    loss.backward()
    optimizer.step()
"""


def report(database_url: str, run_id: str, *options: str) -> str:
    result = CliRunner().invoke(main, ["runs", "report", run_id, "--db", database_url, *options])
    assert result.exit_code == 0, result.output
    return result.output


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level in Markdown."""
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def tell_story(database: Engine) -> None:
    """A good run, then one that goes NaN and dies in its first attempt and reaches its target in the second."""
    tell_run(database, "good", 0, resource={c.GIT_COMMIT: "abc", c.TORCH_VERSION: "2.9"})
    about = {c.GIT_COMMIT: "def", c.TORCH_VERSION: "2.13", c.TARGET: "val_loss<=0.5"}
    tell_run(
        database,
        "bad",
        100,
        event(c.CHECKPOINT_SAVED, 103, 1, STEP=1, CHECKPOINT_NAME="run/last.pt"),
        event(c.CHECKPOINT_FAILED, 106, 2, STEP=2, EXCEPTION_TYPE="OSError", EXCEPTION_MESSAGE="disk full"),
        event(
            c.NONFINITE_STEP, 114, 3, STEP=4, LAYER_NAME="fc.weight", BORN_IN="backward", NONFINITE_STEPS=1,
            LOSS_VALUE=1.0,
        ),
        event(c.FLIGHT_RECORD, 115, 4, STEP=4, FLIGHT_TRIGGER="nonfinite", FLIGHT_STEPS=6,
              FLIGHT_DATA=flight_record(GONE_BAD)),
        event(c.STALLED, 117, 5, STEP=5, STACKS="Thread 1"),
        losses=GONE_BAD,
        resource=about,
        ending={
            "STATUS": "failed", "REASON": "FloatingPointError", "EXCEPTION_MESSAGE": "loss is NaN",
            "WILL_RETRY": True,
        },
    )  # fmt: skip
    tell_run(
        database,
        "bad",
        130,
        event(c.TARGET_REACHED, 145, 1, STEP=6, TARGET="val_loss<=0.5", TARGET_VALUE=0.49),
        losses=[1.6, 1.3, 1.0, 0.8, 0.6],
        first_step=2,
        attempt=2,
        resource=about,
    )
    look(database, 151)


def test_a_run_that_went_bad_is_told_from_its_start_to_its_end(database: Engine, database_url: str) -> None:
    tell_story(database)
    told = report(database_url, "bad")
    assert told.startswith("# Run bad: succeeded\n")
    summary = told.splitlines()[2]
    assert "Run bad of job digits (model net, dataset digits, tier experiment) started on 2025-06-15" in summary
    assert "on node-1 and, after 50.0 s and 7 steps, in attempt 2, succeeded." in summary
    assert "The first step with a NaN or Inf was step 4, in layer fc.weight, born in backward." in summary
    assert "- First step with NaN or Inf: step 4, in layer fc.weight, born in backward\n" in told
    assert r"It reached its target val_loss\<=0.5 after 45.0 s." in summary

    happened = [line.split(" | ")[1:] for line in section(told, "Time line").splitlines() if "| 20" in line]
    assert [(after, what.removesuffix(" |")) for after, what in happened] == [
        ("0 s", "attempt 1 started"),
        ("3.0 s", "checkpoint run/last.pt saved at step 1"),
        ("6.0 s", "checkpoint not saved at step 2 (OSError: disk full)"),
        ("14.0 s", "NaN or Inf at step 4 in fc.weight born in backward"),
        ("14.0 s", "finding nonfinite (ticket)"),
        ("15.0 s", "black box sent at step 4 for nonfinite"),
        ("17.0 s", "no step ends any more at step 5"),
        ("20.0 s", "attempt 1 failed (FloatingPointError, rank 0, will be tried again): loss is NaN"),
        ("30.0 s", "attempt 2 started"),
        ("45.0 s", r"target reached at step 6 val_loss\<=0.5 with 0.49"),
        ("50.0 s", "attempt 2 succeeded"),
        ("51.0 s", "finding nonfinite resolved"),
    ]
    assert "nonfinite (ticket, resolved): attempt 1, step 4, layer fc.weight" in section(told, "Findings")
    assert "Likely cause: A loss or gradient became NaN or Inf" in section(told, "Findings")
    assert "[Runbook](https://" in section(told, "Findings")
    box = section(told, "Last steps in the black box")
    assert "Of 6 steps, sent for nonfinite by rank 0 in attempt 1." in box
    assert "| 4 | NaN | NaN | 0.1 | 1.0 s | conv.weight | NaN |" in box
    assert "1 of 2 checkpoints were saved. The last good one is of 2025-06-15" in told
    assert "to go on with step 1; the run went on for 47.0 s after it." in told
    # Steps 2 to 5 were done again.
    assert re.search(r"Effective training time: \d+\.\d % of 50.0 s: .* in steps that were done again\.", told)
    changed = section(told, "What changed since the last good run")
    assert "that succeeded before this one started: good." in changed
    assert "| versions | torch | 2.9 | 2.13 |" in changed
    assert "| code | commit | abc | def |" in changed


def test_the_page_is_one_file_with_pictures_that_can_be_read_aloud(database: Engine, database_url: str) -> None:
    tell_story(database)
    text = report(database_url, "bad", "--format", "html")
    page = Page(text)
    assert {each.partition(":")[0] for each in page.fetched if not each.startswith("#")} == {"data"}
    assert {each.removeprefix("#") for each in page.fetched if each.startswith("#")} <= set(page.ids)
    assert all(link.startswith("https://github.com/gradwatch/gradwatch/") for link in page.links)
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    assert page.tags.count("svg") == page.tags.count("figure") == 5
    assert "script" not in page.tags
    for title in ("Loss and learning rate", "Global gradient norm, before clipping", "Step time"):
        assert title in page.texts
    assert "NaN or Inf from step 4" in {each.strip() for each in page.texts}
    assert any("lowest 0.6, highest 2. NaN or Inf from step 4 on" in each for each in page.texts)
    for colour in ("#010101", "#020202", "#030303", "#040404", "#050505"):
        assert colour not in text
    assert "var(--line)" in text
    assert "prefers-color-scheme: dark" in text
    assert {"conv.weight", "fc.weight"} <= {each.strip() for each in page.texts}


def test_the_same_is_said_in_markdown_and_on_the_page(database: Engine, database_url: str) -> None:
    tell_story(database)
    markdown = report(database_url, "bad").replace("\\", "")
    page = " ".join(Page(report(database_url, "bad", "--format", "html")).texts)
    for heading in (
        "Time line",
        "Findings",
        "Last steps in the black box",
        "What changed since the last good run",
    ):
        assert heading in page
    for line in re.findall(r"^\| 20.* \| (.*) \|$", markdown, re.MULTILINE):
        assert line in page
    assert markdown.splitlines()[2] in page


def test_nothing_in_telemetry_is_more_than_text(database: Engine, database_url: str) -> None:
    about = dict.fromkeys((c.SERVICE_NAME, c.MODEL, c.DATASET, c.TEAM, c.HOST_NAME, c.GIT_COMMIT), HOSTILE)
    tell_run(database, "good", 0, resource={**about, c.GIT_COMMIT: "other"})
    tell_run(
        database,
        "bad",
        100,
        event(c.NONFINITE_STEP, 105, 1, STEP=1, LAYER_NAME=HOSTILE, NONFINITE_STEPS=1),
        event(c.CHECKPOINT_FAILED, 106, 2, STEP=2, CHECKPOINT_NAME=HOSTILE, EXCEPTION_MESSAGE=HOSTILE),
        event(c.FLIGHT_RECORD, 107, 3, FLIGHT_TRIGGER=HOSTILE, FLIGHT_DATA=flight_record([1.0], (HOSTILE,))),
        event(c.INSTRUMENTATION_MISSING, 108, 4, MISSING_REASON=HOSTILE),
        resource={**about, HOSTILE: HOSTILE},
        layers=(HOSTILE,),
        frames=[frame(c.DEVICE_MEMORY_HEADROOM, [{c.DEVICE: HOSTILE}], [101], [[0.1]])],
        ending={"STATUS": "failed", "REASON": HOSTILE, "EXCEPTION_MESSAGE": HOSTILE},
    )
    look(database, 121)
    text = report(database_url, "bad", "--format", "html")
    page = Page(text)
    assert "script" not in page.tags
    assert text.count("alert(1)") > 10
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert printable(HOSTILE) in {each.strip() for each in page.texts}
    markdown = report(database_url, "bad")
    assert "\x1b" not in markdown
    assert not re.search(r"(?<!\\)<script", markdown)
    assert not re.search(r"(?<!\\)\|\*", markdown)
    assert not live(markdown)
    compared = CliRunner().invoke(
        main, ["runs", "compare", "bad", "--format", "markdown", "--db", database_url]
    )
    assert "evil" in compared.stdout
    assert not live(compared.stdout)


def test_what_a_slow_clock_told_is_placed_by_the_collectors(database: Engine, database_url: str) -> None:
    tell_run(
        database,
        "run",
        0,
        event(c.CHECKPOINT_SAVED, 5, 1, STEP=1, CHECKPOINT_NAME="last.pt"),
        event(c.STALLED, 6, 2),
    )
    with transaction(database) as connection:
        connection.execute(update(schema.process).values(clock=asdict(Clock(offset=-10 * SECOND))))
    told = section(report(database_url, "run"), "Time line")
    assert "| 15.0 s | checkpoint last.pt saved at step 1 |" in told
    assert "| 16.0 s | no step ends any more |" in told


def test_a_checkpoint_of_many_ranks_is_told_once(database: Engine, database_url: str) -> None:
    for rank in range(4):
        saved = event(c.CHECKPOINT_SAVED, 5 + rank, 1, STEP=1, CHECKPOINT_NAME="last.pt")
        tell_run(database, "run", 0, saved, rank=rank)
    assert section(report(database_url, "run"), "Time line").count("checkpoint last.pt saved") == 1


@pytest.mark.parametrize("data", ["nonsense", None, 7, flight_record([]), flight_record([1.0])[:20]], ids=repr)
def test_a_black_box_that_cannot_be_read_is_left_out(database: Engine, database_url: str, data: object) -> None:
    tell_run(database, "run", 0, event(c.FLIGHT_RECORD, 5, 1, FLIGHT_DATA=data))
    assert "## Last steps" not in report(database_url, "run")


def test_a_run_of_which_hardly_anything_is_known_has_a_report(database: Engine, database_url: str) -> None:
    tell_run(database, "run", 0, losses=[NAN], layers=(), ending={"STATUS": "cancelled", "REASON": "SIGTERM"})
    told = report(database_url, "run")
    assert "and, after 20.0 s and 1 step, was cancelled (SIGTERM" in told
    assert "Its last loss was NaN or infinite." in told
    assert "No run of the same job, model and dataset had succeeded" in told
    assert "No checkpoint was told of." in told
    assert "unknown, for want of prices" in told
    page = report(database_url, "run", "--format", "html")
    assert "The loss was never finite." in page


def test_pictures_of_sharded_parameters_are_of_all_ranks(database: Engine, database_url: str) -> None:
    losses = [2.0, 1.0, 3.0, NAN]
    for rank, share in enumerate([0.25, 0.75]):
        tell_run(database, "run", 0, losses=losses, rank=rank, share=share)
    page = Page(report(database_url, "run", "--format", "html"))
    assert any(each.startswith("The norm: first 6, last 9, lowest 3, highest 9.") for each in page.texts)
    assert any(
        "2 layers over time; red where a norm was NaN or Inf: at least 2 known, the first at step 3."
        " Norms from 1 to 6." in each
        for each in page.texts
    )
    assert {"conv.weight", "fc.weight"} <= {each.strip() for each in page.texts}


@pytest.mark.parametrize("since", [0, 40], ids=["from the first step on", "half way through"])
def test_layers_that_a_training_had_as_nan_are_red_in_the_picture(
    database_url: str, since: int, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINED_TO_NAN, encoding="utf-8")
    with collector(database_url) as serving:
        training = train(
            script, serving, GRADWATCH_RUN_ID="bad", GRADWATCH_EVERY="1", SINCE=str(since),
            # One report at the end, whose largest norms are those of good steps.
            GRADWATCH_EXPORT_INTERVAL="60",
        )  # fmt: skip
        _, errors = training.communicate(timeout=120)
        assert training.returncode == 0, errors
        serving.await_status("bad", "succeeded")
        known = serving.get("/api/v1/layer-map", params={"run": "bad"}).json()["nonfinite_count"]
    assert known >= 4
    text = report(database_url, "bad", "--format", "html")
    told = " ".join(layers_told(text))
    assert f"4 layers over time; red where a norm was NaN or Inf: at least {known} known" in told
    assert f"the first at step {since}." in told
    assert red_cells(text) >= 4


def test_a_norm_of_zero_is_the_palest_and_not_a_gap(database: Engine, database_url: str) -> None:
    tell_run(database, "run", 0, losses=[2.0, 1.0, 0.0, 0.5])
    text = report(database_url, "run", "--format", "html")
    (told,) = layers_told(text)
    assert told == (
        "2 layers over time; none is known to have been NaN or Inf."
        " Norms from 0 to 4, exactly zero in 2 of 8 cells."
    )
    cells = picture_of_cells(text)
    assert (cells[..., 3] == 1).all()
    palest = cells[np.unravel_index(cells[..., :3].sum(axis=2).argmax(), cells.shape[:2])]
    # Of eight the two zeros, and the least that is not.
    assert (cells == palest).all(axis=2).mean() == pytest.approx(3 / 8, abs=0.03)


@pytest.mark.parametrize("least", [2.3, 75.0])
def test_steps_that_hardly_differ_are_told_apart_by_their_axis(
    database: Engine, database_url: str, least: float
) -> None:
    longer = scalar(c.STEP_DURATION, [least * 5, least * 6], [least + 0.05, least + 0.1], other=1)
    tell_run(database, "run", 0, seconds=least * 21, frames=[longer])
    (drawn,) = re.findall(
        r'<svg[^>]*aria-labelledby="duration-title.*?</svg>',
        report(database_url, "run", "--format", "html"),
        re.DOTALL,
    )
    labels = re.findall(r">([\d.]+ s|\d+m\d+s)</text>", drawn)
    assert len(labels) == len(set(labels)) > 2


def layers_told(text: str) -> list[str]:
    return [each for each in Page(text).texts if "layers over time" in each]


def layers_drawn(text: str) -> str:
    """The heat map, as SVG."""
    (drawn,) = re.findall(r'<svg[^>]*aria-labelledby="layers-title.*?</svg>', text, re.DOTALL)
    return str(drawn)


def picture_of_cells(text: str) -> Any:
    """The heat map's cells without its marks and scale, as reds, greens, blues and opacities from 0 to 1."""
    images = [
        imread(BytesIO(base64.b64decode(each)))
        for each in re.findall(r"data:image/png;base64,([^\"]+)", layers_drawn(text))
    ]
    return images[0]  # the scale is drawn after it


def red_cells(text: str) -> int:
    return len(re.findall(r"<use [^>]*var\(--bad\)", layers_drawn(text)))


def test_pictures_go_on_in_what_was_rolled_up(database: Engine, database_url: str) -> None:
    losses = [float(step) for step in range(300, 0, -1)]
    tell_run(database, "run", 0, losses=losses)
    prune(lambda: transaction(database), Policy(raw=0, rollups=1000 * DAY), at(10 * 86_400))
    page = Page(report(database_url, "run", "--format", "html"))
    assert page.tags.count("svg") == 5
    (loss,) = (each for each in page.texts if each.startswith("The loss: "))
    # Means of 64 steps, and of the 44 at the end.
    assert loss == "The loss: first 268.5, last 22.5, lowest 22.5, highest 268.5."


@needs_chromium
@pytest.mark.parametrize("media", ["print", "screen"])
def test_however_long_names_are_a_page_is_no_wider_than_what_it_is_printed_on(
    database: Engine, database_url: str, media: Literal["print", "screen"], tmp_path: Path
) -> None:
    run_id, layer, file = "run-" + 185 * "x", 30 * "encoder." + "weight", tmp_path / "report.html"
    tell_run(database, "good", 0)
    tell_run(
        database,
        run_id,
        100,
        event(c.CHECKPOINT_SAVED, 103, 1, STEP=1, CHECKPOINT_NAME=200 * "n"),
        event(c.FLIGHT_RECORD, 115, 2, STEP=4, FLIGHT_TRIGGER="nonfinite", FLIGHT_STEPS=6,
              FLIGHT_DATA=flight_record(GONE_BAD, (layer,))),
        losses=GONE_BAD,
        layers=(layer,),
        resource={c.GIT_COMMIT: 200 * "a"},
    )  # fmt: skip
    report(database_url, run_id, "--format", "html", "-o", str(file))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 760, "height": 900})
        page.emulate_media(media=media)
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 760
        # Of what is not long no word is broken.
        assert page.get_by_text("outcome", exact=True).bounding_box()["height"] < 40  # type: ignore[index]


def test_the_page_is_written_where_it_is_wanted(database: Engine, database_url: str, tmp_path: Path) -> None:
    tell_run(database, "run", 0)
    file = tmp_path / "run.html"
    told = report(database_url, "run", "--format", "html", "-o", str(file))
    assert told == f"wrote {file}\n"
    assert file.read_text().startswith("<!DOCTYPE html>")
    nowhere = CliRunner().invoke(
        main, ["runs", "report", "run", "--db", database_url, "-o", str(tmp_path / "no" / "run.md")]
    )
    assert (nowhere.exit_code, nowhere.output.startswith("Error: ")) == (1, True)
    missing = CliRunner().invoke(main, ["runs", "report", "none", "--db", database_url])
    assert (missing.exit_code, "`gradwatch runs list` names them" in missing.output) == (1, True)


def test_many_ranks_layers_and_steps_stay_a_page_that_can_be_sent(database: Engine, database_url: str) -> None:
    steps = 20_000
    ends = np.linspace(1, 900, steps)
    tell_run(
        database,
        "run",
        0,
        *(event(c.CHECKPOINT_SAVED, 10 * index, index + 1, STEP=index) for index in range(80)),
        seconds=1000,
        losses=[1.0],
        layers=[f"encoder.layers.{index}.weight" for index in range(1000)],
        frames=[scalar(c.CLIP_RATIO, ends, np.ones(steps)), scalar(c.LOSS, ends, np.sin(ends) + 2, other=1)],
    )
    told = report(database_url, "run")
    assert "(76 before it are not shown)" in told
    assert len(section(told, "Time line").splitlines()) < 12
    assert len(report(database_url, "run", "--format", "html")) < 500_000


def test_other_commands_do_not_pay_for_what_draws() -> None:
    code = "import sys, gradwatch_collector.commands.runs; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
