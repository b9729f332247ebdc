"""The model card of a checkpoint, filled in from the run. It is published, so it holds no path and no file name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_m3ret import M3RetConfig
from ..evaluation.table import Row, format_table
from .run_config import RunConfig


OBJECTIVES = {
    "mae": "masked autoencoding (MAE)",
    "simdino": "self-distillation (SimDINO)",
    "mae+simdino": "masked autoencoding and self-distillation (MAE and SimDINO)",
}


def write_card(
    template: Path,
    run: RunConfig,
    model: M3RetConfig,
    parameters: int,
    facts: dict[str, Any],
    rows: list[Row],
) -> str:
    """Return the text of the model card.

    Args:
        template: Jinja template, the project's `model_card.md`.
        run: configuration of the run.
        model: configuration of the encoder.
        parameters: number of parameters of the encoder.
        facts: content of `training.json`.
        rows: retrieval results; empty before the run has ended.
    """
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["m3ret", "medical-imaging", "image-retrieval", "self-supervised"],
    )
    name = Path(run.output_dir).name
    card = ModelCard.from_template(
        card_data,
        template_path=str(template),
        name=name,
        repo_id=run.push_to_hub or name,
        objective=OBJECTIVES[run.objective],
        hidden_size=model.hidden_size,
        preset=run.preset,
        parameters=f"{parameters / 1e6:.1f} M",
        patch=f"{model.patch_depth} x {model.patch_size} x {model.patch_size}",
        size=run.size,
        num_frames=run.num_frames,
        facts=facts,
        table=format_table(rows) if rows else "",
    )
    return str(card)
