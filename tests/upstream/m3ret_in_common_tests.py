"""The common tests of transformers with dense input, run by `test_transformers_common.py` beside their files."""

from __future__ import annotations

import tempfile
import unittest
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.pipelines import ImageFeatureExtractionPipeline

from modeling_m3ret import (
    M3RetConfig,
    M3RetForImageClassification,
    M3RetForPreTraining,
    M3RetImageProcessor,
    M3RetModel,
)

from .test_configuration_common import ConfigTester
from .test_image_processing_common import ImageProcessingTestMixin, prepare_image_inputs
from .test_modeling_common import ModelTesterMixin, floats_tensor


# the tests look up here which classes take labels
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["m3ret"] = "M3RetForImageClassification"


class ModelTester:
    """Small configuration and inputs, as the testers of transformers' own vision models have them."""

    batch_size, image_size, patch_size, patches, is_training = 3, 32, 16, 4, True
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 36, 2, 3, 72

    def __init__(self, parent: unittest.TestCase, visible: int = 4):
        self.parent = parent
        self.seq_length = 5 + visible  # CLS, registers, and the patches that the encoder sees

    def get_config(self) -> M3RetConfig:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        decoder = {"decoder_hidden_size": 36, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}
        return M3RetConfig(**{name: getattr(self, name) for name in names} | decoder)

    def prepare_config_and_inputs_for_common(self) -> tuple[M3RetConfig, dict[str, Any]]:
        shape = [self.batch_size, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


def check_embeddings(test: Any, model_class: type) -> None:
    """Check as the vision models of transformers do, whose input embedding is no table of words."""
    model = model_class(test.model_tester.get_config())
    assert isinstance(model.get_input_embeddings(), torch.nn.Module)
    assert model.get_output_embeddings() is None


class M3RetModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (M3RetModel,)
    test_resize_embeddings = False
    test_torch_exportable = True

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)
        self.model_tester.is_training = False  # it has no loss
        self.config_tester = ConfigTester(
            self, config_class=M3RetConfig, has_text_modality=False, hidden_size=36, num_attention_heads=3
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        check_embeddings(self, M3RetModel)


class M3RetForImageClassificationTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (M3RetForImageClassification,)
    test_resize_embeddings = False
    test_torch_exportable = True

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)

    def test_model_get_set_embeddings(self) -> None:
        check_embeddings(self, M3RetForImageClassification)


class M3RetForPreTrainingTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (M3RetForPreTraining,)
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = ModelTester(self, visible=1)

    def test_model_get_set_embeddings(self) -> None:
        check_embeddings(self, M3RetForPreTraining)

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        """Fix the mask, as the test of Hiera does."""
        prepared = super()._prepare_for_class(inputs, model_class, return_labels)
        count = prepared["pixel_values"].shape[0] * self.model_tester.patches
        noise = np.random.default_rng(0).random(self.model_tester.patches, dtype=np.float32)
        return prepared | {"noise": torch.from_numpy(np.resize(noise, count)).view(-1, self.model_tester.patches)}


class ImageProcessorTester:
    """Settings and pictures for the image processor's tests."""

    batch_size, num_channels, min_resolution, max_resolution, size = 3, 3, 30, 80, {"height": 32, "width": 32}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def expected_output_image_shape(self, images: Any) -> tuple[int, int, int]:
        return self.num_channels, self.size["height"], self.size["width"]

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return {"size": 32}

    def prepare_image_inputs(
        self, equal_resolution: bool = False, numpify: bool = False, torchify: bool = False
    ) -> list:
        names = ("batch_size", "num_channels", "min_resolution", "max_resolution")
        settings = {name: getattr(self, name) for name in names}
        return prepare_image_inputs(equal_resolution=equal_resolution, numpify=numpify, torchify=torchify, **settings)


class M3RetImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"pil": M3RetImageProcessor}

    def setUp(self) -> None:
        self.image_processing_classes = {"pil": M3RetImageProcessor}
        self.image_processor_tester = ImageProcessorTester(self)

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()


class M3RetPipelineTest(unittest.TestCase):
    """The checks of transformers' test of this task, which is not in its source distribution."""

    def run_pipeline_test(self, dtype: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as folder:
            M3RetModel(ModelTester(self).get_config()).save_pretrained(folder)
            M3RetImageProcessor(size=32).save_pretrained(folder)
            extract = pipeline("image-feature-extraction", model=folder, dtype=dtype)
            assert isinstance(extract, ImageFeatureExtractionPipeline)
            picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
            assert len(extract(picture)) == 1
            assert np.ndim(extract(picture)) == 3
            assert len(extract([picture] * 5, batch_size=2)) == 5

    def test_pipeline_image_feature_extraction(self) -> None:
        self.run_pipeline_test(torch.float32)

    def test_pipeline_image_feature_extraction_fp16(self) -> None:
        self.run_pipeline_test(torch.float16)
