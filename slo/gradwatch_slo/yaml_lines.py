"""YAML documents as plain values that remember their lines.

Built on PyYAML's composed nodes rather than its constructors, for three reasons: every field keeps its line,
a number is read from its text (``0.99`` is ``Decimal("0.99")`` and was never a binary float), and what YAML
silently reinterprets (``12:30`` as base 60, repeated keys) becomes a problem instead.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import yaml

from gradwatch_slo.problems import ObjectiveFileError, Problem, path_text

FieldPath = tuple[str | int, ...]

_TAG: Final = "tag:yaml.org,2002:"
_WRITTEN: Final = "written out:"
_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]{1,9})?")
_TRUE: Final = frozenset({"true", "yes", "on"})
# Aliases can unfold a small file into a huge one; a file of objectives has some hundreds of values.
_MOST_VALUES: Final = 100_000
_LONGEST_NUMBER: Final = 40


@dataclass(slots=True)
class YamlDocument:
    """One document: its value, the line of every field, and the problems that YAML itself has with it."""

    file: str
    line: int
    value: Any = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: dict[FieldPath, Problem] = field(default_factory=dict)

    def problem(self, path: FieldPath, message: str) -> Problem:
        """Return a problem at a field, or at the innermost field around it that the file has."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        return Problem(self.file, self.lines.get(known, self.line), path_text(path), message)


def read_yaml(
    path: Path, *, expected: str = "OpenSLO documents", may_be_empty: bool = False
) -> list[YamlDocument]:
    """Return the documents of a file, without empty ones. ``expected``: what they should be, for messages.

    Raises:
        ObjectiveFileError: the file cannot be read, is not YAML, or has no document unless it ``may_be_empty``.
    """
    file = str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ObjectiveFileError([Problem(file, 1, "", f"cannot be read: {reason}")]) from error
    return parse_yaml(content, file, expected=expected, may_be_empty=may_be_empty)


def parse_yaml(
    content: bytes, file: str, *, expected: str = "OpenSLO documents", may_be_empty: bool = False
) -> list[YamlDocument]:
    """Return the documents of a file's content; see :func:`read_yaml`."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        documents = [_document(node, file) for node in _nodes(content)]
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = Problem(file, line, "", f"found byte 0x{content[error.start]:02x}, expected UTF-8 text")
        raise ObjectiveFileError([problem]) from error
    except yaml.reader.ReaderError as error:
        # Positions of the reader count characters of the text.
        line = content.decode().count("\n", 0, error.position) + 1
        message = f"found the control character {chr(error.character)!a}, expected plain text"
        raise ObjectiveFileError([Problem(file, line, "", message)]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise ObjectiveFileError([Problem(file, line, "", f"is not valid YAML: {message}")]) from error
    except RecursionError as error:
        message = f"found lists or mappings nested too deeply, expected {expected}"
        raise ObjectiveFileError([Problem(file, 1, "", message)]) from error
    if not documents and not may_be_empty:
        raise ObjectiveFileError([Problem(file, 1, "", f"found no document, expected {expected}")])
    return documents


class _Loader(yaml.SafeLoader):
    """Composes nodes as ever, and marks the tags that were written out, which hide what a text looks like."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Mark the tag of a node that has one."""
        tag = getattr(self.peek_event(), "tag", None)  # type: ignore[no-untyped-call]  # an alias has none
        node = super().compose_node(parent, index)
        if node is not None and tag is not None:
            node.tag = f"{_WRITTEN}{tag}"
        return node


def _nodes(content: bytes) -> Iterator[yaml.Node]:
    loader = _Loader(content.decode())
    try:
        while loader.check_node():
            node = loader.get_node()
            empty = isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"
            if node is not None and not empty:
                yield node
    except (ValueError, OverflowError) as error:
        # What the loader makes of numbers without looking: those of escapes and of %YAML.
        message = "found a number that is too large"
        raise yaml.MarkedYAMLError(problem=message, problem_mark=loader.get_mark()) from error


def _document(node: yaml.Node, file: str) -> YamlDocument:
    document = YamlDocument(file, node.start_mark.line + 1)
    document.value = _Reading(document).value(node, ())
    return document


class _Reading:
    """Turns the nodes of one document into values."""

    def __init__(self, document: YamlDocument) -> None:
        self._document = document
        self._open: list[yaml.Node] = []
        self._count = 0

    def value(self, node: yaml.Node, path: FieldPath) -> Any:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        self._count += 1
        if self._count > _MOST_VALUES:
            return self._refuse(
                path, f"found more than {_MOST_VALUES} values, expected fewer: check the aliases"
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if any(node is outer for outer in self._open):
            return self._refuse(path, "found an alias of a value around it, expected no cycle")
        self._open.append(node)
        try:
            return self._collection(node, path)
        finally:
            self._open.pop()

    def _collection(self, node: yaml.Node, path: FieldPath) -> Any:
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        return self._refuse(path, f"found the YAML tag {_short(node.tag)}, expected a plain value")

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if self._count > _MOST_VALUES:
                break
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(path, "found a list or a mapping as a key, expected a word")
                continue
            key, inner = key_node.value, (*path, key_node.value)
            if key_node.tag == f"{_TAG}merge":
                self._document.lines[inner] = key_node.start_mark.line + 1
                self._refuse(inner, "found a merge key, expected the fields themselves")
            elif key_node.tag.startswith(_WRITTEN):
                self._refuse(path, f"found the YAML tag {_short(key_node.tag)} of a key, expected a plain word")
            elif odd := _odd_character(key):
                self._refuse(path, f"found {odd} in a key, expected Unicode text")
            elif key in mapping:
                # A key that is there twice is refused at its second line: YAML would keep only that one.
                message = (
                    f"found the field twice (first on line {self._document.lines[inner]}), expected it once"
                )
                line = key_node.start_mark.line + 1
                self._document.problems[inner] = Problem(self._document.file, line, path_text(inner), message)
            else:
                self._document.lines[inner] = key_node.start_mark.line + 1
                mapping[key] = self.value(value_node, inner)
        return mapping

    def _scalar(self, node: yaml.ScalarNode, path: FieldPath) -> Any:
        text: str = node.value
        match node.tag.removeprefix(_TAG):
            # A date is the text that was written: OpenSLO's own examples leave it unquoted.
            case "str" | "timestamp":
                if odd := _odd_character(text):
                    return self._refuse(path, f"found {odd}, expected Unicode text")
                return text
            case "null":
                return None
            case "bool":
                return text.lower() in _TRUE
            case "int" | "float" if len(text) > _LONGEST_NUMBER:
                return self._refuse(path, "found a very long number, expected at most 40 characters")
            case "int" if _INTEGER.fullmatch(text):
                return int(text)
            case "float" if _FLOAT.fullmatch(text):
                return Decimal(text)
            case "int" | "float":
                return self._refuse(path, f"found {text}, expected a decimal number, or a text in quotes")
        return self._refuse(path, f"found the YAML tag {_short(node.tag)}, expected a plain value")

    def _refuse(self, path: FieldPath, message: str) -> None:
        self._document.problems.setdefault(path, self._document.problem(path, message))


def _odd_character(text: str) -> str | None:
    # Escapes such as "\\ud800" smuggle in what no UTF-8 file can hold, no terminal print, or no database store.
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "half a surrogate pair"
    return "a null character" if "\0" in text else None


def _short(tag: str) -> str:
    return tag.removeprefix(_WRITTEN).replace(_TAG, "!!")
