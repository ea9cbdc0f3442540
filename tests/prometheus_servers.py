"""Real Prometheus and Alertmanager for tests, with a source of metrics before and a webhook behind them."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import prometheus_client
import pytest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from gradwatch.conventions import Family
from tests.collector_process import free_port

REPOSITORY = Path(__file__).parent.parent
ALERTS = REPOSITORY / "alerts"
T = TypeVar("T")
_BINARIES = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")
_MISSING = [name for name in _BINARIES if shutil.which(name) is None]

needs_prometheus = pytest.mark.skipif(
    bool(_MISSING),
    reason=f"not installed: {', '.join(_MISSING)} (Debian packages prometheus and prometheus-alertmanager)",
)


def wait_for(condition: Callable[[], T], *, seconds: float = 30, what: str = "the condition") -> T:
    """Poll until the condition is true and return its value; fail the test when time is up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)
    return value


def get_json(url: str) -> Any:
    """Fetch a JSON document; the body of an error answer is part of the exception."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code} from {url}: {error.read().decode()}") from error


def answers(url: str) -> bool:
    """Return whether a server answers at the URL without an error."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def running(command: Sequence[str], *, ready: str, log: Path) -> Iterator[None]:
    """Run a server until the block ends; ``ready`` is a URL that answers 200 once it serves."""
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_for(
                lambda: process.poll() is not None or answers(ready), what=f"{command[0]} to answer at {ready}"
            )
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}:\n{log.read_text()}"
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


# --- The source: a /metrics that the test decides -------------------------------------------------------


class MetricsSource(Collector):
    """Gauges of ``conventions`` with the samples a test gives them, served on ``address`` (host:port)."""

    def __init__(self) -> None:
        self._samples: dict[Family, dict[tuple[str, ...], float]] = {}
        self._lock = threading.Lock()
        self.address = ""

    def set(self, family: Family, value: float, **labels: str) -> None:
        """Set one sample; labels that are not given are empty, as the collector has them when unknown."""
        with self._lock:
            self._samples.setdefault(family, {})[_label_values(family, labels)] = value

    def remove(self, family: Family, **labels: str) -> None:
        """Remove one sample."""
        with self._lock:
            del self._samples[family][_label_values(family, labels)]

    def collect(self) -> Iterator[Metric]:
        """Render the samples."""
        with self._lock:
            families = {family: dict(samples) for family, samples in self._samples.items()}
        for family, samples in families.items():
            gauge = GaugeMetricFamily(family.name, family.description, labels=family.labels)
            for labels, value in samples.items():
                gauge.add_metric(labels, value)
            yield gauge


def _label_values(family: Family, labels: Mapping[str, str]) -> tuple[str, ...]:
    unknown = labels.keys() - set(family.labels)
    assert not unknown, f"{family.name} has no label {unknown}"
    return tuple(labels.get(name, "") for name in family.labels)


@contextmanager
def metrics_source() -> Iterator[MetricsSource]:
    """Serve a :class:`MetricsSource` on a free loopback port."""
    source = MetricsSource()
    registry = CollectorRegistry()
    registry.register(source)
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    source.address = f"127.0.0.1:{server.server_port}"
    try:
        yield source
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


# --- The far end: who gets the notifications -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Notification:
    """One alert in one delivery: who got it, whether it fires or is resolved, what it says, and when it came.

    ``at``: Unix seconds.
    """

    receiver: str
    status: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    at: float


class WebhookReceiver:
    """Keeps what Alertmanager delivers to ``url``/NAME, in order of arrival."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._deliveries: list[tuple[str, Any, float]] = []

    def deliver(self, receiver: str, body: bytes) -> None:
        """Take one delivery, of Alertmanager's webhook format or of a chat's."""
        self._deliveries.append((receiver, json.loads(body), time.time()))

    def bodies(self, receiver: str) -> list[Any]:
        """Return the deliveries to one receiver as they came."""
        return [body for to, body, _ in tuple(self._deliveries) if to == receiver]

    @property
    def _notifications(self) -> list[Notification]:
        return [
            Notification(receiver, alert["status"], alert["labels"], alert["annotations"], at)
            for receiver, body, at in tuple(self._deliveries)
            for alert in body.get("alerts", ())
        ]

    def got(self, receiver: str, status: str | None = None, **labels: str) -> list[Notification]:
        """Return what a receiver got so far, of one status and with these labels if given.

        ``page`` and ``ticket`` are those of all owners together.
        """
        return [
            n
            for n in self._notifications
            if f"-{n.receiver}".endswith(f"-{receiver}")
            and status in (None, n.status)
            and labels.items() <= n.labels.items()
        ]


@contextmanager
def webhook_receiver() -> Iterator[WebhookReceiver]:
    """Serve a :class:`WebhookReceiver` on a free loopback port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.deliver(self.path.strip("/"), self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = WebhookReceiver(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join(timeout=10)


# --- The servers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configuration:
    """A copy of the shipped ``alerts/`` with this test's addresses in it."""

    folder: Path

    @classmethod
    def shipped(
        cls,
        folder: Path,
        *,
        collector: str,
        alertmanager: str = "127.0.0.1:9093",
        webhook: str = "http://127.0.0.1:9095",
        changes: Mapping[str, str] | None = None,
    ) -> Configuration:
        """Copy ``alerts/`` to ``folder/alerts``, replacing addresses and whatever ``changes`` says."""
        target = folder / "alerts"
        shutil.copytree(ALERTS, target, ignore=shutil.ignore_patterns("__pycache__"))
        replacements = {
            "127.0.0.1:4318": collector,
            "127.0.0.1:9093": alertmanager,
            "http://127.0.0.1:9095": webhook,
            **(changes or {}),
        }
        files = [target / "prometheus.yaml", target / "alertmanager.yaml", *(target / "rules").glob("*.yaml")]
        texts = {path: path.read_text(encoding="utf-8") for path in files}
        for old, new in replacements.items():
            assert any(old in text for text in texts.values()), f"the shipped configuration has no {old!r}"
            texts = {path: text.replace(old, new) for path, text in texts.items()}
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return cls(target)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus at ``url``."""

    url: str

    def query(self, expr: str, *, at: float | None = None) -> list[dict[str, Any]]:
        """Evaluate an instant query, now or at a Unix time in seconds."""
        return self._result("query", query=expr, **({} if at is None else {"time": f"{at}"}))

    def wait_for_series(self, expr: str) -> None:
        """Wait until an expression has a result."""
        wait_for(lambda: self.query(expr), seconds=90, what=expr)

    def query_range(self, expr: str, *, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Evaluate a range query; times in Unix seconds."""
        return self._result("query_range", query=expr, start=f"{start}", end=f"{end}", step=f"{step}")

    def _result(self, path: str, **parameters: str) -> list[dict[str, Any]]:
        answer = get_json(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def series_labels(self, selector: str) -> list[dict[str, str]]:
        """Return the label sets that match a selector."""
        answer = get_json(f"{self.url}/api/v1/series?{urllib.parse.urlencode({'match[]': selector})}")
        labels: list[dict[str, str]] = answer["data"]
        return labels

    def wait_for_alertmanager(self) -> None:
        """Wait until it knows an Alertmanager: what fires before is sent again only after a minute."""
        wait_for(
            lambda: get_json(f"{self.url}/api/v1/alertmanagers")["data"]["activeAlertmanagers"],
            what="Prometheus to find Alertmanager",
        )

    def wait_for_evaluations(self, count: int) -> None:
        """Wait until every rule group has been evaluated so many times more."""
        seen: dict[str, set[str]] = {}

        def all_evaluated() -> bool:
            for group in get_json(f"{self.url}/api/v1/rules")["data"]["groups"]:
                seen.setdefault(group["name"], set()).add(group["lastEvaluation"])
            return bool(seen) and all(len(times) > count for times in seen.values())

        wait_for(all_evaluated, seconds=60, what=f"{count} evaluations of the rules")


@contextmanager
def prometheus(configuration: Configuration, data: Path, *options: str) -> Iterator[Prometheus]:
    """Run Prometheus on a free loopback port, with its storage below ``data``; SIGTERM ends it."""
    listen = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={configuration.folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={data / 'prometheus'}",
        f"--web.listen-address={listen}",
        *options,
    ]
    with running(command, ready=f"http://{listen}/-/ready", log=data / "prometheus.log"):
        yield Prometheus(f"http://{listen}")


@contextmanager
def alertmanager(configuration: Configuration, data: Path, listen: str) -> Iterator[str]:
    """Run Alertmanager at ``listen`` (host:port) and give its URL; SIGTERM ends it."""
    command = [
        "prometheus-alertmanager",
        f"--config.file={configuration.folder / 'alertmanager.yaml'}",
        f"--storage.path={data / 'alertmanager'}",
        f"--web.listen-address={listen}",
        "--cluster.listen-address=",
    ]
    with running(command, ready=f"http://{listen}/-/ready", log=data / "alertmanager.log"):
        yield f"http://{listen}"
