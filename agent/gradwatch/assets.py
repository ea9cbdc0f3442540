"""Where the files that ship beside the code are: migrations, alerts, dashboards."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def asset_dir(name: str) -> Path:
    """Return the folder called ``name``: the checkout's own when there is one, else the wheel's copy.

    Raises:
        FileNotFoundError: neither has it.
    """
    checkout = _PACKAGE.parents[1]
    beside = checkout / name
    if (checkout / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    shipped = _PACKAGE / "_assets" / name
    if not shipped.is_dir():
        raise FileNotFoundError(f"{name}/ is missing from this installation of gradwatch: reinstall it")
    return shipped
