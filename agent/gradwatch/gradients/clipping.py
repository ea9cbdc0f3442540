"""Clipping: gradients as they were before it, and the same clipping for less.

One NaN element, and ``clip_grad_norm_`` makes every gradient NaN; one Inf, and it makes all others zero: a
read after it says nothing about where. torch computes the norm of every gradient in one helper, and scales in
another. Both are wrapped: the norms that the first throws away are kept, and where all gradients are plain
tensors of one type on one device, which is nearly always, the same operations in the same order run without
torch's sorting of tensors into groups, and nothing is multiplied with one. The result is the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch.nn.utils import clip_grad

from gradwatch.gradients.norms import are_plain
from gradwatch.safety import internal_error
from gradwatch.tensors.sharding import is_distributed_tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer

# A number where the norm is on the host, a tensor where it is on a device.
Total = float | torch.Tensor
_Norms = tuple[Sequence[torch.Tensor], torch.Tensor] | tuple[None, None]

# torch.nn.utils hands the helpers out under a second name. Before torch 2.6 neither exists: gradients are read
# in the optimizer's hook, and `watch.clip_grad_norm_` calls torch's.
_TOTAL_NORM: Final = ((clip_grad, "_get_total_norm"), (torch.nn.utils, "get_total_norm"))
_EXACT: Final = frozenset({torch.float32, torch.float64})
# In a list, lest the compiler of Python multiplies it.
_DENORMAL: Final = [5e-324]
_SCALE: Final = ((clip_grad, "_clip_grads_with_norm_"), (torch.nn.utils, "clip_grads_with_norm_"))


def clip_ratio(max_norm: float, total: float) -> float:
    """What torch multiplies gradients with, whatever norm it clips by."""
    return min(1.0, max_norm / (total + 1e-6))


class ClipSink(Protocol):
    """Who hears, on the training thread, that gradients are about to be clipped, and by how much they were."""

    def gradients_alike(self, optimizer: Optimizer) -> list[torch.Tensor] | None:
        """All gradients of a watched optimizer, if they are known to be of one type on one device.

        Like ``knows_alike`` it remembers whose they are until ``before_clipping``.
        """

    def knows_alike(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether these are known to be all of one optimizer's, and of one type on one device."""

    def before_clipping(
        self,
        grads: Sequence[torch.Tensor],
        total: Total | None,
        norms: Sequence[torch.Tensor] | None,
        *,
        is_l2: bool = True,
        raises: bool = False,
    ) -> None:
        """``total`` is the norm of these gradients (``is_l2``: their L2 norm), ``norms`` the L2 norms of each.

        ``raises``: if it is not finite, an exception follows.
        """

    def clipped(self, grads: Sequence[torch.Tensor], max_norm: float, total: Total | None) -> None:
        """These gradients were multiplied with ``clip_ratio(max_norm, total)``."""


class ClipCapture:
    """Wraps torch's helpers while installed."""

    def __init__(self, sink: ClipSink) -> None:
        self._sink = sink
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []
        # The gradients whose total norm was computed last: what is scaled next, usually. Not held, only named.
        self._named: list[int] = []
        self._total: torch.Tensor | None = None

    def install(self) -> None:
        """Put the wrappers in place."""
        for places, wrap in ((_TOTAL_NORM, self._wrap_total_norm), (_SCALE, self._wrap_scale)):
            for owner, name in places:
                original = getattr(owner, name, None)
                if original is not None:
                    wrapper = wrap(original)
                    self._replaced.append((owner, name, original, wrapper))
                    setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Put torch's functions back, unless somebody wrapped ours."""
        for owner, name, original, wrapper in self._replaced:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)
        self._replaced.clear()
        self._forget()

    def _forget(self) -> None:
        self._named, self._total = [], None

    def _wrap_total_norm(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def total_norm(
            tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
        ) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return original(tensors, norm_type, error_if_nonfinite, foreach)
            grads = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            if norm_type == 2.0 and foreach is not False:
                norms, total = self._norms(grads)
                if norms is not None and total is not None:
                    self._named, self._total = list(map(id, grads)), total
                    self._tell(grads, total, norms, raises=error_if_nonfinite)
                    if not error_if_nonfinite or math.isfinite(total.item()):
                        return total
            total = None
            try:
                total = original(grads, norm_type, error_if_nonfinite, foreach)
                return total
            finally:
                self._tell(grads, total, None, is_l2=norm_type == 2.0)

        return total_norm

    def _wrap_scale(self, original: Callable[..., None]) -> Callable[..., None]:
        def scale(
            parameters: Any, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None
        ) -> None:
            if torch.compiler.is_compiling():
                original(parameters, max_norm, total_norm, foreach)
                return
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            grads = [grad for p in parameters if (grad := p.grad) is not None]
            ours = total_norm is self._total and foreach is not False and list(map(id, grads)) == self._named
            self._forget()
            if ours:
                _scale(grads, max_norm, total_norm)
            else:
                original(parameters, max_norm, total_norm, foreach)
            self._tell_clipped(grads, max_norm, total_norm)

        return scale

    def clip(self, optimizer: Optimizer, max_norm: float) -> torch.Tensor | None:
        """Clip a watched optimizer's gradients by their L2 norm; None, and nothing done, where torch has to."""
        grads = self._sink.gradients_alike(optimizer)
        norms, total = _norms(grads) if grads else (None, None)
        if not grads or norms is None or total is None:
            return None
        self._tell(grads, total, norms)
        _scale(grads, max_norm, total)
        self._tell_clipped(grads, max_norm, total)
        return total

    def _norms(self, grads: list[torch.Tensor]) -> _Norms:
        if grads and are_plain(grads) and (self._sink.knows_alike(grads) or _are_alike(grads)):
            return _norms(grads)
        return None, None

    def _tell(
        self,
        grads: list[torch.Tensor],
        total: torch.Tensor | None,
        norms: Sequence[torch.Tensor] | None,
        *,
        is_l2: bool = True,
        raises: bool = False,
    ) -> None:
        try:
            self._sink.before_clipping(grads, _readable(total), norms, is_l2=is_l2, raises=raises)
        except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
            internal_error(error, "clip_grad_norm_")

    def _tell_clipped(self, grads: list[torch.Tensor], max_norm: float, total: torch.Tensor) -> None:
        try:
            self._sink.clipped(grads, float(max_norm), _readable(total))
        except Exception as error:  # noqa: BLE001
            internal_error(error, "clip_grad_norm_")


def _readable(total: torch.Tensor | None) -> Total | None:
    # Of a distributed total one rank may hold a summand only, and reading it is a collective.
    if total is None or is_distributed_tensor(total):
        return None
    return float(total.item()) if total.is_cpu else total if total.is_cuda else None


def _norms(grads: list[torch.Tensor]) -> _Norms:
    """L2 norm of each gradient and of all, as torch computes them; None for sparse ones."""
    with torch.no_grad():
        try:
            norms = torch._foreach_norm(grads, 2.0)  # noqa: SLF001 - what torch's own helper calls
        except (RuntimeError, NotImplementedError):
            return None, None
        return norms, torch.linalg.vector_norm(torch.stack(norms), 2.0)


def _scale(grads: list[torch.Tensor], max_norm: float, total: torch.Tensor) -> None:
    """Multiply as torch does."""
    if total.is_cpu and _is_at_most(total.item(), float(max_norm)) and _keeps_bits(grads):
        return
    with torch.no_grad():
        torch._foreach_mul_(grads, torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))


def _is_at_most(total: float, max_norm: float) -> bool:
    """Whether the ratio is one, so that multiplying would change no bit: all rounding errors are 1e-7.

    Where torch flushes denormal numbers to zero, multiplying them with one does change them.
    """
    return max_norm > (total + 1e-6) * 1.00001 and _DENORMAL[0] * 1.0 != 0.0


def _keeps_bits(grads: list[torch.Tensor]) -> bool:
    """Whether multiplying these with one changes nothing, and nobody could tell that it was left out.

    Complex numbers lose the signs of zeros. A graph through gradients has to find that they were changed.
    """
    return grads[0].dtype in _EXACT and not any(grad.requires_grad for grad in grads)


def _are_alike(grads: Sequence[torch.Tensor]) -> bool:
    """Whether torch would find one group: dense tensors of one type on one device."""
    dtype, device = grads[0].dtype, grads[0].device
    return device.type in {"cpu", "cuda"} and all(
        grad.dtype is dtype and grad.layout is torch.strided and grad.device == device for grad in grads
    )
