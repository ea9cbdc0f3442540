"""The live autograd graph behind a non-finite loss: which operation made the first bad value.

Before backward runs, a CPU graph still holds the tensors its operations saved. A saved input also says which
operation produced it (its own ``grad_fn``), so good and bad outputs are known for many operations, and the
birthplace lies between the last good and the first bad ones. Nothing is run: saved tensors behind hooks are
left alone, because reading them may re-run a checkpointed forward or load from disk. Bad steps only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar

import torch

T = TypeVar("T")

# A 48-layer transformer has about 3000 operations; 20 000 are walked in about 100 ms.
MAX_OPERATIONS: Final = 20_000
# Reading more saved memory than this would stall the step for seconds.
MAX_ELEMENTS: Final = 1 << 28
# They move, select, copy or bound values, and so never make a bad one from good ones.
_HARMLESS: Final = frozenset(
    {
        "AliasBackward0", "AsStridedBackward0", "CatBackward0", "CloneBackward0", "EluBackward0",
        "EmbeddingBackward0", "ExpandBackward0", "GatherBackward0", "GeluBackward0", "IndexBackward0",
        "IndexSelectBackward0", "LeakyReluBackward0", "LogSoftmaxBackward0", "MaxPool2DWithIndicesBackward0",
        "NllLossBackward0", "PermuteBackward0", "ReluBackward0", "ReshapeAliasBackward0", "SelectBackward0",
        "SigmoidBackward0", "SiluBackward0", "SliceBackward0", "SoftmaxBackward0", "SplitBackward0",
        "SqueezeBackward0", "SqueezeBackward1", "StackBackward0", "TBackward0", "TanhBackward0",
        "TransposeBackward0", "UnbindBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
    }
)  # fmt: skip
# Of those, the ones whose result is the leaf's own values in another shape.
_VIEWS: Final = frozenset(
    {
        "AliasBackward0", "AsStridedBackward0", "ExpandBackward0", "PermuteBackward0", "ReshapeAliasBackward0",
        "SelectBackward0", "SliceBackward0", "SqueezeBackward0", "TBackward0", "TransposeBackward0",
        "UnsqueezeBackward0", "ViewBackward0",
    }
)  # fmt: skip
# Linear in their operands: with small ones, the result cannot overflow.
_LINEAR: Final = frozenset(
    {"AddmmBackward0", "BaddbmmBackward0", "BmmBackward0", "ConvolutionBackward0", "MmBackward0"}
)  # fmt: skip
# They overflow only where one of their operands, the result of another operation, all but did.
_ADDITIVE: Final = frozenset(
    {
        "AddBackward0", "MeanBackward0", "MeanBackward1", "NegBackward0", "SubBackward0", "SumBackward0",
        "SumBackward1",
    }
)  # fmt: skip
_WIDE: Final = frozenset({torch.float32, torch.float64, torch.bfloat16})
# A product of two such sums over a billion elements and stays finite in float32.
_SMALL: Final = 1e12
_ROOTS: Final = {"LogBackward0": 0.0, "Log2Backward0": 0.0, "Log10Backward0": 0.0, "Log1pBackward0": -1.0}


@dataclass(slots=True, eq=False)
class Operation:
    """One node of the graph.

    Attributes:
        name: As autograd calls it, such as ``AddmmBackward0``.
        number: Its place in the order of execution.
        inputs: Operations whose results it used, parameters' leaves left out.
        parameters: Leaves that require a gradient and feed it directly, through views at most.
        bad: Whether its result holds a NaN or Inf; None where nobody kept the result.
        bad_leaves: What autograd calls the bad tensors that it was given from outside the graph, no parameters.
        proven: Its operands alone explain a bad result: a division by zero, the logarithm of zero.
        cleared: Its operands are too small for a result that overflows.
    """

    name: str
    number: int
    inputs: list[Operation] = field(default_factory=list)
    parameters: list[torch.Tensor] = field(default_factory=list)
    bad: bool | None = None
    bad_leaves: set[str] = field(default_factory=set)
    proven: bool = False
    cleared: bool = False


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations behind a loss in order of execution, and those among which the bad value was born.

    Attributes:
        operations: All that were reached, oldest first.
        suspects: The birthplace is one of these, oldest first; empty where the graph does not tell.
        from_leaf: The bad value came into the graph with a tensor that is no parameter.
    """

    operations: Sequence[Operation]
    suspects: Sequence[Operation] = ()
    from_leaf: bool = False


def operations_behind(
    results: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
) -> list[tuple[Operation, frozenset[str]]]:
    """The operations that made these results, oldest first; none where there are too many.

    With each, what autograd calls those of its operands that are ``given``, views of these, or copies.
    """
    reader = _Reader(results)
    reads = reader.readers_of(given)
    return [(operation, frozenset(reads.get(operation, ()))) for operation in reader.in_order()]


def suspects_behind(bad: torch.Tensor) -> Graph:
    """The graph of a CPU tensor that holds a NaN or Inf, while that graph is alive."""
    reader = _Reader([bad])
    operations = reader.in_order()
    root = reader.operations.get(bad.grad_fn)
    if root is None:
        return Graph(operations)
    reader.read_saved()
    root.bad = True
    suspects = _suspects(root)
    if any(operation.bad_leaves for operation in suspects):
        return Graph(operations, [o for o in suspects if o.bad_leaves], from_leaf=True)
    return Graph(operations, suspects)


class _Reader:
    """Builds `Operation`s from autograd's nodes. Holds the nodes only while it lives."""

    def __init__(self, results: Sequence[torch.Tensor]) -> None:
        self.operations: dict[Any, Operation] = {}
        self._finite: dict[tuple[int, int, torch.Size], bool] = {}
        self._elements = 0
        nodes = dict.fromkeys(result.grad_fn for result in results if result.grad_fn is not None)
        for node in growing(nodes):
            if len(nodes) > MAX_OPERATIONS:
                return
            nodes.update((child, None) for child, _ in node.next_functions if child is not None)
        leaves = {node: leaf for node in nodes if (leaf := _leaf_behind_views(node)) is not None}
        for node in nodes:
            if node not in leaves:
                self.operations[node] = Operation(node.name(), node._sequence_nr())  # noqa: SLF001 - no public one
        for node, operation in self.operations.items():
            for child, _ in node.next_functions:
                if child in leaves:
                    operation.parameters.append(leaves[child])
                elif child in self.operations:
                    operation.inputs.append(self.operations[child])

    def in_order(self) -> list[Operation]:
        return sorted(self.operations.values(), key=lambda operation: operation.number)

    def readers_of(self, given: Sequence[torch.Tensor]) -> dict[Operation, set[str]]:
        """Operations that used one of these tensors, and what they call it."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        contents = {content for tensor in given if (content := _content(tensor)) is not None}
        sizes = {count for count, _, _ in contents}  # most tensors need not be read
        found: dict[Operation, set[str]] = {}
        for node, operation in self.operations.items():
            for name, tensor in _saved(node):
                if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.grad_fn:
                    continue
                is_copy = tensor.numel() in sizes and _content(tensor) in contents
                if is_copy or tensor.untyped_storage().data_ptr() in storages:
                    found.setdefault(operation, set()).add(name)
        return found

    def read_saved(self) -> None:
        for node, operation in self.operations.items():
            operands = []
            for name, tensor in _saved(node):
                operation.proven = operation.proven or _proves(operation.name, name, tensor)
                bad = self._is_bad(tensor)
                if bad is None:
                    continue
                producer = self.operations.get(tensor.grad_fn)
                if producer is not operation:
                    operands.append((tensor, bad))
                if producer is not None:
                    # Of several results (or views of one) each may be saved: one bad one is enough.
                    producer.bad = bad or bool(producer.bad)
                elif bad and not any(tensor is parameter for parameter in operation.parameters):
                    operation.bad_leaves.add(name)
            wide = _is_wide(node)
            operation.cleared = (
                operation.name in _HARMLESS
                or (wide and (operation.name in _ADDITIVE or _are_small(operation, operands)))
                or _is_gentle(operation.name, operands, _SMALL if wide else 1.0)
            )

    def _is_bad(self, tensor: torch.Tensor) -> bool | None:
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
            return None
        if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return None
        key = (tensor.data_ptr(), tensor._version, tensor.size())  # noqa: SLF001 - no public version counter
        known = self._finite.get(key)
        if known is None:
            self._elements += tensor.numel()
            if self._elements > MAX_ELEMENTS:
                return None
            known = self._finite[key] = not bool(torch.isfinite(tensor.detach()).all())
        return known


def _content(tensor: torch.Tensor) -> tuple[int, float, float] | None:
    """What CPU tensors have in common that hold the same values, in whatever order; None without variety."""
    if not tensor.is_cpu or tensor.dtype not in _WIDE or not tensor.numel():
        return None
    least, most = (float(value) for value in torch.aminmax(tensor.detach()))
    return (tensor.numel(), least, most) if least < most else None


def _leaf_behind_views(node: Any) -> torch.Tensor | None:
    """The parameter that this node accumulates into or is a mere view of."""
    while True:
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            return leaf
        if node.name() not in _VIEWS or len(node.next_functions) != 1:
            return None
        node = node.next_functions[0][0]
        if node is None:
            return None


def _saved(node: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that the node saved, by name, as far as no saved-tensor hook stands in between."""
    for raw_name in _raw_names(type(node)):
        name = raw_name.removeprefix("_raw_saved_")
        try:
            raw = getattr(node, raw_name)
            behind_hooks = any(
                one is not None and one.unpack_hook is not None
                for one in (raw if isinstance(raw, (tuple, list)) else (raw,))
            )
            if behind_hooks:
                continue
            # A result that was saved knows its operation only when asked for through that operation.
            saved = node.saved_tensors if name == "tensors" else getattr(node, f"_saved_{name}")
        except RuntimeError:  # freed by an earlier backward, or changed in place since
            continue
        for tensor in saved if isinstance(saved, (tuple, list)) else (saved,):
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


def _raw_names(kind: type) -> Iterable[str]:
    names = _names.get(kind)
    if names is None:
        names = _names[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    return names


_names: Final[dict[type, tuple[str, ...]]] = {}


def _proves(operation: str, operand: str, tensor: torch.Tensor) -> bool:
    """Whether this operand makes a bad result, whatever the others are."""
    values = tensor.detach()
    if operation.startswith("DivBackward") and operand == "other":
        return bool((values == 0).any())
    root = _ROOTS.get(operation)
    return root is not None and operand == "self" and bool((values <= root).any())


def _is_wide(node: Any) -> bool:
    # float16 ends at 65504: there nobody is above suspicion.
    return all(result.dtype in _WIDE for result in node._input_metadata)  # noqa: SLF001 - no public one


def _are_small(operation: Operation, operands: Sequence[tuple[torch.Tensor, bool]]) -> bool:
    if operation.name not in _LINEAR or any(bad for _, bad in operands):
        return False
    known = {id(tensor): tensor.detach() for tensor, _ in operands}
    known.update((id(parameter), parameter.detach()) for parameter in operation.parameters)
    return len(known) > 1 and all(not t.numel() or float(t.abs().max()) < _SMALL for t in known.values())


def _is_gentle(operation: str, operands: Sequence[tuple[torch.Tensor, bool]], limit: float) -> bool:
    """Whether it scales by a known factor up to ``limit``: what overflows after that all but did before."""
    if len(operands) != 1 or operands[0][1]:
        return False
    factor = operands[0][0].detach().abs()
    if operation == "MulBackward0":
        return float(factor.max()) <= limit
    return operation == "DivBackward0" and float(factor.min()) * limit >= 1.0


def _suspects(root: Operation) -> list[Operation]:
    """The oldest known-bad results behind the loss, and what may have made them so."""
    reached: dict[Operation, None] = {root: None}
    for operation in growing(reached):
        for source in operation.inputs:
            if source.bad is not False:
                reached.setdefault(source)
    # A bad result explains all that use it. What is left are those with no bad result behind them.
    tainted: dict[Operation, bool] = {}
    for operation in sorted(reached, key=lambda one: one.number):
        tainted[operation] = any(source.bad or tainted.get(source, False) for source in operation.inputs)
    suspects = {one: None for one in reached if one.bad and not tainted[one]}
    for operation in growing(suspects):
        for source in operation.inputs:
            if source.bad is None:
                suspects.setdefault(source)
    found = sorted(suspects, key=lambda one: one.number)
    proven = [one for one in found if one.proven]
    return proven[:1] or [one for one in found if not one.cleared or one.bad_leaves] or found


def growing(items: dict[T, None]) -> Iterator[T]:
    """Iterate over an ordered set that grows meanwhile."""
    position = 0
    while position < len(items):
        fresh = list(islice(items, position, None))
        position += len(fresh)
        yield from fresh
