"""The model card of a checkpoint, filled in from the run. It is published, so it holds no path and no file name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_m3ret import M3RetConfig
from ..convert import license_metadata
from ..evaluation.table import Row, format_table
from ..modeling_m3ret import M3RetModel
from .run_config import RunConfig


def write_card(template: Path, run: RunConfig, encoder: M3RetModel, facts: dict[str, Any], rows: list[Row]) -> str:
    """Return the text of the model card.

    Args:
        template: Jinja template, the project's `model_card.md`.
        facts: content of `training.json`.
        rows: retrieval results; empty before the run has ended.
    """
    card_data = ModelCardData(
        **license_metadata(cast(M3RetConfig, encoder.config)),
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["m3ret", "medical-imaging", "image-retrieval", "self-supervised"],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template),
        name=Path(run.output_dir).name,
        run=run,
        model=encoder.config,
        parameters=f"{encoder.num_parameters() / 1e6:.1f} M",
        facts=facts,
        table=format_table(rows) if rows else "",
    )
    return str(card)
