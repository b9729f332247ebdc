"""Speed measurements of `gpu.py`: a step of each objective and embedding, beside the models of transformers.

Data are already in the process, as the loader delivers them; a step includes all that the training process does.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_checks import autocast, build, device, grouped_attention, run_config
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel, ViTMAEConfig, ViTMAEForPreTraining

from modeling_m3ret import M3RetConfig, M3RetImageProcessor
from modeling_m3ret.data.loading import Pack
from modeling_m3ret.pretraining.objectives import Objective
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.simdino import SimDINOHead, SimDINOLoss


BATCH = {"vits": 256, "vitb": 128, "vitl": 64}  # scans of a training step; halved until they fit into memory
EMBEDDED = 4  # times as many are embedded at once
# dense bfloat16 rates of data sheets in TFLOP/s, by a part of the device's name; of others the measured product counts
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121}


@dataclass
class Work:
    """A step to measure."""

    step: Callable[[], object]
    images: int  # each with all its views
    tokens: int  # that the (student's) encoder takes, CLS and registers included


def synchronise() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def matrix_product_rate(size: int) -> float:
    """Return the FLOP/s of a bfloat16 product of two square matrices of random values."""
    one, other = torch.randn(2, size, size, device=device(), dtype=torch.bfloat16)
    return 2 * size**3 / median_seconds(lambda: one @ other, rounds=10)


def copy_rate(values: int) -> float:
    """Return the bytes per second, read and written, of a copy within the device."""
    source = torch.randn(values, device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), rounds=10)


def median_seconds(step: Callable[[], object], rounds: int, warm_up: int = 3) -> float:
    """Return the median time of a step until the device has finished it."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(rounds):
        synchronise()
        started = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def describe_machine(quick: bool) -> dict[str, Any]:
    """Return the device, the versions, and the measured rates that bound every step."""
    facts: dict[str, Any] = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda}
    if device() == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    facts["product_tflops"] = matrix_product_rate(256 if quick else 8192) / 1e12
    facts["copy_tb_per_s"] = copy_rate(2**20 if quick else 2**30) / 1e12
    facts["peak_tflops"] = next(
        (rate for name, rate in PEAKS.items() if name in facts["device"]), facts["product_tflops"]
    )
    return facts


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Return time, rates, peak memory, and the number of kernels (operators on a CPU) of a step."""
    work.step()  # compiles, and allocates the moments of the optimiser
    memory = None
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work.step()
        memory = torch.cuda.max_memory_allocated() / 2**30
    seconds = median_seconds(work.step, rounds)
    return {
        "images": work.images,
        "milliseconds": seconds * 1e3,
        "images_per_second": work.images / seconds,
        "tokens_per_second": work.tokens / seconds,
        "memory_gib": memory,
        "kernels": count_kernels(work.step),
    }


def count_flops(step: Callable[[], object]) -> int:
    """Return the FLOPs of a step, with one attention call per length: the same number, and all of it is counted."""
    with FlopCounterMode(display=False) as counter, grouped_attention():
        step()
    return counter.get_total_flops()


def count_kernels(step: Callable[[], object]) -> int:
    """Return the kernels that a step launches on a GPU, or the operators that it calls on a CPU."""
    on_gpu = device() == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        synchronise()
    events = profiler.profiler.kineto_results.events()
    if on_gpu:
        return sum(e.device_type() == DeviceType.CUDA and not e.name().startswith("Mem") for e in events)
    return sum(event.name().startswith("aten::") for event in events)


def training_step(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    optimiser: torch.optim.Optimizer,
    after: Callable[[], object] = lambda: None,
) -> Callable[[], object]:
    """Return forward and backward in bfloat16, clipping and optimiser, then `after`."""

    def step() -> None:
        with autocast(torch.bfloat16, device()):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad()
        after()

    return step


def image_pack(objective: Objective, run: RunConfig, images: int) -> Pack:
    """Return views of grey images of `size` (global) and `local_size` pixels, as the loader gives them."""
    processor = M3RetImageProcessor(size=run.size)
    views = []
    for _ in range(images):
        for kind in objective.views:
            side = kind.size or run.size
            noise = torch.rand((side // processor.patch_size) ** 2)
            for _ in range(kind.count):
                views.append(Pack.from_scan(0, torch.rand(1, 1, side, side), processor, noise))
    pack = Pack.concatenate(views).planned(objective.plan, processor)
    return pack.pin_memory() if device() == "cuda" else pack


def our_training(name: str, preset: str, quick: bool, images: int, compiled: bool) -> Work:
    run = run_config(quick, name, preset, views_per_decode=1, compile_layers=compiled)
    objective = build(run)
    pack = image_pack(objective, run, images)
    processor = M3RetImageProcessor(size=run.size)
    layout = pack.plan.encoder if name == "mae" else pack.plan.student  # type: ignore[union-attr]

    def loss_of() -> Tensor:
        return objective(**pack.inputs(processor, device(), compact_images=True))[0]

    after = partial(objective.after_step, 0, 100)
    step = training_step(objective, loss_of, build_optimiser(objective, run), after)
    return Work(step, images, int(layout.lengths.sum()))


def our_embedding(preset: str, quick: bool, images: int, compiled: bool) -> Work:
    run = run_config(quick, "mae", preset)
    model = build(run).encoder.eval().to(torch.bfloat16)
    pixels = random_images(images, run.size).to(torch.bfloat16)
    call = torch.compile(model.embed_scans, dynamic=True, fullgraph=True) if compiled else model.embed_scans
    tokens = (run.size // 16) ** 2 + model.config.num_prefix_tokens
    return Work(torch.no_grad()(partial(call, pixels)), images, images * tokens)


def random_images(images: int, size: int) -> Tensor:
    return torch.randn(images, 3, size, size, device=device())


def peer_config(preset: str, quick: bool) -> tuple[DINOv3ViTConfig, ViTMAEConfig, RunConfig]:
    """Return the configurations of the models of transformers of the same size, and the run whose sizes they have."""
    run = run_config(quick, "mae", preset)
    config = getattr(M3RetConfig, run.preset)(**run.model)
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    encoder = {name: getattr(config, name) for name in shared} | {"image_size": run.size}
    decoder = {name: getattr(config, f"decoder_{name}") for name in shared if name != "intermediate_size"}
    decoder |= {"intermediate_size": 4 * decoder["hidden_size"]}
    dinov3 = DINOv3ViTConfig(**encoder, num_register_tokens=config.num_register_tokens)
    mae = ViTMAEConfig(**encoder, **{f"decoder_{name}": value for name, value in decoder.items()}, norm_pix_loss=True)
    return dinov3, mae, run


def dinov3_embedding(preset: str, quick: bool, images: int) -> Work:
    config, _, run = peer_config(preset, quick)
    model = DINOv3ViTModel(config).eval().to(device(), torch.bfloat16)
    pixels = random_images(images, run.size).to(torch.bfloat16)
    tokens = (run.size // 16) ** 2 + 1 + config.num_register_tokens
    return Work(torch.no_grad()(partial(model, pixels)), images, images * tokens)


def vit_mae(preset: str, quick: bool, images: int) -> Work:
    _, config, run = peer_config(preset, quick)
    model = ViTMAEForPreTraining(config).to(device())
    pixels = random_images(images, run.size)
    step = training_step(model, lambda: model(pixels).loss, torch.optim.AdamW(model.parameters(), fused=True))
    return Work(step, images, images * (1 + int((run.size // 16) ** 2 * (1 - config.mask_ratio))))


def dinov3_simdino(preset: str, quick: bool, images: int) -> Work:
    """SimDINO with the ViT of DINOv3: one dense batch per size of crop, without stochastic depth."""
    config, _, run = peer_config(preset, quick)
    student = nn.ModuleList([DINOv3ViTModel(config), SimDINOHead(config.hidden_size)]).to(device())
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss = SimDINOLoss()
    crops = [random_images(2 * images, run.size), random_images(run.local_views * images, run.local_size)]

    def project(model: nn.ModuleList, views: list[Tensor]) -> Tensor:
        features = torch.cat([model[0](pixel_values=pixels).pooler_output for pixels in views])
        return model[1](features).unflatten(0, (-1, images))

    def loss_of() -> Tensor:
        with torch.no_grad():
            target = project(teacher, crops[:1])
        return loss(project(student, crops), target).loss

    def update_teacher() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight=0.004)

    step = training_step(student, loss_of, torch.optim.AdamW(student.parameters(), fused=True), update_teacher)
    per_image = sum(
        count * ((side // 16) ** 2 + 1 + config.num_register_tokens)
        for count, side in ((2, run.size), (run.local_views, run.local_size))
    )
    return Work(step, images, images * per_image)


OURS: dict[str, Callable[..., Work]] = {
    "simdino": partial(our_training, "simdino"),
    "mae": partial(our_training, "mae"),
    "embedding": our_embedding,
}
PEERS: dict[str, tuple[str, Callable[..., Work]]] = {
    "simdino": ("DINOv3ViT", dinov3_simdino),
    "mae": ("ViTMAE", vit_mae),
    "embedding": ("DINOv3ViT", dinov3_embedding),
}


def fitting_batch(make: Callable[[int], Work], images: int) -> tuple[Work, int]:
    """Return the work, and its FLOPs, on the given number of images, or on a half, a quarter, ... that fits."""
    while True:
        try:
            work = make(images)
            return work, count_flops(work.step)
        except torch.cuda.OutOfMemoryError:
            if images == 1:
                raise
        images //= 2
        gc.collect()
        torch.cuda.empty_cache()


def measure_speed(work_name: str, preset: str, quick: bool) -> list[dict[str, Any]]:
    """Return a row each for M3Ret, M3Ret compiled (on a GPU) and the model of transformers.

    The batch is halved until it fits, and that of a row is at most that of the row before.
    """
    images = 2 if quick else BATCH[preset] * (EMBEDDED if work_name == "embedding" else 1)
    peer, make_peer = PEERS[work_name]
    makers: dict[str, Callable[[int], Work]] = {"M3Ret": partial(OURS[work_name], preset, quick, compiled=False)}
    if device() == "cuda":
        makers["M3Ret, compiled"] = partial(OURS[work_name], preset, quick, compiled=True)
    makers[peer] = partial(make_peer, preset, quick)
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()
        if name == "M3Ret, compiled":  # the counter does not see into compiled code; the FLOPs are the same
            work = make(images)
        else:
            work, flops = fitting_batch(make, images)
            images = work.images
        row = {"work": work_name, "preset": preset, "model": name} | measure(work, rounds=3 if quick else 20)
        del work
        tflop_per_second = flops / row["milliseconds"] / 1e9
        rows.append(row | {"gflop_per_image": flops / row["images"] / 1e9, "tflop_per_second": tflop_per_second})
    return rows
