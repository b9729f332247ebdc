"""How a page's events are handled: how many at a time, and what a visitor is told when one fails."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..reading_m3ret import M3RetReadError
from .searching import PutAwayError


HEAVY: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}  # as many as a small machine has cores
LIGHT: dict[str, Any] = {
    "concurrency_id": "viewer",
    "concurrency_limit": 8,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """What cannot be done is told in its own words. They hold names of files, and a message is shown as HTML."""

    @functools.wraps(function)
    def told(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (M3RetReadError, PutAwayError, ValueError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return told
