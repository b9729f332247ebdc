"""A step of several packs learns from each of their scans alike, however they are spread over packs and ranks."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.loading import Pack
from modeling_m3ret.pretraining import accumulation
from modeling_m3ret.pretraining.accumulation import accumulate_gradients


PROCESSOR = M3RetImageProcessor(size=16)
ACCELERATOR: Any = SimpleNamespace(
    device=torch.device("cpu"),
    no_sync=lambda model: contextlib.nullcontext(),
    autocast=contextlib.nullcontext,
    backward=Tensor.backward,
)


class MeanSquare(nn.Module):
    """Of one output a scan, times the rank's part of the pack, as objectives have it."""

    def __init__(self, part_of_rank: dict[int, float]):
        super().__init__()
        self.part_of_rank = part_of_rank
        self.weight = nn.Parameter(torch.linspace(-1, 1, 768))

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        squares = (pixel_values @ self.weight) ** 2  # (scans,)
        return squares.mean() * self.part_of_rank.get(len(squares), 1), {"term": squares.mean()}


def pack_of(count: int) -> Pack:
    return Pack(torch.randn(count * 256), [(1, 1, 16, 16)] * count, list(range(count)))


def test_scans_weigh_the_same_over_packs_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packs on each of two ranks, of 2 and 10 scans and of 5 and 1, beside one pack of all 18 scans."""
    on_both_ranks = {2: 7, 5: 7, 10: 11, 1: 11, 18: 18}
    monkeypatch.setattr(accumulation, "total_over_ranks", lambda count, device: on_both_ranks[count])
    part_of_rank = {count: 2 * count / on_both_ranks[count] for count in (2, 5, 10, 1)}
    ranks = [[pack_of(2), pack_of(10)], [pack_of(5), pack_of(1)]]

    def learn(packs: list[Pack]) -> tuple[Tensor, Tensor, int]:
        model = MeanSquare(part_of_rank)
        means, views = accumulate_gradients(ACCELERATOR, model, packs, PROCESSOR)
        assert model.weight.grad is not None
        return model.weight.grad, means["loss"], views

    whole, loss, _ = learn([Pack.concatenate([pack for packs in ranks for pack in packs])])
    (one, one_loss, views), (other, other_loss, _) = (learn(packs) for packs in ranks)
    assert views == 18
    torch.testing.assert_close((one + other) / 2, whole)
    torch.testing.assert_close((one_loss + other_loss) / 2, loss)


@pytest.mark.parametrize("packs", [1, 3, 7])
def test_packs_of_one_size_are_averaged_to_the_last_bit(packs: int) -> None:
    model, plain = MeanSquare({}), MeanSquare({})
    of_step = [pack_of(5) for _ in range(packs)]
    means, views = accumulate_gradients(ACCELERATOR, model, of_step, PROCESSOR)
    losses = [plain(**pack.inputs(PROCESSOR, compact_images=True))[0] for pack in of_step]
    for loss in losses:
        (loss / packs).backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)
    assert views == 5 * packs
    for name in ("loss", "term"):
        torch.testing.assert_close(means[name], torch.stack(losses).mean().detach())
