"""Check the values of an event before Gradio handles it.

Gradio answers a value of the wrong type with status 500 and a traceback in its log, or uses it: an index of -1 is the
last element of a list. Here, the components of the page define the allowed values, and all others are refused.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import gradio as gr

from .uploads import LIMITS


# what Gradio's clients send; further keys of its API would change how `data` is understood
EVENT_KEYS = {"data", "fn_index", "session_hash", "event_data", "trigger_id"}
SESSION = re.compile(r"[\w-]{1,64}")
MAX_NUMBER = 2**31


class EventError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status of the answer.
        detail: message, or one entry per value in Gradio's format.
    """

    def __init__(self, status: int, detail: str | list[dict[str, Any]]):
        super().__init__(status, detail)
        self.status, self.detail = status, detail


class EventCheck:
    """Check the bodies of requests against the events of a page.

    Args:
        folder: Gradio's upload folder, which holds all files that an event may name.
    """

    def __init__(self, page: gr.Blocks, folder: Path):
        self.page, self.folder = page, folder

    def __call__(self, route: str, api_name: str, body: bytes) -> bytes:
        """Check a body, and return it re-encoded with the checked values only, so that Gradio parses no others.

        Args:
            route: `queue/join`, `call` or `call/v2`.
            api_name: name of the endpoint, for `call` and `call/v2`.

        Raises:
            EventError: if the event or one of its values is not allowed.
        """
        event = parse_object(body)
        if route == "call/v2":  # values by name
            self._check_named_values(api_name, event)
        else:
            fn = self._by_index(event) if route == "queue/join" else self._by_name(api_name)
            self._check_keys(event, fn)
            self._check_values(fn, event.get("data"), event.get("session_hash"))
            event["event_data"] = (
                {"index": event["event_data"]["index"], "value": None} if fn.collects_event_data else None
            )
        return json.dumps(event).encode()

    def is_file(self, path: object) -> bool:
        """Return whether this is the path of a regular file in the upload folder."""
        try:
            file = Path(path).resolve() if isinstance(path, str) else Path()
            return file.is_relative_to(self.folder.resolve()) and file.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a null character, a loop of links
            return False

    def _by_index(self, event: dict[str, Any]) -> Any:
        index, session = event.get("fn_index"), event.get("session_hash")
        if not _is_integer(index):
            raise EventError(400, "fn_index: expected an integer.")
        if not isinstance(session, str):
            raise EventError(400, "session_hash: expected the name of a session.")
        if index not in self.page.fns or self.page.fns[index].fn is None:  # some run in the browser only
            raise EventError(404, "fn_index: this event does not exist.")
        return self.page.fns[index]

    def _by_name(self, api_name: str) -> Any:
        for fn in self.page.fns.values():
            if fn.api_name == api_name and fn.api_visibility == "public":
                return fn
        raise EventError(404, "This endpoint does not exist.")

    def _check_keys(self, event: dict[str, Any], fn: Any) -> None:
        if unknown := event.keys() - EVENT_KEYS:
            raise EventError(400, f"expected the keys {', '.join(sorted(EVENT_KEYS))}, got {len(unknown)} others.")
        session, trigger = event.get("session_hash"), event.get("trigger_id")
        if session is not None and not (isinstance(session, str) and SESSION.fullmatch(session)):
            raise EventError(400, "session_hash: expected up to 64 letters, digits, _ and -.")
        if trigger is not None and not (_is_integer(trigger) and trigger in self.page.blocks):
            raise EventError(400, "trigger_id: expected the id of a component.")
        if fn.collects_event_data:
            numbers = 5 if fn.targets[0][1] == "input" else 1  # slice, rows and columns of a region, or a scan
            if not _is_selection(event.get("event_data"), numbers):
                expected = "one integer" if numbers == 1 else f"{numbers} integers"
                raise EventError(400, f"event_data: expected value and index, which is {expected} of at least 0.")

    def _check_values(self, fn: Any, data: object, session: str | None) -> None:
        inputs = fn.inputs
        if not isinstance(data, list) or len(data) != len(inputs):
            raise EventError(400, f"data: expected a list of {len(inputs)} values.")
        if session is not None:  # in a session, an event may have changed the range of a slider
            blocks = self.page.state_holder[session].blocks_config.blocks
            inputs = [blocks.get(block._id, block) for block in inputs]
        self._refuse([(str(block.label), block, value) for block, value in zip(inputs, data, strict=True)])

    def _check_named_values(self, api_name: str, values: dict[str, Any]) -> None:
        fn = self._by_name(api_name)
        parameters = self.page.get_api_info()["named_endpoints"][f"/{api_name}"]["parameters"]
        blocks = {parameter["parameter_name"]: block for parameter, block in zip(parameters, fn.inputs, strict=True)}
        if unknown := values.keys() - blocks.keys():
            raise EventError(400, f"expected the keys {', '.join(blocks)}, got {len(unknown)} others.")
        required = {parameter["parameter_name"] for parameter in parameters if not parameter["parameter_has_default"]}
        if missing := required - values.keys():
            raise EventError(400, f"{', '.join(sorted(missing))}: expected a value, got none.")
        self._refuse([(name, blocks[name], value) for name, value in values.items()])

    def _refuse(self, values: list[tuple[str, Any, Any]]) -> None:
        """Raise an `EventError`, in the form that Gradio's clients show, if a component does not accept its value."""
        details = []
        for name, block, value in values:
            expected = self._expected(block, value)
            message = f"expected {expected}, got {shorten(json.dumps(value), 80)}." if expected else ""
            detail = {"is_valid": not expected, "parameter_name": name, "message": message}
            details.append({"__type__": "validate", **detail})
        if not all(detail["is_valid"] for detail in details):
            raise EventError(422, details)

    def _expected(self, block: Any, value: Any) -> str:
        """Return what the component expects, or an empty string if the value is allowed."""
        match block:
            case gr.State():  # stays on the server
                return ""
            case gr.Checkbox():
                return "" if isinstance(value, bool) else "true or false"
            case gr.Number() | gr.Slider():
                low = block.minimum if block.minimum is not None else -MAX_NUMBER
                high = block.maximum if block.maximum is not None else MAX_NUMBER
                is_number = _is_number(value) and low <= value <= high and value == int(value)
                is_empty = value is None and isinstance(block, gr.Number)
                return "" if is_number or is_empty else f"a whole number from {low:g} to {high:g}"
            case gr.Radio():
                choices = [str(choice) for _, choice in block.choices]
                return "" if isinstance(value, str) and value in choices else f"one of {', '.join(choices)}"
            case gr.Dropdown() | gr.CheckboxGroup():
                choices = [str(choice) for _, choice in block.choices]
                is_list = isinstance(value, list) and all(isinstance(item, str) and item in choices for item in value)
                return "" if is_list or value is None else f"a list of some of {', '.join(choices)}"
            case gr.File() | gr.UploadButton():
                files = value if isinstance(value, list) and len(value) <= LIMITS.max_files else [None]
                are_files = all(isinstance(file, dict) and self.is_file(file.get("path")) for file in files)
                expected = f"a list of at most {LIMITS.max_files:,} uploaded files (deleted after half an hour)"
                return "" if value is None or are_files else expected
        return "no value"


def parse_object(body: bytes) -> dict[str, Any]:
    """Return a JSON object. Raises `EventError` for anything else, which includes NaN, Infinity and deep nesting."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise EventError(400, "expected JSON in the body.") from error
    if not isinstance(value, dict):
        raise EventError(400, "expected a JSON object in the body.")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_selection(data: object, numbers: int) -> bool:
    """Return whether Gradio's `SelectData` can read this, with an index of `numbers` integers of at least 0."""
    if not isinstance(data, dict) or not {"index", "value"} <= data.keys():
        return False
    index = data["index"]
    if numbers == 1:
        index = [index]
    is_index = isinstance(index, list) and len(index) == numbers
    return is_index and all(_is_integer(number) and 0 <= number <= MAX_NUMBER for number in index)
