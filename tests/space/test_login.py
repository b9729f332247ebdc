"""With `--auth`: who knows the words comes in, and nobody else is told anything."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import EVIL_LABEL, Served, browsing, find_browser, pictures_folder, serving


USER, PASSWORD = "ward", "a long password"
PATIENCE = 300.0  # s, of a machine that is busy with other things
# what Gradio answers to anybody: the form, its own scripts and pictures, and whether the server lives
OPEN_TO_ALL = {
    "/", "/login", "/login/", "/logout", "/svelte/{path:path}", "/static/{path:path}", "/assets/{path:path}",
    "/favicon.ico", "/theme.css", "/robots.txt", "/manifest.json", "/pwa_icon", "/pwa_icon/{size}",
    "/gradio_api/user", "/gradio_api/user/", "/gradio_api/token", "/gradio_api/token/", "/gradio_api/app_id",
    "/gradio_api/app_id/", "/gradio_api/theme.css", "/gradio_api/heartbeat/{session_hash}", "/gradio_api/reset",
    "/gradio_api/reset/", "/gradio_api/cancel", "/gradio_api/startup-events",
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("space"), auth=(USER, PASSWORD), subjects=2) as space:
        yield space


@contextlib.contextmanager
def logged_in(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.address, timeout=PATIENCE) as visitor:
        answer = visitor.post("/login", data={"username": USER, "password": PASSWORD})
        assert answer.json() == {"success": True}
        yield visitor


def routes_of(router: Any) -> set[tuple[str, str]]:
    """Methods and paths, those of routers within it included."""
    found = set()
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            found |= routes_of(inner)
        else:
            found |= {(method, route.path) for method in getattr(route, "methods", None) or ()}
    return found


@pytest.mark.parametrize("words", [(USER, "wrong"), ("nobody", PASSWORD), (USER, ""), ("", ""), (USER, PASSWORD + " ")])
def test_wrong_words_let_nobody_in(words: tuple[str, str], served: Served) -> None:
    with httpx.Client(base_url=served.address, timeout=PATIENCE) as visitor:
        answer = visitor.post("/login", data=dict(zip(("username", "password"), words, strict=True)))
        assert answer.status_code in (400, 422)
        assert visitor.get("/config").status_code == 401


def test_without_login_every_route_says_nothing(served: Served) -> None:
    routes = routes_of(served.page.server_app)
    assert {("POST", "/gradio_api/call/{api_name}"), ("GET", "/config"), ("POST", "/gradio_api/upload")} <= routes
    told = {EVIL_LABEL, "secret-ward", str(served.folder), "m3ret-tiny", "Most similar first", '"endpoint'}
    answered = set()
    with httpx.Client(base_url=served.address, timeout=PATIENCE) as stranger:
        for method, path in sorted(routes):
            asked = re.sub(r"{page[^}]*}|{api_name[^}]*}", "search", path)
            asked = re.sub(r"{component_id}|{size}", "1", asked)
            asked = re.sub(r"{[^}]*}", "x", asked)
            with stranger.stream(method, asked, json={"data": [1, 8, [], [], False]}) as answer:
                body = "" if "heartbeat" in path else answer.read().decode(errors="replace")
            for word in told:
                assert word not in body, (method, path)
            if answer.status_code < 400:
                answered.add(path)
    assert answered <= OPEN_TO_ALL, "Gradio has a route that asks for no login"
    with logged_in(served) as visitor:
        assert "Most similar first" in visitor.get("/config").text, "and it is told to who has logged in"


def test_endpoints_ask_for_the_words(served: Served) -> None:
    from gradio_client import Client, handle_file

    picture = served.of("xray", ".png")
    client = Client(served.address, auth=(USER, PASSWORD), verbose=False)
    answer = client.predict([handle_file(picture)], 3, [], [], False, api_name="/search")
    assert len(answer["hits"]) == 3
    for words in (None, (USER, "wrong")):
        with pytest.raises(Exception, match=r"(?i)auth|credentials|log"):
            Client(served.address, auth=words, verbose=False)
    for name, data in (("search", [[], 3, [], [], False]), ("embed", [[]]), ("similar", [0, 3, [], [], False])):
        for route in (f"call/{name}", f"run/{name}", f"api/{name}", f"call/v2/{name}"):
            asked = httpx.post(f"{served.address}gradio_api/{route}", json={"data": data}, timeout=PATIENCE)
            assert asked.status_code == 401, route


def test_a_visitors_file_is_not_for_strangers(served: Served) -> None:
    files = {"files": ("scan.png", served.of("xray", ".png").read_bytes())}
    assert httpx.post(f"{served.address}gradio_api/upload", files=files, timeout=PATIENCE).status_code == 401
    with logged_in(served) as visitor:
        (path,) = visitor.post("/gradio_api/upload", files=files).json()
        address = f"gradio_api/file={path}"
        assert visitor.get(f"/{address}").content == files["files"][1]
    for form in (address, f"file={path}", f"gradio_api/file/{path}"):
        assert httpx.get(f"{served.address}{form}", timeout=PATIENCE).status_code in (401, 404), form


def test_a_browser_logs_in(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    find_browser()
    with browsing() as browser, contextlib.closing(browser.new_page(viewport={"width": 1280, "height": 900})) as page:
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(served.address)
        _fill(page, "wrong")
        page.get_by_text(re.compile("incorrect", re.IGNORECASE)).first.wait_for()
        page.screenshot(path=pictures_folder(tmp_path) / "1280-light-login.png")
        assert page.locator("#upload").count() == 0
        _fill(page, PASSWORD)
        page.locator("#upload").wait_for()
        page.locator("#examples button").first.click()
        page.locator("#grid .caption-label").first.wait_for()


def _fill(page: Any, password: str) -> None:
    page.get_by_label("username").fill(USER)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()
