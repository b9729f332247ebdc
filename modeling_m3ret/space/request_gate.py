"""Check each request before Gradio writes, reads or fetches any of it, and set the headers of each answer.

Gradio limits the size of each uploaded file, but not their number, their total, or what its other routes accept. It
also downloads any file that a request names by URL, however large, and trusts the values of events.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import shutil
from pathlib import Path

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .event_check import EventCheck, EventError


logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 2**22  # of a request other than an upload; the names of 2,048 uploaded files take half of it
# the routes that the page, its endpoints and Gradio's clients need
FILE_ROUTE = "/gradio_api/file="
SCAN_ROUTES = ("/m3ret/scan/", "/m3ret/thumbnail/")
GET_ROUTES = re.compile(
    r"/|/(assets|static|svelte)/.+|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon|logout)/?"
    r"|/pwa_icon/\d+|/gradio_api/(info|user|token|app_id|login_check|theme\.css|startup-events|upload_progress)/?"
    rf"|/gradio_api/(queue/data|heartbeat/[^/]+|call/(v2/)?[^/]+/[^/]+)|{FILE_ROUTE}.+"
    r"|/m3ret/((scan|thumbnail)/[\w-]+\.\w+|page\.js|niivue[\w.-]+)"
)
POST_ROUTES = re.compile(r"/(?:(login)|gradio_api/(upload|cancel|reset|queue/join|call/v2(?=/)|call)(?:/([^/]+))?)/?")
EVENT_ROUTES = ("queue/join", "call", "call/v2")
FORM, URL_ENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
CONTENT_TYPES = {"upload": (FORM,), "login": (URL_ENCODED, FORM)}
# Gradio evaluates the JavaScript of events, and sets styles on elements
PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval' {scripts}; style-src 'self' 'unsafe-inline' {assets}; "
    "img-src 'self' data: blob: {assets}; media-src 'self' data: blob:; font-src 'self' data: {assets}; "
    "connect-src 'self' data: blob: {assets}; worker-src 'self' blob:; manifest-src 'self'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self' https://huggingface.co https://*.hf.space"
)
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
SCRIPT = re.compile(rb"<script[^>]*>(.*?)</script>", re.DOTALL)


class RequestGate:
    """ASGI middleware that refuses requests which are too large, of unknown size, malformed, or to other routes.

    Args:
        folder: Folder of the uploads. Uploads in progress may take half of its free disk space.
        upload_bytes: Maximum size of one upload, all of its files together.
        assets: Server from which the page loads its scripts, besides this one.
    """

    def __init__(self, app: ASGIApp, folder: Path, upload_bytes: int, page: gr.Blocks, assets: str = ""):
        self.app, self.folder, self.upload_bytes, self.assets = app, folder, upload_bytes, assets
        self.check = EventCheck(page, folder)
        self._bytes_in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan events; no route is a WebSocket
            await self.app(scope, receive, send)
            return
        answer = Answer(send, self.assets, is_file=scope["path"].startswith(FILE_ROUTE))
        try:
            await self._handle(scope, receive, answer)
        except EventError as error:
            if scope["path"] == "/gradio_api/upload":  # the page shows the body of this answer as it is
                refusal: Response = PlainTextResponse(str(error.detail), error.status)
            else:
                refusal = JSONResponse({"detail": error.detail}, error.status)
            await refusal(scope, receive, answer)
        except Exception as error:  # a traceback may hold names of files
            logger.error("%s %s: %s", scope["method"], scope["path"].split("=")[0], type(error).__name__)
            if not answer.has_started:
                await JSONResponse({"detail": "The server failed to answer."}, 500)(scope, receive, answer)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD") and GET_ROUTES.fullmatch(path):
            if path.startswith((FILE_ROUTE, *SCAN_ROUTES)):
                await self._require_login(scope)
                if path.startswith(FILE_ROUTE) and not self.check.is_file(path.removeprefix(FILE_ROUTE)):
                    raise EventError(404, "This file does not exist. Uploads and results are deleted after a while.")
            await self.app(scope, receive, send)
            return
        found = POST_ROUTES.fullmatch(path) if method == "POST" else None
        route = str(found[1] or found[2]) if found else ""
        if found is None or (found[3] is not None) != (route in ("call", "call/v2")):
            raise EventError(404, "This route accepts no requests.")
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0" if route in ("cancel", "reset") else "")
        if "transfer-encoding" in headers or not re.fullmatch("[0-9]{1,18}", declared):
            raise EventError(411, "The request's size is unknown: expected a Content-Length header.")
        length, is_upload = int(declared), route == "upload"
        max_bytes = self.upload_bytes if is_upload else MAX_BODY_BYTES
        if length > max_bytes:
            sizes = f"expected at most {max_bytes:,} bytes in total, got {length:,}"
            raise EventError(413, f"The {'upload' if is_upload else 'request'} is too large: {sizes}.")
        accepted = CONTENT_TYPES.get(route, ("application/json",))
        if headers.get("content-type", "").split(";")[0].strip().lower() not in accepted:
            raise EventError(415, f"expected the content type {' or '.join(accepted)}.")
        if is_upload and self._bytes_in_progress + length > shutil.disk_usage(self.folder).free // 2:
            raise EventError(507, "This server does not have enough disk space. Please try again later.")
        if is_upload:
            self._bytes_in_progress += length
            try:
                await self.app(scope, receive, send)
            finally:
                self._bytes_in_progress -= length
        else:
            await self._message(route, found[3], length, scope, receive, send)

    async def _require_login(self, scope: Scope) -> None:
        """Raise `EventError` if the page requires a login and this request has none."""
        path, statuses = "/gradio_api/login_check", []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            statuses.append(message.get("status"))

        question = {"method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
        await self.app({**scope, **question}, receive, send)
        if statuses[0] == 401:
            raise EventError(401, "Log in first.")

    async def _message(
        self, route: str, api_name: str, length: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        body = b""
        while len(body) < length:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        if route in EVENT_ROUTES:
            await self._require_login(scope)  # first, because errors of the check list the allowed values
            body = self.check(route, api_name, body)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


class Answer:
    """ASGI `send` that adds security headers.

    The policy of a page allows its own inline scripts by their hashes, and no others: neither scripts nor event
    handlers in text that it shows. A served file runs no scripts at all.
    """

    def __init__(self, send: Send, assets: str, is_file: bool):
        self._send, self._assets, self._is_file = send, assets, is_file
        self._start: Message | None = None  # of a page, until its body is known
        self._body = b""
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        self.has_started = True
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
            if headers.get("content-type", "").startswith("text/html") and not self._is_file:
                self._start = message
                return
            headers["Content-Security-Policy"] = FILE_POLICY
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            digests = (hashlib.sha256(script).digest() for script in SCRIPT.findall(self._body) if script)
            scripts = " ".join([*(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests), self._assets])
            policy = PAGE_POLICY.format(scripts=scripts, assets=self._assets)
            MutableHeaders(scope=self._start)["Content-Security-Policy"] = policy
            await self._send(self._start)
            self._start, message = None, {"type": "http.response.body", "body": self._body}
        await self._send(message)
