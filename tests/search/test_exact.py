"""Exact search in half precision returns the k best rows of a float32 matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling_m3ret.search import exact as exact_search
from modeling_m3ret.search.exact import BFLOAT16_ROUNDING, block_dtype, search_exactly


@pytest.fixture(autouse=True, params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def _both_dtypes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test both dtypes, whichever this processor is faster in."""
    monkeypatch.setattr(exact_search, "block_dtype", lambda: request.param)


def galleries() -> dict[str, Tensor]:
    """Rows of norm 1 in float16: uniform, in clusters too tight for bfloat16 to rank, and with repeated rows."""
    torch.manual_seed(0)
    uniform = torch.randn(1500, 64)
    centres = torch.randn(10, 64)
    clusters = centres[torch.randint(10, (1500,))] + 0.02 * torch.randn(1500, 64)
    repeated = torch.randn(150, 64).repeat(10, 1)
    named = {"uniform": uniform, "clusters": clusters, "repeated": repeated}
    return {name: torch.nn.functional.normalize(rows, dim=1).half() for name, rows in named.items()}


def brute_force(gallery: Tensor, query: Tensor, k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Sort all rows by their score in float32, rows of equal score in ascending order."""
    scores = (gallery.float() * query).sum(1)
    scores[excluded] = -torch.inf
    order = torch.argsort(scores, descending=True, stable=True)[:k]
    return scores[order], order


@pytest.mark.parametrize("name", ["uniform", "clusters", "repeated"])
@pytest.mark.parametrize("count", [1, 9], ids=["few queries", "many queries"])
def test_hits_are_those_of_float32(name: str, count: int) -> None:
    gallery = galleries()[name]
    queries = torch.nn.functional.normalize(gallery[:count].float() + 0.01 * torch.randn(count, 64), dim=1)
    excluded = [torch.tensor([number, number + 20]) for number in range(count)]
    hits = search_exactly(gallery, queries, 10, excluded)
    for query, left_out, scores, rows in zip(queries, excluded, hits.scores, hits.rows, strict=True):
        expected, order = brute_force(gallery, query, 10, left_out)
        assert torch.allclose(scores, expected, atol=1e-6)
        assert not set(rows.tolist()) & set(left_out.tolist())
        # rows whose scores differ by rounding of float32 only may be in another order
        assert torch.allclose(gallery[rows].float() @ query, expected, atol=1e-6)
        if name == "uniform":
            assert torch.equal(rows, order)
        assert (rows[1:][scores[1:] == scores[:-1]] > rows[:-1][scores[1:] == scores[:-1]]).all()


@pytest.mark.parametrize("count", [1, 9], ids=["few queries", "many queries"])
def test_only_allowed_rows_are_found(count: int) -> None:
    gallery = galleries()["clusters"]
    queries = torch.nn.functional.normalize(gallery[:count].float() + 0.01 * torch.randn(count, 64), dim=1)
    allowed = torch.rand(len(gallery)) < 0.3
    excluded = [torch.arange(number, number + 50) for number in range(count)]
    hits = search_exactly(gallery, queries, 10, excluded, allowed=allowed)
    for query, rows, scores, left_out in zip(queries, hits.rows, hits.scores, excluded, strict=True):
        hidden = torch.cat([torch.nonzero(~allowed).flatten(), left_out])
        expected, _ = brute_force(gallery, query, 10, hidden)
        assert torch.allclose(scores, expected, atol=1e-6)
        assert not set(rows.tolist()) & set(hidden.tolist())


def test_rounding_to_bfloat16_is_within_the_bound() -> None:
    for gallery in galleries().values():
        assert float((gallery.float() - gallery.bfloat16().float()).norm(dim=1).max()) <= BFLOAT16_ROUNDING


def test_block_dtype_is_measured_once() -> None:
    assert block_dtype() in (torch.bfloat16, torch.float32)
    assert block_dtype() == block_dtype()


def test_missing_hits_have_row_minus_one_and_score_minus_infinity() -> None:
    gallery = galleries()["uniform"][:5]
    hits = search_exactly(gallery, gallery[:1].float(), 8, [torch.tensor([0, 3])])
    assert sorted(hits.rows[0, :3].tolist()) == [1, 2, 4]
    assert hits.rows[0, 3:].tolist() == [-1] * 5
    assert hits.scores[0, 3:].tolist() == [-torch.inf] * 5
    none_left = search_exactly(gallery, gallery[:6].float(), 3, [torch.arange(5)] * 5)
    assert (none_left.rows == -1).all()
    assert search_exactly(gallery[:0], gallery[:1].float(), 3).rows.tolist() == [[-1] * 3]


def test_wrong_shapes_and_k_are_refused() -> None:
    gallery = galleries()["uniform"]
    for queries, k, argument in ((gallery[:1, :8], 3, "queries"), (gallery[0], 3, "queries"), (gallery[:1], 0, "k")):
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            search_exactly(gallery, queries, k)
