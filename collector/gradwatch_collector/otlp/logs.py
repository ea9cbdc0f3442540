"""OTLP logs into events."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b
from typing import Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ScopeLogs

from gradwatch import conventions as c
from gradwatch_collector.otlp.attributes import clean, mapping, plain, source_of
from gradwatch_collector.otlp.decoded import Decoded
from gradwatch_collector.otlp.errors import MalformedError
from gradwatch_collector.otlp.parts import Parts
from gradwatch_collector.otlp.points import MAX_NANOS
from gradwatch_collector.records import Batch, EventRecord

_MAX_NAME: Final = 255


def decode_logs(body: bytes, received_at: int, parts: Parts | None = None) -> Decoded:
    """Decode an ``ExportLogsServiceRequest``; a record without a time gets ``received_at`` (Unix nanoseconds).

    Raises:
        MalformedError: it is none, or says something impossible about who sent it.
        TooLargeError: it has more parts than may be.
    """
    try:
        (parts or Parts()).add(body, ExportLogsServiceRequest)
        request = ExportLogsServiceRequest.FromString(body)
    except DecodeError as error:
        raise MalformedError("the body is not an encoded ExportLogsServiceRequest") from error
    batches = []
    rejected = 0
    alike: Counter[bytes] = Counter()
    for resource_logs in request.resource_logs:
        records = [(scope, record) for scope in resource_logs.scope_logs for record in scope.log_records]
        events = [_event(scope, record, received_at, alike) for scope, record in records if _usable(record)]
        rejected += len(records) - len(events)
        source = source_of(resource_logs.resource)
        if records:
            batches.append(Batch(source, events=events))
    return Decoded(batches, rejected, f"records with a time after 2262 or a name over {_MAX_NAME} characters")


def _usable(record: LogRecord) -> bool:
    times = (record.time_unix_nano, record.observed_time_unix_nano)
    return max(times) <= MAX_NANOS and len(record.event_name) <= _MAX_NAME


def _event(scope: ScopeLogs, record: LogRecord, received_at: int, alike: Counter[bytes]) -> EventRecord:
    attributes = mapping(record.attributes)
    time = record.time_unix_nano or record.observed_time_unix_nano or received_at
    body = plain(record.body) if record.HasField("body") else None
    sequence = attributes.get(c.EVENT_SEQUENCE)
    if not isinstance(sequence, int) or isinstance(sequence, bool) or abs(sequence) > MAX_NANOS:
        sequence = _digest(scope, record, time, alike)
    return EventRecord(
        name=clean(record.event_name),
        time=time,
        sequence=sequence,
        severity=record.severity_number,
        body=body if body is None or isinstance(body, str) else json.dumps(body),
        attributes=attributes,
    )


def _digest(scope: ScopeLogs, record: LogRecord, time: int, alike: Counter[bytes]) -> int:
    """Return the number of a record whose sender does not count, so that a request sent again is recognised.

    It is made of all that is said in the record, of its time (for one that says none, that of its arrival: such
    a record is not recognised) and of how many like it went before in the request.
    """
    told = blake2b(ScopeLogs(scope=scope.scope, log_records=[record]).SerializeToString(), digest_size=8)
    first = told.digest()
    told.update(f"{time} {alike[first]}".encode())
    alike[first] += 1
    # Negative, so that it cannot meet a counted one.
    return -(int.from_bytes(told.digest()) >> 1) - 1
