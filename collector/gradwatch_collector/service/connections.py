"""How an HTTP connection ends before its answers: uvicorn's protocol, with what it leaves open."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# The parser joins the pieces of a line, which takes time with the square of its length, and asks for no limit.
_MOST_HEAD: Final = 64 << 10
# Of a connection's first head. Between requests uvicorn's own patience is shorter.
_HEAD_SECONDS: Final = 30.0
_TOO_LONG: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


class HttpConnection(HttpToolsProtocol):
    """Reads heads of bounded length, and tells every request that nobody waits for its answer any more.

    uvicorn tells the newest only. Of a client that had sent several at once, an older one is under way; it goes
    on to write, and uvloop, unlike asyncio, raises when the connection is gone.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._unfinished = 0  # bytes received since anything of a request was whole
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for a head, but not for ever."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Read on, unless it is a head (or a trailer) that does not end."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > _MOST_HEAD and not self.transport.is_closing():
            self.transport.write(_TOO_LONG)
            self.transport.close()

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        self._unfinished = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note a request."""
        self._unfinished = 0
        if self._patience is not None:
            self._patience.cancel()
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Note that a body goes on."""
        self._unfinished = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Forget the request that was answered: that is the oldest."""
        self._unanswered.popleft()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests."""
        if self._patience is not None:
            self._patience.cancel()
        for request in self._unanswered:
            request.disconnected = True
            request.message_event.set()
        super().connection_lost(exc)
