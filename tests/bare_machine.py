"""Run Python as on a machine with torch, transformers and accelerate alone, and what these three require."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
INSTALLED = ("torch", "transformers", "accelerate")


def required_distributions(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """Return the distributions of these names, and all that they require without extras, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        try:
            distribution = metadata.distribution(waiting.pop())
        except metadata.PackageNotFoundError:  # required by another way of installing
            continue
        if distribution.name not in found:
            found[distribution.name] = distribution
            requirements = [Requirement(line) for line in distribution.requires or ()]
            waiting += [
                each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})
            ]
    return found


def make_site(folder: Path) -> Path:
    """Fill a folder with links to the packages of a bare machine, as its only site-packages. Return the folder."""
    folder.mkdir()
    for distribution in required_distributions(INSTALLED).values():
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(str(distribution.locate_file(name)))
    return folder


def run_bare(site: Path, arguments: list[str], folder: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder` with the packages of `site` and this repository, without network. Return how it ended."""
    environment = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-S", *arguments]  # -S: without the site-packages of this environment
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
