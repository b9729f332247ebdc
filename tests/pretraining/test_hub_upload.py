"""Uploads in the background: retried, newest first, without what names this machine, and never in the way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from modeling_m3ret.pretraining import hub_upload
from modeling_m3ret.pretraining.hub_upload import ATTEMPTS, HubUpload


class FakeHub:
    """Takes what it is given, after as many failures as it is told."""

    def __init__(self, failures: int = 0):
        self.failures = failures
        self.commits: list[tuple[str, set[str]]] = []
        self.private: list[bool] = []
        self.folders: list[list[str]] = []  # what waited when an upload began
        self.began, self.go = threading.Event(), threading.Event()
        self.go.set()

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        assert repository == "org/model"
        assert exist_ok
        self.private.append(private)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        self.folders.append(sorted(path.name for path in folder_path.parent.iterdir()))
        self.began.set()
        self.go.wait(10)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the network is down")
        names = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        self.commits.append((commit_message, names))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub_upload, "HfApi", lambda: fake)
    monkeypatch.setattr(hub_upload, "FIRST_WAIT_SECONDS", 0.001)
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


def test_what_would_name_the_machine_stays(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    upload = HubUpload("org/model", tmp_path / "waiting")
    upload.submit(checkpoint, "step 5")
    upload.close()
    assert hub.commits == [("step 5", {"model.safetensors", "pretraining/simdino.safetensors"})]
    assert hub.private == [True]
    assert not (tmp_path / "waiting").exists()
    assert (checkpoint / "training_state" / "state.json").is_file()


def test_failures_are_tried_again_and_given_up_quietly(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
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


def test_newer_checkpoints_overtake_waiting_ones_and_pruning_takes_nothing_away(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    hub.go.clear()
    upload = HubUpload("org/model", tmp_path / "waiting")
    for step in (5, 6, 7):
        upload.submit(checkpoint, f"step {step}")
    (checkpoint / "model.safetensors").unlink()  # as pruning would, while the upload waits
    hub.go.set()
    upload.close()
    assert hub.commits[-1] == ("step 7", {"model.safetensors", "pretraining/simdino.safetensors"})
    assert len(hub.commits) <= 2  # step 5 may have been under way; 6 gave way


@pytest.mark.parametrize("failures", [0, ATTEMPTS])
def test_links_hold_the_disk_no_longer_than_they_are_needed(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, failures: int
) -> None:
    hub.failures = failures
    hub.go.clear()
    waiting = tmp_path / "waiting"
    upload = HubUpload("org/model", waiting)
    upload.submit(checkpoint, "step 5")
    assert hub.began.wait(10)
    for step in (6, 7):
        upload.submit(checkpoint, f"step {step}")
    # 6 gave way; 5 could not be cancelled, and has all it needs
    assert sorted(path.name for path in waiting.iterdir()) == ["000000", "000002"]
    assert (waiting / "000000" / "model.safetensors").is_file()
    hub.go.set()
    upload.close()
    assert hub.folders[-1] == ["000002"]
    assert [message for message, _ in hub.commits] == (["step 7"] if failures else ["step 5", "step 7"])


def test_what_could_not_be_linked_leaves_nothing_and_stands_in_no_ones_way(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(source: str, target: str) -> None:
        raise OSError("no space left on device")

    upload = HubUpload("org/model", tmp_path / "waiting")
    with monkeypatch.context() as full:
        full.setattr(hub_upload, "_link", disk_is_full)
        upload.submit(checkpoint, "step 5")
    assert not list((tmp_path / "waiting").iterdir())
    upload.submit(checkpoint, "step 6")
    upload.close()
    assert [message for message, _ in hub.commits] == ["step 6"]
    assert upload.failed == 1
