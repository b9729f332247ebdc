"""A collection built as Parquet, pushed to a Hub, and streamed over HTTP: the same scans and weights as from disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Hub
from processes import Script

from modeling_m3ret.data.collection import open_collection


pytestmark = pytest.mark.slow  # starts processes that build, train and evaluate

ROOT = Path(__file__).parents[1]
BATCH, EPOCHS = 4, 2
# prints the packs that ranks load, as JSON; small blocks, so that a small dataset has many
LOAD = """
import hashlib, json, sys
from itertools import islice
sys.path.insert(0, {root!r})
from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data import parquet
from modeling_m3ret.data.collection import exclude_modalities, open_collection
from modeling_m3ret.data.loading import RandomViews, training_loader
from modeling_m3ret.data.sampler import SeededBatchSampler
from modeling_m3ret.data.views import ViewKind
parquet.BLOCK_BYTES = 2**19
def load(data, rank, ranks, workers, batches):
    records = [r for r in open_collection(data, stream=True) if r.split == "train"]
    records = exclude_modalities(records, ["mri"])
    blocks = parquet.group_into_blocks([r.location for r in records])
    order = SeededBatchSampler([r.modality for r in records], {batch}, seed=5, rank=rank, world_size=ranks,
                               blocks=blocks.block_of_row, lanes=4)
    processor = M3RetImageProcessor(size=32, num_frames=8)
    views = RandomViews(records, processor, views=[ViewKind(1)], seed=5, blocks=blocks)
    packs = islice(training_loader(views, order, workers), batches)
    loaded = [dict(ids=[records[i].id for i in pack.scans], failures=pack.failures,
                 digest=hashlib.sha256(pack.values.numpy().tobytes()).hexdigest()) for pack in packs]
    return dict(records=[r.id for r in records], blocks=len(blocks.ranges), packs=loaded)
if __name__ == "__main__":
    print(json.dumps([load(*arguments) for arguments in json.loads(sys.argv[1])]))
"""
# checks that `datasets` loads the same rows from the Hub, streamed and from disk, and prints what the processor returns
USE = """
import json, sys
from datasets import load_dataset
from modeling_m3ret import M3RetImageProcessor
name, local = sys.argv[1:]
loaded, streamed, on_disk = load_dataset(name), load_dataset(name, streaming=True), load_dataset(local)
for split in loaded:
    assert list(streamed[split]) == loaded[split].to_list() == on_disk[split].to_list()
names = loaded["train"].features["modality"].names
rows = [next(row for row in loaded["train"] if names[row["modality"]] == modality) for modality in names]
inputs = M3RetImageProcessor(size=32, num_frames=8)(rows)
print(json.dumps({"rows": {split: len(loaded[split]) for split in loaded}, "grids": inputs["grid_thw"].tolist()}))
"""
TINY = {
    "preset": "vitt",
    "model": "{num_hidden_layers: 1, hidden_size: 48, num_attention_heads: 4, intermediate_size: 96, "
    "decoder_hidden_size: 36, decoder_num_hidden_layers: 1}",
    **{"size": 32, "num_frames": 8, "steps": 12, "batch_size": 4, "views_per_decode": 1, "log_every": 1},
    **{"save_every": 6, "output_dir": "m3ret-tiny", "run_dir": "runs/tiny", "stream": True, "stream_lanes": 4},
}


@dataclass(frozen=True)
class Pushed:
    """A built dataset: its folder, its name on the Hub, and the environment of processes that use this Hub."""

    folder: Path
    name: str
    environment: dict[str, str]


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def pushed(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    """Build a phantom of 16 subjects in several unequal shards and push it."""
    folder = tmp_path_factory.mktemp("dataset")
    name = hub.new_repository("phantom-parquet")
    environment = hub.environment(folder) | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    few = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from dataset_scripts import shards
shards.SHARD_BYTES //= 100
from dataset_scripts.build import main
main(sys.argv[1:])
"""
    script = folder / "build_small_shards.py"
    script.write_text(few)
    options = ["--source", "phantom", "--root", "phantom:16:3", "--output", str(folder / "built")]
    run([sys.executable, str(script), *options, "--push_to_hub", name], environment, folder)
    return Pushed(folder / "built", name, environment)


def test_repository_holds_the_data_set_but_not_the_report(hub: Hub, pushed: Pushed) -> None:
    files = hub.files(pushed.name, "dataset")
    built = {path.relative_to(pushed.folder).as_posix(): path for path in pushed.folder.rglob("*") if path.is_file()}
    published = {name for name in built if name in ("README.md", "index.parquet") or name.startswith("data/")}
    assert set(files) - {".gitattributes"} == published
    assert len([name for name in published if name.startswith("data/train")]) > 2
    assert all(files[name] == built[name].read_bytes() for name in published)
    assert hub.is_private(pushed.name, "dataset")
    assert "report.json" in built


def test_datasets_library_loads_and_streams_rows_for_the_processor(pushed: Pushed) -> None:
    printed = json.loads(run([sys.executable, "-c", USE, pushed.name, str(pushed.folder)], pushed.environment, ROOT))
    records = open_collection(pushed.folder)
    assert printed["rows"] == Counter(record.split for record in records)
    assert len(printed["grids"]) == 5
    assert printed["grids"][0][0] == 1  # an X-ray is one patch deep, a CT more
    assert printed["grids"][3][0] > 1


def test_streamed_packs_equal_local_ones_and_hold_each_scan_once_per_epoch(pushed: Pushed) -> None:
    scans = len([r for r in open_collection(pushed.folder) if r.split == "train" and r.modality != "mri"])
    batches = -(-EPOCHS * scans // (2 * BATCH))
    settings = [
        (data, rank, 2, workers, batches)
        for data, workers in ((pushed.name, 2), (str(pushed.folder), 2), (str(pushed.folder), 0))
        for rank in range(2)
    ]
    script = LOAD.format(root=str(ROOT), batch=BATCH)
    loaded = json.loads(run([sys.executable, "-c", script, json.dumps(settings)], pushed.environment, ROOT))
    streamed, local, without_workers = loaded[:2], loaded[2:4], loaded[4:]
    assert streamed[0]["blocks"] > 4
    ids = [scan for step in zip(*(rank["packs"] for rank in streamed), strict=True) for p in step for scan in p["ids"]]
    assert len(ids) >= EPOCHS * scans
    for epoch in range(EPOCHS):
        assert sorted(ids[epoch * scans : (epoch + 1) * scans]) == sorted(streamed[0]["records"])
    assert not any(pack["failures"] for rank in streamed for pack in rank["packs"])
    assert local == streamed
    assert without_workers == streamed


def train(
    pushed: Pushed, data: str, folder: Path, *options: str, processes: int = 2
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Run train.py; return the lines of metrics.jsonl and the weights. On the Hub's data it is started by torchrun."""
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    tiny = [text for key, value in (TINY | {"data": data}).items() for text in (f"--{key}", str(value))]
    arguments = (str(ROOT / "train.py"), *tiny, *options)
    if data == pushed.name:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        run([sys.executable, *launch, *arguments], pushed.environment, folder)
    else:
        script = Script(arguments, folder, processes, ACCELERATE_USE_CPU="true")
        assert script.finish() == 0, script.printed
    lines = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    weights = folder / "m3ret-tiny" / "model.safetensors"
    return lines, load_file(weights) if weights.is_file() else {}


def test_streamed_and_resumed_training_gives_the_weights_of_local_training(pushed: Pushed, tmp_path: Path) -> None:
    """The streamed run is stopped within an epoch and resumed with another number of workers."""
    local, weights = train(pushed, str(pushed.folder), tmp_path / "local", "--num_workers", "1")
    train(pushed, pushed.name, tmp_path / "streamed", "--num_workers", "2", "--stop_after", "5")
    streamed, streamed_weights = train(
        pushed, pushed.name, tmp_path / "streamed", "--num_workers", "0", "--resume", "true"
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (local, streamed)]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, streamed_weights[name]) for name, tensor in weights.items())


def test_checkpoints_are_evaluated_on_a_split_of_a_data_set_on_the_hub(pushed: Pushed, tmp_path: Path) -> None:
    train(pushed, str(pushed.folder), tmp_path, "--steps", "2", "--num_workers", "0", processes=1)
    options = ["--model", "m3ret-tiny", "m3ret-tiny", "--data", pushed.name, "--split", "train", "--output", "table"]
    command = [sys.executable, str(ROOT / "eval_retrieval.py"), *options, "--protocols", "all"]
    printed = run(command, pushed.environment, tmp_path)
    count = sum(record.split == "train" for record in open_collection(pushed.folder))
    assert re.search(rf"\b{count}\b", printed)
    metrics = json.loads((tmp_path / "table" / "metrics.json").read_text())
    assert {"m3ret-tiny (1)", "m3ret-tiny (2)", "pixels", "untrained", "chance"} == {
        row["method"] for row in metrics["rows"]
    }
    assert {"within modality by label", "same subject across modalities"} <= {
        protocol["name"] for protocol in metrics["protocols"].values()
    }
    # the same model under two names has the same scores
    assert metrics["differences_of_mean_map"]["m3ret-tiny (2)"]["value"] == 0
    assert str(tmp_path) not in (tmp_path / "table" / "metrics.json").read_text()


def test_unknown_data_set_is_reported_by_name_in_one_line(pushed: Pushed, tmp_path: Path) -> None:
    options = ["--config", str(ROOT / "configs/smoke.yaml"), "--data", "unknown/unknown"]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    ran = subprocess.run(command, env=pushed.environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert "unknown/unknown" in last
    assert "404" in last
