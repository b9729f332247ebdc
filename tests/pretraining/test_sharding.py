"""FSDP2 beside DDP: the same objectives on the same packs by the same two processes, over gloo."""

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
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser, set_schedule
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.sharding import clip_gradient, prepare_training, whole_encoder
from modeling_m3ret.pretraining.training_state import STATE_FOLDER, Progress, gather_state, restore_state, write_state


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 36,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "drop_path_rate": 0.25,  # of 4 views a scan each branch leaves some out
}
CASES: dict[str, dict[str, Any]] = {
    "mae": {"objective": "mae", "accumulate": 2},
    "simdino": {"objective": "simdino"},
    "simdino with patches": {"objective": "simdino", "patch_weight": 1.0, "gradient_checkpointing": True},
    "mae+simdino": {"objective": "mae+simdino"},
    "mae+simdino in bfloat16": {"objective": "mae+simdino", "precision": "bf16"},
    "clipped": {"objective": "mae", "gradient_clip": 0.01},
}
STEPS = 3


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
    """A few steps as `train.py` makes them, and everything that came out of them on this rank.

    With a `checkpoint` it is gone on with from the step `first`, or written after the step `last`.
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
    held = sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in parameters)
    stream = torch.get_rng_state()
    encoder = whole_encoder(objective.encoder)
    assert torch.equal(stream, torch.get_rng_state())  # measuring changes nothing in what is trained
    encoder.whitening.fit(torch.randn(80, encoder.config.pooled_size))
    saved = gather_state(accelerator, model, optimiser.optimizer).weights
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "weights": state.weights,
        "optimiser": state.optimiser,
        "held": held / sum(value.numel() for value in parameters),
        "encoder": dict(encoder.state_dict()),
        "encoder_in": f"model.{objective.encoder_name}.",
        "saved": saved,
    }


def rank(number: int, folder: str) -> None:
    trained = {name: [train(run_config(**case), sharded) for sharded in (False, True)] for name, case in CASES.items()}
    config, checkpoint = run_config(objective="simdino"), Path(folder) / "checkpoint"
    train(config, sharded=False, last=2, checkpoint=checkpoint)
    trained["from DDP"] = [trained["simdino"][0], train(config, sharded=True, first=2, checkpoint=checkpoint)]
    torch.save(trained, Path(folder) / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has of each case, under DDP and under FSDP2."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks(rank, 2, str(folder))
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def relative_error(mine: torch.Tensor, truth: torch.Tensor) -> float:
    return ((mine.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_whole_weights_are_those_of_ddp(ranks: list[dict[str, Any]], case: str) -> None:
    """To float32 rounding: the same operations, but the norm and some sums are added in another order.

    Of packs of 12 and 8 scans, each scan weighing the same, so that the mean over ranks and the part of a rank count.
    1e-5 leaves room for the steps of AdamW, which normalise a gradient however small; 4e-6 was the most seen. DDP's
    norm itself, of four million weights added up in float32, is off by 1e-5.
    """
    for ddp, fsdp2 in (of_rank[case] for of_rank in ranks):
        assert relative_error(fsdp2["losses"], ddp["losses"]) <= 1e-5
        assert relative_error(fsdp2["norms"], ddp["norms"]) <= 5e-5
    ddp, fsdp2 = ranks[0][case]  # what is gathered, is on the main process
    assert not ranks[1][case][1]["weights"]
    for gathered in ("weights", "optimiser"):
        assert fsdp2[gathered].keys() == ddp[gathered].keys()
        for name, truth in ddp[gathered].items():
            assert fsdp2[gathered][name].dtype == truth.dtype == torch.float32
            assert relative_error(fsdp2[gathered][name], truth) <= 1e-5, name
    clipped = CASES[case].get("gradient_clip", 1e3)
    assert (ddp["norms"] > clipped).all() == (case == "clipped")
    if "simdino" in case:  # the teacher is compared too, and has moved away from its student
        student, teacher = (fsdp2["weights"][f"model.{who}_head.layers.0.weight"] for who in ("student", "teacher"))
        assert not torch.equal(student, teacher)


def test_a_run_goes_on_under_fsdp2_from_a_checkpoint_of_ddp(ranks: list[dict[str, Any]]) -> None:
    """Two steps under DDP and one under FSDP2, from weights, moments and random numbers, beside three under DDP."""
    for ddp, fsdp2 in (of_rank["from DDP"] for of_rank in ranks):
        assert len(fsdp2["losses"]) == 1
        assert relative_error(fsdp2["losses"][0], ddp["losses"][2]) <= 1e-5
    ddp, fsdp2 = ranks[0]["from DDP"]
    for gathered in ("weights", "optimiser"):
        assert fsdp2[gathered].keys() == ddp[gathered].keys()
        for name, truth in ddp[gathered].items():
            assert relative_error(fsdp2[gathered][name], truth) <= 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half_and_can_embed_with_the_whole(ranks: list[dict[str, Any]], case: str) -> None:
    for ddp, fsdp2 in (of_rank[case] for of_rank in ranks):
        assert ddp["held"] == 1
        assert 0.49 <= fsdp2["held"] <= 0.51
    for mode in range(2):
        prefix, gathered, saved = (ranks[0][case][mode][key] for key in ("encoder_in", "weights", "saved"))
        of_main, of_other = (of_rank[case][mode]["encoder"] for of_rank in ranks)
        assert of_main.keys() == of_other.keys()
        for name, value in of_main.items():
            assert torch.equal(value, saved[prefix + name])  # with the whitening, fitted after the training
            if not name.startswith("whitening."):
                assert torch.equal(value, gathered[prefix + name])
                assert torch.equal(value, of_other[name])
        matrix = of_main["whitening.matrix"]
        assert not torch.equal(matrix, torch.eye(*matrix.shape))


def test_the_whole_encoder_costs_no_memory_where_nothing_is_sharded() -> None:
    encoder = M3RetModel(tiny_config()).train()
    whole = whole_encoder(encoder)
    assert not whole.training
    assert encoder.training
    mine, theirs = (dict(model.state_dict()) for model in (whole, encoder))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    scans = torch.rand(2, 3, 32, 32)
    assert torch.equal(whole.get_image_features(scans), encoder.eval().get_image_features(scans))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version: found 1, expected 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: found true, expected false"),
        ({"activation_checkpointing": True}, "the run's gradient_checkpointing keeps it"),
    ],
)
def test_settings_that_would_train_something_else_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set by the plugin, and read by transformers
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | setting)
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        prepare_training(accelerator, model, torch.optim.AdamW(model.parameters()))
