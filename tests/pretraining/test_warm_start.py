"""Initial weights of a run from the checkpoint of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_objectives import TINY
from torch import Tensor, nn
from vit_sources import IMAGENET, save_source

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.convert import convert_vit
from modeling_m3ret.pretraining.checkpoints import write_checkpoint
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.run_config import ConfigError, RunConfig
from modeling_m3ret.pretraining.warm_start import WarmStartError, read_start


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


@pytest.mark.parametrize(("pooling", "kept"), [("mean", True), ("cls", False)])
def test_whitening_is_loaded_for_the_same_pooling_only(tmp_path: Path, pooling: str, kept: bool) -> None:
    objective = build(1, objective="mae", model={"pooling": "mean"})
    objective.encoder.whitening.fit(torch.randn(100, objective.encoder.config.pooled_size))
    write_checkpoint(tmp_path / "first", objective, objective.state_dict(), M3RetImageProcessor(size=32), "", {})
    second = build(2, objective="mae", initial=str(tmp_path / "first"), model={"pooling": pooling})
    assert torch.equal(second.encoder.whitening.matrix, objective.encoder.whitening.matrix) == kept
    assert second.encoder.whitening.is_identity() == (not kept)


def test_different_encoder_is_refused_with_its_differences(tmp_path: Path) -> None:
    source = str(tmp_path / "first")
    publish(tmp_path / "first", **MAE)
    with pytest.raises(WarmStartError) as error:
        build(2, initial=source, **SIMDINO, model={"rope_theta": 50, "num_hidden_layers": 3})
    assert error.value.differences == {"num_hidden_layers": (2, 3), "rope_theta": (100.0, 50)}
    assert source in str(error.value)


def test_another_kind_of_encoder_is_refused(tmp_path: Path) -> None:
    """Not taken for a checkpoint of ours with other sizes."""
    save_source("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "swin"}))
    with pytest.raises(WarmStartError, match="converted") as error:
        build(2, initial=str(tmp_path), **MAE)
    assert not error.value.differences


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WarmStartError) as error:
        build(2, initial=str(tmp_path))
    assert error.value.source == str(tmp_path)


CONVERTED = ("dinov3_vit gated", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model")


def begin(source: Path, objective: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return build_objective(RunConfig(objective=objective, local_views=1, initial=str(source), **settings))[0]


@pytest.mark.parametrize("objective", ["mae", "simdino", "mae+simdino"])
@pytest.mark.parametrize("kind", CONVERTED)
def test_a_published_encoder_begins_with_its_weights_and_trains(tmp_path: Path, kind: str, objective: str) -> None:
    save_source(kind, tmp_path)
    published, _ = convert_vit(str(tmp_path))
    built = begin(tmp_path, objective, model={"drop_path_rate": 0.1})
    ours, theirs = weights(built.encoder), weights(published)
    assert {name for name in theirs if not name.startswith("pooler.")} <= ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert built.encoder.config.pooling == ("mean" if objective == "mae" else published.config.pooling)
    grids = torch.tensor([[1, 4, 4], [2, 3, 4], [1, 2, 2]] * 2)
    rows = torch.randn(int(grids.prod(-1).sum()), published.config.patch_values)
    loss, _ = built.train()(rows, grids, noise=torch.rand(len(rows)))
    loss.backward()
    trained = [p for p in built.parameters() if p.requires_grad]
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("objective", ["mae", "simdino"])
def test_frozen_layers_and_embeddings_do_not_train(tmp_path: Path, objective: str) -> None:
    save_source("vit", tmp_path)
    built = begin(tmp_path, objective, freeze_layers=1)
    encoder = built.trained_encoder
    first, second = encoder.encoder.layers
    assert not any(p.requires_grad for part in (encoder.embeddings, first) for p in part.parameters())
    assert all(p.requires_grad for part in (second, encoder.norm) for p in part.parameters())
    optimiser = build_optimiser(built, RunConfig(objective=objective, layer_decay=0.5))
    optimised = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in built.parameters() if p.requires_grad}
    with pytest.raises(ConfigError) as error:
        begin(tmp_path, objective, freeze_layers=3)
    assert error.value.key == "freeze_layers"


def test_an_encoder_that_was_converted_keeps_its_architecture(tmp_path: Path) -> None:
    """Also from a checkpoint of ours, whatever the preset; other overrides apply."""
    save_source("dinov3_vit", tmp_path / "source")
    for part in convert_vit(str(tmp_path / "source")):
        part.save_pretrained(tmp_path / "ours")
    run = RunConfig(objective="simdino", preset="vits", local_views=1, initial=str(tmp_path / "ours"))
    start = read_start(run)
    built, config = build_objective(run, start)
    assert (config.hidden_size, config.rotary_axes, config.converted_from) == (32, "shared", "source")
    assert start.statistics["image_mean"] == IMAGENET["image_mean"]
    assert equal(built.encoder, M3RetModel.from_pretrained(tmp_path / "ours"))
    with pytest.raises(WarmStartError) as error:
        begin(tmp_path / "source", "simdino", model={"patch_size": 16})
    assert error.value.differences == {"patch_size": (8, 16)}


def test_preset_initial_takes_the_encoder_of_a_checkpoint(tmp_path: Path) -> None:
    publish(tmp_path / "first", **STATISTICS)
    run = RunConfig(objective="simdino", preset="initial", local_views=1, initial=str(tmp_path / "first"))
    built, config = build_objective(run)
    assert (config.hidden_size, config.pooling) == (TINY["hidden_size"], "statistics")
    assert equal(built.encoder, M3RetModel.from_pretrained(tmp_path / "first"))
    with pytest.raises(ConfigError) as error:
        build_objective(RunConfig(objective="simdino", preset="initial"))
    assert error.value.key == "preset"
