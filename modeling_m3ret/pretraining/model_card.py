"""The model card, filled in from the run. It leaves the machine, so it knows counts and never a path or a file name."""

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
    "mae+simdino": "masked autoencoding and self-distillation together (MAE, SimDINO)",
}


def write_card(
    template: Path,
    run: RunConfig,
    model: M3RetConfig,
    parameters: int,
    facts: dict[str, Any],
    rows: list[Row],
) -> str:
    """The text of the card: `template` (Jinja, the project's `model_card.md`) with what this run was and measured."""
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
        place=run.push_to_hub or name,  # copied from the Hub, the snippet must load what lies there
        objective_words=OBJECTIVES[run.objective],
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
