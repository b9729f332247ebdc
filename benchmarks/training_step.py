"""Measure a training step (forward, backward, clipping, optimiser, teacher) against public code on the same crops.

    python benchmarks/training_step.py simdino --reference CLONE    # a clone of github.com/RobinWu218/SimDINO
    python benchmarks/training_step.py mae                          # ViTMAEForPreTraining of transformers
    python benchmarks/training_step.py mixed                        # ours on the batch padded to its longest scan
    python benchmarks/training_step.py memory --preset vitb         # peak memory, with and without checkpointing

Rounds are interleaved, so that a machine that slows down slows both sides. The medians of the times and of the ratios
of speeds, round by round, are printed with the smallest and the largest ratio.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from timing import pad_to_longest, seconds, speed_ratio
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_m3ret import M3RetConfig, M3RetForPreTraining, M3RetModel
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.packing_m3ret import patchify
from modeling_m3ret.pretraining.objectives import compile_layers
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.simdino import SimDINO, SimDINOLoss


Step = Callable[[], object]
Maker = Callable[[], Step]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def time_in_processes(makers: Mapping[str, Maker], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in interleaved rounds, after two to warm up. Each has a process of its own."""
    context = torch.multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for name, make in makers.items():
        connections[name], other_end = context.Pipe()
        processes.append(context.Process(target=_serve, args=(make, name.startswith("ours"), other_end), daemon=True))
        processes[-1].start()
        connections[name].recv()  # wait until it is ready: no step is timed while another is built
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _round in range(rounds + 2):
        for name, connection in connections.items():
            connection.send("run")
            times[name].append(connection.recv())
    for process in processes:
        process.terminate()
    return {name: taken[2:] for name, taken in times.items()}


def _serve(make: Maker, is_ours: bool, connection: Connection) -> None:
    """Run steps on request: ours as `train.py` sets up a process, others with the defaults of PyTorch."""
    torch.manual_seed(0)
    if is_ours:
        prepare_cpu()
    step = make()
    connection.send("ready")
    while connection.recv() == "run":
        connection.send(seconds(step))


def report(times: Mapping[str, list[float]], pairs: list[tuple[str, str]]) -> None:
    """Print the median time of each step, and the ratio of speeds of each pair."""
    for name, taken in times.items():
        print(f"{name:28s} {statistics.median(taken) * 1e3:9.0f} ms a step")
    for ours, other in pairs:
        print(f"{ours} over {other}: speed ratio {speed_ratio(times[ours], times[other])}")


def pack(scans: list[Tensor]) -> dict[str, Tensor]:
    """Return `pixel_values` and `grid_thw` of scans `(C, D, H, W)`."""
    depth = 1 if all(scan.shape[1] == 1 for scan in scans) else 4  # as in `Pack.inputs` with compact images
    rows = [patchify(scan[None], depth, 16)[0] for scan in scans]
    grids = [(-(-scan.shape[1] // 4), scan.shape[2] // 16, scan.shape[3] // 16) for scan in scans]
    return {"pixel_values": torch.cat(rows), "grid_thw": torch.tensor(grids)}


def our_step(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype | None) -> Step:
    """Return a step with the optimiser of `train.py`."""
    return build_step(model, inputs, dtype, build_optimiser(model, RunConfig()))


def build_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    optimiser: torch.optim.Optimizer,
) -> Step:
    """Return a training step: forward, backward, clipping, optimiser and, for SimDINO, the teacher's update."""
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


def crops(batch: int) -> list[Tensor]:
    """Return two global crops of 224 x 224 and eight local crops of 96 x 96, each `(B, 3, H, W)`."""
    return [torch.randn(batch, 3, size, size) for size in [224] * 2 + [96] * 8]


def our_simdino(
    preset: str, batch: int, dtype: torch.dtype | None, checkpointing: bool = False, compiled: bool = False
) -> Step:
    """Return a SimDINO step on crops packed scan by scan, as the loader does."""
    config = getattr(M3RetConfig, preset)(pooling="cls", drop_path_rate=0.1)
    images = crops(batch)
    inputs = pack([view[scan][:, None] for scan in range(batch) for view in images])
    model = SimDINO(M3RetModel(config), SimDINOLoss(), len(images))
    if checkpointing:
        model.student.activation_checkpointing_enable()
    if compiled:
        compile_layers(model)
    return our_step(model, inputs, dtype)


def public_simdino(clone: Path, preset: str, batch: int, dtype: torch.dtype | None) -> Step:
    """Return the step of the public `train_one_epoch`, without its logging and GPU calls."""
    sys.path.insert(0, str(clone / "simdino"))
    for module in ("wandb", "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
        sys.modules.setdefault(module, types.ModuleType(module))  # imported there, but not needed for a step
    for name in ("datasets", "transforms", "models"):
        setattr(sys.modules["torchvision"], name, sys.modules[f"torchvision.{name}"])
    utils, vits, main = (importlib.import_module(name) for name in ("utils", "vision_transformer", "main_dino"))
    images = crops(batch)
    arch = {"vitt": "vit_tiny", "vits": "vit_small", "vitb": "vit_base"}[preset]

    def build_network(**settings: float) -> nn.Module:
        backbone = getattr(vits, arch)(patch_size=16, **settings)
        return utils.MultiCropWrapper(backbone, vits.DINOHead(backbone.embed_dim, 256))

    student, teacher = build_network(drop_path_rate=0.1), build_network()
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


def compare_simdino(clone: Path, preset: str, batch: int, rounds: int) -> None:
    makers: dict[str, Maker] = {}
    for name, dtype in PRECISIONS.items():
        makers[f"ours {name}"] = partial(our_simdino, preset, batch, dtype)
        makers[f"ours compiled {name}"] = partial(our_simdino, preset, batch, dtype, compiled=True)
        makers[f"public {name}"] = partial(public_simdino, clone, preset, batch, dtype)
    precisions = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
    pairs = [(f"ours{form} {our}", f"public {public}") for our, public in precisions for form in ("", " compiled")]
    report(time_in_processes(makers, rounds), pairs)


def our_mae(preset: str, batch: int, dtype: torch.dtype | None, packed: bool, compiled: bool = False) -> Step:
    images = torch.randn(batch, 3, 224, 224)
    inputs = pack([image[:, None] for image in images]) if packed else {"pixel_values": images}
    model = M3RetForPreTraining(getattr(M3RetConfig, preset)())
    if compiled:
        compile_layers(model)
    return our_step(model, inputs, dtype)


def public_mae(preset: str, batch: int, dtype: torch.dtype | None) -> Step:
    config = getattr(M3RetConfig, preset)()
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            decoder_hidden_size=config.decoder_hidden_size,
            decoder_num_hidden_layers=config.decoder_num_hidden_layers,
            decoder_num_attention_heads=config.decoder_num_attention_heads,
            decoder_intermediate_size=4 * config.decoder_hidden_size,
            norm_pix_loss=True,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters())
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224)}
    return build_step(model, inputs, dtype, optimiser)


def compare_mae(preset: str, batch: int, rounds: int) -> None:
    """Compare with ViTMAE: same encoder and decoder, 224 x 224 images, 75 % masked, normalised pixels."""
    makers: dict[str, Maker] = {}
    for name, dtype in PRECISIONS.items():
        makers[f"ours {name}"] = partial(our_mae, preset, batch, dtype, False)
        makers[f"ours packed {name}"] = partial(our_mae, preset, batch, dtype, True)
        makers[f"ours compiled {name}"] = partial(our_mae, preset, batch, dtype, False, compiled=True)
        makers[f"ViTMAE {name}"] = partial(public_mae, preset, batch, dtype)
    pairs = [(f"ours{form} {name}", f"ViTMAE {name}") for name in PRECISIONS for form in ("", " packed", " compiled")]
    report(time_in_processes(makers, rounds), pairs)


def our_mixed(preset: str, dtype: torch.dtype | None, padded: bool) -> Step:
    """Return an MAE step on 4 X-rays, 2 clips and 1 CT: packed, or padded to the longest scan."""
    shapes = [(1, 224, 224)] * 4 + [(16, 160, 224)] * 2 + [(32, 224, 224)]
    scans = [torch.randn(3, *shape) for shape in shapes]
    inputs = pack(scans)
    if padded:
        inputs = {"pixel_values": pad_to_longest(scans)}
    return our_step(M3RetForPreTraining(getattr(M3RetConfig, preset)()), inputs, dtype)


def compare_padded(preset: str, rounds: int) -> None:
    makers: dict[str, Maker] = {}
    for name, dtype in PRECISIONS.items():
        for form in ("packed", "padded"):
            makers[f"ours {form} {name}"] = partial(our_mixed, preset, dtype, form == "padded")
    report(time_in_processes(makers, rounds), [(f"ours packed {name}", f"ours padded {name}") for name in PRECISIONS])


def measure_memory(preset: str, batch: int, dtype: torch.dtype | None, checkpointing: bool) -> None:
    """Run SimDINO steps in this process; print its peak resident memory and the time of the last step."""
    import resource

    step = our_simdino(preset, batch, dtype, checkpointing)
    for _ in range(2):
        taken = seconds(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"checkpointing {checkpointing!s:5}  {peak:6.2f} GiB  {taken:6.1f} s a step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["simdino", "mae", "mixed", "memory"], help="what to measure, see above")
    parser.add_argument("--reference", type=Path, help="clone of the public SimDINO, for `simdino`")
    parser.add_argument("--preset", choices=["vitt", "vits", "vitb"], default="vits", help="size of the model")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="precision, for `memory`")
    parser.add_argument("--checkpointing", choices=["yes", "no"], help="measure one case in this process, for `memory`")
    arguments = parser.parse_args()
    if arguments.benchmark == "simdino":
        if arguments.reference is None:
            parser.error("simdino needs --reference")
        compare_simdino(arguments.reference, arguments.preset, arguments.batch, arguments.rounds)
    elif arguments.benchmark == "mae":
        compare_mae(arguments.preset, arguments.batch, arguments.rounds)
    elif arguments.benchmark == "mixed":
        compare_padded(arguments.preset, arguments.rounds)
    elif arguments.checkpointing:
        prepare_cpu()
        dtype = PRECISIONS[arguments.precision]
        measure_memory(arguments.preset, arguments.batch, dtype, arguments.checkpointing == "yes")
    else:  # the peak is that of a process, so each case runs in its own
        for answer in ("no", "yes"):
            subprocess.run([*sys.orig_argv, "--checkpointing", answer], check=True)


if __name__ == "__main__":
    main()
