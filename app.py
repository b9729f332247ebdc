"""Search a gallery with any scan, in a browser.

    python app.py                                        # newest local checkpoint, phantom gallery
    python app.py --model m3ret-vitb --data FOLDER       # a folder with a manifest.csv

Needs `pip install "m3ret[app]"`. The server listens on this machine alone, serves no file but the thumbnails that it
makes, and deletes uploads after an hour.
"""

import argparse
import os
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from modeling_m3ret import M3RetImageProcessor, M3RetModel, M3RetReadError
from modeling_m3ret.data.collection import Record, open_collection
from modeling_m3ret.retrieval.embed import embed_records, encoder_embedder


UPLOAD_LIMIT = "1gb"  # a CT series of 2,000 slices, zipped or as one NIfTI
SECONDS_KEPT = 3600


def newest_checkpoint() -> Path:
    """The checkpoint folder `m3ret-*` of this directory that was written last."""
    found = [folder.parent for folder in Path().glob("m3ret-*/config.json")]
    if not found:
        raise SystemExit("no checkpoint here: run `accelerate launch train.py --config configs/smoke.yaml` first")
    return max(found, key=lambda folder: folder.stat().st_mtime)


def thumbnail(processor: M3RetImageProcessor, source: object) -> Image.Image:
    """The middle slice or frame of a scan, as the encoder sees it."""
    volume = processor.resize(processor.read(source)) * processor.image_std + processor.image_mean  # (C, D, H, W)
    middle = volume[:, volume.shape[1] // 2].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(middle.expand(-1, -1, 3)))


def build(model: M3RetModel, processor: M3RetImageProcessor, records: list[Record]) -> gr.Blocks:
    """The page: a scan in, the most similar scans of the gallery out."""
    gallery = embed_records([encoder_embedder(model)], processor, records)[0]

    def search(file: str | None, count: int) -> tuple[Image.Image | None, list[tuple[Image.Image, str]]]:
        if file is None:
            return None, []
        try:
            query = thumbnail(processor, file)
            with torch.inference_mode():
                embedding = model.get_image_features(**processor(file, return_tensors="pt").to(model.device))
        except M3RetReadError as error:
            raise gr.Error(str(error)) from error
        similarity = gallery.embeddings @ embedding.cpu()[0]
        hits = []
        for place in similarity.topk(min(int(count), len(similarity))).indices.tolist():
            record = gallery.records[place]
            caption = f"{similarity[place]:.3f} · {record.modality} · {record.anatomy}"
            hits.append((thumbnail(processor, record.open()), caption))
        return query, hits

    with gr.Blocks(title="M3Ret", delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown("# M3Ret\nFind similar scans by their looks. Research software, **not for diagnosis**.")
        with gr.Row():
            with gr.Column(scale=1):
                file = gr.File(label="Scan: DICOM, NIfTI, video or image", type="filepath")
                count = gr.Slider(1, 24, value=8, step=1, label="Hits")
                query = gr.Image(label="Query (middle slice or frame)", type="pil", interactive=False)
            hits = gr.Gallery(label="Most similar first", columns=4, scale=3)
        gr.on([file.change, count.release], search, [file, count], [query, hits], api_name="search")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder or Hub id; the newest m3ret-* folder here")
    parser.add_argument("--data", default="phantom", help="gallery: folder with a manifest.csv, or phantom[:SUBJECTS]")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="also reachable through a public Gradio address")
    arguments = parser.parse_args()
    name = arguments.model or newest_checkpoint()
    model = AutoModel.from_pretrained(name).eval()
    page = build(model, AutoImageProcessor.from_pretrained(name), open_collection(arguments.data))
    page.queue().launch(
        server_port=arguments.port, share=arguments.share, max_file_size=UPLOAD_LIMIT, ssr_mode=False, allowed_paths=[]
    )


if __name__ == "__main__":
    main()
