"""Scans of different sizes, their pack, and a tiny model, for tests of the encoder."""

from __future__ import annotations

import torch
from conftest import tiny_config
from torch import Tensor

from modeling_m3ret import M3RetModel
from modeling_m3ret.packing_m3ret import patchify


# depth, height and width in voxels; all grids differ, and some depths do not fill their last patch
SHAPES = {
    "xray": (1, 64, 48),
    "ultrasound": (7, 48, 48),
    "endoscopy": (16, 32, 64),
    "ct": (21, 64, 64),
    "mri": (9, 48, 80),
}


def make_scans(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator) for shape in SHAPES.values()]


def pack(scans: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([patchify(scan[None], 4, 16)[0] for scan in scans])
    return rows, torch.tensor([(-(-s.shape[1] // 4), s.shape[2] // 16, s.shape[3] // 16) for s in scans])


def make_model(attention: str = "sdpa", **overrides: object) -> M3RetModel:
    model = M3RetModel(tiny_config(**overrides)).eval()
    model.set_attn_implementation(attention)
    return model


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
