"""The figures of a report: complete, not blank, described in text, and without names of files or patients."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from labelled_scans import SECRET_FILE, SECRET_ID, SECRET_PATIENT, collection, training_facts
from PIL import Image

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation.report import plots
from modeling_m3ret.evaluation.report.numbers import (
    QUANTITIES,
    class_means,
    principal_components,
    rank_within_modalities,
    scaling_series,
)
from modeling_m3ret.evaluation.report.plots import Picture
from modeling_m3ret.evaluation.report.report import FILES, draw_pictures, write_pictures
from modeling_m3ret.evaluation.table import ALL_MODALITIES, Row, evaluate
from modeling_m3ret.search.embedding import Embedded


def scans(folder: Path, count: int = 60) -> Embedded:
    """Return the collection with readable files."""
    embedded = collection(count, folder=folder)
    generator = np.random.default_rng(0)
    for record in embedded.records:
        assert isinstance(record.location, Path)
        Image.fromarray(generator.integers(0, 255, (40, 60), dtype=np.uint8)).save(record.location)
    return embedded


CHECKPOINTS = {
    "trained": training_facts("mae", 400, 1000, 10**7),
    "_early_$": training_facts("mae", 10, 1000, 10**7),
}


def all_pictures(embedded: Embedded) -> list[Picture]:
    noise = Embedded(torch.nn.functional.normalize(torch.randn(len(embedded.records), 8), dim=-1), embedded.records)
    methods = {"pixels": noise, "trained": embedded, "_early_$": noise}
    return draw_pictures(methods, "trained", evaluate(methods), CHECKPOINTS, M3RetImageProcessor(size=32))


class Drawn(NamedTuple):
    """Pictures of the scans in a folder, and all text drawn in them."""

    folder: Path
    embedded: Embedded
    pictures: list[Picture]
    text: str


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(SECRET_FILE)
    embedded, texts, encode_png = scans(folder), [], plots.png

    def recording(figure: Figure) -> bytes:
        png = encode_png(figure)
        texts.extend(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))
        return png

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", recording)
        pictures = all_pictures(embedded)
    return Drawn(folder, embedded, pictures, "\n".join(texts))


@pytest.mark.slow
def test_pictures_are_drawn_and_name_no_file_or_patient(report: Drawn, tmp_path: Path) -> None:
    assert [picture.file for picture in report.pictures] == list(FILES)
    for name in ("mass", "ct", "chest", "pixels"):
        assert name in report.text
    assert report.text.count("_early_") == 3  # in two legends, despite the leading underscore, and in a title
    contents = [write_pictures(tmp_path, report.pictures).encode(), report.text.encode()]
    for picture in report.pictures:
        file = tmp_path / picture.file
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert len(colours) > 50  # more than anti-aliased black text on white
        assert max(count for count, _ in colours) < 0.97 * sum(count for count, _ in colours)
        contents.append(file.read_bytes())
    for name in (SECRET_FILE, SECRET_ID, SECRET_PATIENT, str(report.folder)):
        assert not any(name.encode() in content for content in contents)


@pytest.mark.slow
def test_pictures_are_reproducible() -> None:
    methods = {"trained": collection(24)}
    first, second = (draw_pictures(methods, "trained", [], {}) for _ in range(2))
    assert first == second
    assert len(first) == 4


@pytest.mark.slow
def test_every_picture_has_alternative_text_and_a_heading(report: Drawn, tmp_path: Path) -> None:
    markdown = write_pictures(tmp_path, report.pictures)
    images = re.findall(r"^!\[((?:\\.|[^\]\\])*)\]\((\w+\.png)\)$", markdown, flags=re.MULTILINE)
    assert [file for _, file in images] == [picture.file for picture in report.pictures]
    assert all(len(alt) > 60 for alt, _ in images)
    assert r"\<b\>\[x\]" in markdown  # labels are escaped
    assert "<b>" not in markdown
    assert markdown.count("### ") == len(report.pictures)


@pytest.mark.slow
def test_scans_are_shown_only_on_request_and_removed_by_the_next_report(report: Drawn, tmp_path: Path) -> None:
    assert "(examples.png)" in write_pictures(tmp_path, report.pictures)
    assert (tmp_path / "examples.png").is_file()
    without = draw_pictures({"trained": report.embedded}, "trained", [], {})
    assert {picture.file for picture in without} == {*FILES} - {"examples.png", "scaling.png"}
    assert "examples.png" not in write_pictures(tmp_path, without)
    assert {path.name for path in tmp_path.iterdir()} == {picture.file for picture in without}


def one_modality(labels: str) -> Embedded:
    """Return one scan per patient with these labels; `-` is no label."""
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
def test_pictures_without_content_are_omitted(labels: str, files: list[str], tmp_path: Path) -> None:
    methods = {"trained": one_modality(labels)}
    pictures = draw_pictures(methods, "trained", evaluate(methods), {"trained": {"parameters": 5}})
    assert [picture.file for picture in pictures] == files
    for picture in pictures:
        Image.open(io.BytesIO(picture.png)).verify()
    write_pictures(tmp_path, pictures)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_equal_embeddings_are_one_point_in_the_map() -> None:
    embedded = one_modality("aabb")
    embedded.embeddings = torch.eye(4)[[0, 0, 0, 0]]
    assert principal_components(embedded.embeddings)[0].abs().max() == 0
    pictures = draw_pictures({"trained": embedded}, "trained", [], {})
    assert [picture.file for picture in pictures] == WITHIN_ONE


@pytest.mark.slow
def test_alternative_text_names_the_best_and_worst_of_many_classes() -> None:
    names = [f"class {n:02d}" for n in range(40)]
    records = [Record(f"{n}", Path("x"), "ct", names[n % 40], names[n % 40], f"p{n}") for n in range(120)]
    methods = {"trained": Embedded(torch.nn.functional.normalize(torch.randn(120, 6), dim=-1), records)}
    pictures = {picture.file: picture for picture in draw_pictures(methods, "trained", [], {})}
    means = class_means(records, rank_within_modalities(methods)["ct"]["trained"])
    labels = list(means)
    assert f"ct, best: {labels[0]} " in pictures["classes.png"].alt
    assert f"ct, worst: {labels[-1]} " in pictures["classes.png"].alt
    assert f"trained {means[labels[-1]][1]:.2f}" in pictures["classes.png"].alt


def test_alternative_text_of_scaling_curves_holds_the_scores() -> None:
    rows = [
        Row(ALL_MODALITIES, "chance", 9, 9, {"mAP": 0.1}),
        Row(ALL_MODALITIES, "trained", 9, 9, {"mAP": 0.512}, (0.4, 0.6)),
        Row(ALL_MODALITIES, "_early_$", 9, 9, {"mAP": 0.345}, (0.3, 0.4)),
    ]
    picture = plots.scaling(scaling_series(CHECKPOINTS), CHECKPOINTS, rows)
    steps, views, references = re.findall(r"(?:checkpoints|lines): ([^;.]*(?:\.\d+[^;.]*)*)", picture.alt)
    assert (steps, views) == ("10 0.345, 400 0.512", "80 0.345, 3.2 k 0.512")
    assert references == "chance 0.100"


@pytest.mark.parametrize(("first_step", "scale"), [(10, "log"), (300, "linear")])
def test_scaling_curves_have_axes_and_intervals(first_step: int, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    checkpoints = {
        "trained": training_facts("mae", 400, 1000, 10**7),
        "step-000010": training_facts("mae", first_step, 1000, 10**7),
    }
    intervals = {"trained": (0.4, 0.6), "step-000010": (0.3, 0.45)}
    rows = [Row(ALL_MODALITIES, name, 9, 9, {"mAP": 0.4}, interval) for name, interval in intervals.items()]
    plots.scaling(scaling_series(checkpoints), checkpoints, rows)
    steps, views = drawn[0].axes
    assert (steps.get_xlabel(), views.get_xlabel()) == (QUANTITIES["step"], QUANTITIES["views"])
    assert "mAP" in steps.get_ylabel()
    assert steps.get_xscale() == views.get_xscale() == scale
    (bars,) = [collection for collection in steps.collections if isinstance(collection, LineCollection)]
    ends = {float(x): (low, high) for (x, low), (_, high) in bars.get_segments()}
    assert ends == {400: pytest.approx((0.4, 0.6)), first_step: pytest.approx((0.3, 0.45))}
