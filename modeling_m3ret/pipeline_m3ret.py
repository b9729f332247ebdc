"""Pipelines of the tasks image-feature-extraction and image-classification for scans of any kind.

The standard pipelines open pictures only and clip 16 bits to 8; that of features takes the rows of a pack for the items
of a batch. This file is copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY
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


def _refuse(unknown: dict[str, Any], known: str) -> None:
    """Raise a TypeError if a pipeline got arguments that it does not have."""
    if unknown:
        raise TypeError(
            f"unknown argument: expected {known}, got {', '.join(unknown)}. Pass arguments of the image processor as "
            "image_processor_kwargs={...}."
        )


class M3RetFeatureExtractionPipeline(M3RetScanInputs, StandardFeatureExtraction):
    """Extract the features of scans: `pipeline("image-feature-extraction", model=...)(["ct.nii.gz", "chest.dcm"])`.

    An input is a scan of any kind that `M3RetImageProcessor` reads, or a list of scans. Wrap the slices of one DICOM
    series in a list of their own. The result is a list with the features of each scan, also for a single scan: its
    tokens `[L][d]` (CLS, registers, patches), or with `pool` its embedding `[d]`. It does not depend on `batch_size`.

    As soon as an M3Ret model is imported, the task has this class for every model. Built with another model than M3Ret,
    it returns the standard pipeline.

    Args (of a call):
        pool: return the retrieval embedding of each scan, whitened and of unit length, instead of its tokens.
        return_tensors: return tensors instead of nested lists.
        image_processor_kwargs: arguments of the image processor, for example `{"intensity": "hounsfield"}`.
    """

    def _sanitize_parameters(
        self,
        pool: bool | None = None,
        return_tensors: bool | None = None,
        image_processor_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,  # of downloads, which there are none of
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        _refuse(unknown, "pool, return_tensors, image_processor_kwargs")
        forward = {} if pool is None else {"pool": pool}
        postprocess = {} if return_tensors is None else {"return_tensors": return_tensors}
        return dict(image_processor_kwargs or {}), forward, postprocess

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
    of `{"label", "score"}` for each scan, and do not depend on `batch_size`. The task has this class for every model,
    and it returns the standard pipeline for others, as the other class does.

    Args (of a call):
        top_k, function_to_apply: as in the standard pipeline.
        image_processor_kwargs: arguments of the image processor, for example `{"intensity": "hounsfield"}`.
    """

    def check_model_type(self, supported_models: Any) -> None:
        """Check that the model has a trained head. Its class is not compared: transformers lists its own models only.

        Raises:
            ValueError: if it is an encoder with a new head, whose scores mean nothing.
        """
        if not self.model.is_trained():
            raise ValueError(
                f"{self.model.name_or_path} has no classification head: expected a classifier, got an encoder, which "
                "would classify at random. Train a classifier first (docs/fine-tuning.md), or use the task "
                "image-feature-extraction."
            )

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        function_to_apply: Any = None,
        image_processor_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        _refuse(unknown, "top_k, function_to_apply, image_processor_kwargs")
        _, forward, postprocess = super()._sanitize_parameters(top_k=top_k, function_to_apply=function_to_apply)
        return dict(image_processor_kwargs or {}), forward, postprocess


def register_pipelines() -> None:
    """Register both classes for their tasks, so that `pipeline` also has them for models that are loaded already.

    For a model that is given by its name, `pipeline` finds them in `custom_pipelines` of the checkpoint. For a model
    that is given as an object, it looks nowhere but in this registry.
    """
    for task, pipeline, auto_class in (
        ("image-feature-extraction", M3RetFeatureExtractionPipeline, AutoModel),
        ("image-classification", M3RetImageClassificationPipeline, AutoModelForImageClassification),
    ):
        of_task = {"impl": pipeline, "pt": (auto_class,), "type": "image"}
        # with the default model that the task has
        PIPELINE_REGISTRY.supported_tasks[task] = PIPELINE_REGISTRY.supported_tasks[task] | of_task
        pipeline._registered_impl = {task: of_task}  # for its `save_pretrained`


__all__ = ["M3RetFeatureExtractionPipeline", "M3RetImageClassificationPipeline"]
