"""Background uploads are retried, skip outdated checkpoints and never stop a run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from modeling_m3ret import hub as hub_module
from modeling_m3ret.hub import ATTEMPTS
from modeling_m3ret.pretraining import hub_upload
from modeling_m3ret.pretraining.hub_upload import HubUpload


class FakeHub(HfApi):
    """Record uploads, after a number of failures."""

    def __init__(self, failures: int = 0):
        super().__init__()
        self.failures = failures
        self.commits: list[tuple[str, set[str]]] = []
        self.private: list[bool] = []
        self.folders: list[list[str]] = []  # staged uploads when an upload started
        self.started, self.go = threading.Event(), threading.Event()
        self.go.set()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert repo_id == "org/model"
        assert exist_ok
        self.private.append(private)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        self.folders.append(sorted(path.name for path in folder_path.parent.iterdir()))
        self.started.set()
        assert self.go.wait(600)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the network is down")
        names = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        self.commits.append((commit_message, names))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub_upload, "HfApi", lambda: fake)
    monkeypatch.setattr(hub_module, "FIRST_WAIT_SECONDS", 0.001)
    return fake


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000005"
    (folder / "pretraining").mkdir(parents=True)
    (folder / "training_state").mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "pretraining" / "simdino.safetensors").write_bytes(b"more")
    (folder / "training_state" / "state.json").write_text('{"data": "/ward/of/patients"}')
    return folder


def test_training_state_is_not_uploaded_and_the_repository_is_private(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    upload = HubUpload("org/model", tmp_path / "waiting")
    upload.submit(checkpoint, "step 5")
    upload.close()
    assert hub.commits == [("step 5", {"model.safetensors", "pretraining/simdino.safetensors"})]
    assert hub.private == [True]
    assert not (tmp_path / "waiting").exists()
    assert (checkpoint / "training_state" / "state.json").is_file()


def test_failed_uploads_are_retried_then_counted(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.failures = ATTEMPTS - 1
    upload = HubUpload("org/model", tmp_path / "waiting")
    upload.submit(checkpoint, "step 5")
    upload.close()
    assert (len(hub.commits), upload.failed) == (1, 0)
    hub.failures = ATTEMPTS
    upload = HubUpload("org/model", tmp_path / "waiting")
    upload.submit(checkpoint, "step 6")
    upload.close()
    assert (len(hub.commits), upload.failed) == (1, 1)


def test_newer_checkpoint_replaces_a_waiting_one_and_may_be_pruned_meanwhile(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    hub.go.clear()
    upload = HubUpload("org/model", tmp_path / "waiting")
    upload.submit(checkpoint, "step 5")
    assert hub.started.wait(600)
    for step in (6, 7):
        upload.submit(checkpoint, f"step {step}")
    (checkpoint / "model.safetensors").unlink()  # pruned
    hub.go.set()
    upload.close()
    files = {"model.safetensors", "pretraining/simdino.safetensors"}
    assert hub.commits == [("step 5", files), ("step 7", files)]


@pytest.mark.parametrize("failures", [0, ATTEMPTS])
def test_links_are_removed_when_their_upload_ends_or_is_replaced(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, failures: int
) -> None:
    hub.failures = failures
    hub.go.clear()
    waiting = tmp_path / "waiting"
    upload = HubUpload("org/model", waiting)
    upload.submit(checkpoint, "step 5")
    assert hub.started.wait(600)
    for step in (6, 7):
        upload.submit(checkpoint, f"step {step}")
    # step 6 was replaced; step 5 is running
    assert sorted(path.name for path in waiting.iterdir()) == ["000000", "000002"]
    assert (waiting / "000000" / "model.safetensors").is_file()
    hub.go.set()
    upload.close()
    assert hub.folders[-1] == ["000002"]
    assert [message for message, _ in hub.commits] == (["step 7"] if failures else ["step 5", "step 7"])


def test_checkpoint_that_cannot_be_linked_is_counted_and_the_next_one_is_uploaded(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(source: str, target: str) -> None:
        raise OSError("no space left on device")

    upload = HubUpload("org/model", tmp_path / "waiting")
    with monkeypatch.context() as full:
        full.setattr(hub_upload, "link_or_copy", disk_is_full)
        upload.submit(checkpoint, "step 5")
    assert not list((tmp_path / "waiting").iterdir())
    upload.submit(checkpoint, "step 6")
    upload.close()
    assert [message for message, _ in hub.commits] == ["step 6"]
    assert upload.failed == 1


def test_a_later_upload_in_the_same_folder_is_complete(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    """Nothing of an earlier upload removes files after `close`, however the threads are scheduled."""
    for run in range(100):
        upload = HubUpload("org/model", tmp_path / "waiting")
        upload.submit(checkpoint, f"run {run}")
        upload.close()
        assert upload.failed == 0
    assert len(hub.commits) == 100
