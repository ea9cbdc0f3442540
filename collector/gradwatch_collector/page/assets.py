"""Scripts, styles and the library that draws charts, as files that browsers keep.

Their addresses have a digest of all of them: what is at one never changes, and need not be asked for again.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

PREFIX: Final = "/static/"
PLOTLY: Final = "plotly.min.js"
_FOLDER: Final = files("gradwatch_collector.page").joinpath("static")
_FOR_EVER: Final = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, plain and compressed."""

    media_type: str
    etag: str
    body: bytes
    packed: bytes

    @classmethod
    def of(cls, name: str, body: bytes) -> Asset:
        """Return the file of that name."""
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        kind = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        # Compressed once, not for every browser.
        return cls(kind, f'"{_digest(body)}"', body, gzip.compress(body, 9, mtime=0))


class Assets:
    """All files, by the names that pages know them by."""

    def __init__(self) -> None:
        own = {each.name: each.read_bytes() for each in _FOLDER.iterdir() if each.is_file()}
        self._own: Mapping[str, Asset] = {name: Asset.of(name, body) for name, body in own.items()}
        told = b"".join(name.encode() + body for name, body in sorted(own.items()))
        self._digest = _digest(told + version("plotly").encode())

    def path(self, name: str) -> str:
        """Return where a file is served."""
        return f"{PREFIX}{self._digest}/{name}"

    @property
    def modules(self) -> list[str]:
        """Return where the scripts are that pages are made of, so that they are fetched all at once."""
        return [self.path(name) for name in sorted(self._own) if name.endswith(".js")]

    async def serve(self, request: Request) -> Response:
        """Answer with a file; under the address of another version, to be asked for again."""
        name, digest = request.path_params["name"], request.path_params["digest"]
        if name == PLOTLY:
            asset = await run_in_threadpool(_plotly)
        elif name in self._own:
            asset = self._own[name]
        else:
            raise HTTPException(404)
        headers = {
            "Cache-Control": _FOR_EVER if digest == self._digest else "no-cache",
            "ETag": asset.etag,
            "Vary": "Accept-Encoding",
        }
        if asset.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(asset.packed, headers=headers, media_type=asset.media_type)
        return Response(asset.body, headers=headers, media_type=asset.media_type)


@cache
def _plotly() -> Asset:
    """Return the library; 5 MB, read when somebody first looks at a chart."""
    return Asset.of(PLOTLY, files("plotly").joinpath("package_data", PLOTLY).read_bytes())


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]
