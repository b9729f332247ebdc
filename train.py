"""Pretrain an M3Ret encoder, and end with a checkpoint for `from_pretrained` and a retrieval table.

    accelerate launch train.py --config configs/vitb.yaml                      # the paper's size, GPUs
    accelerate launch train.py --config configs/smoke.yaml                     # minutes on two CPU cores
    accelerate launch train.py --config configs/smoke.yaml --data FOLDER --steps 500 --report_to tensorboard

Every key of the YAML file can be given as `--key value`; what each means stands in
`modeling_m3ret/pretraining/run_config.py`.
"""

import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from modeling_m3ret import M3RetImageProcessor, M3RetModel, __version__
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import is_phantom, open_collection, split_by_group, without_modalities
from modeling_m3ret.data.loading import RandomViews, SeededBatches, training_loader
from modeling_m3ret.pretraining.checkpoints import append_json_line, checkpoint_place, save_checkpoint, write_whole
from modeling_m3ret.pretraining.model_card import write_card
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser, warmup_cosine
from modeling_m3ret.pretraining.run_config import parse_run_config
from modeling_m3ret.retrieval.embed import embed_records, encoder_embedder, pixel_embedder
from modeling_m3ret.retrieval.evaluation import evaluate, format_table, to_json


def main() -> None:
    config = parse_run_config(description=__doc__)
    run_dir = Path(config.run_dir)
    place = checkpoint_place(Path(config.output_dir))
    if config.report_to and config.report_to not in {tracker.value for tracker in get_available_trackers()}:
        raise SystemExit(f"--report_to {config.report_to} needs `pip install {config.report_to}`")
    # rank 0 evaluates alone at the end, which may take longer than the ten minutes that others wait by default
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(log_with=config.report_to, project_dir=run_dir, kwargs_handlers=[patience])
    told = {key: str(value) for key, value in asdict(config).items() if key not in ("data", "output_dir", "run_dir")}
    accelerator.init_trackers("m3ret", config=told)  # a tracker may be elsewhere: no path
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        prepare_cpu(accelerator.state.num_processes)

    # ---- objective: masked autoencoding or self-distillation, each a module that returns its loss -------------------
    objective, model_config = build_objective(config)

    # ---- data: every patient is either trained on or held out -------------------------------------------------------
    with accelerator.local_main_process_first():  # the phantom is made once
        records = open_collection(config.data)
    training, held_out = split_by_group(records, config.holdout)
    modalities = {record.modality for record in records}
    training = without_modalities(training, config.exclude_modalities)
    unseen = sorted(modalities - {record.modality for record in training})
    processor = M3RetImageProcessor(
        size=config.size,
        num_frames=config.num_frames,
        max_patches=config.max_patches,
        patch_size=model_config.patch_size,
        patch_depth=model_config.patch_depth,
        num_channels=model_config.num_channels,
    )
    cache_bytes = int(config.cache_gib * 2**30 / max(1, config.num_workers))
    views = RandomViews(training, processor, views=objective.views, seed=config.seed, cache_bytes=cache_bytes)
    batches = SeededBatches(
        len(training),
        config.batch_size,
        seed=config.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    loader = training_loader(views, batches, config.num_workers)
    accelerator.print(f"{len(training)} scans to train on, {len(held_out)} held out, of {config.data}")
    accelerator.print(f"never seen in training: {', '.join(unseen) or 'no modality'}")

    # ---- optimiser --------------------------------------------------------------------------------------------------
    learning_rate = config.peak_learning_rate(accelerator.num_processes)
    optimiser = build_optimiser(objective, config, learning_rate)
    model, optimiser = accelerator.prepare(objective, optimiser)

    # ---- the loop ---------------------------------------------------------------------------------------------------
    warmup = max(1, round(config.warmup_fraction * config.steps))
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics_file = run_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        metrics_file.unlink(missing_ok=True)
    unreadable: dict[int, str] = {}
    views_seen = 0
    model.train()
    started = time.perf_counter()
    progress = tqdm(range(config.steps), desc="pretraining", unit="step", disable=not accelerator.is_main_process)
    for step, pack in zip(progress, loader, strict=False):
        unreadable |= dict(pack.failures)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * warmup_cosine(step, config.steps, warmup)
        loss, terms = model(**pack.inputs(processor, accelerator.device))
        accelerator.backward(loss)
        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
        if not torch.isfinite(gradient_norm):  # on every rank, since gradients are averaged before
            scans = ", ".join(sorted({training[index].id for index in pack.scans}))
            raise FloatingPointError(
                f"step {step + 1}: loss or gradient is not finite; nothing was updated. Scans: {scans}"
            )
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(step, config.steps)

        views_seen += len(pack.scans) * accelerator.num_processes
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            logged = {"loss": loss, **terms}
            logged = {name: accelerator.reduce(term.detach(), "mean").item() for name, term in logged.items()}
            seconds = time.perf_counter() - started
            entry = {
                "step": step + 1,
                **logged,
                "gradient_norm": float(gradient_norm),
                "learning_rate": optimiser.param_groups[0]["lr"],
                "views": views_seen,
                "views_per_second": views_seen / seconds,
                "seconds": seconds,
            }
            progress.set_postfix(loss=f"{logged['loss']:.4f}", views_per_s=f"{views_seen / seconds:.0f}")
            accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=step + 1)
            if accelerator.is_main_process:
                append_json_line(metrics_file, entry)
    progress.close()

    # ---- what it is worth, and the checkpoint -----------------------------------------------------------------------
    unreadable = dict(gather_object(list(unreadable.items())))  # of all ranks
    if accelerator.is_main_process:
        trained = objective.encoder.eval()
        facts = {
            "objective": config.objective,
            "preset": config.preset,
            "steps": config.steps,
            "views": views_seen,
            "training_scans": len(training),
            "modalities": sorted({record.modality for record in training}),
            "unseen_modalities": unseen,
            "holdout": config.holdout,
            "held_out_scans": len(held_out),
            "unreadable_scans": len(unreadable),
            "synthetic": is_phantom(config.data),
            "seed": config.seed,
            "m3ret": __version__,
            "seconds": round(time.perf_counter() - started, 1),
        }
        template = Path(__file__).with_name("model_card.md")
        card = write_card(template, config, model_config, trained.num_parameters(), facts, [])
        save_checkpoint(place, objective, processor, card, facts)  # first: an evaluation that fails costs no weights

        set_seed(config.seed)
        untrained = M3RetModel(model_config).eval().to(accelerator.device)
        embedders = {
            "pixels": pixel_embedder(processor),
            "untrained": encoder_embedder(untrained),
            "trained": encoder_embedder(trained),
        }
        embedded = embed_records(list(embedders.values()), processor, held_out, num_workers=config.num_workers)
        rows = evaluate(dict(zip(embedders, embedded, strict=True)))
        facts |= {
            "held_out_scans": len(embedded[0].records),
            "unreadable_scans": len(unreadable) + len(embedded[0].failures),
        }
        card = write_card(template, config, model_config, trained.num_parameters(), facts, rows)
        write_whole(place / "README.md", card)
        write_whole(place / "training.json", json.dumps(facts, indent=2) + "\n")
        write_whole(run_dir / "retrieval.json", to_json(rows, **facts) + "\n")
        print(format_table(rows))
        for message in [*unreadable.values(), *embedded[0].failures]:
            print(f"not read: {message}")
        print(f"checkpoint: {config.output_dir}   metrics: {metrics_file}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
