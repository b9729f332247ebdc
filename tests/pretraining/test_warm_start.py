"""What a run begins with, from checkpoints of other runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_objectives import TINY
from torch import Tensor, nn

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.pretraining.checkpoints import save_checkpoint
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import RunConfig


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
    """A run of these settings that ended: all its weights are others than any run begins with."""
    objective = build(1, **settings)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_()
    save_checkpoint(folder, objective, objective.state_dict(), M3RetImageProcessor(size=32), "", {})
    return objective


def learned(part: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in part.state_dict().items() if not name.startswith("whitening.")}


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = learned(one), learned(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("earlier", "now", "anew"),
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
def test_all_that_both_runs_have_is_taken_over(
    tmp_path: Path, earlier: dict, now: dict, anew: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = publish(tmp_path / "first", **earlier)
    second = build(2, initial=str(tmp_path / "first"), **now)
    assert equal(second.encoder, first.encoder)
    shared = {name for name, _ in second.model.named_children() if hasattr(first.model, name)} - anew
    assert all(equal(getattr(second.model, name), getattr(first.model, name)) for name in shared)
    if now["objective"] != "mae":
        assert "student" in shared or equal(second.learned, first.encoder)
        assert not anew >= HEADS or equal(second.model.student_head, second.model.teacher_head)
    told = caplog.text.partition("begun anew: ")[2].strip()
    assert {name for name in told.split(", ") if name} == anew


def test_another_encoder_is_refused_with_what_differs(tmp_path: Path) -> None:
    publish(tmp_path / "first", **MAE)
    with pytest.raises(ValueError, match=r"rope_theta: 100\.0 in the checkpoint, 50 now"):
        build(2, initial=str(tmp_path / "first"), **SIMDINO, model={"rope_theta": 50})
    with pytest.raises(ValueError, match="num_hidden_layers: 2 in the checkpoint, 3 now"):
        build(2, initial=str(tmp_path / "first"), **MAE, model={"num_hidden_layers": 3})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found no config\.json and no model\.safetensors"):
        build(2, initial=str(tmp_path / "empty"))
