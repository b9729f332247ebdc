"""Names and paths planted in a gallery appear in no page, answer, download, picture, error or log."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pydicom.data import get_testdata_file
from space_server import TIMEOUT, SpaceServer, serving_records

from modeling_m3ret.data.collection import COLUMNS, read_manifest
from modeling_m3ret.space.publishing import publishable


pytestmark = pytest.mark.slow

# one planted word of each column, of the folder, and of what is inside of the files
PLANTED = {name: f"{name}doe" for name in (*COLUMNS, "source", "split", "folder", "patientname", "pngtext", "notes")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    import pydicom

    root = tmp_path_factory.mktemp("space")
    folder = root / PLANTED["folder"]
    folder.mkdir()
    names = []
    for number in range(3):
        text = PngImagePlugin.PngInfo()
        text.add_text("Patient", PLANTED["pngtext"])
        names.append(f"{PLANTED['file']}-{number}.png")
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64), np.uint8)
        Image.fromarray(pixels).save(folder / names[-1], pnginfo=text)
    header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    header.PatientName = header.StudyDescription = header.PatientID = PLANTED["patientname"]
    names.append(f"{PLANTED['file']}.dcm")
    header.save_as(folder / names[-1])
    rows = [
        {
            "id": f"{PLANTED['id']}{number}",
            "file": name,
            "modality": "xray" if number else PLANTED["modality"],
            "anatomy": PLANTED["anatomy"] if number else "chest",
            "label": f"nodule|{PLANTED['label']}|/home/{PLANTED['label']}/1|2024-01-31|<form>{PLANTED['label']}</form>",
            "group": f"{PLANTED['group']}{number % 2}",
            "source": f"/data/{PLANTED['source']}",
            "split": "train",
            "notes": PLANTED["notes"],
        }
        for number, name in enumerate(names)
    ]
    with (folder / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    try:
        records = read_manifest(folder)
    except ValueError:  # modalities are checked where a manifest is read
        rows[0]["modality"] = "ct"
        with (folder / "manifest.csv").open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        records = read_manifest(folder)
    with serving_records(root, records) as space:
        yield space


def run_event(visitor: httpx.Client, elem_id: str, trigger: str, event_data: Any = None, **values: Any) -> Any:
    """Run an event of the page as its scripts do, with the initial values of other components; return its answer."""
    config = visitor.get("/config").json()
    components = {component["id"]: component for component in config["components"]}
    of_id = {component["props"].get("elem_id"): id for id, component in components.items()}
    (event,) = (event for event in config["dependencies"] if [of_id[elem_id], trigger] in event["targets"])
    data = [
        values.get(str(components[id]["props"].get("elem_id")).replace("-", "_"), components[id]["props"].get("value"))
        for id in event["inputs"]
    ]
    body = {"fn_index": event["id"], "data": data, "session_hash": "session", "trigger_id": of_id[elem_id]}
    answer = visitor.post("/gradio_api/queue/join", json=body | {"event_data": event_data})
    assert answer.status_code == 200, answer.text
    lines = visitor.get("/gradio_api/queue/data", params={"session_hash": "session"}).text.split("\n\n")
    messages = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    return next(message for message in messages if message["msg"] == "process_completed")


def test_no_planted_identifier_appears(server: SpaceServer, capfd: pytest.CaptureFixture[str]) -> None:
    answers: list[str] = []
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        example = run_event(visitor, "examples", "select", {"index": 1, "value": None})
        assert example["success"], example
        selection = {"index": 2, "value": None}
        for number in (2, 3):
            opened = run_event(visitor, "grid", "select", {"index": number, "value": None})
            assert '"panes"' in json.dumps(opened), opened
            answers.append(json.dumps(opened))
            answers.append(visitor.get(f"/m3ret/scan/row-{number}.nii").content.decode("latin-1"))
        region = run_event(visitor, "viewer-block", "input", {"index": [0, 2, 40, 2, 40], "value": None})
        assert '"panes"' in json.dumps(region), region
        answers.append(json.dumps(region))
        for colour in ("modality", "anatomy"):
            answers.append(json.dumps(run_event(visitor, "map-colour", "input", map_colour=colour)))
        for record in server.records:  # the scans are gone: errors
            assert isinstance(record.location, Path)
            record.location.rename(record.location.with_suffix(".moved"))
        server.service.close_idle(0)
        failed = run_event(visitor, "grid", "select", selection)
        assert '"panes"' not in json.dumps(failed)
        assert "We could not read" in json.dumps(failed)
        refused = run_event(visitor, "grid", "select", {"index": 40, "value": None})
        assert "not shown any more" in json.dumps(refused)
        answers += [visitor.get(f"/m3ret/scan/row-{number}.nii").text for number in range(4)]
        answers += [json.dumps(example), json.dumps(failed), json.dumps(refused)]
        for route in ("/", "/config", "/gradio_api/info", "/theme.css", "/manifest.json", "/gradio_api/openapi.json"):
            answers.append(visitor.get(route).text)
        for item in (0, 1, 99, PLANTED["id"]):
            answer = visitor.post("/gradio_api/call/similar", json={"data": [item, 9, [], [], False]})
            answers.append(answer.text)
            if answer.status_code == 200:
                answers.append(visitor.get(f"/gradio_api/call/similar/{answer.json()['event_id']}").text)
        for name in PLANTED.values():  # a filter must not reveal whether a word exists
            for values in ([[name], []], [[], [name]]):
                answer = visitor.post("/gradio_api/call/similar", json={"data": [1, 9, *values, False]})
                assert answer.status_code == 422
        for text in answers:
            for url in re.findall(r"http://[^\"\\ ]+file=[^\"\\ ]+", text):
                visitor.get(url)
    assert any("Nodule" in text for text in answers)
    written = [path for path in server.uploads.rglob("*") if path.is_file()]
    assert {".csv", ".json"} <= {path.suffix for path in written}
    published = str(publishable(server.service.gallery).index.metadata.to_pydict())
    shown = "\n".join([*answers, *capfd.readouterr(), published, *map(str, written)]).encode()
    shown += b"".join(path.read_bytes() for path in written)
    for column, word in PLANTED.items():
        # a refusal repeats what the visitor sent
        assert shown.count(word.encode()) == (1 if column == "id" else 0), column
    for text in (str(server.folder), "2024-01-31", "/data/", "<form>"):
        assert text.encode() not in shown, text
