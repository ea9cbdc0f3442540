"""A receiver that hands what it gets to several collectors, so that one process is seen by all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

_PATIENCE_SECONDS = 60.0


@contextmanager
def tee(urls: Sequence[str]) -> Iterator[str]:
    """Base URL of a receiver on a free loopback port; it answers as the worst-off of those collectors does."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {
                name: value for name, value in self.headers.items() if name.lower().startswith("content-")
            }

            def hand_over(url: str) -> requests.Response:
                return requests.post(url + self.path, body, headers=headers, timeout=_PATIENCE_SECONDS)

            answer = max(senders.map(hand_over, urls), key=lambda each: each.status_code)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Who is killed does not wait for the answer."""

    with ThreadPoolExecutor(32) as senders, Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
