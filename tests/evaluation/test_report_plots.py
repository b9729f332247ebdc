"""A report's pictures: what is drawn, and what is told in words: not blank, whole, nameless."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from labelled_scans import SECRET_FILE, SECRET_ID, SECRET_PATIENT, collection, facts_of_training
from PIL import Image

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation.report import plots
from modeling_m3ret.evaluation.report.numbers import (
    class_means,
    principal_components,
    rank_within_modalities,
    scaling_series,
)
from modeling_m3ret.evaluation.report.pictures import FILES, report_pictures, write_pictures
from modeling_m3ret.evaluation.report.plots import Picture
from modeling_m3ret.evaluation.table import ALL_MODALITIES, Row, evaluate
from modeling_m3ret.search.embedding import Embedded


def scans(folder: Path, count: int = 60) -> Embedded:
    """The collection, with files that can be shown."""
    embedded = collection(count, folder=folder)
    generator = np.random.default_rng(0)
    for record in embedded.records:
        assert isinstance(record.location, Path)
        Image.fromarray(generator.integers(0, 255, (40, 60), dtype=np.uint8)).save(record.location)
    return embedded


CHECKPOINTS = {
    "trained": facts_of_training("mae", 400, 1000, 10**7),
    "_early_$": facts_of_training("mae", 10, 1000, 10**7),
}


def all_pictures(embedded: Embedded) -> list[Picture]:
    noise = Embedded(torch.nn.functional.normalize(torch.randn(len(embedded.records), 8), dim=-1), embedded.records)
    methods = {"pixels": noise, "trained": embedded, "_early_$": noise}
    return report_pictures(methods, "trained", evaluate(methods), CHECKPOINTS, M3RetImageProcessor(size=32))


class Report(NamedTuple):
    """folder: of the scans and the report; written: every word in any picture."""

    folder: Path
    embedded: Embedded
    pictures: list[Picture]
    written: str


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(SECRET_FILE)
    embedded, written, png_of = scans(folder), [], plots.png

    def noting(figure: Figure) -> bytes:
        png = png_of(figure)
        written.extend(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))
        return png

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", noting)
        pictures = all_pictures(embedded)
    return Report(folder, embedded, pictures, "\n".join(written))


def test_pictures_are_drawn_and_hold_no_name(report: Report, tmp_path: Path) -> None:
    assert [picture.file for picture in report.pictures] == list(FILES)
    for word in ("mass", "ct", "chest", "pixels"):  # what is written in pictures is seen here
        assert word in report.written
    assert report.written.count("_early_") == 3  # in two legends, though it begins as what is left out of them; a title
    contents = [write_pictures(tmp_path, report.pictures).encode(), report.written.encode()]
    for picture in report.pictures:
        file = tmp_path / picture.file
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert len(colours) > 50  # more than the anti-aliased black of axes and words on white
        assert max(count for count, _ in colours) < 0.97 * sum(count for count, _ in colours)
        contents.append(file.read_bytes())
    for name in (SECRET_FILE, SECRET_ID, SECRET_PATIENT, str(report.folder)):
        assert not any(name.encode() in content for content in contents)


def test_the_same_scans_give_the_same_bytes() -> None:
    methods = {"trained": collection(24)}
    first, second = (report_pictures(methods, "trained", [], {}) for _ in range(2))
    assert first == second
    assert len(first) == 4


def test_every_picture_is_explained_and_told_in_words(report: Report, tmp_path: Path) -> None:
    markdown = write_pictures(tmp_path, report.pictures)
    told = re.findall(r"^!\[((?:\\.|[^\]\\])*)\]\((\w+\.png)\)$", markdown, flags=re.MULTILINE)
    assert [file for _, file in told] == [picture.file for picture in report.pictures]
    assert all(len(alt) > 60 for alt, _ in told)
    assert r"\<b\>\[x\]" in markdown  # a label closes no bracket and opens no tag
    assert "<b>" not in markdown
    assert markdown.count("### ") == len(report.pictures)


def test_scans_are_shown_only_when_asked_for_and_leave_with_the_next_report(report: Report, tmp_path: Path) -> None:
    markdown = write_pictures(tmp_path, report.pictures)
    assert "shows scans of patients" in markdown
    assert (tmp_path / "examples.png").is_file()
    unasked = report_pictures({"trained": report.embedded}, "trained", [], {})
    assert {picture.file for picture in unasked} == {*FILES} - {"examples.png", "scaling.png"}
    assert "No scan is shown in this report." in write_pictures(tmp_path, unasked)
    assert {path.name for path in tmp_path.iterdir()} == {picture.file for picture in unasked}


def one_modality(labels: str) -> Embedded:
    """A patient each, with these labels, `-` for none."""
    records = [Record(f"{n}", Path("x"), "ct", "", label.strip("-"), f"patient {n}") for n, label in enumerate(labels)]
    return Embedded(torch.nn.functional.normalize(torch.randn(len(labels), 4), dim=-1), records)


WITHIN_ONE = ["precision_recall.png", "classes.png", "map.png"]


@pytest.mark.parametrize(
    ("labels", "files"),
    [
        ("aabbab", WITHIN_ONE),
        ("aaaa", WITHIN_ONE),
        ("aabc", WITHIN_ONE),
        ("abcd", ["map.png"]),
        ("----", ["map.png"]),
        ("aa", WITHIN_ONE[:2]),
        ("a", []),
        ("", []),
    ],
)
def test_little_to_show_is_shown_without_an_error(labels: str, files: list[str], tmp_path: Path) -> None:
    methods = {"trained": one_modality(labels)}
    pictures = report_pictures(methods, "trained", evaluate(methods), {"trained": {"parameters": 5}})
    assert [picture.file for picture in pictures] == files
    for picture in pictures:
        Image.open(io.BytesIO(picture.png)).verify()
    assert write_pictures(tmp_path, pictures).startswith("## Pictures")


def test_scans_that_are_all_alike_have_a_map_of_one_point() -> None:
    embedded = one_modality("aabb")
    embedded.embeddings = torch.eye(4)[[0, 0, 0, 0]]
    assert principal_components(embedded.embeddings)[0].abs().max() == 0
    pictures = report_pictures({"trained": embedded}, "trained", [], {})
    assert [picture.file for picture in pictures] == WITHIN_ONE


def test_of_many_classes_and_kinds_the_extremes_and_the_common_are_shown() -> None:
    names = [f"class {n:02d}" for n in range(40)]
    records = [Record(f"{n}", Path("x"), "ct", names[n % 40], names[n % 40], f"p{n}") for n in range(120)]
    methods = {"trained": Embedded(torch.nn.functional.normalize(torch.randn(120, 6), dim=-1), records)}
    pictures = {picture.file: picture for picture in report_pictures(methods, "trained", [], {})}
    means = class_means(records, rank_within_modalities(methods)["ct"]["trained"])
    labels = list(means)
    assert f"ct, best: {labels[0]} " in pictures["classes.png"].alt
    assert f"ct, worst: {labels[-1]} " in pictures["classes.png"].alt
    assert f"trained {means[labels[-1]][1]:.2f}" in pictures["classes.png"].alt
    assert "others" in pictures["map.png"].alt


def test_curves_of_scaling_tell_the_table_s_numbers() -> None:
    rows = [
        Row(ALL_MODALITIES, "chance", 9, 9, {"mAP": 0.1}),
        Row(ALL_MODALITIES, "trained", 9, 9, {"mAP": 0.512}, (0.4, 0.6)),
        Row(ALL_MODALITIES, "_early_$", 9, 9, {"mAP": 0.345}, (0.3, 0.4)),
    ]
    picture = plots.scaling(scaling_series(CHECKPOINTS), CHECKPOINTS, rows)
    assert "training steps, checkpoints: 10 0.345, 400 0.512" in picture.alt
    assert "horizontal lines: chance 0.100" in picture.alt


@pytest.mark.parametrize(("first_step", "scale"), [(10, "log"), (300, "linear")])
def test_curves_of_scaling_have_named_axes_and_intervals(
    first_step: int, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    checkpoints = {
        "trained": facts_of_training("mae", 400, 1000, 10**7),
        "step-000010": facts_of_training("mae", first_step, 1000, 10**7),
    }
    intervals = {"trained": (0.4, 0.6), "step-000010": (0.3, 0.45)}
    rows = [Row(ALL_MODALITIES, name, 9, 9, {"mAP": 0.4}, interval) for name, interval in intervals.items()]
    plots.scaling(scaling_series(checkpoints), checkpoints, rows)
    steps, views = drawn[0].axes
    assert (steps.get_xlabel(), views.get_xlabel()) == ("training steps", "views seen in training")
    assert steps.get_ylabel() == "mAP, mean over modalities"
    assert steps.get_xscale() == views.get_xscale() == scale
    (bars,) = [collection for collection in steps.collections if isinstance(collection, LineCollection)]
    ends = {float(x): (low, high) for (x, low), (_, high) in bars.get_segments()}
    assert ends == {400: pytest.approx((0.4, 0.6)), first_step: pytest.approx((0.3, 0.45))}
