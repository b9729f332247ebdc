"""The classification head and the collator of packs: losses, checkpoints, remote code, Trainer and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_config
from packs import largest_difference, make_scans, pack
from remote_code import run_new_process
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from modeling_m3ret import (
    M3RetCollator,
    M3RetForImageClassification,
    M3RetForPreTraining,
    M3RetImageProcessor,
    M3RetModel,
)
from modeling_m3ret.pretraining.checkpoints import write_checkpoint
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import RunConfig


PROCESSOR = M3RetImageProcessor(size=32, num_frames=8)
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def make_classifier(**overrides: Any) -> M3RetForImageClassification:
    """Return a classifier whose whitening is fitted."""
    torch.manual_seed(0)
    model = M3RetForImageClassification(tiny_config(**{"num_labels": 3} | overrides)).eval()
    model.m3ret.whitening.fit(torch.randn(200, model.config.pooled_size))
    return model


def make_arrays(count: int = 6) -> list[np.ndarray]:
    """Return images and volumes of different sizes in turn; those of odd index are brighter."""
    random = np.random.default_rng(0)
    shapes = [(40, 50), (9, 30, 30), (64, 32)]
    return [
        (random.random(shapes[n % 3]) * 100 + 155 * (n // 3 % 2)).astype(np.uint8).astype(np.float32) / 255
        for n in range(count)
    ]


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_logits_are_linear_in_whitened_features_and_do_not_depend_on_the_batch(pooling: str) -> None:
    model = make_classifier(pooling=pooling)
    head, encoder = model.classifier, model.m3ret
    for inputs in ((torch.rand(2, 3, 32, 48),), pack(make_scans())):
        features = (encoder(*inputs).pooler_output - encoder.whitening.mean) @ encoder.whitening.matrix.T
        assert largest_difference(model(*inputs).logits, features @ head.weight.T + head.bias) <= 1e-5
    alone = torch.cat([model(*pack([scan])).logits for scan in make_scans()])
    assert largest_difference(model(*pack(make_scans())).logits, alone) <= 1e-5


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels", "expected"),
    [
        (None, 3, torch.tensor([2, 0]), cross_entropy),
        (None, 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), binary_cross_entropy_with_logits),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), binary_cross_entropy_with_logits),
        (None, 1, torch.tensor([0.5, -2.0]), lambda logits, labels: mse_loss(logits[:, 0], labels)),
        ("regression", 2, torch.tensor([[0.5, 1], [2, 3]]), mse_loss),
    ],
)
def test_loss_follows_the_problem_type(problem: str | None, num_labels: int, labels: Tensor, expected: Any) -> None:
    model = make_classifier(num_labels=num_labels, problem_type=problem)
    output = model(torch.rand(2, 3, 32, 32), labels=labels)
    assert largest_difference(output.loss, expected(output.logits, labels)) <= 1e-6
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_recorded_states_are_those_of_the_encoder() -> None:
    model = make_classifier(attn_implementation="eager")
    record = {"output_hidden_states": True, "output_attentions": True}
    for inputs in ((torch.rand(2, 3, 32, 48),), pack(make_scans())):
        output, encoded = model(*inputs, **record), model.m3ret(*inputs, **record)
        assert [torch.equal(*pair) for pair in zip(output.hidden_states, encoded.hidden_states, strict=True)] == [
            True
        ] * 4
        assert len(output.attentions) == 3
        assert model(*inputs).hidden_states is None
        as_tuple = model(*inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
def test_classifier_loads_from_every_kind_of_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pretraining = M3RetForPreTraining(tiny_config()).eval()
    encoder = pretraining.m3ret
    encoder.whitening.fit(torch.randn(200, 48))
    encoder.save_pretrained(tmp_path / "encoder")
    pretraining.save_pretrained(tmp_path / "pretraining")
    names = {"id2label": {0: "normal", 1: "pneumonia"}, "label2id": {"normal": 0, "pneumonia": 1}}
    inputs = pack(make_scans())
    for folder in ("encoder", "pretraining"):
        model, info = AutoModelForImageClassification.from_pretrained(
            tmp_path / folder, output_loading_info=True, **names
        )
        assert type(model) is M3RetForImageClassification
        assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert (model.num_labels, model.config.id2label) == (2, names["id2label"])
        assert torch.equal(model.eval().m3ret.embed_scans(*inputs), encoder.embed_scans(*inputs))

    model.save_pretrained(tmp_path / "tuned")
    tuned, info = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tuned.config.label2id == names["label2id"]
    assert torch.equal(tuned.eval()(*inputs).logits, model(*inputs).logits)
    again = AutoModel.from_pretrained(tmp_path / "tuned").eval()
    assert type(again) is M3RetModel
    assert torch.equal(again.embed_scans(*inputs), encoder.embed_scans(*inputs))


REMOTE = """
import json, sys
import numpy, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, output = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
Collator = get_class_from_dynamic_module("image_processing_m3ret.M3RetCollator", folder)
scans = [numpy.load(f"{output}/{n}.npy") for n in range(6)]
batch = Collator()([{**processor(scan), "label": n % 3} for n, scan in enumerate(scans)])
options = {"num_labels": 3, "trust_remote_code": True}
printed = {"packages": [name for name in sys.modules if name.split(".")[0] == "modeling_m3ret"]}
for subfolder in ("", "pretraining"):
    model = AutoModelForImageClassification.from_pretrained(folder, subfolder=subfolder, **options).eval()
    torch.nn.init.ones_(model.classifier.weight)
    model.save_pretrained(output + "/tuned" + subfolder)
    again = AutoModelForImageClassification.from_pretrained(output + "/tuned" + subfolder, trust_remote_code=True)
    with torch.no_grad():
        first, second = model(**batch), again.eval()(**batch)
    printed[subfolder] = {
        "module": type(model).__module__, "loss": float(first.loss),
        "logits": first.logits.tolist(), "again": second.logits.tolist(),
    }
print(json.dumps(printed))
"""


@pytest.mark.slow
def test_checkpoint_alone_has_head_and_collator(tmp_path: Path) -> None:
    built, _ = build_objective(RunConfig(objective="mae", preset="vitt", model=TINY))
    folder, arrays = tmp_path / "m3ret-tiny", make_arrays()
    write_checkpoint(folder, built, built.state_dict(), PROCESSOR, "# card", {})
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    ran = run_new_process(REMOTE, tmp_path, str(folder), str(tmp_path))
    assert ran["packages"] == []
    for subfolder in ("", "pretraining"):
        remote = ran[subfolder]
        assert remote["module"].startswith("transformers_modules.")
        assert remote["again"] == remote["logits"]
        model = AutoModelForImageClassification.from_pretrained(tmp_path / f"tuned{subfolder}").eval()
        with torch.no_grad():
            output = model(**PROCESSOR(arrays), labels=torch.arange(6) % 3)
        assert largest_difference(torch.tensor(remote["logits"]), output.logits) <= 1e-5
        assert remote["loss"] == pytest.approx(float(output.loss), abs=1e-5)


def test_collated_items_are_the_pack_of_all_scans() -> None:
    arrays = make_arrays()
    expected = PROCESSOR(arrays)
    as_tensors = [dict(PROCESSOR(array)) for array in arrays]
    as_arrays = [dict(PROCESSOR(array, return_tensors="np")) for array in arrays]
    as_lists = [{name: value.tolist() for name, value in item.items()} for item in as_tensors]
    for items in (as_tensors, as_arrays, as_lists):
        batch = M3RetCollator()(items)
        assert list(batch) == ["grid_thw", "pixel_values"]
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["grid_thw"], expected["grid_thw"])
    half = M3RetCollator()([{**item, "pixel_values": item["pixel_values"].half()} for item in as_tensors])
    assert half["pixel_values"].dtype == torch.float16


def test_batched_map_stores_what_a_map_of_each_scan_stores() -> None:
    arrays = make_arrays(5)
    table = datasets.Dataset.from_dict({"number": range(5), "label": [0, 1, 0, 1, 0]})
    singly = table.map(lambda row: dict(PROCESSOR(arrays[row["number"]])), remove_columns="number")
    batched = table.map(
        lambda rows: PROCESSOR([arrays[number] for number in rows["number"]], return_tensors=None),
        batched=True,
        batch_size=2,
        remove_columns="number",
    )
    assert batched.features == singly.features
    assert batched.to_dict() == singly.to_dict()
    for given in (batched, batched.with_format("torch")):
        assert torch.equal(M3RetCollator()(list(given))["pixel_values"], PROCESSOR(arrays)["pixel_values"])


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("label", [1, 0], torch.tensor([1, 0])),
        ("labels", [np.int64(1), np.int64(0)], torch.tensor([1, 0])),
        ("label", [0.5, 2.0], torch.tensor([0.5, 2.0])),
        ("labels", [[1.0, 0.0], [0.0, 1.0]], torch.tensor([[1.0, 0], [0, 1]])),
        ("labels", [torch.tensor(1), torch.tensor(0)], torch.tensor([1, 0])),
    ],
)
def test_labels_are_collated_as_in_transformers(column: str, values: list[Any], expected: Tensor) -> None:
    arrays = make_arrays(2)
    items = [{**PROCESSOR(array), column: value, "file": "a.dcm"} for array, value in zip(arrays, values, strict=True)]
    batch = M3RetCollator()(items)
    assert list(batch) == ["grid_thw", "pixel_values", "labels"]
    assert torch.equal(batch["labels"], expected)
    assert batch["labels"].dtype == expected.dtype


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"pixel_values": torch.zeros(4, 3072)},
        {"pixel_values": torch.zeros(4, 3072), "grid_thw": None},
        {"pixel_values": torch.zeros(4, 3072), "grid_thw": torch.ones(4, 3, dtype=torch.int64)},
        {"pixel_values": torch.zeros(3, 3072), "grid_thw": torch.tensor([[1, 2, 2]])},
        {"pixel_values": torch.zeros(3, 32, 32), "grid_thw": torch.tensor([[1, 2, 2]])},
    ],
)
def test_collator_names_the_item_that_is_not_one_scan(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="item 1 "):
        M3RetCollator()([dict(PROCESSOR(make_arrays(1)[0])), wrong])


def trainer(model: Any, data: Any, folder: Path, **options: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "report_to": "none"}
    settings |= {"use_cpu": True, "logging_strategy": "no", "disable_tqdm": True, "seed": 0, "save_steps": 3}
    arguments = TrainingArguments(folder, **settings | options)
    accuracy = {"compute_metrics": lambda given: {"accuracy": float((given[0].argmax(1) == given[1]).mean())}}
    return Trainer(model, arguments, M3RetCollator(), data, data, **accuracy)


@pytest.fixture
def mapped() -> datasets.Dataset:
    """Return the output of `datasets.map`: scans of different sizes, two classes of different brightness."""
    table = datasets.Dataset.from_dict({"number": range(12), "label": [n // 3 % 2 for n in range(12)]})
    arrays = make_arrays(12)
    return table.map(lambda row: dict(PROCESSOR(arrays[row["number"]])), remove_columns="number")


@pytest.mark.slow
def test_trainer_learns_evaluates_predicts_and_resumes(tmp_path: Path, mapped: datasets.Dataset) -> None:
    options = {"max_steps": 6, "learning_rate": 3e-3}
    trained = trainer(make_classifier(num_labels=2), mapped, tmp_path / "whole", num_train_epochs=1, **options)
    trained.train()
    metrics = trained.evaluate()
    assert metrics["eval_accuracy"] == 1
    predicted = trained.predict(mapped)
    batch = M3RetCollator()(list(mapped))
    with torch.no_grad():
        expected = trained.model(**batch)
    assert largest_difference(torch.from_numpy(predicted.predictions), expected.logits) <= 1e-5
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), abs=1e-5)

    resumed = trainer(make_classifier(num_labels=2), mapped, tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in trained.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True])
def test_accumulated_steps_equal_one_large_batch(tmp_path: Path, mapped: datasets.Dataset, multi_label: bool) -> None:
    if multi_label:
        mapped = mapped.map(lambda row: {"label": [float(row["label"]), 1.0]})
        mapped = mapped.rename_column("label", "labels")
    weights = []
    for batch_size, steps in ((6, 1), (2, 3)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 2}
        run = trainer(make_classifier(num_labels=2), mapped, tmp_path, optim="sgd", learning_rate=0.1, **options)
        run.train()
        weights.append(run.model.classifier.weight)
    assert largest_difference(*weights) <= 1e-5


@pytest.mark.slow
def test_lora_trains_and_loads_with_its_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make_classifier().m3ret.save_pretrained(tmp_path / "encoder")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "encoder", num_labels=2)
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["classifier"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    batch = M3RetCollator()([{**PROCESSOR(array), "label": n % 2} for n, array in enumerate(make_arrays())])
    model(**batch).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trained) == 2 * (1 + 4 * 3)
    assert sum("classifier" in name for name in trained) == 2
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "encoder", num_labels=2)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
        merged = loaded.merge_and_unload()
        assert largest_difference(merged(**batch).logits, model(**batch).logits) <= 1e-4
