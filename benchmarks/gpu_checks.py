"""Numerical checks of `gpu.py`: what holds on a CPU must hold on the GPU.

Each check returns what it measured, and the limit that it must not exceed. Without a GPU the checks run on the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling_m3ret import M3RetImageProcessor, M3RetModel, layers_m3ret
from modeling_m3ret.data.loading import Pack, RandomViews
from modeling_m3ret.layers_m3ret import M3RetLayer
from modeling_m3ret.pretraining.objectives import Objective, build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.run_config import RunConfig


OBJECTIVES = ("mae", "simdino", "mae+simdino")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# for tests on a CPU: every part of a real model, in milliseconds
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TINY |= {"decoder_hidden_size": 36, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}


@dataclass(frozen=True)
class Check:
    """One measured value, which must be at most `limit`; NaN fails."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


class SkippedError(Exception):
    """A part that this machine cannot run, with the reason."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_config(quick: bool, objective: str, preset: str = "vits", **options: Any) -> RunConfig:
    """Return the options of a run: as published, or of a tiny model on small views."""
    small = {"preset": "vitt", "model": TINY, "size": 48, "local_size": 32, "local_views": 2}
    return RunConfig(**({"objective": objective, "preset": preset} | options | (small if quick else {})))


def build(run: RunConfig) -> Objective:
    """Build an objective on the GPU, with weights that depend on the options alone.

    The gains of the residual branches are 1 instead of 1e-5, so that every layer matters.
    """
    torch.manual_seed(0)
    objective = build_objective(run)[0].train()
    for module in objective.modules():
        if isinstance(module, M3RetLayer):
            for scale in (module.attention_scale, module.mlp_scale):
                nn.init.ones_(scale.gain)
    return objective.to(device())


@dataclass(frozen=True)
class Array:
    """A record of an array in memory."""

    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        return np.random.default_rng(self.shape).integers(0, 256, self.shape, dtype=np.uint8)


# two X-rays, an endoscopy frame in colour, an ultrasound clip and a CT
SCANS = [Array(shape) for shape in ((180, 150), (96, 128), (120, 160, 3), (10, 90, 120), (24, 96, 96))]


def processor_of(run: RunConfig) -> M3RetImageProcessor:
    return M3RetImageProcessor(size=run.size, num_frames=8)


def planned_pack(objective: Objective, run: RunConfig) -> Pack:
    """Return random views of all scans as the loader gives them: mixed lengths, masks and stochastic depth."""
    processor = processor_of(run)
    views = RandomViews(SCANS, processor, views=objective.views)  # type: ignore[arg-type]
    return Pack.concatenate([views[0, index] for index in range(len(SCANS))]).planned(objective.plan, processor)


def autocast(dtype: torch.dtype | None, on: str) -> AbstractContextManager:
    return torch.autocast(on, dtype=dtype, enabled=dtype is not None)


def train(
    objective: nn.Module, run: RunConfig, pack: Pack, dtype: torch.dtype | None, steps: int, on: str | None = None
) -> list[Tensor]:
    """Train for some steps on one pack. Return the losses, then all weights, as float64 on the CPU."""
    on = on or device()
    optimiser = build_optimiser(objective, run)
    for group in optimiser.param_groups:
        group["lr"] = 1e-3
    losses = []
    for step in range(steps):
        losses.append(backward(objective, run, pack, dtype, on))
        nn.utils.clip_grad_norm_(objective.parameters(), run.gradient_clip)
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(step, steps)  # type: ignore[operator]
    return [torch.tensor(losses, dtype=torch.float64), *map(on_cpu, objective.state_dict().values())]


def backward(objective: nn.Module, run: RunConfig, pack: Pack, dtype: torch.dtype | None, on: str) -> float:
    with autocast(dtype, on):
        loss, _ = objective(**pack.inputs(processor_of(run), on, compact_images=True))
    loss.backward()
    return loss.item()


def loss_and_gradient(
    objective: nn.Module, run: RunConfig, pack: Pack, dtype: torch.dtype | None = None, on: str | None = None
) -> tuple[float, Tensor]:
    """Return the loss of a pack and its gradient as one float64 vector on the CPU."""
    objective.zero_grad()
    loss = backward(objective, run, pack, dtype, on or device())
    return loss, torch.cat([on_cpu(p.grad).flatten() for p in objective.parameters() if p.grad is not None])


def on_cpu(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().double()


def distance(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference relative to the reference."""
    return float((value - reference).norm() / reference.norm())


def largest(distances: Iterable[float]) -> float:
    """Return the maximum, or NaN if one is NaN."""
    return max(distances, key=lambda value: math.inf if math.isnan(value) else value)


def loss_difference(loss: float, reference: float) -> float:
    """Return the relative difference, of losses below 1 the absolute one: those of `mae+simdino` may cancel to zero."""
    return abs(loss - reference) / max(1.0, abs(reference))


def check_parity(quick: bool) -> list[Check]:
    """Loss and gradient against the CPU in float32; bfloat16 against float32 on the same device."""
    checks = []
    for name in OBJECTIVES:
        run = run_config(quick, name)
        objective = build(run).to("cpu")
        pack = planned_pack(objective, run)
        loss, gradient = loss_and_gradient(objective, run, pack, on="cpu")
        objective.to(device())
        for precision, limits in {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.1)}.items():
            same_loss, same = loss_and_gradient(objective, run, pack, PRECISIONS[precision])
            checks.append(Check(f"{name}, {precision}: loss", loss_difference(same_loss, loss), limits[0]))
            checks.append(Check(f"{name}, {precision}: gradient", distance(same, gradient), limits[1]))
    return checks


def embeddings(encoder: M3RetModel, run: RunConfig, scans: Sequence[Array], dtype: torch.dtype | None) -> Tensor:
    inputs = processor_of(run)([scan.open() for scan in scans], return_tensors="pt").to(device())
    with torch.no_grad(), autocast(dtype, device()):
        return encoder.embed_scans(**inputs).cpu()


def check_batch_independence(quick: bool) -> list[Check]:
    """Embeddings of a mixed batch against those of each scan alone, both of unit length."""
    run = run_config(quick, "simdino")
    encoder = build(run).encoder.eval()
    checks = []
    for precision, limit in {"float32": 1e-5, "bfloat16": 2e-2}.items():
        together = embeddings(encoder, run, SCANS, PRECISIONS[precision])
        alone = torch.cat([embeddings(encoder, run, [scan], PRECISIONS[precision]) for scan in SCANS])
        checks.append(Check(f"{precision}: largest distance", float((together - alone).norm(dim=1).max()), limit))
    return checks


def check_determinism(quick: bool) -> list[Check]:
    """Two identical trainings of two steps: the number of losses and weights that differ in any bit."""
    checks = []
    for name in OBJECTIVES:
        run = run_config(quick, name)
        pack = planned_pack(build(run), run)
        for precision, dtype in PRECISIONS.items():
            first, second = (train(build(run), run, pack, dtype, steps=2) for _ in range(2))
            different = sum(int((one != other).sum()) for one, other in zip(first, second, strict=True))
            checks.append(Check(f"{name}, {precision}: different values", different, 0))
    return checks


def grouped_attention() -> AbstractContextManager:
    """Return a context in which a mixed pack takes one attention call per length, as on the CPU."""
    return mock.patch.object(layers_m3ret, "variable_length_attention", return_value=None)


def check_variable_length(quick: bool) -> list[Check]:
    """One variable-length call for all scans against one call per length, in bfloat16."""
    kernel = layers_m3ret.variable_length_attention()
    if device() == "cpu" or kernel is None:
        raise SkippedError("needs a GPU and torch.nn.attention.varlen")
    counted = mock.Mock(side_effect=kernel)
    checks = []
    for name in OBJECTIVES:
        run = run_config(quick, name)
        objective = build(run)
        pack = planned_pack(objective, run)
        with mock.patch.object(layers_m3ret, "variable_length_attention", return_value=counted):
            loss, gradient = loss_and_gradient(objective, run, pack, torch.bfloat16)
        with grouped_attention():
            grouped_loss, grouped = loss_and_gradient(objective, run, pack, torch.bfloat16)
        checks.append(Check(f"{name}: loss", loss_difference(loss, grouped_loss), 1e-2))
        checks.append(Check(f"{name}: gradient", distance(gradient, grouped), 0.1))
    checks.append(Check("runs without a variable-length call", float(counted.call_count == 0), 0))
    return checks


def check_compile(quick: bool) -> list[Check]:
    """Compiled against eager in float32: a dense batch of any size in one graph, and `compile_layers` in training."""
    backend = "aot_eager" if quick else "inductor"
    run = run_config(quick, "simdino")
    encoder = build(run).encoder.eval()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(encoder.embed_scans, dynamic=True, fullgraph=True, backend=backend)
    distances = []
    with torch.no_grad():
        for batch in (2, 3, 5):
            images = torch.randn(batch, 3, run.size, run.size, device=device())
            distances.append(float((compiled(images) - encoder.embed_scans(images)).abs().max()))
    checks = [Check("dense batches: largest difference", largest(distances), 1e-4)]
    checks.append(Check("dense batches: graphs beyond the first", counters["stats"]["unique_graphs"] - 1, 0))
    pack = planned_pack(build(run), run)
    _, gradient = loss_and_gradient(build(run), run, pack)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        layers = build(run_config(quick, "simdino", compile_layers=True))
        checks.append(
            Check("compile_layers: gradient", distance(loss_and_gradient(layers, run, pack)[1], gradient), 1e-3)
        )
    return checks


def check_checkpointing(quick: bool) -> list[Check]:
    """Gradients with `gradient_checkpointing` against those without, and on a GPU the peak memory."""
    checks = []
    for name in OBJECTIVES:
        gradients, peaks = [], []
        for checkpointing in (False, True):
            run = run_config(quick, name, gradient_checkpointing=checkpointing)
            objective = build(run)
            pack = planned_pack(objective, run)
            if device() == "cuda":
                torch.cuda.reset_peak_memory_stats()
            gradients.append(loss_and_gradient(objective, run, pack)[1])
            if device() == "cuda":
                peaks.append(torch.cuda.max_memory_allocated())
        checks.append(Check(f"{name}: gradient", distance(gradients[1], gradients[0]), 1e-4))
        if peaks:
            checks.append(Check(f"{name}: peak memory", peaks[1] / peaks[0], 0.99))
    return checks


def check_fsdp2(quick: bool) -> list[Check]:
    """Losses and weights after two steps under FSDP2 on one process, against those without."""
    backend = "nccl" if device() == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device(), (1,))
    checks = []
    for name in OBJECTIVES:
        run = run_config(quick, name)
        pack = planned_pack(build(run), run)
        for precision, dtype in PRECISIONS.items():
            sharded = build(run)
            for module in sharded.modules():
                if isinstance(module, M3RetLayer):
                    fully_shard(module, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            pairs = zip(train(sharded, run, pack, dtype, 2), train(build(run), run, pack, dtype, 2), strict=True)
            distances = [distance(value, reference) for value, reference in pairs if reference.norm() > 0]
            checks.append(Check(f"{name}, {precision}: losses and weights", largest(distances), 1e-4))
    dist.destroy_process_group()
    return checks
