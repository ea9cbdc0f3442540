"""Sharded gradients: what one rank may say about a tensor of which it holds a part.

A rank reports the squared norm of its own shard. Norms of shards do not add up, but their squares do, and the
sum over ranks needs no collective: it is made where all ranks' telemetry meets. What several ranks hold alike
(replicated mesh dimensions, plain parameters beside sharded ones) is divided by their number, so that it too
adds up to once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is. Communicates with nobody."""
    if not is_distributed_tensor(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined] # DTensor's own method
    return part


def is_pending_sum(tensor: Tensor) -> bool:
    """Whether ranks hold summands of the tensor rather than parts: its norm takes a collective to know."""
    return any(placement.is_partial() for placement in getattr(tensor, "placements", ()))


def share_divisors(parameters: Sequence[Tensor]) -> tuple[float, ...] | None:
    """What to divide each local norm by, so that squares add up over the ranks; None where nothing is sharded.

    A plain parameter beside sharded ones is taken to be alike on all ranks of their largest mesh. Where its
    gradients are not, the sum gives their root mean square over the ranks.
    """
    meshes = [_mesh(p) for p in parameters if is_distributed_tensor(p)]
    if not meshes:
        return None
    everybody = max(mesh.size() for mesh in meshes)
    return tuple(math.sqrt(_replicas(p) if is_distributed_tensor(p) else everybody) for p in parameters)


def common_stride(interval: int) -> int:
    """Steps between observed ones, counted from the first, so that ranks observe steps in common.

    Ranks measure different costs and so want different intervals. Rounded up to powers of two, the longer
    one's steps are among the shorter one's.
    """
    return 1 << (interval - 1).bit_length()


def _mesh(tensor: Any) -> Any:
    return tensor.device_mesh


def _replicas(tensor: Any) -> int:
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())
