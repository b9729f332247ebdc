"""`benchmarks/gpu.py` on a CPU, with torch, transformers and accelerate alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_machine import ROOT, make_site, run_bare


pytestmark = pytest.mark.slow

SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("bare") / "site")


def parts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_results" / "results.json").read_text())["parts"]


def test_every_part_passes_and_none_runs_twice(site: Path, tmp_path: Path) -> None:
    ran = run_bare(site, [str(SCRIPT), "--quick", "--parts", "check b*"], tmp_path)
    assert ran.returncode == 0, ran.stderr
    first = parts_of(tmp_path)
    assert list(first) == ["check batch independence"]
    ran = run_bare(site, [str(SCRIPT), "--quick"], tmp_path)
    assert ran.returncode == 0, ran.stdout
    parts = parts_of(tmp_path)
    assert parts["check batch independence"] == first["check batch independence"]
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses.pop("check variable-length attention") == "skipped"  # needs a GPU
    assert set(statuses.values()) == {"passed"}
    checks = [check for name, part in parts.items() if name.startswith("check ") for check in part.get("result", [])]
    assert len(checks) > 25
    assert all(check["value"] <= check["limit"] for check in checks)

    rows = [row for name, part in parts.items() if name.startswith("speed ") for row in part["result"]]
    measured = {(row["work"], row["model"]): row for row in rows}
    assert {model for _, model in measured} == {"M3Ret", "DINOv3ViT", "ViTMAE"}
    for row in rows:
        assert row["images_per_second"] == pytest.approx(row["images"] / row["milliseconds"] * 1e3)
        assert row["kernels"] > 100
        assert row["gflop_per_image"] > 0
    # the same encoder on the same images: attention, MLP and patches of 3 slices of colour
    ours, peer = measured["embedding", "M3Ret"], measured["embedding", "DINOv3ViT"]
    assert ours["gflop_per_image"] == pytest.approx(peer["gflop_per_image"], rel=0.1)
    table = (tmp_path / "gpu_results" / "results.md").read_text()
    assert all(model in table for model in ("M3Ret", "DINOv3ViT", "ViTMAE"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_machine_without_a_gpu_is_refused(site: Path, tmp_path: Path) -> None:
    ran = run_bare(site, [str(SCRIPT)], tmp_path)
    assert ran.returncode == 2
    assert not list(tmp_path.iterdir())


BROKEN = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
import gpu
gpu.LIMIT_SECONDS = 2.0
gpu.PARTS = {{
    "crash": lambda quick: os._exit(3),
    "error": lambda quick: 1 / 0,
    "endless": lambda quick: time.sleep(600),
    "check nan": lambda quick: gpu.run_checks(lambda quick: [gpu.gpu_checks.Check("x", {value}, 1.0)], quick),
}}
if __name__ == "__main__":
    gpu.main()
"""


def test_part_that_fails_is_recorded_and_the_others_run(site: Path, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(benchmarks=str(SCRIPT.parent), value="float('nan')"))
    ran = run_bare(site, [str(script), "--quick"], tmp_path)
    assert ran.returncode == 1, ran.stderr
    parts = parts_of(tmp_path)
    assert list(parts) == ["crash", "error", "endless", "check nan"]
    assert {part["status"] for part in parts.values()} == {"failed"}
    assert "3" in parts["crash"]["error"]
    assert "ZeroDivisionError" in parts["error"]["error"]
    assert parts["endless"]["seconds"] < 60
    assert math.isnan(parts["check nan"]["result"][0]["value"])

    script.write_text(BROKEN.format(benchmarks=str(SCRIPT.parent), value="0.5"))
    ran = run_bare(site, [str(script), "--quick", "--parts", "check*"], tmp_path)
    assert parts_of(tmp_path)["check nan"]["status"] == "failed"  # not run again
    ran = run_bare(site, [str(script), "--quick", "--parts", "check*", "--retry"], tmp_path)
    assert parts_of(tmp_path)["check nan"]["status"] == "passed"
    assert ran.returncode == 1  # of the other parts
