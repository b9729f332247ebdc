"""The gallery is embedded once, resumed after a kill, and holds no names; the page searches and compares its scans."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
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
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.index import IndexFormatError, MetadataFilter, RetrievalIndex
from modeling_m3ret.search.matching import late_interaction, locate, scan_tokens
from modeling_m3ret.search.thumbnails import THUMBNAIL_SIZE
from modeling_m3ret.space import gallery as gallery_module
from modeling_m3ret.space.explore import SIDE, GalleryMap
from modeling_m3ret.space.gallery import Gallery, embed_gallery, open_gallery
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.searching import PutAwayError, Searching


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gallery")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return small_phantom(folder / "secret-ward")


@pytest.fixture(scope="module")
def opened(folder: Path, records: list[Record]) -> tuple[M3RetModel, M3RetImageProcessor, Gallery]:
    """A model, its processor, and the gallery of all records."""
    torch.manual_seed(0)
    return small_gallery(folder / "galleries", records)


@pytest.fixture(scope="module")
def readers() -> IsolatedReaders:
    """Reader processes, so tests that use them are slow."""
    return IsolatedReaders()


@pytest.fixture
def searching(opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], readers: IsolatedReaders) -> Searching:
    return Searching(*opened, readers)


def test_filtered_search_equals_brute_force(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record]
) -> None:
    gallery = opened[2]
    embeddings = gallery.index.embeddings.float()
    query = torch.nn.functional.normalize(torch.randn(embeddings.shape[1]), dim=0)
    similarities = embeddings @ query
    for filters, allowed in {
        MetadataFilter(): lambda record: True,
        MetadataFilter(modality=("ct", "xray")): lambda record: record.modality in ("ct", "xray"),
        MetadataFilter(anatomy=(records[7].anatomy,)): lambda record: record.anatomy == records[7].anatomy,
        MetadataFilter(modality=("unknown",)): lambda record: False,
    }.items():
        expected = [row for row in similarities.argsort(descending=True).tolist() if allowed(records[row])][:5]
        assert gallery.search(query, 5, filters).rows[0].tolist() == expected


def test_gallery_is_read_from_the_cache(
    folder: Path,
    records: list[Record],
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor, first = opened
    monkeypatch.setattr(gallery_module, "write_shards", lambda *_, **__: pytest.fail("embedded again"))
    again = embed_gallery(records, model, processor, "renamed", folder=folder / "galleries")
    torch.testing.assert_close(again.index.embeddings, first.index.embeddings, rtol=0, atol=0)
    assert again.records == first.records


def test_index_of_another_model_is_refused(
    folder: Path, opened: tuple[M3RetModel, M3RetImageProcessor, Gallery]
) -> None:
    model, processor, gallery = opened
    gallery.index.save(folder / "index")
    found = open_gallery(str(folder / "index"), model, processor, "m3ret-tiny")
    assert (len(found), found.records) == (len(gallery), None)
    torch.manual_seed(1)
    other = M3RetModel(model.config).eval()
    with pytest.raises(IndexFormatError) as raised:
        open_gallery(str(folder / "index"), other, processor, "m3ret-tiny")
    assert raised.value.reason == "other_model"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The records that the test embeds, in order."""
    embed, embedded = embedding_store.embed_records, []

    def record(embedders: Any, processor: Any, records: list[Record], **options: Any) -> Any:
        embedded.extend(records)
        return embed(embedders, processor, records, **options)

    monkeypatch.setattr(embedding_store, "embed_records", record)
    return embedded


@pytest.mark.slow
def test_killed_embedding_is_resumed(
    records: list[Record],
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    embedded: list[Record],
) -> None:
    model, processor, _ = opened
    cache, shard, done = tmp_path / "galleries", 3, 2
    monkeypatch.setattr(gallery_module, "SHARD_SCANS", shard)

    def embed_and_die() -> None:
        write, written = embedding_store.atomic_write, []

        def die_after_some(path: Path) -> Any:
            if len(written) == done:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
            return write(path)

        embedding_store.atomic_write = die_after_some
        embed_gallery(records, model, processor, "tiny", folder=cache)

    killed = multiprocessing.get_context("fork").Process(target=embed_and_die)
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not list(cache.glob("*/gallery.json"))
    resumed = embed_gallery(records, model, processor, "tiny", folder=cache)
    assert embedded == records[done * shard :]
    whole = embed_gallery(records, model, processor, "tiny", folder=tmp_path / "whole")
    assert resumed.records == whole.records == records
    torch.testing.assert_close(resumed.index.embeddings, whole.index.embeddings, rtol=0, atol=1e-3)
    for row in range(len(records)):
        one, other = (np.asarray(gallery.thumbnail(row), int) for gallery in (resumed, whole))
        assert np.abs(one - other).max() <= 2
    assert resumed.index.metadata.equals(whole.index.metadata)
    assert not list(cache.glob("*/shards"))


def test_concurrent_starts_embed_once(
    records: list[Record],
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    tmp_path: Path,
    embedded: list[Record],
) -> None:
    model, processor, gallery = opened
    with ThreadPoolExecutor(2) as starts:
        both = [starts.submit(embed_gallery, records, model, processor, "tiny", folder=tmp_path) for _ in range(2)]
    assert embedded == records
    for start in both:
        torch.testing.assert_close(start.result().index.embeddings, gallery.index.embeddings, rtol=0, atol=1e-3)


def test_unreadable_scans_are_left_out(folder: Path, records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    damaged = Record("damaged", tmp_path / "damaged.png", "xray", "chest", "", "patient-of-damaged")
    _, _, gallery = small_gallery(tmp_path / "galleries", [records[0], damaged, records[1]])
    assert gallery.records == [records[0], records[1]]
    assert gallery.index.metadata.column("id").to_pylist() == ["0", "2"]
    files = [path for path in (tmp_path / "galleries").rglob("*") if path.is_file()]
    assert not any(b"damaged" in path.read_bytes() for path in files)


def test_gallery_stores_no_name_of_a_file_or_patient(folder: Path, records: list[Record], opened: object) -> None:
    files = [path for path in (folder / "galleries").rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for name in (records[0].id, records[0].group, "secret-ward", str(folder)):
            assert name.encode() not in content, (path.name, name)


def test_scans_of_one_patient_share_a_patient_in_the_index(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record]
) -> None:
    patients = opened[2].index.metadata.column("patient").to_pylist()
    for row, record in enumerate(records):
        assert [patient == patients[row] for patient in patients] == [r.group == record.group for r in records]


def test_thumbnail_is_the_middle_slice_on_a_black_square(tmp_path: Path) -> None:
    pixels = np.zeros((24, 48), np.uint8)
    pixels[:, :24] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    _, _, gallery = small_gallery(tmp_path, [Record("half", tmp_path / "half.png", "xray", "", "", "")])
    thumbnail = gallery.thumbnail(0)
    assert thumbnail is not None
    shown = np.asarray(thumbnail)[..., 0]
    quarter = THUMBNAIL_SIZE // 4
    assert shown[2 * quarter - 8 : 2 * quarter + 8, 8 : 2 * quarter - 8].min() > 200
    assert shown[2 * quarter - 8 : 2 * quarter + 8, 2 * quarter + 8 : -8].max() < 50
    assert shown[: quarter - 8].max() < 50  # above the picture


@pytest.mark.slow
def test_heat_of_a_scan_with_itself_is_symmetric(searching: Searching, records: list[Record]) -> None:
    row = next(row for row, record in enumerate(records) if record.modality == "ct")
    heat = searching.heat(searching.query_of_row(row), row)
    shape = searching.scan(f"row-{row}").array.shape[1:]
    assert heat.query.shape == heat.hit.shape == shape
    assert heat.query.max() == heat.hit.max() == 255
    assert 0 < heat.confidence <= 1
    assert abs(heat.query_slice - heat.hit_slice) <= shape[0] / 2
    np.testing.assert_allclose(heat.query.astype(int), heat.hit.astype(int), atol=1)


@pytest.mark.slow
def test_heat_of_a_region_is_zero_outside_it(searching: Searching, records: list[Record]) -> None:
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
            (float(axis[axis <= voxel][-1]), float(axis[axis > voxel][0]))
            for axis, voxel in zip(tokens.edges, hottest, strict=True)
        ]
        for (low, high), axis in zip(edges, region, strict=True):
            assert low < axis.stop  # the hottest patch overlaps the region
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


@pytest.mark.slow
def test_slab_is_the_slices_of_one_patch(searching: Searching, records: list[Record]) -> None:
    for modality in ("ct", "endoscopy", "xray"):
        row = next(row for row, record in enumerate(records) if record.modality == modality)
        query = searching.query_of_row(row)
        edges = scan_tokens(searching.model, searching.processor, [searching.scan(query.key)])[0].edges[0]
        slices = searching.scan(query.key).array.shape[1]
        centres = np.arange(slices) + 0.5
        patch_of = (edges.numpy()[:, None] <= centres).sum(0)
        for index in range(slices):
            same_patch = np.flatnonzero(patch_of == patch_of[index])
            assert searching.slab(query, index) == slice(same_patch[0], same_patch[-1] + 1)


@pytest.mark.slow
def test_reranking_sorts_the_first_hits_by_late_interaction(searching: Searching, records: list[Record]) -> None:
    query = searching.query_of_row(2)
    first = [hit["item"] for hit in searching.search(query, 6)]
    (query_tokens,) = scan_tokens(searching.model, searching.processor, [records[2].open()])
    others = scan_tokens(searching.model, searching.processor, [records[row].open() for row in first])
    scores = dict(zip(first, late_interaction(query_tokens, others).tolist(), strict=True))
    reranked = searching.search(query, 6, rerank=True)
    assert [hit["item"] for hit in reranked] == sorted(first, key=lambda row: -scores[row])
    assert [hit["similarity"] for hit in reranked] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-4)


@pytest.mark.slow
def test_closed_upload_is_an_error_and_a_gallery_scan_is_opened_again(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record], readers: IsolatedReaders
) -> None:
    searching = Searching(*opened, readers, shelf_bytes=1)
    file = records[0].location
    assert isinstance(file, Path)
    query = searching.query_of_files([file])
    assert searching.scan(query.key) is searching.scan(query.key)
    searching.scan("row-1")
    with pytest.raises(PutAwayError):
        searching.scan(query.key)
    assert searching.scan("row-1").array.size


@pytest.mark.slow
def test_error_of_a_missing_gallery_scan_does_not_name_the_file(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], tmp_path: Path, readers: IsolatedReaders
) -> None:
    model, processor, gallery = opened
    assert gallery.records is not None
    missing = [replace(gallery.records[0], location=tmp_path / "patient-name.png"), *gallery.records[1:]]
    searching = Searching(model, processor, Gallery(gallery.index, missing), readers)
    with pytest.raises(M3RetReadError) as raised:
        searching.scan("row-0")
    assert raised.value.reason == "not_found"
    assert "item 0" in str(raised.value)
    assert "patient-name" not in str(raised.value)


@pytest.mark.slow
def test_unused_upload_is_closed(searching: Searching, records: list[Record]) -> None:
    file = records[0].location
    assert isinstance(file, Path)
    query = searching.query_of_files([file])
    searching.heat(query, 1)
    searching.put_away_unused(3600)
    assert searching.scan(query.key).array.size
    searching.put_away_unused(0)
    for access in (lambda: searching.scan(query.key), lambda: searching.heat(query, 1)):
        with pytest.raises(PutAwayError):
            access()


@pytest.mark.slow
def test_zerogpu_runs_only_the_encoder_on_the_gpu(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    readers: IsolatedReaders,
) -> None:
    """A stand-in for the package `spaces`, which pickles arguments to another process; only that one sees a GPU."""
    (tmp_path / "spaces.py").write_text(
        "import pickle, torch\n"
        "calls = []\n"
        "def GPU(function):\n"
        "    def wrapped(*arguments):\n"
        "        before, torch.cuda.is_available = torch.cuda.is_available, lambda: True\n"
        "        try:\n"
        "            calls.append(function)\n"
        "            result = function(*pickle.loads(pickle.dumps(arguments)))\n"
        "        finally:\n"
        "            torch.cuda.is_available = before\n"
        "        return pickle.loads(pickle.dumps(result))\n"
        "    return wrapped\n"
    )
    file = records[0].location
    assert isinstance(file, Path)
    without = Searching(*opened, readers)
    embedding, heat = without.query_of_files([file]).embedding, without.heat(without.query_of_row(0), 1)
    monkeypatch.syspath_prepend(tmp_path)
    moved: list[str] = []
    monkeypatch.setattr(type(opened[0]), "to", lambda self, device: moved.append(device) or self)
    searching = Searching(*opened, readers)
    spaces = sys.modules.pop("spaces")  # later tests must not find it
    assert not spaces.calls
    torch.testing.assert_close(searching.query_of_files([file]).embedding, embedding, rtol=0, atol=0)
    assert (len(spaces.calls), moved) == (1, ["cuda"])
    np.testing.assert_array_equal(searching.heat(searching.query_of_row(0), 1).hit, heat.hit)
    assert len(spaces.calls) == len(moved) == 3  # plus one per scan of the pair


def test_map_shows_the_first_two_principal_components() -> None:
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


def test_map_of_one_scan_can_be_drawn() -> None:
    assert GalleryMap.of(torch.ones(1, 8)).picture(["ct"], 0).size[0] == SIDE


def test_filter_names_are_those_of_the_gallery(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record]
) -> None:
    assert opened[2].names("modality") == sorted({record.modality for record in records})


@pytest.mark.slow
def test_index_without_scans_can_be_searched(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], readers: IsolatedReaders
) -> None:
    model, processor, gallery = opened
    table = pa.table({"id": ["a", "b"]})
    bare = Gallery(RetrievalIndex.build(gallery.index.embeddings[:2], table, gallery.index.facts))
    searching = Searching(model, processor, bare, readers)
    (hit,) = searching.search(searching.query_of_row(0), 5, rerank=True)
    assert (hit["item"], hit["modality"], hit["labels"]) == (1, "", [])
    with pytest.raises(PutAwayError):
        searching.scan("row-0")


@pytest.mark.slow
def test_page_of_an_index_without_scans_hides_the_comparison(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    readers: IsolatedReaders,
) -> None:
    gr = pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")
    from modeling_m3ret.space.explore_page import ExplorePage
    from modeling_m3ret.space.search_page import SearchPage

    model, processor, gallery = opened
    table = pa.table({"id": ["a", "b"], "modality": pa.array([None, "ct"])})
    bare = Gallery(RetrievalIndex.build(gallery.index.embeddings[:2], table, gallery.index.facts))
    for shown_gallery, visible in ((bare, False), (gallery, True)):
        searching = Searching(model, processor, shown_gallery, readers)
        with gr.Blocks(), gr.Tabs() as tabs, gr.Tab() as tab:
            search = SearchPage(searching)
            explore = ExplorePage(searching, search, tab, tabs)
        comparison = search.beside
        for control in (
            comparison.heated,
            comparison.linked,
            comparison.query_slice,
            comparison.hit_slice,
            comparison.to_best,
        ):
            block, visibilities = control, []
            while block is not None and block is not comparison.column:
                visibilities.append(block.visible)
                block = block.parent
            assert all(visibilities) == visible, control.label
        assert explore._show(0, "modality")[explore.map].size  # unknown names have a colour
