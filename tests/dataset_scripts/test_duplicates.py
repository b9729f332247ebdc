"""Exact and near duplicates are found, different pictures are not, and dropping leaves no duplicate."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scan_files import dicom, dicom_bytes, nifti_bytes
from scan_folders import SALT, picture_bytes, put, texture, volume_bytes

from dataset_scripts.builder import BuiltRow, ScanBuilder
from dataset_scripts.duplicates import (
    MAX_DISTANCE,
    Fingerprint,
    choose_duplicates_to_drop,
    find_exact_duplicates,
    find_near_duplicates,
    perceptual_hash,
)
from dataset_scripts.entries import Entry
from dataset_scripts.row_encoding import encode_scan
from dataset_scripts.sources.folder import Folder


SPLITS = ("train", "validation", "test")


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    height, width = (round(side * factor) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def as_jpeg(pixels: np.ndarray, quality: int = 50) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture_bytes(pixels, "JPEG", quality=quality))))


def brighter(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels * 1.05 + 12, 0, 255).astype(np.uint8)


def noisy(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels + np.random.default_rng(0).normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)


CHANGED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "half": lambda pixels: resized(pixels, 0.5),
    "larger": lambda pixels: resized(pixels, 1.7),
    "JPEG": as_jpeg,
    "brighter": brighter,
    "noisy": noisy,
    "half and JPEG": lambda pixels: as_jpeg(resized(pixels, 0.5)),
}


# ------------------------------------------------------------------------------------------------------ perceptual hash


@pytest.mark.parametrize("change", CHANGED)
def test_changed_picture_is_a_near_duplicate(change: str) -> None:
    for seed in range(20):
        pixels = texture(seed, (300, 260))
        assert distance(perceptual_hash(pixels), perceptual_hash(CHANGED[change](pixels))) <= MAX_DISTANCE


def test_hash_does_not_depend_on_the_scale_of_grey_values() -> None:
    pixels = texture(0)
    for scaled in (pixels.astype(np.uint16) * 257, pixels.astype(np.int16) * 8 - 1000, pixels.astype(np.float64)):
        assert distance(perceptual_hash(pixels), perceptual_hash(scaled)) <= 2


def test_different_pictures_are_far_apart() -> None:
    hashes = [perceptual_hash(texture(seed, (300, 260))) for seed in range(40)]
    assert min(distance(*pair) for pair in combinations(hashes, 2)) > 3 * MAX_DISTANCE


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (28, 28), (33, 1000), (2000, 1501)])
@pytest.mark.parametrize("level", [0, 255, -1000.25, 65535, 1 / 3])
def test_blank_picture_has_no_bit_set(shape: tuple[int, int], level: float) -> None:
    assert perceptual_hash(np.full(shape, level)) == "0" * 64


@pytest.mark.slow
def test_real_radiographs_are_found_again_and_not_confused(devset: Path) -> None:
    """30 changed X-rays are near duplicates of their originals; of pairs of two patients, fewer than 0.1% are."""
    with (devset / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        listed = [row for row in csv.DictReader(stream) if row["modality"] == "xray"]
    pictures = [(row["group"], encode_scan(devset / row["file"]).picture) for row in listed]
    hashes = [(group, perceptual_hash(picture)) for group, picture in pictures]
    for (_, picture), (_, original) in zip(pictures[::6][:30], hashes[::6][:30], strict=True):
        pixels = (picture * (255 / picture.max())).astype(np.uint8)
        for change in ("half", "JPEG", "noisy", "half and JPEG"):
            assert distance(original, perceptual_hash(CHANGED[change](pixels))) <= MAX_DISTANCE
    others = [distance(one[1], other[1]) for one, other in combinations(hashes, 2) if one[0] != other[0]]
    assert len(others) > 10_000
    assert sum(bits <= MAX_DISTANCE for bits in others) < 0.001 * len(others)


# --------------------------------------------------------------------------------------------------------- equal voxels


def test_equal_voxels_in_different_formats_are_duplicates(tmp_path: Path) -> None:
    grey, volume = texture(1), np.random.default_rng(0).integers(0, 900, (12, 10, 6)).astype(np.int16)
    files = {
        "grey.png": picture_bytes(grey),
        "grey.dcm": dicom_bytes(dicom(grey, Modality="CR", PatientID="somebody")),
        "colour.png": picture_bytes(np.stack([grey] * 3, -1)),
        "other.png": picture_bytes(grey ^ np.uint8(1)),
        "volume.nii": nifti_bytes(volume, np.eye(4)),
        "volume.nii.gz": nifti_bytes(volume, np.eye(4), zipped=True),
        "volume.nii.of another": volume_bytes(5),
    }
    builder = ScanBuilder(Folder(), put(tmp_path / "scans", files), salt=SALT, cache_dir=str(tmp_path))
    prints = []
    for name in files:
        row = builder.build_row(Entry(name, (tmp_path / "scans" / name,), "xray"))
        assert isinstance(row, BuiltRow)
        prints.append(Fingerprint(name, "train", name, row.digest, row.picture_hash))
    groups = [[fingerprint.id for fingerprint in group] for group in find_exact_duplicates(prints)]
    assert groups == [["grey.png", "grey.dcm", "colour.png"], ["volume.nii", "volume.nii.gz"]]


# ------------------------------------------------------------------------------------------------------ near duplicates


def random_prints(count: int, seed: int, *, planted: int = 0, likeness: float = 0.5) -> list[Fingerprint]:
    """Return random hashes that share a fraction `likeness` of bits, and `planted` copies with 0 to 16 flipped bits."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 2, 256)
    bits = np.where(rng.random((count, 256)) < 2 * likeness - 1, common, rng.integers(0, 2, (count, 256)))
    for number in range(planted):
        bits[count - 1 - number] = bits[number]
        bits[count - 1 - number, rng.choice(256, number % 17, replace=False)] ^= 1
    hashes = [np.packbits(row).tobytes().hex() for row in bits]
    splits = rng.choice(SPLITS, count, p=(0.7, 0.15, 0.15))
    patients = rng.integers(0, count // 2, count)
    return [
        Fingerprint(f"s{i}", str(splits[i]), f"p{patients[i]}", f"digest {rng.integers(3 * count)}", hashes[i])
        for i in range(count)
    ]


def brute_force(prints: list[Fingerprint], max_distance: int) -> set[tuple[str, str, int]]:
    return {
        (one.id, other.id, bits)
        for one, other in combinations([p for p in prints if set(p.picture_hash) != {"0"}], 2)
        if one.split != other.split and one.patient != other.patient
        if (bits := distance(one.picture_hash, other.picture_hash)) <= max_distance
    }


@pytest.mark.parametrize(("max_distance", "likeness"), [(0, 0.5), (7, 0.97), (15, 0.5)])
def test_near_duplicates_equal_those_of_brute_force(max_distance: int, likeness: float) -> None:
    prints = random_prints(500, seed=max_distance, planted=240, likeness=likeness)
    found = list(find_near_duplicates(prints, max_distance))
    truth = brute_force(prints, max_distance)
    assert {(one.id, other.id, bits) for one, other, bits in found} == truth
    assert len(found) == len(truth)  # each once
    assert {bits for *_, bits in truth} == set(range(max_distance + 1))


def test_blank_pictures_same_patients_and_same_splits_are_not_compared() -> None:
    def shown(id: str, split: str, patient: str, picture: str) -> Fingerprint:
        return Fingerprint(id, split, patient, id, picture)

    blank, seen = "0" * 64, "0" * 60 + "00f1"
    assert [*find_near_duplicates([shown("a", "train", "p", blank), shown("b", "test", "q", blank)])] == []
    assert [*find_near_duplicates([shown("a", "train", "p", seen), shown("b", "test", "p", seen)])] == []
    assert [*find_near_duplicates([shown("a", "test", "p", seen), shown("b", "test", "q", seen)])] == []
    (pair,) = find_near_duplicates([shown("a", "test", "p", seen), shown("b", "train", "q", seen[:-1] + "0")])
    assert (pair[0].id, pair[1].id, pair[2]) == ("a", "b", 1)
    assert [*find_near_duplicates([])] == []


def test_distance_that_the_bands_cannot_find_is_refused() -> None:
    with pytest.raises(ValueError, match="16"):
        list(find_near_duplicates([], 16))


@pytest.mark.slow
def test_planted_duplicates_among_twenty_thousand_similar_scans_are_found() -> None:
    prints = random_prints(20_000, seed=1, planted=160, likeness=0.8)
    pairs = {(one.id, other.id) for one, other, _ in find_near_duplicates(prints)}
    for number in range(160):
        one, other = prints[number], prints[-1 - number]
        if number % 17 <= MAX_DISTANCE and one.split != other.split and one.patient != other.patient:
            assert (one.id, other.id) in pairs


# --------------------------------------------------------------------------------------------------------- what to drop


@pytest.mark.parametrize("seed", range(3))
def test_no_duplicate_remains_and_evaluation_splits_keep_their_scans(seed: int) -> None:
    prints = random_prints(600, seed=seed, planted=200)
    dropped = choose_duplicates_to_drop(prints)
    retained = [fingerprint for fingerprint in prints if fingerprint.id not in dropped]
    assert find_exact_duplicates(retained) == []
    assert brute_force(retained, MAX_DISTANCE) == set()
    rank = {"test": 0, "validation": 1, "train": 2}
    equal: dict[str, set[str]] = defaultdict(set)
    for group in find_exact_duplicates(prints):
        for one in group:
            equal[one.id] |= {other.id for other in group if rank[other.split] <= rank[one.split]} - {one.id}
    by_id = {fingerprint.id: fingerprint for fingerprint in prints}
    for one, other, _ in brute_force(prints, MAX_DISTANCE):
        first, second = sorted((one, other), key=lambda id: rank[by_id[id].split])
        equal[second].add(first)
    assert all(equal[id] for id in dropped)  # each duplicates a scan whose split has the same or a higher priority


def test_duplicates_are_dropped_from_train_first_then_validation() -> None:
    equal = [Fingerprint(split, split, split, "digest", f"{number:064x}") for number, split in enumerate(SPLITS, 1)]
    assert choose_duplicates_to_drop(equal) == {"train", "validation"}
    far = ["f" * 32 + "0" * 32, "0" * 32 + "f" * 32]
    for low, high in combinations(SPLITS, 2):
        prints = [Fingerprint("low", low, "p", "a", far[0]), Fingerprint("high", high, "q", "b", far[0][:-1] + "3")]
        others = [Fingerprint("other", low, "r", "c", far[1])]
        assert (
            choose_duplicates_to_drop([*prints, *others])
            == choose_duplicates_to_drop([*others, *prints[::-1]])
            == {"low"}
        )


def test_first_of_equal_scans_in_one_split_is_retained() -> None:
    prints = [Fingerprint(id, "train", id, "digest", "0" * 64) for id in ("b", "a", "c")]
    assert choose_duplicates_to_drop(prints) == {"a", "c"}
