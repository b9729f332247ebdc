"""The Space over HTTP: three endpoints in JSON, and no file of this machine however one asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from served import EVIL_LABEL, Served, serving
from starlette.responses import PlainTextResponse

from modeling_m3ret.space import request_gate, sweeping
from modeling_m3ret.space.sweeping import EVERY_SECONDS, SECONDS_KEPT, sweep


UPLOAD_BYTES = 2**21
PATIENCE = 120.0  # s, of a machine that is busy with other things
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("space"), UPLOAD_BYTES) as space:
        yield space


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    from gradio_client import Client

    return Client(served.address, verbose=False)


def sent(file: Path) -> Any:
    from gradio_client import handle_file

    return handle_file(file)


def test_three_endpoints_are_public(client: Any) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert set(endpoints["named_endpoints"]) == {"/search", "/embed", "/similar"}
    assert not endpoints["unnamed_endpoints"]


def test_search_finds_the_scan_itself_and_filters(client: Any, served: Served) -> None:
    own = next(row for row, record in enumerate(served.records) if record.location == served.of("xray", ".dcm"))
    answer = client.predict([sent(served.of("xray", ".dcm"))], 3, [], [], False, api_name="/search")
    assert set(answer) == {"query", "hits"}
    assert (answer["hits"][0]["item"], answer["hits"][0]["similarity"]) == (own, pytest.approx(1, abs=2e-3))
    assert set(answer["hits"][0]) == {"item", "similarity", "modality", "anatomy", "labels", "source"}
    similarities = [hit["similarity"] for hit in answer["hits"]]
    assert similarities == sorted(similarities, reverse=True)
    narrowed = client.predict([sent(served.of("xray", ".dcm"))], 9, ["ct", "mri"], [], False, api_name="/search")
    assert {hit["modality"] for hit in narrowed["hits"]} == {"ct", "mri"}
    reranked = client.predict([sent(served.of("xray", ".dcm"))], 3, [], [], True, api_name="/search")
    assert {hit["item"] for hit in reranked["hits"]} == {hit["item"] for hit in answer["hits"]}
    assert reranked["hits"][0]["item"] == own, "each of its patches is nearest to itself"


def test_embed_gives_the_models_embedding_of_a_series(client: Any, served: Served) -> None:
    series = served.of("ct", "")
    answer = client.predict([sent(path) for path in sorted(series.iterdir())], api_name="/embed")
    with torch.no_grad():
        expected = served.searching.model.get_image_features(**served.searching.processor([series]))[0]
    np.testing.assert_allclose(answer["embedding"], expected.numpy(), atol=1e-5)
    scan = served.searching.processor.read(series)
    assert answer["query"] == {"shape": [*scan.array.shape[1:]], "spacing": pytest.approx([*scan.spacing])}
    assert answer["model"] == "m3ret-tiny"


def test_similar_leaves_out_the_item_and_its_subject(client: Any, served: Served) -> None:
    embeddings = served.searching.gallery.index.embeddings.float()
    similarities = embeddings @ embeddings[3]
    for other_subjects in (False, True):
        left_out = {
            row
            for row, record in enumerate(served.records)
            if row == 3 or (other_subjects and record.group == served.records[3].group)
        }
        expected = [row for row in similarities.argsort(descending=True).tolist() if row not in left_out][:6]
        answer = client.predict(3, 6, [], [], other_subjects, api_name="/similar")
        assert [hit["item"] for hit in answer["hits"]] == expected
    with pytest.raises(Exception, match="found item 999"):
        client.predict(999, 6, [], [], False, api_name="/similar")


def test_bad_files_are_told_in_words(client: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.dcm").write_text("not a scan")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(2**27))
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("../../slip.dcm", "x")
    for name, words in {
        "notes.dcm": "unsupported data: expected DICOM",
        "pickled.npy": "got an array of type object",
        "bomb.zip": "claims to hold 134,217,728 bytes",
        "slip.zip": "a path that leads out of it",
    }.items():
        with pytest.raises(Exception, match=rf"{name}.*{words}"):
            client.predict([sent(tmp_path / name)], 3, [], [], False, api_name="/search")


def test_html_in_a_label_is_data_and_in_a_message_text(client: Any, served: Served, tmp_path: Path) -> None:
    labels = [
        label for hit in client.predict(1, 30, [], [], False, api_name="/similar")["hits"] for label in hit["labels"]
    ]
    assert EVIL_LABEL in labels
    bad = tmp_path / "<b onclick=alert(1)>.png"
    bad.write_text("no picture")
    with pytest.raises(Exception, match="expected") as told:
        client.predict([sent(bad)], 3, [], [], False, api_name="/search")
    assert "<b" not in str(told.value)


def test_too_large_an_upload_is_refused(served: Served) -> None:
    files = {"files": ("large.dcm", bytes(UPLOAD_BYTES + 1))}
    assert httpx.post(f"{served.address}gradio_api/upload", files=files, timeout=PATIENCE).status_code == 413


def test_an_upload_is_refused_by_what_it_says_it_holds(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small files as one large one; what does not say its size; what would fill the disk. None is written."""
    before = set(served.uploads.rglob("*"))

    def status(**body: Any) -> int:
        return httpx.post(f"{served.address}gradio_api/upload", timeout=PATIENCE, **body).status_code

    part = bytes(UPLOAD_BYTES // 4)
    assert status(files=[("files", (f"{number}.dcm", part)) for number in range(5)]) == 413
    boundary = {"Content-Type": "multipart/form-data; boundary=part"}
    form = b'--part\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--part--\r\n'
    assert status(content=iter([form]), headers=boundary) == 411
    two_sizes = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", urlsplit(served.address).port), timeout=PATIENCE) as connection:
        connection.sendall(two_sizes)
        assert connection.recv(1000).startswith(b"HTTP/1.1 411")
    free = 2 * len(form) - 1
    monkeypatch.setattr(request_gate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert status(content=form, headers=boundary) == 507
    assert set(served.uploads.rglob("*")) == before
    free += 1
    assert status(content=form, headers=boundary) == 200


def test_nothing_is_taken_in_that_the_page_does_not_need(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings would be left in the folder of the machine, files for a component's own methods read into memory."""
    before = set(Path(tempfile.gettempdir()).iterdir())
    for way in ("process_recording", "component_server", "component_server/", "vibe-edit", "stream/1", "no_such_way"):
        post = httpx.post(f"{served.address}gradio_api/{way}", files={"file": ("a", b"1" * 2000)}, timeout=PATIENCE)
        assert post.status_code == 404, way
    assert httpx.put(f"{served.address}gradio_api/upload", content=b"1", timeout=PATIENCE).status_code == 404
    assert set(Path(tempfile.gettempdir()).iterdir()) == before
    monkeypatch.setattr(request_gate, "MESSAGE_BYTES", 100)
    long = httpx.post(f"{served.address}gradio_api/call/similar", json={"data": ["1" * 100]}, timeout=PATIENCE)
    assert long.status_code == 413


def test_an_address_in_place_of_a_file_is_not_fetched(served: Served) -> None:
    """Neither from the whole network, nor from what only this machine can reach."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as elsewhere:
        elsewhere.timeout = 2
        for address in (f"http://127.0.0.1:{elsewhere.server_port}/a.png", "HTTPS://example.org/a.png"):
            file = {"path": address, "meta": {"_type": "gradio.FileData"}}
            for way, told in (("call/embed", {"data": [[file]]}), ("run/embed", {"data": [{"deep": [file]}]})):
                post = httpx.post(f"{served.address}gradio_api/{way}", json=told, timeout=PATIENCE)
                assert (post.status_code, post.text) == (400, "found the address of a file, expected an upload")
        asked: list[Any] = []
        elsewhere.process_request = lambda *request: asked.append(request)  # type: ignore[method-assign]
        elsewhere.handle_request()  # returns when nobody came
        assert not asked


def test_uploads_under_way_count_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 40 bytes at once where 100 are free: half of them would not hold both."""
    monkeypatch.setattr(request_gate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    begun, statuses = asyncio.Event(), []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.sleep(0.2)
        await PlainTextResponse("written")(scope, receive, send)

    gate = request_gate.RequestGate(slow, tmp_path, upload_bytes=50)

    async def upload() -> None:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/gradio_api/upload",
            "headers": [(b"content-length", b"40")],
        }
        await gate(scope, None, send)

    async def two_and_a_third() -> None:
        first = asyncio.create_task(upload())
        await begun.wait()
        await upload()
        await first
        await upload()

    asyncio.run(two_and_a_third())
    assert statuses == [507, 200, 200]


def test_an_upload_stays_in_its_folder_whatever_its_name(served: Served) -> None:
    before = set(served.folder.rglob("*"))
    files = {"files": ("../../../evil.png", b"x")}
    answer = httpx.post(f"{served.address}gradio_api/upload", files=files, timeout=PATIENCE)
    if answer.status_code == 200:
        (path,) = answer.json()
        assert Path(path).resolve().is_relative_to(served.uploads.resolve())
        assert ".." not in Path(path).parts
    assert set(served.folder.rglob("*")) == before


def secrets(served: Served) -> list[Path]:
    """Files that must stay here: of the index, of the gallery's scans, of the project, of the machine."""
    index = [path for path in (served.folder / "galleries").rglob("*") if path.is_file()]
    assert {"embeddings.safetensors", "metadata.parquet", "thumbnails.parquet"} <= {path.name for path in index}
    scans = [served.of("xray", ".png"), served.folder / "secret-ward" / "manifest.csv"]
    return [*index, *scans, ROOT / "pyproject.toml", ROOT / "app.py", Path("/etc/passwd")]


@pytest.mark.parametrize(
    "route", ["file=", "gradio_api/file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"]
)
def test_no_file_is_served(route: str, served: Served) -> None:
    with httpx.Client(timeout=PATIENCE) as visitor:
        for path in secrets(served):
            inside = f"{served.uploads}/../{path.relative_to('/')}"
            for name in (str(path), inside, f"../../../..{path}", f"%2e%2e/..{path}"):
                answer = visitor.get(f"{served.address}{route}{name}")
                assert answer.status_code >= 400 or path.read_bytes() not in answer.content, name
                assert answer.status_code >= 400 or "text/html" in answer.headers["content-type"], name


def test_no_file_is_read_as_an_upload_that_was_none(served: Served) -> None:
    for path in (served.of("xray", ".png"), ROOT / "pyproject.toml", Path("/etc/passwd")):
        for file in (
            {"path": str(path), "meta": {"_type": "gradio.FileData"}},
            {"path": f"{served.uploads}/../../..{path}", "meta": {"_type": "gradio.FileData"}},
            {"path": None, "url": f"file://{path}", "meta": {"_type": "gradio.FileData"}},
            {"path": str(path)},
            str(path),
        ):
            post = httpx.post(f"{served.address}gradio_api/call/embed", json={"data": [[file]]}, timeout=PATIENCE)
            if post.status_code != 200:
                continue
            event = post.json()["event_id"]
            told = httpx.get(f"{served.address}gradio_api/call/embed/{event}", timeout=PATIENCE).text
            assert "event: error" in told, file
            assert "event: complete" not in told, file
            assert "root:" not in told


def test_what_was_uploaded_and_made_is_deleted(client: Any, served: Served) -> None:
    client.predict([sent(served.of("xray", ".png"))], 3, [], [], False, api_name="/search")
    assert [path for path in served.uploads.rglob("*") if path.is_file()]
    assert SECONDS_KEPT + EVERY_SECONDS <= 3600, "the page says within the hour"
    sweep(served.uploads, 3600)
    assert [path for path in served.uploads.rglob("*") if path.is_file()], "not before"
    sweep(served.uploads, 0)
    assert not list(served.uploads.iterdir())


def test_a_folder_that_is_about_to_be_written_into_stays(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 100,) * 2)
    sweep(tmp_path, 60)
    assert [*tmp_path.iterdir()] == [new]


def test_sweeping_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "EVERY_SECONDS", 0.01)
    old, new = tmp_path / "a" / "old", tmp_path / "a" / "new"
    new.parent.mkdir()
    old.write_text("x")
    new.write_text("x")
    os.utime(old, (time.time() - sweeping.SECONDS_KEPT - 1,) * 2)
    remembered = {str(old), str(new)}
    unused: list[float] = []
    stop = sweeping.keep_sweeping(tmp_path, [remembered], unused.append)
    deadline = time.time() + PATIENCE
    while len(remembered) > 1 and time.time() < deadline:
        time.sleep(0.01)
    stop.set()
    assert not old.exists()
    assert new.exists()
    assert remembered == {str(new)}
    assert set(unused) == {sweeping.SECONDS_KEPT}


def test_nothing_told_names_a_file_or_a_patient(client: Any, served: Served) -> None:
    told = json.dumps(client.predict(0, 30, [], [], False, api_name="/similar"))
    config = httpx.get(f"{served.address}config", timeout=PATIENCE).text
    for text in (told, config):
        assert "secret-ward" not in text
        assert "subject-00" not in text
        assert str(served.folder) not in text
    with contextlib.suppress(KeyError):
        assert not json.loads(config)["analytics_enabled"]
