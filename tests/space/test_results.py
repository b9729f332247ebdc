"""How hits are shown: readable words, groups of hits that look the same, cards, tables and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

import pyarrow as pa
import pytest
import torch
from PIL import Image


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search.index import RetrievalIndex
from modeling_m3ret.space.gallery import Gallery
from modeling_m3ret.space.results import (
    HTML,
    Group,
    alikeness,
    describe,
    finding,
    group_similar,
    readable,
    to_csv,
    webp,
)
from modeling_m3ret.space.service import HitFacts


def hit(item: int, similarity: float = 0.5, **facts: object) -> HitFacts:
    values = {"modality": "ct", "anatomy": "chest", "labels": [], "source": "CheXpert"} | facts
    return HitFacts(**({"item": item, "similarity": similarity, "percentile": 97.25, "weak": False} | values))


def gallery_at(degrees: Sequence[float], pictures: Sequence[Image.Image] | None = None) -> Gallery:
    angles = torch.tensor(degrees).deg2rad()
    ids = pa.table({"id": [str(row) for row in range(len(degrees))]})
    index = RetrievalIndex.build(torch.stack([angles.cos(), angles.sin()], 1), ids, ModelFacts("m", "r", "p"))
    thumbnails = None if pictures is None else pa.chunked_array([[webp(picture) for picture in pictures]])
    return Gallery(index, thumbnails=thumbnails)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_findings", "No findings"),
        ("covid-19", "COVID-19"),
        ("calot-triangle-dissection", "Calot-triangle-dissection"),
        ("mri t1 of the head", "MRI T1 of the head"),
        ("", ""),
        ("  _ ", ""),
    ],
)
def test_values_of_a_manifest_become_words(text: str, words: str) -> None:
    assert readable(text) == words


def test_a_finding_does_not_repeat_the_anatomy() -> None:
    facts = hit(0, anatomy="fetal head", labels=["fetal head", "no_findings"])
    assert finding(facts) == "No findings"
    assert describe(facts) == "CT · Fetal head · No findings"


def test_a_percentile_is_never_zero_percent() -> None:
    assert [alikeness(value) for value in (None, 100.0, 99.95, 99.2, 91.0, 64.0, 0.0)] == [
        "", "closest 0.1%", "closest 0.1%", "closest 0.8%", "closest 9.0%", "closest 36%", "closest 100%"
    ]  # fmt: skip


def test_hits_that_look_the_same_are_one_group() -> None:
    ramp = Image.linear_gradient("L")
    brighter = ramp.point(lambda value: value // 2 + 100)
    hits = [hit(row) for row in (0, 2, 1, 3, 4)]
    degrees, threshold = (0, 1, 30, 31, 60), math.cos(math.radians(5))

    def items(gallery: Gallery, count: int = 9) -> list[list[int]]:
        groups = group_similar(hits, gallery, count, threshold)
        return [[one["item"] for one in group.hits] for group in groups]

    alike = gallery_at(degrees, [ramp, brighter] * 2 + [ramp])
    assert items(alike) == [[0, 1], [2, 3], [4]]
    assert items(alike, count=2) == [[0, 1], [2, 3]]
    assert items(gallery_at(degrees, [ramp, ramp.rotate(90), ramp, brighter, ramp])) == [[0], [2, 3], [1], [4]]
    assert items(gallery_at(degrees)) == [[0], [2], [1], [3], [4]], "without pictures"
    assert group_similar([], alike, count=2) == []


def test_cards_number_the_groups_and_hide_what_looks_the_same() -> None:
    shown = HTML.cards([Group(1, hit(7), (hit(8), hit(9))), Group(2, hit(3, weak=True))])
    assert re.findall(r"data-index='(\d+)'", shown) == ["7", "8", "9", "3"]
    assert re.findall(r"class='rank'>(\d+)<", shown) == ["1", "2"]
    assert shown.count("<li hidden>") == 2
    assert "+2 similar" in shown
    assert shown.count("Weak match") == 1
    assert "closest 2.8%" in shown


def test_metadata_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    one = hit(1, anatomy=evil, labels=[evil], source=evil, modality=evil)
    for shown in (HTML.cards([Group(1, one, (one,))]), HTML.table([Group(1, one)])):
        assert "<img src=x" not in shown
        assert shown.count("&lt;") >= 3


def test_a_table_has_every_value() -> None:
    shown = HTML.table([Group(2, hit(4, 0.61234, labels=["no_findings"]), (hit(5, percentile=None, anatomy=""),))])
    cells = re.findall(r"<td>(.*?)</td>", shown)
    assert cells[:8] == ["2", "closest 2.8%", "CT", "Chest", "No findings", "CheXpert", "0.612", "4"]
    assert cells[8:12] == ["2", "–", "CT", "–"]


def test_formulas_are_escaped_in_the_csv_file() -> None:
    one = hit(3, -0.5, anatomy="+1", labels=["=HYPERLINK(1)"], source="s", percentile=None, weak=True)
    header, line = csv.reader(io.StringIO(to_csv([one])))
    assert header == ["item", "similarity", "percentile", "weak", "modality", "anatomy", "labels", "source"]
    assert line == ["3", "-0.5", "", "true", "ct", "'+1", "'=HYPERLINK(1)", "s"]
