"""Keeps all that was measured in one file: a part can be done again, and the page made of the whole."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from overhead.blocks import Block, Blocks
from overhead.memory import DeviceMemory, Memory, MemoryResult
from overhead.models import MODELS
from overhead.plan import Result
from page import PAGE

RESULTS: Final = PAGE.with_suffix(".json")
# 0.01 %: no block is that good.
_DIGITS = 5


@dataclass
class Results:
    """``overhead``: by device, threads and model; ``memory``: by device."""

    overhead: dict[tuple[str, int, str], Result] = field(default_factory=dict)
    memory: dict[str, MemoryResult] = field(default_factory=dict)

    def add(self, results: Iterable[Result]) -> None:
        """Put these in, each in the place of the one before it."""
        self.overhead |= {(each.device, each.threads, each.model): each for each in results}

    def in_order(self) -> list[Result]:
        """By device, threads, and as the models are listed."""
        order = list(MODELS)
        return sorted(
            self.overhead.values(), key=lambda each: (each.device, each.threads, order.index(each.key))
        )

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tree = {
            "overhead": [_packed(each) for each in self.in_order()],
            "memory": [dataclasses.asdict(each) for each in self.memory.values()],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(tree, separators=(",", ":")) + "\n")
        partial.replace(path)


def load(path: Path) -> Results:
    """What was measured before; nothing where there is no file."""
    if not path.exists():
        return Results()
    tree = json.loads(path.read_text())
    found = Results(memory={each["device"]: _memory(each) for each in tree["memory"]})
    found.add(map(_unpacked, tree["overhead"]))
    return found


def _packed(result: Result) -> dict[str, Any]:
    tree = {each.name: getattr(result, each.name) for each in dataclasses.fields(result)}
    return tree | {
        "long": _columns(result.long),
        "short": _columns(result.short),
        "clip": {case: _columns(blocks) for case, blocks in result.clip.items()},
    }


def _unpacked(tree: dict[str, Any]) -> Result:
    return Result(
        **tree
        | {
            "ill": tuple(tree["ill"]),
            "long": _blocks(tree["long"]),
            "short": _blocks(tree["short"]),
            "clip": {case: _blocks(columns) for case, columns in tree["clip"].items()},
        }
    )


def _columns(blocks: Blocks) -> dict[str, dict[str, list[Any]]]:
    """A list for each attribute: a third of the size."""
    return {
        name: {
            each.name: [_rounded(getattr(block, each.name)) for block in same]
            for each in dataclasses.fields(Block)
        }
        for name, same in blocks.items()
    }


def _blocks(columns: dict[str, dict[str, list[Any]]]) -> Blocks:
    return {
        name: [
            _block(dict(zip(attributes, values, strict=True)))
            for values in zip(*attributes.values(), strict=True)
        ]
        for name, attributes in columns.items()
    }


def _block(tree: dict[str, Any]) -> Block:
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in tree.items()}
    values["overheads"] = tuple(values["overheads"])
    return Block(**values)


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")  # JSON has no NaN


def _memory(tree: dict[str, Any]) -> MemoryResult:
    device = tree["device_memory"]
    return MemoryResult(
        **tree
        | {
            "bare": Memory(**tree["bare"]),
            "watched": Memory(**tree["watched"]),
            "device_memory": None if device is None else DeviceMemory(**device),
        }
    )
