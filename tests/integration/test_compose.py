"""`compose.yaml`: everything it starts, started here from the files it mounts, and wired as it says.

There is no container engine in the tests. Each command line is run by the real server, or parsed by the command
itself, with container paths in place of a folder that is laid out as the container's would be.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
import requests
import yaml

from gradwatch.cli import main
from tests.collector_process import Collector, collector, free_port, train
from tests.prometheus_servers import get_json, needs_prometheus, running, wait_for

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROVISIONING = ROOT / "dashboards" / "provisioning"
# Where a server listens unless told.
DEFAULT_PORTS = {"postgres": 5432, "prometheus": 9090, "alertmanager": 9093, "grafana": 3000}

TRAINING = """
import torch, gradwatch

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
gradwatch.watch(model, optimizer)
for _ in range(20):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
"""

each_service = pytest.mark.parametrize("name", SERVICES)


def mounts(name: str) -> dict[str, str]:
    """Container path -> what is mounted there."""
    return {
        target: source for source, target, *_ in (each.split(":") for each in SERVICES[name].get("volumes", ()))
    }


def files(name: str) -> dict[str, Path]:
    return {target: ROOT / source for target, source in mounts(name).items() if source.startswith("./")}


def on_host(name: str, path: str) -> Path:
    """The file of the repository that a path in a container is."""
    for target, source in files(name).items():
        if path == target or path.startswith(f"{target}/"):
            return source / path.removeprefix(target).lstrip("/")
    raise AssertionError(f"nothing is mounted at {path} of {name}")


def laid_out(name: str, root: Path) -> list[str]:
    """The service's command with its container's paths below ``root``, where its files are."""
    for target, source in files(name).items():
        place = root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place)
    return [re.sub(r"=/", f"={root}/", each) for each in SERVICES[name]["command"]]


def listens_at(name: str) -> set[int]:
    told = re.findall(r"--(?:listen|grpc)=\S+:(\d+)", " ".join(SERVICES[name].get("command", ())))
    return {int(port) for port in told} or {DEFAULT_PORTS[name]}


def check_address(host: str | None, port: int | None) -> None:
    assert host in SERVICES
    assert port in listens_at(host)


def without_defaults(text: str) -> str:
    """A setting as it is unless the environment says otherwise."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


# --- Names, paths, ports -------------------------------------------------------------------------------


@each_service
def test_what_is_mounted_is_there_and_read_only_or_a_volume(name: str) -> None:
    for each in SERVICES[name].get("volumes", ()):
        source, _, *mode = each.split(":")
        if source.startswith("./"):
            assert (ROOT / source).exists()
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


@each_service
def test_every_path_that_a_command_line_or_a_setting_names_is_mounted(name: str) -> None:
    service = SERVICES[name]
    told = [*service.get("command", ()), *service.get("environment", {}).values()]
    for path in {found for each in told for found in re.findall(r"(?<![\w/:])/etc/gradwatch/[\w./-]+", each)}:
        assert on_host(name, path).exists(), path


@each_service
def test_nothing_can_be_connected_to_but_from_this_machine_and_at_the_usual_port(name: str) -> None:
    for published in SERVICES[name].get("ports", ()):
        address, outside, inside = published.rsplit(":", 2)
        assert (address, outside) == ("127.0.0.1", inside)
        assert int(inside) in listens_at(name)


@each_service
def test_a_service_waits_for_what_there_is_to_wait_for(name: str) -> None:
    for other, wanted in SERVICES[name].get("depends_on", {}).items():
        if wanted["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert wanted["condition"] == "service_completed_successfully"
            assert "restart" not in SERVICES[other]


@each_service
def test_an_image_is_built_here_or_pinned(name: str) -> None:
    service = SERVICES[name]
    assert service.get("build") == "." or re.search(r":v?\d", service["image"])


def test_all_log_in_to_the_database_that_there_is() -> None:
    postgres = {key: without_defaults(value) for key, value in SERVICES["postgres"]["environment"].items()}
    urls = [SERVICES[name]["environment"]["GRADWATCH_DB"] for name in ("migrate", "collector")]
    for url in map(urlsplit, map(without_defaults, [*urls, SERVICES["reader"]["command"][-1]])):
        check_address(url.hostname, url.port)
        assert (url.username, url.password) == (postgres["POSTGRES_USER"], postgres["POSTGRES_PASSWORD"])
        assert url.path == f"/{postgres['POSTGRES_DB']}"


# --- The collector -------------------------------------------------------------------------------------


def parsed(arguments: list[str]) -> click.Context:
    """The innermost command's context: its options, read and checked, and nothing done."""
    context, command = click.Context(main), main
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments[0])
        assert found is not None, arguments[0]
        command, arguments = found, arguments[1:]  # type: ignore[assignment]
    return command.make_context(command.name, list(arguments), parent=context)


@contextmanager
def composed(folder: Path) -> Iterator[Collector]:
    """The collector as it is composed, but for where it listens and stores."""
    _, _, *options = laid_out("collector", folder)
    kept = [each for each in options if not each.startswith(("--listen", "--grpc"))]
    with collector(f"sqlite:///{folder}/gradwatch.db", *kept) as serving:
        yield serving


@pytest.mark.parametrize("name", ["migrate", "collector"])
def test_gradwatch_takes_its_command_lines(name: str, tmp_path: Path) -> None:
    assert parsed(laid_out(name, tmp_path)).info_name in SERVICES[name]["command"]


def test_prometheus_may_ask_the_collector_by_its_name_and_nobody_by_another(tmp_path: Path) -> None:
    with composed(tmp_path) as serving:
        answer = {
            host: requests.get(f"{serving.url}/metrics", headers={"Host": host}, timeout=10).status_code
            for host in ("collector:4318", "127.0.0.1:4318", "localhost:4318", "evil.example:4318")
        }
    assert answer == {
        "collector:4318": 200, "127.0.0.1:4318": 200, "localhost:4318": 200, "evil.example:4318": 421,
    }  # fmt: skip


def test_what_an_epoch_costs_is_known_of_a_run_that_ended(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING, encoding="utf-8")
    with composed(tmp_path) as serving:
        training = train(script, serving, GRADWATCH_RUN_ID="run")
        _, errors = training.communicate(timeout=120)
        assert training.returncode == 0, errors
        with closing(sqlite3.connect(tmp_path / "gradwatch.db")) as database:
            wait_for(lambda: database.execute("SELECT 1 FROM run_summary").fetchone(), what="a summary")
            (cost,) = database.execute("SELECT step_cost FROM run_summary").fetchone()
    assert cost > 0


def test_the_collector_listens_beyond_its_container_without_tokens_only_because_it_says_so(
    tmp_path: Path,
) -> None:
    options = parsed(laid_out("collector", tmp_path)).params
    assert (options["address"], options["grpc_address"]) == ("0.0.0.0:4318", "0.0.0.0:4317")
    assert options["allow_anonymous"] is True


def test_its_image_is_built_from_what_is_there(tmp_path: Path) -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in line.split()
    ]
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    for source in copied:
        assert f"!{source}" in ignored
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, tmp_path / source)
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (pattern,) = re.findall(r"/wheels/(\S+\.whl)\)\[collector\]", DOCKERFILE)
    assert fnmatch(wheel.name, pattern)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[0]) == [*project["scripts"]]
    assert {int(port) for port in re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)[0].split()} == {
        4317,
        4318,
    }


# --- Prometheus and Alertmanager -----------------------------------------------------------------------


@pytest.mark.prometheus
@needs_prometheus
def test_prometheus_starts_with_the_rules_and_asks_the_collector(tmp_path: Path) -> None:
    command, listen = laid_out("prometheus", tmp_path), f"127.0.0.1:{free_port()}"
    configuration = next(each.partition("=")[2] for each in command if each.startswith("--config.file"))
    checked = subprocess.run(["promtool", "check", "config", configuration], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    started = ["prometheus", *command, f"--web.listen-address={listen}"]
    with running(started, ready=f"http://{listen}/-/ready", log=tmp_path / "log"):
        rules = get_json(f"http://{listen}/api/v1/rules")["data"]["groups"]
        targets = wait_for(
            lambda: get_json(f"http://{listen}/api/v1/targets")["data"]["activeTargets"], what="a target"
        )
    assert {rule["name"] for group in rules for rule in group["rules"]} >= {"GradwatchRunFailed"}
    assert [target["discoveredLabels"]["__address__"] for target in targets] == ["collector:4318"]


def test_prometheus_is_configured_as_without_containers_but_for_addresses() -> None:
    def configured(path: str) -> str:
        return json.dumps(yaml.safe_load((ROOT / path).read_text("utf-8")))

    renamed = configured("deploy/prometheus.yaml")
    for host, port in re.findall(r"([a-z]+):(\d+)", renamed):
        check_address(host, int(port))
    assert re.sub(r"(?:collector|alertmanager):", "127.0.0.1:", renamed) == configured("alerts/prometheus.yaml")


@pytest.mark.prometheus
@needs_prometheus
def test_alertmanager_starts_with_the_shipped_routes(tmp_path: Path) -> None:
    command, listen = laid_out("alertmanager", tmp_path), f"127.0.0.1:{free_port()}"
    configuration = next(each.partition("=")[2] for each in command if each.startswith("--config.file"))
    checked = subprocess.run(["amtool", "check-config", configuration], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    started = ["prometheus-alertmanager", *command, f"--web.listen-address={listen}"]
    with running(started, ready=f"http://{listen}/-/ready", log=tmp_path / "log"):
        receivers = get_json(f"http://{listen}/api/v2/receivers")
    assert "ml-sre-page" in {receiver["name"] for receiver in receivers}


# --- Grafana -------------------------------------------------------------------------------------------


def provisioned(kind: str) -> Any:
    """What Grafana reads of a provisioning file in its container."""
    environment = {key: without_defaults(value) for key, value in SERVICES["grafana"]["environment"].items()}
    text = (PROVISIONING / kind / "gradwatch.yaml").read_text("utf-8")
    known = re.sub(r"\$(GRADWATCH_\w+)", lambda name: environment[name[1]], text)
    return yaml.safe_load(known)[{"datasources": "datasources", "dashboards": "providers"}[kind]]


def test_grafana_is_provisioned_by_the_one_folder_that_is_mounted() -> None:
    assert len(files("grafana")) == 1
    environment = SERVICES["grafana"]["environment"]
    assert on_host("grafana", environment["GF_PATHS_PROVISIONING"]) == PROVISIONING
    (provider,) = provisioned("dashboards")
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    assert on_host("grafana", provider["options"]["path"]) == ROOT / "dashboards" / "grafana"
    assert on_host("grafana", environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).is_file()


def test_grafana_asks_prometheus_as_often_as_that_scrapes() -> None:
    source, _ = provisioned("datasources")
    assert source["type"] == "prometheus"
    url = urlsplit(source["url"])
    check_address(url.hostname, url.port)
    scrape = yaml.safe_load((ROOT / "alerts" / "prometheus.yaml").read_text("utf-8"))["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]


def test_grafana_logs_in_to_postgresql_as_the_role_that_only_reads() -> None:
    _, source = provisioned("datasources")
    assert source["type"] == "grafana-postgresql-datasource"
    host, _, port = source["url"].partition(":")
    check_address(host, int(port))
    assert source["jsonData"]["database"] == SERVICES["postgres"]["environment"]["POSTGRES_DB"]
    assert f"CREATE ROLE {source['user']} LOGIN" in (ROOT / "dashboards" / "reader.sql").read_text("utf-8")
    told = [without_defaults(each) for each in SERVICES["reader"]["command"]]
    assert f"--set=password={source['secureJsonData']['password']}" in told


def test_links_between_what_is_started_lead_to_what_is_published() -> None:
    published = {each for service in SERVICES.values() for each in service.get("ports", ())}
    dashboard = json.loads((ROOT / "dashboards" / "grafana" / "gradwatch-run.json").read_text("utf-8"))
    constants = {v["name"]: v["query"] for v in dashboard["templating"]["list"] if v["type"] == "constant"}
    rules = (ROOT / "alerts" / "rules" / "gradwatch.rules.yaml").read_text("utf-8")
    grafana = re.findall(r"dashboard_url: (http://[^/]+)/d/", rules)
    for url in map(urlsplit, {constants["collector"], *grafana}):
        assert f"{url.hostname}:{url.port}:{url.port}" in published
