"""Fine-tune a classifier on a labelled collection, and measure it on patients that it has not seen.

    python fine_tune.py --model m3ret-vitb --data FOLDER --method probe
    python fine_tune.py --model m3ret-vitb --data FOLDER --modality xray --method lora --output classifier

The folder's manifest.csv lists one scan per row: a DICOM file or series, or any other format. docs/fine-tuning.md
compares the methods. `probe` trains the head, `lora` adapters (PEFT) and the head, `full` all weights.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from modeling_m3ret import M3RetCollator, M3RetForImageClassification, M3RetImageProcessor, M3RetReadError
from modeling_m3ret.atomic_io import atomic_folder
from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.data.collection import Record, open_collection, split_training_and_held_out
from modeling_m3ret.data.schema import MODALITIES
from modeling_m3ret.errors import InputError
from modeling_m3ret.hub import load_pretrained


# probe: best of 1e-3, 1e-2 and 1e-1 in the mean over four modalities of the development benchmark (docs/design.md).
# lora: of the order of published recipes (QLoRA, arXiv 2305.14314: 2e-4), but for an encoder a thousandth as large.
# full: as usual for ViT with AdamW.
LEARNING_RATES = {"probe": 1e-1, "lora": 1e-3, "full": 1e-4}


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model", type=str, required=True, help="checkpoint folder or Hub id; also of a 2D vision transformer")
    add("--data", type=str, required=True, help="folder with manifest.csv or data/*.parquet, ORG/NAME, or phantom")
    add("--modality", choices=MODALITIES, help="train on this modality only; by default on all")
    add("--method", choices=tuple(LEARNING_RATES), default="probe", help="what is trained")
    add("--holdout", type=OpenUnitInterval, default=0.3, help="fraction of patients to test on, if there is no split")
    add("--epochs", type=PositiveInt, default=20, help="passes over the training scans")
    add("--batch_size", type=PositiveInt, default=16, help="scans per step")
    add("--learning_rate", type=PositiveFloat, help="by default 1e-1 for probe, 1e-3 for lora, 1e-4 for full")
    add("--seed", type=int, default=0, help="seed of the head, the adapters and the order of scans")
    add("--output", type=Path, help="new folder for the classifier and its image processor")
    return parser.parse_args()


def read_labelled(records: Sequence[Record], names: Sequence[str], processor: M3RetImageProcessor) -> Iterator[dict]:
    """Yield each readable scan as the processor returns it, with the index of its label."""
    for record in records:
        try:
            yield {**processor([record.open()], return_tensors="np"), "labels": names.index(record.label)}
        except M3RetReadError as error:
            print(f"not read: {error}", file=sys.stderr)


def prepare_method(model: M3RetForImageClassification, method: str) -> nn.Module:
    """Return the model in which only the weights of the method are trained."""
    if method == "probe":
        model.m3ret.requires_grad_(False)
    if method == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise InputError("--method lora: expected the package peft, got none. Run `pip install peft`.") from error
        # rank 8 on all linear layers of the encoder, as in QLoRA (arXiv 2305.14314); alpha is twice the rank
        return get_peft_model(
            model, LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, modules_to_save=["classifier"])
        )
    return model


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def main(arguments: argparse.Namespace) -> None:
    if arguments.output and arguments.output.exists() and not is_empty_folder(arguments.output):
        raise InputError(f"--output: expected a new or empty folder, got {arguments.output}. Choose another one.")
    prepare_cpu()
    set_seed(arguments.seed)
    encoder, processor = load_pretrained(arguments.model)
    records = [r for r in open_collection(arguments.data) if r.label and arguments.modality in (None, r.modality)]
    training, held_out = split_training_and_held_out(records, arguments.holdout)
    names = tuple(sorted({record.label for record in training}))
    held_out = [record for record in held_out if record.label in names]
    if len(names) < 2 or not held_out:
        raise InputError(
            f"--data {arguments.data}: expected training scans of at least two labels and held-out scans of them, got "
            f"{len(names)} labels and {len(held_out)} held-out scans. Change --modality or --holdout."
        )
    encoder.config.id2label = dict(enumerate(names))
    encoder.config.label2id = {name: number for number, name in enumerate(names)}
    classifier = M3RetForImageClassification(encoder.config)
    classifier.m3ret = encoder

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        correct = prediction.predictions.argmax(1) == prediction.label_ids
        of_label = [correct[prediction.label_ids == number].mean() for number in np.unique(prediction.label_ids)]
        return {"accuracy": float(correct.mean()), "balanced_accuracy": float(np.mean(of_label))}

    model = prepare_method(classifier, arguments.method)
    with tempfile.TemporaryDirectory() as work:
        sets = [  # on disk, so that volumes need not fit into memory together
            Dataset.from_generator(
                read_labelled,
                cache_dir=work,
                gen_kwargs={"records": (*part,), "names": names, "processor": processor},  # lists would be shards
            ).with_format("torch")
            for part in (training, held_out)
        ]
        settings = TrainingArguments(
            output_dir=work,  # nothing is saved while training
            save_strategy="no",
            report_to="none",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate or LEARNING_RATES[arguments.method],
            warmup_steps=0.1,  # as a fraction of all steps
            lr_scheduler_type="cosine",
            seed=arguments.seed,
        )
        trainer = Trainer(model, settings, M3RetCollator(), *sets, compute_metrics=scores)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        measured = trainer.evaluate()
        counts = np.bincount(sets[1]["labels"])
    if not trainer.is_world_process_zero():
        return
    result = {
        "method": arguments.method,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "training_scans": len(sets[0]),
        "held_out_scans": len(sets[1]),
        "accuracy": round(measured["eval_accuracy"], 3),
        "balanced_accuracy": round(measured["eval_balanced_accuracy"], 3),
        "chance": round(counts.max() / counts.sum(), 3),  # of always predicting the most frequent label
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    if arguments.output:
        trained = model.merge_and_unload() if arguments.method == "lora" else model
        with atomic_folder(arguments.output) as folder:
            trained.save_pretrained(folder)  # without adapters, so that `from_pretrained` needs no PEFT
            processor.save_pretrained(folder)


if __name__ == "__main__":
    arguments = parse_arguments()
    with user_errors(Path(__file__).name):
        main(arguments)
