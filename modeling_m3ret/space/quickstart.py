"""With no checkpoint there is nothing to search with: train the small one, in sight, and go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


CONFIG = "configs/smoke.yaml"


def newest_checkpoint(folder: Path = Path()) -> Path | None:
    """The checkpoint folder `m3ret-*` in `folder` that was written last."""
    found = [config.parent for config in folder.glob("m3ret-*/config.json")]
    return max(found, key=lambda checkpoint: (checkpoint / "config.json").stat().st_mtime, default=None)


def train_small(project: Path, settings: Sequence[str] = ()) -> None:
    """Run the README's first command here, its progress on the terminal; the checkpoint becomes `m3ret-smoke`.

    Args:
        project: where `train.py` and `configs` are. settings: for `train.py`, after its config.

    Raises:
        SystemExit: if there is no `train.py`, or it fails.
    """
    script = project / "train.py"
    if not script.is_file():
        raise SystemExit("--quickstart needs the project's folder with train.py; here is only the app: give --model")
    print("Training a small encoder on synthetic scans, some six minutes on two cores.", flush=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, str(script), "--config", str(project / CONFIG), *settings]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise SystemExit(f"training ended with exit code {code}; its messages stand above")
