"""Nothing that runs on the accelerator computes in float64, which Apple's MPS does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from packs import make_scans, pack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_m3ret.modeling_m3ret import M3RetModel
from modeling_m3ret.pretraining.distributed import clip_gradient
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.run_config import RunConfig


class RefuseFloat64(TorchDispatchMode):
    """Raise an error, as MPS does, if an operation returns a float64 tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for value in tree_leaves(result):
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, function
        return result


def test_operations_in_float64_are_noticed() -> None:
    with RefuseFloat64(), pytest.raises(AssertionError):
        torch.ones(2).double()


@pytest.mark.parametrize("objective", ["mae", "simdino", "mae+simdino"])
def test_training_step_needs_no_float64(objective: str) -> None:
    """Runs on the CPU in place of MPS."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = RunConfig(objective=objective, model=sizes, local_views=1)  # type: ignore[arg-type]
    module, _ = build_objective(config)
    optimiser = build_optimiser(module, config)
    grids = torch.tensor([[1, 3, 3], [1, 3, 3], [1, 2, 2]] * 2)
    count = int(grids.prod(-1).sum())
    with RefuseFloat64():
        loss, _ = module(torch.randn(count, 3072), grids, torch.rand(count))
        loss.backward()
        clip_gradient(Accelerator(cpu=True), module, 1.0)
        optimiser.step()
        module.after_step(0, 10)


def test_embedding_needs_no_float64() -> None:
    model = M3RetModel(tiny_config())
    rows, grids = pack(make_scans())
    with RefuseFloat64():
        model.embed_scans(rows, grids)
