"""What is learned: the objectives behind one interface, so that the training loop reads the same for each.

An objective is a module that takes a pack and returns its loss and the numbers worth logging; it says which views it
wants, which encoder is to be published, what happens after a step, and how to save what training goes on from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_model
from torch import Tensor, nn

from ..configuration_m3ret import M3RetConfig
from ..data.views import GLOBAL_CROPS, LOCAL_CROPS, Jitter, ViewKind
from ..modeling_m3ret import M3RetForPreTraining, M3RetModel
from .run_config import RunConfig
from .simdino import SimDINO, SimDINOLoss, teacher_momentum


class Objective(Protocol):
    """See the module. `forward(pixel_values, grid_thw, noise)` returns the loss and named scalars."""

    views: Sequence[ViewKind]
    encoder: M3RetModel

    def after_step(self, step: int, steps: int) -> None: ...

    def save(self, folder: Path) -> None: ...


class MaskedAutoencoding(nn.Module):
    """MAE: crops as wide as MAE's, masks from the noise that comes with each view."""

    def __init__(self, run: RunConfig, config: M3RetConfig):
        super().__init__()
        self.views = [ViewKind(run.views_per_decode)]
        self.model = M3RetForPreTraining(config)
        self.encoder = self.model.m3ret

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(pixel_values, grid_thw, noise=noise).loss, {}

    def after_step(self, step: int, steps: int) -> None:
        pass

    def save(self, folder: Path) -> None:
        """The encoder with its decoder, for `AutoModelForPreTraining`."""
        self.model.save_pretrained(folder)


class SelfDistillation(nn.Module):
    """SimDINO: two global and some local crops of each scan; the teacher is what is published."""

    def __init__(self, run: RunConfig, config: M3RetConfig):
        super().__init__()
        self.views = [
            ViewKind(SimDINO.global_views, GLOBAL_CROPS, None, Jitter()),
            ViewKind(run.local_views, LOCAL_CROPS, run.local_size, Jitter()),
        ]
        loss = SimDINOLoss(coeff=run.compression_weight, expansion_weight=run.expansion_weight)
        self.model = SimDINO(M3RetModel(config), loss, SimDINO.global_views + run.local_views)
        self.encoder = self.model.teacher
        self.start_momentum = run.teacher_momentum

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.model(pixel_values, grid_thw)
        return terms.loss, {"compression": terms.compression, "expansion_share": terms.expansion_share}

    def after_step(self, step: int, steps: int) -> None:
        self.model.update_teacher(teacher_momentum(step, steps, self.start_momentum))

    def save(self, folder: Path) -> None:
        """Student, teacher and both heads, by name, in one safetensors file."""
        folder.mkdir(parents=True)
        save_model(self.model, str(folder / "simdino.safetensors"))


def build_objective(run: RunConfig) -> tuple[MaskedAutoencoding | SelfDistillation, M3RetConfig]:
    """The objective that the run asks for, and the encoder's config, which says how it pools.

    MAE gives the CLS token no target and pools patches; SimDINO trains the CLS token, with stochastic depth of .1 as
    published. `model` in the run's YAML overrides either.
    """
    preset = getattr(M3RetConfig, run.preset)
    if run.objective == "mae":
        config = preset(**run.model)
        return MaskedAutoencoding(run, config), config
    config = preset(**({"pooling": "cls", "drop_path_rate": 0.1} | run.model))
    return SelfDistillation(run, config), config
