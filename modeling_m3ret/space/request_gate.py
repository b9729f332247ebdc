"""What is sent to the page is looked at before Gradio writes, reads or fetches any of it.

Gradio itself limits each file of an upload, and nothing else: not their number nor their sum, nor what other routes
take in; and what a request names by an address it fetches, however large.
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


MESSAGE_BYTES = 2**22  # of a request that is no upload: 2,048 uploaded files by name are half of it
TAKEN = re.compile(r".*/(login|upload|cancel|reset|queue/join|(run|api|call|call/v2)/[^/]+)/?")  # what the page needs


class RequestGate:
    """ASGI middleware.

    Args:
        folder: where uploads are written; those under way may take half of what is free there.
        upload_bytes: of one upload, all of its files together.
    """

    def __init__(self, app: ASGIApp, folder: Path, upload_bytes: int):
        self.app, self.folder, self.upload_bytes = app, folder, upload_bytes
        self._under_way = 0  # bytes of uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
        elif scope["method"] != "POST" or not (taken := TAKEN.fullmatch(scope["path"])):
            await PlainTextResponse("nothing is taken in here", 404)(scope, receive, send)
        else:
            headers = Headers(scope=scope)
            length = headers.get("content-length", "0" if taken[1] in ("cancel", "reset") else "")
            if "transfer-encoding" in headers or not length.isdecimal():
                refused = PlainTextResponse("found a request without its size, expected a Content-Length", 411)
                await refused(scope, receive, send)
            elif taken[1] == "upload":
                await self._upload(int(length), scope, receive, send)
            else:
                await self._message(int(length), scope, receive, send)

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        refused = None
        if length > self.upload_bytes:
            found = f"found an upload of {length:,} bytes, expected at most {self.upload_bytes:,} in all"
            refused = PlainTextResponse(found, 413)
        elif self._under_way + length > shutil.disk_usage(self.folder).free // 2:
            refused = PlainTextResponse("this server has no room for the upload now", 507)
        if refused is not None:
            await refused(scope, receive, send)
            return
        self._under_way += length
        try:
            await self.app(scope, receive, send)
        finally:
            self._under_way -= length

    async def _message(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        if length > MESSAGE_BYTES:
            found = f"found a request of {length:,} bytes, expected at most {MESSAGE_BYTES:,}"
            await PlainTextResponse(found, 413)(scope, receive, send)
            return
        body = b""
        while len(body) < length:
            part = await receive()
            if part["type"] == "http.disconnect":
                return
            body += part.get("body", b"")
            if not part.get("more_body", False):
                break
        if _names_an_address(body):
            await PlainTextResponse("found the address of a file, expected an upload", 400)(scope, receive, send)
            return
        told = False

        async def again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


def _names_an_address(body: bytes) -> bool:
    """Whether a file in it has an address in place of a path, which Gradio would fetch."""
    try:
        left: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):  # a form, or what Gradio will not read either
        return False
    while left:
        value = left.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.lower().startswith(("http:", "https:")):
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False
