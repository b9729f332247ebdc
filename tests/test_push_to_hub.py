"""Test `train.py --push_to_hub`: what is uploaded, that it loads anywhere, and that failures stop no run."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Hub
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from modeling_m3ret.data.collection import COLUMNS, read_manifest, split_by_group


pytestmark = pytest.mark.slow  # trains in processes

ROOT = Path(__file__).parents[1]
HOLDOUT = 0.4
RUN_DIR = "runs/grauer-star"
SETTINGS = {
    "preset": "vitt",
    "model": "{num_hidden_layers: 2, hidden_size: 48, num_attention_heads: 4, intermediate_size: 96, "
    "decoder_hidden_size: 36, decoder_num_hidden_layers: 1}",
    "size": 32,
    "num_frames": 8,
    "steps": 4,
    "save_every": 2,
    "batch_size": 4,
    "views_per_decode": 2,
    "holdout": HOLDOUT,
    "num_workers": 0,
    "log_every": 2,
    "output_dir": "m3ret-tiny",
    "run_dir": RUN_DIR,
}
PATIENTS = [f"Mustermann^Erika-{number}" for number in range(12)]
# train.py with a hundredth of the waits between upload attempts
TRAIN_WITH_SHORT_WAITS = """
import sys
sys.path.insert(0, {root!r})
from modeling_m3ret import hub
hub.FIRST_WAIT_SECONDS /= 100
import train
train.main()
"""
LOAD_REMOTE_CODE = """
import json, sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_m3ret":
            raise ImportError("this process has no package modeling_m3ret")
sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
name, revision, image = sys.argv[1:]
pinned = {"revision": revision, "trust_remote_code": True}
processor = AutoImageProcessor.from_pretrained(name, **pinned)
model = AutoModel.from_pretrained(name, **pinned).eval()
pretraining = AutoModelForPreTraining.from_pretrained(name, subfolder="pretraining", **pinned)
with torch.no_grad():
    features = model.embed_scans(**processor([image], return_tensors="pt"))
print(json.dumps({
    "modules": [type(loaded).__module__ for loaded in (processor, model, pretraining)],
    "packages": [name for name in sys.modules if name.split(".")[0] == "modeling_m3ret"],
    "features": features.tolist(),
}))
"""


@dataclass(frozen=True)
class Collection:
    """A folder of scans and the rows of its manifest."""

    folder: Path
    rows: list[dict[str, str]]

    def file(self, scan: str) -> Path:
        """Return the file of the scan with this id."""
        return self.folder / next(row["file"] for row in self.rows if row["id"] == scan)


@dataclass(frozen=True)
class Run:
    """A finished training run in `folder`, the repository it was pushed to, and its standard error."""

    folder: Path
    repository: str
    errors: str


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """An X-ray and a CT volume of each patient, with one unreadable scan on each side of the split."""
    folder = tmp_path_factory.mktemp("ward-seven")
    generator = np.random.default_rng(0)
    rows = []
    for number, patient in enumerate(PATIENTS):
        coarse = generator.integers(0, 255, (8, 5, 6), dtype=np.uint8)
        xray, volume = f"erika-{number}-thorax.png", f"erika-{number}-abdomen.npy"
        Image.fromarray(np.kron(coarse[0], np.ones((8, 8), np.uint8))).save(folder / xray)
        np.save(folder / volume, np.kron(coarse, np.ones((1, 8, 8), np.uint8)))
        for file, modality in ((xray, "xray"), (volume, "ct")):
            row = (f"scan-of-{file}", file, modality, "chest", f"label-{number % 2}", patient)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    with (folder / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    collection = Collection(folder, rows)
    for side in split_by_group(read_manifest(folder), HOLDOUT):
        collection.file(side[1].id).write_bytes(b"truncated")
    return collection


def train(hub: Hub, scans: Collection, folder: Path, script: Path = ROOT / "train.py") -> Run:
    repository = hub.new_repository("m3ret-tiny")
    settings = SETTINGS | {"data": scans.folder, "push_to_hub": repository}
    options = [f"--{key}={value}" for key, value in settings.items()]
    environment = hub.environment(folder) | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(script), *options]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Run(folder, repository, ran.stderr)


def short_waits_script(folder: Path) -> Path:
    script = folder / "train_with_short_waits.py"
    script.write_text(TRAIN_WITH_SHORT_WAITS.format(root=str(ROOT)))
    return script


@pytest.fixture(scope="module")
def pushed(hub: Hub, scans: Collection, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(hub, scans, tmp_path_factory.mktemp("pushed"))


@torch.no_grad()
def test_pinned_revision_embeds_as_remote_code_without_the_package(
    hub: Hub, pushed: Run, scans: Collection, tmp_path: Path
) -> None:
    image, revision = scans.folder / scans.rows[0]["file"], hub.head(pushed.repository)
    earlier_requests = len(hub.requests)
    ran = subprocess.run(
        [sys.executable, "-c", LOAD_REMOTE_CODE, pushed.repository, revision, str(image)],
        env=hub.environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    loaded = json.loads(ran.stdout.splitlines()[-1])
    assert loaded["packages"] == []
    for module in loaded["modules"]:
        assert module.startswith("transformers_modules.")
        assert revision in module
    downloads = [request.path for request in hub.requests[earlier_requests:] if "/resolve/" in request.path]
    assert all(f"/resolve/{revision}/" in path for path in downloads)

    local = pushed.folder / "m3ret-tiny"
    model, processor = AutoModel.from_pretrained(local).eval(), AutoImageProcessor.from_pretrained(local)
    features = model.embed_scans(**processor([image], return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(loaded["features"]), features, rtol=0, atol=1e-6)


def test_repository_is_private_and_equals_the_checkpoint(hub: Hub, pushed: Run) -> None:
    local = pushed.folder / "m3ret-tiny"
    expected = {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    files = hub.files(pushed.repository)
    del files[".gitattributes"]  # added by the Hub
    assert files == expected
    assert hub.is_private(pushed.repository)


def test_no_uploaded_file_names_this_machine_or_a_patient(hub: Hub, pushed: Run, scans: Collection) -> None:
    names = [str(path) for path in (ROOT, pushed.folder, scans.folder, Path(sys.prefix))]
    names += ["ward-seven", "grauer-star", "Mustermann", "erika", "thorax", "abdomen", "hf_home"]
    names += [row[column] for row in scans.rows for column in ("id", "file", "group")]
    for path, content in hub.files(pushed.repository).items():
        assert "training_state" not in path
        assert not [name for name in names if name.encode() in content or name in path], path
    (state,) = (pushed.folder / RUN_DIR / "checkpoints" / "step-000004").rglob("state.json")
    assert str(scans.folder) in state.read_text()  # the training state, which is not uploaded, does name the data


def test_repository_holds_no_pickle(hub: Hub, pushed: Run) -> None:
    files = hub.files(pushed.repository)
    assert {Path(path).suffix for path in files if path != ".gitattributes"} == {".safetensors", ".json", ".py", ".md"}
    assert {Path(path).parent for path in files} == {Path(), Path("pretraining")}
    for path, content in files.items():
        if path.endswith(".json"):
            json.loads(content)


def test_model_card_has_metadata_and_results(hub: Hub, pushed: Run) -> None:
    files = hub.files(pushed.repository)
    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "transformers")
    assert data["pipeline_tag"] == "image-feature-extraction"
    cells = {cell.strip() for line in card.text.splitlines() if line.startswith("|") for cell in line.split("|")}
    assert {"trained", "pixels", "chance"} <= cells
    assert json.loads(files["training.json"])["unreadable_scans"] == 2


def test_upload_succeeds_after_transient_failures(hub: Hub, scans: Collection, tmp_path: Path) -> None:
    earlier_requests = len(hub.requests)
    for path in ("/api/repos/create", "/lfs/objects/batch", "/commit/"):
        hub.fail_next(1, path)
    run = train(hub, scans, tmp_path, short_waits_script(tmp_path))
    assert [request.status for request in hub.requests[earlier_requests:]].count(503) == 3
    weights = (tmp_path / "m3ret-tiny" / "model.safetensors").read_bytes()
    assert hub.files(run.repository)["model.safetensors"] == weights
    assert not (tmp_path / RUN_DIR / "uploading").exists()


def test_run_finishes_while_the_hub_is_down(scans: Collection, tmp_path: Path) -> None:
    with HubServer() as server:
        server.fail_next(None)
        run = train(Hub(server), scans, tmp_path, short_waits_script(tmp_path))
    assert {request.status for request in server.requests} == {503}
    assert run.repository in run.errors
    AutoModel.from_pretrained(tmp_path / "m3ret-tiny")
    assert not (tmp_path / RUN_DIR / "uploading").exists()


def test_upload_removes_the_weights_of_another_objective(hub: Hub, tmp_path: Path) -> None:
    """The decoder or heads of an earlier run would load together with the new encoder, and be wrong."""
    repository = hub.new_repository("m3ret-two-objectives")
    for run, weights in (("mae", "model"), ("simdino", "simdino")):
        folder = tmp_path / run / "pretraining"
        folder.mkdir(parents=True)
        (folder / f"{weights}.safetensors").write_bytes(run.encode())
        (folder.parent / "model.safetensors").write_bytes(run.encode())
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from modeling_m3ret.pretraining.hub_upload import HubUpload
for run in ("mae", "simdino"):
    upload = HubUpload({repository!r}, Path("waiting"))
    upload.submit(Path(run), run)
    upload.close()
    assert not upload.failed
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=hub.environment(tmp_path), check=True)
    files = {name: content for name, content in hub.files(repository).items() if name.endswith("safetensors")}
    assert files == {"model.safetensors": b"simdino", "pretraining/simdino.safetensors": b"simdino"}


def test_the_command_of_the_readme_publishes_a_checkpoint(pushed: Run, hub: Hub, tmp_path: Path) -> None:
    (command,) = re.findall(r"`(hf upload [^`]*)`", (ROOT / "README.md").read_text())
    repository, checkpoint = hub.new_repository("published"), pushed.folder / "m3ret-tiny"
    words = [{"ORG/NAME": repository, "CHECKPOINT": str(checkpoint)}.get(word, word) for word in command.split()]
    environment = hub.environment(tmp_path)
    script = str(Path(sys.executable).with_name(words[0]))
    ran = subprocess.run([script, *words[1:]], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert hub.is_private(repository)
    files = hub.files(repository)
    for path in checkpoint.rglob("*"):
        assert path.is_dir() or files[path.relative_to(checkpoint).as_posix()] == path.read_bytes()
