"""Pretrain an M3Ret encoder, and end with a checkpoint for `from_pretrained` and a retrieval table.

    accelerate launch train.py --config configs/vitb.yaml                      # the paper's size, GPUs
    accelerate launch train.py --config configs/smoke.yaml                     # minutes on two CPU cores
    accelerate launch train.py --config configs/smoke.yaml --data FOLDER --steps 500 --report_to tensorboard
    accelerate launch train.py --config configs/vitb.yaml --resume             # go on from the newest checkpoint

Every key of the YAML file can be given as `--key value`; what each means stands in
`modeling_m3ret/pretraining/run_config.py`, what the numbers mean in `docs/training.md`.
"""

import time
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import (
    check_modalities,
    exclude_modalities,
    open_collection,
    split_training_and_held_out,
)
from modeling_m3ret.data.loading import RandomViews, expected_tokens, training_loader
from modeling_m3ret.data.parquet import group_into_blocks
from modeling_m3ret.data.sampler import SeededBatchSampler, TokenBatchSampler
from modeling_m3ret.pretraining.accumulation import accumulate_gradients
from modeling_m3ret.pretraining.checkpoints import checkpoint_place
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import build_optimiser, set_schedule
from modeling_m3ret.pretraining.quality import OnlineQuality, collapse_alarm
from modeling_m3ret.pretraining.run_config import parse_run_config
from modeling_m3ret.pretraining.run_log import RunLog
from modeling_m3ret.pretraining.saving import RunSaver
from modeling_m3ret.pretraining.sharding import clip_gradient, prepare_training, whole_encoder
from modeling_m3ret.pretraining.stopping import StopSignal, stop_if_not_finite


def main() -> None:
    config = parse_run_config(description=__doc__)
    run_dir = Path(config.run_dir)
    place = checkpoint_place(Path(config.output_dir))
    if config.report_to and config.report_to not in {tracker.value for tracker in get_available_trackers()}:
        raise SystemExit(f"--report_to {config.report_to} needs `pip install {config.report_to}`")
    # a rank may decode or evaluate for longer than the ten minutes that others wait by default
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        mixed_precision=config.precision,
        log_with=config.report_to,
        project_dir=run_dir,
        kwargs_handlers=[patience],
    )
    config = config.as_launched(accelerator.mixed_precision, accelerator.num_processes)
    told = {key: str(value) for key, value in asdict(config).items() if not is_place(key)}
    accelerator.init_trackers("m3ret", config=told)  # a tracker may be elsewhere: no path
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        prepare_cpu(accelerator.state.num_processes)

    # ---- objective: masked autoencoding, self-distillation or both, a module that returns its loss ------------------
    objective, model_config = build_objective(config)
    set_seed(config.seed, device_specific=True)  # equal weights on all ranks, and each draws its own stochastic depth

    # ---- data: every patient is either trained on or held out -------------------------------------------------------
    with accelerator.local_main_process_first():  # the phantom is made once
        records = open_collection(config.data, stream=config.stream)
    training, held_out = split_training_and_held_out(records, config.holdout)
    check_modalities(config.exclude_modalities, records)
    training = exclude_modalities(training, config.exclude_modalities)
    unseen = sorted({record.modality for record in records} - {record.modality for record in training})
    processor = M3RetImageProcessor(
        size=config.size,
        num_frames=config.num_frames,
        max_patches=config.max_patches,
        patch_size=model_config.patch_size,
        patch_depth=model_config.patch_depth,
        num_channels=model_config.num_channels,
    )
    quality = OnlineQuality(training, held_out, processor, accelerator, config.num_workers)
    measured = f"{len(quality.held_out.records)} of them measured"
    accelerator.print(f"{len(training)} scans to train on, {len(held_out)} held out ({measured}), of {config.data}")
    accelerator.print(f"never seen in training: {', '.join(unseen) or 'no modality'}")

    # ---- optimiser, and where an interrupted run stood --------------------------------------------------------------
    optimiser = build_optimiser(objective, config)
    model, optimiser = prepare_training(accelerator, objective, optimiser)
    template = Path(__file__).with_name("model_card.md")
    saver = RunSaver(
        *(config, accelerator, model, optimiser, objective, model_config, processor),
        *(training, quality, unseen, template),
    )
    progress = saver.resume_or_begin()
    log = RunLog(run_dir, accelerator, progress.step)
    blocks = group_into_blocks([record.location for record in training]) if config.stream else None
    order = {
        "seed": config.seed,
        "alpha": config.mixture_alpha,
        "start": progress.step * config.accumulate,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "blocks": None if blocks is None else blocks.block_of_row,
        "lanes": config.stream_lanes,
    }
    strata = [(record.modality, record.source) for record in training]
    if config.tokens_per_batch is None:
        batches = SeededBatchSampler(strata, config.batch_size, **order)
    else:
        tokens = expected_tokens(training, processor, objective.views, model_config.num_prefix_tokens)
        batches = TokenBatchSampler(strata, tokens, config.tokens_per_batch, **order)
    cache_bytes = int(config.cache_gib * 2**30 / max(1, config.num_workers))
    views = RandomViews(
        training, processor, views=objective.views, seed=config.seed, cache_bytes=cache_bytes, blocks=blocks
    )
    packs = iter(training_loader(views, batches, config.num_workers))

    # ---- the loop ---------------------------------------------------------------------------------------------------
    warmup = config.warmup_fraction * config.steps
    last_step = min(config.steps, config.stop_after or config.steps)
    stop = StopSignal(accelerator)
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        desc="pretraining",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    started, seconds_before, views_before = time.perf_counter(), progress.seconds, progress.views
    model.train()
    while progress.step < last_step and not stop.requested():
        learning_rate = set_schedule(optimiser, config, progress.step, accelerator.num_processes)
        step_packs = list(islice(packs, config.accumulate))
        for pack in step_packs:
            progress.unreadable |= dict(pack.failures)
        means, views_of_step = accumulate_gradients(accelerator, model, step_packs, processor)
        gradient_norm = clip_gradient(accelerator, model, config.gradient_clip)
        stop_if_not_finite(accelerator, means["loss"], gradient_norm, progress.step, step_packs, training, run_dir)
        optimiser.step()
        optimiser.zero_grad()
        objective.after_step(progress.step, config.steps)

        progress.step += 1
        progress.views += views_of_step
        progress.seconds = seconds_before + time.perf_counter() - started
        bar.update()
        numbers: dict[str, float] = {}
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            numbers = {name: accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            rate = (progress.views - views_before) / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", views_per_s=f"{rate:.0f}")
            numbers |= {
                "gradient_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                "views": progress.views,
                "views_per_second": rate,
                "seconds": progress.seconds,
            }
        measures, saves = config.due(progress.step)
        if measures or saves or progress.step == last_step:
            encoder = whole_encoder(objective.encoder)
            saver.fit_whitening(encoder)
            if measures:
                numbers |= quality.measure(encoder)
                saver.note_quality(numbers)
            del encoder  # under FSDP2 a copy of all its weights
        if numbers:
            log.numbers(progress.step, numbers)
            if progress.step > warmup and (alarm := collapse_alarm(numbers)):
                log.alarm(progress.step, alarm)
        if saves or saver.is_new_best:
            saver.save_step()
    bar.close()

    # ---- the checkpoint, and what it is worth -----------------------------------------------------------------------
    finished = progress.step == config.steps
    saver.save_step()
    if finished:
        unreadable = dict(gather_object(list(progress.unreadable.items())))  # of all ranks
        saver.save_result(place, unreadable)
    else:
        accelerator.print(f"stopped after step {progress.step} of {config.steps}; `--resume` goes on from there")
    saver.close()
    log.summary(finished, saver.facts())
    accelerator.wait_for_everyone()
    accelerator.end_training()


def is_place(key: str) -> bool:
    return key in ("data", "initial", "output_dir", "run_dir", "push_to_hub")


if __name__ == "__main__":
    main()
