"""What every test shares: tiny models, and scans of all kinds that the tests make themselves."""

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


# tiny models gain nothing from threads, and on a busy machine lose a hundredfold waiting for each other
torch.set_num_threads(1)


def tiny_config(**overrides: object) -> M3RetConfig:
    """A ViT small enough for a test of milliseconds, with every part of the real one."""
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
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def devset() -> Path:
    """The folder of real scans for development, where this machine has it; never part of the project."""
    folder = Path(os.environ.get("M3RET_DEVSET", Path(__file__).parents[2] / "shared" / "data" / "devset"))
    if not (folder / "manifest.csv").is_file():
        pytest.skip("the development scans are not on this machine (set M3RET_DEVSET to their folder)")
    return folder


class Hub:
    """What a test sees of a Hub: the server on loopback here, a namespace of the real one in `RealHub`."""

    def __init__(self, server: HubServer):
        self.server, self.endpoint, self.token, self.namespace = server, server.endpoint, server.token, "org"

    def new_repository(self, name: str) -> str:
        """ORG/NAME of a repository that no one else has; made by whoever pushes to it."""
        return f"{self.namespace}/{name}-{uuid.uuid4().hex[:8]}"

    def environment(self, folder: Path) -> dict[str, str]:
        """Of a process that uses this Hub: huggingface_hub reads these when it is imported, so this process can't.

        Caches lie fresh in `folder`; the package is not on the path.
        """
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        return kept | settings | {"NO_PROXY": ",".join(filter(None, [kept.get("NO_PROXY"), "127.0.0.1"]))}

    @property
    def requests(self) -> list[Request]:
        """What was asked of the server so far; of the real Hub nothing is known."""
        return list(self.server.requests)

    def fail_next(self, count: int | None, path: str = "", status: int = 503) -> None:
        """See `HubServer.fail_next`; a test of failures is skipped on the real Hub."""
        self.server.fail_next(count, path, status)

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What the main branch holds now."""
        return self.server.files(repo_id, repo_type)

    def head(self, repo_id: str, repo_type: str = "model") -> str:
        """The newest commit's id."""
        return self.server.repository(repo_id, repo_type).sha()

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return self.server.repository(repo_id, repo_type).private


class RealHub(Hub):
    """Private repositories in a namespace of huggingface.co, deleted by `delete`."""

    def __init__(self, namespace: str, token: str):
        self.endpoint, self.token, self.namespace = "https://huggingface.co", token, namespace
        self.api = HfApi(self.endpoint, token)
        self.made: list[str] = []

    def new_repository(self, name: str) -> str:
        self.made.append(super().new_repository(name))
        return self.made[-1]

    @property
    def requests(self) -> list[Request]:
        return []

    def fail_next(self, count: int | None, path: str = "", status: int = 503) -> None:
        pytest.skip("the real Hub does not fail when told to")

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
        for repo_id in self.made:
            for repo_type in ("model", "dataset", "space"):
                self.api.delete_repo(repo_id, repo_type=repo_type, missing_ok=True)


@pytest.fixture(scope="session", autouse=True)
def one_process_to_fork() -> None:
    """There is one for all: before the library's own workers start it with less imported, where tests need more."""
    if "processes" in sys.modules:
        sys.modules["processes"].forks()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub on loopback; huggingface.co where M3RET_TEST_HUB_NAMESPACE (of whose HF_TOKEN may write there) is set."""
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
    """Twelve patients, an image or a small volume of each in turn."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(12):
        path = tmp_path / f"{number}.npy"
        np.save(path, generator.random((1 + 7 * (number % 2), 40, 40), dtype=np.float32))
        made.append(Record(str(number), path, ("xray", "ct")[number % 2], "a", f"l{number % 3}", f"p{number}"))
    return made
