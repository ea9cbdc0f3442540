"""Memory that ran out: what was asked for, where, and what training was doing just then.

What was being done is read from the stack when it happens, so that knowing it costs nothing before. Ends the
run: the exception's traceback. Recovered from: torch's CUDA allocator calls observers before it raises; they
cannot be taken off again, so ours turns inert.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType, TracebackType
from typing import Any, Final, Literal

from gradwatch.safety import shielded

Phase = Literal["forward", "backward", "optimizer"]

# How torch's allocators word it: c10/cuda/CUDACachingAllocator.cpp and c10/core/impl/alloc_cpu.cpp.
_CPU: Final = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_CUDA: Final = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB|TiB)")
_CUDA_DEVICE: Final = re.compile(r"GPU (\d+)")
# Marks an exception that is being handled while a run begins, as in a retry.
HANDLED_BEFORE: Final = "__gradwatch_handled_before__"
_UNITS: Final = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """One time that memory ran out. ``requested`` in bytes; what is not known is None."""

    during: Phase | None
    device: str | None = None
    requested: int | None = None


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """What an exception says about memory that ran out; None when it is about something else."""
    for cause in _causes(error):
        message = text_of(cause)
        on_cpu = _CPU.search(message)
        if on_cpu:
            return OutOfMemory(phase_of(_frames(cause.__traceback__)), "cpu", int(on_cpu[1]))
        if isinstance(cause, MemoryError):
            return OutOfMemory(phase_of(_frames(cause.__traceback__)), "cpu")
        if type(cause).__name__ == "OutOfMemoryError":  # torch's; importing it here would import torch
            asked, device = _CUDA.search(message), _CUDA_DEVICE.search(message)
            return OutOfMemory(
                phase_of(_frames(cause.__traceback__)),
                f"cuda:{device[1]}" if device else None,
                round(float(asked[1]) * _UNITS[asked[2]]) if asked else None,
            )
    return None


def text_of(error: BaseException) -> str:
    """What an exception says; nothing where its own ``__str__`` raises."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the user's code
        return ""


def phase_of(frames: Iterable[FrameType]) -> Phase | None:
    """What these frames, in any order, were doing.

    Backward wins: a checkpointed forward runs inside it. A forward inside an optimizer's step is its closure's.
    """
    found = {_phase(frame) for frame in frames}
    phases: tuple[Phase, ...] = ("backward", "forward", "optimizer")
    return next((phase for phase in phases if phase in found), None)


def _phase(frame: FrameType) -> Phase | None:
    path = PurePath(frame.f_code.co_filename)
    name = frame.f_code.co_name
    match path.parts[-3:]:
        case (*_, "torch", "autograd", "__init__.py") | (*_, "torch", "autograd", "graph.py"):
            return "backward" if name in {"backward", "grad", "_engine_run_backward"} else None
        case (*_, "torch", "optim", _):
            return "optimizer"
        case (*_, "nn", "modules", "module.py"):
            return "forward" if name in {"_call_impl", "_wrapped_call_impl"} else None
        case _:
            return None


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that a traceback shows, the last first; but none of before the run began."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen and HANDLED_BEFORE not in vars(cause):
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


class AllocatorWatch:
    """Hears from torch's CUDA allocator when memory ran out, whether or not training recovers."""

    def __init__(self, heard: Callable[[OutOfMemory], None]) -> None:
        self._heard: Callable[[OutOfMemory], None] | None = heard
        self.attached = False

    @shielded(None)
    def attach(self) -> None:
        """Begin to listen, once CUDA is in use; does nothing before, or without a CUDA build."""
        torch: Any = sys.modules["torch"]
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)  # noqa: SLF001 - no public way
        if self.attached or attach is None or not torch.cuda.is_initialized():
            return
        attach(self._observe)
        self.attached = True

    def silence(self) -> None:
        """Turn inert: the allocator keeps the observer for the life of the process."""
        self._heard = None

    @shielded(None)
    def _observe(self, device: int, requested: int, _device_total: int, _device_free: int) -> None:
        heard = self._heard
        if heard is not None:
            heard(OutOfMemory(phase_of(_main_stack()), f"cuda:{device}", requested))


def _main_stack() -> Iterator[FrameType]:
    # Backward allocates on a thread of torch's own, which has no Python stack; who waits for it has.
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001
    while frame is not None:
        yield frame
        frame = frame.f_back
