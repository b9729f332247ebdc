"""Fixtures shared by all tests: tiny models, generated scans, and a Hub on the loopback interface."""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, Request
from huggingface_hub import HfApi

from modeling_m3ret import M3RetConfig
from modeling_m3ret.data.collection import Record


# threads do not speed up tiny models, and on a busy machine they slow them down by spinning
torch.set_num_threads(1)


def tiny_config(**overrides: object) -> M3RetConfig:
    """Return the configuration of a ViT that runs in milliseconds and has every part of a real one."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "decoder_hidden_size": 36,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 3,
        "layer_scale_init": 1.0,
    }
    return M3RetConfig(**(sizes | overrides))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Start each test with one thread and one seed, because commands that ran before it set as many as there are cores.

    With several threads, torch also calls other operators.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def devset() -> Path:
    """Return the folder of real development scans, or skip the test where it is not available."""
    folder = Path(os.environ.get("M3RET_DEVSET", Path(__file__).parents[2] / "shared" / "data" / "devset"))
    if not (folder / "manifest.csv").is_file():
        pytest.skip("needs the development scans: set M3RET_DEVSET to their folder")
    return folder


class Hub:
    """A Hub for tests: the loopback server here, a namespace of huggingface.co in `RealHub`."""

    def __init__(self, server: HubServer):
        self.server, self.endpoint, self.token, self.namespace = server, server.endpoint, server.token, "org"

    def new_repository(self, name: str) -> str:
        """Return an unused ORG/NAME. The repository is created by the first push."""
        return f"{self.namespace}/{name}-{uuid.uuid4().hex[:8]}"

    def environment(self, folder: Path) -> dict[str, str]:
        """Return environment variables for a new process that uses this Hub, with fresh caches in `folder`.

        huggingface_hub reads them at import, so the current process cannot switch. The package is not on the path.
        """
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        return inherited | settings | {"NO_PROXY": ",".join(filter(None, [inherited.get("NO_PROXY"), "127.0.0.1"]))}

    @property
    def requests(self) -> list[Request]:
        """Return the requests that the server has received; empty for the real Hub."""
        return list(self.server.requests)

    def fail_next(self, count: int | None, path: str = "", status: int = 503) -> None:
        """Make the next requests fail, see `HubServer.fail_next`. Tests of failures are skipped on the real Hub."""
        self.server.fail_next(count, path, status)

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """Return the files of the main branch by name."""
        return self.server.files(repo_id, repo_type)

    def head(self, repo_id: str, repo_type: str = "model") -> str:
        """Return the id of the newest commit."""
        return self.server.repository(repo_id, repo_type).sha()

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return self.server.repository(repo_id, repo_type).private


class RealHub(Hub):
    """Private repositories in a namespace of huggingface.co, removed by `delete`."""

    def __init__(self, namespace: str, token: str):
        self.endpoint, self.token, self.namespace = "https://huggingface.co", token, namespace
        self.api = HfApi(self.endpoint, token)
        self.repositories: list[str] = []

    def new_repository(self, name: str) -> str:
        self.repositories.append(super().new_repository(name))
        return self.repositories[-1]

    @property
    def requests(self) -> list[Request]:
        return []

    def fail_next(self, count: int | None, path: str = "", status: int = 503) -> None:
        pytest.skip("needs the loopback Hub: huggingface.co does not fail on request")

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        names = self.api.list_repo_files(repo_id, repo_type=repo_type)
        with tempfile.TemporaryDirectory() as folder:
            self.api.snapshot_download(repo_id, repo_type=repo_type, local_dir=folder)
            return {name: Path(folder, name).read_bytes() for name in names}

    def head(self, repo_id: str, repo_type: str = "model") -> str:
        return str(self.api.repo_info(repo_id, repo_type=repo_type).sha)

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return bool(self.api.repo_info(repo_id, repo_type=repo_type).private)

    def delete(self) -> None:
        for repo_id in self.repositories:
            for repo_type in ("model", "dataset", "space"):
                self.api.delete_repo(repo_id, repo_type=repo_type, missing_ok=True)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Start the fork server with all imports of the tests, before the library starts it with fewer."""
    if "processes" in sys.modules:
        sys.modules["processes"].forks()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Yield a loopback Hub, or huggingface.co if M3RET_TEST_HUB_NAMESPACE and a HF_TOKEN with write access are set."""
    namespace, token = os.environ.get("M3RET_TEST_HUB_NAMESPACE"), os.environ.get("HF_TOKEN")
    if namespace and token:
        real = RealHub(namespace, token)
        yield real
        real.delete()
        return
    with HubServer() as server:
        yield Hub(server)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Return records of twelve patients, alternating between an image and a small volume."""
    generator = np.random.default_rng(0)
    made: list[Record] = []
    for number in range(12):
        path = tmp_path / f"{number}.npy"
        np.save(path, generator.random((1 + 7 * (number % 2), 40, 40), dtype=np.float32))
        made.append(Record(str(number), path, ("xray", "ct")[number % 2], "a", f"l{number % 3}", f"p{number}"))
    return made
