"""Imported by every Python that `gradwatch run` starts, before anything else: it must cost next to nothing.

Nothing of gradwatch, nor of the standard library, is imported until there is an optimizer. Another
`sitecustomize` on the path is imported as if this one were not there. Nobody knows which Python comes along, so
this is written for any from 3.7 on.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `typing`, which takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any


class _TorchFinder:
    """Sees torch's optimizers being imported, and has `Optimizer.__init__` tell of what it makes."""

    _is_done = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch.optim.optimizer" or self._is_done:
            return None
        self._is_done = True  # somebody may have wrapped us: then we stay on the path
        try:
            return self._found(name, path, target)
        except Exception:  # noqa: BLE001 - the import goes on to the other finders, and fails there if it must
            return None

    def _found(self, name: str, path: Any, target: Any) -> Any:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in list(sys.meta_path):
            # Python 3.11 and older pass over one that has none.
            find_spec = getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                _shielded(_follow, spec.loader)
                return spec
        return None


def _follow(loader: Any) -> None:
    original = loader.exec_module

    def exec_module(module: Any) -> None:
        original(module)
        _shielded(_tell_of_optimizers, module.Optimizer)

    loader.exec_module = exec_module


def _tell_of_optimizers(kind: Any) -> None:
    import functools

    original = kind.__init__

    def made(optimizer: Any) -> None:
        try:
            from gradwatch.supervisor.attaching import optimizer_made

            optimizer_made(optimizer)
        except Exception:
            if kind.__init__ is initialize:  # said once
                kind.__init__ = original
            raise

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _shielded(made, self)

    kind.__init__ = initialize


def _shielded(function: Any, argument: Any) -> None:
    """Call it; say so in one line if that fails, and let the program go on."""
    try:
        function(argument)
    except Exception as error:  # noqa: BLE001 - nothing of ours may stop training
        print(f"gradwatch: training is not watched: {error!r}", file=sys.stderr)


def _hand_on() -> None:
    """Import the `sitecustomize` that this one stands in front of, if there is one."""
    here = __file__.rpartition("/")[0]
    sys.path[:] = [folder for folder in sys.path if folder != here]
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this


sys.meta_path.insert(0, _TorchFinder())
_hand_on()
