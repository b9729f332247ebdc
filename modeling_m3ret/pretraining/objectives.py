"""Training objectives behind one interface: masked autoencoding (MAE), self-distillation (SimDINO), and both together.

An objective is a module that maps a pack to its loss and the scalars to log. Its other members:

- `views`: the kinds of views that it needs of each scan.
- `model`: module with all weights, which `save` writes to `weights_file` in a checkpoint.
- `encoder`: encoder to publish, called `encoder_name` in `model`.
- `trained_encoder`: encoder with gradients.
- `after_step`: called after each optimiser step.
- `plan`: makes all indices of a pack from its grids and noise. Loader workers call it, to relieve the training process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from ..configuration_m3ret import M3RetConfig
from ..data.views import GLOBAL_CROPS, LOCAL_CROPS, Jitter, ViewKind
from ..layers_m3ret import M3RetLayer, variable_length_attention
from ..masked_autoencoder_m3ret import M3RetDecoder, M3RetForPreTraining, MaskPlan, plan_masks
from ..modeling_m3ret import M3RetModel
from .adapters import add_adapters
from .distributed import rank_weight
from .run_config import ConfigError, RunConfig
from .simdino import SimDINO, SimDINOLoss, ViewPlan, teacher_momentum
from .warm_start import Start, load_initial, read_start


Grid = tuple[int, int, int]  # patches of a scan along depth, height and width


class MaskedAutoencoding(nn.Module):
    """Masked autoencoding, with the crops of MAE and masks from the noise of each view."""

    encoder_name = "m3ret"
    weights_file = "pretraining/model.safetensors"

    def __init__(self, run: RunConfig, config: M3RetConfig):
        super().__init__()
        self.views = [ViewKind(run.views_per_decode, flip_probability=run.flip_probability)]
        self.model = M3RetForPreTraining(config)

    @property
    def encoder(self) -> M3RetModel:
        return self.model.m3ret

    @property
    def trained_encoder(self) -> M3RetModel:
        return self.model.m3ret

    @property
    def plan(self) -> Callable[[Sequence[Grid], Tensor], MaskPlan]:
        return partial(plan_masks, config=cast(M3RetConfig, self.encoder.config))

    def forward(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | None = None,
        noise: Tensor | None = None,
        plan: MaskPlan | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if plan is None:
            output = self.model(pixel_values, grid_thw, noise=noise)
        else:
            output = self.model.predict(pixel_values, plan)
        weight = int(output.weight) if plan is None else plan.weight  # without waiting for a GPU
        return output.loss * rank_weight(weight, pixel_values.device), {}

    def after_step(self, step: int, steps: int) -> None:
        pass

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Save the encoder with its decoder, for `AutoModelForPreTraining`."""
        self.model.save_pretrained(folder / "pretraining", state_dict=dict(weights))
        # transformers looks for the code of a subfolder in its parent, whose own configuration names the class, too: a
        # user who forgets the subfolder then gets the warning of `M3RetForPreTraining.from_pretrained`
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        custom_object_save(self.model, folder, config)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class SelfDistillation(nn.Module):
    """SimDINO on two global and several local crops of each scan. The teacher is published.

    For `mae+simdino` the student's global views are masked, and a decoder predicts the masked patches.
    """

    encoder_name = "teacher"
    weights_file = "pretraining/simdino.safetensors"

    def __init__(self, run: RunConfig, config: M3RetConfig):
        super().__init__()
        global_crops, local_crops = (
            replace(ranges, area=(area[0], area[1]), single_slice_probability=run.single_slice_probability)
            for ranges, area in ((GLOBAL_CROPS, run.global_area), (LOCAL_CROPS, run.local_area))
        )
        self.views = [
            ViewKind(SimDINO.global_views, global_crops, None, Jitter(), run.flip_probability),
            ViewKind(run.local_views, local_crops, run.local_size, Jitter(), run.flip_probability),
        ]
        loss = SimDINOLoss(coeff=run.compression_weight, expansion_weight=run.expansion_weight)
        decoder = M3RetDecoder(config) if run.objective == "mae+simdino" else None
        views = SimDINO.global_views + run.local_views
        self.model = SimDINO(M3RetModel(config), loss, views, decoder, run.patch_weight)
        self.start_momentum = run.start_momentum()
        self.mae_weight, self.simdino_weight = run.mae_weight, run.simdino_weight

    @property
    def encoder(self) -> M3RetModel:
        return self.model.teacher

    @property
    def trained_encoder(self) -> M3RetModel:
        return self.model.student

    @property
    def plan(self) -> Callable[[Sequence[Grid], Tensor], ViewPlan]:
        return self.model.plan

    def forward(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | None = None,
        noise: Tensor | None = None,
        plan: ViewPlan | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.model(pixel_values, grid_thw, noise, plan)
        logged = {name: getattr(terms, name) for name in ("compression", "expansion_share", "collapsed_share")}
        if terms.patch_agreement is not None:
            logged["patch_agreement"] = terms.patch_agreement
        if terms.reconstruction is None:
            return terms.loss, logged
        loss = self.mae_weight * terms.reconstruction + self.simdino_weight * terms.loss
        return loss, logged | {"simdino_loss": terms.loss, "reconstruction_loss": terms.reconstruction}

    def after_step(self, step: int, steps: int) -> None:
        self.model.update_teacher(teacher_momentum(step, steps, self.start_momentum))

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Save student, teacher and both heads in one safetensors file."""
        (folder / "pretraining").mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / self.weights_file)


Objective = MaskedAutoencoding | SelfDistillation


def build_objective(run: RunConfig, start: Start | None = None) -> tuple[Objective, M3RetConfig]:
    """Build the objective of a run, and the configuration of its encoder.

    MAE pools patches, since the CLS token has no target there. SimDINO pools the CLS token and uses stochastic depth
    with rate 0.1, as published; an encoder that keeps its architecture also keeps its pooling. `run.model` overrides
    both.

    Args:
        run: the options.
        start: result of `read_start`, which is called if it is None.

    Raises:
        ConfigError: if `run.attn_implementation` or PEFT is not installed, or there are too few layers for
            `run.freeze_layers`.
        WarmStartError: if the checkpoint `run.initial` cannot be used.
    """
    start = start or read_start(run)
    fields = None if start is None else start.fields(run)
    preset: Any = getattr(M3RetConfig, run.preset, None)
    defaults: dict[str, Any] = {} if run.objective == "mae" else {"pooling": "cls", "drop_path_rate": 0.1}
    if start is not None and fields is not None:
        preset, defaults = M3RetConfig, defaults | fields
        if run.objective != "mae":
            defaults["pooling"] = start.config.pooling
    config = preset(**(defaults | run.model), attn_implementation=attention_implementation(run))
    objective = (MaskedAutoencoding if run.objective == "mae" else SelfDistillation)(run, config)
    if run.initial and start is not None and not run.resume:  # --resume loads all weights later
        load_initial(objective.model, config, objective.weights_file, run.initial, start)
    if run.lora_rank:
        add_adapters(objective.trained_encoder, objective.encoder, run.lora_rank, run.freeze_layers)
    freeze_layers(objective.trained_encoder, run.freeze_layers)
    if run.gradient_checkpointing:
        checkpoint_activations(objective.trained_encoder)
    if run.compile_layers:
        compile_layers(objective)
    return objective, config


def attention_implementation(run: RunConfig) -> str:
    """Return the attention implementation of a run: the option, or one that is installed if the option is null.

    Raises:
        ConfigError: if the library of the option is not installed.
    """
    is_installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if run.attn_implementation is None:
        needs_library = run.precision == "bf16" and torch.cuda.is_available() and variable_length_attention() is None
        return "flash_attention_2" if needs_library and is_flash_attn_2_available() else "sdpa"
    if not is_installed.get(run.attn_implementation, lambda: True)():
        problem = f"expected null or an installed library, got {run.attn_implementation}. Install flash-attn."
        raise ConfigError("attn_implementation", problem)
    return run.attn_implementation


def freeze_layers(encoder: M3RetModel, count: int) -> None:
    """Exclude the first layers of an encoder, and its embeddings before them, from training.

    Raises:
        ConfigError: if the encoder has fewer than `count` layers.
    """
    layers = encoder.encoder.layers
    if count > len(layers):
        raise ConfigError("freeze_layers", f"expected at most the {len(layers)} layers of the encoder, got {count}.")
    for module in [encoder.embeddings, *layers[:count]] if count else []:
        module.requires_grad_(False)


def checkpoint_activations(encoder: M3RetModel) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    if hasattr(encoder, "activation_checkpointing_enable"):
        encoder.activation_checkpointing_enable()
    else:  # transformers 5.17
        encoder.gradient_checkpointing_enable()


def compile_layers(model: nn.Module) -> None:
    """Compile all transformer layers of encoders and decoder with `M3RetLayer.compile_tokenwise`."""
    for module in model.modules():
        if isinstance(module, M3RetLayer):
            module.compile_tokenwise()


def model_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names start with `prefix.`, without the prefix."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
