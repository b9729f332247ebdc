"""Draw the README's figure: five kinds of scans, one pack of tokens, one encoder, one embedding space.

    python docs/figures/overview.py        # writes docs/figures/overview.png

The scans are phantom scans of one synthetic subject; grids and token counts are those of the image processor.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import read_manifest
from modeling_m3ret.phantom.dataset import write_phantom
from modeling_m3ret.search.embedding import unpatchify


TITLES = {"xray": "X-ray", "ultrasound": "Ultrasound", "endoscopy": "Endoscopy", "ct": "CT", "mri": "MRI (unseen)"}
COLOURS = {"xray": "#0072B2", "ultrasound": "#E69F00", "endoscopy": "#009E73", "ct": "#D55E00", "mri": "#CC79A7"}
FORMATS = {"xray": "DICOM", "ultrasound": "DICOM or PNG", "endoscopy": "MP4", "ct": "DICOM series", "mri": "NIfTI"}
WIDTH, HEIGHT = 11.0, 4.4  # inches


def main() -> None:
    processor = M3RetImageProcessor()
    with tempfile.TemporaryDirectory() as folder:
        records = read_manifest(write_phantom(Path(folder, "phantom"), subjects=1))
        scans = {record.modality: record.open() for record in records}
        inputs = [processor(scans[modality], return_tensors="pt") for modality in TITLES]
    mpl.rcParams["font.family"] = "DejaVu Sans"
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    canvas.axis("off")
    height = 0.74
    tokens = []
    for row, (modality, scan) in enumerate(zip(TITLES, inputs, strict=True)):
        bottom = HEIGHT - 0.48 - (row + 1) * height
        T, h, w = scan["grid_thw"][0].tolist()
        tokens.append(T * h * w)
        volume = unpatchify(scan["pixel_values"], (T, h, w), processor)  # (C, D, H, W) in [-1, 1]
        middle = (volume[:, volume.shape[1] // 2].permute(1, 2, 0) + 1) / 2
        panel = figure.add_axes((0.25 / WIDTH, bottom / HEIGHT, 0.68 / WIDTH, 0.68 / HEIGHT))
        panel.imshow(middle.clamp(0, 1))
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set(color=COLOURS[modality], linewidth=2)
        canvas.text(1.1, bottom + 0.45, TITLES[modality], fontsize=10, weight="bold", va="center")
        canvas.text(1.1, bottom + 0.2, f"{FORMATS[modality]}, grid {T} × {h} × {w}", fontsize=8, va="center")
        _arrow(canvas, (2.85, bottom + 0.34), (3.45, bottom + 0.34))
    _headings(canvas)
    _pack(canvas, tokens)
    _encoder(canvas)
    _space(canvas)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def _headings(canvas: plt.Axes) -> None:
    columns = {
        1.35: "real files",
        4.1: "one pack of 4 × 16 × 16 patches",
        6.85: "one encoder",
        9.55: "one embedding space",
    }
    for x, heading in columns.items():
        canvas.text(x, HEIGHT - 0.22, heading, fontsize=10, ha="center", va="center", color="#444444")


def _pack(canvas: plt.Axes, tokens: list[int]) -> None:
    """Stack the tokens of all scans, with heights in proportion to the square root of their number."""
    shares = np.sqrt(tokens) / np.sqrt(tokens).sum()
    top = HEIGHT - 0.5
    for colour, share, count in zip(COLOURS.values(), shares, tokens, strict=True):
        height = 3.65 * share
        canvas.add_patch(Rectangle((3.6, top - height), 1.0, height - 0.03, facecolor=colour, alpha=0.85))
        canvas.text(4.1, top - height / 2, f"{count:,} tokens", ha="center", va="center", fontsize=8, color="white")
        top -= height
    _arrow(canvas, (4.75, HEIGHT / 2 - 0.15), (5.55, HEIGHT / 2 - 0.15))


def _encoder(canvas: plt.Axes) -> None:
    box = FancyBboxPatch((5.75, 0.75), 2.2, 2.8, boxstyle="round,pad=0.1", facecolor="#F2F2F2", edgecolor="#444444")
    canvas.add_patch(box)
    properties = "3D rotary positions\nattention within each scan\nno modality-specific part"
    text = f"Vision transformer\n\n{properties}\n\nMAE, SimDINO"
    canvas.text(6.85, 2.15, text, ha="center", va="center", fontsize=9)
    _arrow(canvas, (8.15, HEIGHT / 2 - 0.15), (8.55, HEIGHT / 2 - 0.15))


def _space(canvas: plt.Axes) -> None:
    """Sketch the embedding space: one colour per modality, clusters by anatomy."""
    generator = np.random.default_rng(3)
    canvas.add_patch(Rectangle((8.65, 0.6), 1.95, 3.1, facecolor="white", edgecolor="#BBBBBB"))
    for centre in ((9.1, 3.1), (10.1, 2.75), (9.2, 1.9), (10.15, 1.25), (9.15, 1.0)):
        for colour in COLOURS.values():
            x, y = generator.normal(centre, 0.11, (3, 2)).T
            canvas.scatter(x, y, s=14, color=colour, alpha=0.8, linewidths=0)
    canvas.text(9.62, 0.38, "cases that look alike lie close", ha="center", va="center", fontsize=8)


def _arrow(canvas: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    canvas.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#888888"))


if __name__ == "__main__":
    main()
