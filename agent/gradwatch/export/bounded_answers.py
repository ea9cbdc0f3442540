"""HTTP answers that are whole within the request's time-out, however slowly they trickle in.

``requests`` and urllib3 bound the waiting for each read of the socket only: a receiver that sends a byte a
second would hold its sender for hours.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

_LEAST_SECONDS: Final = 0.001


def mount(session: requests.Session) -> None:
    """Have the session's answers bounded: head and body together take no longer than its read time-out."""
    adapter = _Adapter()
    session.mount("http://", adapter)
    session.mount("https://", adapter)


class _BoundedReads(io.RawIOBase):
    """Reads of a socket that share the time-out which one of them has."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reads = connection.makefile("rb", buffering=0)
        seconds = connection.gettimeout()
        self._until = None if seconds is None else time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._until is not None and self._connection.fileno() >= 0:
            self._connection.settimeout(max(_LEAST_SECONDS, self._until - time.monotonic()))
        return self._reads.readinto(buffer)

    def close(self) -> None:
        self._reads.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_BoundedReads(sock))


class _Connection(HTTPConnection):
    response_class = _Answer


class _TLSConnection(HTTPSConnection):
    response_class = _Answer


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


_POOLS: Final = {"http": _Pool, "https": _TLSPool}


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager
