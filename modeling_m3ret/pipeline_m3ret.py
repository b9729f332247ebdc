"""Pipelines of the tasks image-feature-extraction and image-classification for scans of any kind.

The standard pipelines open pictures only and clip 16 bits to 8; that of features takes the rows of a pack for the items
of a batch. This file is copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline


# untyped, since their methods declare other types than they return
Standard: Any = object
StandardFeatureExtraction: Any = ImageFeatureExtractionPipeline
StandardClassification: Any = ImageClassificationPipeline


class M3RetScanInputs(Standard):
    """Read the inputs of a pipeline by `M3RetImageProcessor`. The second base class is the standard pipeline."""

    _load_video_processor = False  # guessing one from `input_modalities` asks whether to run remote code

    def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.config.model_type != "m3ret":
            standard: Any = cls.__bases__[1]
            return standard(model, *args, **kwargs)
        return super().__new__(cls)

    def preprocess(self, scan: Any, **image_processor_kwargs: Any) -> Any:
        inputs = self.image_processor([scan], return_tensors="pt", **image_processor_kwargs)
        return inputs.to(self.dtype)


class M3RetFeatureExtractionPipeline(M3RetScanInputs, StandardFeatureExtraction):
    """Extract the features of scans: `pipeline("image-feature-extraction", model=...)(["ct.nii.gz", "chest.dcm"])`.

    An input is a scan of any kind that `M3RetImageProcessor` reads, or a list of scans. Wrap the slices of one DICOM
    series in a list of their own. The result is a list with the features of each scan, also for a single scan: its
    tokens `[L][d]` (CLS, registers, patches), or with `pool` its embedding `[d]`. It does not depend on `batch_size`.

    With the package, the task has this class for every model. Built with another model than M3Ret, it returns the
    standard pipeline.

    Args (of a call):
        pool: return the retrieval embedding of each scan, whitened and of unit length, instead of its tokens.
        return_tensors: return tensors instead of nested lists.
        image_processor_kwargs: arguments of the image processor, for example `{"intensity": "hounsfield"}`.
    """

    def _sanitize_parameters(self, pool: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, _, postprocess = super()._sanitize_parameters(**kwargs)
        preprocess.pop("timeout", None)  # of downloads
        return preprocess, {} if pool is None else {"pool": pool}, postprocess

    def _forward(self, model_inputs: dict[str, Tensor], pool: bool = False) -> dict[str, list[Tensor]]:
        grid_thw = model_inputs["grid_thw"]
        if pool:
            features = list(self.model.embed_scans(model_inputs["pixel_values"], grid_thw))
        else:
            tokens = self.model(model_inputs["pixel_values"], grid_thw, return_dict=True).last_hidden_state
            features = self.model.split_tokens(tokens, grid_thw)
        return {"features": features}  # one item per scan, as the loop over batches expects

    def postprocess(self, model_outputs: dict[str, Any], return_tensors: bool = False) -> Any:
        features = model_outputs["features"][0]  # the loop over batches gives each item a first axis of 1
        return features if return_tensors else features.tolist()

    def run_single(self, inputs: Any, *params: dict) -> Any:
        features = super().run_single(inputs, *params)
        return features[None] if isinstance(features, Tensor) else [features]


class M3RetImageClassificationPipeline(M3RetScanInputs, StandardClassification):
    """Classify scans: `pipeline("image-classification", model=...)(["ct.nii.gz", "chest.dcm"])`.

    Inputs are those of [`M3RetFeatureExtractionPipeline`]. Labels and scores are those of the standard pipeline, a list
    of `{"label", "score"}` for each scan, and do not depend on `batch_size`. With the package, the task has this class
    for every model, and it returns the standard pipeline as the other one does.

    Args (of a call):
        top_k, function_to_apply: as in the standard pipeline.
        image_processor_kwargs: arguments of the image processor, for example `{"intensity": "hounsfield"}`.
    """

    def check_model_type(self, supported_models: Any) -> None:
        """Accept the model: the list of transformers has its own models only."""

    def _sanitize_parameters(
        self, image_processor_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        _, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return dict(image_processor_kwargs or {}), forward, postprocess


__all__ = ["M3RetFeatureExtractionPipeline", "M3RetImageClassificationPipeline"]
