"""`train.py --push_to_hub`: what arrives loads anywhere and names nothing of this machine; no failure stops a run."""

from __future__ import annotations

import csv
import json
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
# train.py that waits a hundredth of the time between attempts
IMPATIENT = """
import sys
sys.path.insert(0, {root!r})
from modeling_m3ret import hub
hub.FIRST_WAIT_SECONDS /= 100
import train
train.main()
"""
REMOTE = """
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
    features = model.get_image_features(**processor([image], return_tensors="pt"))
print(json.dumps({
    "modules": [type(part).__module__ for part in (processor, model, pretraining)],
    "packages": [name for name in sys.modules if name.split(".")[0] == "modeling_m3ret"],
    "features": features.tolist(),
}))
"""


@dataclass(frozen=True)
class Collection:
    """A folder with a manifest, and the manifest's rows."""

    folder: Path
    rows: list[dict[str, str]]

    def file(self, scan: str) -> Path:
        return self.folder / next(row["file"] for row in self.rows if row["id"] == scan)


@dataclass(frozen=True)
class Run:
    """A finished training run in `folder`, and the repository that it was pushed to."""

    folder: Path
    repository: str
    printed: str
    errors: str


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """An X-ray and a CT volume of each patient; one scan can't be read on either side of the split."""
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
        collection.file(side[1].id).write_bytes(b"cut short")
    return collection


def train(hub: Hub, scans: Collection, folder: Path, script: Path = ROOT / "train.py") -> Run:
    repository = hub.new_repository("m3ret-tiny")
    settings = SETTINGS | {"data": scans.folder, "push_to_hub": repository}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    environment = hub.environment(folder) | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(script), *options]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Run(folder, repository, ran.stdout, ran.stderr)


def impatient(folder: Path) -> Path:
    script = folder / "impatient.py"
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    return script


@pytest.fixture(scope="module")
def pushed(hub: Hub, scans: Collection, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(hub, scans, tmp_path_factory.mktemp("pushed"))
    facts = json.loads((run.folder / "m3ret-tiny" / "training.json").read_text())
    assert facts["unreadable_scans"] == 2
    return run


@torch.no_grad()
def test_a_process_without_the_package_embeds_by_a_pinned_revision(
    hub: Hub, pushed: Run, scans: Collection, tmp_path: Path
) -> None:
    image, revision, asked_before = scans.folder / scans.rows[0]["file"], hub.head(pushed.repository), len(hub.requests)
    ran = subprocess.run(
        [sys.executable, "-c", REMOTE, pushed.repository, revision, str(image)],
        env=hub.environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert answer["packages"] == []
    for module in answer["modules"]:
        assert module.startswith("transformers_modules.")
        assert revision in module, "the code is that of the pinned revision"
    asked = [request.path for request in hub.requests[asked_before:] if "/resolve/" in request.path]
    assert all(f"/resolve/{revision}/" in path for path in asked)

    local = pushed.folder / "m3ret-tiny"
    model, processor = AutoModel.from_pretrained(local).eval(), AutoImageProcessor.from_pretrained(local)
    features = model.get_image_features(**processor([image], return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(answer["features"]), features, rtol=0, atol=1e-6)


def test_the_repository_is_the_published_checkpoint_and_private(hub: Hub, pushed: Run) -> None:
    local = pushed.folder / "m3ret-tiny"
    expected = {str(path.relative_to(local)): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    files = hub.files(pushed.repository)
    del files[".gitattributes"]  # the Hub's own
    assert files == expected
    assert hub.is_private(pushed.repository)


def test_nothing_that_arrives_names_this_machine_or_a_patient(hub: Hub, pushed: Run, scans: Collection) -> None:
    names = [str(place) for place in (ROOT, pushed.folder, scans.folder, Path(sys.prefix))]
    names += ["ward-seven", "grauer-star", "Mustermann", "erika", "thorax", "abdomen", "hf_home"]
    names += [row[column] for row in scans.rows for column in ("id", "file", "group")]
    for path, content in hub.files(pushed.repository).items():
        assert "training_state" not in path
        assert not [name for name in names if name.encode() in content or name in path], path
    (stays,) = (pushed.folder / RUN_DIR / "checkpoints" / "step-000004").rglob("state.json")
    assert str(scans.folder) in stays.read_text(), "there is something that must not leave"


def test_no_file_can_hold_a_pickle(hub: Hub, pushed: Run) -> None:
    files = hub.files(pushed.repository)
    assert {Path(path).suffix for path in files if path != ".gitattributes"} == {".safetensors", ".json", ".py", ".md"}
    assert {Path(path).parent for path in files} == {Path(), Path("pretraining")}
    for path, content in files.items():
        if path.endswith(".json"):
            json.loads(content)


def test_the_card_is_one_for_the_hub(hub: Hub, pushed: Run) -> None:
    card = ModelCard(hub.files(pushed.repository)["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "transformers")
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "| trained" in card.text
    assert "\n- 2 " in card.text  # scans that could not be read


def test_the_upload_arrives_when_the_hub_recovers(hub: Hub, scans: Collection, tmp_path: Path) -> None:
    asked_before = len(hub.requests)
    for path in ("/api/repos/create", "/lfs/objects/batch", "/commit/"):
        hub.fail_next(1, path)
    run = train(hub, scans, tmp_path, impatient(tmp_path))
    assert [request.status for request in hub.requests[asked_before:]].count(503) == 3
    weights = (tmp_path / "m3ret-tiny" / "model.safetensors").read_bytes()
    assert hub.files(run.repository)["model.safetensors"] == weights
    assert not (tmp_path / RUN_DIR / "uploading").exists()


def test_a_hub_that_is_down_stops_no_run(scans: Collection, tmp_path: Path) -> None:
    with HubServer() as server:
        server.fail_next(None)
        run = train(Hub(server), scans, tmp_path, impatient(tmp_path))
    assert {request.status for request in server.requests} == {503}
    assert run.repository in run.errors
    AutoModel.from_pretrained(tmp_path / "m3ret-tiny")
    assert not (tmp_path / RUN_DIR / "uploading").exists()


def test_a_run_of_another_objective_leaves_no_weights_of_the_one_before(hub: Hub, tmp_path: Path) -> None:
    """An encoder beside the decoder or the heads of another run would load, and be nonsense."""
    repository = hub.new_repository("m3ret-twice")
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
