"""What is learned: the objectives behind one interface, so that the training loop reads the same for each.

An objective is a module that takes a pack and returns its loss and the numbers worth logging; it says which views it
wants, which encoder is to be published, what happens after a step, and where what training goes on from is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_m3ret import M3RetConfig
from ..data.views import GLOBAL_CROPS, LOCAL_CROPS, Jitter, ViewKind
from ..masked_autoencoder_m3ret import M3RetDecoder, M3RetForPreTraining
from ..modeling_m3ret import M3RetLayer, M3RetModel
from .ranks import part_of_rank
from .run_config import RunConfig
from .simdino import SimDINO, SimDINOLoss, teacher_momentum
from .warm_start import load_initial


class Objective(Protocol):
    """See the module. `forward(pixel_values, grid_thw, noise)` returns the loss and named scalars.

    encoder: what is published, named `encoder_name` in `model`, which holds all weights; learned: the encoder that has
    gradients. weights_file: where in a checkpoint all of `model` lies.
    """

    views: Sequence[ViewKind]
    encoder_name: str
    weights_file: str

    @property
    def encoder(self) -> M3RetModel: ...

    @property
    def learned(self) -> M3RetModel: ...

    def after_step(self, step: int, steps: int) -> None: ...

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None: ...


class MaskedAutoencoding(nn.Module):
    """MAE: crops as wide as MAE's, masks from the noise that comes with each view."""

    encoder_name = "m3ret"
    weights_file = "pretraining/model.safetensors"

    def __init__(self, run: RunConfig, config: M3RetConfig):
        super().__init__()
        self.views = [ViewKind(run.views_per_decode, flip_probability=run.flip_part)]
        self.model = M3RetForPreTraining(config)

    @property
    def encoder(self) -> M3RetModel:
        return self.model.m3ret

    @property
    def learned(self) -> M3RetModel:
        return self.model.m3ret

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.model(pixel_values, grid_thw, noise=noise)
        return output.loss * part_of_rank(output.weight, pixel_values.device), {}

    def after_step(self, step: int, steps: int) -> None:
        pass

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The encoder with its decoder, for `AutoModelForPreTraining`."""
        self.model.save_pretrained(folder / "pretraining", state_dict=dict(weights))
        custom_object_save(self.model, folder)  # loaded as a subfolder, its code is looked for in the folder above


class SelfDistillation(nn.Module):
    """SimDINO: two global and some local crops of each scan; the teacher is what is published.

    With masked autoencoding the student's global views are masked, and the same pass learns to predict the rest.
    """

    encoder_name = "teacher"
    weights_file = "pretraining/simdino.safetensors"

    def __init__(self, run: RunConfig, config: M3RetConfig):
        super().__init__()
        global_crops, local_crops = (
            replace(ranges, area=(area[0], area[1]), single_slice_probability=run.slice_part)
            for ranges, area in ((GLOBAL_CROPS, run.global_area), (LOCAL_CROPS, run.local_area))
        )
        self.views = [
            ViewKind(SimDINO.global_views, global_crops, None, Jitter(), run.flip_part),
            ViewKind(run.local_views, local_crops, run.local_size, Jitter(), run.flip_part),
        ]
        loss = SimDINOLoss(coeff=run.compression_weight, expansion_weight=run.expansion_weight)
        decoder = M3RetDecoder(config) if run.objective == "mae+simdino" else None
        views = SimDINO.global_views + run.local_views
        self.model = SimDINO(M3RetModel(config), loss, views, decoder, run.patch_weight)
        self.start_momentum = run.teacher_momentum
        self.mae_weight, self.simdino_weight = run.mae_weight, run.simdino_weight

    @property
    def encoder(self) -> M3RetModel:
        return self.model.teacher

    @property
    def learned(self) -> M3RetModel:
        return self.model.student

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.model(pixel_values, grid_thw, noise)
        logged = {
            "compression": terms.compression,
            "expansion_share": terms.expansion_share,
            "collapsed_share": terms.collapsed_share,
        }
        if terms.patch_agreement is not None:
            logged["patch_agreement"] = terms.patch_agreement
        if terms.reconstruction is None:
            return terms.loss, logged
        loss = self.mae_weight * terms.reconstruction + self.simdino_weight * terms.loss
        return loss, logged | {"simdino_loss": terms.loss, "reconstruction_loss": terms.reconstruction}

    def after_step(self, step: int, steps: int) -> None:
        self.model.update_teacher(teacher_momentum(step, steps, self.start_momentum))

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Student, teacher and both heads, by name, in one safetensors file."""
        (folder / "pretraining").mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / self.weights_file)


def build_objective(run: RunConfig) -> tuple[MaskedAutoencoding | SelfDistillation, M3RetConfig]:
    """The objective that the run asks for, and the encoder's config, which says how it pools.

    MAE gives the CLS token no target and pools patches; SimDINO trains the CLS token, with stochastic depth of .1 as
    published. `model` in the run's YAML overrides either. With `initial` the weights are an earlier run's.

    Raises:
        ValueError: if `initial` has another encoder.
    """
    preset = getattr(M3RetConfig, run.preset)
    defaults = {} if run.objective == "mae" else {"pooling": "cls", "drop_path_rate": 0.1}
    config = preset(**(defaults | run.model))
    objective = (MaskedAutoencoding if run.objective == "mae" else SelfDistillation)(run, config)
    if run.initial and not run.resume:  # a checkpoint of the run itself comes later, and knows more
        load_initial(objective.model, config, objective.weights_file, run.initial)
    if run.gradient_checkpointing:
        objective.learned.activation_checkpointing_enable()
    if run.compile_layers:
        compile_layers(objective)
    return objective, config


def compile_layers(model: nn.Module) -> None:
    """All transformer layers within, encoder's and decoder's, by `M3RetLayer.compile_tokenwise`."""
    for module in model.modules():
        if isinstance(module, M3RetLayer):
            module.compile_tokenwise()


def model_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with `prefix.`, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
