"""What happens around a saver: staging before it, publishing after it, and one event about how it went."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from gradwatch import conventions
from gradwatch.checkpoints.manifest import Manifest
from gradwatch.checkpoints.telling import name_of
from gradwatch.checkpoints.writing import (
    NothingWrittenError,
    NotSignedError,
    NotWholeError,
    Staging,
    shared_token,
    stage,
)
from gradwatch.conventions import Event
from gradwatch.safety import log
from gradwatch.telemetry import AttributeValue

Report = Callable[[Event, Mapping[str, AttributeValue | None]], object]

# What torch.distributed.checkpoint writes; each rank holds a part.
_PARTS: Final = "*.distcp"
_saves: Final[Counter[str]] = Counter()


@contextmanager
def saving(path: str | os.PathLike[str], report: Report, *, shared: bool, **known: Any) -> Iterator[Path]:
    """Yield where to save; afterwards it is at ``path``, whole and with a manifest, or the old one still is.

    ``known``: fields of the manifest.

    Raises:
        ValueError: ``path`` is no path of this machine.
        OSError: What was saved cannot be put in its place.
    """
    name = os.fspath(path)
    if not isinstance(name, str) or "://" in name:
        raise ValueError(
            f"expected a path of this machine, not {name!r}; `with watch.checkpoint():` marks other savers"
        )
    rank, ranks = _place()
    token = None
    if shared:
        _saves[name] += 1
        token = shared_token(Path(name), known.get("step"), _saves[name])
    staging = stage(Path(name), token=token)
    if staging is None:
        yield Path(name)
        return
    leads = rank == 0 or not shared
    save = _Save(staging, report, known)
    try:
        yield staging.path
        if leads:
            save.finish(rank, ranks)
    except Exception as error:
        save.tell_failed(error)
        raise
    finally:
        staging.discard(keep=not leads)


class _Save:
    def __init__(self, staging: Staging, report: Report, known: Mapping[str, Any]) -> None:
        self._staging = staging
        self._report = report
        self._about = Manifest(
            files=(),
            saved_at=datetime.now(UTC),
            torch=str(sys.modules["torch"].__version__) if "torch" in sys.modules else None,
            **known,
        )
        self._began = perf_counter()
        self._name = name_of(staging.target)

    def finish(self, rank: int, ranks: int) -> None:
        """Publish and tell.

        Raises:
            OSError: It cannot be published.
        """
        staging = self._staging
        part = ranks > 1 and not staging.shared and next(staging.path.glob(_PARTS), None) is not None
        if part:
            # One part a rank, and the same name for all: kept apart, no part takes another's place.
            staging.target = staging.target.with_name(f"{staging.target.name}.rank{rank}")
        try:
            manifest = staging.publish(self._about, whole=not part)
        except NothingWrittenError as error:
            if rank == 0:  # the other ranks often leave it to the first
                self._complain(error)
        except (NotWholeError, NotSignedError) as error:
            self._complain(error)
        except OSError as error:
            if staging.path != staging.target:
                raise
            # The saver wrote to the place itself, and that worked: only the manifest is missing.
            self._complain(error)
        else:
            if part:
                self._complain(ValueError(f"a part of a checkpoint is in {staging.target}: use shared=True"))
            else:
                self._tell(conventions.CHECKPOINT_SAVED, {conventions.CHECKPOINT_SIZE: manifest.size})

    def tell_failed(self, error: Exception) -> None:
        """Report why there is no new checkpoint."""
        from gradwatch.life.endings import ending_of

        ending = ending_of(error)
        self._tell(
            conventions.CHECKPOINT_FAILED,
            {
                conventions.EXCEPTION_TYPE: ending.exception_type,
                conventions.EXCEPTION_MESSAGE: ending.exception_message,
            },
        )

    def _complain(self, error: Exception) -> None:
        log.warning("checkpoint %s: %s", self._name, error)
        self.tell_failed(error)

    def _tell(self, event: Event, more: Mapping[str, AttributeValue | None]) -> None:
        self._report(
            event,
            {
                conventions.STEP: self._about.step,
                conventions.CHECKPOINT_NAME: self._name,
                conventions.CHECKPOINT_DURATION: perf_counter() - self._began,
                **more,
            },
        )


def _place() -> tuple[int, int]:
    """This process among those that train together: rank, and how many there are."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return int(rank) if rank.isdigit() else 0, int(size) if size.isdigit() else 1
