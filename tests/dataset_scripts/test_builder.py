"""Pseudonyms, splits, the salt, and rows of the builder."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scan_folders import SALT, picture_bytes, put, rows_of, texture, video_bytes, volume_bytes, write_manifest

from dataset_scripts import builder
from dataset_scripts.build import build
from dataset_scripts.builder import BuildOptions, BuiltRow, Pseudonyms, ScanBuilder, SkippedEntry, read_salt
from dataset_scripts.entries import Entry, Source
from dataset_scripts.sources.folder import Folder
from modeling_m3ret.errors import InputError


class Listed(Source):
    """A source with given entries, which are not opened."""

    name, title, licence = "listed", "listed", "none"
    homepage = citation = ""

    def __init__(self, entries: list[Entry]):
        self.listed = entries

    def find_entries(self, root: Path) -> Iterator[Entry]:
        yield from self.listed


class Evaluated(Listed):
    evaluation_only = True


def scan(id: str, patient: str = "", split: str | None = None) -> Entry:
    return Entry(id, (Path("scan"),), "ct", patient=patient, split=split)


def splits_of(source: Source, tmp_path: Path, options: BuildOptions = BuildOptions()) -> dict[str, str]:
    """Return the split of each entry."""
    splits = ScanBuilder(source, tmp_path, salt=SALT, options=options, cache_dir=str(tmp_path)).split_entries()
    return {entry.id: split for split, entries in splits.items() for entry in entries}


# ---------------------------------------------------------------------------------------------------------------- names


def test_equal_names_and_only_those_have_equal_pseudonyms() -> None:
    names, entries = Pseudonyms("a", SALT), [scan(f"scan-{i}", f"patient-{i % 50}") for i in range(5000)]
    ids = [names.scan(entry) for entry in entries]
    assert ids == [Pseudonyms("a", bytes(SALT)).scan(replace(entry)) for entry in entries]
    assert len(set(ids)) == 5000
    assert len({names.patient(entry) for entry in entries}) == 50
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in [*ids, *map(names.patient, entries)])


@pytest.mark.parametrize("other", [Pseudonyms("a", b"another salt"), Pseudonyms("b", SALT)], ids=["salt", "source"])
def test_pseudonyms_depend_on_salt_and_source(other: Pseudonyms) -> None:
    names, entry = Pseudonyms("a", SALT), scan("s", "p")
    assert names.scan(entry) != other.scan(entry)
    assert names.patient(entry) != other.patient(entry)


def test_scan_of_an_unknown_patient_is_its_own_patient() -> None:
    names = Pseudonyms("a", SALT)
    unknown = {names.patient(scan(name)) for name in ("x", "y", "z")}
    assert len(unknown) == 3
    assert not unknown & {names.scan(scan("x")), names.patient(scan("other", "x"))}  # kinds are not linked by name


def test_file_names_may_not_be_utf_8(tmp_path: Path) -> None:
    """Old archives have such names; the report escapes them."""
    root = put(tmp_path / "scans", {"xray/a.png": picture_bytes(texture(0)), "xray/b.png": b"no picture"})
    try:
        for name, latin in (("a", b"M\xfcller"), ("b", b"Stra\xdfe")):
            (root / "xray" / f"{name}.png").rename(os.fsdecode(os.fsencode(root / "xray") + b"/" + latin + b".png"))
    except OSError:
        pytest.skip("this file system accepts UTF-8 names only")
    report = build(Folder(), root, tmp_path / "built", salt=SALT)
    assert report["scans"] == {"built": 1, "failed": 1, "duplicates_dropped": 0}
    assert r"xray/Stra\udcdfe.png" in (tmp_path / "built" / "report.json").read_text()


# --------------------------------------------------------------------------------------------------------------- splits


def test_patients_are_in_one_split_with_the_requested_fractions(tmp_path: Path) -> None:
    patients, scans = 4000, 10_000
    source = Listed([scan(f"s{i}", f"p{i % patients}") for i in range(scans)])
    found = splits_of(source, tmp_path, BuildOptions(validation=0.1, test=0.25))
    of_patient = defaultdict(set)
    for i in range(scans):
        of_patient[i % patients].add(found[f"s{i}"])
    assert all(len(splits) == 1 for splits in of_patient.values())
    counts = Counter(split for (split,) in of_patient.values())
    for split, fraction in (("validation", 0.1), ("test", 0.25), ("train", 0.65)):
        deviation = (patients * fraction * (1 - fraction)) ** 0.5
        assert abs(counts[split] - patients * fraction) < 4 * deviation


def test_patients_keep_their_split_when_data_is_added(tmp_path: Path) -> None:
    old = [scan(f"s{i}", f"p{i}") for i in range(500)] + [scan(f"alone{i}") for i in range(100)]
    new = [scan(f"n{i}", f"q{i}") for i in range(1000)] + [scan(f"t{i}", f"p{i}") for i in range(500)]
    before, after = splits_of(Listed(old), tmp_path), splits_of(Listed(new + old), tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(after[f"t{i}"] == before[f"s{i}"] for i in range(500))


def test_larger_test_split_contains_the_smaller_one(tmp_path: Path) -> None:
    source = Listed([scan(f"s{i}") for i in range(1000)])
    small, large = (splits_of(source, tmp_path, BuildOptions(validation=0, test=fraction)) for fraction in (0.1, 0.3))
    assert {name for name in small if small[name] == "test"} < {name for name in large if large[name] == "test"}
    everything = splits_of(source, tmp_path, BuildOptions(validation=0, test=1))
    assert set(everything.values()) == {"test"}
    assert set(splits_of(source, tmp_path, BuildOptions(validation=0, test=0)).values()) == {"train"}


def test_official_splits_are_used_and_other_scans_of_a_patient_follow(tmp_path: Path) -> None:
    official = [scan(f"o{i}", f"p{i}", ("train", "validation", "test")[i % 3]) for i in range(300)]
    rest = [scan(f"r{i}", f"p{i}") for i in range(300)]
    found = splits_of(Listed(rest + official), tmp_path)
    assert all(found[entry.id] == entry.split for entry in official)
    assert all(found[f"r{i}"] == found[f"o{i}"] for i in range(300))
    both = [scan("a", "p", "train"), scan("b", "p", "test")]  # official splits are never changed
    assert splits_of(Listed(both), tmp_path) == {"a": "train", "b": "test"}


def test_source_for_evaluation_only_is_all_in_the_test_split(tmp_path: Path) -> None:
    entries = [scan(f"s{i}", f"p{i}", (None, "train", "validation")[i % 3]) for i in range(90)]
    assert set(splits_of(Evaluated(entries), tmp_path).values()) == {"test"}


def test_split_is_ordered_by_pseudonym(tmp_path: Path) -> None:
    source = Listed([scan(f"s{i}") for i in range(300)])
    splits = ScanBuilder(source, tmp_path, salt=SALT, cache_dir=str(tmp_path)).split_entries()
    for entries in splits.values():
        hashes = [Pseudonyms("listed", SALT).scan(entry) for entry in entries]
        assert hashes == sorted(hashes)


# ----------------------------------------------------------------------------------------------------- salt and options


@pytest.mark.parametrize("default", [True, False])
def test_salt_is_created_once_and_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: bool
) -> None:
    monkeypatch.setattr(builder, "CACHE_FOLDER", tmp_path / "home" / "m3ret")
    path = tmp_path / "home" / "m3ret" / "salt" if default else tmp_path / "deep" / "er" / "salt"
    before = os.umask(0)
    try:
        salt = read_salt(None if default else path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert re.fullmatch(b"[0-9a-f]{64}", salt)
    content = path.read_bytes()
    assert read_salt(None if default else path) == salt
    assert path.read_bytes() == content
    assert read_salt(tmp_path / "other") != salt
    assert [file for file in path.parent.iterdir() if file != path] == []


def test_existing_salt_is_used_and_a_short_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "salt"
    path.write_bytes(b"\nsixteen bytes or more\n")
    assert read_salt(path) == b"sixteen bytes or more"
    for content in (b"", b"\n", b"short"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            read_salt(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "options",
    [
        *({"validation": -0.1}, {"test": -0.1}, {"validation": 0.6, "test": 0.5}, {"test": 1.1}),
        *({"test": float("nan")}, {"max_size": 15}),
    ],
)
def test_invalid_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        BuildOptions(**options)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------- rows


def collection(root: Path, first: int = 0) -> Path:
    """Write scans of several formats in every split, one of them broken."""
    files, rows = {}, []
    for number in range(12):
        kind, data = (
            ("png", picture_bytes(texture(first + number))),
            ("nii.gz", volume_bytes(first + number, zipped=True)),
            ("mp4", video_bytes(first + number)),
        )[number % 3]
        name = f"{number}.{kind}"
        files[name] = data if number != 4 else data[:-20]
        split = ("train", "validation", "test")[number // 4]
        modality = ("xray", "mri", "ultrasound")[number % 3]
        rows.append({"id": name, "file": name, "modality": modality, "group": f"p{number}", "split": split})
        rows[-1] |= {"label": "a|b" if number == 3 else "", "anatomy": "chest" if number % 3 == 0 else ""}
    return write_manifest(put(root, files), rows)


def prepared(root: Path, cache: Path, options: BuildOptions = BuildOptions()) -> dict[str, list[dict[str, object]]]:
    made = ScanBuilder(Folder(), root, salt=SALT, options=options, cache_dir=str(cache))
    made.download_and_prepare()
    return {split: rows.to_list() for split, rows in made.as_dataset().items()}


@pytest.mark.slow
def test_datasets_builder_gives_the_same_rows_as_build(tmp_path: Path) -> None:
    root = collection(tmp_path / "scans")
    build(Folder(), root, tmp_path / "built", salt=SALT)
    rows = prepared(root, tmp_path / "cache")
    assert {split: len(scans) for split, scans in rows.items()} == {"train": 4, "validation": 3, "test": 4}
    for split in rows:
        assert rows[split] == rows_of(tmp_path / "built", split)


@pytest.mark.slow
def test_datasets_cache_is_separate_for_each_folder_and_options(tmp_path: Path) -> None:
    one, other = collection(tmp_path / "one"), collection(tmp_path / "other", first=50)
    first = prepared(one, tmp_path / "cache")
    assert prepared(other, tmp_path / "cache") != first
    small = prepared(one, tmp_path / "cache", BuildOptions(max_size=32))
    assert max(max(row["shape"][1:]) for row in small["train"]) < 40  # type: ignore[index]
    assert prepared(one, tmp_path / "cache") == first


def test_unreadable_scan_is_skipped_with_file_and_reason(tmp_path: Path) -> None:
    root = put(tmp_path / "scans", {"ct/a.png": picture_bytes(texture(0))[:-30], "ct/b.png": picture_bytes(texture(0))})
    made = ScanBuilder(Folder(), root, salt=SALT, cache_dir=str(tmp_path))
    cut, good = (made.build_row(Entry(name, (root / "ct" / name,), "ct")) for name in ("a.png", "b.png"))
    gone = made.build_row(Entry("c", (root / "gone" / "1", root / "gone" / "2"), "ct"))
    assert isinstance(cut, SkippedEntry)
    assert cut.file == "ct/a.png"
    assert cut.reason
    assert isinstance(gone, SkippedEntry)
    assert gone.file == "gone/1 and 1 more"
    assert isinstance(good, BuiltRow)


def test_scan_too_large_for_parquet_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = put(tmp_path / "scans", {"ct/a.nii": volume_bytes(0)})
    made = ScanBuilder(Folder(), root, salt=SALT, cache_dir=str(tmp_path))
    (entry,) = made.source.entries(root)
    monkeypatch.setattr(builder, "MAX_MEDIA_BYTES", 352 + 12 * 10 * 6 * 2)
    assert isinstance(made.build_row(entry), BuiltRow)
    monkeypatch.setattr(builder, "MAX_MEDIA_BYTES", 352 + 12 * 10 * 6 * 2 - 1)
    failure = made.build_row(entry)
    assert isinstance(failure, SkippedEntry)
    assert "1,792" in failure.reason
    assert "1,791" in failure.reason
