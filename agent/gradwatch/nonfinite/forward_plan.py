"""Which module runs which operation of a forward pass, learned once, and looked up when one made a NaN.

Autograd numbers operations as they run. During one early forward, temporary hooks note the number at which
each module begins and ends; the graph of its output then says which operation each number was. The next steps
run the same plan, shifted: operations that use a parameter tell by how much, and the names in between must
agree. Where the plan does not fit (control flow took another way), the modules of the nearest parameters up and
down the graph say what both are part of.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from gradwatch.gradients.norms import layer_name
from gradwatch.loop.module_hooks import is_script
from gradwatch.nonfinite.graph_walk import Graph, Operation, growing, operations_behind

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """Operations of one forward pass, by their distance from its first.

    Attributes:
        operations: Name of the operation and path of the innermost module that ran it.
        length: Numbers the forward pass used up.
        uses: Distances of the operations that each parameter (by ``id``) feeds.
        reads: By distance, which operands of the operation are the model's inputs, or views of them.
    """

    operations: Mapping[int, tuple[str, str]]
    length: int
    uses: Mapping[int, Sequence[int]]
    reads: Mapping[int, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the graph a bad value was born.

    Attributes:
        phase: ``forward``, ``loss``, or None where it cannot be told.
        module: Path of the module, for ``forward``; None where it cannot be told.
        came_with: What it came with from outside the graph: the model's input, or a ``leaf`` that may be one or
            a constant of the module. None where it was made inside.
    """

    phase: Literal["forward", "loss"] | None
    module: str | None
    came_with: Literal["input", "leaf"] | None = None


NOWHERE: Final = Site(None, None)


class PlanRecorder:
    """Learns the plan of one forward pass of ``model``: made before it runs, asked after."""

    def __init__(self, model: nn.Module) -> None:
        self._begun = _number()
        self._marks: list[tuple[int, str]] = [(self._begun, "")]
        self._stack = [""]
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if module is not model and not is_script(module):
                path = layer_name(name)
                self._handles.append(module.register_forward_pre_hook(self._enter(path)))
                self._handles.append(module.register_forward_hook(self._leave))

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(_module: nn.Module, _inputs: object) -> None:
            if not torch.compiler.is_compiling():
                self._stack.append(path)
                self._marks.append((_number(), path))

        return enter

    def _leave(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        if not torch.compiler.is_compiling() and len(self._stack) > 1:
            self._stack.pop()
            self._marks.append((_number(), self._stack[-1]))

    def abandon(self) -> None:
        """Take the temporary hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def plan(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> ForwardPlan:
        """The plan, once the forward pass from these inputs has ended with these outputs."""
        self.abandon()
        end = _number()
        numbers = [number for number, _ in self._marks]
        operations: dict[int, tuple[str, str]] = {}
        uses: dict[int, list[int]] = {}
        reads: dict[int, frozenset[str]] = {}
        for operation, given in operations_behind(outputs, inputs):
            if self._begun <= operation.number < end:
                distance = operation.number - self._begun
                path = self._marks[bisect_right(numbers, operation.number) - 1][1]
                operations[distance] = (operation.name, path)
                if given:
                    reads[distance] = given
                for parameter in operation.parameters:
                    uses.setdefault(id(parameter), []).append(distance)
        return ForwardPlan(operations, end - self._begun, uses, reads)


def _number() -> int:
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined] # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Map:
    """What is known of one watched model's forward pass.

    Attributes:
        modules: Path of the module that owns a parameter, by the parameter's ``id``.
        plan: Its plan, once learned.
        prefix: Put in front of its paths where several models are watched.
    """

    modules: Mapping[int, str]
    plan: ForwardPlan | None = None
    prefix: str = ""


def site(graph: Graph, maps: Iterable[Map], *, chained: bool = False) -> Site:
    """Where the suspects of the graph are: the phase all share, and the module they have in common.

    ``chained``: What is given to a model may come, detached, from another pass of a watched one.
    """
    maps = tuple(maps)
    if not graph.suspects:
        return NOWHERE
    finder = _Finder(graph.operations, maps)
    found = [finder.place(operation) for operation in graph.suspects]
    phases = {place.phase for place in found}
    phase = phases.pop() if len(phases) == 1 else None
    module = common_path([place.module for place in found]) if phase == "forward" else None
    if not graph.from_leaf:
        return Site(phase, module)
    is_input = not chained and all(place.came_with == "input" for place in found)
    return Site(phase, module, "input" if is_input else "leaf")


def common_path(paths: Sequence[str | None]) -> str | None:
    """The innermost module that holds all of these; None where that is the whole model, or one is not known."""
    known = [path.split(".") for path in paths if path is not None]
    if not known or len(known) < len(paths):
        return None
    shared = known[0]
    for path in known[1:]:
        same = [one == other for one, other in zip(shared, path, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return ".".join(shared) or None


@dataclass(slots=True)
class _Finder:
    operations: Sequence[Operation]
    maps: Sequence[Map]
    _users: dict[Operation, list[Operation]] = field(default_factory=dict)
    _numbers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = [operation.number for operation in self.operations]
        for operation in self.operations:
            for source in operation.inputs:
                self._users.setdefault(source, []).append(operation)

    def place(self, operation: Operation) -> Site:
        planned = {
            found for each in self.maps if each.plan is not None
            if (found := self._planned(operation, each, each.plan)) is not None
        }  # fmt: skip
        inside = [found for found in planned if found.phase == "forward"]
        if len(inside) == 1:
            return inside[0]
        if not inside and planned:
            # Past the end of one model's forward, it may still be within another's.
            return Site("loss", None) if self._is_last(operation) else self._between(operation)
        return self._between(operation)

    def _planned(self, operation: Operation, model: Map, plan: ForwardPlan) -> Site | None:
        """Where the plan has the operation, if all its neighbours fit."""
        at = bisect_left(self._numbers, operation.number)
        before = next((o for i in range(at, -1, -1) if _places(o := self.operations[i], plan)), None)
        after = next(
            (o for i in range(at + 1, len(self.operations)) if _places(o := self.operations[i], plan)), None
        )
        anchor = before or after
        found: set[Site] = set()
        for distance in _places(anchor, plan) if anchor is not None else ():
            base = anchor.number - distance if anchor is not None else 0
            end = base + plan.length
            low = before.number if before is not None else base
            high = end if after is None else min(after.number + 1, end)
            if not self._fits(plan, base, low, high):
                continue
            if operation.number >= end:
                found.add(Site("loss", None))
            elif operation.number >= base:
                path = plan.operations[operation.number - base][1]
                reads = plan.reads.get(operation.number - base, frozenset())
                is_input = bool(operation.bad_leaves) and operation.bad_leaves <= reads
                found.add(
                    Site(
                        "forward",
                        ".".join(filter(None, (model.prefix, path))) or None,
                        "input" if is_input else None,
                    )
                )
        return found.pop() if len(found) == 1 else None

    def _fits(self, plan: ForwardPlan, base: int, low: int, high: int) -> bool:
        part = self.operations[bisect_left(self._numbers, low) : bisect_left(self._numbers, high)]
        return all(plan.operations.get(one.number - base, ("",))[0] == one.name for one in part)

    def _is_last(self, operation: Operation) -> bool:
        """Whether no parameter of a watched model is used after it."""
        return not self._owners(operation, self._users.get)

    def _between(self, operation: Operation) -> Site:
        """What the parameters it uses, or the nearest ones on both sides of it, have in common."""
        own = self._own(operation)
        if own:
            return Site("forward", common_path(own))
        later = self._owners(operation, self._users.get)
        if not later:
            return NOWHERE
        earlier = self._owners(operation, lambda one: one.inputs)
        module = common_path([*earlier, *later]) if earlier else None
        # Between two models there is the user's own code.
        return NOWHERE if module is None and len(self.maps) > 1 else Site("forward", module)

    def _own(self, operation: Operation) -> list[str]:
        return [
            ".".join(filter(None, (model.prefix, model.modules[id(parameter)])))
            for parameter in operation.parameters
            for model in self.maps
            if id(parameter) in model.modules and (model.plan is None or _places(operation, model.plan))
        ]

    def _owners(
        self, operation: Operation, neighbours: Callable[[Operation], Sequence[Operation] | None]
    ) -> list[str]:
        """Modules of the first parameters on every way that leads up or down from the operation."""
        paths: list[str] = []
        reached = dict.fromkeys(neighbours(operation) or ())
        for one in growing(reached):
            own = self._own(one)
            if own:
                paths += own
            else:
                reached.update(dict.fromkeys(neighbours(one) or ()))
        return paths


def _places(operation: Operation, plan: ForwardPlan) -> set[int]:
    """Distances at which the plan has this operation with one of its parameters."""
    return {
        distance
        for parameter in operation.parameters
        for distance in plan.uses.get(id(parameter), ())
        if plan.operations[distance][0] == operation.name
    }
