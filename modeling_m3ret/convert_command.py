"""Convert a published 2D vision transformer to an M3Ret checkpoint, which embeds images, clips and volumes.

    m3ret convert facebook/dinov3-vits16-pretrain-lvd1689m m3ret-dinov3
    m3ret convert microsoft/rad-dino m3ret-rad-dino --fit_whitening FOLDER

SOURCE is a folder or Hub id with safetensors weights: DINOv3, DINOv2, ViT, ViT-MAE, CLIP or SigLIP of transformers, or
hf-hub:ORG/NAME for a ViT of timm in open_clip. Everything that takes a model also takes SOURCE itself and converts it
in memory; a checkpoint of one's own adds the whitening. See docs/start-from-a-vit.md.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging as transformers_logging

from .atomic_io import atomic_folder
from .command_line import CommandLine, user_errors
from .configuration_m3ret import CHOICES, M3RetConfig
from .convert import convert_vit, license_metadata
from .cpu import prepare_cpu
from .embed import find_scans
from .errors import InputError
from .evaluation.untrained_baseline import whitening_sample
from .image_processing_m3ret import M3RetImageProcessor
from .modeling_m3ret import M3RetModel
from .search.embedding import embed_records, pooled_embedder


CARD = """---
{{{{ card_data }}}}
---

# {name}

An M3Ret encoder: it embeds 2D images, videos and 3D volumes of any medical modality for similarity search. Its
weights were converted from `{config.converted_from}`, a vision transformer for 2D images, and were not trained further.

**Not for diagnosis.** The encoder finds scans that look alike. It has not been evaluated for any clinical decision.

Licence of the weights: {license}. The code is that of M3Ret, under Apache-2.0.

- One image, slice or frame gives the tokens of the source, for pixels that are prepared as its own processor does.
- Patches of volumes and clips span {config.patch_depth} slices or frames; {config.patch_depth} equal slices give the
  tokens of one. Deeper scans extend the source, which has not seen any.
- {whitening}

```python
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
with torch.no_grad():
    embeddings = model.embed_scans(**processor(["ct.nii.gz", "chest.dcm"], return_tensors="pt"))
```
"""


def main() -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("source", type=str, metavar="SOURCE", help="folder or Hub id of a 2D vision transformer")
    add("output", type=Path, metavar="OUTPUT", help="new or empty folder for the checkpoint")
    fit = "folder, ORG/NAME or phantom; the whitening is fitted to its scans of the split train or without a split"
    add("--fit_whitening", type=str, metavar="DATA", help=fit)
    add("--pooling", choices=CHOICES["pooling"], help="what is pooled; by default what the source pools")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    with user_errors(parser.prog):
        output: Path = arguments.output
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise InputError(f"OUTPUT: expected a new or empty folder, got {output}. Choose another one.")
        prepare_cpu()
        chosen = {} if arguments.pooling is None else {"pooling": arguments.pooling}
        model, processor = convert_vit(arguments.source, **chosen)
        fitted = fit_whitening(model, processor, arguments.fit_whitening) if arguments.fit_whitening else 0
        with atomic_folder(output, replace=True) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            (folder / "README.md").write_text(write_card(model, output.absolute().name, fitted), encoding="utf-8")
    print(f"{output}: {model.num_parameters() / 1e6:.1f} M parameters. {describe_whitening(model, fitted)}")


def fit_whitening(model: M3RetModel, processor: M3RetImageProcessor, data: str) -> int:
    """Fit the whitening to the training scans of a folder or dataset, or to those without a split. Return their number.

    Raises:
        InputError: if there are fewer than two such scans.
    """
    records = [record for record in find_scans([data]) if record.split in ("", "train")]
    (pooled,) = embed_records([pooled_embedder(model)], processor, whitening_sample(records), num_workers=1)
    if len(pooled.records) < 2:
        raise InputError(f"--fit_whitening {data}: expected at least two readable training scans, got fewer.")
    model.whitening.fit(pooled.embeddings)
    return len(pooled.records)


def describe_whitening(model: M3RetModel, fitted: int) -> str:
    """Return a sentence about the whitening of a converted encoder, which was fitted to `fitted` scans."""
    if fitted:
        return f"The whitening is fitted to {fitted} scans, without labels."
    if model.whitening.is_identity():
        return "The whitening is not fitted, so that an embedding is the normalised pooled feature."
    return "An embedding is the image embedding of the source; no whitening is fitted."


def write_card(model: M3RetModel, name: str, fitted: int) -> str:
    """Return the model card of a converted checkpoint that is called `name`."""
    config = model.config
    assert isinstance(config, M3RetConfig)
    metadata = ModelCardData(
        **license_metadata(config),
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["m3ret", "medical-imaging", "image-retrieval"],
        base_model=config.converted_from if "/" in str(config.converted_from) else None,
    )
    terms = f"`{config.converted_license}`" if config.converted_license else "not stated in its files; ask its authors"
    text = CARD.format(name=name, config=config, license=terms, whitening=describe_whitening(model, fitted))
    return str(ModelCard.from_template(metadata, template_str=text))


if __name__ == "__main__":
    main()
