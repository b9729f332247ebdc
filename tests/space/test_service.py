"""The search service: search, heatmaps, re-ranking, and scans that expire."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from cachetools import TTLCache
from PIL import Image
from space_server import DirectReaders, small_gallery, small_phantom

from modeling_m3ret import M3RetImageProcessor, M3RetModel, M3RetReadError
from modeling_m3ret.data.collection import Record
from modeling_m3ret.reading_m3ret import Scan
from modeling_m3ret.search.index import RetrievalIndex
from modeling_m3ret.search.matching import late_interaction, locate, scan_tokens
from modeling_m3ret.space import service as service_module
from modeling_m3ret.space.gallery import Gallery
from modeling_m3ret.space.pixels import body_mask, heat_stride
from modeling_m3ret.space.service import ScanExpiredError, SearchService, key_of_row
from modeling_m3ret.space.uploads import RETENTION_SECONDS


Parts = tuple[M3RetModel, M3RetImageProcessor, Gallery]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return small_phantom(folder / "secret-ward", subjects=2)


@pytest.fixture(scope="module")
def parts(folder: Path, records: list[Record]) -> Parts:
    return small_gallery(folder / "galleries", records)


@pytest.fixture
def readers() -> DirectReaders:
    return DirectReaders()


@pytest.fixture
def service(parts: Parts, readers: DirectReaders) -> SearchService:
    return SearchService(*parts, readers)


def row_of(modality: str, records: list[Record]) -> int:
    return next(row for row, record in enumerate(records) if record.modality == modality)


def file_of(record: Record) -> Path:
    assert isinstance(record.location, Path)
    return record.location


def test_heatmaps_of_a_scan_with_itself_are_equal(service: SearchService, records: list[Record]) -> None:
    row = row_of("ct", records)
    heat = service.heat(service.query_of_row(row), row)
    D, H, W = service.scan(key_of_row(row)).array.shape[1:]
    assert heat.query.shape == heat.hit.shape == (D, H, W)
    assert heat.query_voxel == heat.hit_voxel
    np.testing.assert_allclose(heat.query.astype(int), heat.hit.astype(int), atol=1)


def test_heat_is_absolute_and_only_in_the_body(service: SearchService, records: list[Record]) -> None:
    for row, other in ((row_of("ct", records), row_of("mri", records)), (row_of("xray", records), 0)):
        query = service.query_of_row(row)
        scans = service.scan(query.key), service.scan(key_of_row(other))
        heat = service.heat(query, other)
        tokens = scan_tokens(service.model, service.processor, scans)
        match = locate(*tokens)
        for ours, expected, scan, voxel in zip(
            (heat.query, heat.hit), (match.query_heat, match.hit_heat), scans,
            (heat.query_voxel, heat.hit_voxel), strict=True,
        ):  # fmt: skip
            stride = heat_stride(scan)
            body = body_mask(scan, stride)
            assert not ours[~body].any()
            if stride == 1:  # 255 is a confidence of 1
                np.testing.assert_allclose(ours[body], expected.numpy()[body] * 255, atol=1)
            assert body[voxel[0], voxel[1] // stride, voxel[2] // stride], "opened at a voxel of the body"


def test_the_heatmap_of_a_region_is_zero_outside_of_it(service: SearchService, records: list[Record]) -> None:
    row = row_of("ct", records)
    query = service.query_of_row(row)
    (tokens,) = scan_tokens(service.model, service.processor, [service.scan(query.key)])
    D, H, W = tokens.shape
    for region in (
        (slice(0, D // 2), slice(0, H // 2), slice(0, W // 2)),
        (slice(D // 2, D), slice(H // 2, H), slice(W // 2, W)),
    ):
        drawn_on = region[0].start + 1
        heat = service.heat(replace(query, region=region, drawn_on=drawn_on), row)
        outside = heat.query.copy()
        outside[region] = 0
        assert heat.query.any()
        assert not outside.any()
        assert all(axis.start <= at < axis.stop for axis, at in zip(region, heat.query_voxel, strict=True))
        assert heat.query_voxel[0] == drawn_on


def test_a_region_is_a_box_of_the_query(service: SearchService, records: list[Record]) -> None:
    query = service.query_of_row(row_of("ct", records))
    D, H, W = service.scan(query.key).array.shape[1:]
    region = service.with_region(query, D - 1, 9, 4, 3, 999).region
    assert region is not None
    assert region[1:] == (slice(4, 10), slice(3, W))
    assert region[0] == service.slices_in_patch(query, D - 1)
    assert service.with_region(query, 999, 4, 9, 3, 5).drawn_on == D - 1
    assert service.with_region(query, 999, 4, 9, 3, 5).region == (region[0], slice(4, 10), slice(3, 6))
    assert service.with_region(replace(query, region=region), 0, 0, H, 0, W).region is None, "the whole scan"


def test_a_region_orders_the_gallery_by_its_patches(service: SearchService, records: list[Record]) -> None:
    query = service.query_of_row(row_of("xray", records))
    D, H, W = service.scan(query.key).array.shape[1:]
    (tokens,) = scan_tokens(service.model, service.processor, [service.scan(query.key)])
    region = (slice(0, D), slice(0, H // 2), slice(0, W))
    inside = replace(tokens, tokens=tokens.tokens[tokens.fraction_inside(region) >= 0.5])
    rows = [row for row in range(len(records)) if row != query.row]
    others = scan_tokens(service.model, service.processor, [records[row].open() for row in rows])
    scores = dict(zip(rows, late_interaction(inside, others).tolist(), strict=True))
    hits = service.search(replace(query, region=region), 3)
    assert [hit["similarity"] for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True)[:3], abs=1e-4)
    assert [hit["item"] for hit in hits] == sorted(rows, key=lambda row: -scores[row])[:3]
    assert all(hit["percentile"] is None and not hit["weak"] for hit in hits)


def test_a_hit_has_its_percentile_in_the_gallery(service: SearchService) -> None:
    embeddings = service.gallery.index.embeddings.float()
    similarities = embeddings @ embeddings.T
    pairs = similarities[torch.ones_like(similarities).triu(1) > 0]
    for hit in service.search(service.query_of_row(3), 4):
        below = (pairs < similarities[3, hit["item"]]).float().mean().item() * 100
        assert hit["percentile"] == pytest.approx(below, abs=100 / len(pairs) + 0.01)


def test_blank_scans_are_not_found(parts: Parts, readers: DirectReaders) -> None:
    model, processor, gallery = parts
    assert gallery.thumbnails is not None
    stream = io.BytesIO()
    Image.new("RGB", (128, 128), "#050505").save(stream, "WEBP")
    pictures = [stream.getvalue() if row in (1, 4) else gallery.thumbnails[row].as_py() for row in range(len(gallery))]
    blank = Gallery(gallery.index, gallery.records, pa.chunked_array([pictures]))
    service = SearchService(model, processor, blank, readers)
    found = {hit["item"] for hit in service.search(service.query_of_row(0), 48)}
    assert found == set(range(len(gallery))) - {0, 1, 4}
    assert len(service.search(service.query_of_row(0), 3)) == 3


@pytest.mark.parametrize("modality", ["ct", "endoscopy", "xray"])
def test_slices_in_a_patch_have_their_centres_in_it(
    modality: str, service: SearchService, records: list[Record]
) -> None:
    query = service.query_of_row(row_of(modality, records))
    edges = scan_tokens(service.model, service.processor, [service.scan(query.key)])[0].edges[0].numpy()
    centres = np.arange(service.scan(query.key).array.shape[1]) + 0.5
    patches = (edges[:, None] <= centres).sum(0)  # of each slice
    for index, patch in enumerate(patches):
        slices = np.flatnonzero(patches == patch)
        assert service.slices_in_patch(query, index) == slice(slices[0], slices[-1] + 1)


@pytest.mark.parametrize(("depth", "num_frames"), [(98, 8), (37, 32), (6, 32)])
def test_slices_in_a_patch_are_those_that_affect_it_most(
    depth: int, num_frames: int, parts: Parts, readers: DirectReaders
) -> None:
    model, _, gallery = parts
    processor = M3RetImageProcessor(size=32, num_frames=num_frames)
    spacing = (5.0, 0.7, 0.7)
    service = SearchService(model, processor, gallery, readers)
    query = service._query(Scan(np.zeros((1, depth, 32, 32), dtype=np.float32), spacing, {}))
    marked = [service.slices_in_patch(query, index) for index in range(depth)]
    patches = sorted({(slices.start, slices.stop) for slices in marked})
    assert [start for start, _ in patches] == [0, *(stop for _, stop in patches[:-1])]
    assert patches[-1][1] == depth
    for index, slices in enumerate(marked):
        impulse = np.zeros((1, depth, 32, 32), dtype=np.float32)
        impulse[:, index] = 1
        weights = processor.resample(Scan(impulse, spacing, {})).sum((0, 2, 3))  # of this slice in each resampled one
        shares = torch.stack([part.sum() for part in weights.split(processor.patch_depth)]) / weights.sum()
        assert len(shares) == len(patches)
        own = shares[patches.index((slices.start, slices.stop))]
        assert own >= 0.4, "a slice at the border of two patches is in both"


def test_reranking_orders_the_hits_by_late_interaction(service: SearchService, records: list[Record]) -> None:
    query = service.query_of_row(2)
    first = [hit["item"] for hit in service.search(query, 6)]
    (tokens,) = scan_tokens(service.model, service.processor, [records[2].open()])
    others = scan_tokens(service.model, service.processor, [records[row].open() for row in first])
    scores = dict(zip(first, late_interaction(tokens, others).tolist(), strict=True))
    reranked = service.search(query, 6, rerank=True)
    assert [hit["item"] for hit in reranked] == sorted(first, key=lambda row: -scores[row])
    assert [hit["similarity"] for hit in reranked] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-4)


def test_scans_used_last_stay_in_memory_within_the_limit(
    parts: Parts, records: list[Record], readers: DirectReaders
) -> None:
    service = SearchService(*parts, readers)
    sizes = [service.scan(key_of_row(row)).array.nbytes for row in range(3)]
    service = SearchService(*parts, readers, scan_cache_bytes=sum(sizes) - 1)
    scans = [service.scan(key_of_row(row)) for row in range(2)]
    assert service.scan(key_of_row(0)) is scans[0]
    third = service.scan(key_of_row(2))
    assert service.scan(key_of_row(2)) is third
    assert service.scan(key_of_row(0)) is scans[0], "used more recently than scan 1"
    assert service.scan(key_of_row(1)) is not scans[1], "evicted and read again"


def test_a_scan_larger_than_the_limit_stays_until_the_next_one(
    parts: Parts, records: list[Record], readers: DirectReaders
) -> None:
    service = SearchService(*parts, readers, scan_cache_bytes=1)
    query = service.query_of_files([file_of(records[0])])
    assert service.scan(query.key) is service.scan(query.key)
    service.scan(key_of_row(1))
    with pytest.raises(ScanExpiredError):
        service.scan(query.key)
    assert service.scan(key_of_row(1)).array.size, "a scan of the gallery is read again"


def test_a_closed_upload_is_no_longer_in_memory(service: SearchService, records: list[Record]) -> None:
    query = service.query_of_files([file_of(records[0])])
    service.close(query)
    service.close(query)
    with pytest.raises(ScanExpiredError):
        service.scan(query.key)


def test_idle_uploads_expire(service: SearchService, records: list[Record]) -> None:
    query = service.query_of_files([file_of(records[0])])
    service.heat(query, 1)
    service.close_idle(3600)
    assert service.scan(query.key).array.size
    service.close_idle(0)
    for use in (lambda: service.scan(query.key), lambda: service.heat(query, 1)):
        with pytest.raises(ScanExpiredError):
            use()


def test_use_restarts_the_idle_time(
    parts: Parts, readers: DirectReaders, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(service_module, "TTLCache", functools.partial(TTLCache, timer=lambda: now))
    service = SearchService(*parts, readers)
    used, unused = (service.query_of_files([file_of(records[0])]) for _ in range(2))
    now += RETENTION_SECONDS - 1
    scan = service.scan(used.key)
    now += 2
    service.close_idle()
    assert service.scan(used.key) is scan
    with pytest.raises(ScanExpiredError):
        service.scan(unused.key)


def test_a_missing_scan_of_the_gallery_is_reported_without_its_name(
    parts: Parts, tmp_path: Path, readers: DirectReaders
) -> None:
    model, processor, gallery = parts
    assert gallery.records is not None
    missing = [replace(gallery.records[0], location=tmp_path / "patient-name.png"), *gallery.records[1:]]
    service = SearchService(model, processor, Gallery(gallery.index, missing), readers)
    with pytest.raises(M3RetReadError) as raised:
        service.scan(key_of_row(0))
    assert raised.value.reason == "not_found"
    assert "item 0" in raised.value.file
    assert "patient-name" not in str(raised.value)


def test_a_row_outside_the_gallery_is_refused(service: SearchService) -> None:
    for row in (-1, len(service.gallery)):
        with pytest.raises(ValueError, match=str(row)):
            service.query_of_row(row)


def test_an_index_without_scans_can_be_searched(parts: Parts, readers: DirectReaders) -> None:
    model, processor, gallery = parts
    table = pa.table({"id": ["a", "b"]})
    index = RetrievalIndex.build(gallery.index.embeddings[:2], table, gallery.index.facts)
    service = SearchService(model, processor, Gallery(index), readers)
    (hit,) = service.search(service.query_of_row(0), 5, rerank=True)
    assert (hit["item"], hit["modality"], hit["labels"]) == (1, "", [])
    with pytest.raises(ScanExpiredError):
        service.scan(key_of_row(0))
