"""Outputs of both models: all fields, as tuples, with gradients, and gathered by Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from packs import largest_difference, make_model, make_scans, pack
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_m3ret import M3RetForPreTraining


RECORD = {"output_hidden_states": True, "output_attentions": True}


def make_pretraining() -> M3RetForPreTraining:
    torch.manual_seed(0)
    return M3RetForPreTraining(tiny_config(attn_implementation="eager")).eval()


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_image_features_are_an_output_with_the_embedding(pooling: str) -> None:
    model = make_model("eager", pooling=pooling)
    for inputs in ((torch.rand(2, 3, 32, 48),), pack(make_scans())):
        output = model.get_image_features(*inputs, **RECORD)
        assert isinstance(output, BaseModelOutputWithPooling)
        forward = model(*inputs, **RECORD)
        assert torch.equal(output.last_hidden_state, forward.last_hidden_state)
        assert largest_difference(output.pooler_output, model.embed_scans(*inputs)) <= 1e-6
        assert largest_difference(output.pooler_output.norm(dim=1), torch.ones(len(output.pooler_output))) <= 1e-6
        assert len(output.hidden_states) == len(forward.hidden_states) == 4
        assert len(output.attentions) == 3
        as_tuple = model.get_image_features(*inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[1], output.pooler_output)


@torch.no_grad()
def test_models_run_with_return_dict_false_in_the_config() -> None:
    for model in (make_model(), make_pretraining()):
        model.config.return_dict = False
        for inputs in ((torch.rand(2, 3, 32, 48),), pack(make_scans())):
            assert isinstance(model(*inputs), tuple)
    model = make_model()
    expected = model.embed_scans(torch.ones(1, 3, 32, 32))
    model.config.return_dict = False
    assert torch.equal(model.embed_scans(torch.ones(1, 3, 32, 32)), expected)
    assert torch.equal(model.get_image_features(torch.ones(1, 3, 32, 32))[1], expected)


@pytest.mark.parametrize("make", [lambda: make_model("eager"), make_pretraining])
def test_recorded_states_of_dense_input_keep_their_gradients(make: Any) -> None:
    output = make()(torch.rand(2, 3, 32, 48), **RECORD)
    recorded = [*output.hidden_states, *output.attentions]
    for state in recorded:
        state.retain_grad()
    result = output.loss if "loss" in output else output.pooler_output.sum()
    if "last_hidden_state" in output:
        output.last_hidden_state.retain_grad()
        recorded.append(output.last_hidden_state)
    result.backward()
    assert all(state.grad is not None and state.grad.any() for state in recorded)


@torch.no_grad()
def test_pretraining_records_the_states_of_visible_patches() -> None:
    model = make_pretraining()
    images, noise = torch.rand(2, 3, 32, 64), torch.rand(2, 8)
    output = model(images, noise=noise, **RECORD)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 5 + 2, 48)] * 4  # 3 of 4 patches are masked
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 7, 7)] * 3
    assert (output.weight.dtype, output.weight.shape, int(output.weight)) == (torch.int64, (), 2)
    # the states of each scan alone, with its own noise
    for index in range(2):
        alone = model(images[index : index + 1], noise=noise[index], **RECORD)
        for in_batch, single in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert largest_difference(in_batch[index], single[0]) <= 1e-5
    rows, grids = pack(make_scans())
    packed = model(rows, grids, noise=torch.rand(len(rows)), **RECORD)
    visible = (grids.prod(-1) - (0.75 * grids.prod(-1)).round().long()).clamp(min=1) + 5
    assert [len(state) for state in packed.hidden_states] == [int(visible.sum())] * 4
    assert [weights.shape[-1] for weights in packed.attentions[0]] == visible.tolist()


def test_wrong_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="8 numbers"):
        make_pretraining()(torch.rand(1, 3, 32, 64), noise=torch.rand(7))


@pytest.mark.slow
def test_trainer_trains_evaluates_predicts_and_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = [{"pixel_values": torch.rand(3, 32, 32)} for _ in range(6)]

    def trainer(steps: int) -> Trainer:
        settings = {"save_steps": 2, "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        settings |= {"per_device_eval_batch_size": 4, "report_to": [], "use_cpu": True, "label_names": ["pixel_values"]}
        arguments = TrainingArguments(str(tmp_path), **settings)
        return Trainer(M3RetForPreTraining(tiny_config()), arguments, train_dataset=images, eval_dataset=images)

    first = trainer(2)
    first.train()
    assert 0 < first.evaluate()["eval_loss"] < 10
    predicted = first.predict(images)
    logits, masked, weight = predicted.predictions
    assert logits.shape == (6 * 3, 3072)
    assert masked.shape == (6 * 3,)
    assert weight.tolist() == [4, 2]  # scans of each batch
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
