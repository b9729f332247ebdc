"""Check the values of an event before Gradio handles it.

Gradio answers a value of the wrong type with status 500 and a traceback in its log, or uses it: an index of -1 is the
last element of a list. Here, the components of the page define the allowed values, and all others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import gradio as gr
import pydantic
from pydantic import Field, StrictInt, StrictStr
from pydantic_core import from_json

from .uploads import LIMITS


MAX_NUMBER = 2**31
Index = Annotated[StrictInt, Field(ge=0, le=MAX_NUMBER)]
Selection = pydantic.create_model("Selection", index=Index, value=Any)  # of a scan
RegionSelection = pydantic.create_model("RegionSelection", index=tuple[Index, Index, Index, Index, Index], value=Any)


class Event(pydantic.BaseModel):
    """What Gradio's clients send; further keys of its API would change how `data` is understood."""

    model_config = pydantic.ConfigDict(extra="forbid")
    data: list[Any]
    fn_index: StrictInt | None = None
    session_hash: Annotated[StrictStr, Field(pattern=r"^[\w-]{1,64}$")] | None = None
    event_data: Any = None
    trigger_id: StrictInt | None = None


class EventError(Exception):
    """A request that is refused, with a message, or one entry per value in Gradio's format."""

    def __init__(self, status: int, detail: str | list[dict[str, Any]]):
        super().__init__(status, detail)
        self.status, self.detail = status, detail


class EventCheck:
    """Check the bodies of requests against the events of a page, which may name files of the upload folder only."""

    def __init__(self, page: gr.Blocks, folder: Path):
        self.page, self.folder = page, folder
        self._accepted = {id: pydantic.TypeAdapter(self._type_of(block)) for id, block in page.blocks.items()}

    def __call__(self, route: str, api_name: str, body: bytes) -> bytes:
        """Check a body, and return it re-encoded with the checked values only, so that Gradio parses no others.

        Raises:
            EventError: if the event or one of its values is not allowed.
        """
        try:
            values = from_json(body, allow_inf_nan=False)
        except ValueError as error:  # also for deep nesting
            raise EventError(400, "expected JSON in the body.") from error
        if not isinstance(values, dict):
            raise EventError(400, "expected a JSON object in the body.")
        if route == "call/v2":
            self._check_named_values(self._by_name(api_name), values)
            return json.dumps(values).encode()
        event = _parse(Event, values)
        fn = self._by_index(event) if route == "queue/join" else self._by_name(api_name)
        if event.trigger_id is not None and event.trigger_id not in self.page.blocks:
            raise EventError(400, "trigger_id: expected the id of a component.")
        if fn.collects_event_data:
            selection = RegionSelection if fn.targets[0][1] == "input" else Selection
            event.event_data = {"index": _parse(selection, event.event_data).index, "value": None}
        else:
            event.event_data = None
        if len(event.data) != len(fn.inputs):
            raise EventError(400, f"data: expected a list of {len(fn.inputs)} values.")
        self._refuse((str(block.label), block, value) for block, value in zip(fn.inputs, event.data, strict=True))
        return json.dumps(event.model_dump()).encode()

    def is_file(self, path: object) -> bool:
        """Return whether this is the path of a regular file in the upload folder."""
        try:
            file = Path(path).resolve() if isinstance(path, str) else Path()
            return file.is_relative_to(self.folder.resolve()) and file.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a null character, a loop of links
            return False

    def _by_index(self, event: Event) -> Any:
        if event.session_hash is None:
            raise EventError(400, "session_hash: expected the name of a session.")
        fn = self.page.fns.get(-1 if event.fn_index is None else event.fn_index)
        if fn is None or fn.fn is None:  # some run in the browser only
            raise EventError(404, "fn_index: this event does not exist.")
        return fn

    def _by_name(self, api_name: str) -> Any:
        for fn in self.page.fns.values():
            if fn.api_name == api_name and fn.api_visibility == "public":
                return fn
        raise EventError(404, "This endpoint does not exist.")

    def _check_named_values(self, fn: Any, values: dict[str, Any]) -> None:
        parameters = self.page.get_api_info()["named_endpoints"][f"/{fn.api_name}"]["parameters"]
        blocks = {parameter["parameter_name"]: block for parameter, block in zip(parameters, fn.inputs, strict=True)}
        required = {parameter["parameter_name"] for parameter in parameters if not parameter["parameter_has_default"]}
        if not required <= values.keys() <= blocks.keys():
            raise EventError(400, f"expected values of {', '.join(blocks)}; required: {', '.join(sorted(required))}.")
        self._refuse((name, blocks[name], value) for name, value in values.items())

    def _refuse(self, values: Iterable[tuple[str, Any, Any]]) -> None:
        """Raise an `EventError`, in the form that Gradio's clients show, if a component does not accept its value."""
        details = []
        for name, block, value in values:
            message = ""
            try:
                self._accepted[block._id].validate_python(value)
            except pydantic.ValidationError as error:
                message = f"{error.errors()[0]['msg']}, got {shorten(json.dumps(value), 80)}."
            detail = {"is_valid": not message, "parameter_name": name, "message": message}
            details.append({"__type__": "validate", **detail})
        if not all(detail["is_valid"] for detail in details):
            raise EventError(422, details)

    def _type_of(self, block: Any) -> Any:
        """Return the type of the values that a component accepts."""
        match block:
            case gr.State():  # stays on the server
                return Any
            case gr.Checkbox():
                return pydantic.StrictBool
            case gr.Number() | gr.Slider():
                number = Annotated[StrictInt, Field(ge=block.minimum, le=block.maximum)]
                return number if isinstance(block, gr.Slider) else number | None
            case gr.Radio() | gr.Dropdown() | gr.CheckboxGroup():
                choice: Any = Literal[tuple(value for _, value in block.choices) or (None,)]
                return choice if isinstance(block, gr.Radio) else list[choice] | None
            case gr.File() | gr.UploadButton():
                path = Annotated[StrictStr, pydantic.AfterValidator(self._require_file)]
                file = pydantic.create_model("File", path=path)
                return Annotated[list[file], Field(max_length=LIMITS.max_files)] | None  # type: ignore[valid-type]
        return None

    def _require_file(self, path: str) -> str:
        if not self.is_file(path):
            raise ValueError("expected an uploaded file (uploads are deleted after half an hour)")
        return path


def _parse(model: Any, values: object) -> Any:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise EventError(400, f"{'.'.join(map(str, first['loc'])) or 'event_data'}: {first['msg']}.") from error
