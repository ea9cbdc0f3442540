"""Clipping: gradients as they were before it, and the same clipping for less.

One NaN element, and ``clip_grad_norm_`` makes every gradient NaN; one Inf, and it makes all others zero: a
read after it says nothing about where. torch computes the norm of every gradient in one helper, and scales in
another. Both are wrapped: the norms that the first throws away are kept, and where all gradients are plain
tensors of one type on one device, which is nearly always, the same operations in the same order run without
torch's sorting of tensors into groups. The result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import torch
from torch.nn.utils import clip_grad

from gradwatch.safety import internal_error

# torch.nn.utils hands the helpers out under a second name. Before torch 2.6 neither exists: gradients are read
# in the optimizer's hook, and `watch.clip_grad_norm_` calls torch's.
_TOTAL_NORM: Final = ((clip_grad, "_get_total_norm"), (torch.nn.utils, "get_total_norm"))
_SCALE: Final = ((clip_grad, "_clip_grads_with_norm_"), (torch.nn.utils, "clip_grads_with_norm_"))


class ClipSink(Protocol):
    """Who hears, on the training thread, that gradients are about to be clipped, and by how much they were."""

    def before_clipping(
        self,
        grads: Sequence[torch.Tensor],
        total_norm: torch.Tensor | None,
        norms: Sequence[torch.Tensor] | None,
    ) -> None:
        """``total_norm`` is the L2 norm of these gradients, None for another norm or when torch raised.

        ``norms``: of each of them, where they are known.
        """

    def knows_alike(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether these are known to be plain gradients of one type on one device, without a look at each."""

    def clipped(self, grads: Sequence[torch.Tensor], ratio: torch.Tensor) -> None:
        """These gradients were multiplied with ``ratio``, at most 1."""


class ClipCapture:
    """Wraps torch's helpers while installed."""

    def __init__(self, sink: ClipSink) -> None:
        self._sink = sink
        self._replaced: list[tuple[Any, str, Callable[..., Any], Callable[..., Any]]] = []
        # The gradients whose total norm was computed last: what is scaled next, usually. Not held, only named.
        self._named: tuple[int, ...] = ()
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
        self._named, self._total = (), None

    def _wrap_total_norm(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        sink = self._sink

        def total_norm(
            tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
        ) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return original(tensors, norm_type, error_if_nonfinite, foreach)
            grads = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            total: torch.Tensor | None = None
            norms: Sequence[torch.Tensor] | None = None
            try:
                plain = norm_type == 2.0 and foreach is not False and not error_if_nonfinite
                if plain and grads and (sink.knows_alike(grads) or _are_alike(grads)):
                    norms, total = _norms(grads)
                    self._named, self._total = tuple(map(id, grads)), total
                else:
                    total = original(grads, norm_type, error_if_nonfinite, foreach)
                return total
            finally:
                try:
                    sink.before_clipping(grads, total if norm_type == 2.0 else None, norms)
                except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                    internal_error(error, "clip_grad_norm_")

        return total_norm

    def _wrap_scale(self, original: Callable[..., None]) -> Callable[..., None]:
        sink = self._sink

        def scale(
            parameters: Any, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None
        ) -> None:
            if torch.compiler.is_compiling():
                return original(parameters, max_norm, total_norm, foreach)
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            grads = [grad for p in parameters if (grad := p.grad) is not None]
            if total_norm is self._total and foreach is not False and tuple(map(id, grads)) == self._named:
                ratio = _scale(grads, max_norm, total_norm)
            else:
                original(parameters, max_norm, total_norm, foreach)
                ratio = torch.clamp(float(max_norm) / (total_norm + 1e-6), max=1.0)
            self._forget()
            try:
                sink.clipped(grads, ratio)
            except Exception as error:  # noqa: BLE001
                internal_error(error, "clip_grad_norm_")
            return None

        return scale

    def clip(self, grads: list[torch.Tensor], max_norm: float, *, alike: bool) -> torch.Tensor | None:
        """Clip in one go, the L2 norm; None, and nothing done, where torch itself has to.

        ``alike``: they are known to be of one type on one device.
        """
        if not grads or not (alike or _are_alike(grads)):
            return None
        try:
            norms, total = _norms(grads)
        except (RuntimeError, NotImplementedError):  # sparse ones among them
            return None
        try:
            self._sink.before_clipping(grads, total, norms)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "clip_grad_norm_")
        ratio = _scale(grads, max_norm, total)
        try:
            self._sink.clipped(grads, ratio)
        except Exception as error:  # noqa: BLE001
            internal_error(error, "clip_grad_norm_")
        return total


def clip_grad_norm_(
    capture: ClipCapture | None,
    parameters: Iterable[torch.Tensor],
    alike: bool,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
) -> torch.Tensor:
    """Do what ``torch.nn.utils.clip_grad_norm_`` does to these parameters, for less where that is possible.

    ``alike``: the parameters are known to be plain tensors of one type on one device.
    """
    parameters = list(parameters)
    if capture is not None and norm_type == 2.0 and foreach is None and not error_if_nonfinite:
        total = capture.clip([grad for p in parameters if (grad := p.grad) is not None], max_norm, alike=alike)
        if total is not None:
            return total
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def _norms(grads: list[torch.Tensor]) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """L2 norm of each gradient and of all, as torch computes them."""
    with torch.no_grad():
        norms = torch._foreach_norm(grads, 2.0)  # noqa: SLF001 - what torch's own helper calls
        return norms, torch.linalg.vector_norm(torch.stack(norms), 2.0)


def _scale(grads: list[torch.Tensor], max_norm: float, total_norm: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        ratio = torch.clamp(float(max_norm) / (total_norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, ratio)
        return ratio


def _are_alike(grads: Sequence[torch.Tensor]) -> bool:
    """Whether torch would find one group: plain dense tensors of one type on one device."""
    if not grads:
        return False
    dtype, device = grads[0].dtype, grads[0].device
    return device.type in {"cpu", "cuda"} and all(
        type(grad) is torch.Tensor
        and grad.dtype is dtype
        and grad.layout is torch.strided
        and grad.device == device
        for grad in grads
    )
