"""NumPy vectors as PostgreSQL arrays, both ways, in the binary format and without a Python object a value.

An array on the wire is five big-endian int32 (dimensions, has-nulls flag, element type, length, lower bound),
then for each element its length in bytes and its bytes (PostgreSQL's ``array_send``).
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.abc import DumperKey
from psycopg.adapt import Buffer, Dumper, Loader, PyFormat
from psycopg.postgres import types
from psycopg.pq import Format

_TYPES: Final = {np.dtype(np.float32): "float4", np.dtype(np.float64): "float8", np.dtype(np.int64): "int8"}
_HEADER: Final = struct.Struct("!5i")
_EMPTY: Final = struct.Struct("!3i")


def _wire(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype([("length", ">i4"), ("value", dtype.newbyteorder(">"))])


class _VectorDumper(Dumper):
    """Dumps a vector of float32, float64 or int64; psycopg keeps one instance for each element type."""

    format = Format.BINARY

    def dump(self, obj: npt.NDArray[Any]) -> Buffer:
        element = types[_TYPES[obj.dtype]].oid
        if not obj.size:
            return _EMPTY.pack(0, 0, element)
        items = np.empty(obj.size, _wire(obj.dtype))
        items["length"] = obj.itemsize
        items["value"] = obj.reshape(-1)
        return _HEADER.pack(1, 0, element, obj.size, 1) + items.tobytes()

    def get_key(self, obj: npt.NDArray[Any], format: PyFormat) -> DumperKey:  # noqa: A002, ARG002 - psycopg's
        return (self.cls, obj.dtype.type)

    def upgrade(self, obj: npt.NDArray[Any], format: PyFormat) -> _VectorDumper:  # noqa: A002, ARG002 - psycopg's
        dumper = type(self)(self.cls)
        dumper.oid = types[_TYPES[obj.dtype]].array_oid
        return dumper


class _VectorLoader(Loader):
    format = Format.BINARY
    dtype: np.dtype[Any]

    def load(self, data: Buffer) -> npt.NDArray[Any]:
        if len(data) <= _EMPTY.size:
            return np.empty(0, self.dtype)
        items = np.frombuffer(data, _wire(self.dtype), offset=_HEADER.size)
        return items["value"].astype(self.dtype)


def register(connection: psycopg.Connection[Any]) -> None:
    """Teach a connection to take vectors as parameters and to return them from binary cursors."""
    connection.adapters.register_dumper(np.ndarray, _VectorDumper)
    for dtype, name in _TYPES.items():
        loader = type(f"_{name.title()}Loader", (_VectorLoader,), {"dtype": dtype})
        connection.adapters.register_loader(types[name].array_oid, loader)
