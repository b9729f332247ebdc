"""The scans in `space/gallery`: they can be read, visitors see what they show, and their origin is stated."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.space.gallery import DEMO_FOLDER
from modeling_m3ret.space.visible import SOURCES, is_visible


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / DEMO_FOLDER


def test_every_file_is_a_scan_of_the_manifest_and_small() -> None:
    records = open_collection(FOLDER)
    others = {FOLDER / "manifest.csv", FOLDER / "ATTRIBUTION.md"}
    assert {record.location for record in records} | others == set(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6e6
    assert {"ct", "endoscopy", "ultrasound"} <= {record.modality for record in records}


def test_visitors_see_modality_anatomy_label_and_source_of_every_scan() -> None:
    for record in open_collection(FOLDER):
        assert record.source in SOURCES
        assert record.anatomy
        assert all(is_visible(text) for text in (record.anatomy, record.label) if text)


def test_the_origin_of_every_scan_is_stated() -> None:
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert {source: int(count) for source, count, _, _ in rows} == Counter(r.source for r in open_collection(FOLDER))
    assert all(licence.strip() and citation.strip() for _, _, licence, citation in rows)


def test_files_hold_pixels_alone() -> None:
    """No EXIF, no comment, no description in a NIfTI header."""
    nibabel = pytest.importorskip("nibabel")
    for path in FOLDER.glob("*.jpg"):
        with Image.open(path) as image:
            assert not image.getexif(), path
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive"}, path
    for path in FOLDER.glob("*.nii.gz"):
        header = nibabel.load(path).header
        assert not any(bytes(header[key]).strip(b"\0") for key in ("descrip", "aux_file", "db_name", "intent_name")), (
            path
        )
        assert not header.extensions, path


@pytest.mark.slow
def test_every_scan_can_be_read() -> None:
    processor = M3RetImageProcessor(size=32)
    for record in open_collection(FOLDER):
        scan = processor.read(record.open())
        assert scan.array.max() > scan.array.min(), record.id
