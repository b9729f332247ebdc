"""How fast is a training step? Forward, backward, clipping, optimiser, teacher: beside public code on the same crops.

    python benchmarks/training_step.py simdino --reference CLONE    # CLONE of github.com/RobinWu218/SimDINO, not ours
    python benchmarks/training_step.py mae                          # transformers' ViTMAEForPreTraining
    python benchmarks/training_step.py mixed                        # itself, with the batch padded to its longest scan
    python benchmarks/training_step.py memory --preset vitb         # peak memory, with and without checkpointing

Rounds are interleaved (ours, theirs, ours, ...), so that a machine that slows down slows both; medians of time and of
the ratio pair by pair are printed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
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


def timed(makers: Mapping[str, Maker], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in interleaved rounds, after two that warm up. Each lives in a process of its own."""
    context = torch.multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for name, make in makers.items():
        connections[name], other_end = context.Pipe()
        processes.append(context.Process(target=_serve, args=(make, name.startswith("ours"), other_end), daemon=True))
        processes[-1].start()
        connections[name].recv()  # ready: one after the other, so that none is measured while another is built
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _round in range(rounds + 2):
        for name, connection in connections.items():
            connection.send("go")
            times[name].append(connection.recv())
    for process in processes:
        process.terminate()
    return {name: seconds[2:] for name, seconds in times.items()}


def _serve(make: Maker, is_ours: bool, connection: Connection) -> None:
    """Ours as `train.py` sets up a process; others' as PyTorch does, with as many threads."""
    torch.manual_seed(0)
    if is_ours:
        prepare_cpu()
    step = make()
    connection.send("ready")
    while connection.recv() == "go":
        start = time.perf_counter()
        step()
        connection.send(time.perf_counter() - start)


def report(times: Mapping[str, list[float]], pairs: list[tuple[str, str]]) -> None:
    for name, seconds in times.items():
        print(f"{name:28s} {statistics.median(seconds) * 1e3:9.0f} ms a step")
    for ours, theirs in pairs:
        ratios = sorted(b / a for a, b in zip(times[ours], times[theirs], strict=True))
        print(
            f"{ours} over {theirs}: {statistics.median(ratios):.2f} times the speed ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        )


def pack(scans: list[Tensor]) -> dict[str, Tensor]:
    """Scans `(C, D, H, W)` as packed rows and grids."""
    depth = 1 if all(scan.shape[1] == 1 for scan in scans) else 4  # as `Pack.inputs` does
    rows = [patchify(scan[None], depth, 16)[0] for scan in scans]
    grids = [(-(-scan.shape[1] // 4), scan.shape[2] // 16, scan.shape[3] // 16) for scan in scans]
    return {"pixel_values": torch.cat(rows), "grid_thw": torch.tensor(grids)}


def our_step(
    model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype | None, loss_of: Callable[[object], Tensor]
) -> Step:
    """As the loop of `train.py` does it."""
    return stepping(model, inputs, dtype, loss_of, build_optimiser(model, RunConfig()))


def stepping(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    loss_of: Callable[[object], Tensor],
    optimiser: torch.optim.Optimizer,
) -> Step:
    model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = loss_of(model(**inputs))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad()
        if isinstance(model, SimDINO):
            model.update_teacher(0.996)

    return step


def crops(batch: int) -> list[Tensor]:
    """2 x 224^2 and 8 x 96^2, view by view `(B, 3, H, W)`."""
    return [torch.randn(batch, 3, size, size) for size in [224] * 2 + [96] * 8]


def our_simdino(
    preset: str, batch: int, dtype: torch.dtype | None, checkpointing: bool = False, compiled: bool = False
) -> Step:
    """Packed scan by scan, as the loader gives them."""
    config = getattr(M3RetConfig, preset)(pooling="cls", drop_path_rate=0.1)
    images = crops(batch)
    inputs = pack([view[scan][:, None] for scan in range(batch) for view in images])
    model = SimDINO(M3RetModel(config), SimDINOLoss(), len(images))
    if checkpointing:
        model.student.activation_checkpointing_enable()
    if compiled:
        compile_layers(model)
    return our_step(model, inputs, dtype, lambda out: out.loss)


def public_simdino(clone: Path, preset: str, batch: int, dtype: torch.dtype | None) -> Step:
    """The step of its `train_one_epoch`, without what logs; its GPU calls left out."""
    sys.path.insert(0, str(clone / "simdino"))
    for absent in ("wandb", "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
        sys.modules.setdefault(absent, types.ModuleType(absent))
    for name in ("datasets", "transforms", "models"):
        setattr(sys.modules["torchvision"], name, sys.modules[f"torchvision.{name}"])
    utils, vits, main = (importlib.import_module(name) for name in ("utils", "vision_transformer", "main_dino"))
    images = crops(batch)
    arch = {"vitt": "vit_tiny", "vits": "vit_small", "vitb": "vit_base"}[preset]

    def network(**settings: float) -> nn.Module:
        backbone = getattr(vits, arch)(patch_size=16, **settings)
        return utils.MultiCropWrapper(backbone, vits.DINOHead(backbone.embed_dim, 256))

    student, teacher = network(drop_path_rate=0.1), network()
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
    against = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
    pairs = [(f"ours{form} {own}", f"public {theirs}") for own, theirs in against for form in ("", " compiled")]
    report(timed(makers, rounds), pairs)


def our_mae(preset: str, batch: int, dtype: torch.dtype | None, packed: bool, compiled: bool = False) -> Step:
    images = torch.randn(batch, 3, 224, 224)
    inputs = pack([image[:, None] for image in images]) if packed else {"pixel_values": images}
    model = M3RetForPreTraining(getattr(M3RetConfig, preset)())
    if compiled:
        compile_layers(model)
    return our_step(model, inputs, dtype, lambda out: out.loss)


def vit_mae(preset: str, batch: int, dtype: torch.dtype | None) -> Step:
    config = getattr(M3RetConfig, preset)()
    peer = ViTMAEForPreTraining(
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
    optimiser = torch.optim.AdamW(peer.parameters())
    inputs = {"pixel_values": torch.randn(batch, 3, 224, 224)}
    return stepping(peer, inputs, dtype, lambda out: out.loss, optimiser)


def compare_mae(preset: str, batch: int, rounds: int) -> None:
    """The same encoder and decoder, 224 x 224 images, three quarters masked, pixels normalised."""
    makers: dict[str, Maker] = {}
    for name, dtype in PRECISIONS.items():
        makers[f"ours {name}"] = partial(our_mae, preset, batch, dtype, False)
        makers[f"ours packed {name}"] = partial(our_mae, preset, batch, dtype, True)
        makers[f"ours compiled {name}"] = partial(our_mae, preset, batch, dtype, False, compiled=True)
        makers[f"ViTMAE {name}"] = partial(vit_mae, preset, batch, dtype)
    pairs = [(f"ours{form} {name}", f"ViTMAE {name}") for name in PRECISIONS for form in ("", " packed", " compiled")]
    report(timed(makers, rounds), pairs)


def mixed(preset: str, dtype: torch.dtype | None, padded: bool) -> Step:
    """4 X-rays, 2 clips and 1 CT in a training step of masked autoencoding: packed, or padded to the longest."""
    shapes = [(1, 224, 224)] * 4 + [(16, 160, 224)] * 2 + [(32, 224, 224)]
    scans = [torch.randn(3, *shape) for shape in shapes]
    inputs = pack(scans)
    if padded:
        dense = torch.zeros(len(scans), 3, *[max(shape[axis] for shape in shapes) for axis in range(3)])
        for place, scan in enumerate(scans):
            dense[place, :, : scan.shape[1], : scan.shape[2], : scan.shape[3]] = scan
        inputs = {"pixel_values": dense}
    return our_step(M3RetForPreTraining(getattr(M3RetConfig, preset)()), inputs, dtype, lambda out: out.loss)


def compare_padded(preset: str, rounds: int) -> None:
    makers: dict[str, Maker] = {}
    for name, dtype in PRECISIONS.items():
        for form in ("packed", "padded"):
            makers[f"ours {form} {name}"] = partial(mixed, preset, dtype, form == "padded")
    report(timed(makers, rounds), [(f"ours packed {name}", f"ours padded {name}") for name in PRECISIONS])


def peak_memory(preset: str, batch: int, dtype: torch.dtype | None, checkpointing: bool) -> None:
    """A SimDINO step in this process; prints the process' peak resident memory and the step's time."""
    import resource

    step = our_simdino(preset, batch, dtype, checkpointing)
    for _ in range(2):
        start = time.perf_counter()
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"checkpointing {checkpointing!s:5}  {peak:6.2f} GiB  {time.perf_counter() - start:6.1f} s a step", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simdino", "mae", "mixed", "memory"])
    parser.add_argument("--reference", type=Path, help="clone of the public SimDINO")
    parser.add_argument("--preset", choices=["vitt", "vits", "vitb"], default="vits")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="of `memory`")
    parser.add_argument("--checkpointing", choices=["yes", "no"], help="of `memory`: one of the two, in this process")
    arguments = parser.parse_args()
    if arguments.what == "simdino":
        compare_simdino(arguments.reference, arguments.preset, arguments.batch, arguments.rounds)
    elif arguments.what == "mae":
        compare_mae(arguments.preset, arguments.batch, arguments.rounds)
    elif arguments.what == "mixed":
        compare_padded(arguments.preset, arguments.rounds)
    elif arguments.checkpointing:
        prepare_cpu()
        dtype = PRECISIONS[arguments.precision]
        peak_memory(arguments.preset, arguments.batch, dtype, arguments.checkpointing == "yes")
    else:  # a peak is a process': each in one of its own
        for answer in ("no", "yes"):
            subprocess.run([*sys.orig_argv, "--checkpointing", answer], check=True)


if __name__ == "__main__":
    main()
