"""Visitors see known medical words of a gallery, and no other words."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dataset_scripts.sources import SOURCES as BUILDERS
from dataset_scripts.sources import chexpert, folder, hyperkvasir_videos, medmnist, pocus_lung
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.phantom.anatomy import CLASSES
from modeling_m3ret.space.gallery import DEMO_FOLDER
from modeling_m3ret.space.visible import SAMPLE_SOURCE, SOURCES, is_visible, visible_columns


# published names of findings and regions, as the collections of dataset_scripts spell them
PUBLISHED = [
    *chexpert.FINDINGS,
    *pocus_lung.LABELS.values(),
    *hyperkvasir_videos.TRACTS.values(),
    *folder.BODY_PARTS,
    *(name for subset in medmnist.SUBSETS.values() for name in (*subset.labels, subset.anatomy)),
    *CLASSES,
    *("glioma", "no polyp", "calot-triangle-dissection", "Pleural_Thickening", "No Finding", "head-neck", "T1w"),
    *("Arterial wall calcification", "Interlobular septal thickening", "no_findings", "covid-19"),
]
HIDDEN = [
    *("DOE^JANE", "Jane Doe", "doe", "Müller", "山田太郎", "chest Doe", "nodule, J. Doe", "J"),
    *("MRN 1234567", "1234567", "1.2.840.113619.2.55", "00027-25843", "ct_series_98", "knee 7", "555-0100"),
    *("2024-01-31", "31.01.2024", "20240131", "19-19-19", "1 Jan"),
    *("/data/doe/scan.dcm", "C:\\doe\\scan", "chest/../doe", "doe@example.org", "https://example.org/doe", "mailto:x"),
    *("<b>chest</b>", "<script>", "[chest](javascript:x)", "=chest", "chest\u202e", "chest\x00", "&#100;oe", "chest;"),
    *("", " ", "-", "_", "chest " * 30),
]


def test_names_of_findings_and_regions_are_shown() -> None:
    assert [name for name in PUBLISHED if not is_visible(name)] == []


@pytest.mark.parametrize("text", HIDDEN)
def test_what_may_identify_a_person_is_not_shown(text: str) -> None:
    assert not is_visible(text)
    table = pa.table({"modality": [text], "anatomy": [text], "labels": [["nodule", text]], "source": [text]})
    (row,) = visible_columns(table).to_pylist()
    assert row == {"modality": "", "anatomy": "", "labels": ["nodule"], "source": ""}


def test_the_owner_may_show_labels_but_not_sources() -> None:
    table = pa.table({"modality": ["dxa"], "anatomy": ["Hof"], "labels": [["Grad B"]], "source": ["/data/doe"]})
    (row,) = visible_columns(table, show_labels=True).to_pylist()
    assert row == {"modality": "dxa", "anatomy": "Hof", "labels": ["Grad B"], "source": ""}


def test_missing_values_are_empty() -> None:
    nulls = pa.nulls(1, pa.string())
    table = pa.table(
        {"modality": nulls, "anatomy": nulls, "labels": pa.nulls(1, pa.list_(pa.string())), "source": nulls}
    )
    assert visible_columns(table).to_pylist() == [{"modality": "", "anatomy": "", "labels": [], "source": ""}]


def test_known_sources_are_those_that_can_be_built_and_of_the_demo() -> None:
    demo = {record.source for record in open_collection(Path(__file__).parents[2] / DEMO_FOLDER)}
    assert {builder.title for builder in BUILDERS.values()} | {SAMPLE_SOURCE} | demo == SOURCES
