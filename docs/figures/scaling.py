"""Draw mAP by label against views, model size and corpus size, with the numbers of docs/results.md.

python docs/figures/scaling.py        # writes docs/figures/scaling.png
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt


UNTRAINED, PIXELS = 0.519, 0.567
# by label, mean over seeds where there are several; all with patches of 16 px and a whitening of shrinkage 0.1
VIEWS = {
    12_960: [0.512],
    25_920: [0.532, 0.528],
    51_840: [0.565, 0.564],
    86_400: [0.583],
    144_000: [0.598],
    201_600: [0.605],
    460_800: [0.611],
    835_200: [0.622, 0.619],
}
PARAMETERS = {3.3e6: [0.519], 5.9e6: [0.532, 0.528], 22.5e6: [0.531]}
SCANS = {886: [0.528], 1800: [0.529], 3286: [0.508, 0.521], 6609: [0.532, 0.528]}


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
    panels = {"views seen": VIEWS, "parameters": PARAMETERS, "scans trained on": SCANS}
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        axis.plot([*runs], [sum(values) / len(values) for values in runs.values()], color="#0072B2")
        axis.scatter(*zip(*((x, y) for x, values in runs.items() for y in values), strict=True), color="#0072B2")
        axis.axhline(UNTRAINED, color="grey", linestyle=":", label="random weights")
        axis.axhline(PIXELS, color="#D55E00", linestyle="--", label="pixels")
        axis.set(xscale="log", xlabel=title)
    axes[0].set_ylabel("mAP by label")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
