"""The page that is shown while the gallery is embedded."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from space_server import TIMEOUT, serving, small_gallery, small_phantom

from modeling_m3ret.errors import InputError
from modeling_m3ret.space.gallery import embed_gallery
from modeling_m3ret.space.startup import StartupPage


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_progress_is_shown_until_the_page_is_ready(tmp_path: Path) -> None:
    port = free_port()
    with StartupPage(port) as startup:
        for done, fraction in ((0, "0.000"), (52, "0.250"), (208, "1.000")):
            startup.report(done, 208)
            answer = httpx.get(f"http://127.0.0.1:{port}/any/path?<script>")
            assert answer.status_code == 503
            assert f"{done} of 208" in answer.text
            assert f'value="{fraction}"' in answer.text
            assert "any/path" not in answer.text
        assert httpx.post(f"http://127.0.0.1:{port}/").status_code == 501
    with ThreadPoolExecutor() as pool:  # a visitor between the two pages waits
        visit = pool.submit(httpx.get, f"http://127.0.0.1:{port}/config", timeout=TIMEOUT)
        with serving(tmp_path, listening=startup.socket) as space:
            assert visit.result().status_code == 200
            assert space.address == f"http://127.0.0.1:{port}/"


def test_a_port_in_use_is_an_error() -> None:
    port = free_port()
    with StartupPage(port), pytest.raises(InputError, match=str(port)):
        StartupPage(port)


def test_embedding_a_gallery_reports_its_progress(tmp_path: Path) -> None:
    records = small_phantom(tmp_path / "scans", subjects=2)
    model, processor, _ = small_gallery(tmp_path / "other", records)
    reports: list[tuple[int, int]] = []
    embed_gallery(records, model, processor, "m", folder=tmp_path / "g", report=lambda *report: reports.append(report))
    assert reports[-1] == (len(records), len(records))
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    reports.clear()
    embed_gallery(records, model, processor, "m", folder=tmp_path / "g", report=lambda *report: reports.append(report))
    assert reports == [], "read from the cache"
