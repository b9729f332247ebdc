"""Exact search in half precision: the k best of a float32 matrix product, whatever the gallery looks like."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from modeling_m3ret.search import exact as exact_search
from modeling_m3ret.search.exact import BRAIN_ROUNDING, bfloat16_rounding, block_type, search_exactly


@pytest.fixture(autouse=True, params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def _both_types(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor is faster in."""
    monkeypatch.setattr(exact_search, "block_type", lambda: request.param)


def galleries() -> dict[str, Tensor]:
    """Rows of norm 1 in float16: spread evenly, in tight clusters whose similarities differ by less than bfloat16 can
    tell, and with rows that repeat."""
    torch.manual_seed(0)
    uniform = torch.randn(3000, 64)
    centres = torch.randn(20, 64)
    clusters = centres[torch.randint(20, (3000,))] + 0.02 * torch.randn(3000, 64)
    repeated = torch.randn(300, 64).repeat(10, 1)
    named = {"uniform": uniform, "clusters": clusters, "repeated": repeated}
    return {name: torch.nn.functional.normalize(rows, dim=1).half() for name, rows in named.items()}


def brute_force(gallery: Tensor, query: Tensor, k: int, banned: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, all rows, sorted; of equal scores the first row first."""
    scores = torch.stack([(row.float() * query).sum() for row in gallery])
    scores[banned] = -torch.inf
    order = torch.argsort(scores, descending=True, stable=True)[:k]
    return scores[order], order


@pytest.mark.parametrize("name", ["uniform", "clusters", "repeated"])
@pytest.mark.parametrize("queries", [1, 9], ids=["one by one", "in blocks"])
def test_the_k_best_are_those_of_float32(name: str, queries: int) -> None:
    gallery = galleries()[name]
    asked = torch.nn.functional.normalize(gallery[:queries].float() + 0.01 * torch.randn(queries, 64), dim=1)
    banned = [torch.tensor([number, number + 20]) for number in range(queries)]
    for rounding in (BRAIN_ROUNDING, bfloat16_rounding(gallery)):
        hits = search_exactly(gallery, asked, 10, banned, rounding)
        for query, own, scores, rows in zip(asked, banned, hits.scores, hits.rows, strict=True):
            expected, order = brute_force(gallery, query, 10, own)
            assert torch.allclose(scores, expected, atol=1e-6)
            assert not set(rows.tolist()) & set(own.tolist())
            # scores that float32 itself can't tell apart may change places with each other
            assert torch.allclose(gallery[rows].float() @ query, expected, atol=1e-6)
            if name == "uniform":
                assert torch.equal(rows, order)
            assert (rows[1:][scores[1:] == scores[:-1]] > rows[:-1][scores[1:] == scores[:-1]]).all()


@pytest.mark.parametrize("queries", [1, 9], ids=["one by one", "in blocks"])
def test_a_mask_leaves_the_best_of_what_it_allows(queries: int) -> None:
    gallery = galleries()["clusters"]
    asked = torch.nn.functional.normalize(gallery[:queries].float() + 0.01 * torch.randn(queries, 64), dim=1)
    allowed = torch.rand(len(gallery)) < 0.3
    own = [torch.arange(number, number + 50) for number in range(queries)]
    hits = search_exactly(gallery, asked, 10, own, allowed=allowed)
    for query, rows, scores, banned in zip(asked, hits.rows, hits.scores, own, strict=True):
        hidden = torch.cat([torch.nonzero(~allowed).flatten(), banned])
        expected, _ = brute_force(gallery, query, 10, hidden)
        assert torch.allclose(scores, expected, atol=1e-6)
        assert not set(rows.tolist()) & set(hidden.tolist())


def test_no_row_is_moved_further_by_rounding_than_is_allowed_for() -> None:
    for gallery in galleries().values():
        moved = max((row.float() - row.bfloat16().float()).norm() for row in gallery)
        assert bfloat16_rounding(gallery) == pytest.approx(float(moved))
        assert moved <= BRAIN_ROUNDING


def test_blocks_are_multiplied_in_the_faster_type() -> None:
    def seconds(dtype: torch.dtype) -> float:
        queries, block = torch.randn(100, 768).to(dtype), torch.randn(4096, 768).to(dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            queries @ block.T
            times.append(time.perf_counter() - start)
        return min(times)

    (other,) = {torch.bfloat16, torch.float32} - {block_type()}
    assert seconds(block_type()) < 1.5 * seconds(other)  # where both are as fast, either will do


def test_fewer_than_k_are_filled_up() -> None:
    gallery = galleries()["uniform"][:5]
    hits = search_exactly(gallery, gallery[:1].float(), 8, [torch.tensor([0, 3])])
    assert sorted(hits.rows[0, :3].tolist()) == [1, 2, 4]
    assert hits.rows[0, 3:].tolist() == [-1] * 5
    assert hits.scores[0, 3:].tolist() == [-torch.inf] * 5
    nobody = search_exactly(gallery, gallery[:6].float(), 3, [torch.arange(5)] * 5)
    assert (nobody.rows == -1).all()
    assert search_exactly(gallery[:0], gallery[:1].float(), 3).rows.tolist() == [[-1] * 3]


def test_what_does_not_fit_is_refused() -> None:
    gallery = galleries()["uniform"]
    for queries, k in ((gallery[:1, :8], 3), (gallery[0], 3), (gallery[:1], 0)):
        with pytest.raises(ValueError, match="do not fit"):
            search_exactly(gallery, queries, k)
