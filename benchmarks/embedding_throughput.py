"""Measure how fast the encoder embeds.

    python benchmarks/embedding_throughput.py --preset vits --batch 8 --rounds 15

On dense images, the model is compared with the DINOv3 ViT of transformers of the same size; on a mixed batch, with
itself on the batch padded to its longest scan. Rounds are interleaved. The medians of the times and of the ratios of
speeds, round by round, are printed with the smallest and the largest ratio.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from timing import compare, pad_to_longest
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from modeling_m3ret import M3RetConfig, M3RetImageProcessor, M3RetModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["vitt", "vits", "vitb", "vitl"], default="vits", help="size of the model")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of each measurement")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = getattr(M3RetConfig, arguments.preset)()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens")
    dinov3_config = DINOv3ViTConfig(**{name: getattr(config, name) for name in sizes})
    images = torch.randn(arguments.batch, 3, 224, 224)
    # at the processor's default sizes: X-rays of 224 x 224, clips of 16 frames, a CT of 32 slices
    mixed = [torch.randn(3, depth, 224, 224) for depth in (1, 1, 1, 1, 16, 16, 32)]
    rows, grids = M3RetImageProcessor().pack(mixed)
    padded = pad_to_longest(mixed)
    for dtype in (torch.float32, torch.bfloat16):
        model = M3RetModel(config).eval().to(dtype)
        dinov3 = DINOv3ViTModel(dinov3_config).eval().to(dtype)
        print(f"{arguments.preset}, {dtype}: {arguments.batch} images of 224 x 224; 4 X-rays, 2 clips and 1 CT")
        dense = {"dense": partial(model, images.to(dtype)), "DINOv3": partial(dinov3, images.to(dtype))}
        packed = {"packed": partial(model, rows.to(dtype), grids), "padded": partial(model, padded.to(dtype))}
        with torch.inference_mode():
            compare(dense, [("dense", "DINOv3")], arguments.rounds)
            compare(packed, [("packed", "padded")], max(3, arguments.rounds // 3))


if __name__ == "__main__":
    main()
