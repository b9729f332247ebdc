"""Measure how fast the encoder embeds.

    python benchmarks/embedding_throughput.py --preset vits --batch 8 --rounds 15

On dense images, the model is compared with the DINOv3 ViT of transformers of the same size; on a mixed batch, with
itself on the batch padded to its longest scan. Rounds are interleaved. The medians of the times and of the ratios of
speeds, round by round, are printed with the smallest and the largest ratio.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from timing import interleaved_seconds, pad_to_longest, speed_ratio
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from modeling_m3ret import M3RetConfig, M3RetModel
from modeling_m3ret.packing_m3ret import patchify


def compare(name: str, ours: Callable[[], object], other: Callable[[], object], rounds: int) -> None:
    """Print the median times of two calls and the ratio of their speeds (ours over the other)."""
    with torch.inference_mode():
        times = interleaved_seconds({"ours": ours, "other": other}, rounds)
    our_time, other_time = (1e3 * statistics.median(times[side]) for side in ("ours", "other"))
    ratio = speed_ratio(times["ours"], times["other"])
    print(f"{name:42s} ours {our_time:8.1f} ms   other {other_time:8.1f} ms   speed ratio {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["vitt", "vits", "vitb", "vitl"], default="vits", help="size of the model")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of each measurement")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = getattr(M3RetConfig, arguments.preset)()
    dinov3_config = DINOv3ViTConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_register_tokens=config.num_register_tokens,
    )
    images = torch.randn(arguments.batch, 3, 224, 224)
    # at the processor's default sizes: X-rays of 224 x 224, clips of 16 frames, a CT of 32 slices
    mixed = [torch.randn(3, depth, 224, 224) for depth in (1, 1, 1, 1, 16, 16, 32)]
    for dtype in (torch.float32, torch.bfloat16):
        model = M3RetModel(config).eval().to(dtype)
        dinov3 = DINOv3ViTModel(dinov3_config).eval().to(dtype)
        precision = str(dtype).removeprefix("torch.")
        dense = images.to(dtype)
        compare(
            f"{arguments.preset} {arguments.batch} x 224x224 vs DINOv3, {precision}",
            lambda model=model, dense=dense: model(dense),
            lambda model=dinov3, dense=dense: model(dense),
            arguments.rounds,
        )
        rows = torch.cat([patchify(scan[None], config.patch_depth, config.patch_size)[0] for scan in mixed]).to(dtype)
        grids = torch.tensor([(-(-scan.shape[1] // config.patch_depth), 14, 14) for scan in mixed])
        padded = pad_to_longest(mixed).to(dtype)
        compare(
            f"{arguments.preset} 4 X-rays + 2 clips + 1 CT vs padded, {precision}",
            lambda model=model, rows=rows, grids=grids: model(rows, grids),
            lambda model=model, padded=padded: model(padded),
            max(3, arguments.rounds // 3),
        )


if __name__ == "__main__":
    main()
