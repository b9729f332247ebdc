"""Build the web page from its tabs, and serve it.

The server serves no files other than those it creates. It sends no analytics, and the page loads nothing from other
servers.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from functools import partial
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import uvicorn
from gradio import http_server
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from markdown_it import MarkdownIt
from starlette.middleware import Middleware

from ..evaluation.leakage import read_training_facts
from .endpoints import add_endpoints
from .explore import ExplorePage
from .request_gate import RequestGate
from .results import HTML
from .search_page import SearchPage
from .service import SearchService
from .uploads import UPLOAD_BYTES, start_sweeper
from .viewer import STATIC, viewer_routes


MAX_QUEUE = 64  # waiting visitors; further ones are asked to retry
SHARE_ASSETS = "https://gradio.s3-us-west-2.amazonaws.com"  # with a public address, Gradio's scripts come from here
MAX_SESSIONS = 1000  # latest sessions whose state is stored; each takes at least 0.125 MB


def build(service: SearchService, model_name: str) -> gr.Blocks:
    """Build the page. `model_name` is the checkpoint folder or Hub id whose model card is shown."""
    # Gradio's upload folder: a new one, so that no other file can be served from it
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="m3ret-space-")
    # Gradio summarises the events that it remembers after each event: 23 ms for the default of 10,000
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    _ = service.gallery.calibration  # now, not when the first visitor waits for it
    with gr.Blocks(title="M3Ret", analytics_enabled=False) as page:
        gr.HTML(HTML.header(), elem_id="header")
        if read_training_facts(model_name).get("synthetic"):
            gr.HTML(HTML.synthetic(), elem_id="synthetic")
        with gr.Tabs() as tabs:
            with gr.Tab("Search", id="search"):
                search = SearchPage(service)
            with gr.Tab("Explore", id="explore", elem_id="explore") as explore:
                ExplorePage(service, search, explore, tabs)
            with gr.Tab("About", id="about", elem_id="about"):
                gr.HTML(about(model_name), elem_id="card", elem_classes=["prose"])
        add_endpoints(service)
    return page


def serve(
    page: gr.Blocks,
    service: SearchService,
    *,
    listening: socket.socket | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    upload_bytes: int = UPLOAD_BYTES,
    wait: bool = True,
) -> str:
    """Serve the page that `build` made.

    Args:
        listening: Socket on which to serve. None for one on any free port.
        auth: User and password.
        upload_bytes: Maximum size of one upload, all of its files together.
        wait: Whether to block until the server is stopped.

    Returns:
        The local address.
    """
    # system fonts, and a blue that is legible on white and on black
    font, font_mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=font, font_mono=font_mono)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=8)
    if wait:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop like Ctrl-C when a container is stopped
    assets = SHARE_ASSETS if share else ""
    gate = Middleware(RequestGate, Path(page.GRADIO_CACHE), upload_bytes, page, assets)
    stop_sweeper = start_sweeper(Path(page.GRADIO_CACHE), page.temp_file_sets, service.close_idle)
    if wait:
        Thread(target=service.prepare_regions, name="m3ret-regions", daemon=True).start()
    try:
        http_server.start_server = partial(_start_server, listening or socket.create_server(("127.0.0.1", 0)))
        _, address, public_address = page.launch(
            share=share,
            auth=auth,
            max_file_size=upload_bytes,
            allowed_paths=[],
            # openapi_url: FastAPI's list of routes, which requires no login
            app_kwargs={"openapi_url": None, "middleware": [gate], "routes": [viewer_routes(service)]},
            state_session_capacity=MAX_SESSIONS,
            prevent_thread_lock=True,
            quiet=not wait,
            theme=theme,
            css=(STATIC / "page.css").read_text(encoding="utf-8"),
            head="<script src='m3ret/page.js'></script>",
            footer_links=["api"],
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,  # visits are recorded neither here nor in browsers
        )
        if share:
            public = public_address or "none; see the error above"
            note = (
                " Everyone who knows it has access. Set --auth to require a password."
                if public_address and not auth
                else ""
            )
            print(f"Local address: {address}. Public address: {public}.{note}", file=sys.stderr, flush=True)
        if wait:
            page.block_thread()
        return str(address)
    finally:
        if wait:
            stop_sweeper.set()
            shutil.rmtree(page.GRADIO_CACHE, ignore_errors=True)


def _start_server(listening: socket.socket, app: Any, **_: Any) -> tuple[str, int, str, http_server.Server]:
    """Do as Gradio's function of this name, which would open a socket of its own."""
    server = http_server.Server(uvicorn.Config(app, log_level="warning"))
    server.run = partial(server.run, sockets=[listening])  # type: ignore[method-assign]
    server.run_in_thread()
    host, port = listening.getsockname()[:2]
    return host, port, f"http://{'localhost' if host == '0.0.0.0' else host}:{port}/", server


def about(model_name: str) -> str:
    """Return the "About" tab in HTML: the notice and the model card.

    HTML in the card is left out, and so are images, which could be loaded from other servers.
    """
    card = re.sub(r"\A---\n.*?\n---\n", "", model_card(model_name), flags=re.DOTALL).strip()
    markdown = MarkdownIt("commonmark").enable("table")
    for kind in ("html_block", "html_inline"):
        markdown.add_render_rule(kind, lambda *_: "")
    markdown.add_render_rule("image", lambda _, tokens, index, *__: html.escape(tokens[index].content))
    notice = (files("modeling_m3ret.space") / "templates" / "notice.md").read_text(encoding="utf-8")
    return str(markdown.render(notice + (card or "This checkpoint has no model card.")))


def model_card(model_name: str) -> str:
    """Return the README.md of a checkpoint folder or Hub repository with its header, or an empty string."""
    try:
        is_local = Path(model_name).is_dir()
        file = Path(model_name, "README.md") if is_local else hf_hub_download(model_name, "README.md")
        return Path(file).read_text(encoding="utf-8")
    except (FileNotFoundError, EntryNotFoundError):
        return ""
