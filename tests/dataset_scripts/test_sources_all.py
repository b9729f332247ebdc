"""What holds for all sources, and the helpers that they share."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from source_trees import write

from dataset_scripts import entries
from dataset_scripts.entries import SourceError, files_under, inside, read_json, read_table
from dataset_scripts.sources import SOURCES


DECLARED = [source for name, source in SOURCES.items() if name not in ("folder", "phantom")]


def test_each_collection_says_where_it_comes_from() -> None:
    for name, source in SOURCES.items():
        assert source.name == name
    for source in DECLARED:
        assert all((source.title, source.homepage.startswith("http"), source.licence, source.citation))


def test_only_mri_is_kept_for_evaluation() -> None:
    assert {source.name for source in DECLARED if source.evaluation_only} == {"brats", "msd_mri", "oasis"}


@pytest.mark.parametrize("source", DECLARED, ids=lambda source: source.name)
def test_a_folder_that_is_not_the_collection_is_refused(source: type[entries.Source], tmp_path: Path) -> None:
    for place in (write(tmp_path / "other", "Thumbs.db", "scan.hdr", "scan.img"), tmp_path / "missing"):
        with pytest.raises(SourceError, match=r"found .*expected "):
            list(source().entries(place))


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../b.png", "/etc/passwd", "", ".", "a\0.png", "..\\a.png", "C:\\a.png"]
)
def test_a_table_points_nowhere_else(name: str) -> None:
    with pytest.raises(SourceError, match="in a table, expected one under this folder"):
        inside(Path("root"), name)


def test_a_table_points_to_files_under_the_folder() -> None:
    assert inside(Path("root"), "./a/b..png") == Path("root/a/b..png")


def test_a_packed_table_is_read_as_it_is(tmp_path: Path) -> None:
    text = "\ufeffa,b\n1, x \n2\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert list(read_table(tmp_path / "t.csv", ["a", "b"])) == [{"a": "1", "b": "x"}, {"a": "2", "b": ""}]
    assert list(read_table(tmp_path / "t.csv.gz", ["a"])) == list(read_table(tmp_path / "t.csv", ["a"]))
    (tmp_path / "t.csv").write_text("a,b\n3,y\n")
    assert list(read_table(tmp_path / "t.csv", ["a"])) == [{"a": "3", "b": "y"}]


def test_a_packed_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "LONGEST_LINE", 1000)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a\n" + b"0" * 10**6))
    with pytest.raises(SourceError, match="found a line of 1,000 characters or more"):
        list(read_table(tmp_path / "t.csv", ["a"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"a\n1\n" * 1000)[:-20], "damaged table"),
        (b"a\n1\n", "damaged table"),
        (gzip.compress(b"a\n" + b"1" * 200_000), "damaged table"),
        (gzip.compress(b"a\n\xff\n"), "not UTF-8"),
        (gzip.compress(b"b\n1\n"), "expected also a"),
    ],
    ids=["cut", "not packed", "line without end", "not UTF-8", "other columns"],  # packed bytes hold the time: no name
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv.gz").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        list(read_table(tmp_path / "t.csv", ["a"]))


def test_json_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.json", text="[" * 10**5) / "a.json"
    with pytest.raises(SourceError, match="not JSON"):
        read_json(path)
    monkeypatch.setattr(entries, "LARGEST_JSON", 10)
    with pytest.raises(SourceError, match="100,000 bytes, expected at most 10"):
        read_json(path)
    with pytest.raises(SourceError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_files_come_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path, "b/2.png", "b/10.PNG", "a/x.png", "z.png", "b/._2.png", ".cache/c.png", "b/Thumbs.db")
    names = [path.relative_to(tmp_path).as_posix() for path in files_under(tmp_path, (".png",))]
    assert names == ["z.png", "a/x.png", "b/10.PNG", "b/2.png"]
