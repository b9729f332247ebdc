"""Write the dataset card from the report. The card is published, so it contains counts and no file name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData

from modeling_m3ret.data.schema import SPLITS, features
from modeling_m3ret.phantom import SYNTHETIC_SOURCE

from .builder import ScanBuilder


TEMPLATE = Path(__file__).with_name("dataset_card.md")
SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def make_card(builder: ScanBuilder, report: dict[str, Any], index: pa.Table, repository: str) -> str:
    """Return the card, with the YAML header from which the Hub's viewer and `load_dataset` read splits and features.

    The example code on the card loads the dataset from `repository`: a Hub repository or a local folder.
    """
    counts: dict[str, int] = report["counts"]["split"]
    splits = [split for split in SPLITS if split in counts]
    source = builder.source
    size, built = report["bytes"]["parquet"], report["scans"]["built"]
    infos = {split: SplitInfo(split, _bytes_of(index, split), counts[split]) for split in splits}
    total = _bytes_of(index, "")
    info = DatasetInfo(features=features(), splits=SplitDict(infos), download_size=size, dataset_size=total)
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    data = DatasetCardData(
        pretty_name=source.title,
        license="other",
        license_name=source.licence[:64].lower().replace(" ", "-"),
        tags=["medical-imaging", "m3ret", *report["counts"]["modality"]],
        task_categories=["image-feature-extraction"],
        size_categories=[next((name for limit, name in SIZE_CATEGORIES if built < limit), "1M<n<10M")],
        configs=[{"config_name": "default", "data_files": files}],
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    burned_in = report["burned_in_annotation"]
    return str(
        DatasetCard.from_template(
            data,
            template_path=str(TEMPLATE),
            title=source.title,
            homepage=source.homepage,
            citation=source.citation,
            licences=sorted(set(index.column("licence").to_pylist())),
            synthetic=source.title == SYNTHETIC_SOURCE,
            repository=repository,
            scans=built,
            patients=report["patients"],
            several=report["patients_in_several_splits"],
            failed=report["scans"]["failed"],
            dropped=report["scans"]["duplicates_dropped"],
            near=report["duplicates"]["near_pairs_across_splits"],
            exact=report["duplicates"]["exact_groups_across_splits"],
            splits=splits,
            table=report["counts"]["modality_and_split"],
            burned_in=", ".join(f"{answer}: {count}" for answer, count in sorted(burned_in.items())),
        )
    )


def _bytes_of(index: pa.Table, split: str) -> int:
    """Return the media bytes of a split, or of all rows if `split` is empty."""
    return sum(row["size"] for row in index.select(["shard", "size"]).to_pylist() if row["shard"].startswith(split))
