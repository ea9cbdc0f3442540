"""The files that a person names: files, folders of them, and the standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from gradwatch_slo.problems import ObjectiveFileError, Problem
from gradwatch_slo.reader import Document, parse_documents, read_documents

STANDARD_INPUT: Final = "-"
_SUFFIXES: Final = (".yaml", ".yml")


def _standard_input() -> bytes:
    return sys.stdin.buffer.read()


def read_files(paths: Iterable[Path], stdin: Callable[[], bytes] = _standard_input) -> list[Document]:
    """Read and validate files, the ``*.yaml`` and ``*.yml`` files in folders, and ``-`` from ``stdin``.

    A file that is named twice, by itself and by its folder, is read once.

    Raises:
        ObjectiveFileError: with every problem of every file.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    for read in _readings(paths, stdin):
        try:
            documents += read()
        except ObjectiveFileError as error:
            problems += error.problems
    if problems:
        # References into a file that was refused cannot be judged.
        raise ObjectiveFileError(problems)
    return documents


def _readings(paths: Iterable[Path], stdin: Callable[[], bytes]) -> Iterator[Callable[[], list[Document]]]:
    """Yield what reads each file, once."""
    named: set[str] = set()
    for path in paths:
        if str(path) == STANDARD_INPUT:
            yield lambda: parse_documents(stdin(), "<stdin>")
            continue
        # os.path: where a folder above may not be read, the file's own reading tells so.
        files, failed = _in_folder(path) if os.path.isdir(path) else ([path], [])  # noqa: PTH112
        yield from (partial(_refuse, problem) for problem in failed)
        for file in files:
            if (real := os.path.realpath(file)) not in named:
                named.add(real)
                yield partial(read_documents, file)


def _in_folder(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Return the files below a folder in the order of their names, and what could not be looked into."""
    files: list[Path] = []
    failed: list[Problem] = []

    def tell(error: OSError) -> None:
        failed.append(Problem(str(error.filename), 1, "", f"cannot be read: {error.strerror}"))

    for where, folders, names in os.walk(folder, onerror=tell):
        # Kubernetes mounts a ConfigMap as links into a hidden folder beside them: each file is there twice.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(where, name) for name in sorted(names) if name.endswith(_SUFFIXES)]
    if not files and not failed:
        failed.append(Problem(str(folder), 1, "", "found no *.yaml or *.yml file in it, expected some"))
    return files, failed


def _refuse(problem: Problem) -> list[Document]:
    raise ObjectiveFileError([problem])
