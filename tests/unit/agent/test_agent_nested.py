"""The one walk through what models take and return."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.tensors.nested import mapped, tensors, walk


@dataclass
class Output:
    logits: Any
    states: Any = None


Pair = namedtuple("Pair", ["left", "right"])

A, B, C, D = (torch.full((1,), float(i)) for i in range(4))


def paths(value: Any, **limits: int) -> list[tuple[tuple[Any, ...], int]]:
    return [(path, int(tensor)) for path, tensor in walk(value, **limits)]


def test_every_kind_of_structure_is_looked_into_in_the_order_it_is_written_in() -> None:
    value = {
        "z": [A, "text", (B, None)],
        "a": Output(Pair(C, 7), UserDict({3: D})),
        "m": OrderedDict(b=B, a=A),
        "type": Output,
    }
    assert paths(value) == [
        (("z", 0), 0), (("z", 2, 0), 1), (("a", "logits", 0), 2), (("a", "states", 3), 3),
        (("m", "b"), 1), (("m", "a"), 0),
    ]  # fmt: skip
    assert [int(tensor) for tensor in tensors(value)] == [number for _, number in paths(value)]


def test_a_tensor_is_its_own_structure_and_anything_else_holds_none() -> None:
    assert paths(B) == [((), 1)]
    assert [paths(value) for value in (None, 1.5, "text", b"bytes", {1, 2}, Output, torch.nn.Linear(1, 1))] == [
        []
    ] * 7


def test_subclasses_of_tensors_are_tensors_and_told_apart_by_their_type() -> None:
    class Image(Tensor):
        pass

    image, weight = A.as_subclass(Image), torch.nn.Parameter(B)
    found = list(tensors([image, weight, C]))
    assert [type(tensor) for tensor in found] == [Image, torch.nn.Parameter, Tensor]


def test_it_goes_no_deeper_than_told() -> None:
    value = [A, [B, [C, [D]]]]
    assert [paths(value, deepest=depth)[-1:] for depth in range(5)] == [
        [], [((0,), 0)], [((1, 0), 1)], [((1, 1, 0), 2)], [((1, 1, 1, 0), 3)],
    ]  # fmt: skip


def test_it_looks_at_no_more_values_than_told_whatever_they_are() -> None:
    looked = 0

    class Counting(UserDict[int, Any]):
        def __getitem__(self, key: int) -> Any:
            nonlocal looked
            looked += 1
            return super().__getitem__(key)

    wide = Counting({i: i for i in range(1000)})
    assert paths([A, wide, B], most=100) == [((0,), 0)]
    assert looked <= 100
    assert paths([A, [1] * 1000, B], most=1003) == [((0,), 0)]
    assert paths([A, [1] * 1000, B], most=1004) == [((0,), 0), ((2,), 1)]


def test_a_structure_that_holds_itself_comes_to_an_end() -> None:
    value: list[Any] = [A]
    value.append(value)
    assert 2 < len(list(tensors(value))) < 100
    value.append(value)
    assert 2 < len(list(tensors(value, most=500))) < 500


def test_a_field_that_was_deleted_or_never_set_is_passed_over() -> None:
    value = Output(A, B)
    del value.logits
    assert paths(value) == [(("states",), 1)]


@given(
    st.recursive(
        st.integers(0, 3) | st.none() | st.text(max_size=2),
        lambda part: (
            st.lists(part, max_size=4)
            | st.dictionaries(st.text(max_size=2), part, max_size=4)
            | st.tuples(part, part)
            | st.builds(Output, part, part)
        ),
        max_leaves=30,
    )
)
def test_the_path_leads_to_the_tensor_and_none_is_left_out(plan: Any) -> None:
    made: list[Tensor] = []

    def build(part: Any) -> Any:
        if isinstance(part, int):
            made.append(torch.tensor(part))
            return made[-1]
        if isinstance(part, dict):
            return {key: build(inner) for key, inner in part.items()}
        if isinstance(part, Output):
            return Output(build(part.logits), build(part.states))
        return type(part)(map(build, part)) if isinstance(part, list | tuple) else part

    value = build(plan)
    found = list(walk(value))
    assert [id(tensor) for _, tensor in found] == [id(tensor) for tensor in made]
    for path, tensor in found:
        inner = value
        for place in path:
            inner = getattr(inner, place) if isinstance(inner, Output) else inner[place]
        assert inner is tensor
    # What `mapped` changes is what `tensors` finds.
    changed: list[Tensor] = []
    mapped(value, lambda tensor: changed.append(tensor) or tensor)
    assert list(map(id, changed)) == [id(tensor) for tensor in made]
