"""The encoder with a linear head: classification and regression of scans, as every image classifier of transformers.

This file is copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_m3ret import M3RetConfig
from .modeling_m3ret import M3RetModel, M3RetPreTrainedModel


class M3RetForImageClassification(M3RetPreTrainedModel):
    """Classify scans by a linear layer on whitened features, from any M3Ret checkpoint.

    The head reads the whitened features of [`M3RetModel`], which are its embedding before normalisation to unit
    length. They are centred and of similar scale, as a linear layer that is trained by gradient steps needs it; MAE
    normalises features before its linear probe for this reason (arXiv 2111.06377, appendix A). The whitening is loaded
    with the encoder and is not trained. If it was never fitted, it is the identity.

    `config.num_labels`, `id2label` and `problem_type` select the loss, as everywhere in transformers: cross-entropy for
    int64 labels `(B,)`, binary cross-entropy for float labels `(B, num_labels)` of a multi-label problem, and the mean
    squared error for float labels `(B,)` if `num_labels` is 1.

    Example:

    ```python
    >>> import torch
    >>> from modeling_m3ret import M3RetConfig, M3RetForImageClassification
    >>> model = M3RetForImageClassification(M3RetConfig.vitt(num_labels=3))
    >>> model(torch.rand(2, 3, 64, 64), labels=torch.tensor([0, 2])).logits.shape
    torch.Size([2, 3])

    ```
    """

    new_head: Tensor | None = None  # random weights of a head that the checkpoint lacked
    accepts_loss_kwargs = False  # a multi-label loss ignores the number of items over which `Trainer` accumulates
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # of a pretraining checkpoint

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.m3ret = M3RetModel(config)
        labels = config.num_labels or 0
        self.classifier = nn.Linear(config.hidden_size, labels) if labels > 0 else nn.Identity()  # as in ViT
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a classifier, or an encoder with a new head to train, as every model does."""
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if "classifier.weight" in info["missing_keys"]:
            model.new_head = model.classifier.weight.detach().cpu().clone()
        return (model, info) if with_info else model

    def is_trained(self) -> bool:
        """Return False if the head still has the random weights by which `from_pretrained` completed an encoder."""
        if self.new_head is None or not isinstance(self.classifier, nn.Linear):
            return True
        weight = self.classifier.weight.detach().cpu()
        return not torch.equal(weight.to(self.new_head.dtype), self.new_head)

    def get_input_embeddings(self) -> nn.Module:
        return self.m3ret.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Return the logits `(B, num_labels)` of packed or dense scans, and with `labels` the loss.

        Other args and errors are those of [`M3RetModel`], as is the form of hidden states and attentions.
        """
        output = self.m3ret(pixel_values, grid_thw, **kwargs | {"return_dict": True})
        pooled = output.pooler_output
        logits = self.classifier(self.m3ret.whitening(pooled).to(pooled.dtype))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


__all__ = ["M3RetForImageClassification"]
