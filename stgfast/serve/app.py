"""The routes of a folder's server.

GET   /                                  the page
GET   /api/status                        the status of the folder
GET   /api/jobs                          its jobs, in pages
GET   /clips/NAME, /clips/NAME/NUMBER    a clip, or a picture of one
GET   /metrics                           for Prometheus
POST  /api/ACTION                        a change, as JSON: the names of `answers.ACTIONS`
POST  /api/images                        an image for a new job; returns its name
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from stgfast.errors import SettingsError
from stgfast.pages import whole
from stgfast.queue.desk import Desk
from stgfast.queue.job import MAX_IMAGE, parse_json
from stgfast.queue.state import PACKED, StoreError
from stgfast.serve import answers
from stgfast.serve.files import TYPES, clip_of, keep_image
from stgfast.serve.guard import Guard
from stgfast.serve.metrics import TYPE, metrics

MAX_BODY = 1 << 20  # bytes of a request without images
PAGE = {"/": ("live.html", "text/html"), "/live.css": ("live.css", "text/css")}
PAGE["/live.js"] = ("live.js", "text/javascript")
KEPT = "private, max-age=3600"  # for the browser: a clip that is made again has another address


def application(out: Path, token: str = "") -> Guard:
    """The server of a folder as an ASGI application. With a token, requests must have it."""

    def asked(do: Callable[[Desk], Any]) -> Any:
        with Desk(out, check=False) as desk:
            return do(desk)

    def page(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return Response(whole("stgfast.serve", name), media_type=kind)

    def status(request: Request) -> Response:
        return JSONResponse(asked(answers.status))

    def jobs(request: Request) -> Response:
        return JSONResponse(asked(lambda desk: answers.jobs(desk, request.query_params)))

    def clip(request: Request) -> Response:
        file, frame = request.path_params["file"], request.path_params.get("frame")
        path = asked(lambda desk: clip_of(desk, file, frame))
        if path is None:
            raise HTTPException(404, "no such clip")
        return FileResponse(path, media_type=TYPES[path.suffix.lower()], headers={"Cache-Control": KEPT})

    def numbers(request: Request) -> Response:
        return PlainTextResponse(asked(metrics), media_type=TYPE)

    async def action(request: Request) -> Response:
        do = answers.ACTIONS.get(request.path_params["action"])
        if do is None:
            raise HTTPException(404, "no such action")
        given = _object(request, await _body(request, MAX_BODY))
        return JSONResponse({"done": await run_in_threadpool(asked, lambda desk: do(desk, given))})

    async def image(request: Request) -> Response:
        if not _type_of(request).startswith(("image/", "application/octet-stream")):
            raise HTTPException(415, "expected an image")
        data = await _body(request, MAX_IMAGE)
        return JSONResponse({"done": await run_in_threadpool(asked, lambda desk: keep_image(desk.home / PACKED, data))})

    routes = [
        *(Route(path, page) for path in PAGE),
        Route("/api/status", status),
        Route("/api/jobs", jobs),
        Route("/clips/{file}", clip),
        Route("/clips/{file}/{frame:int}", clip),
        Route("/metrics", numbers),
        Route("/api/images", image, methods=["POST"]),
        Route("/api/{action}", action, methods=["POST"]),
    ]
    errors = {SettingsError: 400, StoreError: 503, sqlite3.Error: 503, OSError: 503, ClientDisconnect: 400}
    handlers = {kind: _refusing(code) for kind, code in errors.items()}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token)


def _refusing(code: int) -> Callable[[Request, Exception], Response]:
    def refuse(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, code)

    return refuse


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request, up to a limit."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HTTPException(413, f"expected {limit} bytes at most")
        parts.append(part)
    return b"".join(parts)


def _object(request: Request, body: bytes) -> dict[str, Any]:
    """The JSON of a request. A form of another site cannot send this content type without a preflight request."""
    if _type_of(request) != "application/json":
        raise HTTPException(415, "expected application/json")
    try:
        given = parse_json(body.decode())
    except ValueError as error:
        raise SettingsError(f"request: got invalid JSON ({error}), expected an object") from None
    if not isinstance(given, dict):
        raise SettingsError("request: expected an object")
    return given


def _type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
