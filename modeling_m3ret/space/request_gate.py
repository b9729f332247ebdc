"""Check each request before Gradio writes, reads or fetches any of it.

Gradio limits the size of each uploaded file, but not their number, their total, or what its other routes accept. It
also downloads any file that a request names by URL, however large.
"""

from __future__ import annotations

import functools
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
        await self._handler(scope)(scope, receive, send)

    def _handler(self, scope: Scope) -> ASGIApp:
        """Return what answers the request: the app, with or without a check of the body, or a refusal."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return self.app
        if scope["method"] != "POST" or not (route := ALLOWED_ROUTES.fullmatch(scope["path"])):
            return PlainTextResponse("This route accepts no requests.", 404)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0" if route[1] in ("cancel", "reset") else "")
        if "transfer-encoding" in headers or not declared.isdecimal():
            return PlainTextResponse("The request's size is unknown: expected a Content-Length header.", 411)
        length, is_upload = int(declared), route[1] == "upload"
        max_bytes = self.upload_bytes if is_upload else MAX_BODY_BYTES
        if length > max_bytes:
            sizes = f"expected at most {max_bytes:,} bytes in total, got {length:,}"
            return PlainTextResponse(f"The {'upload' if is_upload else 'request'} is too large: {sizes}.", 413)
        if is_upload and self._bytes_in_progress + length > shutil.disk_usage(self.folder).free // 2:
            return PlainTextResponse("This server has not enough disk space now. Please try again later.", 507)
        return functools.partial(self._upload if is_upload else self._message, length)

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._bytes_in_progress += length
        try:
            await self.app(scope, receive, send)
        finally:
            self._bytes_in_progress -= length

    async def _message(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
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
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

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
