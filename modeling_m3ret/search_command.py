"""Find the scans of an index that are most similar to a scan.

    m3ret search chest.dcm --index index/ --model m3ret-vitb
    m3ret search ct_series/ --index index/ --model m3ret-vitb -k 20 --modality ct mri --key key.csv
    m3ret search chest.dcm --index index/ --model m3ret-vitb --json

QUERY is a file or a folder with one DICOM series; of a folder with several scans, each is a query. The model must be
the one that embedded the index. --key, the file that `m3ret embed --key` wrote, adds the file of each hit.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from transformers.utils import logging as transformers_logging

from .command_line import CommandLine, printable, user_errors
from .cpu import prepare_cpu
from .embed import AnyEncoder, file_names, find_scans
from .errors import InputError
from .intensity_m3ret import INTENSITIES
from .search.filters import MetadataFilter
from .search.index import RetrievalIndex, check_model


COLUMNS = ("rank", "score", "id", "patient", "modality", "anatomy", "labels", "source")


def search(
    query: str,
    index_folder: Path,
    model: str,
    k: int = 10,
    *,
    where: MetadataFilter | None = None,
    intensity: str | None = None,
) -> list[dict[str, Any]]:
    """Return the k most similar scans of each scan of a file or folder.

    Returns:
        For each readable query its `query`, the name of its file, and `hits`, dictionaries with `COLUMNS`.

    Raises:
        InputError: if the model is not that of the index, or no query can be read.
    """
    index = RetrievalIndex.load(index_folder)
    encoder = AnyEncoder(model)
    # names may differ: folders are renamed
    check_model(index_folder, replace(index.facts, model=encoder.facts.model), encoder.facts)
    embedded = encoder.embed(find_scans([query], intensity=intensity))
    for failure in embedded.failures:
        print(printable(failure), file=sys.stderr)
    if not embedded.records:
        raise InputError(f"{query}: expected at least one readable scan, got none.")
    hits = index.search(embedded.embeddings, k, where=where)
    answers = []
    for name, rows, scores in zip(file_names(embedded.records), hits.rows, hits.scores.tolist(), strict=True):
        found = index.lookup(rows)
        scored = zip(scores, found, strict=False)  # where fewer than k scans are allowed, fewer are found
        ranked = [{"rank": rank, "score": score, **hit} for rank, (score, hit) in enumerate(scored, start=1)]
        answers.append({"query": name, "hits": ranked})
    return answers


def add_files(answers: Sequence[dict[str, Any]], key: Path) -> None:
    """Add the `file` of each hit from a CSV with the columns id and file; None if it is not in there."""
    with key.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        file_of = {row.get("id"): row.get("file") for row in csv.DictReader(stream)}
    for answer in answers:
        for hit in answer["hits"]:
            hit["file"] = file_of.get(hit["id"])


def format_table(answer: dict[str, Any]) -> str:
    """Return the hits of one query as lines with aligned columns, without empty columns."""
    hits = answer["hits"]
    names = [name for name in (*COLUMNS, "file") if any(hit.get(name) for hit in hits)]
    rows = [names, *([_cell(hit.get(name)) for name in names] for hit in hits)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([answer["query"], *lines])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(value) if isinstance(value, list) else str(value or "")


def main() -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("query", type=str, metavar="QUERY", help="scan file, or folder of a DICOM series")
    add("--index", required=True, type=Path, help="folder of m3ret index")
    add("--model", required=True, type=str, help="the model that embedded the index")
    add("-k", type=PositiveInt, default=10, help="number of hits")
    add("--modality", nargs="+", type=str, help="find scans of these modalities only")
    add("--anatomy", nargs="+", type=str, help="find scans of these anatomies only")
    add("--exclude_patients", nargs="+", type=str, default=[], help="pseudonyms of patients to leave out")
    add("--intensity", choices=INTENSITIES, help="how to scale values of a file that does not declare it")
    add("--key", type=Path, help="CSV of m3ret embed that names the file of each id")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    with user_errors(parser.prog):
        prepare_cpu()
        chosen = (options.modality, options.anatomy, options.exclude_patients)
        where = None
        if any(chosen):
            where = MetadataFilter(options.modality, options.anatomy, excluded_patients=options.exclude_patients)
        settings = {"where": where, "intensity": options.intensity}
        answers = search(options.query, options.index, options.model, options.k, **settings)
        if options.key is not None:
            add_files(answers, options.key)
    if options.json:
        print(json.dumps(answers, indent=2))
    else:
        print(printable("\n\n".join(map(format_table, answers))))


if __name__ == "__main__":
    main()
