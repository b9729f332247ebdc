"""With `--auth`: visitors who log in have access, and all others have none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from space_server import HTML_LABEL, TIMEOUT, SpaceServer, browsing, find_browser, routes_of, screenshot_folder, serving


pytestmark = pytest.mark.slow

USER, PASSWORD = "ward", "a long password"
# routes that Gradio opens to everyone: the login form, its scripts and images, and whether the server is running
PUBLIC_ROUTES = {
    "/", "/login", "/login/", "/logout", "/svelte/{path:path}", "/static/{path:path}", "/assets/{path:path}",
    "/favicon.ico", "/theme.css", "/robots.txt", "/manifest.json", "/pwa_icon", "/pwa_icon/{size}",
    "/gradio_api/user", "/gradio_api/user/", "/gradio_api/token", "/gradio_api/token/", "/gradio_api/app_id",
    "/gradio_api/app_id/", "/gradio_api/theme.css", "/gradio_api/heartbeat/{session_hash}", "/gradio_api/reset",
    "/gradio_api/reset/", "/gradio_api/cancel", "/gradio_api/startup-events",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    with serving(tmp_path_factory.mktemp("space"), auth=(USER, PASSWORD), subjects=2) as space:
        yield space


@contextlib.contextmanager
def logged_in(server: SpaceServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        answer = visitor.post("/login", data={"username": USER, "password": PASSWORD})
        assert answer.json() == {"success": True}
        yield visitor


@pytest.mark.parametrize(
    "credentials", [(USER, "wrong"), ("other", PASSWORD), (USER, ""), ("", ""), (USER, PASSWORD + " ")]
)
def test_wrong_credentials_are_refused(credentials: tuple[str, str], server: SpaceServer) -> None:
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as visitor:
        answer = visitor.post("/login", data=dict(zip(("username", "password"), credentials, strict=True)))
        assert answer.status_code in (400, 422)
        assert visitor.get("/config").status_code == 401


def test_without_login_no_route_reveals_anything(server: SpaceServer) -> None:
    routes = routes_of(server.page.server_app)
    assert {("POST", "/gradio_api/call/{api_name}"), ("GET", "/config"), ("POST", "/gradio_api/upload")} <= routes
    secrets = {HTML_LABEL, "secret-ward", str(server.folder), "m3ret-tiny", "viewer-block", '"endpoint'}
    answered = set()
    with httpx.Client(base_url=server.address, timeout=TIMEOUT) as stranger:
        for method, path in sorted(routes):
            url = re.sub(r"{page[^}]*}|{api_name[^}]*}", "search", path)
            url = re.sub(r"{component_id}|{size}", "1", url)
            url = re.sub(r"{[^}]*}", "x", url)
            with stranger.stream(method, url, json={"data": [1, 8, [], [], False]}) as answer:
                body = "" if "heartbeat" in path else answer.read().decode(errors="replace")
            for secret in secrets:
                assert secret not in body, (method, path)
            if answer.status_code < 400:
                answered.add(path)
    assert answered <= PUBLIC_ROUTES, "Gradio has a new route without login"
    with logged_in(server) as visitor:
        assert "viewer-block" in visitor.get("/config").text


def test_endpoints_require_a_login(server: SpaceServer) -> None:
    from gradio_client import Client, handle_file

    image = server.scan_path("xray", ".png")
    client = Client(server.address, auth=(USER, PASSWORD), verbose=False)
    answer = client.predict([handle_file(image)], 3, [], [], False, api_name="/search")
    assert len(answer["hits"]) == 3
    for credentials in (None, (USER, "wrong")):
        with pytest.raises(Exception, match=r"(?i)auth|credentials|log"):
            Client(server.address, auth=credentials, verbose=False)
    for name, data in (("search", [[], 3, [], [], False]), ("embed", [[]]), ("similar", [0, 3, [], [], False])):
        for route in (f"call/{name}", f"call/v2/{name}", "queue/join"):
            answer = httpx.post(f"{server.address}gradio_api/{route}", json={"data": data}, timeout=TIMEOUT)
            assert answer.status_code == 401, route


def test_an_upload_can_be_downloaded_only_after_login(server: SpaceServer) -> None:
    files = {"files": ("scan.png", server.scan_path("xray", ".png").read_bytes())}
    assert httpx.post(f"{server.address}gradio_api/upload", files=files, timeout=TIMEOUT).status_code == 401
    with logged_in(server) as visitor:
        (path,) = visitor.post("/gradio_api/upload", files=files).json()
        route = f"gradio_api/file={path}"
        assert visitor.get(f"/{route}").content == files["files"][1]
        assert visitor.get("/m3ret/scan/row-0.nii").status_code == 200
    for url in (route, f"file={path}", f"gradio_api/file/{path}", "m3ret/scan/row-0.nii", "m3ret/thumbnail/0.webp"):
        assert httpx.get(f"{server.address}{url}", timeout=TIMEOUT).status_code in (401, 404), url


@pytest.mark.browser
def test_a_visitor_logs_in_with_the_browser(server: SpaceServer, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    find_browser()
    with browsing() as browser, contextlib.closing(browser.new_page(viewport={"width": 1280, "height": 900})) as page:
        page.set_default_timeout(TIMEOUT * 1000)
        page.goto(server.address)
        with page.expect_response("**/login") as refused:
            log_in(page, "wrong")
        assert refused.value.status == 400
        page.screenshot(path=screenshot_folder(tmp_path) / "1280-light-login.png")
        assert page.locator("#upload").count() == 0
        log_in(page, PASSWORD)
        page.locator("#upload").wait_for()
        page.locator("#examples .card").first.click()
        page.locator("#grid .card").first.wait_for()


def log_in(page: Any, password: str) -> None:
    page.get_by_label("username").fill(USER)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()
