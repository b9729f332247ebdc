"""Combining folders with a manifest into one collection with splits and without duplicates."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_scripts.combine import CombineOptions, Part, combine, main
from modeling_m3ret.data.collection import open_collection, read_manifest, split_by_group
from modeling_m3ret.errors import InputError


COLUMNS = ("id", "file", "modality", "anatomy", "label", "group", "source", "open")


def write_folder(folder: Path, rows: Sequence[Sequence[str]], seed: int = 0) -> Path:
    """Write a manifest, and for each of its files that does not exist yet a picture of its own."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    for row in rows:
        if not (folder / row[1]).exists():
            Image.fromarray(generator.integers(0, 256, (24, 24), dtype=np.uint8)).save(folder / row[1])
    return folder


def xrays(count: int, **cells: str) -> list[list[str]]:
    """Return the rows of X-rays of one patient each, half of them under an open licence."""
    rows = []
    for number in range(count):
        row = dict.fromkeys(COLUMNS, "") | {"id": f"scan{number}", "file": f"{number}.png", "modality": "xray"}
        row |= {"group": f"patient{number}", "source": "s", "open": "yes" if number % 2 else "no"} | cells
        rows.append([row[column] for column in COLUMNS])
    return rows


def test_splits_follow_the_condition_and_the_holdout_of_training(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "scans", xrays(60))
    combine(CombineOptions(str(tmp_path / "out"), [Part(str(folder), train_if="open == yes", holdout=0.3)]))
    held_out = {record.group for record in split_by_group(read_manifest(folder), 0.3)[1]}
    is_open = {f"scans/scan{number}": number % 2 == 1 for number in range(60)}
    records = open_collection(tmp_path / "out")
    assert len(records) == 60
    for record in records:
        expected = "train" if is_open[record.id] else "test"
        assert record.split == ("validation" if record.group.removeprefix("scans/") in held_out else expected)


def test_every_scan_keeps_its_annotations_and_can_be_read(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", xrays(4, anatomy="chest", label="x|y", group=""))
    second = write_folder(tmp_path / "b", xrays(3), seed=1)
    report = combine(CombineOptions(str(tmp_path / "out"), [Part(str(first)), Part(str(second), source="other")]))
    records = open_collection(tmp_path / "out")
    assert [record.id for record in records] == [*(f"a/scan{i}" for i in range(4)), *(f"b/scan{i}" for i in range(3))]
    assert {(r.anatomy, r.label, r.source) for r in records} == {("chest", "x|y", "s"), ("", "", "other")}
    assert len({record.group for record in records}) == 7
    assert all(isinstance(record.location, Path) and record.location.is_file() for record in records)
    assert report == json.loads((tmp_path / "out" / "combine.json").read_text())
    assert report["scans"] == sum(report["splits"].values()) == 7


def test_the_collection_can_be_moved_with_its_folders(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    folder = write_folder(tmp_path / "all" / "scans", xrays(2))
    combine(CombineOptions(str(tmp_path / "all" / "deep" / "out"), [Part(str(folder))]))
    (tmp_path / "all").rename(tmp_path / "moved")
    records = open_collection(tmp_path / "moved" / "deep" / "out")
    assert all(isinstance(record.location, Path) and record.location.is_file() for record in records)


def test_excluded_modalities_are_not_trained_on(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "scans", [*xrays(2), *([f"m{i}", *row[1:]] for i, row in enumerate(xrays(2)))])
    rows = list(csv.reader((folder / "manifest.csv").open()))
    for row in rows[3:]:
        row[1:3] = f"m{row[1]}", "MR"
    write_folder(folder, rows[1:], seed=1)
    combine(CombineOptions(str(tmp_path / "out"), [Part(str(folder), holdout=0)]))
    assert {(r.modality, r.split) for r in open_collection(tmp_path / "out")} == {("xray", "train"), ("mri", "test")}


def test_a_duplicate_stays_in_the_split_furthest_from_training(tmp_path: Path) -> None:
    first = write_folder(tmp_path / "a", xrays(2, open="yes"))
    second = write_folder(tmp_path / "b", xrays(1, open="no"), seed=1)
    picture = Image.open(second / "0.png").resize((256, 256), Image.Resampling.BICUBIC)
    picture.save(second / "0.png")
    picture.resize((128, 128), Image.Resampling.BOX).save(first / "1.png")  # looks the same
    parts = [Part(str(folder), train_if="open == yes", holdout=0) for folder in (first, second)]
    report = combine(CombineOptions(str(tmp_path / "out"), parts))
    assert report["duplicates"] == ["a/scan1"]
    assert {r.id: r.split for r in open_collection(tmp_path / "out")} == {"a/scan0": "train", "b/scan0": "test"}


def test_unreadable_scans_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "scans", xrays(3))
    (folder / "1.png").write_bytes(b"no picture")
    report = combine(CombineOptions(str(tmp_path / "out"), [Part(str(folder))]))
    assert list(report["unreadable"]) == ["scans/scan1"]
    assert {record.id for record in open_collection(tmp_path / "out")} == {"scans/scan0", "scans/scan2"}


def test_declared_intensity_is_that_of_ct_volumes_without_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "scans", xrays(2))
    rows = list(csv.reader((folder / "manifest.csv").open()))
    np.save(folder / "0.npy", np.random.default_rng(0).normal(size=(4, 20, 20)).astype(np.float32) * 500)
    rows[1][1:3] = "0.npy", "ct"
    write_folder(folder, rows[1:])
    combine(CombineOptions(str(tmp_path / "out"), [Part(str(folder), volume_intensity="hounsfield")]))
    assert {r.modality: r.intensity for r in open_collection(tmp_path / "out")} == {"ct": "hounsfield", "xray": None}


def test_the_command_reads_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "scans", xrays(3))
    config = {"output": str(tmp_path / "out"), "parts": [{"folder": str(folder), "holdout": 0.0}]}
    (tmp_path / "combine.yaml").write_text(yaml.safe_dump(config))
    main(["--config", str(tmp_path / "combine.yaml")])
    assert {record.split for record in open_collection(tmp_path / "out")} == {"train"}
    with pytest.raises(SystemExit) as ended:  # the output exists
        main(["--config", str(tmp_path / "combine.yaml")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1


@pytest.mark.parametrize(
    "change", [{"holdout": 1.0}, {"train_if": "open"}, {"name": "a/b"}, {"volume_intensity": "huonsfield"}]
)
def test_wrong_options_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Part(**{"folder": str(tmp_path)} | change)  # type: ignore[arg-type]


def test_parts_need_distinct_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "scans", xrays(2))
    for parts in ([], [Part(str(folder)), Part(str(folder))]):
        with pytest.raises(InputError):
            combine(CombineOptions(str(tmp_path / "out"), parts))
    assert not (tmp_path / "out").exists()


def test_number_of_processes_is_at_least_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "scans", xrays(2))
    with pytest.raises(InputError):
        combine(CombineOptions(str(tmp_path / "out"), [Part(str(folder))], num_proc=0))
