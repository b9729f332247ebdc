"""Late interaction against loops over all pairs, and places against scans that tell their own coordinates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from modeling_m3ret import M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation.protocols import WITHIN_MODALITY
from modeling_m3ret.evaluation.table import differences_from, evaluate
from modeling_m3ret.image_processing_m3ret import M3RetImageProcessor
from modeling_m3ret.reading_m3ret import M3RetReadError, Scan
from modeling_m3ret.search import matching
from modeling_m3ret.search.embedding import Embedded
from modeling_m3ret.search.exact import Hits
from modeling_m3ret.search.matching import (
    Reranked,
    ScanTokens,
    fit_token_whitening,
    late_interaction,
    locate,
    rerank,
    scan_tokens,
)


PROCESSOR = M3RetImageProcessor(size=96, num_frames=10)
UNKNOWN = (None, None, None)
MILLIMETRES = (2.5, 1.0, 1.0)
Box = tuple[slice, slice, slice]


@pytest.fixture
def model() -> M3RetModel:
    return M3RetModel(tiny_config()).eval()


def tokens_of(vectors: Tensor) -> ScanTokens:
    """Of an image one patch high, a voxel a patch."""
    edges = [torch.arange(n + 1, dtype=torch.float64) for n in (1, 1, len(vectors))]
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    return ScanTokens(unit.half(), (edges[0], edges[1], edges[2]), (0,))


def some_tokens(*lengths: int, values: int = 12) -> list[ScanTokens]:
    return [tokens_of(torch.randn(length, values)) for length in lengths]


# ------------------------------------------------------------------------------------------------- where patches lie

# D, H, W and spacing: an image larger and one smaller than what the encoder sees; a clip of which every fourth frame is
# taken; a volume resampled in depth; one whose slices stay, but do not fill the last patch
SHAPES = [
    ((1, 120, 200), UNKNOWN),
    ((1, 50, 31), UNKNOWN),
    ((40, 90, 133), UNKNOWN),
    ((22, 98, 80), MILLIMETRES),
    ((10, 98, 80), MILLIMETRES),
    ((8, 64, 100), MILLIMETRES),
]


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_patches_lie_where_a_ramp_says_that_they_lie(
    model: M3RetModel, shape: tuple[int, int, int], spacing: tuple[float | None, ...]
) -> None:
    """A scan whose voxels hold their own coordinate along an axis: what the processor puts into a patch tells where the
    patch lies. At the borders resizing repeats the outermost voxels, so these patches are left out along that axis."""
    for axis in range(3):
        ramp = np.arange(shape[axis], dtype=np.float32).reshape([-1 if n == axis else 1 for n in range(3)])
        scan = Scan(np.broadcast_to(ramp / 1000, (1, *shape)).copy(), spacing, {})  # type: ignore[arg-type]
        (tokens,) = scan_tokens(model, PROCESSOR, [scan])
        assert tokens.shape == shape
        volume = (PROCESSOR.resize(scan)[0] * 0.5 + 0.5) * 1000  # (D, H, W), the coordinates that are seen
        T, h, w = tokens.grid
        assert PROCESSOR.grid(volume[None]) == (T, h, w)
        seen = [
            float(volume[t * 4 : (t + 1) * 4, y * 16 : (y + 1) * 16, x * 16 : (x + 1) * 16].mean())
            for t in range(T)
            for y in range(h)
            for x in range(w)
        ]
        places = torch.cartesian_prod(*(torch.arange(n) for n in tokens.grid))[:, axis]
        inner = (places > 0) & (places < tokens.grid[axis] - 1)
        if axis == 0:  # no border is repeated here; a frame that is taken stands up to half a frame beside the centre
            inner = torch.ones_like(inner)
        told = tokens.centres()[:, axis].float()
        torch.testing.assert_close(told[inner], torch.tensor(seen)[inner], atol=0.51 if axis == 0 else 0.02, rtol=0)


def test_values_on_voxels_are_bilinear_resizing_where_patches_are_equal(model: M3RetModel) -> None:
    for shape in ((1, 120, 200), (8, 64, 100)):
        (tokens,) = scan_tokens(model, PROCESSOR, [Scan(np.zeros((1, *shape), np.float32), MILLIMETRES, {})])
        values = torch.rand(math.prod(tokens.grid))
        resized = torch.nn.functional.interpolate(values.view(1, 1, *tokens.grid), shape, mode="trilinear")
        torch.testing.assert_close(tokens.on_voxels(values), resized[0, 0])


def test_a_last_patch_that_is_not_full_is_not_as_deep(model: M3RetModel) -> None:
    (tokens,) = scan_tokens(model, PROCESSOR, [Scan(np.zeros((1, 10, 98, 80), np.float32), MILLIMETRES, {})])
    assert tokens.edges[0].tolist() == [0, 4, 8, 10]
    depth_of_patch = torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(tokens.grid[1] * tokens.grid[2])
    # centres of the patches at 2, 6, 9, of the voxels at n + 1/2
    expected = [0, 0, 0.125, 0.375, 0.625, 0.875, 1 - 0.5 / 3, 1 - 1.5 / 3, 1 - 2.5 / 3, 0]
    assert tokens.on_voxels(depth_of_patch)[:, 0, 0].tolist() == pytest.approx(expected)


def test_the_part_of_a_patch_in_a_region_is_what_counting_says(model: M3RetModel) -> None:
    (tokens,) = scan_tokens(model, PROCESSOR, [Scan(np.zeros((1, 22, 98, 80), np.float32), MILLIMETRES, {})])
    region = (slice(3, 17), slice(None, 50), slice(-30, -7))
    fine = 40  # points a voxel along an axis
    parts = []
    for edges, axis, size in zip(tokens.edges, region, tokens.shape, strict=True):
        points = (np.arange(size * fine) + 0.5) / fine
        inside = np.isin(np.floor(points), np.arange(size)[axis])
        patch = np.searchsorted(edges.numpy(), points) - 1
        parts.append([inside[patch == n].mean() for n in range(len(edges) - 1)])
    expected = np.einsum("t,h,w->thw", *parts).ravel()
    np.testing.assert_allclose(tokens.part_inside(region), expected, atol=0.01)
    assert tokens.part_inside((slice(None),) * 3).tolist() == pytest.approx([1] * len(tokens.tokens))
    for wrong in (slice(5, 5), slice(98, None), slice(0, 9, 2)):
        with pytest.raises(ValueError, match="three slices within"):
            tokens.part_inside((slice(None), wrong, slice(None)))


def test_frames_are_told_by_their_number_in_the_whole_clip(model: M3RetModel) -> None:
    """Every frame holds its own number, so that those which the reader keeps tell which they are."""
    clip = np.broadcast_to(np.arange(57, dtype=np.uint8)[:, None, None], (57, 40, 40)).copy()
    (tokens,) = scan_tokens(model, PROCESSOR, [clip])
    assert tokens.frames == tuple(PROCESSOR.read(clip).array[0, :, 0, 0].tolist())
    assert len(tokens.frames) == tokens.shape[0] == 10


def test_tokens_are_unit_vectors_whatever_they_are_embedded_with(model: M3RetModel) -> None:
    model.whitening.fit(torch.randn(100, 48) @ torch.randn(48, 48))
    scans = [np.random.default_rng(n).random(shape) for n, shape in enumerate([(64, 90), (8, 50, 50), (30, 30)])]
    together = scan_tokens(model, PROCESSOR, scans)
    apart = scan_tokens(model, PROCESSOR, (scan for scan in scans), max_tokens=1)
    for scan, one, other in zip(scans, together, apart, strict=True):
        assert one.grid == other.grid
        torch.testing.assert_close(one.tokens, other.tokens, atol=2e-3, rtol=0)
        # the model's own last state, whitened by hand
        inputs = PROCESSOR(scan)
        with torch.no_grad():
            state = model(**inputs).last_hidden_state[model.config.num_prefix_tokens :]
        whitened = (state - model.whitening.mean) @ model.whitening.matrix.T
        expected = whitened / whitened.norm(dim=1, keepdim=True)
        torch.testing.assert_close(one.tokens.float(), expected, atol=2e-3, rtol=0)
    with pytest.raises(M3RetReadError):
        scan_tokens(model, PROCESSOR, [scans[0], b"nothing"])


# -------------------------------------------------------------------------------------------------- late interaction


def by_loops(query: ScanTokens, hit: ScanTokens) -> float:
    cosine = torch.nn.functional.cosine_similarity
    best = [max(float(cosine(a, b, dim=0)) for b in hit.tokens.float()) for a in query.tokens.float()]
    return sum(best) / len(best)


@pytest.mark.parametrize("similarities", [1, 40, 2**24])
def test_late_interaction_is_the_mean_of_the_largest_cosines(
    similarities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "SIMILARITIES", similarities)
    query, *hits = some_tokens(5, 3, 9, 1, 4)
    expected = [by_loops(query, hit) for hit in hits]
    assert late_interaction(query, hits).tolist() == pytest.approx(expected, abs=1e-5)
    assert late_interaction(query, []).tolist() == []
    assert float(late_interaction(query, [query])) == pytest.approx(1, abs=1e-6)


def test_a_part_asks_for_the_whole_and_not_the_other_way() -> None:
    (whole,) = some_tokens(8)
    part = tokens_of(whole.tokens[:3].float())
    assert float(late_interaction(part, [whole])) == pytest.approx(1, abs=1e-6)
    assert float(late_interaction(whole, [part])) < 0.95


def test_hits_come_in_the_order_of_late_interaction_and_none_is_made_up() -> None:
    gallery = some_tokens(4, 6, 3, 5, 2)
    queries = some_tokens(4, 3)
    rows = torch.tensor([[0, 3, 4, 1], [2, 0, -1, -1]])
    found = rerank(queries, Hits(torch.zeros(2, 4), rows), dict(enumerate(gallery)))
    for place, query in enumerate(queries):
        hit = [row for row in rows[place].tolist() if row >= 0]
        order = sorted(hit, key=lambda row: -by_loops(query, gallery[row]))
        assert found.rows[place].tolist() == order + [-1] * (4 - len(hit))
        expected = [by_loops(query, gallery[row]) for row in order]
        assert found.scores[place, : len(hit)].tolist() == pytest.approx(expected, abs=1e-5)
        assert (found.scores[place, len(hit) :] == -torch.inf).all()
    with pytest.raises(ValueError, match="found 1 queries and hits of 2"):
        rerank(queries[:1], Hits(torch.zeros(2, 4), rows), gallery)


def test_equal_hits_keep_the_order_of_the_first_search() -> None:
    query, twin = some_tokens(3, 4)
    found = rerank([query], Hits(torch.zeros(1, 3), torch.tensor([[2, 0, 1]])), [twin, twin, twin])
    assert found.rows.tolist() == [[2, 0, 1]]


# --------------------------------------------------------------------------------------------------- in an evaluation


def collection() -> tuple[Embedded, list[ScanTokens]]:
    """Eight patients of two classes, whose embeddings know nothing and whose patches know the class."""
    records = [Record(f"s{n}", Path(f"s{n}"), "ct", "ab"[n % 2], "ab"[n % 2], f"p{n}") for n in range(8)]
    blind = torch.nn.functional.normalize(5 + torch.randn(8, 3), dim=1)  # all of them alike, more than most patches are
    classes = torch.eye(12)[:6].view(2, 3, 12)
    return Embedded(blind, records), [tokens_of(classes[n % 2] + 0.01 * torch.randn(3, 12)) for n in range(8)]


def test_patches_that_know_the_class_make_the_ranking_perfect() -> None:
    blind, tokens = collection()
    twice = Reranked(**vars(blind), tokens=tokens, depth=7)
    rows = evaluate({"once": blind, "twice": twice}, [WITHIN_MODALITY])
    scores = {row.method: row.scores["mAP"] for row in rows}
    assert scores["twice"] == 1 > scores["once"]
    assert differences_from("twice", rows)["once"].value == pytest.approx(1 - scores["once"])


def test_only_the_first_candidates_are_re_ranked_and_the_others_follow_as_they_were() -> None:
    blind, tokens = collection()
    candidate = torch.rand(8, 8) < 0.6
    candidate[0] = torch.arange(8) == 3  # fewer than the depth
    queries = torch.arange(8)
    once = blind.similarities(queries, candidate)
    twice = Reranked(**vars(blind), tokens=tokens, depth=3).similarities(queries, candidate)
    for query in range(8):
        order = [row for row in once[query].argsort(descending=True).tolist() if candidate[query, row]]
        first = sorted(order[:3], key=lambda row: -by_loops(tokens[query], tokens[row]))
        assert [row for row in twice[query].argsort(descending=True).tolist() if candidate[query, row]] == (
            first + order[3:]
        )
    torch.testing.assert_close(blind.similarities(queries, candidate), once)  # untouched


def test_tokens_of_other_scans_are_refused() -> None:
    blind, tokens = collection()
    for wrong, depth in ((tokens[:7], 3), (tokens, 0)):
        with pytest.raises(ValueError, match="expected as many, and at least 1"):
            Reranked(**vars(blind), tokens=wrong, depth=depth)


# ------------------------------------------------------------------------------------------------------- where it is


def background(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Dark and smooth, different in every scan: `(1, D, H, W)`."""
    coarse = torch.rand(1, 1, *(min(5, n) for n in shape), generator=torch.Generator().manual_seed(seed))
    return 0.5 * torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0].numpy()


def texture(size: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Cells of 6 voxels, each of a random brightness."""
    cells = np.random.default_rng(seed).random([-(-n // 6) for n in size], dtype=np.float32)
    for axis in range(3):
        cells = np.repeat(cells, 6, axis=axis)
    return cells[tuple(slice(n) for n in size)]


def box(corner: tuple[int, int, int], size: tuple[int, int, int]) -> Box:
    z, y, x = (slice(start, start + n) for start, n in zip(corner, size, strict=True))
    return z, y, x


def holds(place: Box, heat: Tensor) -> bool:
    """Whether the hottest voxel lies in the box."""
    hottest = np.unravel_index(int(heat.argmax()), heat.shape)
    return all(axis.start <= voxel < axis.stop for axis, voxel in zip(place, hottest, strict=True))


# D, H, W; size of the pattern, its corner in the query and in the hit, whole patches away; spacing. An image; a clip of
# which every fourth frame is taken; a volume resampled in depth; a volume of ten slices, the last patch not full
SCENES = [
    ((1, 120, 200), (1, 48, 50), (0, 0, 25), (0, 72, 125), UNKNOWN),
    ((40, 90, 133), (16, 36, 38), (0, 0, 19), (16, 54, 76), UNKNOWN),
    ((22, 98, 80), (9, 28, 32), (0, 14, 0), (9, 56, 48), MILLIMETRES),
    ((10, 98, 80), (4, 28, 32), (0, 14, 0), (4, 56, 48), MILLIMETRES),
]


@pytest.mark.parametrize("in_region", [True, False])
@pytest.mark.parametrize(("shape", "size", "here", "there", "spacing"), SCENES, ids=["image", "clip", "ct", "thin ct"])
def test_a_pattern_is_found_where_it_went(
    model: M3RetModel,
    shape: tuple[int, int, int],
    size: tuple[int, int, int],
    here: tuple[int, int, int],
    there: tuple[int, int, int],
    spacing: tuple[float | None, float | None, float | None],
    in_region: bool,
) -> None:
    scans = []
    for seed, corner in enumerate((here, there)):
        array = background(shape, seed)
        array[(0, *box(corner, size))] = texture(size)
        scans.append(Scan(array, spacing, {}))
    query, hit = scan_tokens(model, PROCESSOR, scans)
    asked, expected = box(here, size), box(there, size)
    match = locate(query, hit, asked if in_region else None)
    for heat in (match.hit_heat, match.query_heat):
        assert heat.shape == shape
        assert heat.dtype == torch.float32
        assert 0 <= float(heat.min()) <= float(heat.max()) <= 1
    assert holds(expected, match.hit_heat)
    assert holds(asked, match.query_heat)
    assert expected[0].start <= match.hit_slice < expected[0].stop
    best = match.pairs[0]
    moved = [b - a for a, b in zip(best.query, best.hit, strict=True)]
    step = [float(edges[1]) for edges in query.edges]  # a patch
    assert moved == pytest.approx([b - a for a, b in zip(here, there, strict=True)], abs=max(step) / 4)
    assert [pair.confidence for pair in match.pairs] == sorted((p.confidence for p in match.pairs), reverse=True)
    if in_region:
        assert float(match.query_heat.max()) > 0.5
        # a patch that lies in the region in part colours as far as the centre of the next
        reach = [2 * math.ceil(n) for n in step]
        outside = torch.ones(shape, dtype=torch.bool)
        outside[tuple(slice(max(0, axis.start - n), axis.stop + n) for axis, n in zip(asked, reach, strict=True))] = (
            False
        )
        assert outside.any()
        assert float(match.query_heat[outside].max()) == 0  # no one there was asked


def test_a_region_is_asked_alone(model: M3RetModel) -> None:
    """Two patterns that swap places: the one that is asked for lights up, and the other doesn't."""
    left, right = box((0, 48, 25), (1, 48, 50)), box((0, 48, 125), (1, 48, 50))
    arrays = [background((1, 120, 200), seed) for seed in (0, 1)]
    for number, (first, second) in enumerate(((left, right), (right, left))):
        arrays[number][(0, *first)], arrays[number][(0, *second)] = texture((1, 48, 50), 1), texture((1, 48, 50), 2)
    query, hit = scan_tokens(model, PROCESSOR, [Scan(array, UNKNOWN, {}) for array in arrays])
    for asked, expected, other in ((left, right, left), (right, left, right)):
        match = locate(query, hit, asked)
        assert holds(expected, match.hit_heat)
        assert float(match.hit_heat[other].max()) < 0.2 < 0.8 < float(match.hit_heat[expected].max())
        assert all((pair.query[2] < 100) == (asked is left) for pair in match.pairs)


def test_each_patch_of_a_scan_matches_itself(model: M3RetModel) -> None:
    for shape, spacing in SHAPES:
        (tokens,) = scan_tokens(model, PROCESSOR, [Scan(texture(shape)[None], spacing, {})])  # type: ignore[arg-type]
        match = locate(tokens, tokens, pairs=10_000)
        assert len(match.pairs) == len(tokens.tokens)
        for pair in match.pairs:
            assert pair.query == pair.hit
            assert pair.cosine == pytest.approx(1, abs=1e-5)


def test_confidence_is_the_product_of_two_softmaxes_and_what_repeats_shares_it() -> None:
    """By hand: three patches of empty background and one of its own in each scan, all at right angles else."""
    empty, query_mark, hit_mark = torch.eye(3)
    shared = torch.stack([empty, empty, empty, query_mark])
    match = locate(tokens_of(shared), tokens_of(shared))
    one, none = math.exp(1 / matching.TEMPERATURE), 1.0
    of_mark = (one / (one + 3 * none)) ** 2
    of_empty = (one / (3 * one + none)) ** 2
    assert match.pairs[0].query == match.pairs[0].hit == (0, 0, 3)
    assert [pair.confidence for pair in match.pairs] == pytest.approx([of_mark] + [of_empty] * 3, rel=1e-3)
    assert match.hit_heat[0, 0].tolist() == pytest.approx([3 * of_empty] * 3 + [of_mark], rel=1e-3)
    # a hit in which the mark is another one: only the background has a counterpart
    other = locate(tokens_of(shared), tokens_of(torch.stack([hit_mark, empty])))
    assert other.pairs[0].cosine == pytest.approx(1, abs=1e-3)
    assert other.pairs[0].hit == (0, 0, 1)


def test_tokens_of_two_models_do_not_match() -> None:
    with pytest.raises(ValueError, match="found tokens of 12 and 8 values"):
        locate(*some_tokens(3), *some_tokens(3, values=8))


@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_tokens_are_whitened_as_the_mean_of_a_scan_is(pooling: str) -> None:
    """Of mean pooling, the embedding is the whitened mean of the patch tokens: so the mean of the whitened tokens. Of
    statistics, the same of two scans whose patches deviate by what the training's do on average."""
    model = M3RetModel(tiny_config(pooling=pooling)).eval()
    model.whitening.fit(torch.randn(500, model.config.pooled_size) + 1)
    array = np.random.default_rng(0).random((1, 96, 96), dtype=np.float32)
    (tokens,) = scan_tokens(model, PROCESSOR, [array])
    inputs = PROCESSOR(array)
    with torch.no_grad():
        patches = model(**inputs).last_hidden_state[model.config.num_prefix_tokens :]
        pooled = patches
        if pooling == "statistics":
            pooled = torch.cat([patches, model.whitening.mean[48:].expand(len(patches), -1)], dim=1)
        expected = torch.nn.functional.normalize(model.whitening(pooled), dim=-1)
    assert (tokens.tokens.float() - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_tokens_have_a_whitening_of_their_own(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patches that it was fitted to have mean 0 and a covariance that is diagonal, at most 1, as those of no other
    whitening; what the model pools has no part in it."""
    monkeypatch.setattr(matching, "PATCHES_OF_SCAN", 1000)  # all
    model = M3RetModel(tiny_config(pooling=pooling, initializer_range=0.2)).eval()
    model.whitening.fit(torch.randn(500, model.config.pooled_size) + 1)
    arrays = [np.random.default_rng(n).random((1, 96, 64 + 32 * n), dtype=np.float32) for n in range(4)]
    whitening = fit_token_whitening(model, PROCESSOR, arrays)
    with torch.no_grad():
        patches = [model(**PROCESSOR(array)).last_hidden_state[model.config.num_prefix_tokens :] for array in arrays]
        white = whitening(torch.cat(patches))
    assert white.mean(0).abs().max() <= 1e-3
    covariance = white.T @ white / len(white)
    assert (covariance - covariance.diag().diag()).abs().max() <= 1e-2
    assert 0.98 < covariance.diag().max() <= 1.001
    tokens = scan_tokens(model, PROCESSOR, arrays, whitening=whitening)
    for own, expected in zip(tokens, white.split([len(part) for part in patches]), strict=True):
        assert (own.tokens.float() - torch.nn.functional.normalize(expected, dim=-1)).abs().max() <= 2e-3


def test_of_a_large_scan_a_whitening_takes_a_bounded_part(model: M3RetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr(matching.M3RetWhitening, "fit", lambda self, sample: taken.append(sample))
    monkeypatch.setattr(matching, "PATCHES_OF_SCAN", 5)
    arrays = [np.zeros((1, 96, 96), np.uint8), np.zeros((1, 16, 16), np.uint8)]
    patches = [math.prod(PROCESSOR(array)["grid_thw"][0].tolist()) for array in arrays]
    fit_token_whitening(model, PROCESSOR, arrays)
    assert len(taken[0]) == sum(len(range(0, count, -(-count // 5))) for count in patches)
    assert len(taken[0]) <= 10


def test_a_whitening_of_no_scan_is_refused(model: M3RetModel) -> None:
    with pytest.raises(ValueError, match="found no scan"):
        fit_token_whitening(model, PROCESSOR, [])
