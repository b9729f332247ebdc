"""Show hits: as cards, as a table and as CSV, in readable words.

Metadata is untrusted. It is escaped here, and nowhere else becomes HTML.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import cast

import torch
from PIL import Image

from .gallery import Facts, Gallery
from .service import HitFacts


COLUMNS = ["item", "similarity", "percentile", "weak", "modality", "anatomy", "labels", "source"]
MODALITY_NAMES = {"xray": "X-ray", "ultrasound": "Ultrasound", "endoscopy": "Endoscopy", "ct": "CT", "mri": "MRI"}
ACRONYMS = {"covid-19", "covid", "ct", "mri", "ap", "pa", "t1", "t2", "t1w", "t2w", "t1c", "flair", "dwi", "adc", "gi"}
# cosine of scans that look the same: with `m3ret-vitt`, 0.1 % of the pairs of the demo gallery
NEAR_IDENTICAL = 0.95


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


@dataclass(frozen=True)
class Group:
    """A hit with the hits that look the same as it.

    Attributes:
        rank: From 1, in the order of similarity.
    """

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

    A hit joins the first group whose first hit is at least as similar to it as `threshold`. Hits after the last of
    `count` groups are left out.
    """
    groups: list[Group] = []
    firsts = torch.empty(0, gallery.index.embeddings.shape[1])
    for hit in hits:
        embedding = gallery.index.embeddings[hit["item"]].float()
        same = (firsts @ embedding >= threshold).nonzero().flatten().tolist()
        if same:
            group = groups[same[0]]
            groups[same[0]] = replace(group, others=(*group.others, hit))
        elif len(groups) == count:
            break
        else:
            groups.append(Group(len(groups) + 1, hit))
            firsts = torch.cat([firsts, embedding[None]])
    return groups


def webp(image: Image.Image | None) -> bytes:
    """Return a picture in WebP, a grey square if there is none."""
    stream = io.BytesIO()
    (image or Image.new("RGB", (128, 128), "#404040")).save(stream, "WEBP", quality=85)
    return stream.getvalue()


def picture_url(image: Image.Image | None) -> str:
    """Return a picture as a data URL."""
    return f"data:image/webp;base64,{base64.b64encode(webp(image)).decode()}"


def card(facts: Facts | HitFacts, row: int, rank: int | None = None, classes: str = "") -> str:
    """Return the button of a scan in HTML: its picture above what is known of it.

    Args:
        facts: of a hit, with percentile, or of a scan.
        rank: of a hit, from 1.
    """
    percentile = cast(float | None, facts.get("percentile"))
    lines = [f"<b>{escape(modality_name(facts['modality']) or 'Unknown modality')}</b>"]
    lines += [escape(text) for text in (readable(facts["anatomy"]), finding(facts)) if text]
    lines += [f"<small>{escape(facts['source'])}</small>"] if facts["source"] else []
    if percentile is not None:
        lines.append(f"<small>{alikeness(percentile)}</small>")
    if facts.get("weak"):
        lines.append("<em>Weak match</em>")
    number = f"<span class='rank'>{rank}</span>" if rank else ""
    image = f"<img src='m3ret/thumbnail/{row}.webp' alt='Thumbnail of scan {row}' width='128' height='128'>"
    text = "".join(f"<span>{line}</span>" for line in lines)
    return f"<button type='button' class='card {classes}' data-index='{row}'>{number}{image}{text}</button>"


def cards(groups: Sequence[Group]) -> str:
    """Return groups of hits as a list in HTML. Those that look the same are hidden behind a button."""
    items = []
    for group in groups:
        twins = "".join(f"<li hidden>{card(hit, hit['item'], classes='twin')}</li>" for hit in group.others)
        more = f"<button type='button' class='more' aria-expanded='false'>+{len(group.others)} similar</button>"
        items.append(f"<li>{card(group.first, group.first['item'], group.rank)}{more if twins else ''}</li>{twins}")
    return f"<ol class='cards' aria-label='Results, most similar first'>{''.join(items)}</ol>"


def table(groups: Sequence[Group]) -> str:
    """Return hits as a table in HTML. Those that look the same have the same rank."""
    head = "".join(
        f"<th scope='col'>{name}</th>"
        for name in ("Rank", "Of all pairs", "Modality", "Anatomy", "Finding", "Dataset", "Similarity", "Scan")
    )
    body = ""
    for rank, hit in [(group.rank, hit) for group in groups for hit in group.hits]:
        words = (modality_name(hit["modality"]), readable(hit["anatomy"]), finding(hit), hit["source"])
        cells = (str(rank), alikeness(hit["percentile"]), *words, f"{hit['similarity']:.3f}", str(hit["item"]))
        body += "<tr>" + "".join(f"<td>{escape(cell) or '–'}</td>" for cell in cells) + "</tr>"
    caption = "<caption>All results, with the cosine similarity of the embeddings and the number of the scan</caption>"
    content = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0' role='region' aria-label='Table of the results'>{content}</div>"


def to_csv(hits: Sequence[HitFacts]) -> str:
    """Format hits as CSV. Cells that a spreadsheet would evaluate as a formula are prefixed with an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for hit in hits:
        percentile = "" if hit["percentile"] is None else f"{hit['percentile']:.1f}"
        numbers = [hit["item"], f"{hit['similarity']:.4f}", percentile, str(hit["weak"]).lower()]
        texts = [hit["modality"], hit["anatomy"], ", ".join(hit["labels"]), hit["source"]]
        writer.writerow([*numbers, *(f"'{text}" if text.startswith(tuple("=+-@\t\r")) else text for text in texts)])
    return stream.getvalue()


def once_loaded(call: str) -> str:
    """Return a script for `js_on_load` that runs a call of page.js, which may be loaded later than the element."""
    return f"(function run () {{ window.m3ret ? {call} : setTimeout(run, 50) }})()"
