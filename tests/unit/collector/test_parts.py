"""The parts of a request are counted as protobuf would build them, and before it does."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import ExponentialHistogramDataPoint
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from gradwatch_collector.otlp.errors import MalformedError, TooLargeError
from gradwatch_collector.otlp.logs import decode_logs
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.otlp.parts import ITEM_WEIGHT, PART_WEIGHT, Parts
from tests.fuzzing.mutations import spoil_wire
from tests.fuzzing.samples import samples
from tests.otlp_clients import attributes, gauge, metrics_request

Buckets = ExponentialHistogramDataPoint.Buckets
START = 1_750_000_000_000_000_000


def built(message: Any) -> int:
    """What the messages weigh that a message has within, and the texts in lists of them."""
    weight = 0
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else [value]:
                is_item = field.name in ("data_points", "log_records", "spans")
                weight += (ITEM_WEIGHT if is_item else PART_WEIGHT) + built(each)
        elif field.is_repeated and field.type in (field.TYPE_BYTES, field.TYPE_STRING):
            weight += len(value) * PART_WEIGHT
        elif field.is_repeated and field.type in (field.TYPE_UINT64, field.TYPE_INT64):
            weight += 5 * sum(max(1, -(-number.bit_length() // 7)) for number in value)
    return weight


@pytest.mark.parametrize("index", range(len(samples("run", START))))
def test_every_message_of_a_request_is_weighed(index: int) -> None:
    message = samples("run", START)[index]
    parts = Parts()
    parts.add(message.SerializeToString(), message)
    assert parts.weight == built(message) > ITEM_WEIGHT


@given(st.integers(0, 10_000))
def test_what_protobuf_builds_of_a_spoiled_request_is_no_more_than_was_weighed(seed: int) -> None:
    dice = random.Random(seed)
    message = dice.choice(samples("run", START))
    spoiled = spoil_wire(dice, message.SerializeToString(), [message.SerializeToString()])
    parts = Parts()
    try:
        parts.add(spoiled, message)
        read = type(message).FromString(spoiled)
    except DecodeError:
        return
    assert built(read) <= parts.weight


def test_one_part_more_than_may_be_is_too_many() -> None:
    body = Resource(attributes=attributes({"a": 1, "b": 2})).SerializeToString()
    Parts(4 * PART_WEIGHT).add(body, Resource)
    with pytest.raises(TooLargeError, match="send fewer at once"):
        Parts(4 * PART_WEIGHT - 1).add(body, Resource)


def test_parts_are_held_before_they_are_built() -> None:
    held: list[int] = []
    parts = Parts(10 * PART_WEIGHT, held.append)
    body = Resource(attributes=attributes({"a": 1})).SerializeToString()
    parts.add(body, Resource)
    parts.add(body, Resource)
    assert held == [2 * PART_WEIGHT] * 2
    assert parts.weight == 4 * PART_WEIGHT


def test_numbers_that_are_one_byte_long_weigh_more_than_that() -> None:
    body = Buckets(bucket_counts=[1] * 1_000).SerializeToString()
    apart = b"\x10\x01" * 1_000
    assert Buckets.FromString(apart) == Buckets.FromString(body)
    for encoded in (body, apart):
        parts = Parts()
        parts.add(encoded, Buckets)
        assert parts.weight == 5_000


@pytest.mark.parametrize(("text", "weight"), [("a" * 4_000, 0), ("é" + "a" * 3_998, 8_000), ("é" * 100, 0)])
def test_long_texts_that_are_not_ascii_weigh_more_than_they_are_long(text: str, weight: int) -> None:
    parts = Parts()
    parts.add(AnyValue(string_value=text).SerializeToString(), AnyValue)
    assert parts.weight == weight


def test_points_of_a_known_layout_weigh_what_their_times_make_of_them() -> None:
    decoder = MetricsDecoder()

    def weight(apart: int) -> int:
        metric = gauge("m")
        for i in range(100):
            metric.gauge.data_points.extend(
                gauge("m", (START + apart * i, 1.5), layer=f"{i}").gauge.data_points
            )
        parts = Parts()
        decoder.decode(metrics_request({"training.run.id": "run"}, metric).SerializeToString(), parts)
        return parts.weight

    assert weight(0) > 100 * ITEM_WEIGHT  # not known yet
    assert weight(0) < ITEM_WEIGHT
    assert weight(7) > 100 * ITEM_WEIGHT


def test_groups_are_no_otlp() -> None:
    with pytest.raises(DecodeError):
        Parts().add(b"\x0b\x0c", ExportLogsServiceRequest)
    with pytest.raises(MalformedError):
        decode_logs(b"\x0b\x0c", 1)


def test_resources_that_say_nothing_are_no_batches() -> None:
    assert decode_logs(b"\x0a\x00" * 100, 1).batches == []
    assert MetricsDecoder().decode(b"\x0a\x00" * 100).batches == []


def test_points_that_were_met_before_are_no_parts() -> None:
    decoder = MetricsDecoder()
    first, second = Parts(), Parts()
    for parts, time in ((first, 1), (second, 2)):
        points = [gauge(f"m{i}", (time, 1.0), layer=f"{i}") for i in range(10)]
        decoder.decode(metrics_request({"training.run.id": "run"}, *points).SerializeToString(), parts)
    assert first.weight > second.weight == (2 + 10) * PART_WEIGHT


def test_spans_are_counted_to_their_links() -> None:
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add()
    for _ in range(5):
        span.links.add()
    parts = Parts()
    parts.add(request.SerializeToString(), ExportTraceServiceRequest)
    assert parts.weight == ITEM_WEIGHT + (2 + 5) * PART_WEIGHT
