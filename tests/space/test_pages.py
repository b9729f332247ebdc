"""The parts of the page that need no server: the "About" tab, the map, and which controls are visible."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

import gradio as gr
from conftest import tiny_config
from space_server import DirectReaders

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.reading_image_m3ret import IMAGE_FORMATS
from modeling_m3ret.reading_m3ret import FORMATS
from modeling_m3ret.reading_volume_m3ret import VOLUME_READERS
from modeling_m3ret.scan_m3ret import PROBLEMS, M3RetReadError, Reason
from modeling_m3ret.search.index import RetrievalIndex
from modeling_m3ret.space.endpoints import error_html
from modeling_m3ret.space.explore import HEIGHT, WIDTH, ExplorePage
from modeling_m3ret.space.gallery import Gallery
from modeling_m3ret.space.pages import about, build, model_card
from modeling_m3ret.space.search_page import EXAMPLES, NO_PIXELS, SORTS, SearchPage, Turn
from modeling_m3ret.space.service import SearchService


def test_the_model_card_is_shown_without_its_header_and_images(tmp_path: Path) -> None:
    card = (
        "---\nlicense: mit\n---\n# Model\n\nmAP 0.5 ![a curve](https://example.org/a.png) ![b][1]\n\n"
        "<img\nsrc='https://example.org/b.png'> end\n\n[1]: https://example.org/c.png\n"
        "\n| a | b |\n|---|---|\n| 1 < 2 | x |\n"
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    shown = about(str(tmp_path))
    assert model_card(str(tmp_path)) == card
    assert "<h1>Model</h1>" in shown
    assert "mAP 0.5 a curve" in shown
    assert "license" not in shown
    assert "<img" not in shown
    assert "example.org" not in shown
    assert " end" in shown
    assert "<td>1 &lt; 2</td>" in shown


@pytest.mark.parametrize(
    "text",
    [
        "<form action=https://example.org><input name=p><button>Log in</button></form>",
        "text <form\naction='//example.org'> text",
        "<script>alert(1)</script>",
        "a<script src=//example.org/a.js></script>",
        "<iframe src=//example.org></iframe>",
        "<svg/onload=alert(1)>",
        "<b onclick=alert(1)>x</b>",
        "<details open ontoggle=alert(1)>\n\ntext\n\n</details>",
        "<!-- <form> -->",
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt&colon;alert(1))",
        "[x](&#x6A;avascript:alert(1))",
        "<javascript:alert(1)>",
        "[x][1]\n\n[1]: vbscript:x",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "![x](//example.org/a.png)",
        "![<form>](a.png)",
        '[x](https://example.org/"onclick=alert(1))',
        "<style>@import url(//example.org)</style>",
        "<base href=//example.org>",
        "<meta http-equiv=refresh content=0>",
    ],
)
def test_a_card_can_neither_run_scripts_nor_ask_for_input(text: str, tmp_path: Path) -> None:
    """Elements and attributes are those that a browser would find: html.parser is the independent reader."""
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n# Model\n\n{text}\n", encoding="utf-8")
    found: list[tuple[str, dict[str, str | None]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attributes)))

    Parser().feed(about(str(tmp_path)))
    assert {tag for tag, _ in found} <= {"h1", "h2", "p", "a", "em", "strong", "code", "pre", "ul", "ol", "li"}
    for _, attributes in found:
        assert attributes.keys() <= {"href", "title"}
        assert (attributes.get("href") or "https:").startswith("https:")


def test_a_checkpoint_without_a_card_has_an_about_tab(tmp_path: Path) -> None:
    assert model_card(str(tmp_path)) == ""
    assert about(str(tmp_path))


def service_of(embeddings: torch.Tensor, columns: dict[str, Any], records: list[Record] | None) -> SearchService:
    model, processor = M3RetModel(tiny_config()).eval(), M3RetImageProcessor(size=48, num_frames=8)
    ids = {"id": [str(row) for row in range(len(embeddings))]}
    gallery = Gallery(RetrievalIndex.build(embeddings, pa.table(ids | columns), ModelFacts("m", "r", "p")), records)
    return SearchService(model, processor, gallery, DirectReaders())


def explore_page(service: SearchService) -> ExplorePage:
    with gr.Blocks(), gr.Tabs() as tabs, gr.Tab() as tab:
        return ExplorePage(service, SearchPage(service), tab, tabs)


def circles(svg: str) -> list[dict[str, str]]:
    """Return the attributes of the circles of a map."""
    return [dict(re.findall(r"([\w-]+)='([^']*)'", circle)) for circle in re.findall(r"<circle[^>]*>", svg)]


def test_the_map_shows_the_first_two_principal_components() -> None:
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(16, 2)))[0]
    flat = generator.normal(size=(50, 2)) * [5.0, 2.0]
    service = service_of(torch.from_numpy(flat @ axes.T).float(), {"modality": ["ct"] * 50}, None)
    embeddings = service.gallery.index.embeddings.double().numpy()
    shown = circles(explore_page(service).draw(None, "modality"))
    assert [circle["data-index"] for circle in shown] == [str(row) for row in range(50)]
    components = np.linalg.svd(embeddings - embeddings.mean(0))[0]
    for axis, (name, size) in enumerate((("cx", WIDTH), ("cy", HEIGHT))):
        places = np.array([float(circle[name]) for circle in shown])
        assert abs(np.corrcoef(places, components[:, axis])[0, 1]) > 0.999
        assert places.min() >= 0
        assert places.max() <= size


def test_the_map_is_coloured_by_name_and_marks_the_query() -> None:
    evil = "<img src=x onerror='a'>"
    columns = {"modality": ["ct", "ct", "mri"], "anatomy": ["chest", "", "chest"], "labels": [[], [], [evil]]}
    service = service_of(torch.eye(3, 8), columns, None)
    service.gallery.show_labels = True
    page = explore_page(service)
    query = service.query_of_row(2)
    by_modality, by_anatomy = circles(page.draw(query, "modality")), circles(page.draw(None, "anatomy"))
    assert by_modality[0]["fill"] == by_modality[1]["fill"] != by_modality[2]["fill"]
    assert by_anatomy[0]["fill"] == by_anatomy[2]["fill"] != by_anatomy[1]["fill"]
    assert by_modality[3]["class"] == "query"
    assert (by_modality[3]["cx"], by_modality[3]["cy"]) == (by_modality[2]["cx"], by_modality[2]["cy"])
    assert len(by_anatomy) == 3, "without a query nothing is marked"
    drawn = page.draw(query, "modality")
    assert "CT (2)" in drawn
    assert "<img" not in drawn


def test_the_map_of_one_scan_can_be_drawn() -> None:
    service = service_of(torch.ones(1, 8), {"modality": ["ct"]}, None)
    assert len(circles(explore_page(service).draw(service.query_of_row(0), "modality"))) == 2


def search_page(service: SearchService) -> SearchPage:
    with gr.Blocks():
        return SearchPage(service)


def test_nothing_of_an_earlier_query_stays() -> None:
    """Whatever an event of a query changes is among the outputs that `cleared` resets."""
    page = search_page(service_of(torch.eye(2, 8), {"modality": ["ct", "mri"]}, None))
    found = page.of_item(0, Turn(), 8, [], [], SORTS[0], False, False)
    assert found[page.query].row == 0
    assert [group.first["item"] for group in found[page.groups]] == [1]
    failed = page.of_item(99, Turn(), 8, [], [], SORTS[0], False, False)
    assert "99" in failed[page.notice]
    cleared = page.cleared()
    assert set(cleared) == set(page.outputs) == set(found) == set(failed)
    assert {
        key: value for key, value in failed.items() if key is not page.notice and not isinstance(value, gr.blocks.Block)
    } == {
        key: value
        for key, value in cleared.items()
        if key is not page.notice and not isinstance(value, gr.blocks.Block)
    }
    assert cleared[page.query] is None
    assert not any(cleared[part] for part in (page.groups, page.grid, page.table, page.status, page.viewer.view))


def test_an_event_that_ends_after_a_later_query_changes_nothing() -> None:
    page = search_page(service_of(torch.eye(2, 8), {"modality": ["ct", "mri"]}, None))
    turn = Turn()
    search, later = page.service.search, []

    def slow_search(*args: Any, **kwargs: Any) -> Any:
        page.service.search = search  # type: ignore[method-assign]
        later.append(page.of_item(1, turn, 8, [], [], SORTS[0], False, False))
        return search(*args, **kwargs)

    page.service.search = slow_search  # type: ignore[assignment]
    earlier = page.of_item(0, turn, 8, [], [], SORTS[0], False, False)
    assert later[0][page.query].row == 1
    assert set(earlier) == {page.notice}


def test_an_unexpected_error_is_shown_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    page = search_page(service_of(torch.eye(2, 8), {"modality": ["ct", "mri"]}, None))

    path = "/home/jane-" + "doe"

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError(path)

    page.service.search = fail  # type: ignore[assignment]
    shown = page.of_item(0, Turn(), 8, [], [], SORTS[0], False, False)
    assert shown[page.notice]
    assert path not in shown[page.notice] + caplog.text
    assert "RuntimeError" in caplog.text


@pytest.mark.parametrize("reason", PROBLEMS)
def test_errors_are_in_plain_words(reason: Reason) -> None:
    shown = error_html(M3RetReadError("<b>.dcm", reason, "x > y", "z", "Do this."))
    assert "&lt;b&gt;.dcm" in shown
    assert "x &gt; y" in shown
    assert "<b>.dcm" not in shown


def test_results_can_be_sorted() -> None:
    columns = {"modality": ["ct", "xray", "ct", "mri"]}
    embeddings = torch.eye(4) + torch.tensor([[0.0], [0.3], [0.1], [0.2]])  # most similar first: 1, 3, 2
    page = search_page(service_of(embeddings, columns, None))
    shown = page.of_item(0, Turn(), 8, [], [], SORTS[1], False, False)[page.grid]
    assert re.findall(r"data-index='(\d)'", shown) == ["2", "3", "1"]
    assert re.findall(r"class='rank'>(\d)<", shown) == ["3", "2", "1"], "the rank is that of the similarity"


def test_examples_show_every_modality() -> None:
    columns = {"modality": ["ct"] * 9 + ["mri", "xray"], "anatomy": [f"part {n}" for n in range(9)] + ["head", "hand"]}
    service = service_of(torch.randn(11, 8), columns, None)
    service.gallery.show_labels = True
    shown = str(search_page(service).examples.value)
    rows = {int(row) for row in re.findall(r"data-index='(\d+)'", shown)}
    assert len(rows) == EXAMPLES
    assert {9, 10} <= rows


@pytest.mark.parametrize("synthetic", [False, True, None])
def test_a_checkpoint_of_synthetic_scans_has_a_banner(synthetic: bool | None, tmp_path: Path) -> None:
    if synthetic is not None:
        (tmp_path / "training.json").write_text(json.dumps({"synthetic": synthetic}))
    page = build(service_of(torch.eye(2, 8), {"modality": ["ct", "mri"]}, None), str(tmp_path))
    assert ("synthetic" in {getattr(block, "elem_id", None) for block in page.blocks.values()}) == bool(synthetic)


def test_a_gallery_without_scans_has_no_viewer() -> None:
    page = search_page(service_of(torch.eye(2, 8), {"modality": pa.array([None, "ct"])}, None))
    found = page.of_item(0, Turn(), 8, [], [], SORTS[0], False, False)
    query, hits = found[page.query], found[page.groups]
    selected = SimpleNamespace(index=1)
    assert NO_PIXELS in page._shown(page._open)(selected, Turn(), query, hits)[page.notice]


def test_the_page_names_every_format_that_is_read() -> None:
    table = pa.table(
        {"id": ["0"], "patient": ["p"], "modality": ["ct"], "anatomy": [""], "labels": [[""]], "source": [""]}
    )
    gallery = Gallery(RetrievalIndex.build(torch.eye(1, 48), table, ModelFacts("m", "r", "p")), None)
    service = SearchService(M3RetModel(tiny_config()).eval(), M3RetImageProcessor(size=32), gallery, DirectReaders())
    with gr.Blocks() as page:
        SearchPage(service)
    shown = [str(getattr(block, "value", "")) for block in page.blocks.values()]
    assert any(FORMATS in text for text in shown)
    names = FORMATS.lower().replace(" ", "")
    for name in (*IMAGE_FORMATS, *VOLUME_READERS, "dicom", "heif", "video", "npy", "npz"):
        assert name.lower() in names
