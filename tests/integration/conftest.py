"""Running collectors that tests share, and OTLP clients of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.collector_process import Collector, collector
from tests.otlp_clients import CLIENTS, Client

_BACKENDS = (pytest.param("sqlite", id="sqlite"), pytest.param("postgresql", marks=pytest.mark.postgresql))


@pytest.fixture(scope="session")
def collectors(
    request: pytest.FixtureRequest, template: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Collector]]:
    """The collector on a kind of database, gRPC included. Tests share it, so their senders need own names."""
    running: dict[str, Collector] = {}
    with contextlib.ExitStack() as stack:

        def of(kind: str) -> Collector:
            if kind not in running:
                if kind == "postgresql":
                    url = request.getfixturevalue("new_postgresql")(template(kind))
                else:
                    url = f"sqlite:///{tmp_path_factory.mktemp('served')}/gradwatch.db"
                # What tests send is of any year: none of it is to be pruned meanwhile.
                kept = ("--keep-raw", "forever", "--keep-rollups", "forever")
                running[kind] = stack.enter_context(collector(url, "--grpc", "127.0.0.1:0", *kept))
            return running[kind]

        yield of


@pytest.fixture(params=_BACKENDS)
def served(request: pytest.FixtureRequest, collectors: Callable[[str], Collector]) -> Collector:
    """A running collector, once on SQLite and once on PostgreSQL."""
    return collectors(request.param)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, served: Collector) -> Iterator[Client]:
    """An OTLP client of `served`, once for each transport."""
    with CLIENTS[request.param](served.url, served.grpc) as connected:
        yield connected
