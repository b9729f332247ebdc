"""Pretrain on a GPU machine with torch, transformers and accelerate alone, in pieces of limited time.

    python benchmarks/gpu_pretrain.py pack DATA... --output corpus.safetensors   # where the scans are
    python benchmarks/gpu_pretrain.py train corpus.safetensors RUN EXPORT        # on the GPU; repeat until finished
    python benchmarks/gpu_pretrain.py join EXPORT CHECKPOINT                     # anywhere: for `from_pretrained`

`pack` writes all scans into one small file. `train` continues the run in the folder RUN, stops after `--minutes`, and
leaves a complete checkpoint in RUN and the encoder, in half precision and in files of less than 16 MiB, in EXPORT.
A continued run sees the same batches as an uninterrupted one. `gpu_pretrain.sh` has the options of the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # the package need not be installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from gpu_corpus import PackedScan, read_corpus, write_corpus  # noqa: E402
from gpu_views import Store, ViewSampler  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from modeling_m3ret import M3RetConfig, M3RetImageProcessor, M3RetModel  # noqa: E402
from modeling_m3ret.atomic_io import append_json_line, atomic_folder  # noqa: E402
from modeling_m3ret.data.loading import PackLoader  # noqa: E402
from modeling_m3ret.data.sampler import SeededBatchSampler  # noqa: E402
from modeling_m3ret.model_facts import sha256_of  # noqa: E402
from modeling_m3ret.pretraining.distributed import clip_gradient, gather_encoder, prepare_training  # noqa: E402
from modeling_m3ret.pretraining.objectives import Objective, build_objective  # noqa: E402
from modeling_m3ret.pretraining.optimisation import build_optimiser, set_schedule  # noqa: E402
from modeling_m3ret.pretraining.run_config import RunConfig, format_differences  # noqa: E402
from modeling_m3ret.pretraining.training_state import STATE_FOLDER, gather_state, restore_state  # noqa: E402


PART_BYTES = 15 * 2**20  # files of an export
CARRIED_BYTES = 60 * 2**20  # of corpus and code together
WHITENED_SCANS = 4096  # that the whitening is fitted to, at most


def split_files(folder: Path, limit: int = PART_BYTES) -> None:
    """Cut every file above `limit` bytes into numbered parts, and write the SHA-256 of all files to `files.json`."""
    digests = {}
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        digests[path.name] = sha256_of(path)
        if path.stat().st_size > limit:
            content = path.read_bytes()
            for number, first in enumerate(range(0, len(content), limit)):
                path.with_name(f"{path.name}.part{number:02d}").write_bytes(content[first : first + limit])
            path.unlink()
    (folder / "files.json").write_text(json.dumps(digests, indent=1) + "\n")


def join_files(folder: Path, output: Path) -> None:
    """Undo `split_files` into another folder.

    Raises:
        SystemExit: if a file is missing or damaged.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, digest in json.loads((folder / "files.json").read_text()).items():
        parts = sorted(folder.glob(f"{name}.part*")) or [folder / name]
        with (output / name).open("wb") as joined:
            for part in parts:
                joined.write(part.read_bytes() if part.is_file() else b"")
        if sha256_of(output / name) != digest:
            sys.exit(f"{folder}: {name} is damaged: expected SHA-256 {digest}. Copy all files of the folder again.")


def pack_corpus(data: list[str], output: Path, size: int, num_frames: int, quality: float, keep: Path | None) -> None:
    """Read, resize and compress the scans of collections.

    MRI, the validation and test splits, unreadable scans, and ids that are not in the file `keep` are left out.
    """
    from modeling_m3ret.data.collection import exclude_modalities, open_collection
    from modeling_m3ret.reading_m3ret import M3RetReadError

    kept = None if keep is None else set(keep.read_text().split())
    records = [r for each in data for r in exclude_modalities(open_collection(each), ["mri"])]
    records = [r for r in records if r.split in ("", "train") and (kept is None or r.id in kept)]
    processor = M3RetImageProcessor(size=size, num_frames=num_frames)
    scans: list[PackedScan] = []
    volumes: list[Tensor] = []
    for record in sorted(records, key=lambda record: (record.modality, record.source, record.id)):
        try:
            volume = processor.resize(processor.read(record.open()))
        except M3RetReadError as error:
            print(f"left out: {error}")
            continue
        volumes.append(((volume + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        C, D, H, W = volume.shape
        scans.append(PackedScan(record.id, record.modality, record.source, (C, D, H, W)))
    write_corpus(output, scans, iter(volumes), quality)
    code = [
        path
        for name in ("modeling_m3ret", "benchmarks")
        for path in Path(__file__).parents[1].joinpath(name).rglob("*.py")
    ]
    carried = output.stat().st_size + sum(path.stat().st_size for path in code)
    print(f"{len(scans)} scans, {output.stat().st_size / 2**20:.1f} MiB; with the code {carried / 2**20:.1f} MiB")
    if carried > CARRIED_BYTES:
        sys.exit(
            f"too large: expected at most {CARRIED_BYTES / 2**20:.0f} MiB. Lower --quality, --size or --num_frames."
        )


class Run:
    """A pretraining run that can be stopped and continued at any step."""

    def __init__(self, corpus: Path, folder: Path, config: RunConfig, workers: int):
        scans, volumes = read_corpus(corpus, max(1, workers))  # processes are forked before the GPU is used
        self.folder, self.checkpoint = folder, folder / "checkpoint"
        self.accelerator = Accelerator(mixed_precision=config.precision or "no")
        self.config = config.as_launched(self.accelerator.mixed_precision, 1)
        set_seed(config.seed)
        self.objective: Objective
        self.objective, self.model_config = build_objective(self.config)
        if self.model_config.converted_from is not None:  # its patches, means and deviations are others
            sys.exit(f"initial: expected an encoder of M3Ret's own, got {self.config.initial}. Use train.py.")
        self.processor = M3RetImageProcessor(size=config.size, num_frames=config.num_frames)
        optimiser = build_optimiser(self.objective, self.config)
        self.model, self.optimiser = prepare_training(self.accelerator, self.objective, optimiser)
        self.step = 0
        if self.checkpoint.is_dir():
            self._restore()
        self.store = Store.from_volumes(scans, volumes, self.accelerator.device)
        self.workers = workers

    def batches(self) -> Iterator[Any]:
        """Yield the views of each step from the current one on."""
        strata = [(scan.modality, scan.source) for scan in self.store.scans]
        config = self.config
        order = SeededBatchSampler(
            strata, config.batch_size, seed=config.seed, alpha=config.mixture_alpha, start=self.step
        )
        sampler = ViewSampler(
            self.store.without_voxels(), self.processor, self.objective.views, self.objective.plan, config.seed
        )
        options = {"prefetch_factor": 4, "persistent_workers": True} if self.workers else {}
        return iter(
            PackLoader(
                sampler,  # type: ignore[arg-type]
                self.workers,
                collate_fn=_unchanged,
                sampler=zip(count(self.step), order),
                batch_size=None,
                pin_memory=self.accelerator.device.type == "cuda",
                **options,
            )
        )

    def train(self, until: float) -> None:
        """Train until the last step or the time `until`, in seconds of `time.monotonic`."""
        config, batches = self.config, self.batches()
        last = min(config.steps, config.stop_after or config.steps)
        self.model.train()
        started, first = time.monotonic(), self.step
        while self.step < last and time.monotonic() < until:
            learning_rate = set_schedule(self.optimiser, config, self.step, 1)
            pack = self.store.render(next(batches))
            with self.accelerator.autocast():
                loss, terms = self.model(**pack.inputs(self.processor, self.accelerator.device, compact_images=True))
            self.accelerator.backward(loss)
            norm = clip_gradient(self.accelerator, self.model, config.gradient_clip)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.objective.after_step(self.step, config.steps)
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                values = {"loss": loss, "gradient_norm": norm, **terms}
                metrics: dict[str, Any] = {"step": self.step} | {name: each.item() for name, each in values.items()}
                if not np.isfinite(metrics["loss"]):
                    sys.exit(f"step {self.step}: the loss is not finite. The last checkpoint is intact.")
                rate = (self.step - first) * config.batch_size / (time.monotonic() - started)
                metrics |= {"learning_rate": learning_rate, "scans_per_second": rate}
                append_json_line(self.folder / "metrics.jsonl", metrics)
                print(json.dumps(metrics), flush=True)

    def save(self) -> None:
        """Write the checkpoint, in files of less than 16 MiB."""
        state = gather_state(self.accelerator, self.model, self.optimiser)
        with atomic_folder(self.checkpoint, replace=True) as folder:
            save_file(
                {name: value.contiguous() for name, value in state.weights.items()}, folder / "weights.safetensors"
            )
            save_file(state.optimiser, folder / "optimiser.safetensors")
            save_file(state.random, folder / "random.safetensors")
            (folder / "run.json").write_text(json.dumps({"step": self.step, "config": asdict(self.config)}))
            split_files(folder)

    def _restore(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            joined = Path(name)
            join_files(self.checkpoint, joined / STATE_FOLDER)
            saved = json.loads((joined / STATE_FOLDER / "run.json").read_text())
            if differences := self.config.differences(saved["config"]):
                sys.exit(f"{self.folder} holds another run ({format_differences(differences)}). Choose another folder.")
            weights = load_file(joined / STATE_FOLDER / "weights.safetensors")
            restore_state(joined, weights, self.accelerator, self.model, self.optimiser)
            self.step = saved["step"]

    @torch.no_grad()
    def fit_whitening(self) -> None:
        """Fit the whitening of the published encoder to whole scans."""
        encoder = self.objective.encoder.eval()
        chosen = np.random.default_rng(self.config.seed).permutation(len(self.store.scans))[:WHITENED_SCANS]
        pooled = []
        for indices in np.array_split(chosen, max(1, len(chosen) // 64)):
            pack = self.store.render(self.store.whole_scans(self.processor, indices))
            with self.accelerator.autocast():
                inputs = pack.inputs(self.processor, self.accelerator.device, compact_images=True)
                pooled.append(encoder.embed(**inputs).float())
        encoder.whitening.fit(torch.cat(pooled))

    def export(self, folder: Path) -> None:
        """Write the published encoder in bfloat16, its processor, and the metrics, in files of less than 16 MiB."""
        self.fit_whitening()
        encoder = gather_encoder(self.objective.encoder)  # without adapters
        weights = {name: value.to(torch.bfloat16) for name, value in encoder.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # of an earlier piece
            path.unlink()
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, folder / "encoder.safetensors")
        (folder / "config.json").write_text(self.objective.encoder.config.to_json_string())
        (folder / "run.json").write_text(json.dumps({"step": self.step, "config": asdict(self.config)}))
        if (self.folder / "metrics.jsonl").is_file():
            shutil.copy(self.folder / "metrics.jsonl", folder)
        split_files(folder)


def _unchanged(batch: Any) -> Any:  # a function, because workers receive it by name
    return batch


def join_export(export: Path, output: Path) -> None:
    """Make a checkpoint for `from_pretrained` from an export."""
    with tempfile.TemporaryDirectory() as name:
        join_files(export, Path(name))
        run = json.loads((Path(name) / "run.json").read_text())
        model = M3RetModel(M3RetConfig.from_json_file(str(Path(name) / "config.json")))
        model.load_state_dict(load_file(Path(name) / "encoder.safetensors"))
    model.to(torch.bfloat16).save_pretrained(output)
    M3RetImageProcessor(size=run["config"]["size"], num_frames=run["config"]["num_frames"]).save_pretrained(output)
    print(f"{output}: encoder after step {run['step']} of {run['config']['steps']}")


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write scans into one file")
    packing.add_argument("data", nargs="+", help="folders with a manifest.csv, or datasets")
    packing.add_argument("--output", type=Path, required=True, help="file to write")
    packing.add_argument("--size", type=int, default=160, help="image size in pixels")
    packing.add_argument("--num_frames", type=int, default=16, help="maximum number of slices")
    packing.add_argument("--quality", type=float, default=1.5, help="1 is JPEG at quality 50, 2 at 75")
    packing.add_argument("--keep", type=Path, help="text file of the ids to take; by default all")
    training = commands.add_parser("train", help="train for some minutes")
    training.add_argument("corpus", type=Path, help="file of `pack`")
    training.add_argument("run", type=Path, help="folder of the run, kept between pieces")
    training.add_argument("export", type=Path, help="folder for the encoder; emptied first")
    training.add_argument("--options", type=json.loads, default={}, help="options of RunConfig as JSON")
    training.add_argument("--minutes", type=float, default=9, help="duration of the piece, saving included")
    training.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="loader processes")
    joining = commands.add_parser("join", help="make a checkpoint from an export")
    joining.add_argument("export", type=Path, help="folder of `train`")
    joining.add_argument("checkpoint", type=Path, help="folder to write")
    arguments = parser.parse_args()
    if arguments.command == "pack":
        options = {
            name: getattr(arguments, name) for name in ("data", "output", "size", "num_frames", "quality", "keep")
        }
        pack_corpus(**options)
    elif arguments.command == "join":
        join_export(arguments.export, arguments.checkpoint)
    else:
        arguments.run.mkdir(parents=True, exist_ok=True)
        run = Run(arguments.corpus, arguments.run, RunConfig(**arguments.options), arguments.workers)
        reserve = 5 + 0.1 * 60 * arguments.minutes  # seconds, for saving
        run.train(started + 60 * arguments.minutes - reserve)
        run.save()
        run.export(arguments.export)
        steps = run.config.steps
        print("finished" if run.step == steps else f"stopped after step {run.step} of {steps}. Run it again.")


if __name__ == "__main__":
    main()
