"""Schedules against their closed forms, the parameters they apply to, and gradients of several packs."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn

from modeling_m3ret import M3RetForPreTraining, M3RetImageProcessor
from modeling_m3ret.data.loading import Pack
from modeling_m3ret.pretraining import optimisation
from modeling_m3ret.pretraining.objectives import SelfDistillation
from modeling_m3ret.pretraining.optimisation import accumulate_gradients, build_optimiser, set_schedule, warmup_cosine
from modeling_m3ret.pretraining.run_config import RunConfig


def test_learning_rate_rises_linearly_to_the_peak_and_falls_to_zero() -> None:
    factors = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0, abs=1e-3)
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))


def named_groups(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[tuple[set[str], dict]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for group in optimiser.param_groups]


@pytest.mark.parametrize("objective", ["mae", "simdino"])
def test_weight_decay_applies_to_matrices_only(objective: str) -> None:
    """SimDINO's mask patch has two dimensions but is not a matrix."""
    run = RunConfig(objective="simdino", patch_weight=1.0, local_views=1)
    model = M3RetForPreTraining(tiny_config()) if objective == "mae" else SelfDistillation(run, tiny_config())
    config = RunConfig(weight_decay=0.3)
    optimiser = build_optimiser(model, config)
    set_schedule(optimiser, config, 0, 1)
    decayed = {
        name for names, group in named_groups(model, optimiser) if group["weight_decay"] == 0.3 for name in names
    }
    not_decayed = {
        name for names, group in named_groups(model, optimiser) if group["weight_decay"] == 0 for name in names
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decayed | not_decayed == trained
    assert decayed == {name for name in trained if name.endswith(".weight") and "norm" not in name}


def test_weight_decay_and_learning_rate_follow_their_cosines() -> None:
    model = M3RetForPreTraining(tiny_config())
    config = RunConfig(
        steps=100, learning_rate=1e-3, final_learning_rate=1e-4, weight_decay=0.04, final_weight_decay=0.4,
        warmup_fraction=0.1,
    )  # fmt: skip
    optimiser = build_optimiser(model, config)
    decayed = next(group for group in optimiser.param_groups if group["decays"])
    rates, decays = {}, {}
    for step in (0, 10, 50, 55, 100):
        rates[step] = set_schedule(optimiser, config, step, 1)
        decays[step] = decayed["weight_decay"]
        assert decayed["lr"] == rates[step]
    assert [rates[step] for step in (0, 10, 55, 100)] == pytest.approx([1e-4, 1e-3, 5.5e-4, 1e-4])
    assert [decays[step] for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])


def test_layer_decay_lowers_the_learning_rate_towards_the_input_and_leaves_out_the_teacher() -> None:
    """Three layers with decay 1/2: embeddings 1/16, layers 1/8, 1/4, 1/2, all others 1."""
    config = RunConfig(objective="simdino", layer_decay=0.5, learning_rate=1.0, warmup_fraction=0)
    objective = SelfDistillation(config, tiny_config(pooling="cls"))
    optimiser = build_optimiser(objective, config)
    set_schedule(optimiser, config, 0, 1)
    rates = {name: group["lr"] for names, group in named_groups(objective, optimiser) for name in names}
    assert not any("teacher" in name for name in rates)
    assert rates["model.student.embeddings.cls_token"] == rates["model.student.embeddings.patch_embeddings.weight"]
    assert rates["model.student.embeddings.cls_token"] == 1 / 16
    for layer, rate in enumerate((1 / 8, 1 / 4, 1 / 2)):
        assert rates[f"model.student.encoder.layers.{layer}.mlp.up_proj.weight"] == rate
    assert rates["model.student.norm.weight"] == rates["model.student_head.layers.0.weight"] == 1


PROCESSOR = M3RetImageProcessor(size=16)
ACCELERATOR: Any = SimpleNamespace(
    device=torch.device("cpu"),
    no_sync=lambda model: contextlib.nullcontext(),
    autocast=contextlib.nullcontext,
    backward=Tensor.backward,
)


class MeanSquare(nn.Module):
    """Mean over scans of a squared output, weighted over ranks as in the objectives."""

    def __init__(self, rank_weights: dict[int, float]):
        super().__init__()
        self.rank_weights = rank_weights
        self.weight = nn.Parameter(torch.linspace(-1, 1, 768))

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        squares = (pixel_values @ self.weight) ** 2  # (scans,)
        return squares.mean() * self.rank_weights.get(len(squares), 1), {"term": squares.mean()}


def pack_of(count: int) -> Pack:
    return Pack(torch.rand(count * 256), [(1, 1, 16, 16)] * count, list(range(count)))


def test_scans_have_the_same_weight_over_packs_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packs on each of two ranks (2 and 10 scans, 5 and 1 scans) equal one pack of all 18 scans."""
    on_both_ranks = {2: 7, 5: 7, 10: 11, 1: 11, 18: 18}
    monkeypatch.setattr(optimisation, "count_over_ranks", lambda count, device: on_both_ranks[count])
    rank_weights = {count: 2 * count / on_both_ranks[count] for count in (2, 5, 10, 1)}
    ranks = [[pack_of(2), pack_of(10)], [pack_of(5), pack_of(1)]]

    def learn(packs: list[Pack]) -> tuple[Tensor, Tensor, int]:
        model = MeanSquare(rank_weights)
        means, views = accumulate_gradients(ACCELERATOR, model, packs, PROCESSOR)
        assert model.weight.grad is not None
        return model.weight.grad, means["loss"], views

    whole, loss, _ = learn([Pack.concatenate([pack for packs in ranks for pack in packs])])
    (first, first_loss, views), (second, second_loss, _) = (learn(packs) for packs in ranks)
    assert views == 18
    torch.testing.assert_close((first + second) / 2, whole)
    torch.testing.assert_close((first_loss + second_loss) / 2, loss)


@pytest.mark.parametrize("packs", [1, 3, 7])
def test_packs_of_equal_size_are_averaged_bit_for_bit(packs: int) -> None:
    model, plain = MeanSquare({}), MeanSquare({})
    step_packs = [pack_of(5) for _ in range(packs)]
    means, views = accumulate_gradients(ACCELERATOR, model, step_packs, PROCESSOR)
    losses = [plain(**pack.inputs(PROCESSOR, compact_images=True))[0] for pack in step_packs]
    for loss in losses:
        (loss / packs).backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)
    assert views == 5 * packs
    for name in ("loss", "term"):
        torch.testing.assert_close(means[name], torch.stack(losses).mean().detach())
