"""What every test shares: tiny models, and scans of all kinds that the tests make themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from modeling_m3ret import M3RetConfig


# tiny models gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other
torch.set_num_threads(1)


def tiny_config(**overrides: object) -> M3RetConfig:
    """A ViT small enough for a test of milliseconds, with every part of the real one."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "decoder_hidden_size": 36,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 3,
        "layer_scale_init": 1.0,
    }
    return M3RetConfig(**(sizes | overrides))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def devset() -> Path:
    """The folder of real scans for development, where this machine has it; never part of the project."""
    folder = Path(os.environ.get("M3RET_DEVSET", Path(__file__).parents[2] / "shared" / "data" / "devset"))
    if not (folder / "manifest.csv").is_file():
        pytest.skip("the development scans are not on this machine (set M3RET_DEVSET to their folder)")
    return folder
