"""Test the local Hub server with the clients that use it: huggingface_hub and datasets get back what they uploaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import Hub
from pyarrow import parquet


pytestmark = pytest.mark.slow  # starts processes

ROWS = {
    "id": [f"scan-{number}" for number in range(40)],
    "label": [number % 3 for number in range(40)],
    "pixels": np.random.default_rng(0).random((40, 500)).tolist(),
}
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: test
    path: data/test.parquet
---

# Forty scans
"""
PUSH_AND_LOAD = """
import sys
from datasets import load_dataset
from huggingface_hub import HfApi
folder, name = sys.argv[1:]
api = HfApi()
api.create_repo(name, repo_type="dataset", private=True)
api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder, commit_message="forty scans")
loaded, streamed = load_dataset(name), load_dataset(name, streaming=True)
assert list(loaded) == list(streamed) == ["train", "test"]
for split in loaded:
    assert list(streamed[split]) == loaded[split].to_list()
loaded["train"].to_parquet(folder + "/loaded.parquet")
"""
# a user's calls of `HfApi`, with the results that the real Hub gives
USE_HUB_API = """
import os, sys
from huggingface_hub import CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
folder, name, space = sys.argv[1:]
api = HfApi()
def fails(error, call, *args, **options):
    try:
        call(*args, **options)
    except error as raised:
        return raised
    raise AssertionError(f"{call.__name__} should have raised {error.__name__}")

fails(RepositoryNotFoundError, api.model_info, name)
api.create_repo(name, private=True)
api.create_repo(name, private=True, exist_ok=True)
assert fails(HfHubHTTPError, api.create_repo, name).response.status_code == 409
first = api.upload_folder(repo_id=name, folder_path=folder, commit_message="first")
listed = {".gitattributes", "a/b/empty.txt", "a/b/large.npy", "a/notes.txt", "straße 1.txt"}
assert set(api.list_repo_files(name)) == listed
assert {item.path for item in api.list_repo_tree(name)} == {"a", ".gitattributes", "straße 1.txt"}
assert {item.path for item in api.list_repo_tree(name, "a/b")} == {"a/b/empty.txt", "a/b/large.npy"}
info = {item.path: item for item in api.get_paths_info(name, ["a", "a/b/large.npy", "nothing"])}
assert set(info) == {"a", "a/b/large.npy"}
assert info["a/b/large.npy"].size == info["a/b/large.npy"].lfs.size == os.path.getsize(folder + "/a/b/large.npy")
assert api.upload_folder(repo_id=name, folder_path=folder).oid == first.oid  # no change, so no commit

api.upload_file(repo_id=name, path_or_fileobj=b"new", path_in_repo="a/notes.txt")
deleted = [CommitOperationDelete(path) for path in ("a/b/empty.txt", "a/b/large.npy")]
api.create_commit(name, deleted, commit_message="third")
assert open(hf_hub_download(name, "a/notes.txt", revision=first.oid)).read() == "old"
assert open(hf_hub_download(name, "a/notes.txt")).read() == "new"
fails(EntryNotFoundError, hf_hub_download, name, "a/b/large.npy")
fails(RevisionNotFoundError, hf_hub_download, name, "a/notes.txt", revision="v2")
fails(RepositoryNotFoundError, HfApi(token=False).model_info, name)

api.create_repo(space, repo_type="space", space_sdk="static", private=True)
api.upload_file(repo_id=space, repo_type="space", path_or_fileobj=b"scans", path_in_repo="index.html")
assert api.space_info(space).sdk == "static"
"""


def run(hub: Hub, code: str, folder: Path, *arguments: object) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=hub.environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_pushed_dataset_loads_and_streams_unchanged(hub: Hub, tmp_path: Path) -> None:
    pushed = pyarrow.table(ROWS)
    folder = tmp_path / "scans"
    (folder / "data").mkdir(parents=True)
    for name, start, rows in (("train-0", 0, 20), ("train-1", 20, 15), ("test", 35, 5)):
        parquet.write_table(pushed.slice(start, rows), folder / "data" / f"{name}.parquet")
    (folder / "README.md").write_text(CARD)
    name = hub.new_repository("scans")
    run(hub, PUSH_AND_LOAD, tmp_path, folder, name)
    files = hub.files(name, "dataset")
    assert files["data/test.parquet"] == (folder / "data" / "test.parquet").read_bytes()
    assert parquet.read_table(folder / "loaded.parquet").to_pylist() == pushed.slice(0, 35).to_pylist()
    assert not hub.requests or any(request.status == 206 for request in hub.requests)  # streaming uses range requests


def test_api_calls_give_the_results_of_the_real_hub(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "notes.txt").write_text("old")
    (folder / "a" / "b" / "empty.txt").touch()
    (folder / "straße 1.txt").write_text("its name needs URL quoting")
    np.save(folder / "a" / "b" / "large.npy", np.arange(50_000))
    name = hub.new_repository("model")
    run(hub, USE_HUB_API, tmp_path, folder, name, hub.new_repository("space"))
    assert set(hub.files(name)) == {".gitattributes", "a/notes.txt", "straße 1.txt"}
    assert hub.files(name)["a/notes.txt"] == b"new"
    assert hub.is_private(name)
    assert len(hub.head(name)) == 40


def test_injected_failure_affects_the_next_request_only(hub: Hub, tmp_path: Path) -> None:
    hub.fail_next(1, "/api/repos/create", status=500)
    code = """
import sys
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
try:
    HfApi().create_repo(sys.argv[1])
except HfHubHTTPError as error:
    assert error.response.status_code == 500
else:
    raise AssertionError("should have failed")
HfApi().create_repo(sys.argv[1])
"""
    run(hub, code, tmp_path, hub.new_repository("model"))
    statuses = [request.status for request in hub.requests if request.path == "/api/repos/create"]
    assert statuses[-2:] == [500, 200]
