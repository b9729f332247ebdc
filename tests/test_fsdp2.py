"""`train.py` under FSDP2, from `accelerate launch` and the config file for GPUs to the published checkpoint.

On two processes of the CPU; see `fsdp_on_cpu.py` for the one thing that differs from GPUs.
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
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import Script
from safetensors.torch import load_file
from training_runs import POISONED, ROOT, command, lines, write_scans
from transformers import AutoModel


FSDP2 = (
    *("--config_file", str(ROOT / "configs/accelerate/8_gpus_fsdp2.yaml")),
    *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


def launch(words: list[str], folder: Path) -> str:
    """The script on two processes under FSDP2, as a shell starts it: what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *FSDP2, *words]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def fork(words: list[str], folder: Path) -> tuple[int, str]:
    """The same in the launcher's environment, but as forks: its exit status, and what it printed."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*FSDP2, *words]))
    told = {name: value for name, value in prepare_multi_gpu_env(arguments).items() if value != os.environ.get(name)}
    assert told["ACCELERATE_USE_FSDP"] == "true"
    script = Script(words, folder, 2, **told | {"ACCELERATE_USE_CPU": "true"})
    return script.finish(), script.printed


def test_a_run_is_published_and_goes_on_bit_for_bit_from_the_checkpoint_that_a_kill_left(
    tmp_path: Path, scans: Path
) -> None:
    """Twelve steps; and the last seven again from what lay there after the fifth, with other workers."""
    script = ROOT / "tests" / "fsdp_on_cpu.py"
    settings = {"objective": "simdino", "batch_size": 2, "steps": 12, "save_every": 5, "evaluate_every": 5}
    printed = launch(command(script, scans, "whole", **settings, keep_last=3), tmp_path)
    assert "all modalities" in printed
    shutil.copytree(tmp_path / "run-whole/checkpoints/step-000005", tmp_path / "run-cut/checkpoints/step-000005")
    words = command(script, scans, "cut", **settings, resume=True, num_workers=0)
    code, printed = fork(words, tmp_path)
    assert code == 0, printed
    assert "step-000005" in printed

    whole, cut = (tmp_path / f"run-{name}" / "checkpoints" / "step-000012" for name in ("whole", "cut"))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    tensors = [file for file in files if file.suffix == ".safetensors"]
    assert {file.name for file in tensors} >= {"model.safetensors", "optimiser.safetensors", "random.safetensors"}
    for file in tensors:
        mine, theirs = load_file(whole / file), load_file(cut / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file
    measured = lines(tmp_path / "run-whole")
    assert [line["step"] for line in measured] == list(range(1, 13))
    assert measured[5:] == lines(tmp_path / "run-cut")
    assert "held_out/mAP/all" in measured[9]

    model = AutoModel.from_pretrained(tmp_path / "m3ret-whole")
    published = load_file(tmp_path / "m3ret-whole" / "model.safetensors")
    assert all(torch.equal(value, published[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.whitening.matrix, torch.eye(len(model.whitening.matrix)))  # fitted, and saved
    assert (tmp_path / "run-whole" / "retrieval.json").is_file()
    assert "| trained" in (tmp_path / "m3ret-whole" / "README.md").read_text()


def test_a_poisoned_scan_stops_all_processes_before_the_step(tmp_path: Path, scans: Path) -> None:
    script = tmp_path / "poisoned.py"
    on_cpu = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport fsdp_on_cpu\n"
    script.write_text(on_cpu + POISONED.format(root=str(ROOT)))
    words = command(script, scans, "poisoned", batch_size=2, steps=12, holdout=0, evaluate_every=0)
    code, printed = fork(words, tmp_path)
    assert code != 0
    assert printed.count("FloatingPointError: step") >= 2  # each process says so by itself
    assert "values that are not finite come with scan-10;" in printed
    told = json.loads((tmp_path / "run-poisoned" / "not_finite.json").read_text())
    assert sorted(rank["rank"] for rank in told["ranks"]) == [0, 1]
    assert [scan for rank in told["ranks"] for scan in rank["not_finite"]] == ["scan-10"]
    logged = lines(tmp_path / "run-poisoned") if (tmp_path / "run-poisoned" / "metrics.jsonl").is_file() else []
    assert [line["step"] for line in logged] == list(range(1, told["step"]))
    assert not (tmp_path / "m3ret-poisoned").exists()
