"""The files of objectives that commands are given, and what is told of mistakes in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from gradwatch_slo.files import read_files
from gradwatch_slo.objective import ObjectiveSet, objectives_of
from gradwatch_slo.objectives import default_documents
from gradwatch_slo.problems import ObjectiveFileError
from gradwatch_slo.reader import Document
from gradwatch_slo.wording import counted

FILE: Final = click.Path(path_type=Path)
files_option: Final = click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="OpenSLO file, folder of *.yaml and *.yml files, or - for the standard input; repeatable"
    " [default: those shipped].",
)


def load_objectives(files: Sequence[Path]) -> ObjectiveSet:
    """Return the objectives of files, or those shipped; tell of SLOs that are not evaluated here.

    Raises:
        click.ClickException: mistakes in the files, which have been told, one a line.
    """
    found = objectives_in(read_documents(files))
    for skipped in found.unevaluated:
        click.echo(f"warning: {skipped}", err=True)
    return found


def read_documents(files: Sequence[Path]) -> list[Document]:
    """Return the documents of files, or those shipped; raises as `load_objectives` does."""
    if not files:
        return default_documents()
    with _told():
        return read_files(files)


def objectives_in(documents: Sequence[Document]) -> ObjectiveSet:
    """Return what documents ask for; raises as `load_objectives` does."""
    with _told():
        return objectives_of(documents)


@contextmanager
def _told() -> Iterator[None]:
    """Print every problem of files, one a line."""
    try:
        yield
    except ObjectiveFileError as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        raise click.ClickException(f"{counted(len(error.problems), 'problem')} found") from error
