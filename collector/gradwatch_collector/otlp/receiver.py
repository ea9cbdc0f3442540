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
# What Python and protobuf make of it, in bytes of a request: of what begins with a brace or a bracket some 200
# bytes, of a number in a list 48, of a key, with its place in its object, 200. In texts these count, too.
_JSON_WEIGHTS: Final = ((b"{", 60), (b"[", 60), (b",", 12), (b'"', 16))
# If it is not ASCII, or escaped: four bytes for each character, of it as a whole and of the texts in it.
_WIDE_JSON_WEIGHT: Final = 2


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
    is_short = len(body) <= _JSON_INLINE
    weight = _json_weight(body) if is_short else await intake.aside(_json_weight, body)
    if weight > intake.most_weight(holding):
        raise TooLargeError(TOO_MANY_PARTS)
    if is_short:
        return json_request.to_protobuf(body)
    async with turn:
        with holding.more(weight):
            encoded = await intake.aside(json_request.to_protobuf, body)
    # Lists of numbers are longer than their JSON.
    holding.grow(max(0, len(encoded) - len(body)))
    return encoded


def _json_weight(body: bytes) -> int:
    is_wide = not body.isascii() or b"\\u" in body
    weight = sum(body.count(sign) * each for sign, each in _JSON_WEIGHTS)
    return weight + is_wide * _WIDE_JSON_WEIGHT * len(body)
