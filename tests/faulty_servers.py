"""Receivers that misbehave, on real sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Behaviour = Callable[[socket.socket, threading.Event], None]


def silent(_connection: socket.socket, stopped: threading.Event) -> None:
    """Accept, and never answer."""
    stopped.wait()


def resetting(connection: socket.socket, _stopped: threading.Event) -> None:
    """Reset at once."""
    _reset(connection)


def resetting_in_the_middle(connection: socket.socket, _stopped: threading.Event) -> None:
    """Take a little of the request, then reset."""
    connection.recv(16)
    _reset(connection)


def garbage(connection: socket.socket, _stopped: threading.Event) -> None:
    """Answer something that is not HTTP."""
    connection.recv(65536)
    connection.sendall(bytes(range(256)) * 8)


def half_an_answer(connection: socket.socket, _stopped: threading.Event) -> None:
    """Promise a body and hang up."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")


def wrong_body(connection: socket.socket, _stopped: threading.Event) -> None:
    """Say that all is well, with a body that is no protobuf."""
    connection.recv(65536)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nConnection: close\r\n"
    connection.sendall(head + b"Content-Length: 4\r\n\r\n\xff\xff\xff\xff")


def trickling(start: bytes, letters: int, end: bytes = b"") -> Behaviour:
    """Answer five letters a second."""

    def trickle(connection: socket.socket, stopped: threading.Event) -> None:
        connection.recv(65536)
        connection.sendall(start)
        for _ in range(letters):
            if stopped.wait(0.2):
                return
            connection.sendall(b"x")
        connection.sendall(end)

    return trickle


def trickling_head(letters: int) -> Behaviour:
    """Answer that all is well, with a header that goes on and on."""
    return trickling(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Long: ", letters, b"\r\n\r\n")


def trickling_body(letters: int) -> Behaviour:
    """Answer that all is well, with a body that goes on and on."""
    return trickling(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % letters, letters)


def answering(status: int, *headers: str) -> Behaviour:
    """Answer each request with this status and no body."""

    def answer(connection: socket.socket, _stopped: threading.Event) -> None:
        lines = (f"HTTP/1.1 {status} Whatever", "Content-Length: 0", "Connection: close", *headers, "", "")
        received = b""
        while b"\r\n\r\n" not in received:
            part = connection.recv(65536)
            if not part:
                return
            received += part
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0
        )
        while len(body) < length:
            part = connection.recv(65536)
            if not part:
                return
            body += part
        connection.sendall("\r\n".join(lines).encode())

    return answer


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def faulty_server(behave: Behaviour) -> Iterator[str]:
    """Run a server that treats every connection like this; yields its URL."""
    stopped = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            behave(connection, stopped)

    def accept() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        # Closing a listener does not wake who waits in `accept`.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join(5.0)


def unused_endpoint() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def absent() -> Iterator[str]:
    yield unused_endpoint()


@contextmanager
def unknown_host() -> Iterator[str]:
    yield "http://nowhere.invalid:4318"


RECEIVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "absent": absent,
    "host name unknown": unknown_host,
    **{
        name: lambda behave=behave: faulty_server(behave)  # type: ignore[misc]
        for name, behave in {
            "refuses": resetting,
            "accepts and never answers": silent,
            "resets in the middle": resetting_in_the_middle,
            "answers garbage": garbage,
            "trickles its head": trickling_head(1000),
            "trickles its body": trickling_body(1000),
            "answers half": half_an_answer,
            "answers 200 and no protobuf": wrong_body,
            "answers 400": answering(400),
            "answers 401": answering(401),
            "answers 413": answering(413),
            "answers 429 with Retry-After": answering(429, "Retry-After: 30"),
            "answers 500": answering(500),
            "answers 503": answering(503),
            "redirects to itself": answering(307, "Location: /v1/logs"),
        }.items()
    },
}
