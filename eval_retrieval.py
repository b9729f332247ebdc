"""Measure zero-shot retrieval on a labelled collection, beside chance, pixels, untrained weights and other encoders.

    python eval_retrieval.py --model m3ret-vitb --data FOLDER          # FOLDER holds a manifest.csv or data/*.parquet
    python eval_retrieval.py --model m3ret-smoke --data phantom --holdout 0.3
    python eval_retrieval.py --model step-10000 step-20000 m3ret-vitb --data ORG/NAME --split test --protocols all
    python eval_retrieval.py --model m3ret-vitb --data FOLDER --baselines facebook/dinov3-vits16-pretrain-lvd1689m
    accelerate launch eval_retrieval.py --model m3ret-vitb --data ORG/NAME --precision bf16 --output results

What the protocols and the numbers mean: `docs/evaluation.md`. Embeddings of M3Ret models are kept, and made by all
processes. `--holdout` takes only the patients that `train.py` held out with the same number; to the others, or with
`--split` to the train split, the untrained encoder's whitening is fitted.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from modeling_m3ret import __version__
from modeling_m3ret.atomic_io import atomic_write_text
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.data.schema import SPLITS
from modeling_m3ret.evaluation.baselines import baseline_name, embed_with_baseline
from modeling_m3ret.evaluation.leakage import leakage_warning, read_training_facts, select_records, training_records
from modeling_m3ret.evaluation.protocols import ALL, DEFAULT
from modeling_m3ret.evaluation.report.pictures import report_pictures, write_pictures
from modeling_m3ret.evaluation.table import (
    differences_from,
    evaluate,
    format_differences,
    format_table,
    to_json,
)
from modeling_m3ret.evaluation.untrained_baseline import untrained_encoder, whitening_sample
from modeling_m3ret.model_facts import model_facts
from modeling_m3ret.search.embedding import MAX_TOKENS, Embedded, embed_records, pixel_embedder
from modeling_m3ret.search.embedding_store import embed_collection
from modeling_m3ret.search.matching import TOKEN_WHITENING_SCANS, RerankedSearch, fit_token_whitening, scan_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="checkpoint folders or Hub ids, the main one first")
    parser.add_argument(
        "--data", required=True, help="folder with a manifest.csv or data/*.parquet, ORG/NAME on the Hub, or phantom"
    )
    parser.add_argument("--split", choices=SPLITS, default=None, help="of a Parquet data set; all of them by default")
    parser.add_argument("--holdout", type=float, default=None, help="part of the patients that training held out")
    parser.add_argument("--protocols", choices=["default", "all"], default="default")
    parser.add_argument(
        "--baselines", nargs="*", default=[], help="transformers vision models, or hf-hub:… of open_clip"
    )
    parser.add_argument(
        "--rerank", type=int, default=None, help="first hits that late interaction of patches re-ranks, 50 say"
    )
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="patches that are embedded together")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoders' arithmetic")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained encoder's weights")
    parser.add_argument("--output", type=Path, default=None, help="folder for metrics.json and report.md with pictures")
    parser.add_argument(
        "--examples", action="store_true", help="show scans in the report: it then holds patients' data"
    )
    arguments = parser.parse_args()
    if arguments.examples and arguments.output is None:
        parser.error("--examples needs the folder of the report, --output")
    if arguments.rerank is not None and arguments.rerank < 1:
        parser.error(f"--rerank is {arguments.rerank}, expected at least 1")
    if arguments.holdout is not None and not 0 < arguments.holdout < 1:
        parser.error(f"--holdout is {arguments.holdout}, expected a part above 0 and below 1")
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        prepare_cpu(accelerator.num_processes)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32

    # ---- scans ------------------------------------------------------------------------------------------------------
    with accelerator.local_main_process_first():  # a download, or the phantom, is made once
        collection = open_collection(arguments.data)
    records = select_records(collection, arguments.split, arguments.holdout)
    if not records:
        raise SystemExit(f"{arguments.data} has no scan in what was asked for")

    # ---- embeddings: ours by all processes, the others by the first -------------------------------------------------
    titles = titles_of(arguments.model, arguments.baselines)
    names, others = titles[: len(arguments.model)], titles[len(arguments.model) :]
    methods: dict[str, Embedded] = {}
    models, checkpoints, processors, encoders = {}, {}, {}, {}
    notes = []
    settings = {"max_tokens": arguments.max_tokens, "num_workers": arguments.num_workers}
    for title, name in zip(names, arguments.model, strict=True):
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModel.from_pretrained(name).eval().to(accelerator.device)
        models[title] = model_facts(model, processor, baseline_name(name))
        facts = read_training_facts(name)
        checkpoints[title] = facts | {"parameters": model.num_parameters()}
        notes += filter(None, [leakage_warning(title, collection, records, arguments.holdout, facts)])
        processors[title] = processor
        if arguments.rerank is not None:  # else a curve's many checkpoints would all stay in memory
            encoders[title] = model
        methods[title] = embed_collection(model, processor, records, accelerator, name=name, dtype=dtype, **settings)
    processor = processors[names[0]]
    config = AutoConfig.from_pretrained(arguments.model[0])
    training = training_records(collection, records, arguments.holdout, checkpoints[names[0]])
    untrained = untrained_encoder(config, processor, training, accelerator, seed=arguments.seed, **settings)
    notes.append(untrained.note)
    embedded = embed_collection(
        untrained.encoder, processor, records, accelerator, name="untrained", dtype=dtype, **settings
    )
    if not accelerator.is_main_process:
        return
    beside = {
        "pixels": embed_records([pixel_embedder(processor)], processor, records, **settings)[0],
        untrained.title: embedded,
    }
    for title, name in zip(others, arguments.baselines, strict=True):
        beside[title] = embed_with_baseline(
            name, records, num_workers=arguments.num_workers, device=accelerator.device, dtype=dtype
        )
    methods = beside | methods
    reranked: dict[str, Embedded] = {}
    if arguments.rerank is not None:  # the untrained encoder too: how much of it is the comparing of parts alone?
        for title, model in {untrained.title: untrained.encoder, **encoders}.items():
            own_processor = processors.get(title, processor)
            sources = (record.open() for record in tqdm(methods[title].records, desc="patches", unit="scan"))
            sample = whitening_sample(untrained.fitted_to, TOKEN_WHITENING_SCANS)
            own, most = None, {"max_tokens": arguments.max_tokens}
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                if model.config.pooling == "cls" and sample:
                    own = fit_token_whitening(model, own_processor, (record.open() for record in sample), **most)
                elif model.config.pooling == "cls":
                    notes.append(
                        f"{title}: patches are compared by the CLS token's whitening, for lack of training scans"
                    )
                tokens = scan_tokens(model, own_processor, sources, whitening=own, **most)
            twice = RerankedSearch(**vars(methods[title]), tokens=tokens, depth=arguments.rerank)
            reranked[f"{title}, re-ranked {arguments.rerank}"] = twice

    # ---- the table --------------------------------------------------------------------------------------------------
    compared = methods | reranked
    rows = evaluate(compared, ALL if arguments.protocols == "all" else DEFAULT)
    table = format_table(rows)
    print(table)
    main_model = names[0]
    differences = differences_from(main_model, rows)
    if differences:
        print(format_differences(main_model, differences))
    failures = methods[main_model].failures
    for message in failures:
        print(f"not read: {message}")
    part = "all patients" if arguments.holdout is None else f"held-out part of {arguments.holdout}"
    part += "" if arguments.split is None else f" of the {arguments.split} split"
    print(f"{len(methods[main_model].records)} scans embedded ({part}), {len(failures)} could not be read")
    print("\n".join(notes))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        facts = {
            "m3ret": __version__,
            "torch": torch.__version__,
            "seed": arguments.seed,
            "precision": arguments.precision,
            "scans": len(methods[main_model].records),
            "part": part,
            "notes": notes,
            "not_read": len(failures),
            "models": {title: vars(told) for title, told in models.items()},
            "differences_of_mean_map": {other: told._asdict() for other, told in differences.items()},
        }
        atomic_write_text(arguments.output / "metrics.json", to_json(rows, **facts) + "\n")
        words = [table, *([format_differences(main_model, differences)] if differences else []), *notes]
        shown_by = processors[main_model] if arguments.examples else None
        at_first = [row for row in rows if row.method not in reranked]  # a curve is of what training changes
        pictures = report_pictures(compared, main_model, at_first, checkpoints, shown_by)
        words.append(write_pictures(arguments.output, pictures))
        atomic_write_text(arguments.output / "report.md", "\n\n".join(words) + "\n")


def titles_of(models: list[str], baselines: list[str]) -> list[str]:
    """What the table calls them: by the last part of their name, numbered where that repeats or is another row's."""
    names = ["trained"] if len(models) == 1 else [baseline_name(name) for name in models]
    names += [baseline_name(name) for name in baselines]
    taken = [*names, "chance", "pixels", "untrained", "untrained, whitened"]
    return [f"{name} ({place})" if taken.count(name) > 1 else name for place, name in enumerate(names, start=1)]


if __name__ == "__main__":
    main()
