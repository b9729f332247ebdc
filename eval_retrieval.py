"""Measure a checkpoint's zero-shot retrieval on a labelled collection, beside chance, pixels and untrained weights.

    python eval_retrieval.py --model m3ret-vitb --data FOLDER          # FOLDER holds a manifest.csv
    python eval_retrieval.py --model m3ret-smoke --data phantom --holdout 0.3

The untrained encoder is not whitened here: there are no training scans to fit it to. In the table of a training it is.
`--holdout` takes only the patients that `train.py` held out with the same number; the default takes all.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, set_seed

from modeling_m3ret import M3RetModel, __version__
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import open_collection, split_by_group
from modeling_m3ret.data.schema import SPLITS
from modeling_m3ret.retrieval.embed import MAX_TOKENS, embed_records, encoder_embedder, pixel_embedder
from modeling_m3ret.retrieval.evaluation import evaluate, format_table, to_json
from modeling_m3ret.whole_files import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument(
        "--data",
        required=True,
        help="folder with a manifest.csv or data/*.parquet, ORG/NAME on the Hub, or phantom[:SUBJECTS[:SEED]]",
    )
    parser.add_argument("--split", choices=SPLITS, default=None, help="of a Parquet data set; all of them by default")
    parser.add_argument("--holdout", type=float, default=None, help="part of the patients that training held out")
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="patches that are embedded together")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained encoder's weights")
    parser.add_argument("--output", type=Path, default=None, help="also write the table as JSON")
    arguments = parser.parse_args()

    if arguments.device == "cpu":
        prepare_cpu()
    records = open_collection(arguments.data)
    if arguments.split is not None:
        records = [record for record in records if record.split == arguments.split]
        if not records:
            raise SystemExit(f"{arguments.data} has no scan in the split {arguments.split}")
    if arguments.holdout is not None:
        _, records = split_by_group(records, arguments.holdout)
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model).eval().to(arguments.device)
    set_seed(arguments.seed)
    untrained = M3RetModel(AutoConfig.from_pretrained(arguments.model)).eval().to(arguments.device)

    embedders = {
        "pixels": pixel_embedder(processor),
        "untrained": encoder_embedder(untrained),
        "trained": encoder_embedder(model),
    }
    embedded = embed_records(
        list(embedders.values()),
        processor,
        records,
        max_tokens=arguments.max_tokens,
        num_workers=arguments.num_workers,
    )
    rows = evaluate(dict(zip(embedders, embedded, strict=True)))
    print(format_table(rows))
    failures = embedded[0].failures
    for message in failures:
        print(f"not read: {message}")
    part = "all patients, trained on or not" if arguments.holdout is None else f"held-out part of {arguments.holdout}"
    print(f"{len(embedded[0].records)} scans embedded ({part}), {len(failures)} could not be read")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"m3ret": __version__, "torch": torch.__version__, "seed": arguments.seed, "not_read": len(failures)}
        write_whole(arguments.output, to_json(rows, **facts) + "\n")


if __name__ == "__main__":
    main()
