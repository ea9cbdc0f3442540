"""Vectors as bytes: the narrowest type that keeps every value, byte-shuffled and deflated where that pays.

An encoded vector is one tag byte (how the rest is stored) and the little-endian elements. The caller knows
the element type, because it has a column of its own. A large matrix is several vectors, some rows in each, so
that one row can be read without inflating the others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch_collector.records import Times, Vector

_RAW: Final = b"\x00"
_DEFLATED: Final = b"\x01"
_GROUPED: Final = b"\x02"
# After the tag: rows in a group, number of groups, and the length of each.
_GROUPS: Final = struct.Struct("<II")
# Smaller groups store more (3.07 bytes a float32 gradient norm at 64 KiB, as ungrouped; 3.14 at 16 KiB).
_GROUP_BYTES: Final = 64 << 10


def narrow(values: npt.NDArray[Any]) -> Vector:
    """Return the values in the narrowest of float32, float64 and int64 that gives each one back exactly.

    Integers stay integers. Every NaN becomes the one quiet NaN: OTLP attaches no meaning to its payload.
    """
    if values.dtype.kind in "iu":
        return values.astype(np.int64, copy=False)
    wide = values.astype(np.float64, copy=False)
    # A signalling NaN raises the "invalid" flag when it is converted, and is a NaN all the same.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = wide.astype(np.float32)
        if (single == wide).all():  # no NaN among them, as almost always
            return single
        exact = np.array_equal(single, wide, equal_nan=True)
    narrowed: Vector = single if exact else wide.copy()
    narrowed[np.isnan(narrowed)] = np.nan
    return narrowed


def encode(vector: npt.NDArray[Any], *, compress: bool = True) -> bytes:
    """Encode a vector, or a matrix in the order of its rows."""
    if compress and vector.ndim > 1 and vector.nbytes > _GROUP_BYTES:
        return _encode_groups(vector)
    raw = np.ascontiguousarray(vector, dtype=vector.dtype.newbyteorder("<"))
    if compress and raw.size > 1:
        # Bytes of equal weight side by side: signs and exponents repeat, mantissas do not.
        planes = raw.reshape(-1).view(np.uint8).reshape(-1, raw.itemsize).T.tobytes()
        deflated = _deflate(planes, zlib.Z_RLE)
        if len(deflated) < raw.nbytes:
            return _DEFLATED + deflated
    return _RAW + raw.tobytes()


def decode(data: bytes, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Decode to a flat vector of ``dtype``."""
    tag = data[:1]
    if tag == _GROUPED:
        return np.concatenate([decode(group, dtype) for group in _groups(data)[1]])
    little = np.dtype(dtype).newbyteorder("<")
    if tag == _RAW:
        return np.frombuffer(data, little, offset=1).astype(dtype, copy=False)
    if tag != _DEFLATED:
        raise ValueError(f"unknown vector encoding {tag!r}")
    planes = np.frombuffer(zlib.decompress(data[1:]), np.uint8).reshape(little.itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(little).astype(dtype, copy=False)


def decode_row(data: bytes, dtype: npt.DTypeLike, index: int, width: int) -> npt.NDArray[Any]:
    """Decode one row, ``width`` long, of an encoded matrix."""
    if data[:1] == _GROUPED:
        rows, groups = _groups(data)
        data, index = groups[index // rows], index % rows
    return decode(data, dtype)[index * width : (index + 1) * width]


def _encode_groups(matrix: npt.NDArray[Any]) -> bytes:
    rows = max(1, _GROUP_BYTES // matrix[:1].nbytes)
    groups = [encode(matrix[start : start + rows].reshape(-1)) for start in range(0, len(matrix), rows)]
    lengths = np.array([len(group) for group in groups], "<u4")
    return b"".join((_GROUPED, _GROUPS.pack(rows, len(groups)), lengths.tobytes(), *groups))


def _groups(data: bytes) -> tuple[int, list[bytes]]:
    rows, count = _GROUPS.unpack_from(data, 1)
    lengths = np.frombuffer(data, "<u4", count, 1 + _GROUPS.size)
    ends = 1 + _GROUPS.size + lengths.nbytes + np.cumsum(lengths, dtype=np.int64)
    return rows, [data[end - length : end] for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)]


def encode_times(times: Times) -> bytes:
    """Encode increasing times as their first and the differences, which are small and alike."""
    return encode(np.diff(times, prepend=np.int64(0)))


def decode_times(data: bytes) -> Times:
    """Decode what `encode_times` made."""
    return np.cumsum(decode(data, np.int64), dtype=np.int64)


def encode_packed(packed: Sequence[bytes], *, compress: bool = True) -> bytes:
    """Encode byte strings, one for each time: their lengths, then their contents."""
    lengths = np.fromiter(map(len, packed), np.uint32, len(packed))
    body = lengths.astype("<u4").tobytes() + b"".join(packed)
    if compress:
        deflated = _deflate(body, zlib.Z_DEFAULT_STRATEGY)
        if len(deflated) < len(body):
            return _DEFLATED + deflated
    return _RAW + body


def decode_packed(data: bytes, count: int) -> tuple[bytes, ...]:
    """Decode ``count`` byte strings that `encode_packed` made."""
    body = data[1:] if data[:1] == _RAW else zlib.decompress(data[1:])
    lengths = np.frombuffer(body, "<u4", count)
    ends = 4 * count + np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    return tuple(body[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def _deflate(data: bytes, strategy: int) -> bytes:
    # Byte planes are runs and noise: with Z_RLE, level 1 stores 3.08 bytes a float32 gradient norm where
    # level 6 of the default strategy stores 3.08 too and takes three times as long (256 x 300 values).
    compressor = zlib.compressobj(level=1, strategy=strategy)
    return compressor.compress(data) + compressor.flush()
