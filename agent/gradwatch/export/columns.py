"""Packed columns as tensors that share their memory, worked on in blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

import torch

# Below torch's grain of 32 768 elements an operation stays on the calling thread: a second one would start a
# second set of torch's threads. It takes a fraction of a millisecond, and what it makes stays in the cache.
BLOCK: Final = 32_000
_DTYPES: Final = {"d": torch.float64, "f": torch.float32, "q": torch.int64}


def tensor(column: array[int] | array[float]) -> torch.Tensor:
    """The column itself."""
    dtype = _DTYPES[column.typecode]
    # Said in full, as a default device of the user's must not reach in. Torch refuses an empty buffer.
    return torch.frombuffer(column, dtype=dtype) if column else torch.empty(0, dtype=dtype, device="cpu")


def blocks(*columns: array[int] | array[float]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Columns of one length in step, a block of each at a time."""
    return zip(*(torch.split(tensor(column), BLOCK) for column in columns), strict=True)
