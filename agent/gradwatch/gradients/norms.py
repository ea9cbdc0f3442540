"""Gradient norms: one fused read per device and type, and the names of the layers they belong to.

CPU gradients are read at once (that costs no synchronisation); gradients on a device leave through the ring
in ``device_ring`` and arrive a step or more later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from gradwatch.redaction import redact_name
from gradwatch.tensors.sharding import is_distributed_tensor, is_pending_sum, local_part, share_divisors

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPER_PARTS: Final = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# Squares of these overflow or lose half their digits in their own type: an fp16 norm above 256 would be inf.
HALF: Final = frozenset({torch.float16, torch.bfloat16})


def layer_name(qualified: str) -> str:
    """A parameter's qualified name without the parts that wrappers (DDP, compile, FSDP) put in, nor secrets."""
    return redact_name(
        ".".join(part for part in qualified.split(".") if part not in _WRAPPER_PARTS) or qualified
    )


def named_parameters(model: nn.Module) -> dict[int, str]:
    """Layer name of every parameter by its ``id``; a shared parameter has the first of its names."""
    return {id(parameter): layer_name(name) for name, parameter in model.named_parameters()}


@dataclass(frozen=True, slots=True)
class _Group:
    """Parameters of one device and type. ``accumulate``: the type to accumulate in, None for their own."""

    device: torch.device
    accumulate: torch.dtype | None
    indices: tuple[int, ...]
    parameters: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class DeviceNorms:
    """Norms that are still on a device: ``vector`` has one element for each of ``indices``."""

    indices: tuple[int, ...]
    vector: Tensor


class Reading(NamedTuple):
    """One read of all gradients. ``norms[i]`` belongs to parameter ``indices[i]``.

    ``complete`` is False where a gradient could not be read without a synchronisation or a collective: then
    there is no global norm to report. Of sharded parameters, norms are this rank's share (``sharding``).
    """

    indices: tuple[int, ...]
    norms: list[float]
    on_device: tuple[DeviceNorms, ...] = ()
    complete: bool = True

    def scaled_down(self, scale: float) -> list[float]:
        """The norms without the factor of a loss scaler."""
        return self.norms if scale == 1.0 else [norm / scale for norm in self.norms]

    def unscaled(self, scale: Tensor) -> Reading:
        """The same, divided by a loss scale that is on the device of the gradients."""
        parts = [
            DeviceNorms(part.indices, part.vector / scale.to(part.vector.device)) for part in self.on_device
        ]
        norms = self.scaled_down(float(scale)) if self.norms else []
        return Reading(self.indices, norms, tuple(parts), self.complete)

    def total_on_device(self) -> Tensor:
        """L2 norm over what is on a device (on the first, of several)."""
        first = self.on_device[0].vector.device
        parts = [part.vector.to(first, torch.float32, non_blocking=True) for part in self.on_device]
        total: Tensor = torch.linalg.vector_norm(torch.cat(parts))
        return total


class GradientReader:
    """Reads the gradients of a fixed list of parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        grouped: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        self.unreadable = 0
        self._divisors = share_divisors(self.parameters)
        # Whether this rank holds only parts of some parameters.
        self.sharded = self._divisors is not None
        for index, parameter in enumerate(self.parameters):
            if parameter.device.type not in {"cpu", "cuda"}:
                self.unreadable += 1
            else:
                grouped.setdefault((parameter.device, parameter.dtype), []).append(index)
        self._groups = tuple(
            _Group(
                device,
                torch.float32 if dtype in HALF else None,
                tuple(indices),
                tuple(self.parameters[i] for i in indices),
            )
            for (device, dtype), indices in grouped.items()
        )
        plain = len(self._groups) == 1 and not self.unreadable and not self.sharded
        self._only = self._groups[0] if plain else None
        self._all = tuple(range(len(self.parameters)))
        self.devices = tuple({group.device for group in self._groups if group.device.type != "cpu"})

    def read(self) -> Reading:
        """L2 norms of all present gradients, before anything else touches them."""
        group = self._only
        if group is not None and group.device.type == "cpu":
            grads = self.gradients()
            return Reading(self._indices(len(grads)), _host_norms(grads, group.accumulate))
        return self._read_groups()

    def read_from(self, norms: Sequence[Tensor] | None) -> Reading:
        """As `read`, from the norms of all present gradients where somebody has just paid for them."""
        group = self._only
        if norms is None or group is None or group.device.type != "cpu" or group.accumulate is not None:
            return self.read()
        return Reading(self._indices(len(norms)), [norm.item() for norm in norms])

    def gradients(self) -> list[Tensor]:
        """All that there are now."""
        return [grad for p in self.parameters if (grad := p.grad) is not None]

    def _indices(self, present: int) -> tuple[int, ...]:
        """Of the parameters that have a gradient, which are so many."""
        if present == len(self.parameters):
            return self._all
        return tuple(i for i, p in enumerate(self.parameters) if p.grad is not None)

    @property
    def alike(self) -> bool:
        """Whether all parameters are of one type on one device, and whole."""
        return self._only is not None

    def are_all(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are the gradients of all parameters, in order."""
        return len(grads) == len(self.parameters) and all(
            map(is_, grads, [parameter.grad for parameter in self.parameters])
        )

    def share_of(
        self, grads: Sequence[Tensor], total: float | Tensor, norms: Sequence[Tensor] | None
    ) -> float | Tensor | None:
        """L2 norm over these parameters' gradients, where somebody has just computed it or its summands.

        ``total`` is the norm over ``grads``, ``norms`` those of each. NaN where these gradients are only some
        of them and nobody has their summands; None where they are not all among them.
        """
        present = self.gradients()
        if len(present) == len(grads) and all(map(is_, present, grads)):
            return total
        places = {id(grad): place for place, grad in enumerate(grads)}
        mine = [places.get(id(grad)) for grad in present]
        if not mine or None in mine:
            return None
        if len(mine) == len(grads):
            return total
        return math.nan if norms is None else math.hypot(*(norms[i].item() for i in mine if i is not None))

    def _read_groups(self) -> Reading:
        indices: list[int] = []
        norms: list[float] = []
        on_device: list[DeviceNorms] = []
        complete = not self.unreadable
        for group in self._groups:
            present = [
                (i, g)
                for i, p in zip(group.indices, group.parameters, strict=True)
                if (g := p.grad) is not None
            ]
            plain = [(i, values) for i, g in present if (values := _dense(g)) is not None]
            complete &= len(plain) == len(present)
            mine = tuple(i for i, _ in plain)
            grads = [g for _, g in plain]
            if group.device.type == "cpu":
                norms += self._shares(mine, _host_norms(grads, group.accumulate))
                indices += mine
            elif plain:
                vector = torch.stack(list(self._device_shares(mine, _foreach_norm(grads, group.accumulate))))
                on_device.append(DeviceNorms(mine, vector.detach()))
        return Reading(tuple(indices), norms, tuple(on_device), complete)

    def _shares(self, indices: Sequence[int], norms: list[float]) -> list[float]:
        divisors = self._divisors
        if divisors is None:
            return norms
        return [norm / divisors[i] for i, norm in zip(indices, norms, strict=True)]

    def _device_shares(self, indices: Sequence[int], norms: Sequence[Tensor]) -> Sequence[Tensor]:
        divisors = self._divisors
        if divisors is None:
            return norms
        # Python scalars travel with the launch; a tensor made of them would be a copy to wait for.
        return torch._foreach_div(list(norms), [divisors[i] for i in indices])  # noqa: SLF001

    def nonfinite(self, indices: Iterable[int]) -> tuple[int, ...]:
        """Which of these parameters have a CPU gradient with a NaN or Inf element."""
        return tuple(
            i for i in indices if (g := self.parameters[i].grad) is not None and not _is_finite(g)
        )  # fmt: skip

    def nonfinite_elements(self, indices: Iterable[int]) -> int:
        """Number of NaN and Inf elements in these CPU gradients."""
        total = 0
        for i in indices:
            grad = self.parameters[i].grad
            if grad is not None and (values := _dense(grad)) is not None:
                total += values.numel() - int(torch.isfinite(values).sum())
        return total

    def nonfinite_parameters(self) -> tuple[int, ...]:
        """Which parameters on the CPU hold a NaN or Inf themselves."""
        return tuple(
            i
            for group in self._groups
            if group.device.type == "cpu"
            for i, bad in zip(group.indices, nonfinite_among(group.parameters), strict=True)
            if bad
        )

    def parameter_norms(self) -> tuple[DeviceNorms, ...]:
        """Norms of the parameters on devices, still there."""
        found = []
        for group in self._groups:
            if group.device.type != "cpu":
                norms = _foreach_norm(list(group.parameters), group.accumulate)
                found.append(DeviceNorms(group.indices, torch.stack(norms).detach()))
        return tuple(found)

    def exact_norm(self, index: int) -> float:
        """Norm of one CPU gradient, accumulated in float64: for the one that overflowed in its own type."""
        grad = self.parameters[index].grad
        values = None if grad is None else _dense(grad)
        if values is None:
            return 0.0
        return self._shares((index,), [float(torch.linalg.vector_norm(values.detach().abs().double()))])[0]


def are_plain(grads: Iterable[Tensor]) -> bool:
    """Whether none is of a subclass, which may have norms and products of its own."""
    return set(map(type, grads)) <= {torch.Tensor}


def nonfinite_among(tensors: Sequence[Tensor]) -> list[bool]:
    """Which of these dense CPU tensors hold a NaN or Inf."""
    if all(tensor.dtype is torch.float32 and tensor.numel() for tensor in tensors):
        values = [tensor.detach() for tensor in tensors]
        norms = _foreach_norm(values, None) if values else ()
        return [_is_bad(norm, value) for norm, value in zip(norms, values, strict=True)]
    groups: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault(tensor.dtype, []).append(place)
    bad = [False] * len(tensors)
    for dtype, places in groups.items():
        values = [tensors[place].detach() for place in places]
        norms = _foreach_norm(values, torch.float32 if dtype in HALF else None)
        for place, norm, value in zip(places, norms, values, strict=True):
            bad[place] = _is_bad(norm, value)
    return bad


def _is_bad(norm: Tensor, value: Tensor) -> bool:
    # The inf-norm would be exact, and is 20 times slower on the CPU; a norm that overflows is rare.
    return not math.isfinite(norm.item()) and not bool(torch.isfinite(value).all())


def _foreach_norm(grads: list[Tensor], accumulate: torch.dtype | None) -> tuple[Tensor, ...] | list[Tensor]:
    # mypy sees `_foreach_norm` as untyped; it is what torch's own clip_grad_norm_ rests on.
    if accumulate is None:
        return torch._foreach_norm(grads, 2.0)  # noqa: SLF001 - no public fused norm exists
    return torch._foreach_norm(grads, 2.0, dtype=accumulate)  # noqa: SLF001


def _host_norms(grads: list[Tensor], accumulate: torch.dtype | None) -> list[float]:
    if not grads:
        return []
    try:
        # `.item()` on a CPU scalar is 0.17 us; stacking them first and `.tolist()` costs half as much again.
        return [norm.item() for norm in _foreach_norm(grads, accumulate)]
    except (RuntimeError, NotImplementedError, TypeError):
        # Sparse gradients raise in the fused call, and classes of the user's that do not know it.
        return list(_one_by_one(grads, accumulate))


def _one_by_one(grads: list[Tensor], accumulate: torch.dtype | None) -> Iterator[float]:
    for grad in grads:
        values = _dense(grad)
        yield 0.0 if values is None else torch.linalg.vector_norm(values.detach(), dtype=accumulate).item()


def _dense(grad: Tensor) -> Tensor | None:
    """The gradient's values here as a strided tensor; None where finding them takes a synchronisation."""
    if is_distributed_tensor(grad):
        return None if is_pending_sum(grad) else local_part(grad)
    if grad.layout is torch.strided:
        return grad
    if grad.layout is torch.sparse_coo:
        if grad.is_coalesced():
            return grad.values()
        # An uncoalesced gradient holds an index twice, and its norm is not that of its values.
        return None if grad.is_cuda else grad.detach().coalesce().values()
    return grad.values()


def _is_finite(tensor: Tensor) -> bool:
    values = _dense(tensor)
    if values is None or values.numel() == 0:
        return True
    # The inf-norm reads the tensor once and allocates nothing, unlike isfinite().all().
    return bool(torch.isfinite(torch.linalg.vector_norm(values.detach(), float("inf"))))
