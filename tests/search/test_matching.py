"""Late interaction against loops over all pairs, and positions against scans whose values are coordinates."""

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
    RerankedSearch,
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
    """Tokens of an image one patch high, with patches of one voxel."""
    edges = [torch.arange(n + 1, dtype=torch.float64) for n in (1, 1, len(vectors))]
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    return ScanTokens(unit.half(), (edges[0], edges[1], edges[2]), (0,))


def some_tokens(*lengths: int, values: int = 12) -> list[ScanTokens]:
    return [tokens_of(torch.randn(length, values)) for length in lengths]


# ---- positions of patches --------------------------------------------------------------------------------------------

# D, H, W and spacing: an image larger and one smaller than the encoder's input; a clip read every fourth frame; volumes
# that are resampled in depth, and with a last patch that is not full
SHAPES = [
    ((1, 120, 200), UNKNOWN),
    ((1, 50, 31), UNKNOWN),
    ((40, 90, 133), UNKNOWN),
    ((22, 98, 80), MILLIMETRES),
    ((10, 98, 80), MILLIMETRES),
    ((8, 64, 100), MILLIMETRES),
]


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_patch_centres_are_the_coordinates_that_patches_contain(
    model: M3RetModel, shape: tuple[int, int, int], spacing: tuple[float | None, ...]
) -> None:
    """The scan's voxels hold their coordinate along one axis, so a patch's mean value is its position.

    Resizing repeats the outermost voxels, so patches at the border are left out along that axis.
    """
    for axis in range(3):
        ramp = np.arange(shape[axis], dtype=np.float32).reshape([-1 if n == axis else 1 for n in range(3)])
        scan = Scan(np.broadcast_to(ramp / 1000, (1, *shape)).copy(), spacing, {})  # type: ignore[arg-type]
        (tokens,) = scan_tokens(model, PROCESSOR, [scan])
        assert tokens.shape == shape
        volume = (PROCESSOR.resize(scan)[0] * 0.5 + 0.5) * 1000  # (D, H, W), coordinates in voxels
        T, h, w = tokens.grid
        assert PROCESSOR.grid_shape(volume[None].shape) == (T, h, w)
        seen = [
            float(volume[t * 4 : (t + 1) * 4, y * 16 : (y + 1) * 16, x * 16 : (x + 1) * 16].mean())
            for t in range(T)
            for y in range(h)
            for x in range(w)
        ]
        positions = torch.cartesian_prod(*(torch.arange(n) for n in tokens.grid))[:, axis]
        inner = (positions > 0) & (positions < tokens.grid[axis] - 1)
        if axis == 0:  # no border is repeated in depth; a frame that is read may be half a frame off the centre
            inner = torch.ones_like(inner)
        centres = tokens.centres()[:, axis].float()
        torch.testing.assert_close(centres[inner], torch.tensor(seen)[inner], atol=0.51 if axis == 0 else 0.02, rtol=0)


def test_interpolation_of_equal_patches_is_trilinear_resizing(model: M3RetModel) -> None:
    for shape in ((1, 120, 200), (8, 64, 100)):
        (tokens,) = scan_tokens(model, PROCESSOR, [Scan(np.zeros((1, *shape), np.float32), MILLIMETRES, {})])
        values = torch.rand(math.prod(tokens.grid))
        resized = torch.nn.functional.interpolate(values.view(1, 1, *tokens.grid), shape, mode="trilinear")
        torch.testing.assert_close(tokens.to_voxels(values), resized[0, 0])


def test_last_patch_ends_with_the_slices(model: M3RetModel) -> None:
    (tokens,) = scan_tokens(model, PROCESSOR, [Scan(np.zeros((1, 10, 98, 80), np.float32), MILLIMETRES, {})])
    assert tokens.edges[0].tolist() == [0, 4, 8, 10]
    depth_of_patch = torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(tokens.grid[1] * tokens.grid[2])
    # centres of patches are at 2, 6 and 9, centres of voxels at n + 0.5
    expected = [0, 0, 0.125, 0.375, 0.625, 0.875, 1 - 0.5 / 3, 1 - 1.5 / 3, 1 - 2.5 / 3, 0]
    assert tokens.to_voxels(depth_of_patch)[:, 0, 0].tolist() == pytest.approx(expected)


def test_fraction_inside_equals_counting_points(model: M3RetModel) -> None:
    (tokens,) = scan_tokens(model, PROCESSOR, [Scan(np.zeros((1, 22, 98, 80), np.float32), MILLIMETRES, {})])
    region = (slice(3, 17), slice(None, 50), slice(-30, -7))
    fine = 40  # points per voxel along an axis
    fractions = []
    for edges, axis, size in zip(tokens.edges, region, tokens.shape, strict=True):
        points = (np.arange(size * fine) + 0.5) / fine
        inside = np.isin(np.floor(points), np.arange(size)[axis])
        patch = np.searchsorted(edges.numpy(), points) - 1
        fractions.append([inside[patch == n].mean() for n in range(len(edges) - 1)])
    expected = np.einsum("t,h,w->thw", *fractions).ravel()
    np.testing.assert_allclose(tokens.fraction_inside(region), expected, atol=0.01)
    assert tokens.fraction_inside((slice(None),) * 3).tolist() == pytest.approx([1] * len(tokens.tokens))
    for wrong in (slice(5, 5), slice(98, None), slice(0, 9, 2)):
        with pytest.raises(ValueError, match="region"):
            tokens.fraction_inside((slice(None), wrong, slice(None)))


def test_frames_are_indices_in_the_whole_clip(model: M3RetModel) -> None:
    """Each frame's value is its index."""
    clip = np.broadcast_to(np.arange(57, dtype=np.uint8)[:, None, None], (57, 40, 40)).copy()
    (tokens,) = scan_tokens(model, PROCESSOR, [clip])
    assert tokens.frames == tuple(PROCESSOR.read(clip).array[0, :, 0, 0].tolist())
    assert len(tokens.frames) == tokens.shape[0] == 10


def test_tokens_do_not_depend_on_the_batch(model: M3RetModel) -> None:
    model.whitening.fit(torch.randn(100, 48) @ torch.randn(48, 48))
    scans = [np.random.default_rng(n).random(shape) for n, shape in enumerate([(64, 90), (8, 50, 50), (30, 30)])]
    batched = scan_tokens(model, PROCESSOR, scans)
    single = scan_tokens(model, PROCESSOR, (scan for scan in scans), max_tokens=1)
    for scan, one, other in zip(scans, batched, single, strict=True):
        assert one.grid == other.grid
        torch.testing.assert_close(one.tokens, other.tokens, atol=2e-3, rtol=0)
        # the last hidden state, whitened by the definition
        inputs = PROCESSOR(scan)
        with torch.no_grad():
            state = model(**inputs).last_hidden_state[model.config.num_prefix_tokens :]
        whitened = (state - model.whitening.mean) @ model.whitening.matrix.T
        expected = whitened / whitened.norm(dim=1, keepdim=True)
        torch.testing.assert_close(one.tokens.float(), expected, atol=2e-3, rtol=0)
    with pytest.raises(M3RetReadError):
        scan_tokens(model, PROCESSOR, [scans[0], b"nothing"])


# ---- late interaction ------------------------------------------------------------------------------------------------


def by_loops(query: ScanTokens, hit: ScanTokens) -> float:
    cosine = torch.nn.functional.cosine_similarity
    best = [max(float(cosine(a, b, dim=0)) for b in hit.tokens.float()) for a in query.tokens.float()]
    return sum(best) / len(best)


@pytest.mark.parametrize("similarities", [1, 40, 2**24])
def test_late_interaction_is_the_mean_of_the_largest_cosines(
    similarities: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "MAX_SIMILARITIES", similarities)
    query, *hits = some_tokens(5, 3, 9, 1, 4)
    expected = [by_loops(query, hit) for hit in hits]
    assert late_interaction(query, hits).tolist() == pytest.approx(expected, abs=1e-5)
    assert late_interaction(query, []).tolist() == []
    assert float(late_interaction(query, [query])) == pytest.approx(1, abs=1e-6)


def test_late_interaction_is_asymmetric() -> None:
    (whole,) = some_tokens(8)
    part = tokens_of(whole.tokens[:3].float())
    assert float(late_interaction(part, [whole])) == pytest.approx(1, abs=1e-6)
    assert float(late_interaction(whole, [part])) < 0.95


def test_rerank_sorts_hits_by_late_interaction() -> None:
    gallery = some_tokens(4, 6, 3, 5, 2)
    queries = some_tokens(4, 3)
    rows = torch.tensor([[0, 3, 4, 1], [2, 0, -1, -1]])
    found = rerank(queries, Hits(torch.zeros(2, 4), rows), dict(enumerate(gallery)))
    for index, query in enumerate(queries):
        hit = [row for row in rows[index].tolist() if row >= 0]
        order = sorted(hit, key=lambda row: -by_loops(query, gallery[row]))
        assert found.rows[index].tolist() == order + [-1] * (4 - len(hit))
        expected = [by_loops(query, gallery[row]) for row in order]
        assert found.scores[index, : len(hit)].tolist() == pytest.approx(expected, abs=1e-5)
        assert (found.scores[index, len(hit) :] == -torch.inf).all()
    with pytest.raises(ValueError, match="queries"):
        rerank(queries[:1], Hits(torch.zeros(2, 4), rows), gallery)


def test_rerank_orders_equal_hits_by_row() -> None:
    query, twin = some_tokens(3, 4)
    found = rerank([query], Hits(torch.zeros(1, 3), torch.tensor([[2, 0, 1]])), [twin, twin, twin])
    assert found.rows.tolist() == [[0, 1, 2]]


# ---- in an evaluation ------------------------------------------------------------------------------------------------


def collection() -> tuple[Embedded, list[ScanTokens]]:
    """Eight patients of two classes: embeddings are random, patch tokens identify the class."""
    records = [Record(f"s{n}", Path(f"s{n}"), "ct", "ab"[n % 2], "ab"[n % 2], f"p{n}") for n in range(8)]
    random = torch.nn.functional.normalize(5 + torch.randn(8, 3), dim=1)  # more alike than most patches
    classes = torch.eye(12)[:6].view(2, 3, 12)
    return Embedded(random, records), [tokens_of(classes[n % 2] + 0.01 * torch.randn(3, 12)) for n in range(8)]


def test_tokens_that_identify_the_class_give_a_perfect_ranking() -> None:
    embedded, tokens = collection()
    reranked = RerankedSearch(**vars(embedded), tokens=tokens, depth=7)
    rows = evaluate({"embedded": embedded, "reranked": reranked}, [WITHIN_MODALITY])
    scores = {row.method: row.scores["mAP"] for row in rows}
    assert scores["reranked"] == 1 > scores["embedded"]
    assert differences_from("reranked", rows)["embedded"].value == pytest.approx(1 - scores["embedded"])


def test_only_the_first_candidates_are_reranked() -> None:
    embedded, tokens = collection()
    candidate = torch.rand(8, 8) < 0.6
    candidate[0] = torch.arange(8) == 3  # fewer than the depth
    queries = torch.arange(8)
    before = embedded.similarities(queries, candidate)
    after = RerankedSearch(**vars(embedded), tokens=tokens, depth=3).similarities(queries, candidate)
    for query in range(8):
        order = [row for row in before[query].argsort(descending=True).tolist() if candidate[query, row]]
        first = sorted(order[:3], key=lambda row: -by_loops(tokens[query], tokens[row]))
        assert [row for row in after[query].argsort(descending=True).tolist() if candidate[query, row]] == (
            first + order[3:]
        )
    torch.testing.assert_close(embedded.similarities(queries, candidate), before)  # unchanged


def test_wrong_number_of_tokens_or_depth_is_refused() -> None:
    embedded, tokens = collection()
    for wrong, depth, argument in ((tokens[:7], 3, "tokens"), (tokens, 0, "depth")):
        with pytest.raises(ValueError, match=rf"^{argument}\b"):
            RerankedSearch(**vars(embedded), tokens=wrong, depth=depth)


# ---- localisation ----------------------------------------------------------------------------------------------------


def background(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Return a dark, smooth background that differs between scans: `(1, D, H, W)`."""
    coarse = torch.rand(1, 1, *(min(5, n) for n in shape), generator=torch.Generator().manual_seed(seed))
    return 0.5 * torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0].numpy()


def texture(size: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Return cells of 6 voxels of random brightness."""
    cells = np.random.default_rng(seed).random([-(-n // 6) for n in size], dtype=np.float32)
    for axis in range(3):
        cells = np.repeat(cells, 6, axis=axis)
    return cells[tuple(slice(n) for n in size)]


def box(corner: tuple[int, int, int], size: tuple[int, int, int]) -> Box:
    z, y, x = (slice(start, start + n) for start, n in zip(corner, size, strict=True))
    return z, y, x


def contains_hottest(region: Box, heat: Tensor) -> bool:
    """Return whether the hottest voxel lies in the box."""
    hottest = np.unravel_index(int(heat.argmax()), heat.shape)
    return all(axis.start <= voxel < axis.stop for axis, voxel in zip(region, hottest, strict=True))


# D, H, W; size of the pattern; its corner in the query and in the hit, whole patches apart; spacing. An image, a clip
# read every fourth frame, a volume resampled in depth, and a volume whose last patch is not full
SCENES = [
    ((1, 120, 200), (1, 48, 50), (0, 0, 25), (0, 72, 125), UNKNOWN),
    ((40, 90, 133), (16, 36, 38), (0, 0, 19), (16, 54, 76), UNKNOWN),
    ((22, 98, 80), (9, 28, 32), (0, 14, 0), (9, 56, 48), MILLIMETRES),
    ((10, 98, 80), (4, 28, 32), (0, 14, 0), (4, 56, 48), MILLIMETRES),
]


@pytest.mark.parametrize("in_region", [True, False])
@pytest.mark.parametrize(("shape", "size", "here", "there", "spacing"), SCENES, ids=["image", "clip", "ct", "thin ct"])
def test_pattern_is_located_where_it_moved(
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
    assert contains_hottest(expected, match.hit_heat)
    assert contains_hottest(asked, match.query_heat)
    assert expected[0].start <= match.hit_slice < expected[0].stop
    best = match.pairs[0]
    moved = [b - a for a, b in zip(best.query, best.hit, strict=True)]
    step = [float(edges[1]) for edges in query.edges]  # a patch
    assert moved == pytest.approx([b - a for a, b in zip(here, there, strict=True)], abs=max(step) / 4)
    assert [pair.confidence for pair in match.pairs] == sorted((p.confidence for p in match.pairs), reverse=True)
    if in_region:
        assert float(match.query_heat.max()) > 0.5
        # the heat of a patch partly in the region is interpolated to the centre of the next patch
        reach = [2 * math.ceil(n) for n in step]
        outside = torch.ones(shape, dtype=torch.bool)
        outside[tuple(slice(max(0, axis.start - n), axis.stop + n) for axis, n in zip(asked, reach, strict=True))] = (
            False
        )
        assert outside.any()
        assert float(match.query_heat[outside].max()) == 0


def test_region_locates_its_own_pattern_only(model: M3RetModel) -> None:
    """Two patterns are exchanged between query and hit."""
    left, right = box((0, 48, 25), (1, 48, 50)), box((0, 48, 125), (1, 48, 50))
    arrays = [background((1, 120, 200), seed) for seed in (0, 1)]
    for number, (first, second) in enumerate(((left, right), (right, left))):
        arrays[number][(0, *first)], arrays[number][(0, *second)] = texture((1, 48, 50), 1), texture((1, 48, 50), 2)
    query, hit = scan_tokens(model, PROCESSOR, [Scan(array, UNKNOWN, {}) for array in arrays])
    for asked, expected, other in ((left, right, left), (right, left, right)):
        match = locate(query, hit, asked)
        assert contains_hottest(expected, match.hit_heat)
        assert float(match.hit_heat[other].max()) < 0.2 < 0.8 < float(match.hit_heat[expected].max())
        assert all((pair.query[2] < 100) == (asked is left) for pair in match.pairs)


def test_each_patch_matches_itself_in_the_same_scan(model: M3RetModel) -> None:
    for shape, spacing in SHAPES:
        (tokens,) = scan_tokens(model, PROCESSOR, [Scan(texture(shape)[None], spacing, {})])  # type: ignore[arg-type]
        match = locate(tokens, tokens, pairs=10_000)
        assert len(match.pairs) == len(tokens.tokens)
        for pair in match.pairs:
            assert pair.query == pair.hit
            assert pair.cosine == pytest.approx(1, abs=1e-5)


def test_confidence_is_the_dual_softmax_and_repeated_patches_share_it() -> None:
    """Three equal background patches and one distinct patch, orthogonal to it."""
    empty, query_mark, hit_mark = torch.eye(3)
    shared = torch.stack([empty, empty, empty, query_mark])
    match = locate(tokens_of(shared), tokens_of(shared))
    one, none = math.exp(1 / matching.TEMPERATURE), 1.0
    of_mark = (one / (one + 3 * none)) ** 2
    of_empty = (one / (3 * one + none)) ** 2
    assert match.pairs[0].query == match.pairs[0].hit == (0, 0, 3)
    assert [pair.confidence for pair in match.pairs] == pytest.approx([of_mark] + [of_empty] * 3, rel=1e-3)
    assert match.hit_heat[0, 0].tolist() == pytest.approx([3 * of_empty] * 3 + [of_mark], rel=1e-3)
    # the hit has another distinct patch: only the background has a counterpart
    other = locate(tokens_of(shared), tokens_of(torch.stack([hit_mark, empty])))
    assert other.pairs[0].cosine == pytest.approx(1, abs=1e-3)
    assert other.pairs[0].hit == (0, 0, 1)


def test_tokens_of_two_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"12.*8"):
        locate(*some_tokens(3), *some_tokens(3, values=8))


@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_tokens_are_whitened_like_the_mean_of_a_scan(pooling: str) -> None:
    """With statistics pooling the deviations are replaced by their mean over the training scans."""
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
def test_token_whitening_decorrelates_the_patches_for_any_pooling(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patches that it was fitted to have mean 0 and a diagonal covariance of at most 1."""
    monkeypatch.setattr(matching, "PATCHES_PER_SCAN", 1000)  # all of them
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
    for scan, expected in zip(tokens, white.split([len(state) for state in patches]), strict=True):
        assert (scan.tokens.float() - torch.nn.functional.normalize(expected, dim=-1)).abs().max() <= 2e-3


def test_token_whitening_uses_a_bounded_number_of_patches(model: M3RetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr(matching.M3RetWhitening, "fit", lambda self, sample, shrinkage: taken.append(sample))
    monkeypatch.setattr(matching, "PATCHES_PER_SCAN", 5)
    arrays = [np.zeros((1, 96, 96), np.uint8), np.zeros((1, 16, 16), np.uint8)]
    patches = [math.prod(PROCESSOR(array)["grid_thw"][0].tolist()) for array in arrays]
    fit_token_whitening(model, PROCESSOR, arrays)
    assert len(taken[0]) == sum(len(range(0, count, -(-count // 5))) for count in patches)
    assert len(taken[0]) <= 10


def test_token_whitening_of_no_scan_is_refused(model: M3RetModel) -> None:
    with pytest.raises(ValueError, match="none"):
        fit_token_whitening(model, PROCESSOR, [])
