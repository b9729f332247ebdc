"""A page with the progress of embedding the gallery, on the address of the search page until that is ready.

Both listen on one socket, so that no visitor is refused in between: connections wait for the search page.
"""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from string import Template
from threading import Thread

from ..errors import InputError


FIRST_PORT, PORTS = 7860, 100  # as Gradio searches for a free one
PAGE = (files("modeling_m3ret.space") / "templates" / "startup.html").read_text(encoding="utf-8")


class StartupPage:
    """Serve the page while this context is open, by default on the first free port. `socket` stays open after it.

    Raises:
        InputError: If no port is free.
    """

    def __init__(self, port: int | None):
        startup = self
        self._done, self._total = 0, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = startup.html().encode()
                self.send_response(503)  # clients of the endpoints know from it that they must wait
                headers = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(body))}
                headers |= {"Retry-After": "5", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing: a request may hold anything."""

        host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
        first = int(os.environ.get("GRADIO_SERVER_PORT", FIRST_PORT))
        ports = [port] if port is not None else range(first, first + PORTS)
        for candidate in ports:
            try:
                self._server = ThreadingHTTPServer((host, candidate), Handler)
                break
            except OSError:
                continue
        else:
            raise InputError(f"port is not free: expected one of {ports[0]} to {ports[-1]}. Choose one with --port.")
        self.socket = self._server.socket
        self._server.daemon_threads = True

    def report(self, done: int, total: int) -> None:
        """Show that `done` of `total` scans are embedded."""
        self._done, self._total = done, total

    def html(self) -> str:
        """Return the page."""
        text = "Loading the gallery."
        if self._total:
            text = f"Preparing the gallery for the first time: {self._done:,} of {self._total:,} scans."
        return Template(PAGE).substitute(text=text, fraction=f"{self._done / max(1, self._total):.3f}")

    def __enter__(self) -> StartupPage:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
