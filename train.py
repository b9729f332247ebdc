"""Pretrain an M3Ret encoder. The run ends with a checkpoint for `from_pretrained` and a table of its retrieval quality.

    accelerate launch train.py --config configs/vitb.yaml                      # the paper's size, GPUs
    accelerate launch train.py --config configs/smoke.yaml                     # minutes on two CPU cores
    accelerate launch train.py --config configs/smoke.yaml --data FOLDER --steps 500 --report_to tensorboard
    accelerate launch train.py --config configs/vitb.yaml --resume             # continue from the newest checkpoint
    accelerate launch train.py --config configs/simdino.yaml --initial facebook/dinov3-vits16-pretrain-lvd1689m

Options override the YAML file. docs/training.md explains the metrics.
"""

import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.command_line import user_errors
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import (
    exclude_modalities,
    open_collection,
    split_training_and_held_out,
)
from modeling_m3ret.data.loading import RandomViews, expected_tokens, training_loader
from modeling_m3ret.data.parquet import group_into_blocks
from modeling_m3ret.data.sampler import SeededBatchSampler, TokenBatchSampler
from modeling_m3ret.pretraining.checkpoints import validate_output_folder
from modeling_m3ret.pretraining.distributed import (
    check_process_count,
    clip_gradient,
    gather_encoder,
    prepare_training,
    supported_precision,
)
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.optimisation import accumulate_gradients, build_optimiser, set_schedule
from modeling_m3ret.pretraining.quality import OnlineQuality, collapse_alarm
from modeling_m3ret.pretraining.run_config import PATHS, ConfigError
from modeling_m3ret.pretraining.run_log import RunLog
from modeling_m3ret.pretraining.run_options import parse_run_config
from modeling_m3ret.pretraining.saving import RunSaver
from modeling_m3ret.pretraining.stopping import StopSignal, stop_if_not_finite
from modeling_m3ret.pretraining.warm_start import read_start


def main() -> None:
    config = parse_run_config(sys.argv[1:], description=__doc__)
    start = read_start(config)
    if start is not None and start.fields(config) is not None:
        config = replace(config, preset="initial")
    run_dir = Path(config.run_dir)
    output_dir = validate_output_folder(Path(config.output_dir))
    if config.report_to and config.report_to not in {tracker.value for tracker in get_available_trackers()}:
        problem = f"expected an installed tracker, got {config.report_to}. Run `pip install {config.report_to}`."
        raise ConfigError("report_to", problem)
    accelerator = Accelerator(
        mixed_precision=supported_precision(config.precision),
        log_with=config.report_to,
        project_dir=run_dir,
        # a rank may decode or evaluate for longer than the default timeout of ten minutes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    check_process_count(accelerator.num_processes)
    config = config.as_launched(accelerator.mixed_precision, accelerator.num_processes)
    tracked = {key: str(value) for key, value in asdict(config).items() if key not in PATHS}
    accelerator.init_trackers("m3ret", config=tracked)
    set_seed(config.seed)
    if accelerator.device.type == "cpu":
        prepare_cpu(accelerator.state.num_processes)

    # ---- objective: a module that returns its loss ------------------------------------------------------------------
    objective, model_config = build_objective(config, start)
    set_seed(config.seed, device_specific=True)  # same weights on all ranks, different stochastic depth

    # ---- data: each patient is either in training or held out -------------------------------------------------------
    with accelerator.local_main_process_first():  # generates the phantom once
        records = open_collection(config.data, stream=config.stream)
    training, held_out = split_training_and_held_out(records, config.holdout)
    training = exclude_modalities(training, config.exclude_modalities)
    unseen = sorted({*records.column("modality")} - {*training.column("modality")})
    patches = {name: getattr(model_config, name) for name in ("patch_size", "patch_depth", "num_channels")}
    patches |= {} if start is None else start.statistics
    processor = M3RetImageProcessor(
        size=config.size, num_frames=config.num_frames, max_patches=config.max_patches, **patches
    )
    quality = OnlineQuality(training, held_out, processor, accelerator, config.num_workers)
    evaluated = f"{len(quality.held_out.records)} of them evaluated"
    accelerator.print(f"{config.data}: {len(training)} training scans, {len(held_out)} held-out scans ({evaluated})")
    accelerator.print(f"modalities without training scans: {', '.join(unseen) or 'none'}")

    # ---- optimiser, and the state to resume from --------------------------------------------------------------------
    optimiser = build_optimiser(objective, config)
    model, optimiser = prepare_training(accelerator, objective, optimiser)
    saver = RunSaver(
        config=config,
        accelerator=accelerator,
        model=model,
        optimiser=optimiser,
        objective=objective,
        processor=processor,
        training=training,
        unseen=unseen,
        quality=quality,
        card_template=Path(__file__).with_name("model_card.md"),
    )
    progress = saver.start()
    log = RunLog(run_dir, accelerator, progress.step)

    # ---- batches, as functions of the seed and the step -------------------------------------------------------------
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
    strata = [*zip(training.column("modality"), training.column("source"), strict=True)]
    if config.tokens_per_batch is None:
        batches = SeededBatchSampler(strata, config.batch_size, **order)
    else:
        tokens = expected_tokens(training, processor, objective.views, model_config.num_prefix_tokens)
        batches = TokenBatchSampler(strata, tokens, config.tokens_per_batch, **order)
    cache_bytes = int(config.cache_gib * 2**30 / max(1, config.num_workers))
    views = RandomViews(
        training, processor, views=objective.views, seed=config.seed, cache_bytes=cache_bytes, blocks=blocks
    )
    packs = iter(training_loader(views, batches, config.num_workers, objective.plan))

    # ---- training loop ----------------------------------------------------------------------------------------------
    last_step = min(config.steps, config.stop_after or config.steps)
    stop = StopSignal(accelerator)
    is_main = accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=progress.step, desc="pretraining", unit="step", disable=not is_main)
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
        metrics: dict[str, float] = {}
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            metrics = {name: accelerator.reduce(mean, "mean").item() for name, mean in means.items()}
            rate = (progress.views - views_before) / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", views_per_s=f"{rate:.0f}")
            metrics |= {"gradient_norm": float(gradient_norm), "learning_rate": learning_rate}
            metrics |= {"views": progress.views, "views_per_second": rate, "seconds": progress.seconds}
        evaluates, saves = config.due(progress.step)
        if evaluates or saves or progress.step == last_step:
            encoder = gather_encoder(objective.encoder)
            saver.fit_whitening(encoder)
            if evaluates:
                metrics |= quality.measure(encoder)
                saver.record_quality(metrics)
            del encoder  # under FSDP2 a copy of all its weights
        if metrics:
            log.log_metrics(progress.step, metrics)
            if progress.step > config.warmup_fraction * config.steps and (alarm := collapse_alarm(metrics)):
                log.log_alarm(progress.step, alarm)
        if saves or saver.is_new_best:
            saver.save_step()
    bar.close()

    # ---- final checkpoint, and its retrieval table ------------------------------------------------------------------
    finished = progress.step == config.steps
    saver.save_step()
    if finished:
        saver.save_result(output_dir, unreadable=dict(gather_object(list(progress.unreadable.items()))))
    else:
        accelerator.print(f"stopped after step {progress.step} of {config.steps}. Continue with --resume.")
    saver.close()
    log.write_summary(finished, saver.facts())
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with user_errors("train.py"):
        main()
