"""How an HTTP connection ends before its answers: uvicorn's protocol, where several are waited for."""

from __future__ import annotations

from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class HttpConnection(HttpToolsProtocol):
    """Tells every request that nobody waits for its answer any more.

    uvicorn tells the newest only. Of a client that had sent several at once, an older one is under way; it goes
    on to write, and uvloop, unlike asyncio, raises when the connection is gone.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._unanswered: deque[RequestResponseCycle] = deque()

    def on_headers_complete(self) -> None:
        """Note a request."""
        super().on_headers_complete()
        self._unanswered.append(self.cycle)

    def on_response_complete(self) -> None:
        """Forget the request that was answered: that is the oldest."""
        self._unanswered.popleft()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests."""
        for request in self._unanswered:
            request.disconnected = True
            request.message_event.set()
        super().connection_lost(exc)
