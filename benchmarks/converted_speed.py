"""Measure how fast converted encoders embed images, beside their sources in transformers.

    OMP_NUM_THREADS=1 python benchmarks/converted_speed.py --batch 4 --rounds 9

Random weights of ViT-S, float32, 224 px. CPU time of alternating calls: `forward` returns all tokens on both sides,
`embed` the pooled feature only. The medians of the ratios of speeds, round by round, are printed with the smallest and
the largest ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from timing import interleaved_seconds, speed_ratio

from modeling_m3ret.convert import convert_vit


SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
MLP = {"intermediate_size": 1536}
# model class and configuration of each family, with the patch size of its published checkpoints
SOURCES = {
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {"patch_size": 16, "num_register_tokens": 4, **MLP}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"patch_size": 14, "image_size": 518}),
    "dinov2_with_registers": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        {"patch_size": 14, "image_size": 518},
    ),
    "vit": ("ViTModel", "ViTConfig", {"patch_size": 16, **MLP}),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", {"patch_size": 16, **MLP}),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", {"patch_size": 16, **MLP}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="images per batch")
    parser.add_argument("--rounds", type=int, default=9, help="repetitions of each measurement")
    arguments = parser.parse_args()
    images = torch.randn(arguments.batch, 3, 224, 224)
    for name, (model_class, config_class, settings) in SOURCES.items():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**SIZES | settings)
        source = getattr(transformers, model_class)(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            transform = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            Path(folder, "preprocessor_config.json").write_text(json.dumps(transform))
            model, _ = convert_vit(folder)
        calls = {"source": partial(source, images), "forward": partial(model, images)}
        calls["embed"] = partial(model.embed, images)
        with torch.inference_mode():
            times = interleaved_seconds(calls, arguments.rounds, time.process_time)
        ratios = [f"{call} {speed_ratio(times[call], times['source'])}" for call in ("forward", "embed")]
        print(f"{name:24s} speed of the converted encoder over its source: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
