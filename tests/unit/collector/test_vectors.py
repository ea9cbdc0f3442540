"""Vectors survive every form they are stored in, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradwatch_collector.storage import packed, vectors
from gradwatch_collector.storage.arrays import _VectorDumper, _VectorLoader
from gradwatch_collector.storage.segments import Segment, merge

FLOAT64S = arrays.arrays(np.float64, st.integers(0, 200), elements=st.floats(width=64))
FLOAT32S = arrays.arrays(np.float32, st.integers(0, 200), elements=st.floats(width=32))
INT64S = arrays.arrays(np.int64, st.integers(0, 200), elements=st.integers(-(2**63), 2**63 - 1))
ANY = st.one_of(FLOAT64S, FLOAT32S, INT64S)


def same_bits(left: Any, right: Any) -> bool:
    return bool(left.dtype == right.dtype and left.tobytes() == right.tobytes())


@given(ANY, st.booleans())
def test_an_encoded_vector_decodes_to_the_same_bits(vector: Any, compress: bool) -> None:
    assert same_bits(vectors.decode(vectors.encode(vector, compress=compress), vector.dtype), vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 300])
def test_a_row_of_a_matrix_is_read_without_the_others(dtype: Any, rows: int) -> None:
    matrix = np.random.default_rng(rows).integers(0, 1000, (rows, 250)).astype(dtype)
    encoded = vectors.encode(matrix)
    assert same_bits(vectors.decode(encoded, dtype), matrix.reshape(-1))
    for index in range(rows):
        assert same_bits(vectors.decode_row(encoded, dtype, index, 250), matrix[index])


def test_a_row_is_read_where_its_neighbours_are_damaged() -> None:
    matrix = np.random.default_rng(0).normal(size=(300, 256)).astype(np.float32)
    encoded = bytearray(vectors.encode(matrix))
    encoded[len(encoded) // 2] ^= 0xFF
    assert same_bits(vectors.decode_row(bytes(encoded), np.float32, 299, 256), matrix[299])


@given(ANY)
def test_postgresql_arrays_hold_the_same_bits(vector: Any) -> None:
    loader = type("Loader", (_VectorLoader,), {"dtype": vector.dtype})(0)
    assert same_bits(loader.load(_VectorDumper(np.ndarray).dump(vector)), vector)


@given(FLOAT64S)
def test_narrowing_keeps_every_number_and_its_sign(values: Any) -> None:
    narrowed = vectors.narrow(values)
    np.testing.assert_array_equal(narrowed.astype(np.float64), values)
    finite = ~np.isnan(values)
    assert (np.signbit(narrowed) == np.signbit(values))[finite].all()


@given(FLOAT32S)
def test_what_fits_float32_is_stored_as_float32(values: Any) -> None:
    assert vectors.narrow(values.astype(np.float64)).dtype == np.float32


@given(INT64S)
def test_integers_stay_integers(values: Any) -> None:
    assert same_bits(vectors.narrow(values), values)


def test_every_nan_becomes_the_one_quiet_nan() -> None:
    payloads = np.array([0x7FF0000000000001, 0xFFF8000000000123], np.uint64).view(np.float64)
    assert same_bits(vectors.narrow(payloads), np.full(2, np.nan, np.float32))
    with_wide = np.append(payloads, 0.1)
    assert same_bits(vectors.narrow(with_wide), np.array([np.nan, np.nan, 0.1]))


@given(st.lists(st.integers(1, 2**63 - 1), unique=True, max_size=100).map(sorted))
def test_times_survive_as_differences(times: list[int]) -> None:
    sent = np.array(times, np.int64)
    assert same_bits(vectors.decode_times(vectors.encode_times(sent)), sent)


@given(st.lists(st.binary(max_size=300), max_size=20), st.booleans())
def test_packed_values_survive(values: list[bytes], compress: bool) -> None:
    encoded = vectors.encode_packed(values, compress=compress)
    assert vectors.decode_packed(encoded, len(values)) == tuple(values)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_points_of_a_packed_value_come_apart_again(points: list[bytes]) -> None:
    assert packed.split(packed.join(points)) == points


def test_wandering_norms_take_less_than_four_bytes() -> None:
    random = np.random.default_rng(1)
    norms = np.exp(np.cumsum(random.normal(0, 0.1, (300, 256)), axis=1)).astype(np.float32)
    assert len(vectors.encode(norms)) < 3.3 * norms.size


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown vector encoding"):
        vectors.decode(b"\x07abc", np.float32)


def test_merging_keeps_integers_that_no_float_holds() -> None:
    whole = Segment(np.array([1]), np.array([[2**53 + 1]]))
    broken = Segment(np.array([2]), np.array([[0.5]]))
    merged = merge([whole, broken])
    assert [part.values.tolist() for part in merged if part.values is not None] == [[[2**53 + 1]], [[0.5]]]
