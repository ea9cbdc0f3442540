"""`make lint` looks for known vulnerabilities where it can, and goes on where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.clean_environment import ROOT
from tests.faulty_servers import unused_endpoint


@contextmanager
def vulnerabilities(known: dict[str, str]) -> Iterator[str]:
    """Serve OSV's API, https://google.github.io/osv.dev/post-v1-query/: ids of what is wrong, by package."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = asked["package"]["name"]
            found = {"vulns": [vulnerability(name, known[name])]} if name in known else {}
            reply = json.dumps(found).encode()
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def vulnerability(package: str, name: str) -> dict[str, object]:
    return {
        "id": name,
        "summary": "made up",
        "affected": [
            {
                "package": {"name": package, "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}],
            }
        ],
    }


def audit(service: str, folder: Path) -> subprocess.CompletedProcess[str]:
    requirements = folder / "requirements.txt"
    requirements.write_text("click==8.1.0\nrich==13.0.0\n")
    options = ("--vulnerability-service", "osv", "--osv-url", service)
    only_these = ("--requirement", str(requirements), "--no-deps", "--disable-pip")
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit-dependencies"), *options, *only_these],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_known_vulnerability_fails_and_says_what_mends_it(tmp_path: Path) -> None:
    with vulnerabilities({"click": "PYSEC-0000-1"}) as service:
        done = audit(service, tmp_path)
    assert done.returncode == 1
    assert done.stderr == "click 8.1.0: PYSEC-0000-1, fixed in 999\n"


def test_without_one_nothing_is_said(tmp_path: Path) -> None:
    with vulnerabilities({}) as service:
        done = audit(service, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_index_does_not_know_is_not_called_harmless(tmp_path: Path) -> None:
    # Only PyPI itself can say so, and a test cannot be PyPI: what pip-audit prints then, word for word.
    reason = "Dependency not found on PyPI and could not be audited: torch (2.13.0+cpu)"
    found = {"dependencies": [{"name": "torch", "skip_reason": reason}, {"name": "click", "vulns": []}]}
    (tmp_path / "pip_audit.py").write_text(f"print({json.dumps(found)!r})")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit-dependencies")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stderr == "dependencies not audited: 1 of 2 are not known to the index (torch)\n"


def test_offline_one_line_says_so_and_lint_goes_on(tmp_path: Path) -> None:
    done = audit(f"{unused_endpoint()}/v1/query", tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("dependencies not audited: ")
    assert len(done.stderr.splitlines()) == 1
