"""Run code in a new process that cannot import the package, so that a checkpoint's own copy of the code is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


NOT_INSTALLED = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_m3ret":
            raise ImportError("this process has no package modeling_m3ret")
sys.meta_path.insert(0, NotInstalled())
import warnings
warnings.simplefilter("ignore")
"""


def run_new_process(code: str, folder: Path, *arguments: str, installed: bool = False) -> Any:
    """Run code without network and with a new cache in `folder`. Return its last line of output, which is JSON.

    Args:
        installed: whether the process can import the package.
    """
    root = Path(__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if installed:
        environment["PYTHONPATH"] = str(root)
    ran = subprocess.run(
        [sys.executable, "-c", code if installed else NOT_INSTALLED + code, *arguments],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
