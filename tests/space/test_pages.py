"""The parts of the page that need no server: the "About" tab, the map, and which controls are visible."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

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
from modeling_m3ret.search.index import RetrievalIndex
from modeling_m3ret.space.explore import SIDE, ExplorePage, GalleryMap
from modeling_m3ret.space.gallery import Gallery
from modeling_m3ret.space.pages import about, model_card
from modeling_m3ret.space.search_page import SearchPage, to_csv
from modeling_m3ret.space.service import HitFacts, SearchService


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


def test_the_map_shows_the_first_two_principal_components() -> None:
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(16, 2)))[0]
    flat = generator.normal(size=(50, 2)) * [5.0, 2.0]
    points = GalleryMap.from_embeddings(torch.from_numpy(flat @ axes.T)).points
    components = np.linalg.svd(flat - flat.mean(0))[0]
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], components[:, axis])[0, 1]) > 0.999
    assert points.min() >= 0
    assert points.max() <= SIDE


def test_the_nearest_point_of_the_map_is_selected() -> None:
    gallery_map = GalleryMap(np.array([[100, 100], [300, 200]], np.float32))
    assert gallery_map.nearest(295, 205) == 1
    assert gallery_map.nearest(-200, -200) is None


def test_the_map_of_one_scan_can_be_drawn() -> None:
    assert GalleryMap.from_embeddings(torch.ones(1, 8)).draw(["ct"], 0).size[0] == SIDE


@pytest.mark.parametrize("has_scans", [False, True])
def test_the_viewer_is_offered_only_if_the_gallery_has_scans(has_scans: bool, tmp_path: Path) -> None:
    model, processor = M3RetModel(tiny_config()), M3RetImageProcessor(size=48, num_frames=8)
    table = pa.table({"id": ["0", "1"], "modality": pa.array([None, "ct"])})  # columns may be absent or null
    records = [Record(str(row), tmp_path / f"{row}.npy", "ct", "", "", "") for row in range(2)] if has_scans else None
    gallery = Gallery(RetrievalIndex.build(torch.eye(2, 48), table, ModelFacts("m", "r", "p")), records)
    service = SearchService(model, processor, gallery, DirectReaders())
    with gr.Blocks(), gr.Tabs() as tabs, gr.Tab() as tab:
        search = SearchPage(service)
        explore = ExplorePage(service, search, tab, tabs)
    viewer = search.viewer
    for control in (viewer.show_heat, viewer.link_slices, viewer.to_best, *viewer.sliders.values()):
        ancestors, node = [], control
        while node is not None and node is not viewer.column:
            ancestors.append(node)
            node = node.parent
        assert all(ancestor.visible for ancestor in ancestors) == has_scans, control.elem_id
    assert explore.show(0, "modality")[explore.map].size[0] == SIDE


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


def test_formulas_are_escaped_in_the_csv_file() -> None:
    hit = HitFacts(item=3, similarity=-0.5, modality="ct", anatomy="+1", labels=["=HYPERLINK(1)"], source="s")
    header, line = to_csv([hit]).splitlines()
    assert header == "item,similarity,modality,anatomy,labels,source"
    assert line == "3,-0.5000,ct,'+1,'=HYPERLINK(1),s"
