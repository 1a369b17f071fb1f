"""A folder's own report pages (of a search, a scaling study, an evaluation), behind the same guard."""

from __future__ import annotations

from html import escape
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from voxelscale.errors import VoxelscaleError
from voxelscale.viewer.guard import Door, Guard

SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:"
)
"""A page's scripts run, but as nobody: they reach neither the cookie nor this server."""


def build_pages(folder: Path, door: Door) -> Guard:
    """An application that serves the folder's HTML pages by their numbers, and a list of them.

    Raises:
        VoxelscaleError: there are none.
    """
    pages = sorted(path for path in folder.glob("*.html") if path.is_file())
    if not pages:
        hint = "name the scans as well; or a folder with report pages, as search and scale write them"
        raise VoxelscaleError(f"{folder}: holds no report page", hint)

    async def index(request: Request) -> Response:
        items = "".join(
            f'<li><a href="/page/{n}">{escape(path.name)}</a></li>' for n, path in enumerate(pages)
        )
        head = "<!doctype html><meta charset=utf-8><title>Voxelscale</title><h1>Report pages</h1>"
        return Response(f"{head}<ul>{items}</ul>", media_type="text/html")

    async def one(request: Request) -> Response:
        number = int(request.path_params["number"])
        if number >= len(pages):
            return PlainTextResponse("no such page\n", 404)
        headers = {"content-security-policy": SANDBOX}
        return Response(pages[number].read_bytes(), media_type="text/html", headers=headers)

    return Guard(Starlette(routes=[Route("/", index), Route("/page/{number:int}", one)]), door)
