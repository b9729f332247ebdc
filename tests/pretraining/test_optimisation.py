"""Schedules by their closed forms, and which weights they reach."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import tiny_config
from torch import nn

from modeling_m3ret import M3RetForPreTraining
from modeling_m3ret.pretraining.objectives import SelfDistillation
from modeling_m3ret.pretraining.optimisation import build_optimiser, set_schedule, warmup_cosine
from modeling_m3ret.pretraining.run_config import RunConfig


def test_schedule_rises_to_the_peak_and_falls_to_nothing() -> None:
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
def test_weight_decay_is_on_matrices_alone(objective: str) -> None:
    """Not on what stands for a patch, either: SimDINO's mask is as wide as one."""
    run = RunConfig(objective="simdino", patch_weight=1.0, local_views=1)
    model = M3RetForPreTraining(tiny_config()) if objective == "mae" else SelfDistillation(run, tiny_config())
    config = RunConfig(weight_decay=0.3)
    optimiser = build_optimiser(model, config)
    set_schedule(optimiser, config, 0, 1)
    decayed = {
        name for names, group in named_groups(model, optimiser) if group["weight_decay"] == 0.3 for name in names
    }
    kept = {name for names, group in named_groups(model, optimiser) if group["weight_decay"] == 0 for name in names}
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decayed | kept == learned
    assert decayed == {name for name in learned if name.endswith(".weight") and "norm" not in name}


def test_weight_decay_and_learning_rate_end_where_they_should() -> None:
    model = M3RetForPreTraining(tiny_config())
    config = RunConfig(
        steps=100, learning_rate=1e-3, final_learning_rate=1e-4, weight_decay=0.04, final_weight_decay=0.4,
        warmup_fraction=0.1,
    )  # fmt: skip
    optimiser = build_optimiser(model, config)
    decayed = next(group for group in optimiser.param_groups if group["decays"])
    told = {}
    for step in (0, 10, 50, 55, 100):
        told[step] = set_schedule(optimiser, config, step, 1), decayed["weight_decay"], decayed["lr"]
    assert [told[step][0] for step in (0, 10, 55, 100)] == pytest.approx([1e-4, 1e-3, 5.5e-4, 1e-4])
    assert [told[step][1] for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert all(rate == of_group for rate, _, of_group in told.values())


def test_layers_near_the_input_learn_slower_and_a_teacher_is_no_parameter() -> None:
    """Three layers, decay 1/2: embeddings 1/16, layers 1/8, 1/4, 1/2, the rest 1."""
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
