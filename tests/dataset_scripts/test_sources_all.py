"""Properties of all sources, and the helpers that they share."""

from __future__ import annotations

import csv
import gzip
import pickle
from pathlib import Path

import pytest
from source_trees import write

from dataset_scripts import entries
from dataset_scripts.entries import SourceError, find_files, read_json
from dataset_scripts.sources import SOURCES
from modeling_m3ret.data import table
from modeling_m3ret.data.table import path_inside, read_table


DECLARED = [source for name, source in SOURCES.items() if name not in ("folder", "phantom")]


def test_every_collection_declares_its_origin() -> None:
    for name, source in SOURCES.items():
        assert source.name == name
    for source in DECLARED:
        assert all((source.title, source.homepage.startswith("http"), source.licence, source.citation))


def test_only_mri_collections_are_for_evaluation_only() -> None:
    assert {source.name for source in DECLARED if source.evaluation_only} == {"brats", "msd_mri", "oasis"}


@pytest.mark.parametrize("source", DECLARED, ids=lambda source: source.name)
def test_folder_without_the_collection_is_refused(source: type[entries.Source], tmp_path: Path) -> None:
    for root in (write(tmp_path / "other", "Thumbs.db", "scan.hdr", "scan.img"), tmp_path / "missing"):
        with pytest.raises(SourceError) as caught:
            list(source().entries(root))
        assert caught.value.location.startswith(str(root))


@pytest.mark.parametrize(
    ("source", "file", "missing"),
    [
        ("nih_chestxray14", "images/00000003_000.png", ""),
        ("chexpert", "train/patient00001/study1/view1_frontal.jpg", "train.csv"),
        ("padchest", "0/1_a.png", "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"),
        ("mimic_cxr_jpg", "files/p10/p10000032/s50414267/02aa804e.jpg", "mimic-cxr-2.0.0-chexpert.csv"),
        ("pocus_lung", "pocus_images/convex/Cov_efsumb1.png", "dataset_metadata.csv"),
        ("hyperkvasir_videos", "lower-gi-tract/pathological-findings/polyps/7e37-41.avi", "video-labels.csv"),
        ("cholect50", "videos/VID01/000000.png", "labels/VID01.json"),
        ("msd", "Task03_Liver/imagesTr/liver_0.nii.gz", "Task03_Liver/dataset.json"),
    ],
)
def test_scans_without_their_table_are_refused(tmp_path: Path, source: str, file: str, missing: str) -> None:
    with pytest.raises(SourceError) as caught:
        list(SOURCES[source]().entries(write(tmp_path, file)))
    assert caught.value.location == str(tmp_path / missing)


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/passwd", "", ".", "a\0.png", "..\\a.png", "C:\\a.png"]
)
def test_file_name_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(SourceError) as caught:
        path_inside(Path("root"), name)
    assert (caught.value.location, caught.value.got) == ("root", repr(name))


def test_file_name_inside_the_folder_is_accepted() -> None:
    assert path_inside(Path("root"), "./a/b..png") == Path("root/a/b..png")


def test_compressed_table_is_read_like_a_plain_one(tmp_path: Path) -> None:
    text = "\ufeffa,b\n1, x \n2\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert list(read_table(tmp_path / "t.csv", ["a", "b"])) == [{"a": "1", "b": "x"}, {"a": "2", "b": ""}]
    assert list(read_table(tmp_path / "t.csv.gz", ["a"])) == list(read_table(tmp_path / "t.csv", ["a"]))
    (tmp_path / "t.csv").write_text("a,b\n3,y\n")
    assert list(read_table(tmp_path / "t.csv", ["a"])) == [{"a": "3", "b": "y"}]


def test_compressed_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_LINE_CHARACTERS", 1000)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a\n" + b"0" * 10**6))
    with pytest.raises(SourceError) as caught:
        list(read_table(tmp_path / "t.csv", ["a"]))
    assert caught.value.location == str(tmp_path / "t.csv.gz")
    assert "1,000" in caught.value.expected


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (gzip.compress(b"a\n1\n" * 1000)[:-20], EOFError),
        (b"a\n1\n", gzip.BadGzipFile),
        (gzip.compress(b"a\n" + b"1" * 200_000), csv.Error),
        (gzip.compress(b"a\n\xff\n"), UnicodeDecodeError),
        (gzip.compress(b"b\n1\n"), None),
    ],
    ids=["truncated", "not compressed", "endless line", "not UTF-8", "other columns"],
)
def test_damaged_table_is_refused(tmp_path: Path, content: bytes, cause: type[Exception] | None) -> None:
    (tmp_path / "t.csv.gz").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        list(read_table(tmp_path / "t.csv", ["a"]))
    assert caught.value.location == str(tmp_path / "t.csv.gz")
    assert isinstance(caught.value.__cause__, cause or type(None))


def test_invalid_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.json", text="[" * 10**5) / "a.json"
    with pytest.raises(SourceError):
        read_json(path)
    monkeypatch.setattr(entries, "MAX_JSON_BYTES", 10)
    with pytest.raises(SourceError) as caught:
        read_json(path)
    assert caught.value.got == "100,000"
    with pytest.raises(SourceError) as caught:
        read_json(tmp_path / "b.json")
    assert caught.value.location == str(tmp_path / "b.json")


def test_source_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(SourceError(Path("a.csv"), "a table", "nothing")))
    assert (error.location, error.expected, error.got) == ("a.csv", "a table", "nothing")


def test_files_are_sorted_and_hidden_ones_skipped(tmp_path: Path) -> None:
    write(tmp_path, "b/2.png", "b/10.PNG", "a/x.png", "z.png", "b/._2.png", ".cache/c.png", "b/Thumbs.db")
    names = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, (".png",))]
    assert names == ["z.png", "a/x.png", "b/10.PNG", "b/2.png"]
