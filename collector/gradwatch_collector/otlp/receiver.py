"""OTLP/HTTP: POST /v1/metrics, /v1/logs and /v1/traces, protobuf or JSON, answered after the commit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gradwatch_collector.otlp.encodings import JSON, PROTOBUF, encode, media_type
from gradwatch_collector.otlp.errors import (
    OtlpError,
    SlowError,
    TooLargeError,
    UnavailableError,
    UnsupportedError,
    error_response,
)
from gradwatch_collector.otlp.intake import Intake
from gradwatch_collector.otlp.json_bodies import JsonRequest
from gradwatch_collector.otlp.memory import Holding
from gradwatch_collector.otlp.parts import TOO_MANY_PARTS
from gradwatch_collector.otlp.signals import Signal

# As Python objects JSON takes ten times its size, so less of it is read, and one large body at a time.
MAX_JSON: Final = 16 << 20
# At some 8 MB/s, a sixtieth of protobuf's speed, more than this takes milliseconds.
_JSON_INLINE: Final = 16 << 10
# An object or a list of it takes some 200 bytes. Nothing of it is held beyond its turn.
_JSON_PART_WEIGHT: Final = 160


def routes(intake: Intake, *, max_json: int = MAX_JSON) -> list[Route]:
    """Return the three OTLP/HTTP routes. ``max_json``: bytes that a JSON body may have after decompression."""
    limits = {PROTOBUF: intake.max_decompressed, JSON: min(max_json, intake.max_decompressed)}
    json_turn = asyncio.Lock()

    def route(signal: Signal) -> Route:
        json_request = JsonRequest(signal.request)

        async def receive(request: Request) -> Response:
            kind = media_type(request.headers.get("content-type", ""))
            try:
                with intake.hold() as holding:
                    body = await _body(request, kind, intake, limits, holding)
                    if kind == JSON:
                        body = await _to_protobuf(json_request, body, json_turn, intake, holding)
                    answer = await intake.accept(signal, body, request.scope.get("gradwatch.grant"), holding)
            except OtlpError as error:
                return _refusal(intake, error, kind)
            except asyncio.CancelledError:
                # Only the end of the process cancels a request. It is not committed: the sender still has it.
                return _refusal(intake, UnavailableError("the collector is stopping"), kind)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it
            return Response(encode(answer, kind), media_type=kind)

        return Route(signal.path, receive, methods=["POST"])

    return [route(signal) for signal in intake.signals]


def _refusal(intake: Intake, error: OtlpError, kind: str) -> Response:
    intake.refused(error)
    return error_response(error.status, str(error), kind, error.headers, error.retry_after)


async def _body(
    request: Request, kind: str, intake: Intake, limits: Mapping[str, int], holding: Holding
) -> bytes:
    if kind not in limits:
        raise UnsupportedError(f"Content-Type {kind or 'missing'!r}: only {' and '.join(limits)} are read here")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", ""):
        raise UnsupportedError(f"Content-Encoding {encoding!r}: only gzip and identity are read here")
    max_body = intake.max_body if encoding == "gzip" else min(intake.max_body, limits[kind])
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_body:
        raise TooLargeError(f"the body has {length} bytes; the limit is {max_body}")
    try:
        # A host that vanishes says nothing of it, and what it sent would be held for ever.
        async with asyncio.timeout(intake.body_seconds):
            body = await _read(request, max_body, holding)
    except TimeoutError:
        raise SlowError(f"the body did not arrive within {intake.body_seconds:g} s") from None
    return await intake.decompressed(body, limits[kind], holding) if encoding == "gzip" else body


async def _read(request: Request, max_body: int, holding: Holding) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_body:
            raise TooLargeError(f"the body has more than {max_body} bytes")
        holding.grow(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


async def _to_protobuf(
    json_request: JsonRequest, body: bytes, turn: asyncio.Lock, intake: Intake, holding: Holding
) -> bytes:
    # Each part begins with one of these; in texts they count, too.
    if (body.count(b"{") + body.count(b"[")) * _JSON_PART_WEIGHT > intake.most_weight(holding):
        raise TooLargeError(TOO_MANY_PARTS)
    if len(body) <= _JSON_INLINE:
        return json_request.to_protobuf(body)
    async with turn:
        return await intake.aside(json_request.to_protobuf, body)
