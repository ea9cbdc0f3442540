"""Which files are taken for checkpoints, going by their names alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SUFFIXES: Final = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors"})
# torch.distributed.checkpoint's own list of what a folder holds: a pickle.
DISTRIBUTED: Final = ".metadata"
# Hugging Face's list of which shard a tensor is in, such as `model.safetensors.index.json`.
_INDEX: Final = ".index.json"


def is_index(path: Path) -> bool:
    """Whether a file lists the shards of a model."""
    return path.name.endswith(_INDEX) and Path(path.name.removesuffix(_INDEX)).suffix in SUFFIXES


def is_weights(path: Path) -> bool:
    """Whether a file is one that weights are loaded from, or that says which are."""
    return path.suffix in SUFFIXES or path.name == DISTRIBUTED or is_index(path)
