"""`train.py` under FSDP2, from `accelerate launch` and the config file for GPUs to the published checkpoint.

It runs on two CPU processes; `fsdp_on_cpu.py` is the only difference from GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # the only reader of the file
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import Script
from safetensors.torch import load_file
from training_runs import NAN_IN_SCAN_10, ROOT, assert_same_tensors, command, metrics_of, write_scans
from transformers import AutoModel


pytestmark = pytest.mark.slow

FSDP2 = (
    *("--config_file", str(ROOT / "configs/accelerate/8_gpus_fsdp2.yaml")),
    *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


def launch(words: list[str], folder: Path) -> None:
    """Run the script on two processes under FSDP2 from a shell."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *FSDP2, *words]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def fork(words: list[str], folder: Path) -> tuple[int, str]:
    """Run the script in forks with the launcher's environment. Return exit code and output."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*FSDP2, *words]))
    added = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if value != os.environ.get(name)}
    assert added["ACCELERATE_USE_FSDP"] == "true"
    script = Script(words, folder, 2, **added | {"ACCELERATE_USE_CPU": "true"})
    return script.finish(), script.printed


def test_run_is_published_and_resumes_bit_for_bit(tmp_path: Path, scans: Path) -> None:
    """Six steps, and the last three again from the checkpoint of step 3, with another number of workers."""
    script = ROOT / "tests" / "fsdp_on_cpu.py"
    settings = {"objective": "simdino", "batch_size": 2, "steps": 6, "save_every": 3, "evaluate_every": 3}
    launch(command(script, scans, "whole", **settings, keep_last=3), tmp_path)
    shutil.copytree(tmp_path / "run-whole/checkpoints/step-000003", tmp_path / "run-cut/checkpoints/step-000003")
    code, printed = fork(command(script, scans, "cut", **settings, resume=True, num_workers=0), tmp_path)
    assert code == 0, printed

    whole, cut = (tmp_path / f"run-{name}" / "checkpoints" / "step-000006" for name in ("whole", "cut"))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert_same_tensors(whole, cut)
    metrics = metrics_of(tmp_path / "run-whole")
    assert [entry["step"] for entry in metrics] == list(range(1, 7))
    assert metrics[3:] == metrics_of(tmp_path / "run-cut")
    assert "held_out/mAP/all" in metrics[2]

    model = AutoModel.from_pretrained(tmp_path / "m3ret-whole")
    published = load_file(tmp_path / "m3ret-whole" / "model.safetensors")
    assert all(torch.equal(value, published[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.whitening.matrix, torch.eye(len(model.whitening.matrix)))  # fitted and saved
    rows = json.loads((tmp_path / "run-whole" / "retrieval.json").read_text())["rows"]
    assert "trained" in {row["method"] for row in rows}


def test_scan_with_nan_stops_all_processes_before_the_step(tmp_path: Path, scans: Path) -> None:
    script = tmp_path / "nan.py"
    on_cpu = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport fsdp_on_cpu\n"
    script.write_text(on_cpu + NAN_IN_SCAN_10.format(root=str(ROOT)))
    code, _ = fork(command(script, scans, "nan", batch_size=2, steps=12, holdout=0, evaluate_every=0), tmp_path)
    assert code == 1  # of rank 0; a rank that does not end by itself would be killed
    report = json.loads((tmp_path / "run-nan" / "not_finite.json").read_text())
    assert sorted(rank["rank"] for rank in report["ranks"]) == [0, 1]
    assert [scan for rank in report["ranks"] for scan in rank["not_finite"]] == ["scan-10"]
    assert [entry["step"] for entry in metrics_of(tmp_path / "run-nan")] == list(range(1, report["step"]))
    assert not (tmp_path / "m3ret-nan").exists()
