"""FSDP2 and DDP give the same result: the same objectives on the same packs in two processes, over gloo."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsdp_on_cpu
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from conftest import tiny_config
from processes import in_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from modeling_m3ret import M3RetModel
from modeling_m3ret.errors import InputError
from modeling_m3ret.pretraining.adapters import merge_adapters
from modeling_m3ret.pretraining.distributed import (
    LaunchError,
    check_process_count,
    clip_gradient,
    decide_on_main,
    gather_encoder,
    prepare_training,
)
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser, set_schedule
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.training_state import STATE_FOLDER, Progress, gather_state, restore_state, write_state


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 36,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "drop_path_rate": 0.25,
}
CASES: dict[str, dict[str, Any]] = {
    "mae": {"objective": "mae", "accumulate": 2},
    "simdino": {"objective": "simdino"},
    "simdino with patches": {"objective": "simdino", "patch_weight": 1.0, "gradient_checkpointing": True},
    "mae+simdino": {"objective": "mae+simdino"},
    "mae+simdino in bfloat16": {"objective": "mae+simdino", "precision": "bf16"},
    "simdino with adapters": {"objective": "simdino", "lora_rank": 2, "learning_rate": 1e-3},
    "clipped": {"objective": "mae", "gradient_clip": 0.01},
}
STEPS = 2


def run_config(**settings: Any) -> RunConfig:
    defaults = {"preset": "vitt", "model": SIZES, "steps": 10, "local_views": 2, "learning_rate": 1e-2}
    momentum = {"teacher_momentum": 0.9} if "simdino" in settings["objective"] else {}
    return RunConfig(**defaults | momentum | {"gradient_clip": 1e3} | settings)


def accelerator_of(sharded: bool, precision: str | None) -> Accelerator:
    fsdp_on_cpu.state.AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["M3RetLayer"]
    )
    return Accelerator(cpu=True, mixed_precision=precision, fsdp_plugin=plugin if sharded else None)


def train(
    config: RunConfig, sharded: bool, first: int = 0, last: int = STEPS, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train a few steps as `train.py` does, and return everything that results on this rank.

    With a `checkpoint`, training resumes from it if `first` is not 0, and saves to it otherwise.
    """
    accelerator = accelerator_of(sharded, config.precision)
    assert accelerator.is_fsdp2 == sharded
    torch.manual_seed(0)
    objective, _ = build_objective(config)
    model, optimiser = prepare_training(accelerator, objective, build_optimiser(objective, config))
    model.train()
    torch.manual_seed(10 + accelerator.process_index)
    if checkpoint and first:
        weights = load_file(checkpoint / "weights.safetensors")
        restore_state(checkpoint, weights, accelerator, model, optimiser.optimizer)
    losses, norms = [], []
    for step in range(first, last):
        set_schedule(optimiser, config, step, 2)
        for pack in range(config.accumulate):
            grids = torch.tensor([[1, 3, 3], [1, 3, 3], [1, 2, 2], [1, 2, 2]] * (3 - accelerator.process_index))
            rows, noise = torch.randn(int(grids.prod(-1).sum()), 3072), torch.rand(int(grids.prod(-1).sum()))
            is_last = pack == config.accumulate - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, _ = model(rows, grids, noise)
                accelerator.backward(loss / config.accumulate)
            losses.append(loss.detach())
        norms.append(clip_gradient(accelerator, model, config.gradient_clip))
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(step, config.steps)
    state = gather_state(accelerator, model, optimiser.optimizer)
    if checkpoint and not first and accelerator.is_main_process:
        write_state(checkpoint / STATE_FOLDER, state, Progress(last), config, [], accelerator.num_processes)
        save_file(state.weights, checkpoint / "weights.safetensors")
    parameters = list(objective.parameters())
    local = sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in parameters)
    stream = torch.get_rng_state()
    encoder = gather_encoder(objective.encoder)
    assert torch.equal(stream, torch.get_rng_state())  # evaluation does not affect training
    encoder.whitening.fit(torch.randn(80, encoder.config.pooled_size))
    saved = gather_state(accelerator, model, optimiser.optimizer).weights
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "weights": state.weights,
        "optimiser": state.optimiser,
        "local_fraction": local / sum(value.numel() for value in parameters),
        "encoder": dict(encoder.state_dict()),
        "encoder_in": f"model.{objective.encoder_name}.",
        "saved": saved,
    }


def rank(number: int, folder: str) -> None:
    trained = {name: [train(run_config(**case), sharded) for sharded in (False, True)] for name, case in CASES.items()}
    config, checkpoint = run_config(objective="simdino"), Path(folder) / "checkpoint"
    train(config, sharded=False, last=1, checkpoint=checkpoint)
    trained["from DDP"] = [trained["simdino"][0], train(config, sharded=True, first=1, checkpoint=checkpoint)]
    torch.save(trained, Path(folder) / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two ranks for each case, under DDP and under FSDP2."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks(rank, 2, str(folder))
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def relative_error(mine: torch.Tensor, truth: torch.Tensor) -> float:
    return ((mine.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gathered_weights_equal_those_of_ddp(ranks: list[dict[str, Any]], case: str) -> None:
    """Equal up to float32 rounding: the norm and some sums are computed in another order.

    The ranks have packs of 12 and 8 views, so rank weights matter. The largest difference seen was 4e-6, because AdamW
    normalises small gradients. DDP's own norm, a float32 sum over four million weights, has an error of 1e-5.
    """
    for ddp, fsdp2 in (of_rank[case] for of_rank in ranks):
        assert relative_error(fsdp2["losses"], ddp["losses"]) <= 1e-5
        assert relative_error(fsdp2["norms"], ddp["norms"]) <= 5e-5
    ddp, fsdp2 = ranks[0][case]  # gathered on the main rank
    assert not ranks[1][case][1]["weights"]
    for gathered in ("weights", "optimiser"):
        assert fsdp2[gathered].keys() == ddp[gathered].keys()
        for name, truth in ddp[gathered].items():
            assert fsdp2[gathered][name].dtype == truth.dtype == torch.float32
            assert relative_error(fsdp2[gathered][name], truth) <= 1e-5, name
    clipped = CASES[case].get("gradient_clip", 1e3)
    assert (ddp["norms"] > clipped).all() == (case == "clipped")
    if "simdino" in case:  # otherwise the comparison of the teacher would prove nothing
        student, teacher = (fsdp2["weights"][f"model.{who}_head.layers.0.weight"] for who in ("student", "teacher"))
        assert not torch.equal(student, teacher)


@pytest.mark.slow
def test_fsdp2_resumes_from_a_checkpoint_of_ddp(ranks: list[dict[str, Any]]) -> None:
    """One step under DDP and one under FSDP2 equal two under DDP."""
    for ddp, fsdp2 in (of_rank["from DDP"] for of_rank in ranks):
        assert len(fsdp2["losses"]) == 1
        assert relative_error(fsdp2["losses"][0], ddp["losses"][1]) <= 1e-5
    ddp, fsdp2 = ranks[0]["from DDP"]
    for gathered in ("weights", "optimiser"):
        assert fsdp2[gathered].keys() == ddp[gathered].keys()
        for name, truth in ddp[gathered].items():
            assert relative_error(fsdp2[gathered][name], truth) <= 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half_of_the_weights_and_gathers_the_whole_encoder(
    ranks: list[dict[str, Any]], case: str
) -> None:
    for ddp, fsdp2 in (of_rank[case] for of_rank in ranks):
        assert ddp["local_fraction"] == 1
        assert 0.49 <= fsdp2["local_fraction"] <= 0.51
    for mode in range(2):
        prefix = ranks[0][case][mode]["encoder_in"]
        gathered, saved = (merge_adapters(ranks[0][case][mode][key]) for key in ("weights", "saved"))
        of_main, of_other = (of_rank[case][mode]["encoder"] for of_rank in ranks)
        assert of_main.keys() == of_other.keys()
        for name, value in of_main.items():
            assert torch.equal(value, saved[prefix + name])  # including the whitening, which was fitted after training
            if not name.startswith("whitening."):
                assert torch.equal(value, gathered[prefix + name])
                assert torch.equal(value, of_other[name])
        matrix = of_main["whitening.matrix"]
        assert not torch.equal(matrix, torch.eye(*matrix.shape))


def decide(number: int, folder: str) -> None:
    accelerator = Accelerator(cpu=True)

    def refuse() -> None:
        raise InputError(f"rank {number} refuses")

    decided = decide_on_main(accelerator, lambda: {"score": 0.5 + number})  # ranks may round differently
    try:
        problem = decide_on_main(accelerator, refuse)
    except InputError as error:
        problem = str(error)
    torch.save((decided, problem), Path(folder) / f"decided-{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_main_rank_decides_and_refuses_for_all(tmp_path: Path) -> None:
    in_ranks(decide, 2, str(tmp_path))
    for number in range(2):
        decided = torch.load(tmp_path / f"decided-{number}.pt", weights_only=True)
        assert decided == ({"score": 0.5}, "rank 0 refuses")


def test_gathered_encoder_shares_its_memory_if_nothing_is_sharded() -> None:
    encoder = M3RetModel(tiny_config()).train()
    whole = gather_encoder(encoder)
    assert not whole.training
    assert encoder.training
    mine, theirs = (dict(model.state_dict()) for model in (whole, encoder))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    scans = torch.rand(2, 3, 32, 32)
    assert torch.equal(whole.embed_scans(scans), encoder.eval().embed_scans(scans))


@pytest.mark.parametrize(
    "setting", [{"fsdp_version": 1}, {"cpu_ram_efficient_loading": True}, {"activation_checkpointing": True}]
)
def test_fsdp_settings_that_would_change_the_result_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it, transformers reads it
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | setting)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(LaunchError) as error:
        prepare_training(accelerator, model, torch.optim.AdamW(model.parameters()))
    assert error.value.setting.removeprefix("fsdp_") in next(iter(setting))


@pytest.mark.parametrize(
    ("added", "processes", "is_refused"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, 1, True),  # `accelerate launch --cpu --num_processes 2`
        ({}, 1, False),  # `accelerate launch --cpu --num_processes 1`
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, 2, False),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, 1, False),  # torchrun --nproc_per_node 1
    ],
)
def test_one_process_instead_of_several_is_refused(
    monkeypatch: pytest.MonkeyPatch, added: dict[str, str], processes: int, is_refused: bool
) -> None:
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"ACCELERATE_MIXED_PRECISION": "no"} | added).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) if is_refused else contextlib.nullcontext():
        check_process_count(processes)
