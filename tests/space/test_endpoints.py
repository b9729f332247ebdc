"""The Space over HTTP: three JSON endpoints, and no access to other files of the server."""

from __future__ import annotations

import io
import json
import re
import socket
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from space_server import TIMEOUT, SpaceServer, routes_of, serving

from modeling_m3ret.space import request_gate
from modeling_m3ret.space.uploads import delete_old_files


pytestmark = pytest.mark.slow

UPLOAD_BYTES = 2**21
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    with serving(tmp_path_factory.mktemp("space"), UPLOAD_BYTES) as space:
        yield space


@pytest.fixture(scope="module")
def client(server: SpaceServer) -> Any:
    from gradio_client import Client

    return Client(server.address, verbose=False)


def upload(path: Path) -> Any:
    from gradio_client import handle_file

    return handle_file(path)


def test_only_three_endpoints_are_public(client: Any) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert set(endpoints["named_endpoints"]) == {"/search", "/embed", "/similar"}
    assert not endpoints["unnamed_endpoints"]


def test_search_finds_the_uploaded_scan_itself(client: Any, server: SpaceServer) -> None:
    path = server.scan_path("xray", ".dcm")
    row = next(row for row, record in enumerate(server.records) if record.location == path)
    answer = client.predict([upload(path)], 3, [], [], False, api_name="/search")
    assert set(answer) == {"query", "hits"}
    assert (answer["hits"][0]["item"], answer["hits"][0]["similarity"]) == (row, pytest.approx(1, abs=2e-3))
    hit = answer["hits"][0]
    assert set(hit) == {"item", "similarity", "percentile", "weak", "modality", "anatomy", "labels", "source"}
    assert (hit["percentile"], hit["weak"]) == (pytest.approx(100, abs=1), False)
    similarities = [hit["similarity"] for hit in answer["hits"]]
    assert similarities == sorted(similarities, reverse=True)
    reranked = client.predict([upload(path)], 3, [], [], True, api_name="/search")
    assert {hit["item"] for hit in reranked["hits"]} == {hit["item"] for hit in answer["hits"]}
    assert reranked["hits"][0]["item"] == row, "each patch is the nearest one to itself"


def test_search_filters_by_modality(client: Any, server: SpaceServer) -> None:
    answer = client.predict([upload(server.scan_path("xray", ".dcm"))], 9, ["ct", "mri"], [], False, api_name="/search")
    assert {hit["modality"] for hit in answer["hits"]} == {"ct", "mri"}


def test_embed_returns_the_models_embedding_of_a_series(client: Any, server: SpaceServer) -> None:
    series = server.scan_path("ct", "")
    answer = client.predict([upload(path) for path in sorted(series.iterdir())], api_name="/embed")
    with torch.no_grad():
        expected = server.service.model.embed_scans(**server.service.processor([series]))[0]
    np.testing.assert_allclose(answer["embedding"], expected.numpy(), atol=1e-5)
    scan = server.service.processor.read(series)
    assert answer["query"] == {"shape": [*scan.array.shape[1:]], "spacing": pytest.approx([*scan.spacing])}
    assert answer["model"] == "m3ret-tiny"


@pytest.mark.parametrize("other_subjects", [False, True])
def test_similar_excludes_the_item_and_optionally_its_subject(
    other_subjects: bool, client: Any, server: SpaceServer
) -> None:
    embeddings = server.service.gallery.index.embeddings.float()
    similarities = embeddings @ embeddings[3]
    excluded = {
        row
        for row, record in enumerate(server.records)
        if row == 3 or (other_subjects and record.group == server.records[3].group)
    }
    expected = [row for row in similarities.argsort(descending=True).tolist() if row not in excluded][:6]
    answer = client.predict(3, 6, [], [], other_subjects, api_name="/similar")
    assert [hit["item"] for hit in answer["hits"]] == expected


def test_an_item_that_does_not_exist_is_an_error(client: Any) -> None:
    with pytest.raises(Exception, match="999"):
        client.predict(999, 6, [], [], False, api_name="/similar")


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(client: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.dcm").write_text("not a scan")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", bytes(2**27))
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("../a.dcm", b"x")
    for name in ("notes.dcm", "pickled.npy", "bomb.zip", "slip.zip"):
        with pytest.raises(Exception, match=name):
            client.predict([upload(tmp_path / name)], 3, [], [], False, api_name="/search")


def test_html_in_a_file_name_is_escaped_in_a_message(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "<b onclick=alert(1)>.png"
    path.write_text("not an image")
    with pytest.raises(Exception, match=r"\.png") as raised:
        client.predict([upload(path)], 3, [], [], False, api_name="/search")
    assert "<b" not in str(raised.value)


def test_an_upload_is_refused_by_its_declared_size(server: SpaceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(server.uploads.rglob("*"))

    def status(**body: Any) -> int:
        return httpx.post(f"{server.address}gradio_api/upload", timeout=TIMEOUT, **body).status_code

    assert status(files={"files": ("large.dcm", bytes(UPLOAD_BYTES + 1))}) == 413
    quarter = bytes(UPLOAD_BYTES // 4)
    assert status(files=[("files", (f"{number}.dcm", quarter)) for number in range(5)]) == 413, "too large in total"
    boundary = {"Content-Type": "multipart/form-data; boundary=part"}
    form = b'--part\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--part--\r\n'
    assert status(content=iter([form]), headers=boundary) == 411, "no Content-Length"
    two_sizes = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", urlsplit(server.address).port), timeout=TIMEOUT) as connection:
        connection.sendall(two_sizes)
        assert connection.recv(1000).startswith(b"HTTP/1.1 411")
    free = 2 * len(form) - 1
    monkeypatch.setattr(request_gate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert status(content=form, headers=boundary) == 507, "more than half of the free disk space"
    assert set(server.uploads.rglob("*")) == before, "nothing was written"
    free += 1
    assert status(content=form, headers=boundary) == 200


# routes of Gradio that the page, its endpoints and Gradio's clients use
OPEN_ROUTES = {
    "/", "/config", "/config/", "/assets/{path:path}", "/static/{path:path}", "/svelte/{path:path}", "/theme.css",
    "/favicon.ico", "/robots.txt", "/manifest.json", "/pwa_icon", "/pwa_icon/{size}", "/logout",
    "/gradio_api/info", "/gradio_api/info/", "/gradio_api/user", "/gradio_api/user/", "/gradio_api/token",
    "/gradio_api/token/", "/gradio_api/app_id", "/gradio_api/app_id/", "/gradio_api/login_check",
    "/gradio_api/login_check/", "/gradio_api/theme.css", "/gradio_api/startup-events", "/gradio_api/upload_progress",
    "/gradio_api/queue/data", "/gradio_api/heartbeat/{session_hash}", "/gradio_api/file={path_or_url:path}",
    "/gradio_api/call/{api_name}/{event_id}", "/gradio_api/call/v2/{api_name}/{event_id}",
    "/login", "/login/", "/gradio_api/upload", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/reset/",
    "/gradio_api/queue/join", "/gradio_api/call/{api_name}", "/gradio_api/call/{api_name}/",
    "/gradio_api/call/v2/{api_name}", "/gradio_api/call/v2/{api_name}/",
}  # fmt: skip


def test_routes_that_the_page_does_not_need_are_closed(server: SpaceServer, tmp_path: Path) -> None:
    """All routes of the installed Gradio. Those that are refused say so and hold no connection, as dev/reload did."""
    closed = set()
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        for method, path in sorted(routes_of(server.page.server_app)):
            with visitor.stream(method, re.sub(r"{[^}]*}", "1", path)) as answer:
                refused = answer.status_code == 404 and "accepts no requests" in (
                    "" if "heartbeat" in path else answer.read().decode()
                )
            if refused or method == "HEAD":
                closed.add(path)
            else:
                assert path in OPEN_ROUTES, (method, path)
    assert {"/gradio_api/dev/reload", "/gradio_api/run/{api_name}", "/gradio_api/proxy={url_path:path}"} <= closed
    assert {
        "/gradio_api/component_server",
        "/gradio_api/process_recording",
        "/monitoring",
        "/gradio_api/runs",
    } <= closed
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert httpx.request(method, f"{server.address}gradio_api/upload", timeout=TIMEOUT).status_code == 404


def test_a_recording_is_not_written(server: SpaceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise recordings would stay in the temporary folder, and some files would be read into memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for route in ("process_recording", "component_server", "component_server/", "vibe-edit", "stream/1", "no_such"):
        answer = httpx.post(f"{server.address}gradio_api/{route}", files={"file": ("a", b"1" * 2000)}, timeout=TIMEOUT)
        assert answer.status_code == 404, route
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(request_gate, "MAX_BODY_BYTES", 100)
    answer = httpx.post(f"{server.address}gradio_api/call/similar", json={"data": ["1" * 100]}, timeout=TIMEOUT)
    assert answer.status_code == 413


def test_pages_and_files_state_what_a_browser_may_do_with_them(server: SpaceServer) -> None:
    """A page runs its own scripts only, a file runs none. Hugging Face shows Spaces in a frame."""
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        files = {"files": ("evil.html", b"<script>alert(1)</script>")}
        (path,) = visitor.post("/gradio_api/upload", files=files).json()
        answers = [visitor.get(route) for route in ("/", "/config", f"/gradio_api/file={path}", "/no-such-route")]
        answers.append(visitor.post("/gradio_api/call/similar", json={"data": []}))
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "referrer-policy" in answer.headers
        assert "x-frame-options" not in answer.headers, "would close the frame of a Space"
    page, _, file, *_ = (directives(answer.headers["content-security-policy"]) for answer in answers)
    assert page["default-src"] == ["'none'"]
    assert "'unsafe-inline'" not in page["script-src"]
    assert {"'self'", "https://huggingface.co"} <= set(page["frame-ancestors"])
    assert page["form-action"] == page["base-uri"] == ["'self'"]
    assert "sandbox" in file
    assert file["default-src"] == ["'none'"]
    assert answers[2].headers["content-disposition"].startswith("attachment")


def directives(policy: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for words in (directive.split() for directive in policy.split(";")) if words}


NOT_ITEMS = [-1, 10**9, 10**30, 1.5, True, "3", "", [0], {"a": 1}]
NOT_COUNTS = [0, -1, 49, 1e9, 2.5, False, "8", None, [8]]
NOT_CHOICES = ["ct", [1], [["ct"]], [None], ["CT "], ["doe"], 3, True, {"ct": 1}]


@pytest.mark.parametrize(
    ("position", "wrong"),
    [(0, NOT_ITEMS), (1, NOT_COUNTS), (2, NOT_CHOICES), (3, NOT_CHOICES), (4, [0, 1, "true", None, []])],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(position: int, wrong: list[Any], server: SpaceServer) -> None:
    names = ("item", "k", "modalities", "anatomies", "other_subjects")
    with httpx.Client(base_url=f"{server.address}gradio_api/", timeout=TIMEOUT) as visitor:
        for value in wrong:
            data = [0, 3, [], [], False]
            data[position] = value
            answers = [visitor.post("call/similar", json={"data": data})]
            answers.append(visitor.post("call/v2/similar", json=dict(zip(names, data, strict=True))))
            for answer in answers:
                assert answer.status_code == 422, value
                (refused,) = (detail for detail in answer.json()["detail"] if not detail["is_valid"])
                assert refused["parameter_name"] == names[position]


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b"null", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'"x"', "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"data": 1}', "application/json", 400),
        (b'{"data": {}}', "application/json", 400),
        (b'{"data": []}', "application/json", 400),
        (b'{"data": [0, 3, [], [], false, 1]}', "application/json", 400),
        (b'{"data": [NaN, 3, [], [], false]}', "application/json", 400),
        (b'{"data": [Infinity, 3, [], [], false]}', "application/json", 400),
        (b'{"data": [1e999, 3, [], [], false]}', "application/json", 422),
        (b'{"data": [' + b"9" * 5000 + b", 3, [], [], false]}", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"data": [0, 3, [], [], false], "batched": true}', "application/json", 400),
        (b'{"data": [0, 3, [], [], false], "session_hash": "../x"}', "application/json", 400),
        (b'{"data": [0, 3, [], [], false], "session_hash": 3}', "application/json", 400),
        (b'{"data": [0, 3, [], [], false], "trigger_id": -5}', "application/json", 400),
        (b'{"data": [0, 3, [], [], false]}', "text/plain", 415),
        (b'{"data": [0, 3, [], [], false]}', "", 415),
        (b"data=1", "application/x-www-form-urlencoded", 415),
        (b"<data/>", "application/xml", 415),
    ],
)
def test_a_malformed_request_is_refused(body: bytes, content_type: str, status: int, server: SpaceServer) -> None:
    headers = {"Content-Type": content_type}
    for route in ("call/similar", "call/v2/similar"):
        answer = httpx.post(f"{server.address}gradio_api/{route}", content=body, headers=headers, timeout=TIMEOUT)
        by_name = route == "call/v2/similar"  # where {} asks for the default of every value
        assert answer.status_code == status or (by_name and (body == b"{}" or 400 <= answer.status_code < 500))
        assert "Traceback" not in answer.text
    answer = httpx.post(f"{server.address}gradio_api/queue/join", content=body, headers=headers, timeout=TIMEOUT)
    assert 400 <= answer.status_code < 500


@pytest.mark.parametrize("index", [-1, 10**4, 10**30, 1.0, True, None, "0", [], [0], {"a": 0}])
def test_an_event_that_does_not_exist_is_refused(index: Any, server: SpaceServer) -> None:
    body = {"data": [], "session_hash": "s", "fn_index": index}
    answer = httpx.post(f"{server.address}gradio_api/queue/join", json=body, timeout=TIMEOUT)
    assert answer.status_code in (400, 404)
    answer = httpx.post(f"{server.address}gradio_api/call/{index}", json=body, timeout=TIMEOUT)
    assert answer.status_code in (400, 404)
    private = httpx.post(f"{server.address}gradio_api/call/_redraw", json={"data": [None] * 14}, timeout=TIMEOUT)
    assert private.status_code == 404, "an event of the page is not an endpoint"


NOT_SELECTIONS = [-1, -(10**9), 1.5, True, None, "0", [], [0, 0], {"a": 0}, "missing"]


@pytest.mark.parametrize(
    ("elem_id", "trigger", "selections"),
    [
        *((elem_id, "select", NOT_SELECTIONS) for elem_id in ("grid", "examples", "which-one", "map", "viewer-block")),
        ("viewer-block", "submit", NOT_SELECTIONS),
        ("viewer-block", "input", [*NOT_SELECTIONS, [0] * 4, [0] * 6, [-1, 0, 0, 0, 0], [0, 0, 0, 0, 1.5], [None] * 5]),
    ],
)
def test_a_selection_that_does_not_exist_is_refused(
    elem_id: str, trigger: str, selections: list[Any], server: SpaceServer
) -> None:
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        config = visitor.get("/config").json()
        (grid,) = (part["id"] for part in config["components"] if part["props"].get("elem_id") == elem_id)
        (event,) = (event for event in config["dependencies"] if [grid, trigger] in event["targets"])
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        body = {"fn_index": event["id"], "session_hash": "s", "data": [values[id] for id in event["inputs"]]}
        for selected in selections:
            data = {"value": None} if selected == "missing" else {"index": selected, "value": None}
            answer = visitor.post("/gradio_api/queue/join", json=body | {"event_data": data})
            assert answer.status_code == 400, selected
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}  # Gradio would look for it
        index = [0, 1, 9, 1, 9] if trigger == "input" else 3
        accepted = visitor.post("/gradio_api/queue/join", json=body | {"event_data": {"index": index, "value": file}})
        assert accepted.status_code == 200
        messages = visitor.get("/gradio_api/queue/data", params={"session_hash": "s"}).text
        assert "process_completed" in messages
        assert "/etc/passwd" not in messages
        for script in (event for event in config["dependencies"] if not event["backend_fn"]):
            body = {"fn_index": script["id"], "session_hash": "s", "data": [None] * len(script["inputs"])}
            assert visitor.post("/gradio_api/queue/join", json=body).status_code == 404, "it runs in the browser"


def test_a_malformed_upload_is_refused(server: SpaceServer) -> None:
    before = set(server.uploads.rglob("*"))
    multipart = "multipart/form-data"
    for content_type in (
        "",
        "text/plain",
        "application/json",
        multipart,
        f"{multipart}; boundary=",
        f"{multipart}; boundary=b",
    ):
        for body in (b"", b"x", b"--b\r\n", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"):
            headers = {"Content-Type": content_type}
            answer = httpx.post(f"{server.address}gradio_api/upload", content=body, headers=headers, timeout=TIMEOUT)
            assert 400 <= answer.status_code < 500 or answer.json() == [], (content_type, body)
    many = [("files", (f"{number}.png", b"x")) for number in range(1100)]
    assert httpx.post(f"{server.address}gradio_api/upload", files=many, timeout=TIMEOUT).status_code == 400
    files = [path for path in set(server.uploads.rglob("*")) - before if path.is_file() and path.stat().st_size > 1]
    assert files == []


def test_a_url_is_not_downloaded(server: SpaceServer) -> None:
    """Neither from the internet nor from the server's own network."""
    requests: list[str] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), Recorder) as elsewhere:
        thread = threading.Thread(target=elsewhere.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{elsewhere.server_port}"
        for url in (f"{address}/a.png", "HTTPS://example.org/a.png"):
            file = {"path": url, "meta": {"_type": "gradio.FileData"}}
            for body in ({"data": [[file]]}, {"data": [{"deep": [file]}]}, {"data": [file]}, {"data": [url]}):
                answer = httpx.post(f"{server.address}gradio_api/call/embed", json=body, timeout=TIMEOUT)
                assert answer.status_code == 422
        httpx.get(f"{address}/last", timeout=TIMEOUT)
        elsewhere.shutdown()
        thread.join()
    assert requests == ["/last"]


def test_an_upload_stays_in_its_folder_whatever_its_name(server: SpaceServer) -> None:
    before = set(server.folder.rglob("*"))
    files = {"files": ("../../../evil.png", b"x")}
    answer = httpx.post(f"{server.address}gradio_api/upload", files=files, timeout=TIMEOUT)
    if answer.status_code == 200:
        (path,) = answer.json()
        assert Path(path).resolve().is_relative_to(server.uploads.resolve())
        assert ".." not in Path(path).parts
    assert set(server.folder.rglob("*")) == before


def private_files(server: SpaceServer) -> list[Path]:
    """Return files of the index, of the gallery's scans, of the project and of the system."""
    index = [path for path in (server.folder / "galleries").rglob("*") if path.is_file()]
    assert {"embeddings.safetensors", "metadata.parquet", "thumbnails.parquet"} <= {path.name for path in index}
    scans = [server.scan_path("xray", ".png"), server.folder / "secret-ward" / "manifest.csv"]
    return [*index, *scans, ROOT / "pyproject.toml", ROOT / "app.py", Path("/etc/passwd")]


@pytest.mark.parametrize(
    "route", ["file=", "gradio_api/file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"]
)
def test_no_private_file_is_served(route: str, server: SpaceServer) -> None:
    with httpx.Client(timeout=TIMEOUT) as visitor:
        for path in private_files(server):
            traversal = f"{server.uploads}/../{path.relative_to('/')}"
            for name in (str(path), traversal, f"../../../..{path}", f"%2e%2e/..{path}"):
                answer = visitor.get(f"{server.address}{route}{name}")
                assert answer.status_code >= 400 or path.read_bytes() not in answer.content, name
                assert answer.status_code >= 400 or "text/html" in answer.headers["content-type"], name


def test_only_uploaded_files_are_read(server: SpaceServer) -> None:
    for path in (server.scan_path("xray", ".png"), ROOT / "pyproject.toml", Path("/etc/passwd")):
        for file in (
            {"path": str(path), "meta": {"_type": "gradio.FileData"}},
            {"path": f"{server.uploads}/../../..{path}", "meta": {"_type": "gradio.FileData"}},
            {"path": None, "url": f"file://{path}", "meta": {"_type": "gradio.FileData"}},
            {"path": str(path)},
            str(path),
        ):
            answer = httpx.post(f"{server.address}gradio_api/call/embed", json={"data": [[file]]}, timeout=TIMEOUT)
            assert answer.status_code == 422
            assert "root:" not in answer.text
    (server.uploads / "link.png").symlink_to("/etc/passwd")
    file = {"path": str(server.uploads / "link.png"), "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{server.address}gradio_api/call/embed", json={"data": [[file]]}, timeout=TIMEOUT)
    assert answer.status_code == 422
    assert httpx.get(f"{server.address}gradio_api/file={file['path']}", timeout=TIMEOUT).status_code == 404


def test_uploads_and_rendered_images_are_deleted_when_they_are_old(client: Any, server: SpaceServer) -> None:
    client.predict([upload(server.scan_path("xray", ".png"))], 3, [], [], False, api_name="/search")
    assert [path for path in server.uploads.rglob("*") if path.is_file()]
    delete_old_files(server.uploads, 3600)
    assert [path for path in server.uploads.rglob("*") if path.is_file()]
    delete_old_files(server.uploads, 0)
    assert not list(server.uploads.iterdir())


def test_answers_contain_no_file_name_and_no_patient(client: Any, server: SpaceServer) -> None:
    answer = json.dumps(client.predict(0, 30, [], [], False, api_name="/similar"))
    config = httpx.get(f"{server.address}config", timeout=TIMEOUT).text
    for text in (answer, config):
        assert "secret-ward" not in text
        assert "subject-00" not in text
        assert str(server.folder) not in text


def test_the_viewer_receives_pixels_of_scans_only(server: SpaceServer) -> None:
    """A new NIfTI file without text, under the number of a scan of the gallery or a random key of an upload."""
    row = server.row_of("ct")
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        answer = visitor.get(f"/m3ret/scan/row-{row}.nii")
        assert answer.status_code == 200
        assert "sandbox" in directives(answer.headers["content-security-policy"])
        assert answer.headers["cache-control"] == "no-store"
        shown = nibabel.Nifti1Image.from_bytes(answer.content)
        assert shown.shape[::-1] == server.service.scan(f"row-{row}").array.shape[1:]
        assert b"PHANTOM" not in answer.content
        picture = visitor.get(f"/m3ret/thumbnail/{row}.webp")
        assert Image.open(io.BytesIO(picture.content)).size == (128, 128)
        assert visitor.get("/m3ret/page.js").status_code == 200
        for name in (
            *("scan/row-999.nii", "scan/row--1.nii", "scan/row-x.nii", "scan/upload-0.nii", "scan/..%2f..%2fapp.py"),
            *(
                f"scan/upload-{'0' * 32}.nii",
                "scan/%2fetc%2fpasswd",
                "scan/",
                "thumbnail/999.webp",
                "thumbnail/-1.webp",
            ),
            *(
                "thumbnail/row.webp",
                "viewer.html",
                "..%2fservice.py",
                "../service.py",
                "page.js/..%2f..%2fservice.py",
                "",
            ),
        ):
            assert visitor.get(f"/m3ret/{name}").status_code == 404, name
        assert visitor.post(f"/m3ret/scan/row-{row}.nii").status_code == 404


def test_analytics_are_off(server: SpaceServer) -> None:
    assert not httpx.get(f"{server.address}config", timeout=TIMEOUT).json().get("analytics_enabled", False)
