"""The page in a real browser: what people see of runs, while they train and afterwards."""

from __future__ import annotations

import math
import re
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import requests
from playwright.sync_api import Browser, Page, expect

from gradwatch import conventions as c
from gradwatch_collector.auth import Role, create_token, revoke_token
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.database import transaction
from tests.batches import scalar
from tests.browser import DARK, LIGHT, PHONE, Visit, chromium, needs_chromium, visiting
from tests.collector_process import Collector, collector, eventually, train
from tests.fleet import store_fleet, tell_wide_run
from tests.fuzzing.samples import events_request
from tests.odd_ids import ODD_IDS
from tests.otlp_clients import ProtobufClient, gauge, metrics_request
from tests.told_runs import tell_run

pytestmark = needs_chromium

FLEET = 10_000
LAYERS = 1_000
BAD_STEP, BAD_LAYER = 25, "2.weight"
LAST_STEP = 60
# A link to whoever reads it as HTML, and a value to whoever reads it as a template.
MARKUP = '<a href="https://evil.example/">x</a>%{x}'
LONG = f"long-{'x' * 184}"
# Goes on until a file appears; a bad one has a gradient that is NaN in one layer and step, and then everywhere.
TRAINING = """
import os, pathlib, time, torch, gradwatch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
watch = gradwatch.watch(model, optimizer, job="page", dataset="noise", target="val_loss<=1.0", deadline=60)
stop, folder = pathlib.Path(os.environ["STOP"]), pathlib.Path(os.environ["FOLDER"])
hurt = model[2].weight.register_hook
bad = os.environ["BAD"] == "1"
for step in range(100_000):
    x = torch.randn(32, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    handle = hurt(lambda grad: grad * float("nan")) if bad and step == BAD_STEP else None
    loss.backward()
    optimizer.step()
    if handle is not None:
        handle.remove()
    if step == 30:
        watch.save_checkpoint(model.state_dict(), folder / f"{os.environ['GRADWATCH_RUN_ID']}.pt")
    if step % 20 == 0:
        watch.log(val_loss=loss)
    if step >= 60:
        if stop.exists():
            break
        time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Collector]:
    """A collector with the runs of a large fleet, and one of very many layers."""
    database = f"sqlite:///{folder}/gradwatch.db"
    engine = db.connect(database)
    db.upgrade(engine)
    store_fleet(engine, FLEET)
    tell_wide_run(engine, "wide", layers=LAYERS, steps=400, bad_step=321, bad_layer=543)
    tell_run(engine, "twice", 0, layers=("old",), ending={"STATUS": "failed", "WILL_RETRY": True})
    tell_run(engine, "twice", 30, layers=("new",), attempt=2, first_step=10)
    tell_run(engine, "zeros", 0, losses=[0.0, 0.0, 1e-12, 2.0], layers=("layer",))
    other = scalar(c.LEARNING_RATE, [1, 2], [0.05, 0.05], **{c.OPTIMIZER: 1})
    tell_run(engine, "two-optimizers", 0, frames=[other])
    logged = scalar(c.LOGGED, [1, 2], [0.5, math.nan], **{c.METRIC_NAME: MARKUP})
    tell_run(engine, MARKUP, 0, losses=[1.0, 2.0, math.nan], layers=(MARKUP,), frames=[logged])
    tell_run(engine, LONG, 0, resource={c.SERVICE_NAME: "job" * 60})
    engine.dispose()
    # Whatever year the tests' time is of.
    with collector(database, "--keep-raw", "forever", "--keep-rollups", "forever") as running:
        yield running


@pytest.fixture(scope="module")
def trained(served: Collector, folder: Path) -> Collector:
    """Two runs of real training that have ended, one of them with a NaN."""
    stop = folder / "stop"
    stop.touch()
    processes = [start(served, folder, name, stop=stop, bad=name == "sick") for name in ("healthy", "sick")]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for name in ("healthy", "sick"):
        served.await_status(name, "succeeded")
    eventually(lambda: "nonfinite" in {each["rule"] for each in served.show("sick")["findings"]}, "the finding")
    return served


@pytest.fixture
def visit(browser: Browser, served: Collector) -> Iterator[Visit]:
    with visiting(browser, served.url) as visited:
        yield visited


def start(
    served: Collector, folder: Path, run_id: str, *, stop: Path, bad: bool = False
) -> subprocess.Popen[str]:
    script = folder / "train.py"
    script.write_text(textwrap.dedent(TRAINING).replace("BAD_STEP", str(BAD_STEP)))
    told = {"STOP": str(stop), "FOLDER": str(folder), "BAD": str(int(bad))}
    return train(script, served, GRADWATCH_RUN_ID=run_id, GRADWATCH_EVERY="1", **told)


def shown(page: Page) -> list[str]:
    """Ids of the runs in the list, in order."""
    found: list[str] = page.locator("[data-run]").evaluate_all("rows => rows.map(row => row.dataset.run)")
    return found


def plotted(page: Page, place: str) -> list[dict[str, Any]]:
    """What a chart has drawn, by trace."""
    found: list[dict[str, Any]] = page.locator(f"{place} .js-plotly-plot").first.evaluate(
        "plot => plot.data.map(({x, y, z, name, type}) => ({x: [...x], y: [...y], z, name, type}))"
    )
    return found


def charts_of(page: Page) -> None:
    """Wait until every chart that a run has is drawn."""
    expect(page.locator("#timeline .main-svg").first).to_be_visible()
    expect(page.locator("section.charts[data-step]")).to_be_visible()


# --- Live ------------------------------------------------------------------------------------------------


def test_a_run_appears_while_it_trains_goes_on_by_itself_and_is_shown_to_end(
    visit: Visit, served: Collector, folder: Path
) -> None:
    page = visit.open("/")
    expect(page.locator("#live")).to_have_text("● live")
    process = start(served, folder, "live", stop=folder / "live-stop")
    try:
        row = page.locator('[data-run="live"]')
        expect(row.locator(".status")).to_have_text("●running")
        steps = row.locator('[data-label="Steps"]')
        expect(steps).to_have_text(re.compile("[1-9]"))
        before = steps.inner_text()
        expect(steps).not_to_have_text(before)
        expect(page.locator('[data-status="running"]')).to_have_text("●1 running")

        row.locator("a").click()
        charts_of(page)
        last = page.locator("section.charts").get_attribute("data-step")
        expect(page.locator("section.charts")).not_to_have_attribute("data-step", last or "")
    finally:
        (folder / "live-stop").touch()
        process.communicate(timeout=120)
    expect(page.locator(".headline .status").first).to_have_text("✓succeeded")
    page.go_back()
    expect(page.locator('[data-run="live"] .status')).to_have_text("✓succeeded")


# --- One run ---------------------------------------------------------------------------------------------


def test_a_nan_is_marked_at_its_layer_and_step(trained: Collector, browser: Browser) -> None:
    with visiting(browser, trained.url) as visit:
        page = visit.open("/runs/sick")
        charts_of(page)
        heat, hatched, crosses = plotted(page, "#layers")
        assert heat["type"] == "heatmap"
        assert crosses["name"] == "NaN or Inf"
        rows = page.locator("#layers .js-plotly-plot").evaluate("plot => plot.layout.yaxis.ticktext")
        assert crosses["x"][0] == BAD_STEP
        assert rows[crosses["y"][0]] == BAD_LAYER
        told = page.get_by_role("list", name="Where gradients were not finite")
        expect(told.get_by_role("listitem").first).to_have_text(f"step {BAD_STEP}: {BAD_LAYER}")

        finding = page.locator("section li.card").first
        expect(finding).to_contain_text("nonfinite")
        expect(finding).to_contain_text(f"step {BAD_STEP}, layer {BAD_LAYER}")
        expect(finding.get_by_role("link", name="Runbook")).to_have_attribute("href", re.compile("#|runbook"))
        assert any("nonfinite" in (trace["y"] or []) for trace in plotted(page, "#timeline"))
        marks = page.locator(".js-plotly-plot").first.evaluate("plot => plot.layout.shapes.map(s => s.x0)")
        assert marks == [BAD_STEP]

        # Of most of the steps after it no layer is told, but each loss says that they were no better.
        known = [step for step in hatched["x"] if step is not None]
        assert (min(known), max(known)) == (BAD_STEP - 0.5, LAST_STEP + 0.5)
        span = f"the first {BAD_STEP}, the last {LAST_STEP}."
        expect(page.locator("figure:has-text('Global gradient norm') .told")).to_contain_text(span)
        expect(page.locator("#layers .told")).to_contain_text(
            f"NaN or Inf first at step {BAD_STEP} in {BAD_LAYER}, last at step {LAST_STEP}."
        )
        expect(page.locator("#layers summary")).to_have_text(
            re.compile(f"At least \\d+ gradients not finite, in steps {BAD_STEP} to {LAST_STEP}$")
        )
        visit.picture("run-with-nan")


def test_a_norm_of_exactly_zero_is_pale_and_not_blank(visit: Visit) -> None:
    page = visit.open("/runs/zeros")
    charts_of(page)
    (heat,) = plotted(page, "#layers")
    palest = math.log10(2.0) - 8
    assert heat["z"] == [pytest.approx([palest, palest, -12, math.log10(2.0)])]
    expect(page.locator("#layers .told")).to_have_text(
        "1 layer. Norms from 1.00e-12 to 2; 2 cells exactly 0; the palest are below 2.00e-8. All finite."
    )


def test_each_of_several_curves_is_told_of_by_its_name(visit: Visit) -> None:
    page = visit.open("/runs/two-optimizers")
    charts_of(page)
    expect(page.locator("figure:has-text('Loss and learning rate') .told")).to_contain_text(
        "learning rate: Always 0.1. learning rate, optimizer 1: Always 0.05."
    )


@pytest.mark.parametrize("path", [f"/runs/{quote(MARKUP, safe='')}", f"/compare?run={quote(MARKUP)}&run=twice"])
def test_names_are_shown_as_they_are_and_never_read(visit: Visit, path: str) -> None:
    page = visit.open(path)
    label = page.locator(".legendtext", has_text=MARKUP).first
    expect(label).to_be_visible()
    figure = page.locator("figure", has=page.locator(".legendtext", has_text=MARKUP)).first
    figure.locator(".plot").focus()
    page.keyboard.press("Home")
    expect(figure.locator(".hoverlayer")).to_contain_text(MARKUP)
    assert page.locator("svg a").count() == 0


def test_a_run_shows_its_curves_its_checkpoints_and_its_configuration(
    trained: Collector, browser: Browser
) -> None:
    with visiting(browser, trained.url) as visit:
        page = visit.open("/runs/healthy")
        charts_of(page)
        titles = page.locator("figure:visible h3").all_inner_texts()
        assert titles == [
            "Loss and learning rate",
            "Global gradient norm, before clipping",
            "Gradient norms by layer",
            "Time line",
            "Where the time of a step goes",
            "Memory and headroom",
            "Logged metrics",
        ]
        loss = plotted(page, "figure:has-text('Loss and learning rate')")
        assert [trace["name"] for trace in loss] == ["loss", "learning rate"]
        assert loss[0]["x"] == list(range(61))
        parts = plotted(page, "figure:has-text('Where the time')")
        assert {"forward", "backward", "optimizer", "the rest"} <= {trace["name"] for trace in parts}
        checkpoints = page.get_by_role("region", name="Checkpoints")
        expect(checkpoints).to_contain_text("healthy.pt")
        page.get_by_text("Configuration and environment").click()
        expect(page.locator("#configuration")).to_contain_text("training.torch.version")
        expect(page.locator(".facts")).to_contain_text("Last good checkpoint")
        expect(page).to_have_title("healthy · gradwatch")


def test_of_a_run_that_was_tried_again_every_attempt_can_be_looked_at(visit: Visit) -> None:
    page = visit.open("/runs/twice")
    charts_of(page)
    loss = plotted(page, "figure:has-text('Loss and learning rate')")
    assert {"loss, attempt 1", "loss, attempt 2"} <= {trace["name"] for trace in loss}
    names = "plot => plot.layout.yaxis.ticktext[0]"
    assert page.locator("#layers .js-plotly-plot").evaluate(names) == "new"
    page.get_by_role("combobox", name="Attempt").select_option("attempt 1")
    eventually(lambda: page.locator("#layers .js-plotly-plot").evaluate(names) == "old", "the old layers")
    expect(page.get_by_role("region", name="Attempts and ranks").locator("tbody tr")).to_have_count(2)


def test_a_run_of_any_id_has_a_page(visit: Visit) -> None:
    page, visit.expected = visit.page, ("404 (Not Found)",)
    # Browsers take these two for folders, however they are spelled.
    for run_id in [each for each in ODD_IDS if each not in (".", "..")]:
        page.goto(f"{visit.url}/runs/{quote(run_id, safe='')}")
        # It is no run, and the page says so: of this id and no other.
        told = page.get_by_role("alert").first
        expect(told).to_contain_text("There is no run")
        assert run_id in (told.text_content() or "")


def test_of_a_run_that_is_none_nothing_is_drawn_and_nothing_asked_again(visit: Visit) -> None:
    page, visit.expected = visit.open("/"), ("404 (Not Found)",)
    expect(page.locator("#live")).to_have_text("● live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    visit.open("/runs/nobody")
    expect(page.get_by_role("alert")).to_contain_text("There is no run nobody here, or it is another team's.")
    expect(page.get_by_role("heading", name="Charts")).to_be_hidden()
    expect(page.locator("#live")).to_be_empty()
    visit.assert_accessible()
    assert not [url for url in asked if "/events" in url]

    visit.open("/runs/%E0%A4%A")
    expect(page.get_by_role("alert")).to_contain_text("it names no run")
    visit.assert_accessible()
    visit.open("/compare?run=twice&run=nobody&run=none")
    expect(page.get_by_role("alert")).to_contain_text("There is no run nobody and no run none here")
    visit.open("/compare?run=nobody")
    expect(page.get_by_role("alert")).to_contain_text("There is no run nobody here")


def test_the_arrow_keys_read_a_chart_out(trained: Collector, browser: Browser) -> None:
    with visiting(browser, trained.url) as visit:
        page = visit.open("/runs/healthy")
        charts_of(page)
        chart = page.locator("figure").first
        chart.locator(".plot").focus()
        page.keyboard.press("Home")
        told = re.compile("^Step 0: loss [0-9.]+, learning rate 0.05$")
        expect(chart.locator("[aria-live]")).to_have_text(told)
        page.keyboard.press("ArrowRight")
        expect(chart.locator("[aria-live]")).to_have_text(re.compile("^Step 1: "))
        expect(chart.locator(".hoverlayer")).to_contain_text("loss")


# --- Many ------------------------------------------------------------------------------------------------


def test_ten_thousand_runs_are_a_page_of_fifty(visit: Visit) -> None:
    sizes: list[int] = []
    visit.page.on("response", lambda answer: sizes.append(int(answer.headers.get("content-length", 0))))
    page = visit.open("/?text=fleet")
    expect(page.locator("[data-run]")).to_have_count(50)
    assert shown(page)[0] == "fleet-00000"
    expect(page.get_by_text("50 of 10,000 runs shown.")).to_be_visible()
    assert page.evaluate("document.querySelectorAll('*').length") < 2_500
    answers = [size for size in sizes if size]
    assert max(answers) < 50_000
    assert sum(answers) < 150_000

    page.get_by_role("button", name="Next page").click()
    expect(page.locator("[data-run]").first).to_have_attribute("data-run", "fleet-00050")
    page.get_by_role("button", name="Newer page").click()
    expect(page.locator("[data-run]").first).to_have_attribute("data-run", "fleet-00000")
    page.go_back()
    expect(page.locator("[data-run]").first).to_have_attribute("data-run", "fleet-00050")


def test_a_thousand_layers_are_a_bounded_map_that_a_filter_looks_into(visit: Visit) -> None:
    maps: list[bytes] = []
    page = visit.page
    page.on("response", lambda answer: maps.append(answer.body()) if "/layer-map" in answer.url else None)
    visit.open("/runs/wide")
    charts_of(page)
    heat, hatched, crosses = plotted(page, "#layers")
    assert (len(heat["z"]), max(len(row) for row in heat["z"])) == (150, 120)
    assert (crosses["x"], hatched["x"][:2]) == ([321], [320.5, 321.5])
    expect(page.locator("#layers .told")).to_contain_text("NaN or Inf first at step 321 in block.543.weight.")
    assert len(maps[0]) < 400_000
    assert page.evaluate("document.querySelectorAll('*').length") < 2_500

    page.get_by_role("searchbox", name="Filter layers").fill("block.543.")
    expect(page.locator("#layers .told")).to_contain_text("1 of 1,000 layers.")
    heat, _, crosses = plotted(page, "#layers")
    assert (len(heat["z"]), crosses["y"]) == (1, [0])


# --- Filters, order, links -------------------------------------------------------------------------------


def test_filters_and_order_are_the_collectors_and_stand_in_the_address(visit: Visit) -> None:
    page = visit.open("/?text=fleet")
    page.locator('[data-status="failed"]').click()
    expect(page.get_by_text("50 of 833 runs shown.")).to_be_visible()
    assert set(page.locator("[data-run] .status").all_inner_texts()) == {"✕\nfailed"}
    page.locator('[data-sort="loss"]').click()
    expect(page.locator("th[aria-sort]")).to_have_attribute("aria-sort", "ascending")
    page.locator('[data-sort="loss"]').click()
    expect(page.locator("th[aria-sort]")).to_have_attribute("aria-sort", "descending")
    expect(page.locator("[data-run]").first).to_have_attribute("data-run", "fleet-09993")
    address = page.url
    assert "status=failed" in address
    assert "sort=-loss" in address

    page.reload()
    expect(page.locator("[data-run]").first).to_have_attribute("data-run", "fleet-09993")
    page.get_by_role("searchbox").fill("FLEET-00009")
    expect(page.locator("[data-run]")).to_have_count(1)
    page.get_by_role("searchbox").fill("no such thing")
    page.get_by_role("button", name="Show all runs").click()
    expect(page.locator("[data-run]")).to_have_count(50)


def test_a_sorted_list_stays_sorted_while_runs_go_on(visit: Visit, served: Collector) -> None:
    steps = dict.fromkeys(("sorted-a", "sorted-b"), 0)

    def about(run_id: str) -> dict[str, Any]:
        return {c.SERVICE_NAME: "sorting", c.RUN_ID: run_id, c.RANK: 0}

    def leads(leader: str) -> bool:
        """Whether it is the first in the list, all going on."""
        for run_id in steps:
            steps[run_id] += 1
            told = gauge(c.STEP_INDEX.name, (time.time_ns(), float(steps[run_id])))
            assert client.send(metrics_request(about(run_id), told)).code == 0
        page.wait_for_timeout(500)
        return shown(page)[:1] == [leader]

    with ProtobufClient(served.url, "") as client:
        for run_id in steps:
            assert client.send(events_request(about(run_id), [c.RUN_STARTED], time.time_ns())).code == 0
        page = visit.open("/?text=sorted-&sort=-step")
        expect(page.locator("#live")).to_have_text("● live")
        # More than once: what is found of a run as it begins has the list read, too.
        for leader in ("sorted-a", "sorted-b") * 2:
            steps[leader] += 1_000 + abs(steps["sorted-a"] - steps["sorted-b"])
            eventually(lambda leader=leader: leads(leader), f"{leader} to lead")  # type: ignore[misc]
        for run_id in steps:
            client.send(events_request(about(run_id), [c.RUN_STARTED, c.RUN_ENDED], time.time_ns()))


def test_no_more_runs_are_compared_than_fit_beside_each_other(visit: Visit) -> None:
    runs = [("run", f"fleet-{number:05}") for number in (*range(9), 0)]
    page = visit.open(f"/compare?{urlencode(runs)}")
    expect(page.get_by_text("Up to 8 runs are compared: these are the first of 9.")).to_be_visible()
    table = page.get_by_role("region", name="What differs between runs")
    expect(table.get_by_role("columnheader")).to_have_count(9)


def test_runs_are_chosen_in_the_list_and_compared(trained: Collector, browser: Browser) -> None:
    with visiting(browser, trained.url) as visit:
        page = visit.open("/?text=page")
        page.get_by_role("checkbox", name="Compare healthy").check()
        page.get_by_role("checkbox", name="Compare sick").check()
        page.get_by_role("link", name="Compare 2 runs").click()
        table = page.get_by_role("region", name="What differs between runs")
        expect(table).to_contain_text("first non-finite step")
        drawn = plotted(page, "figure:has-text('Loss')")
        assert {"healthy", "sick"} <= {trace["name"] for trace in drawn}
        visit.picture("compare")
        page.get_by_role("link", name="Also what is the same").click()
        expect(page.get_by_role("heading", name="All that is known")).to_be_visible()
        page.get_by_role("link", name="sick").first.click()
        expect(page).to_have_url(re.compile("/runs/(sick|healthy)$"))


def test_without_a_mouse_everything_is_reached(visit: Visit) -> None:
    page = visit.open("/?text=fleet")
    expect(page.locator("[data-run]")).to_have_count(50)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("-0000")
    expect(page.locator("[data-run]")).to_have_count(10)
    page.locator("[data-run] a").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator('[data-run="fleet-00001"] a')).to_be_focused()
    page.locator('[data-sort="step"]').focus()
    page.keyboard.press("Enter")
    expect(page.locator("th[aria-sort] button")).to_be_focused()
    page.locator('[data-run="fleet-00001"] a').focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("/runs/fleet-00001$"))
    expect(page.locator("h1")).to_have_text("fleet-00001")


# --- Objectives ------------------------------------------------------------------------------------------


def test_objectives_are_told_in_words_with_how_their_budget_was_spent(
    trained: Collector, browser: Browser
) -> None:
    def counted() -> bool:
        objectives = trained.get("/api/v1/slos").json()["objectives"]
        return any(each["total"] for each in objectives)

    eventually(counted, "objectives")
    with visiting(browser, trained.url) as visit:
        page = visit.open("/slos")
        card = page.locator(".objective-card").first
        expect(card.locator(".main-svg").first).to_be_visible()
        expect(card).to_contain_text("the budget allows")
        expect(card.get_by_role("meter")).to_have_attribute("aria-valuetext", re.compile(" %$"))
        left, evenly = plotted(page, ".objective-card")
        assert (left["y"][0], evenly["y"]) == (1, [1, 0])
        visit.assert_accessible()
        visit.picture("objectives")


# --- For everybody ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"), [("light", LIGHT), ("dark", DARK), ("phone", PHONE)], ids=["light", "dark", "phone"]
)
def test_every_page_is_accessible(
    trained: Collector, browser: Browser, name: str, options: dict[str, Any]
) -> None:
    with visiting(browser, trained.url, **options) as visit:
        page = visit.open("/")
        expect(page.locator("[data-run]")).to_have_count(50)
        visit.assert_accessible()
        visit.picture(f"runs-{name}")
        visit.open("/runs/sick")
        charts_of(page)
        visit.assert_accessible()
        visit.picture(f"run-{name}")
        visit.open("/compare?run=healthy&run=sick")
        expect(page.locator(".main-svg").first).to_be_visible()
        visit.assert_accessible()
        if name == "phone":
            for path in ("/", "/runs/sick", "/compare?run=healthy&run=sick", "/slos"):
                visit.open(path)
                wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert wide <= 0, f"{path} is {wide} px too wide"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_very_long_id_makes_no_page_wider(served: Collector, browser: Browser, width: int) -> None:
    with visiting(browser, served.url, viewport={"width": width, "height": 844}) as visit:
        for path in (f"/?text={LONG}", f"/runs/{LONG}", f"/compare?run={LONG}&run=twice"):
            page = visit.open(path)
            expect(page.get_by_text(LONG).first).to_be_visible()
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path} is {wide} px too wide"
        visit.open(f"/?text={LONG}")
        table = page.locator(".scroll")
        expect(table.locator("[data-run]")).to_be_visible()
        assert table.evaluate("each => each.scrollWidth - each.clientWidth") <= 0


def test_colours_follow_the_reader_while_the_page_is_open(trained: Collector, browser: Browser) -> None:
    with visiting(browser, trained.url) as visit:
        page = visit.open("/runs/healthy")
        charts_of(page)
        line = "document.querySelector('.js-plotly-plot').data[0].line.color"
        before = page.evaluate(line)
        page.emulate_media(color_scheme="dark")
        eventually(lambda: page.evaluate(line) != before, "dark lines")


def test_a_page_says_what_to_do_where_there_is_nothing_and_where_nobody_answers(
    browser: Browser, tmp_path: Path
) -> None:
    with collector(f"sqlite:///{tmp_path}/empty.db") as empty, visiting(browser, empty.url) as visit:
        page, visit.expected = visit.open("/"), ("net::ERR_",)
        expect(page.get_by_text("gradwatch demo --serve")).to_be_visible()
        expect(page.locator("#live")).to_have_text("● live")
        empty.process.terminate()
        assert empty.process.wait(timeout=9) == 0, "somebody who listens keeps the collector from its end"
        expect(page.locator("#live")).to_have_text("○ reconnecting…")
        page.get_by_role("combobox", name="Tier").select_option("production")
        expect(page.get_by_role("alert")).to_contain_text("The collector does not answer")


# --- Tokens ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[tuple[Collector, dict[str, str]]]:
    """A collector that asks for tokens, with runs of two teams, and tokens by name."""
    database = f"sqlite:///{folder}/guarded.db"
    engine = db.connect(database)
    db.upgrade(engine)
    store_fleet(engine, 3)
    tell_wide_run(engine, "another-teams", layers=2, steps=10, bad_step=3, bad_layer=1)
    now = time.time_ns()
    with transaction(engine) as connection:
        tokens = {
            "people": create_token(connection, "people", [Role.READ], team="vision", now=now),
            "sender": create_token(connection, "sender", [Role.INGEST], now=now),
            "admin": create_token(connection, "admin", [Role.ADMIN], now=now),
            "leaver": create_token(connection, "leaver", [Role.READ], now=now),
        }
    engine.dispose()
    with collector(database, "--require-token") as running:
        yield running, tokens


def test_whoever_has_a_token_signs_in_sees_its_teams_runs_and_signs_out(
    browser: Browser, guarded: tuple[Collector, dict[str, str]]
) -> None:
    served, tokens = guarded
    with visiting(browser, served.url) as visit:
        page, visit.expected = visit.page, ("401 (Unauthorized)", "403 (Forbidden)", "404 (Not Found)")
        page.goto(served.url)
        field = page.get_by_label("Token")
        expect(field).to_be_focused()
        visit.assert_accessible()
        visit.picture("sign-in")
        for wrong, words in (("gw_wrong", "not known"), (tokens["sender"], "may not read")):
            field.fill(wrong)
            page.keyboard.press("Enter")
            expect(page.locator("#token-problem")).to_contain_text(words)
        field.fill(tokens["people"])
        page.keyboard.press("Enter")
        expect(page.locator("[data-run]")).to_have_count(3)
        assert all(run_id.startswith("fleet-") for run_id in shown(page))
        expect(page.locator("#live")).to_have_text("● live")
        expect(page.locator("#session")).to_contain_text("people, team vision")
        kept = "document.cookie + JSON.stringify({...sessionStorage, ...localStorage})"
        assert "gw_" not in page.evaluate(kept)

        page.goto(f"{served.url}/runs/another-teams")
        expect(page.get_by_role("alert")).to_contain_text("another team's")
        page.goto(served.url)
        page.get_by_role("button", name="Sign out").click()
        expect(field).to_be_visible()


def test_an_open_page_whose_token_is_revoked_asks_for_another(
    browser: Browser, guarded: tuple[Collector, dict[str, str]]
) -> None:
    served, tokens = guarded
    with visiting(browser, served.url) as visit:
        page, visit.expected = visit.page, ("401 (Unauthorized)",)
        page.goto(f"{served.url}/runs/fleet-00000")
        page.get_by_label("Token").fill(tokens["leaver"])
        page.keyboard.press("Enter")
        expect(page.locator("#live")).to_have_text("● live")
        # A connection that is there stays for a while: this is its end.
        page.evaluate("dispatchEvent(new Event('pagehide'))")
        engine = db.connect(served.database)
        with transaction(engine) as connection:
            revoke_token(connection, "leaver", time.time_ns())
        engine.dispose()
        shown_token = {"Authorization": f"Bearer {tokens['leaver']}"}
        eventually(lambda: served.get("/api/v1/runs", headers=shown_token).status_code == 401, "no access")
        page.evaluate("dispatchEvent(new Event('pageshow'))")
        expect(page.get_by_label("Token")).to_be_focused()
        page.get_by_label("Token").fill(tokens["people"])
        page.keyboard.press("Enter")
        expect(page.locator("#live")).to_have_text("● live")
        expect(page.locator("#session")).to_contain_text("people, team vision")


def test_a_browsers_cookie_only_reads(guarded: tuple[Collector, dict[str, str]]) -> None:
    served, tokens = guarded
    with requests.Session() as session:
        answer = session.post(f"{served.url}/session", json={"token": tokens["admin"]}, timeout=10)
        assert answer.json() == {"needs_token": True, "name": "admin", "team": None}
        assert {"HttpOnly", "SameSite=strict"} <= set(answer.headers["Set-Cookie"].split("; "))
        assert session.get(f"{served.url}/api/v1/runs", timeout=10).status_code == 200
        assert session.get(f"{served.url}/metrics", timeout=10).status_code == 200
        for path in ("/v1/logs", "/v1/metrics", "/api/v1/runs"):
            assert session.post(served.url + path, timeout=10).status_code == 401
        # A form of another site's page would sign people in as somebody else.
        form = session.post(f"{served.url}/session", data={"token": tokens["admin"]}, timeout=10)
        assert form.status_code == 415
        session.delete(f"{served.url}/session", timeout=10)
        assert session.get(f"{served.url}/api/v1/runs", timeout=10).status_code == 401
    assert served.get("/events").status_code == 401


def test_what_the_page_is_made_of_is_kept_by_browsers_and_is_compressed(served: Collector) -> None:
    shell = served.get("/")
    assert shell.headers["Cache-Control"] == "no-cache"
    paths = re.findall('(?:src|href)="(/static/[^"]+)"', shell.text)
    assert len(paths) > 10
    for path in {*paths, re.sub("[^/]+$", "plotly.min.js", paths[0])}:
        answer = served.get(path)
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.headers["Content-Encoding"] == "gzip"
        assert len(answer.content) > int(answer.headers["Content-Length"]) or len(answer.content) < 1_000
        again = served.get(path, headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        plain = served.get(path, headers={"Accept-Encoding": "identity"})
        assert plain.content == answer.content
        other = re.sub("/static/[^/]+", "/static/older", path)
        assert served.get(other).headers["Cache-Control"] == "no-cache"
    assert served.get("/api/v1/runs?limit=50").headers["Content-Encoding"] == "gzip"
    events = requests.head(f"{served.url}/events", timeout=10)
    assert events.headers["Content-Type"].startswith("text/event-stream")
    assert served.get("/static/x/nothing.js").status_code == 404
    assert served.get("/static/x/..%2Froutes.py").status_code == 404
