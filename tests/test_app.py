"""The demo answers over HTTP: a scan in, similar scans out, a bad file in words, and no file of the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    sys.path.insert(0, str(ROOT))
    import app

    folder = tmp_path_factory.mktemp("gallery")
    generator = np.random.default_rng(0)
    records = []
    for number in range(6):
        path = folder / f"secret-name-{number}.png"
        Image.fromarray(generator.integers(0, 255, (60, 80), dtype=np.uint8)).save(path)
        records.append(Record(str(number), path, "xray", "chest", "l", f"patient-{number}"))
    page = app.build(M3RetModel(tiny_config()).eval(), M3RetImageProcessor(size=48), records)
    _, local, _ = page.launch(prevent_thread_lock=True, ssr_mode=False, quiet=True, allowed_paths=[])
    yield local
    page.close()


def test_a_scan_of_the_gallery_finds_itself_first(address: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (60, 80), dtype=np.uint8)).save(tmp_path / "query.png")
    client = Client(address, verbose=False)
    query, hits = client.predict(handle_file(tmp_path / "query.png"), 3, api_name="/search")
    assert Path(query).is_file()
    assert [hit["caption"].split(" · ")[1:] for hit in hits] == [["xray", "chest"]] * 3
    similarities = [float(hit["caption"].split(" · ")[0]) for hit in hits]
    assert similarities[0] == 1.0
    assert similarities == sorted(similarities, reverse=True)
    assert "secret-name" not in str(hits)


def test_a_bad_file_is_answered_in_words_and_the_page_lives(address: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    (tmp_path / "notes.dcm").write_text("not a scan")
    client = Client(address, verbose=False)
    with pytest.raises(Exception, match=r"notes\.dcm: found text; expected"):
        client.predict(handle_file(tmp_path / "notes.dcm"), 3, api_name="/search")
    assert httpx.get(address).status_code == 200


@pytest.mark.parametrize("path", ["pyproject.toml", "/etc/passwd", "../pyproject.toml"])
def test_no_file_of_the_machine_is_served(address: str, path: str) -> None:
    name = str(ROOT / path) if not path.startswith("/") else path
    assert httpx.get(f"{address}gradio_api/file={name}").status_code in (403, 404)
