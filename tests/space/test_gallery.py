"""A gallery: embedded once, searched exactly, named by nobody's name; two scans compared where they match."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from served import small_gallery, small_phantom

from modeling_m3ret import M3RetImageProcessor, M3RetModel, M3RetReadError
from modeling_m3ret.data.collection import Record
from modeling_m3ret.search.index import IndexFormatError, MetadataFilter, RetrievalIndex
from modeling_m3ret.search.matching import late_interaction, locate, scan_tokens
from modeling_m3ret.search.thumbnails import THUMBNAIL_SIZE
from modeling_m3ret.space import gallery as gallery_module
from modeling_m3ret.space.explore import SIDE, GalleryMap
from modeling_m3ret.space.gallery import Gallery, embed_gallery, open_gallery
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.searching import PutAwayError, Searching


PATIENCE = 300.0  # s, of a machine that is busy with other things


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gallery")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return small_phantom(folder / "secret-ward")


@pytest.fixture(scope="module")
def parts(folder: Path, records: list[Record]) -> tuple[M3RetModel, M3RetImageProcessor, Gallery]:
    torch.manual_seed(0)
    return small_gallery(folder / "galleries", records)


@pytest.fixture(scope="module")
def readers() -> IsolatedReaders:
    return IsolatedReaders()


@pytest.fixture
def searching(parts: tuple[M3RetModel, M3RetImageProcessor, Gallery], readers: IsolatedReaders) -> Searching:
    return Searching(*parts, readers)


def test_search_is_brute_force_within_the_filters(searching: Searching, records: list[Record]) -> None:
    embeddings = searching.gallery.index.embeddings.float()
    query = torch.nn.functional.normalize(torch.randn(embeddings.shape[1]), dim=0)
    similarities = embeddings @ query
    for filters, allowed in {
        MetadataFilter(): lambda record: True,
        MetadataFilter(modality=("ct", "xray")): lambda record: record.modality in ("ct", "xray"),
        MetadataFilter(anatomy=(records[7].anatomy,)): lambda record: record.anatomy == records[7].anatomy,
        MetadataFilter(modality=("none such",)): lambda record: False,
    }.items():
        expected = [row for row in similarities.argsort(descending=True).tolist() if allowed(records[row])][:5]
        assert searching.gallery.search(query, 5, filters).rows[0].tolist() == expected


def test_the_second_time_nothing_is_embedded(
    folder: Path,
    records: list[Record],
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor, first = parts
    monkeypatch.setattr(gallery_module, "embed_records", lambda *_: pytest.fail("embedded again"))
    again = embed_gallery(records, model, processor, "renamed", folder=folder / "galleries")
    torch.testing.assert_close(again.index.embeddings, first.index.embeddings, rtol=0, atol=0)
    assert again.records == first.records


def test_another_models_index_is_refused(folder: Path, parts: tuple[M3RetModel, M3RetImageProcessor, Gallery]) -> None:
    model, processor, gallery = parts
    gallery.index.save(folder / "index")
    found = open_gallery(str(folder / "index"), model, processor, "m3ret-tiny")
    assert (len(found), found.records) == (len(gallery), None)
    torch.manual_seed(1)
    other = M3RetModel(model.config).eval()
    with pytest.raises(IndexFormatError, match="expected those of"):
        open_gallery(str(folder / "index"), other, processor, "m3ret-tiny")


def test_an_interrupted_embedding_is_gone_on_with(
    records: list[Record],
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed in the middle: what was embedded is not embedded again, and the gallery is that of one that was not."""
    model, processor, _ = parts
    kept, shard, done = tmp_path / "galleries", 3, 2
    monkeypatch.setattr(gallery_module, "SHARD_SCANS", shard)
    embed = gallery_module.embed_records

    def stuck_after_some(*arguments: Any, **named: Any) -> Any:
        while len(list(kept.glob("*/shards/pictures/*.safetensors"))) >= done:
            time.sleep(1)
        return embed(*arguments, **named)

    def until_killed() -> None:
        gallery_module.embed_records = stuck_after_some
        embed_gallery(records, model, processor, "tiny", folder=kept)

    killed = multiprocessing.get_context("fork").Process(target=until_killed)
    killed.start()
    deadline = time.monotonic() + PATIENCE
    while len(list(kept.glob("*/shards/pictures/*.safetensors"))) < done and time.monotonic() < deadline:
        assert killed.is_alive()
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not list(kept.glob("*/gallery.json")), "it is not taken for a whole one"
    assert "embedding the gallery" in capfd.readouterr().err, "progress is shown"

    whole = embed_gallery(records, model, processor, "tiny", folder=tmp_path / "not interrupted")
    embedded: list[Record] = []

    def counted(embedders: Any, processor: Any, some: list[Record], **named: Any) -> Any:
        embedded.extend(some)
        return embed(embedders, processor, some, **named)

    monkeypatch.setattr(gallery_module, "embed_records", counted)
    resumed = embed_gallery(records, model, processor, "tiny", folder=kept)
    assert embedded == records[done * shard :]
    assert resumed.records == whole.records == records
    torch.testing.assert_close(resumed.index.embeddings, whole.index.embeddings, rtol=0, atol=1e-3)
    for row in range(len(records)):
        one, other = (np.asarray(gallery.thumbnail(row), int) for gallery in (resumed, whole))
        assert np.abs(one - other).max() <= 2
    assert resumed.index.metadata.equals(whole.index.metadata)
    assert not list(kept.glob("*/shards")), "the shards are no longer needed"


def test_of_two_starts_at_once_one_embeds(
    records: list[Record],
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor, gallery = parts
    embed, embedded = gallery_module.embed_records, []

    def counted(embedders: Any, processor: Any, some: list[Record], **named: Any) -> Any:
        embedded.extend(some)
        return embed(embedders, processor, some, **named)

    monkeypatch.setattr(gallery_module, "embed_records", counted)
    with ThreadPoolExecutor(2) as starts:
        both = [starts.submit(embed_gallery, records, model, processor, "tiny", folder=tmp_path) for _ in range(2)]
    assert embedded == records
    for start in both:
        torch.testing.assert_close(start.result().index.embeddings, gallery.index.embeddings, rtol=0, atol=1e-3)


def test_unreadable_scans_are_left_out(folder: Path, records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    broken = Record("broken", tmp_path / "broken.png", "xray", "chest", "", "nobody")
    several = [records[0], broken, records[1]]
    _, _, gallery = small_gallery(tmp_path / "galleries", several)
    assert gallery.records == [records[0], records[1]]
    assert gallery.index.metadata.column("id").to_pylist() == ["0", "2"]


def test_what_is_kept_names_no_file_and_no_patient(folder: Path, records: list[Record], parts: object) -> None:
    kept = [path for path in (folder / "galleries").rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        content = path.read_bytes()
        for name in (records[0].id, records[0].group, "secret-ward", str(folder)):
            assert name.encode() not in content, (path.name, name)


def test_subjects_stay_subjects(records: list[Record], searching: Searching) -> None:
    patients = searching.gallery.index.metadata.column("patient").to_pylist()
    for row, record in enumerate(records):
        assert [patient == patients[row] for patient in patients] == [r.group == record.group for r in records]


def test_a_thumbnail_is_the_middle_of_the_scan_on_a_black_square(tmp_path: Path) -> None:
    pixels = np.zeros((24, 48), np.uint8)
    pixels[:, :24] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    _, _, gallery = small_gallery(tmp_path, [Record("half", tmp_path / "half.png", "xray", "", "", "")])
    thumbnail = gallery.thumbnail(0)
    assert thumbnail is not None
    shown = np.asarray(thumbnail)[..., 0]
    quarter = THUMBNAIL_SIZE // 4
    assert shown[2 * quarter - 8 : 2 * quarter + 8, 8 : 2 * quarter - 8].min() > 200, "the white half"
    assert shown[2 * quarter - 8 : 2 * quarter + 8, 2 * quarter + 8 : -8].max() < 50, "the black half"
    assert shown[: quarter - 8].max() < 50, "nothing above a picture that is twice as wide as high"


def test_heat_is_where_the_scan_meets_itself(searching: Searching, records: list[Record]) -> None:
    row = next(row for row, record in enumerate(records) if record.modality == "ct")
    heat = searching.heat(searching.query_of_row(row), row)
    shape = searching.scan(f"row-{row}").array.shape[1:]
    assert heat.query.shape == heat.hit.shape == shape
    assert heat.query.max() == heat.hit.max() == 255
    assert 0 < heat.confidence <= 1
    assert abs(heat.query_slice - heat.hit_slice) <= shape[0] / 2
    np.testing.assert_allclose(heat.query.astype(int), heat.hit.astype(int), atol=1)


def test_heat_of_a_region_is_that_of_its_patches_alone(searching: Searching, records: list[Record]) -> None:
    row = next(row for row, record in enumerate(records) if record.modality == "ct")
    query = searching.query_of_row(row)
    tokens = scan_tokens(searching.model, searching.processor, [searching.scan(f"row-{row}")])[0]
    D, H, W = tokens.shape
    for region in (
        (slice(0, D // 2), slice(0, H // 2), slice(0, W // 2)),
        (slice(D // 2, D), slice(H // 2, H), slice(W // 2, W)),
    ):
        heat = searching.heat(query, row, region)
        hottest = np.unravel_index(heat.query.argmax(), heat.query.shape)
        edges = [
            (float(own[own <= at][-1]), float(own[own > at][0])) for own, at in zip(tokens.edges, hottest, strict=True)
        ]
        for (low, high), axis in zip(edges, region, strict=True):
            assert low < axis.stop, "the hottest patch reaches into the region"
            assert high > axis.start
        outside = heat.query.copy()
        outside[region] = 0
        assert heat.query.max() == 255
        assert not outside.any()
        assert region[0].start <= heat.query_slice < region[0].stop
        expected = locate(tokens, tokens, region)
        assert heat.hit_slice == expected.hit_slice
        assert heat.confidence == pytest.approx(expected.pairs[0].confidence)
    assert searching.heat(query, row).confidence >= heat.confidence


def test_a_slab_is_what_the_encoder_sees_in_one_patch(searching: Searching, records: list[Record]) -> None:
    for modality in ("ct", "endoscopy", "xray"):
        row = next(row for row, record in enumerate(records) if record.modality == modality)
        query = searching.query_of_row(row)
        edges = scan_tokens(searching.model, searching.processor, [searching.scan(query.key)])[0].edges[0]
        slices = searching.scan(query.key).array.shape[1]
        for place in range(slices):
            middles = np.arange(slices) + 0.5
            patch = int((edges.numpy() <= middles[place]).sum())  # the one that begins before its middle, and the last
            together = np.flatnonzero((edges.numpy()[:, None] <= middles).sum(0) == patch)
            assert searching.slab(query, place) == slice(together[0], together[-1] + 1)


def test_reranking_is_late_interaction_of_the_first_hits(searching: Searching, records: list[Record]) -> None:
    query = searching.query_of_row(2)
    first = [hit["item"] for hit in searching.search(query, 6)]
    (own,) = scan_tokens(searching.model, searching.processor, [records[2].open()])
    others = scan_tokens(searching.model, searching.processor, [records[row].open() for row in first])
    scores = dict(zip(first, late_interaction(own, others).tolist(), strict=True))
    reranked = searching.search(query, 6, rerank=True)
    assert [hit["item"] for hit in reranked] == sorted(first, key=lambda row: -scores[row])
    assert [hit["similarity"] for hit in reranked] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-4)


def test_an_upload_that_was_put_away_is_told_and_a_scan_of_the_gallery_comes_back(
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record], readers: IsolatedReaders
) -> None:
    searching = Searching(*parts, readers, shelf_bytes=1)
    place = records[0].location
    assert isinstance(place, Path)
    query = searching.query_of_files([place])
    assert searching.scan(query.key) is searching.scan(query.key)
    searching.scan("row-1")
    with pytest.raises(PutAwayError, match="upload it again"):
        searching.scan(query.key)
    assert searching.scan("row-1").array.size


def test_a_scan_of_the_gallery_that_is_gone_is_told_without_its_name(
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery], tmp_path: Path, readers: IsolatedReaders
) -> None:
    model, processor, gallery = parts
    assert gallery.records is not None
    gone = [replace(gallery.records[0], location=tmp_path / "patient-name.png"), *gallery.records[1:]]
    searching = Searching(model, processor, Gallery(gallery.index, gone), readers)
    with pytest.raises(M3RetReadError, match="item 0 of the gallery: source not found") as told:
        searching.scan("row-0")
    assert "patient-name" not in str(told.value)


def test_an_upload_that_nobody_looks_at_is_put_away(searching: Searching, records: list[Record]) -> None:
    place = records[0].location
    assert isinstance(place, Path)
    query = searching.query_of_files([place])
    searching.heat(query, 1)
    searching.put_away_unused(3600)
    assert searching.scan(query.key).array.size
    searching.put_away_unused(0)
    for gone in (lambda: searching.scan(query.key), lambda: searching.heat(query, 1)):
        with pytest.raises(PutAwayError, match="upload it again"):
            gone()


def test_zerogpu_lends_a_gpu_to_the_encoder_alone(
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    readers: IsolatedReaders,
) -> None:
    """As the package does it: in another process, to which arguments are pickled, and which alone sees a GPU."""
    (tmp_path / "spaces.py").write_text(
        "import pickle, torch\n"
        "calls = []\n"
        "def GPU(function):\n"
        "    def lent(*arguments):\n"
        "        before, torch.cuda.is_available = torch.cuda.is_available, lambda: True\n"
        "        try:\n"
        "            calls.append(function)\n"
        "            result = function(*pickle.loads(pickle.dumps(arguments)))\n"
        "        finally:\n"
        "            torch.cuda.is_available = before\n"
        "        return pickle.loads(pickle.dumps(result))\n"
        "    return lent\n"
    )
    place = records[0].location
    assert isinstance(place, Path)
    without = Searching(*parts, readers)
    embedding, heat = without.query_of_files([place]).embedding, without.heat(without.query_of_row(0), 1)
    monkeypatch.syspath_prepend(tmp_path)
    moved: list[str] = []
    monkeypatch.setattr(type(parts[0]), "to", lambda self, device: moved.append(device) or self)
    searching = Searching(*parts, readers)
    spaces = sys.modules.pop("spaces")  # what is tested after this finds none
    assert not spaces.calls, "nothing is lent before it is needed"
    torch.testing.assert_close(searching.query_of_files([place]).embedding, embedding, rtol=0, atol=0)
    assert (len(spaces.calls), moved) == (1, ["cuda"])
    np.testing.assert_array_equal(searching.heat(searching.query_of_row(0), 1).hit, heat.hit)
    assert len(spaces.calls) == len(moved) == 3, "one for each of the two scans that are tokenised"


def test_the_map_is_the_two_main_axes() -> None:
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(16, 2)))[0]
    flat = generator.normal(size=(50, 2)) * [5.0, 2.0]
    points = GalleryMap.of(torch.from_numpy(flat @ axes.T)).points
    for axis, expected in enumerate((flat - flat.mean(0)).T):
        assert abs(np.corrcoef(points[:, axis], np.linalg.svd(flat - flat.mean(0))[0][:, axis])[0, 1]) > 0.999, expected
    assert points.min() >= 0
    assert points.max() <= SIDE
    gallery_map = GalleryMap(points)
    assert gallery_map.nearest(*points[9]) == 9
    assert gallery_map.nearest(-200, -200) is None


def test_one_scan_is_a_map_too() -> None:
    assert GalleryMap.of(torch.ones(1, 8)).picture(["ct"], 0).size[0] == SIDE


def test_names_of_the_filters_are_those_of_the_gallery(searching: Searching, records: list[Record]) -> None:
    assert searching.gallery.names("modality") == sorted({record.modality for record in records})


def test_an_index_without_scans_is_searched(
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery], readers: IsolatedReaders
) -> None:
    model, processor, gallery = parts
    table = pa.table({"id": ["a", "b"]})
    bare = Gallery(RetrievalIndex.build(gallery.index.embeddings[:2], table, gallery.index.facts))
    searching = Searching(model, processor, bare, readers)
    (hit,) = searching.search(searching.query_of_row(0), 5, rerank=True)
    assert (hit["item"], hit["modality"], hit["labels"]) == (1, "", [])
    with pytest.raises(PutAwayError):
        searching.scan("row-0")


def test_the_page_of_an_index_without_scans_offers_no_comparison(
    parts: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    readers: IsolatedReaders,
) -> None:
    gr = pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")
    from modeling_m3ret.space.explore_page import ExplorePage
    from modeling_m3ret.space.search_page import SearchPage

    model, processor, gallery = parts
    table = pa.table({"id": ["a", "b"], "modality": pa.array([None, "ct"])})
    bare = Gallery(RetrievalIndex.build(gallery.index.embeddings[:2], table, gallery.index.facts))
    for own, visible in ((bare, False), (gallery, True)):
        searching = Searching(model, processor, own, readers)
        with gr.Blocks(), gr.Tabs() as tabs, gr.Tab() as tab:
            search = SearchPage(searching)
            explore = ExplorePage(searching, search, tab, tabs)
        beside = search.beside
        for control in (beside.heated, beside.linked, beside.query_slice, beside.hit_slice, beside.to_best):
            inner, shown = control, []
            while inner is not None and inner is not beside.column:
                shown.append(inner.visible)
                inner = inner.parent
            assert all(shown) == visible, control.label
        assert explore._show(0, "modality")[explore.map].size, "unknown names are a colour too"
