"""Check each request before Gradio writes, reads or fetches any of it.

Gradio limits the size of each uploaded file, but not their number, their total, or what its other routes accept. It
also downloads any file that a request names by URL, however large.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


MAX_BODY_BYTES = 2**22  # of a request other than an upload; the names of 2,048 uploaded files take half of it
# the POST routes that the page and the endpoints need
ALLOWED_ROUTES = re.compile(r".*/(login|upload|cancel|reset|queue/join|(run|api|call|call/v2)/[^/]+)/?")


class RequestGate:
    """ASGI middleware that refuses requests which are too large, of unknown size, to other routes, or name a URL.

    Args:
        folder: Folder of the uploads. Uploads in progress may take half of its free disk space.
        upload_bytes: Maximum size of one upload, all of its files together.
    """

    def __init__(self, app: ASGIApp, folder: Path, upload_bytes: int):
        self.app, self.folder, self.upload_bytes = app, folder, upload_bytes
        self._bytes_in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
        elif scope["method"] != "POST" or not (route := ALLOWED_ROUTES.fullmatch(scope["path"])):
            await PlainTextResponse("This route accepts no requests.", 404)(scope, receive, send)
        else:
            headers = Headers(scope=scope)
            length = headers.get("content-length", "0" if route[1] in ("cancel", "reset") else "")
            if "transfer-encoding" in headers or not length.isdecimal():
                refusal = PlainTextResponse("The request's size is unknown: expected a Content-Length header.", 411)
                await refusal(scope, receive, send)
            elif route[1] == "upload":
                await self._upload(int(length), scope, receive, send)
            else:
                await self._message(int(length), scope, receive, send)

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if length > self.upload_bytes:
            limit = f"expected at most {self.upload_bytes:,} bytes in total, got {length:,}"
            refusal = PlainTextResponse(f"The upload is too large: {limit}.", 413)
        elif self._bytes_in_progress + length > shutil.disk_usage(self.folder).free // 2:
            refusal = PlainTextResponse("This server has not enough disk space now. Please try again later.", 507)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._bytes_in_progress += length
        try:
            await self.app(scope, receive, send)
        finally:
            self._bytes_in_progress -= length

    async def _message(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        if length > MAX_BODY_BYTES:
            limit = f"expected at most {MAX_BODY_BYTES:,} bytes, got {length:,}"
            await PlainTextResponse(f"The request is too large: {limit}.", 413)(scope, receive, send)
            return
        body = b""
        while len(body) < length:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        if _names_url(body):
            refusal = PlainTextResponse("URLs are not downloaded: expected uploaded files, got a URL.", 400)
            await refusal(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


def _names_url(body: bytes) -> bool:
    """Return whether a file in the body has a URL as its path, which Gradio would download."""
    try:
        pending: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):  # a form, or something that Gradio cannot parse either
        return False
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.lower().startswith(("http:", "https:")):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False
