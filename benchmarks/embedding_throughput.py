"""How fast does the encoder embed? Beside transformers' DINOv3 ViT of the same size on dense images, and beside itself
with a mixed batch padded to its longest scan.

    python benchmarks/embedding_throughput.py --preset vits --batch 8 --rounds 15

Rounds are interleaved (ours, theirs, ours, ...), so that a machine that slows down slows both; the medians of time and
of the ratio pair by pair are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from modeling_m3ret import M3RetConfig, M3RetModel
from modeling_m3ret.packing_m3ret import patchify


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Interleaved timing of two callables; prints medians and the median ratio of speeds (ours over theirs)."""
    times: list[tuple[float, float]] = []
    with torch.inference_mode():
        for warm_up in (ours, theirs):
            warm_up()
        for _ in range(rounds):
            pair = []
            for call in (ours, theirs):
                start = time.perf_counter()
                call()
                pair.append(time.perf_counter() - start)
            times.append((pair[0], pair[1]))
    our_time, their_time = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(theirs_s / ours_s for ours_s, theirs_s in times)
    print(
        f"{name:42s} ours {our_time * 1e3:8.1f} ms   other {their_time * 1e3:8.1f} ms   speed ratio "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
        flush=True,
    )


def padded_to_longest(scans: list[Tensor]) -> Tensor:
    """What a model without packing does with a mixed batch: one dense tensor of the largest depth, height, width."""
    shape = [max(scan.shape[axis] for scan in scans) for axis in range(1, 4)]
    batch = torch.zeros(len(scans), 3, *shape)
    for place, scan in enumerate(scans):
        batch[place, :, : scan.shape[1], : scan.shape[2], : scan.shape[3]] = scan
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["vitt", "vits", "vitb", "vitl"], default="vits")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = getattr(M3RetConfig, arguments.preset)()
    peer_config = DINOv3ViTConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_register_tokens=config.num_register_tokens,
    )
    images = torch.randn(arguments.batch, 3, 224, 224)
    # the default sizes of the processor: an X-ray 224 x 224, a clip of 16 frames, a CT of 32 slices
    mixed = [torch.randn(3, depth, 224, 224) for depth in (1, 1, 1, 1, 16, 16, 32)]
    for dtype in (torch.float32, torch.bfloat16):
        model = M3RetModel(config).eval().to(dtype)
        peer = DINOv3ViTModel(peer_config).eval().to(dtype)
        name = str(dtype).removeprefix("torch.")
        dense = images.to(dtype)
        compare(
            f"{arguments.preset} {arguments.batch} x 224x224 vs DINOv3, {name}",
            lambda model=model, dense=dense: model(dense),
            lambda peer=peer, dense=dense: peer(dense),
            arguments.rounds,
        )
        rows = torch.cat([patchify(scan[None], config.patch_depth, config.patch_size)[0] for scan in mixed]).to(dtype)
        grids = torch.tensor([(-(-scan.shape[1] // config.patch_depth), 14, 14) for scan in mixed])
        padded = padded_to_longest(mixed).to(dtype)
        compare(
            f"{arguments.preset} 4 X-rays + 2 clips + 1 CT vs padded, {name}",
            lambda model=model, rows=rows, grids=grids: model(rows, grids),
            lambda model=model, padded=padded: model(padded),
            max(3, arguments.rounds // 3),
        )


if __name__ == "__main__":
    main()
