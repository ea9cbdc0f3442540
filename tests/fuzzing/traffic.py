"""Spoiled requests as they are sent, over HTTP and gRPC, and whether the answers are ones that OTLP knows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import grpc
from google.protobuf import json_format
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tests.fuzzing.mutations import spoil_message, spoil_text, spoil_tree, spoil_wire
from tests.fuzzing.samples import samples
from tests.otlp_clients import RESPONSES, SERVICES, otlp_json

PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"
# Hundreds of runs, so that the requests of one meet each other.
_RUNS: Final = 300
# Of a hundred requests, so many are spoiled as messages only, and so many in how HTTP carries them.
_MESSAGES_ONLY: Final = 60
_TRANSPORTS: Final = 8
_CONTENT_TYPES: Final = (
    *(
        f"{PROTOBUF}; charset=utf-8",
        "APPLICATION/X-PROTOBUF",
        "application/json;charset=utf-16",
        "",
        "text/plain",
    ),
    *(
        "application/grpc",
        "*/*",
        "application/x-protobuf, application/json",
        "\xe9\xff",
        ";" * 300,
        "application/json\t",
    ),
)
_ENCODINGS: Final = ("gzip", "GZIP", "deflate", "br", "gzip, gzip", "identity", "", "\xff", "x" * 5_000)
_METHODS: Final = ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND")
_PATHS: Final = (
    "/v1/metrics/",
    "/v1/",
    "/v1/metrics?x=%00",
    "/V1/METRICS",
    "//v1/logs",
    "/v1/logs/../traces",
    "/%ff",
)
_LINES: Final = (
    *(
        "Host: evil.example",
        "Host: [::1",
        "Content-Length: -1",
        "Content-Length: 1e3",
        "Transfer-Encoding: gzip",
    ),
    *(
        "X: " + "y" * 60_000,
        "Authorization: Bearer \xff",
        "Origin: null",
        "Expect: 100-continue",
        "Upgrade: websocket",
    ),
    *(
        "Connection: Upgrade, HTTP2-Settings",
        "no colon",
        ": nameless",
        "Traceparent: 00-0-0-0",
        "Range: bytes=-1",
    ),
)


@dataclass(frozen=True)
class Request:
    """One request. ``kind``: the protobuf class that it was made from; ``body``: the message as it is carried.

    ``media_type``: what it says it is, empty over gRPC. ``lines``: the head of an HTTP request. ``sound``: it
    is HTTP, whatever is in it, so that one answer comes and the connection goes on.
    """

    kind: Any
    body: bytes
    media_type: str = ""
    lines: Sequence[str] = ()
    sound: bool = True
    compressed: bool = False

    @property
    def wire(self) -> bytes:
        """All bytes of an HTTP request."""
        return "\r\n".join((*self.lines, "", "")).encode("latin-1") + self.body


@dataclass
class Spoiler:
    """Makes spoiled requests, around a time in Unix nanoseconds; the same ones for the same ``dice``."""

    dice: Random
    time: int
    _encoded: dict[Any, list[bytes]] = field(init=False, default_factory=dict)
    _texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._samples = samples("fuzz-0", self.time)
        for sample in self._samples:
            self._encoded.setdefault(type(sample), []).append(sample.SerializeToString())
        self._texts = [json.dumps(otlp_json(sample)) for sample in self._samples]

    def over_http(self) -> Request:
        """A request over HTTP, three of ten in JSON."""
        index = self.dice.randrange(len(self._samples))
        kind = type(self._samples[index])
        if self.dice.random() < 0.3:
            return self._carried(kind, JSON, self._json(index))
        return self._carried(kind, PROTOBUF, self._protobuf(index))

    def over_grpc(self) -> Request:
        """A request over gRPC, some of them compressed and some only saying so."""
        index = self.dice.randrange(len(self._samples))
        kind, body = type(self._samples[index]), self._protobuf(index)
        if self.dice.random() < 0.05:
            body = self._zipped(body)
        return Request(kind, body, compressed=self.dice.random() < 0.2)

    def _protobuf(self, index: int) -> bytes:
        dice, message = self.dice, deepcopy(self._samples[index])
        how = dice.randrange(100)
        if how < 80:
            spoil_message(dice, message)
        self._name(message)
        encoded: bytes = message.SerializeToString()
        return encoded if how < _MESSAGES_ONLY else spoil_wire(dice, encoded, self._encoded[type(message)])

    def _name(self, message: Any) -> None:
        """Give a sample to one of many runs, where it still names one."""
        for _, owners in message.ListFields():
            for owner in owners:
                for attribute in owner.resource.attributes:
                    if attribute.value.string_value == "fuzz-0":
                        attribute.value.string_value = f"fuzz-{self.dice.randrange(_RUNS)}"

    def _json(self, index: int) -> bytes:
        tree = json.loads(self._texts[index])
        how = self.dice.randrange(100)
        if how < 80:
            spoil_tree(self.dice, tree)
        text = json.dumps(tree, ensure_ascii=self.dice.random() < 0.9).replace(
            '"fuzz-0"', f'"fuzz-{self.dice.randrange(_RUNS)}"'
        )
        if how < _MESSAGES_ONLY:
            return text.encode("utf-8", "surrogatepass")
        return spoil_text(self.dice, text.encode("utf-8", "replace").decode())

    def _zipped(self, body: bytes) -> bytes:
        dice, packed = self.dice, gzip.compress(body, 1)
        match dice.randrange(6):
            case 0:
                return packed[: dice.randrange(len(packed))]
            case 1:
                return spoil_wire(dice, packed, (packed,))
            case 2:
                return packed + gzip.compress(b"")
            case 3:
                return packed + dice.randbytes(4)
            case 4:
                return gzip.compress(bytes(dice.choice((1 << 16, 1 << 20))), 1)
            case _:
                return packed

    def _carried(self, kind: Any, media_type: str, body: bytes) -> Request:
        dice = self.dice
        path, method = f"/v1/{RESPONSES[kind][0]}", "POST"
        headers = {"Host": "localhost", "Content-Type": media_type}
        if dice.random() < 0.1:
            body = self._zipped(body)
            headers["Content-Encoding"] = "gzip"
        if dice.randrange(100) >= _TRANSPORTS:
            headers["Content-Length"] = str(len(body))
            return Request(kind, body, media_type, _head(method, path, headers))
        match dice.randrange(8):
            case 0 | 1:
                headers["Content-Type"] = dice.choice(_CONTENT_TYPES)
            case 2 | 3:
                headers["Content-Encoding"] = dice.choice(_ENCODINGS)
            case 4:
                method = dice.choice(_METHODS)
            case 5:
                path = dice.choice(_PATHS)
            case _:
                return self._unsound(kind, _head(method, path, headers), body)
        headers["Content-Length"] = str(len(body))
        media_type = headers["Content-Type"].partition(";")[0].strip().lower()
        return Request(kind, body, media_type, _head(method, path, headers))

    def _unsound(self, kind: Any, lines: Sequence[str], body: bytes) -> Request:
        """A request that is no HTTP, or ends too early or too late."""
        dice = self.dice
        match dice.randrange(5):
            case 0:
                said = max(0, len(body) + dice.choice((-len(body), -1, 1, 100, 1 << 40)))
                return Request(kind, body, "", (*lines, f"Content-Length: {said}"), sound=False)
            case 1:
                lines = (*lines, dice.choice(_LINES), f"Content-Length: {len(body)}")
                return Request(kind, body, "", lines, sound=False)
            case 2:
                sizes = dice.choice(
                    (f"{len(body):x}", "-1", "zz", "fffffffffffffffff", "1", f"{len(body):x};x=y")
                )
                body = (
                    f"{sizes}\r\n".encode()
                    + body
                    + dice.choice((b"\r\n0\r\n\r\n", b"\r\n", b"0\r\nx: y\r\n\r\n"))
                )
                return Request(kind, body, "", (*lines, "Transfer-Encoding: chunked"), sound=False)
            case 3:
                return Request(
                    kind,
                    body,
                    "",
                    (dice.choice(("POST", "\xff\x00", "POST /v1/logs HTTP/9.9")), *lines[1:]),
                    sound=False,
                )
            case _:
                return Request(kind, dice.randbytes(200), "", (), sound=False)


def _head(method: str, path: str, headers: Mapping[str, str]) -> tuple[str, ...]:
    return (f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()))


_TAKEN: Final = 200
_REFUSED: Final = (400, 404, 405, 413, 415, 421, 429)
_OVERLOADED: Final = (429, 503)
_SAYING_SO: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
_REFUSED_BY_GRPC: Final = (
    frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}) | _SAYING_SO
)


@dataclass(frozen=True)
class Verdict:
    """What came of a request: taken, in part, refused, overload, unanswered or, with the reason, BROKEN."""

    word: str
    why: str = ""


def judged_http(request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
    """Whether an answer over HTTP is one that the specification and this collector know."""
    if status in _OVERLOADED and headers.get("retry-after", "").isdigit():
        word = "overload"
    elif status in _REFUSED:
        word = "refused"
    elif status == _TAKEN:
        word = "taken"
    else:
        return Verdict("BROKEN", f"{status} {body[:300]!r}")
    if not request.sound:
        return Verdict(word)
    kind = headers.get("content-type", "")
    if not request.lines[0].split()[1].startswith("/v1/"):
        return _judged_json(word, kind, body)
    if kind != (JSON if request.media_type == JSON else PROTOBUF):
        return Verdict("BROKEN", f"{status} to {request.media_type!r}, in {kind!r}: {body[:300]!r}")
    return _judged_body(request, word, kind, body)


def _judged_json(word: str, kind: str, body: bytes) -> Verdict:
    told = json.loads(body) if kind == JSON else None
    known = isinstance(told, dict) and isinstance(told.get("error"), str)
    return Verdict(word) if known else Verdict("BROKEN", f"{kind}: {body[:300]!r}")


def _judged_body(request: Request, word: str, kind: str, body: bytes) -> Verdict:
    _, response, rejected = RESPONSES[request.kind]
    message = response() if word == "taken" else Status()
    try:
        if kind == JSON:
            json_format.Parse(body, message)
        else:
            message.ParseFromString(body)
    except (json_format.ParseError, ValueError) as error:
        return Verdict("BROKEN", f"{word}, and the answer is none: {error}: {body[:300]!r}")
    if word != "taken":
        told = message.code and message.message and "\n" not in message.message
        return Verdict(word) if told else Verdict("BROKEN", f"{word} without saying why: {body[:300]!r}")
    return _judged_part(message, rejected)


def _judged_part(response: Any, rejected: str) -> Verdict:
    if not response.HasField("partial_success"):
        return Verdict("taken")
    told = response.partial_success
    fits = getattr(told, rejected) > 0 and told.error_message
    return Verdict("in part") if fits else Verdict("BROKEN", f"an odd partial success: {told}")


def judged_grpc(request: Request, call: Any) -> Verdict:
    """Whether the answer to a call that is done is one that the specification and this collector know."""
    code = call.code()
    if code is grpc.StatusCode.OK:
        _, response, rejected = RESPONSES[request.kind]
        return _judged_part(response.FromString(call.result()), rejected)
    if code not in _REFUSED_BY_GRPC or not call.details():
        return Verdict("BROKEN", f"{code}: {call.details()}")
    told = dict(call.trailing_metadata()).get("google.rpc.retryinfo-bin")
    if told is not None and RetryInfo.FromString(told).retry_delay.seconds > 0 and code in _SAYING_SO:
        return Verdict("overload")
    if code is grpc.StatusCode.UNAVAILABLE:
        return Verdict("BROKEN", f"{code} without RetryInfo: {call.details()}")
    return Verdict("refused")


def grpc_path(kind: Any) -> str:
    """The method that takes a kind of request."""
    return f"/{SERVICES[RESPONSES[kind][0]]}/Export"
