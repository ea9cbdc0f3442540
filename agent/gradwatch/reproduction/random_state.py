"""The random number generators that a training step may draw from: as they are, and as they were."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Of Python, NumPy if it is loaded, torch on the CPU and on CUDA devices. No device is synchronised."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # torch
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """The same without arrays of NumPy, which the reader may not have."""
    if "numpy" not in state:
        return state
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (kind, keys.tolist(), *rest)}


def restore(state: dict[str, Any]) -> None:
    """Set the generators; those of devices that are not here are left out."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        try:
            import numpy as np
        except ModuleNotFoundError:
            pass
        else:
            kind, keys, *rest = state["numpy"]
            np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    for device, one in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, device)
