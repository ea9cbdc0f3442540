"""OpenSLO files as validated documents that know their lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from gradwatch_slo.openslo import API_VERSION, KINDS, OpenSLO
from gradwatch_slo.problems import ObjectiveFileError, Problem, one_of, suggestion
from gradwatch_slo.strict import shown
from gradwatch_slo.yaml_lines import FieldPath, YamlDocument, parse_yaml, read_yaml

_FIELDS: Final = ("apiVersion", "kind", "metadata", "spec")


@dataclass(frozen=True, slots=True)
class Document:
    """One validated OpenSLO object and where it was written."""

    content: OpenSLO
    _source: YamlDocument

    @property
    def file(self) -> str:
        """The file's name, as it was given."""
        return self._source.file

    def problem(self, path: FieldPath, message: str) -> Problem:
        """Return a problem with one of the document's fields."""
        return self._source.problem(path, message)


def read_documents(path: Path) -> list[Document]:
    """Read and validate one file.

    Raises:
        ObjectiveFileError: with every problem of the file.
    """
    return _validated(read_yaml(path))


def parse_documents(content: bytes, file: str) -> list[Document]:
    """Validate a file's content; see :func:`read_documents`. ``file`` names it in problems."""
    return _validated(parse_yaml(content, file))


def _validated(sources: list[YamlDocument]) -> list[Document]:
    documents: list[Document] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            content = _content(source)
        except ValidationError as error:
            problems += field_problems(source, error)
        except ObjectiveFileError as error:
            problems += error.problems
        else:
            documents.append(Document(content, source))
        problems += source.problems.values()
    if problems:
        raise ObjectiveFileError(sorted(problems, key=lambda problem: (problem.line, problem.field)))
    return documents


def field_problems(source: YamlDocument, error: ValidationError) -> list[Problem]:
    """Return what is wrong with the fields of a document, with their lines."""
    # What YAML itself misread is reported as such, not as a wrong or a missing value as well.
    misread = {path[:end] for path in source.problems for end in (len(path), len(path) - 1)}
    return [
        source.problem(detail["loc"], detail["msg"])
        for detail in error.errors(include_url=False)
        if detail["loc"] not in misread
    ]


def _content(source: YamlDocument) -> OpenSLO:
    value = source.value
    if not isinstance(value, dict):
        if source.problems:
            raise ObjectiveFileError(())
        raise ObjectiveFileError(
            [source.problem((), f"found {shown(value)}, expected an OpenSLO document: a mapping")]
        )
    problems = list(_header_problems(source, value))
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ObjectiveFileError(problems)
    return KINDS[kind].model_validate(value)


def _header_problems(source: YamlDocument, value: dict[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the two fields that say what a document is, and fields that none has."""
    for name, expected in (("apiVersion", [API_VERSION]), ("kind", list(KINDS))):
        found = value.get(name)
        if found not in expected and (name,) not in source.problems:
            hint = suggestion(found, expected) if isinstance(found, str) else ""
            yield source.problem((name,), f"found {shown(found)}, expected {one_of(expected)}{hint}")
    for name in value:
        if name not in _FIELDS:
            message = f"found an unknown field, expected {one_of(_FIELDS)}{suggestion(name, _FIELDS)}"
            yield source.problem((name,), message)
