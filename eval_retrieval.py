"""Measure zero-shot retrieval of M3Ret checkpoints on a labelled collection.

    python eval_retrieval.py --model m3ret-vitb --data FOLDER
    python eval_retrieval.py --model m3ret-smoke --data phantom --holdout 0.3
    python eval_retrieval.py --model m3ret-vitb step-10000 step-20000 --data ORG/NAME --split test --protocols all
    python eval_retrieval.py --model m3ret-vitb --data combined --split validation --protocols sources
    python eval_retrieval.py --model m3ret-vitb --data FOLDER --baselines facebook/dinov3-vits16-pretrain-lvd1689m
    python eval_retrieval.py --model m3ret-vitb --data FOLDER --holdout 0.3 --probe
    accelerate launch eval_retrieval.py --model m3ret-vitb --data ORG/NAME --precision bf16 --output results

The table compares the checkpoints with chance, pixels, the untrained encoder and other encoders. docs/evaluation.md
explains protocols, metrics and the report. Embeddings are cached, and computed by all processes of `accelerate launch`.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.data.schema import SPLITS
from modeling_m3ret.errors import InputError
from modeling_m3ret.evaluation.baselines import embed_with_baseline, load_baseline
from modeling_m3ret.evaluation.checkpoints import NO_TOKEN_WHITENING, load_checkpoint, method_titles, rerank_embedded
from modeling_m3ret.evaluation.leakage import describe_selection, leakage_warning, select_records, training_records
from modeling_m3ret.evaluation.probe import probe_accuracy
from modeling_m3ret.evaluation.protocols import PROTOCOLS
from modeling_m3ret.evaluation.report.report import Report
from modeling_m3ret.evaluation.table import evaluate
from modeling_m3ret.evaluation.untrained_baseline import build_untrained_baseline
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.search.embedding import MAX_TOKENS, embed_records, pixel_embedder
from modeling_m3ret.search.embedding_store import embed_collection


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model", nargs="+", type=str, required=True, help="checkpoint folders or Hub ids, the main one first")
    add("--data", type=str, required=True, help="folder with manifest.csv or data/*.parquet, ORG/NAME, or phantom")
    add("--split", choices=SPLITS, help="split to evaluate; by default all scans")
    add("--holdout", type=OpenUnitInterval, help="evaluate only the fraction of patients that train.py held out")
    add("--protocols", choices=tuple(PROTOCOLS), default="default", help="protocols to evaluate")
    add("--baselines", nargs="*", type=str, default=[], help="transformers vision models, or hf-hub:... of open_clip")
    add("--probe", action="store_true", help="also measure the accuracy of a linear probe of each modality's labels")
    add("--rerank", type=PositiveInt, help="number of first hits to re-rank by patches, for example 50")
    add("--max_tokens", type=PositiveInt, default=MAX_TOKENS, help="patches that are embedded together")
    add("--num_workers", type=NonNegativeInt, default=1, help="processes that decode scans")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the encoders")
    add("--seed", type=int, default=0, help="seed of the untrained encoder")
    add("--output", type=Path, help="folder for metrics.json and report.md with its figures")
    add("--examples", action="store_true", help="show scans in the report, which then contains patient data")
    arguments = parser.parse_args()
    if arguments.examples and arguments.output is None:
        parser.error("--examples: expected --output FOLDER too, got none.")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        prepare_cpu(accelerator.num_processes)
    device, dtype = accelerator.device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    max_tokens, num_workers = arguments.max_tokens, arguments.num_workers
    batching = {"max_tokens": max_tokens, "num_workers": num_workers}
    with accelerator.local_main_process_first():  # one process downloads, or renders the phantom
        collection = open_collection(arguments.data)
    records = select_records(collection, arguments.split, arguments.holdout)
    if not records:
        problem = f"--data {arguments.data}: expected at least one scan in this selection, got none."
        raise InputError(f"{problem} Change --split or --holdout.")
    titles = method_titles(arguments.model, arguments.baselines)
    main_title, names = titles[0], dict(zip(titles, arguments.model, strict=False))
    checkpoints, embedded, notes = {}, {}, []
    # one bar for the job: checkpoints and baselines, and the untrained encoder and pixels
    bar = tqdm(total=len(records) * (len(titles) + 2), unit="scan", disable=not accelerator.is_main_process)
    # all processes share all methods but pixels
    with bar:
        shared = {
            "records": records,
            "accelerator": accelerator,
            "dtype": dtype,
            "num_workers": num_workers,
            "bar": bar,
        }
        embed = partial(embed_collection, max_tokens=max_tokens, **shared)
        for title, name in names.items():
            bar.set_description(title)
            model, checkpoint = load_checkpoint(name)
            if warning := leakage_warning(title, collection, records, arguments.holdout, checkpoint.training):
                notes.append(warning)
            checkpoints[title], embedded[title] = checkpoint, embed(model.to(device), checkpoint.processor, name=name)
        config, processor = checkpoints[main_title].config, checkpoints[main_title].processor
        training = training_records(collection, records, arguments.holdout, checkpoints[main_title].training)
        bar.set_description("untrained")
        untrained = build_untrained_baseline(
            config, processor, training, accelerator, seed=arguments.seed, bar=bar, **batching
        )
        notes.append(untrained.note)
        embedded[untrained.title] = embed(untrained.encoder, processor, name="untrained")
        for title, name in zip(titles[len(names) :], arguments.baselines, strict=True):
            bar.set_description(title)
            embedded[title] = embed_with_baseline(load_baseline(name, device), **shared)
        if not accelerator.is_main_process:
            return
        bar.set_description("pixels")
        pixels = embed_records([pixel_embedder(processor)], processor, records, bar=bar, **batching)[0]

    others = titles[len(names) :]
    methods = {"pixels": pixels} | {title: embedded[title] for title in (untrained.title, *others, *names)}
    probes = {title: probe_accuracy(method) for title, method in methods.items()} if arguments.probe else {}
    if arguments.rerank is not None:  # the untrained encoder too, to show what comparing patches gains without training
        sample = untrained.whitening_records
        rerank = partial(rerank_embedded, depth=arguments.rerank, sample=sample, dtype=dtype, max_tokens=max_tokens)
        reranked = {untrained.title: rerank(embedded[untrained.title], untrained.encoder, processor)}
        for title, name in names.items():
            reranked[title] = rerank(embedded[title], load_pretrained(name)[0].to(device), checkpoints[title].processor)
        methods |= {f"{title}, re-ranked {arguments.rerank}": search for title, search in reranked.items()}
        if not sample and any(c.config.pooling == "cls" for c in checkpoints.values()):
            notes.append(NO_TOKEN_WHITENING)
    rows = evaluate(methods, PROTOCOLS[arguments.protocols], probes=probes)
    selection = describe_selection(arguments.split, arguments.holdout)
    report = Report(methods, main_title, rows, checkpoints, notes, selection)
    print(report.text())
    if arguments.output:
        report.write(arguments.output, arguments.examples, seed=arguments.seed, precision=arguments.precision)


if __name__ == "__main__":
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()  # of the weights; the job has one of its own
    with user_errors(Path(__file__).name):
        main(arguments)
