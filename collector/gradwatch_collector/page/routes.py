"""The pages: one HTML shell, in which a script shows what the address names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from html import escape
from importlib.resources import files
from string import Template
from typing import Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from gradwatch_collector.auth import Guard
from gradwatch_collector.page import events
from gradwatch_collector.page.assets import PREFIX, Assets
from gradwatch_collector.page.events import Events
from gradwatch_collector.page.session import session_route
from gradwatch_collector.service.evaluator import Evaluator

_SHELL: Final = Template(files("gradwatch_collector.page").joinpath("shell.html").read_text("utf-8"))
# By path: which view the script shows, and what the tab is called until it has.
_VIEWS: Final = {
    "/": ("runs", "Runs"),
    "/runs/{run_id:text}": ("run", "Run"),
    "/compare": ("compare", "Compare runs"),
    "/slos": ("slos", "Objectives"),
}


def page_routes(evaluator: Evaluator, guard: Guard | None, is_ending: Callable[[], bool]) -> list[Route]:
    """Return the routes. The shell tells of nothing, so it is served to everybody; the API asks for a token."""
    assets = Assets()
    return [
        *(Route(path, _view(assets, view, title)) for path, (view, title) in _VIEWS.items()),
        Route(f"{PREFIX}{{digest}}/{{name}}", assets.serve),
        Route(events.PATH, Events(evaluator, is_ending).serve),
        session_route(guard),
    ]


def _view(assets: Assets, view: str, title: str) -> Callable[[Request], Awaitable[Response]]:
    shell = _SHELL.substitute(
        view=view,
        title=escape(title),
        style=assets.path("page.css"),
        icon=assets.path("icon.svg"),
        script=assets.path("main.js"),
        preloads="\n".join(f'<link rel="modulepreload" href="{path}">' for path in assets.modules),
    )

    async def show(_: Request) -> Response:
        return HTMLResponse(shell, headers={"Cache-Control": "no-cache"})

    return show
