"""Embed scans of any kind and save one embedding per scan in a Parquet file.

    m3ret embed scans/ --model m3ret-vitb -o embeddings.parquet
    m3ret embed chest.dcm ct.nii.gz clip.mp4 --model microsoft/rad-dino -o embeddings.parquet --key key.csv
    accelerate launch -m modeling_m3ret.cli embed ORG/NAME --model m3ret-vitb -o embeddings.parquet

SCANS is a folder with a manifest.csv, any other folder of DICOM, NIfTI, images and clips, a Parquet dataset (a folder
or ORG/NAME on the Hub), or files. A model is an M3Ret checkpoint, or a vision model of transformers or open_clip:
vision transformers are converted (docs/start-from-a-vit.md), others embed the slices of a scan one by one.

Run the same command again to continue an interrupted job. Scans that cannot be read are reported and left out. The
output holds no name of a file or a person: ids and patients are pseudonyms, made with the secret salt in
HF_HOME/m3ret/salt, and words that are not in a list of medical terms are left out. --key writes which file each id is.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jsonargparse.typing import NonNegativeInt, PositiveInt
from transformers.utils import logging as transformers_logging

from dataset_scripts.builder import Pseudonyms, read_salt
from dataset_scripts.sources.folder import Folder

from .atomic_io import atomic_write
from .command_line import CommandLine, printable, user_errors
from .configuration_m3ret import M3RetConfig
from .convert import is_convertible, model_type
from .cpu import prepare_cpu
from .data.collection import Record, open_collection
from .data.parquet import ParquetRow
from .data.schema import MODALITIES
from .data.table import MANIFEST
from .encoder_files import OPEN_CLIP
from .errors import InputError
from .evaluation.baselines import embed_with_baseline, load_baseline
from .hub import load_pretrained
from .intensity_m3ret import INTENSITIES
from .model_facts import ModelFacts, model_facts
from .modeling_m3ret import M3RetModel
from .search.embedding import MAX_TOKENS, Embedded, collect, embed_records, encoder_embedder
from .search.embedding_store import embed_collection
from .search.embedding_table import write_embeddings
from .space.visible import visible_columns


SHOWN_FAILURES = 20  # names of unreadable scans in the summary; the reasons are logged as they occur


class AnyEncoder:
    """An M3Ret checkpoint, or a vision model of transformers or open_clip.

    Args:
        name: folder or Hub id, as for `load_pretrained` or `load_baseline`, which also raise the errors.
    """

    facts: ModelFacts

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.name, self.baseline = name, None
        if is_m3ret(name) or is_convertible(name):
            model, self.processor = load_pretrained(name)
            self.model: M3RetModel = model.eval().to(device)
            self.facts = model_facts(self.model, self.processor, name)
        else:
            self.baseline = load_baseline(name, device)
            self.facts = self.baseline.facts

    def embed(self, records: Sequence[Record]) -> Embedded:
        """Embed records in memory."""
        if self.baseline is not None:
            return collect(self.baseline.embed(records), records)[0]
        return embed_records([encoder_embedder(self.model)], self.processor, records, progress=False)[0]

    def embed_collection(
        self, records: Sequence[Record], accelerator: Accelerator, max_tokens: int = MAX_TOKENS, **options: Any
    ) -> Embedded:
        """Embed a collection with all processes, see `embed_cached`. `options` are `dtype` and `num_workers`."""
        if self.baseline is not None:
            return embed_with_baseline(self.baseline, records, accelerator, **options)
        return embed_collection(
            self.model, self.processor, records, accelerator, name=self.name, max_tokens=max_tokens, **options
        )


def is_m3ret(name: str) -> bool:
    """Return whether a folder or Hub id is an M3Ret checkpoint. Also true if it cannot be found or read."""
    if name.startswith(OPEN_CLIP):
        return False
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        return not Path(name, "open_clip_config.json").is_file()
    try:
        return model_type(name) == M3RetConfig.model_type
    except (OSError, ValueError):
        return True


def find_scans(sources: Sequence[str], modality: str = "", intensity: str | None = None) -> list[Record]:
    """Return the scans of a folder, of a dataset or of files; ids and patients are names in clear.

    Args:
        sources: one folder, manifest or name of a dataset, or any number of files.
        modality: of scans that state none.
        intensity: of scans that do not declare it, see `read_scan`.

    Raises:
        InputError: if there is no such collection, or it holds no scan.
    """
    paths = [Path(source) for source in dict.fromkeys(sources)]
    if all(path.is_file() and path.name != MANIFEST for path in paths):
        entries = list(Folder(modality=modality).group(paths))
    elif len(paths) != 1:
        got = next((path for path in paths if not path.is_file()), MANIFEST)
        raise InputError(f"expected files, or one folder or dataset, got {len(paths)} arguments, among them {got}.")
    else:
        folder = paths[0].parent if paths[0].name == MANIFEST else paths[0]
        if not folder.is_dir() or (folder / MANIFEST).is_file() or any((folder / "data").glob("*.parquet")):
            return [replace(record, intensity=record.intensity or intensity) for record in open_collection(folder)]
        listing = Folder(modality=modality)
        entries = list(listing.entries(folder))
        for what, count in sorted(listing.notes.items()):
            print(f"{folder}: {count} {what}", file=sys.stderr)
    return [
        Record(
            entry.id,
            entry.files[0] if len(entry.files) == 1 else entry.files,
            *(entry.modality, entry.anatomy, "", entry.patient or entry.id),
            intensity=intensity,
        )
        for entry in entries
    ]


def pseudonymise(records: Iterable[Record], salt: bytes) -> list[Record]:
    """Replace ids and patients by the pseudonyms of `m3ret build --source folder`.

    Those of a Parquet dataset are pseudonyms already, and stay as they are.
    """
    names = Pseudonyms(Folder.name, salt)
    hidden = []
    for record in records:
        if not isinstance(record.location, ParquetRow):
            kind = "patient" if record.group != record.id else "scan's patient"
            group = names.pseudonym(kind, record.group)
            record = replace(record, id=names.pseudonym("scan", record.id), group=group)
        hidden.append(record)
    return hidden


def metadata_of(records: Sequence[Record], show_labels: bool = False) -> pa.Table:
    """Return the columns of `embedding_table` for some records. Of free text, only known medical terms are retained."""
    labels = [[label for label in record.label.split("|") if label] for record in records]
    columns = {name: _texts(records, name) for name in ("modality", "anatomy", "source")}
    visible = visible_columns(pa.table(columns | {"labels": pa.array(labels, pa.list_(pa.string()))}), show_labels)
    return pa.table(
        {
            "id": _texts(records, "id"),
            "patient": _texts(records, "group"),
            **{name: visible.column(name) for name in ("modality", "anatomy", "labels", "source")},
            "split": _texts(records, "split"),
        }
    )


def _texts(records: Sequence[Record], name: str) -> pa.Array:
    return pa.array([getattr(record, name) for record in records], pa.string())


def file_names(records: Sequence[Record]) -> list[str]:
    """Return a file of each record, for the owner of the scans; of a row of a dataset, its id."""
    names = []
    for record in records:
        location = record.location
        file = location[0] if isinstance(location, tuple) else location
        names.append(record.id if isinstance(file, ParquetRow) else str(file))
    return names


def main() -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("scans", nargs="+", type=str, metavar="SCANS", help="folder, dataset or files")
    add("--model", required=True, type=str, help="checkpoint folder or Hub id; hf-hub:ORG/NAME for open_clip")
    add("-o", "--output", required=True, type=Path, help="file to write, ending in .parquet")
    add("--key", type=Path, help="CSV to write that names the file of each id; keep it private")
    add("--modality", choices=MODALITIES, help="modality of scans in a folder without a manifest that state none")
    intensity = "how to scale values of files that do not declare it: hounsfield for a CT in NIfTI"
    add("--intensity", choices=INTENSITIES, help=intensity)
    add("--show_labels", action="store_true", help="retain anatomy and labels that hold other words than medical terms")
    add("--max_tokens", type=PositiveInt, default=MAX_TOKENS, help="patches that are embedded together")
    add("--num_workers", type=NonNegativeInt, default=1, help="processes that read scans, for each process")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the encoder")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()  # of the weights; the job has one of its own
    with user_errors(parser.prog):
        embed(options)


def embed(options: Any) -> None:
    """Run the command with its parsed options."""
    output, key = options.output, options.key
    for option, file, suffix in (("--output", output, ".parquet"), ("--key", key, ".csv")):
        if file is not None and (file.suffix != suffix or not file.absolute().parent.is_dir()):
            raise InputError(f"{option}: expected a {suffix} file in an existing folder, got {file}.")
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        prepare_cpu(accelerator.num_processes)
    encoder = AnyEncoder(options.model, accelerator.device)
    found: list[Any] = [None]
    if accelerator.is_main_process:  # the others need not list the folder again, nor know the salt
        named = find_scans(options.scans, options.modality or "", options.intensity)
        found = [pseudonymise(named, read_salt(None))]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    (records,) = found
    embedded = encoder.embed_collection(
        records,
        accelerator,
        dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32,
        max_tokens=options.max_tokens,
        num_workers=options.num_workers,
    )
    if not accelerator.is_main_process:
        return
    readable = {record.id for record in embedded.records}
    names = file_names(records)
    unreadable = [name for record, name in zip(records, names, strict=True) if record.id not in readable]
    for name in unreadable[:SHOWN_FAILURES]:
        print(f"cannot be read: {printable(name)}", file=sys.stderr)
    if more := len(unreadable[SHOWN_FAILURES:]):
        print(f"cannot be read: {more} more", file=sys.stderr)
    if not readable:
        raise InputError(f"no scan could be read: expected at least one of {len(records)}, got none.")
    if key is not None:
        text = io.StringIO()
        rows = ((record.id, name) for record, name in zip(records, names, strict=True) if record.id in readable)
        csv.writer(text, lineterminator="\n").writerows([("id", "file"), *rows])
        with atomic_write(key) as stream:
            stream.write(text.getvalue().encode(errors="surrogateescape"))  # file names may not be UTF-8
    metadata = metadata_of(embedded.records, options.show_labels)
    write_embeddings(output, embedded.embeddings, metadata, encoder.facts)
    print(f"{output}: {len(readable)} embeddings; {len(unreadable)} of {len(records)} scans could not be read")


if __name__ == "__main__":
    main()
