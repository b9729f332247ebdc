"""The identity of a model does not depend on where it was loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor

from modeling_m3ret import M3RetConfig, M3RetImageProcessor, M3RetModel
from modeling_m3ret.model_facts import model_facts


@pytest.fixture
def model() -> M3RetModel:
    return M3RetModel(M3RetConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96))


def test_new_saved_and_downloaded_processors_have_one_identity(model: M3RetModel, tmp_path: Path) -> None:
    processor = M3RetImageProcessor(size=48)
    facts = model_facts(model, processor, "ORG/m3ret")
    processor.save_pretrained(tmp_path)
    saved = AutoImageProcessor.from_pretrained(tmp_path)
    assert model_facts(model, saved, str(tmp_path / "m3ret")) == facts
    saved.auto_map = {"AutoImageProcessor": "ORG/m3ret--image_processing_m3ret.M3RetImageProcessor"}  # as from the Hub
    assert model_facts(model, saved, "m3ret") == facts


def test_identity_depends_on_name_weights_and_settings(model: M3RetModel) -> None:
    facts = model_facts(model, M3RetImageProcessor(size=48), "m3ret")
    assert model_facts(model, M3RetImageProcessor(size=64), "m3ret").processor != facts.processor
    assert model_facts(model, M3RetImageProcessor(size=48), "other").model != facts.model
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert model_facts(model, M3RetImageProcessor(size=48), "m3ret").revision != facts.revision
