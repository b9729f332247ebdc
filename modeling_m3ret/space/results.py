"""Show hits: as cards, as a table and as CSV, in readable words.

Metadata is untrusted. The macros of templates/page.html escape it, and nothing else makes HTML of it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import pandas as pd  # type: ignore[import-untyped]
from PIL import Image

from .gallery import Facts, Gallery
from .service import HitFacts


MODALITY_NAMES = {"xray": "X-ray", "ultrasound": "Ultrasound", "endoscopy": "Endoscopy", "ct": "CT", "mri": "MRI"}
ACRONYMS = {"covid-19", "covid", "ct", "mri", "ap", "pa", "t1", "t2", "t1w", "t2w", "t1c", "flair", "dwi", "adc", "gi"}
# Cosine of the embeddings, and correlation of the thumbnails, of scans that look the same. The embeddings alone are not
# enough: at 0.95, `m3ret-vitt` with patches of 8 px joined CTs of different patients and findings, whose thumbnails
# correlate by 0.1 to 0.8.
NEAR_IDENTICAL = 0.95
TEXTS = ["modality", "anatomy", "labels", "source"]  # columns of the CSV file that may hold a formula


def modality_name(modality: str) -> str:
    """Return the name of a modality as it is shown, e.g. X-ray for xray."""
    return MODALITY_NAMES.get(modality, modality)


def readable(text: str) -> str:
    """Return a value of a manifest as words: `no_findings` becomes "No findings"."""
    words = [word.upper() if word.lower() in ACRONYMS else word for word in text.replace("_", " ").split()]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]]) if words else ""


def finding(facts: Facts) -> str:
    """Return the labels in words, without those that repeat the anatomy."""
    return ", ".join(readable(label) for label in facts["labels"] if label != facts["anatomy"])


def describe(facts: Facts) -> str:
    """Return modality, anatomy and finding in one line of text, not HTML."""
    return " · ".join(filter(None, (modality_name(facts["modality"]), readable(facts["anatomy"]), finding(facts))))


def alikeness(percentile: float | None) -> str:
    """Return a percentile in words, with a decimal only among the closest 10% of pairs, and never 0%."""
    if percentile is None:
        return ""
    rest = max(0.1, 100 - percentile)
    return f"closest {rest:.1f}%" if rest < 10 else f"closest {rest:.0f}%"


def webp(image: Image.Image | None) -> bytes:
    """Return a picture in WebP, a grey square if there is none."""
    stream = io.BytesIO()
    (image or Image.new("RGB", (128, 128), "#404040")).save(stream, "WEBP", quality=85)
    return stream.getvalue()


def picture_url(image: Image.Image | None) -> str:
    """Return a picture as a data URL."""
    return f"data:image/webp;base64,{base64.b64encode(webp(image)).decode()}"


def _macros() -> Any:
    templates = jinja2.Environment(loader=jinja2.PackageLoader("modeling_m3ret.space"), autoescape=True)
    for function in (modality_name, readable, finding, alikeness, picture_url):
        templates.globals[function.__name__] = function
    return templates.get_template("page.html").module


HTML = _macros()  # `HTML.cards(groups)` and others return HTML


@dataclass(frozen=True)
class Group:
    """A hit with the hits that look the same as it. Ranks are from 1, in the order of similarity."""

    rank: int
    first: HitFacts
    others: tuple[HitFacts, ...] = ()

    @property
    def hits(self) -> tuple[HitFacts, ...]:
        """All hits of the group."""
        return (self.first, *self.others)


def group_similar(
    hits: Sequence[HitFacts], gallery: Gallery, count: int, threshold: float = NEAR_IDENTICAL
) -> list[Group]:
    """Group hits that look the same, best first.

    A hit joins the first group whose first hit is at least as similar to it as `threshold`, by the cosine of the
    embeddings and by the correlation of the thumbnails. Without thumbnails every hit is a group. Hits after the last
    of `count` groups are left out.
    """

    def look_the_same(first: int, second: int) -> bool:
        embeddings = gallery.index.embeddings[[first, second]].float()
        if embeddings[0] @ embeddings[1] < threshold:
            return False
        pictures = gallery.miniature(first), gallery.miniature(second)
        return pictures[0] is not None and pictures[1] is not None and bool(pictures[0] @ pictures[1] >= threshold)

    groups: list[Group] = []
    for hit in hits:
        same = [place for place, group in enumerate(groups) if look_the_same(group.first["item"], hit["item"])]
        if same:
            group = groups[same[0]]
            groups[same[0]] = replace(group, others=(*group.others, hit))
        elif len(groups) == count:
            break
        else:
            groups.append(Group(len(groups) + 1, hit))
    return groups


def to_csv(hits: Sequence[HitFacts]) -> str:
    """Format hits as CSV. Cells that a spreadsheet would evaluate as a formula are prefixed with an apostrophe."""
    frame = pd.DataFrame(hits, columns=["item", "similarity", "percentile", "weak", *TEXTS])
    frame["labels"] = frame["labels"].map(", ".join)
    frame[TEXTS] = frame[TEXTS].map(lambda text: f"'{text}" if text.startswith(tuple("=+-@\t\r")) else text)
    frame["similarity"], frame["percentile"] = frame["similarity"].round(4), frame["percentile"].astype(float).round(1)
    frame["weak"] = frame["weak"].map({True: "true", False: "false"})
    return frame.to_csv(index=False)


def once_loaded(call: str) -> str:
    """Return a script for `js_on_load` that runs a call of page.js, which may be loaded later than the element."""
    return f"(function run () {{ window.m3ret ? {call} : setTimeout(run, 50) }})()"
