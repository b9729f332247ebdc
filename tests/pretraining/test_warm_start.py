"""Initial weights of a run from the checkpoint of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_objectives import TINY
from torch import Tensor, nn

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.pretraining.checkpoints import write_checkpoint
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.warm_start import WarmStartError


MAE = {"objective": "mae"}
SIMDINO = {"objective": "simdino"}
PATCH_TERM = {"objective": "simdino", "patch_weight": 1.0}
BOTH = {"objective": "mae+simdino"}
STATISTICS = {"objective": "simdino", "model": {"pooling": "statistics"}}
HEADS = {"student_head", "teacher_head"}


def build(seed: int, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    model = TINY | settings.pop("model", {})
    return build_objective(RunConfig(preset="vitt", local_views=1, model=model, **settings))[0]


def publish(folder: Path, **settings: object) -> nn.Module:
    """Save a checkpoint whose weights no run starts with."""
    objective = build(1, **settings)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_()
    write_checkpoint(folder, objective, objective.state_dict(), M3RetImageProcessor(size=32), "", {})
    return objective


def weights(part: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in part.state_dict().items() if not name.startswith("whitening.")}


def equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("earlier", "now", "random"),
    [
        (MAE, MAE, set()),
        (SIMDINO, SIMDINO, set()),
        (SIMDINO, PATCH_TERM, {"mask_patch"}),
        (PATCH_TERM, BOTH, {"decoder"}),
        (BOTH, SIMDINO, set()),
        (SIMDINO, STATISTICS, HEADS),
        (MAE, STATISTICS, HEADS),
        (BOTH, MAE, {"decoder"}),
        (MAE | {"model": {"decoder_num_hidden_layers": 2}}, MAE, {"decoder"}),
        (MAE | {"model": {"decoder_num_attention_heads": 6}}, MAE, {"decoder"}),
    ],
)
def test_common_parts_are_loaded_and_others_are_random(
    tmp_path: Path, earlier: dict, now: dict, random: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = publish(tmp_path / "first", **earlier)
    second = build(2, initial=str(tmp_path / "first"), **now)
    assert equal(second.encoder, first.encoder)
    shared = {name for name, _ in second.model.named_children() if hasattr(first.model, name)} - random
    assert all(equal(getattr(second.model, name), getattr(first.model, name)) for name in shared)
    if now["objective"] != "mae":
        assert "student" in shared or equal(second.trained_encoder, first.encoder)
        assert not random >= HEADS or equal(second.model.student_head, second.model.teacher_head)
    warned = {name for record in caplog.records for name in str(record.args[-1]).split(", ")}
    assert warned == random


def test_different_encoder_is_refused_with_its_differences(tmp_path: Path) -> None:
    source = str(tmp_path / "first")
    publish(tmp_path / "first", **MAE)
    with pytest.raises(WarmStartError) as error:
        build(2, initial=source, **SIMDINO, model={"rope_theta": 50, "num_hidden_layers": 3})
    assert error.value.differences == {"num_hidden_layers": (2, 3), "rope_theta": (100.0, 50)}
    assert source in str(error.value)


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WarmStartError) as error:
        build(2, initial=str(tmp_path))
    assert error.value.source == str(tmp_path)
