"""What may stand in front of collectors and of their database: a load balancer, and PgBouncer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from sqlalchemy import make_url

from gradwatch_collector.service.lease import Lease, LeaseLostError
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.database import transaction
from tests.collector_process import collector, eventually, free_port
from tests.crowd import LATER_BEHIND_A_PROXY, Crowd, lost_and_twice

# As docs/scaling.md has it.
HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 65s
    timeout server 65s
    option redispatch
frontend otlp
    bind 127.0.0.1:{port}
    default_backend collectors
backend collectors
    balance leastconn
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host localhost
    default-server check inter 500ms fall 1 rise 1
    server one 127.0.0.1:{one}
    server two 127.0.0.1:{two}
"""
PGBOUNCER = """
[databases]
* = host={socket} port={server_port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 100
"""


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"not installed: {command[0]} (Debian package)")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.terminate()


def test_behind_a_load_balancer_either_collector_may_die(
    new_database: Callable[[str], str], tmp_path: Path
) -> None:
    database = new_database("postgresql")
    port, one, two = free_port(), free_port(), free_port()
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(HAPROXY.format(port=port, one=one, two=two))
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{url}/readyz", timeout=5).status_code == 200
        return False

    with contextlib.ExitStack() as stack:
        stack.enter_context(process("haproxy", "-db", "-f", str(configuration)))
        running = [stack.enter_context(collector(database, "--listen", f"127.0.0.1:{at}")) for at in (one, two)]
        eventually(answers, "the load balancer to answer")
        crowd = Crowd(url, count=6, later=LATER_BEHIND_A_PROXY)
        try:
            for killed in running:
                crowd.await_more(20)
                killed.process.send_signal(signal.SIGKILL)
                killed.process.wait()
                crowd.await_more(20)
                address = killed.url.removeprefix("http://")
                stack.enter_context(collector(database, "--listen", address))
                time.sleep(1)  # until the load balancer has looked
            crowd.finish()
        finally:
            crowd.give_up()
    assert lost_and_twice(database, crowd.sent) == (0, 0)


@pytest.fixture
def pooled(new_database: Callable[[str], str]) -> Iterator[str]:
    """URL of a database by way of PgBouncer, which gives each transaction whatever session is free."""
    direct = make_url(new_database("postgresql"))
    port = free_port()
    # It refuses to run as root, and must reach the server's socket: it runs as the user whose server it is.
    user = ["-u", "pgserver"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder).chmod(0o755)
        configuration = Path(folder) / "pgbouncer.ini"
        configuration.write_text(
            PGBOUNCER.format(
                socket=direct.query.get("host", direct.host),
                server_port=direct.port or 5432,
                user=direct.username,
                port=port,
            )
        )
        stack.enter_context(process("pgbouncer", *user, str(configuration)))
        url = f"postgresql://{direct.username}@127.0.0.1:{port}/{direct.database}"

        def answers() -> bool:
            with contextlib.suppress(db.DatabaseError):
                db.connect(url).dispose()
                return True
            return False

        eventually(answers, "PgBouncer to answer")
        yield url


def test_collectors_work_behind_pgbouncer(pooled: str) -> None:
    with collector(pooled) as one, collector(pooled) as other:
        crowd = Crowd(one.url, other.url, count=6)
        try:
            crowd.await_more(50)
            crowd.finish()
        finally:
            crowd.give_up()
        assert {run["status"] for run in other.runs().values()} == {"running"}
    assert lost_and_twice(pooled, crowd.sent) == (0, 0)


def test_a_lease_holds_behind_pgbouncer(pooled: str) -> None:
    engine = db.connect(pooled)
    one, other = Lease(engine, seconds=0.5), Lease(engine)
    assert (one.acquire(), other.acquire()) == (True, False)
    with one.transaction():
        assert not other.acquire()
    time.sleep(0.6)
    assert other.acquire()
    with pytest.raises(LeaseLostError), one.transaction():
        pass
    with transaction(engine) as connection:
        # What was set for one transaction is not there in another client's.
        connection.exec_driver_sql("SET LOCAL statement_timeout = '7s'")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "0"
    engine.dispose()


def test_migrations_run_behind_pgbouncer(pooled: str) -> None:
    engine = db.connect(pooled)
    db.downgrade(engine, "base")
    assert db.upgrade(engine)
    engine.dispose()
