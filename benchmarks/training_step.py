"""Measure a training step (forward, backward, clipping, optimiser, teacher) against public code on the same crops.

    python benchmarks/training_step.py simdino --reference CLONE    # a clone of github.com/RobinWu218/SimDINO
    python benchmarks/training_step.py mae                          # ViTMAEForPreTraining of transformers
    python benchmarks/training_step.py mixed                        # ours on the batch padded to the longest, and FLOPs
    python benchmarks/training_step.py memory --preset vitb         # peak memory, with and without checkpointing
    python benchmarks/training_step.py scaling --preset vitt        # cost of a step against scans and tokens

Rounds are interleaved. The medians of the times and of the ratios of speeds, round by round, are printed with the
smallest and the largest ratio.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from pathlib import Path

import timing
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_m3ret import M3RetConfig, M3RetForPreTraining, M3RetImageProcessor, M3RetModel
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.loading import Pack
from modeling_m3ret.pretraining.objectives import build_objective, checkpoint_activations, compile_layers
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.simdino import SimDINO, SimDINOLoss


Step = Callable[[], object]
Maker = Callable[..., Step]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
MIXED = [(1, 224, 224)] * 4 + [(16, 160, 224)] * 2 + [(32, 224, 224)]  # 4 X-rays, 2 clips and 1 CT
CROPS = [224] * 2 + [96] * 8  # sides of the global and local crops of SimDINO
PROCESSES = multiprocessing.get_context("spawn")
_step: Step  # of this process, set by `_make_step`


def compare(makers: Mapping[str, Maker], reference: str, rounds: int) -> None:
    """Print the time of each step in each precision, and the ratios of speeds of ours over the reference.

    Each step runs in a process of its own, twice before the rounds to warm up.
    """
    with ExitStack() as stack:
        calls = {}
        for name, precision in product(makers, PRECISIONS):
            make = partial(makers[name], dtype=PRECISIONS[precision])
            arguments = (make, name.startswith("ours"))
            pool = stack.enter_context(ProcessPoolExecutor(1, PROCESSES, _make_step, arguments))
            pool.submit(_run_step).result()  # no step is timed while another is made
            calls[f"{name} {precision}"] = lambda pool=pool: pool.submit(_run_step).result()
        precisions = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
        ours = [name for name in makers if name != reference]
        timing.compare(calls, [(f"{name} {a}", f"{reference} {b}") for a, b in precisions for name in ours], rounds)


def _make_step(make: Maker, is_ours: bool) -> None:
    """Make the step of this process: ours as `train.py` sets up a process, others with the defaults of PyTorch."""
    global _step
    torch.manual_seed(0)
    if is_ours:
        prepare_cpu()
    _step = make()


def _run_step() -> None:
    _step()


def pack(scans: list[Tensor]) -> dict[str, Tensor]:
    """Return the model's inputs for scans `(C, D, H, W)`, as in training."""
    rows, grids = M3RetImageProcessor().pack(scans, compact_images=True)
    return {"pixel_values": rows, "grid_thw": grids}


def build_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    compiled: bool = False,
    optimiser: torch.optim.Optimizer | None = None,
) -> Step:
    """Return a training step: forward, backward, clipping, optimiser and, for SimDINO, the teacher's update.

    The optimiser is that of `train.py` unless given.
    """
    if compiled:
        compile_layers(model)
    optimiser = optimiser or build_optimiser(model, RunConfig())
    model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad()
        if isinstance(model, SimDINO):
            model.update_teacher(0.996)

    return step


def our_simdino(
    preset: str, batch: int, dtype: torch.dtype | None, checkpointing: bool = False, compiled: bool = False
) -> Step:
    """Return a SimDINO step on crops packed scan by scan, as the loader does."""
    config = getattr(M3RetConfig, preset)(pooling="cls", drop_path_rate=0.1)
    images = [torch.randn(batch, 3, size, size) for size in CROPS]
    inputs = pack([view[scan][:, None] for scan in range(batch) for view in images])
    model = SimDINO(M3RetModel(config), SimDINOLoss(), len(images))
    if checkpointing:
        checkpoint_activations(model.student)
    return build_step(model, inputs, dtype, compiled)


def public_simdino(clone: Path, preset: str, batch: int, dtype: torch.dtype | None) -> Step:
    """Return the step of the public `train_one_epoch`, without its logging and GPU calls."""
    sys.path.insert(0, str(clone / "simdino"))
    for module in ("wandb", "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
        sys.modules.setdefault(module, types.ModuleType(module))  # imported there, but not needed for a step
    for name in ("datasets", "transforms", "models"):
        setattr(sys.modules["torchvision"], name, sys.modules[f"torchvision.{name}"])
    utils, vits, main = (importlib.import_module(name) for name in ("utils", "vision_transformer", "main_dino"))
    images = [torch.randn(batch, 3, size, size) for size in CROPS]
    build_backbone = getattr(vits, {"vitt": "vit_tiny", "vits": "vit_small", "vitb": "vit_base"}[preset])
    backbones = (build_backbone(patch_size=16, drop_path_rate=0.1), build_backbone(patch_size=16))
    student, teacher = (utils.MultiCropWrapper(each, vits.DINOHead(each.embed_dim, 256)) for each in backbones)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_of = main.MCRLoss(len(images), eps=0.05)
    optimiser = torch.optim.AdamW(utils.get_params_groups(student))

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            teacher_output = teacher(images[:2])
            student_output = student(images)
        loss, *_ = loss_of(student_output.float(), teacher_output.float())
        optimiser.zero_grad()
        loss.backward()
        utils.clip_gradients(student, 3.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), weight=0.004)

    return step


def our_mae(
    preset: str, shapes: Sequence[tuple[int, int, int]], packed: bool, dtype: torch.dtype | None, compiled: bool = False
) -> Step:
    """Return an MAE step on scans of shapes `(D, H, W)`, packed or padded to the longest."""
    scans = [torch.randn(3, *shape) for shape in shapes]
    inputs = (
        pack(scans) if packed else {"pixel_values": timing.pad_to_longest(scans).squeeze(2)}
    )  # images are (B, C, H, W)
    return build_step(M3RetForPreTraining(getattr(M3RetConfig, preset)()), inputs, dtype, compiled)


def vit_mae(preset: str, batch: int, dtype: torch.dtype | None) -> Step:
    """Return a step of ViTMAE with our encoder and decoder, on 224 x 224 images, 75 % masked, normalised pixels."""
    config = getattr(M3RetConfig, preset)()
    encoder = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    decoder = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
    shared = {name: getattr(config, name) for name in (*encoder, *decoder)}
    width = 4 * config.decoder_hidden_size
    model = ViTMAEForPreTraining(ViTMAEConfig(**shared, decoder_intermediate_size=width, norm_pix_loss=True))
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224)}
    return build_step(model, inputs, dtype, optimiser=torch.optim.AdamW(model.parameters()))


def measure_memory(preset: str, batch: int, dtype: torch.dtype | None, checkpointing: bool) -> None:
    """Run SimDINO steps in this process; print its peak resident memory and the time of the last step."""
    prepare_cpu()
    step = our_simdino(preset, batch, dtype, checkpointing)
    taken = [timing.seconds(step) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"checkpointing {checkpointing!s:5}  {peak:6.2f} GiB  {taken[-1]:6.1f} s a step", flush=True)


def count_flops(step: Step) -> int:
    """Return the FLOPs of all matrix products of a step in bfloat16, whose attention is explicit on a CPU."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@dataclass
class Cost:
    """What a step costs, independent of other processes on the machine except for the time."""

    operators: int  # calls of aten:: operators
    allocated: int  # bytes, in all
    peak: int  # bytes, at once, beyond what was allocated before the step


def profiled(step: Step) -> Cost:
    """Return the cost of a step on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in memory]  # negative where memory is freed
    operators = sum(event.name().startswith("aten::") for event in events)
    return Cost(operators, sum(size for size in sizes if size > 0), max(accumulate(sizes)))


VIEWS = [(96, 96), (80, 112), (48, 48), (48, 48), (32, 64), (64, 32)]  # of a scan, of mixed lengths


def planned_step(run: RunConfig, scans: int, scale: int, dtype: torch.dtype | None) -> tuple[Step, int]:
    """Return forward and backward on a pack of `VIEWS`, as the loader gives it, and its number of tokens.

    It includes what the training process does to the pack. The sides of all views are multiplied by `scale`.
    """
    objective, config = build_objective(run)
    objective.train()
    processor = M3RetImageProcessor()
    volumes = [torch.rand(1, 1, scale * height, scale * width) for _ in range(scans) for height, width in VIEWS]
    views = [
        Pack.from_scan(0, volume, processor, torch.rand(volume.shape[2] * volume.shape[3] // 256)) for volume in volumes
    ]
    pack = Pack.concatenate(views).planned(objective.plan, processor)

    def step() -> None:
        objective.zero_grad()  # adding to gradients takes other operators
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss, _ = objective(**pack.inputs(processor, compact_images=True))
        loss.backward()

    assert pack.noise is not None
    return step, len(pack.noise) + len(volumes) * config.num_prefix_tokens


def measure_scaling(preset: str, dtype: torch.dtype | None, rounds: int) -> None:
    """Print a table of the cost of a step against the number of scans, and of tokens for the same scans.

    CPU time of one thread is measured, because it depends least on other processes, in interleaved rounds. The encoder
    has four layers, so that 256 scans fit into 2 GiB.
    """
    prepare_cpu()
    torch.set_num_threads(1)
    cases = [(16, 1), (64, 1), (256, 1), (16, 2)]  # the last has four times the patches of the first
    print(
        "| objective | scans | tokens | operators | allocated, MB a scan | peak, MB a scan | ms a scan | against 64 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for objective in ("mae", "simdino"):
        run = RunConfig(objective=objective, preset=preset, model={"num_hidden_layers": 4}, local_views=len(VIEWS) - 2)
        made = {case: planned_step(run, *case, dtype) for case in cases}
        costs = {case: profiled(step) for case, (step, _) in made.items()}  # also warms up
        times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
        for _, (case, (step, _)) in product(range(rounds), made.items()):
            started = time.process_time()
            step()
            times[case].append((time.process_time() - started) / case[0])
        for case, (_, tokens) in made.items():
            cost, scans = costs[case], case[0]
            memory = f"{cost.allocated / scans / 1e6:.1f} | {cost.peak / scans / 1e6:.1f}"
            ratio = statistics.median(ours / other for ours, other in zip(times[case], times[64, 1], strict=True))
            taken = f"{statistics.median(times[case]) * 1e3:.1f} | {ratio:.2f}"
            print(f"| {objective} | {scans} | {tokens} | {cost.operators} | {memory} | {taken} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "benchmark", choices=["simdino", "mae", "mixed", "memory", "scaling"], help="what to measure, see above"
    )
    parser.add_argument("--reference", type=Path, help="clone of the public SimDINO, for `simdino`")
    parser.add_argument("--preset", choices=["vitt", "vits", "vitb"], default="vits", help="size of the model")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="fp32", help="precision, for `memory` and `scaling`"
    )
    arguments = parser.parse_args()
    preset, batch, rounds = arguments.preset, arguments.batch, arguments.rounds
    if arguments.benchmark == "simdino":
        if arguments.reference is None:
            parser.error("simdino needs --reference")
        makers = {
            "ours": partial(our_simdino, preset, batch),
            "ours compiled": partial(our_simdino, preset, batch, compiled=True),
            "public": partial(public_simdino, arguments.reference, preset, batch),
        }
        compare(makers, "public", rounds)
    elif arguments.benchmark == "mae":
        images = [(1, 224, 224)] * batch
        makers = {
            "ours": partial(our_mae, preset, images, False),
            "ours packed": partial(our_mae, preset, images, True),
            "ours compiled": partial(our_mae, preset, images, False, compiled=True),
            "ViTMAE": partial(vit_mae, preset, batch),
        }
        compare(makers, "ViTMAE", rounds)
    elif arguments.benchmark == "mixed":
        makers = {f"ours {form}": partial(our_mae, preset, MIXED, form == "packed") for form in ("packed", "padded")}
        packed, padded = (count_flops(make(dtype=torch.bfloat16)) for make in makers.values())
        print(f"GFLOP: {packed / 1e9:.0f} packed, {padded / 1e9:.0f} padded, ratio {padded / packed:.2f}", flush=True)
        compare(makers, "ours padded", rounds)
    elif arguments.benchmark == "scaling":
        measure_scaling(preset, PRECISIONS[arguments.precision], rounds)
    else:  # the peak is that of a process, so each case runs in its own
        for checkpointing in (False, True):
            with ProcessPoolExecutor(1, PROCESSES) as pool:
                pool.submit(measure_memory, preset, batch, PRECISIONS[arguments.precision], checkpointing).result()


if __name__ == "__main__":
    main()
