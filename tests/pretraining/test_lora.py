"""Pretraining with adapters: which weights train, merged weights, and resuming."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_runs import ROOT, assert_same_tensors, command, run, write_scans
from vit_sources import save_source

from modeling_m3ret import M3RetModel
from modeling_m3ret.convert import convert_vit
from modeling_m3ret.pretraining.adapters import is_adapter
from modeling_m3ret.pretraining.distributed import gather_encoder
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser, set_schedule
from modeling_m3ret.pretraining.run_config import ConfigError, RunConfig


pytest.importorskip("peft")


def settings(source: Path, objective: str, **options: object) -> RunConfig:
    return RunConfig(
        objective=objective, local_views=1, initial=str(source), lora_rank=2, learning_rate=0.01, **options
    )


def train(built: nn.Module, config: RunConfig, steps: int = 3) -> None:
    optimiser = build_optimiser(built, config)
    grids = torch.tensor([[1, 4, 4], [2, 3, 4], [1, 2, 2]] * 2)
    rows = torch.randn(int(grids.prod(-1).sum()), built.encoder.config.patch_values)
    for step in range(steps):
        set_schedule(optimiser, config, step, processes=1)
        loss, _ = built.train()(rows, grids, noise=torch.rand(len(rows)))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        built.after_step(step, steps)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("objective", ["mae", "simdino", "mae+simdino"])
@pytest.mark.parametrize("kind", ["dinov3_vit gated", "dinov2_with_registers"])
def test_adapters_train_and_the_weights_of_the_encoder_do_not(tmp_path: Path, kind: str, objective: str) -> None:
    save_source(kind, tmp_path)
    source, config = convert_vit(str(tmp_path))[0].state_dict(), settings(tmp_path, objective)
    built, _ = build_objective(config)
    merged = gather_encoder(built.encoder).state_dict()
    assert all(torch.equal(value, source[name]) for name, value in merged.items())  # adapters change nothing at first
    before = copy_of(built)
    train(built, config)
    for name, value in built.state_dict().items():
        is_of_encoder = name.startswith(("model.m3ret.", "model.student.", "model.teacher."))
        if is_of_encoder and not is_adapter(name):
            assert torch.equal(value, before[name]), name
        if is_adapter(name):
            assert not torch.equal(value, before[name]), name
    others = [
        name for name in before if name.endswith("weight") and name.startswith(("model.decoder", "model.student_"))
    ]
    assert others
    assert any(not torch.equal(before[name], built.state_dict()[name]) for name in others)
    encoder = built.encoder.eval()
    images = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        ours, theirs = encoder(images).last_hidden_state, gather_encoder(encoder)(images).last_hidden_state
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("objective", ["mae", "simdino"])
def test_frozen_layers_have_no_adapters(tmp_path: Path, objective: str) -> None:
    save_source("vit", tmp_path)
    config = settings(tmp_path, objective, freeze_layers=1)
    built, _ = build_objective(config)
    adapters = [name for name, _ in built.trained_encoder.named_parameters() if is_adapter(name)]
    assert len(adapters) == 2 * 4
    assert all(name.startswith("encoder.layers.1.") for name in adapters)
    optimised = {id(p) for group in build_optimiser(built, config).param_groups for p in group["params"]}
    assert optimised == {id(p) for p in built.parameters() if p.requires_grad}
    with pytest.raises(ConfigError) as error:
        build_objective(settings(tmp_path, objective, freeze_layers=2))
    assert error.value.key == "lora_rank"


def test_peft_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_source("vit", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft") as error:
        build_objective(settings(tmp_path, "mae"))
    assert error.value.key == "lora_rank"


def test_runs_from_before_this_option_can_be_resumed() -> None:
    ours = RunConfig()
    assert ours.differences({key: value for key, value in vars(RunConfig()).items() if key != "lora_rank"}) == {}
    assert ours.differences(vars(RunConfig(lora_rank=8))) == {"lora_rank": (8, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mae", "simdino"])
def test_a_run_resumes_bit_for_bit_and_its_checkpoint_needs_no_peft(tmp_path: Path, objective: str) -> None:
    scans, script = write_scans(tmp_path), ROOT / "train.py"
    save_source("dinov2", tmp_path / "dinov2-tiny")
    options = {"objective": objective, "model": "{drop_path_rate: 0.1}", "steps": 4, "save_every": 1, "keep_last": 9}
    options |= {"lora_rank": 2, "initial": tmp_path / "dinov2-tiny"}
    run(command(script, scans, "whole", **options), tmp_path)
    run(command(script, scans, "halves", **options, stop_after=2), tmp_path)
    run([*command(script, scans, "halves", **options), "--resume"], tmp_path)
    for step in (2, 4):
        name = f"checkpoints/step-{step:06d}"
        assert_same_tensors(tmp_path / "run-whole" / name, tmp_path / "run-halves" / name)
    trained, info = M3RetModel.from_pretrained(tmp_path / "m3ret-halves", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    published = convert_vit(str(tmp_path / "dinov2-tiny"))[0].state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, published[name])}
    weights = {f"encoder.layers.{layer}.{part}.weight" for layer in (0, 1) for part in ADAPTED}
    assert {name for name in changed if not name.startswith("whitening.")} == weights
    # another run begins with it, with or without adapters
    following = {"initial": tmp_path / "m3ret-halves", "steps": 1, "lora_rank": 0}
    run(command(script, scans, "next", **options | following), tmp_path)


ADAPTED = ("attention.qkv", "attention.out_proj", "mlp.up_proj", "mlp.down_proj")
