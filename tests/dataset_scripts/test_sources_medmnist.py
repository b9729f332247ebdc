"""MedMNIST+: many scans in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_trees import found, kinds

from dataset_scripts.entries import SourceError
from dataset_scripts.sources import SOURCES, medmnist
from modeling_m3ret import read_scan


SHAPES = {"train": 3, "val": 1, "test": 2}


def archive(path: Path, size: tuple[int, ...], labels: int = 1, **instead: Any) -> Path:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for key, count in SHAPES.items():
        arrays[f"{key}_images"] = generator.integers(0, 256, (count, *size), dtype=np.uint8)
        arrays[f"{key}_labels"] = (np.arange(count * labels).reshape(count, labels) % 2).astype(np.uint8)
    np.savez_compressed(path, **(arrays | instead))
    return path


def test_largest_size_of_each_supported_subset_is_used(tmp_path: Path) -> None:
    archive(tmp_path / "breastmnist.npz", (28, 28))
    archive(tmp_path / "breastmnist_224.npz", (8, 8))
    archive(tmp_path / "pathmnist_224.npz", (8, 8, 3))
    archive(tmp_path / "adrenalmnist3d_64.npz", (6, 6, 6))
    file = "breastmnist_224.npz"
    assert found("medmnist", tmp_path) == [
        ("breastmnist_224/train/0", file, ("malignant",), "", "train"),
        ("breastmnist_224/train/1", file, ("normal, benign",), "", "train"),
        ("breastmnist_224/train/2", file, ("malignant",), "", "train"),
        ("breastmnist_224/val/0", file, ("malignant",), "", "validation"),
        ("breastmnist_224/test/0", file, ("malignant",), "", "test"),
        ("breastmnist_224/test/1", file, ("normal, benign",), "", "test"),
    ]
    assert kinds("medmnist", tmp_path) == {("ultrasound", "breast")}


def test_multi_label_subset_has_the_positive_labels(tmp_path: Path) -> None:
    labels = np.zeros((1, 14), dtype=np.uint8)
    labels[0, [0, 13]] = 1
    archive(tmp_path / "chestmnist.npz", (28, 28), 14, val_labels=labels, test_labels=np.zeros((2, 14), np.uint8))
    found_labels = [entry[2] for entry in found("medmnist", tmp_path)]
    assert found_labels[3:] == [("atelectasis", "hernia"), (), ()]


@pytest.mark.parametrize(
    ("name", "size", "read"),
    [("pneumoniamnist_64", (9, 7), (1, 1, 9, 7)), ("organmnist3d_64", (6, 9, 7), (1, 6, 9, 7))],
)
def test_opened_scan_equals_the_stored_one(
    tmp_path: Path, name: str, size: tuple[int, ...], read: tuple[int, ...]
) -> None:
    path = archive(tmp_path / f"{name}.npz", size)
    source = SOURCES["medmnist"]()
    with np.load(path) as arrays:
        stored = [image for key in SHAPES for image in arrays[f"{key}_images"]]
    for entry, image in zip(source.entries(tmp_path), stored, strict=True):
        opened = source.open(entry)
        assert opened.dtype == np.uint8
        assert np.array_equal(opened, image)
        assert read_scan(opened).array.shape == read


def test_array_is_loaded_once_for_all_its_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "nodulemnist3d.npz", (4, 5, 6))
    archive(tmp_path / "breastmnist.npz", (28, 28))
    source = SOURCES["medmnist"]()
    entries = sorted(source.entries(tmp_path), key=lambda entry: (entry.split, entry.member))  # the subsets alternate
    loaded = []
    load = medmnist.load_array
    monkeypatch.setattr(medmnist, "load_array", lambda path, key: loaded.append(key) or load(path, key))
    for entry in entries:
        source.open(entry)[...] = 0  # `open` returns a copy
    assert source.open(entries[-1]).any()
    assert loaded == ["test_images"] * 2 + ["train_images"] * 2 + ["val_images"] * 2


@pytest.mark.parametrize(
    ("instead", "array", "got"),
    [
        ({"val_images": np.array([{}], dtype=object)}, "val_images", "type object"),
        ({"val_labels": np.array([[{}]], dtype=object)}, "val_labels", "type object"),
        ({"val_images": np.zeros((1, 28, 28), dtype=np.int16)}, "val_images", "type int16"),
        ({"val_images": np.zeros((2, 28, 28), dtype=np.uint8)}, "val_labels", "(1, 1)"),
        ({"val_labels": np.zeros((1, 3), dtype=np.uint8)}, "val_labels", "(1, 3)"),
    ],
)
def test_archive_of_other_arrays_is_refused(tmp_path: Path, instead: dict[str, Any], array: str, got: str) -> None:
    path = archive(tmp_path / "breastmnist.npz", (28, 28), **instead)
    with pytest.raises(SourceError) as caught:
        found("medmnist", tmp_path)
    assert caught.value.location == str(path)
    assert array in caught.value.expected
    assert got in caught.value.got


def test_damaged_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "breastmnist.npz", (28, 28))
    with monkeypatch.context() as small:
        small.setattr(medmnist, "MAX_ARRAY_BYTES", 100)
        with pytest.raises(SourceError) as caught:
            found("medmnist", tmp_path)
        assert "100 bytes" in caught.value.expected
    np.savez_compressed(path, train_images=np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(SourceError) as caught:
        found("medmnist", tmp_path)
    assert "train_labels" in caught.value.expected
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(SourceError) as caught:
        found("medmnist", tmp_path)
    assert caught.value.location == str(path)
