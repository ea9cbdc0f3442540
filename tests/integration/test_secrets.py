"""Nothing that anybody could get in with is printed or logged, whatever goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import requests
from sqlalchemy import make_url, text

from gradwatch_collector.service.logs import FORMATS
from gradwatch_collector.storage import database as db
from tests.collector_process import collector, eventually, gradwatch

PASSWORD = "hunter2-in-the-url"
WRONG = "gw_" + "wrong" * 8
BASIC = "dXNlcjpodW50ZXIzCg=="


@pytest.mark.postgresql
@pytest.mark.parametrize("form", FORMATS)
def test_no_output_holds_a_token_or_a_password(
    new_database: Callable[[str], str], form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # The test's own server trusts everybody on its socket: any password opens it.
    url = make_url(new_database("postgresql")).set(password=PASSWORD).render_as_string(hide_password=False)
    token = gradwatch("token", "create", "ci", "--role", "admin", "--db", url).stdout.strip()
    assert token.startswith("gw_")
    done = [
        gradwatch(*command, "--db", url)
        for command in (
            ("token", "list"),
            ("token", "create", "ci"),
            ("audit", "list"),
            ("db", "status"),
            ("db", "upgrade"),
            ("collector", "serve", "--listen", "192.0.2.1:4318"),
        )
    ]
    away = make_url(url).set(host="127.0.0.1", port=1, query={}).render_as_string(hide_password=False)
    done.append(gradwatch("collector", "serve", "--db", away))
    done.append(gradwatch("collector", "serve", "--db", f"{away}?password={PASSWORD}"))
    with collector(url, "--require-token", "--log-format", form) as running:
        for authorization in (f"Bearer {token}", f"Bearer {WRONG}", f"Basic {BASIC}", token):
            for path in ("/api/v1/runs", "/metrics", "/v1/metrics", f"/api/v1/runs/{token}?token={token}"):
                headers = {"Authorization": authorization, "Content-Type": "application/x-protobuf"}
                running.get(path, headers=headers)
                requests.post(running.url + path, headers=headers, data=b"\xff" + token.encode(), timeout=10)
        # From here on everything that reads or writes fails.
        engine = db.connect(url)
        with db.transaction(engine) as connection:
            connection.execute(text("ALTER TABLE run RENAME TO gone"))
        engine.dispose()
        running.get("/api/v1/runs", headers={"Authorization": f"Bearer {token}"})
        logged = ""

        def failed() -> bool:
            nonlocal logged
            logged += capfd.readouterr().err
            return "evaluation waits for the database" in logged and "cannot read" in logged

        eventually(failed, "the failures to be logged")
        running.process.terminate()
        assert running.process.stdout is not None
        printed = running.process.stdout.read()
    logged += capfd.readouterr().err
    if form == "json":
        assert all(json.loads(line)["level"] for line in logged.splitlines())
    outputs = [printed, logged, *(each.stdout + each.stderr for each in done)]
    assert all(each.stdout or each.stderr for each in done)
    for secret in (token, token.removeprefix("gw_"), PASSWORD, WRONG, BASIC):
        assert not [output for output in outputs if secret in output]
