"""The pages together, and how they are served: no file but what they make, no analytics, nothing from afar."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .about import about
from .endpoints import add_endpoints
from .explore_page import ExplorePage
from .request_gate import RequestGate
from .search_page import SearchPage
from .searching import Searching
from .sweeping import keep_sweeping
from .uploads import UPLOAD_BYTES


WAITING = 64  # visitors in the queue; who comes then is told to come again
SESSIONS = 1000  # the latest, whose state is kept: an eighth of a MB each at least
STYLE = """
.gradio-container {max-width: 1280px !important; width: 100% !important; margin: 0 auto !important}
#grid .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important}
#grid .caption-label {white-space: normal; text-align: left; max-width: 100%; line-height: 1.25}
#examples {gap: 6px}
/* no larger than it is: Gradio tells where a picture was clicked only if it was not enlarged */
#query-image img, #hit-image img {width: auto; max-width: 100%; height: auto; margin: 0 auto}
#query-image.fullscreen img, #hit-image.fullscreen img {width: 100%; height: 100%; object-fit: contain}
#query-image.fullscreen .image-frame {pointer-events: none}
:focus-visible {outline: 2px solid #2563eb; outline-offset: 1px}
@media (max-width: 640px) {
  #grid .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
}
"""


@dataclass(frozen=True)
class Serving:
    """How to be reached: by this machine alone, unless GRADIO_SERVER_NAME says otherwise, as it does on a Space.

    port: None for the first one free from 7860. auth: user and password. upload_bytes: of one upload, all of its
    files together.
    """

    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = None
    upload_bytes: int = UPLOAD_BYTES


def build(searching: Searching, model_name: str) -> gr.Blocks:
    """The pages. model_name: of the checkpoint, whose card is shown."""
    # where Gradio keeps uploads: a folder of our own, so that nothing else is ever served from it
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="m3ret-space-")
    # after each event Gradio sums up those that it remembers, 10,000 by default: 23 ms of a core
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
    with gr.Blocks(title="M3Ret", analytics_enabled=False) as page:
        gr.Markdown("# M3Ret\nFind similar scans, in every modality. Research software, **not for diagnosis**.")
        with gr.Tabs() as tabs:
            with gr.Tab("Search", id="search"):
                search = SearchPage(searching)
            with gr.Tab("Explore", id="explore") as explore:
                ExplorePage(searching, search, explore, tabs)
            with gr.Tab("About", id="about"):
                gr.Markdown(about(model_name))
        add_endpoints(searching)
    return page


def serve(page: gr.Blocks, searching: Searching, serving: Serving = Serving(), *, wait: bool = True) -> str:
    """Serve the pages that `build` made; their address. wait: until they are stopped."""
    settings: dict[str, Any] = {"theme": theme(), "css": STYLE, "footer_links": ["api"], "ssr_mode": False}
    settings |= {"enable_monitoring": False, "run_history": False}  # what visitors did is kept nowhere, nor in browsers
    page.queue(max_size=WAITING, default_concurrency_limit=8)
    if wait:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a container is stopped: as by Ctrl-C
    gate = Middleware(RequestGate, folder=Path(page.GRADIO_CACHE), upload_bytes=serving.upload_bytes)
    stop_sweeping = keep_sweeping(Path(page.GRADIO_CACHE), page.temp_file_sets, searching.put_away_unused)
    try:
        _, address, shared = page.launch(
            server_port=serving.port,
            share=serving.share,
            auth=serving.auth,
            max_file_size=serving.upload_bytes,
            allowed_paths=[],
            # openapi_url: FastAPI's list of routes, which asks for no login
            app_kwargs={"openapi_url": None, "middleware": [gate]},
            state_session_capacity=SESSIONS,
            prevent_thread_lock=True,
            quiet=not wait,
            **settings,
        )
        if serving.share:
            print(_words_of_share(shared, address, serving.auth is not None), file=sys.stderr, flush=True)
        if wait:
            page.block_thread()
        return str(address)
    finally:
        if wait:
            stop_sweeping.set()
            shutil.rmtree(page.GRADIO_CACHE, ignore_errors=True)


def _words_of_share(shared: str | None, address: str, locked: bool) -> str:
    if shared is None:
        return f"No public address could be made (above: why). The page goes on at {address}."
    return f"Public: {shared}" + ("" if locked else ", open to whoever knows the address: --auth asks for a password.")


def theme() -> gr.themes.Base:
    """Gradio's own, in the system's fonts, and in a blue that is read on white and on black."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
