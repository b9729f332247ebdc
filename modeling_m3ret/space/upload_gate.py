"""What an upload says of its size is looked at before a byte of it is written.

Gradio itself limits each file, and nothing else: a visitor could send thousands, until the disk is full.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class UploadGate:
    """ASGI middleware.

    Args:
        folder: where uploads are written; one may take half of what is free there, so that the disk is never full.
        most_bytes: of one upload, all of its files together.
    """

    def __init__(self, app: ASGIApp, folder: Path, most_bytes: int):
        self.app, self.folder, self.most_bytes = app, folder, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload"):
            refused = self._refusal(Headers(scope=scope).get("content-length"))
            if refused is not None:
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, length: str | None) -> PlainTextResponse | None:
        if length is None or not length.isdecimal():
            return PlainTextResponse("found an upload without its size, expected a Content-Length", 411)
        if int(length) > self.most_bytes:
            found = f"found an upload of {int(length):,} bytes, expected at most {self.most_bytes:,} in all"
            return PlainTextResponse(found, 413)
        if int(length) > shutil.disk_usage(self.folder).free // 2:
            return PlainTextResponse("this server has no room for the upload now", 507)
        return None
