"""`gradwatch collector serve -f`: the objectives that the API and /metrics show are those of the files."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_slo.runs import Status
from tests.collector_process import Collector, collector, eventually
from tests.stored_runs import HOUR, NOW, run, store_runs

MINE = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: NAME}
spec:
  service: training
  indicator:
    metadata: {name: success}
    spec:
      ratioMetric:
        rawType: success
        raw: {metricSource: {type: gradwatch, spec: {unit: run, measure: success, groupBy: [team]}}}
  timeWindow: [{duration: 100Y, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.9}]
  alertPolicies:
    - kind: AlertPolicy
      metadata: {name: mine}
      spec:
        alertWhenNoData: true
        conditions:
          - kind: AlertCondition
            metadata: {name: any}
            spec: {severity: page, condition: {threshold: 1, lookbackWindow: 99Y}}
        notificationTargets: [{kind: AlertNotificationTarget, metadata: {name: mail}, spec: {target: mail}}]
"""


def samples(served: Collector, family: c.Family) -> dict[tuple[str, str], float]:
    """Values of a family by SLO and team."""
    families = text_string_to_metric_families(served.get("/metrics").text)
    shown = (sample for each in families for sample in each.samples if sample.name == family.name)
    return {(each.labels["slo"], each.labels["team"]): each.value for each in shown}


def test_the_objectives_that_are_served_are_those_of_the_files(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    with database.begin() as connection:
        store_runs(connection, [run(Status.FAILED), run(started=NOW - HOUR, lasted=HOUR)])
    folder, file = tmp_path / "objectives", tmp_path / "more.yaml"
    folder.mkdir()
    (folder / "mine.yaml").write_text(MINE.replace("NAME", "mine"))
    file.write_text(MINE.replace("NAME", "more"))
    with collector(database_url, "-f", str(folder), "-f", str(file)) as served:
        shown = eventually(lambda: samples(served, c.SLO_SLI), "objectives on /metrics")
        assert shown == {("mine", "vision"): 0.5, ("more", "vision"): 0.5}
        # What the rules of an alert policy read, and miss where it is not there.
        assert samples(served, c.SLO_BURN_RATE) == dict.fromkeys(shown, 5.0)
        told = served.get("/api/v1/slos").json()["objectives"]
        assert [(each["name"], each["bad"]) for each in told] == [("mine", 1), ("more", 1)]


def test_a_mistake_in_a_file_keeps_the_collector_from_starting(tmp_path: Path) -> None:
    file, database = tmp_path / "mine.yaml", tmp_path / "runs.db"
    file.write_text(MINE.replace("NAME", "mine").replace("target: 0.9", "target: 1"))
    done = CliRunner().invoke(main, ["collector", "serve", "--db", str(database), "-f", str(file)])
    message = "spec.objectives[0].target: found 1, expected a number below 1"
    assert (done.exit_code, done.stderr) == (1, f"{file}:15: {message}\nError: 1 problem found\n")
    assert not database.exists()
