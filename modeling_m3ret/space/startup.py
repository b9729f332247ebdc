"""A page with the progress of embedding the gallery, on the address of the search page until that is ready.

Both listen on one socket, so that no visitor is refused in between: connections wait for the search page.
"""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from ..errors import InputError


FIRST_PORT, PORTS = 7860, 100  # as Gradio searches for a free one
# asks every second, and loads the search page as soon as something else than this page answers
PAGE = """<!doctype html><html lang="en"><title>M3Ret is starting</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<body style="font: 17px/1.5 system-ui; max-width: 34rem; margin: 15vh auto; padding: 0 1rem">
<h1>M3Ret is starting</h1><p id="text" role="status">{text}</p>
<progress id="bar" max="1" value="{fraction}" aria-label="Progress" style="width: 100%"></progress>
<script>setInterval(async () => {{
  const answer = await fetch('/').catch(() => null)
  if (!answer) return
  if (answer.status !== 503) return location.reload()
  const next = new DOMParser().parseFromString(await answer.text(), 'text/html')
  text.textContent = next.getElementById('text').textContent
  bar.value = next.getElementById('bar').getAttribute('value')
}}, 1000)</script>"""


class StartupPage:
    """Serve the page while this context is open. It accepts no input and shows two numbers.

    Args:
        port: None for the first free port from 7860.

    Attributes:
        socket: Where it listens, still open after the context.

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
        return PAGE.format(text=text, fraction=f"{self._done / max(1, self._total):.3f}")

    def __enter__(self) -> StartupPage:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
