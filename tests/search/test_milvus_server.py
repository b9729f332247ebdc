"""The index on a real Milvus server, which these tests start, stop, kill and start again.

The wheel `milvus` 2.3.5 holds the server. It starts in about 13 s on two cores.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_index import FACTS, NO_MILVUS, embeddings, metadata

from modeling_m3ret.search.filters import MetadataFilter
from modeling_m3ret.search.index import RetrievalIndex


pytestmark = pytest.mark.slow
module = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)
milvus = pytest.importorskip("milvus", reason="pip install m3ret[test] on Linux x86-64")


class Config(milvus.MilvusServerConfig):
    """Configuration whose check of a port ignores connections of a server that was stopped a moment ago."""

    def try_bind_port(self, port: int) -> socket.socket | None:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            return None


class Server:
    """A server on a free port, whose data outlive a restart."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = milvus.MilvusServer(Config(data_dir=str(self.folder), proxy_port=self.port))
        self.server.start()

    def stop(self) -> None:
        """Terminate the server, and kill it after a second."""
        self.server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.stop()


def assert_equal_to_disk(index: Any, on_disk: RetrievalIndex, queries: torch.Tensor) -> None:
    patients = [f"patient-{n}" for n in range(len(queries))]
    for k in (1, 10, 700):
        for options in (
            {},
            {"query_patients": patients},
            {"where": MetadataFilter(modality=["ct"], excluded_patients=["patient-2"])},
            {"where": MetadataFilter(modality=[])},
        ):
            hits, expected = index.search(queries, k, **options), on_disk.search(queries, k, **options)
            assert torch.equal(hits.rows, expected.rows)
            assert torch.equal(hits.scores, expected.scores)
    assert index.lookup(hits.rows[0]) == on_disk.lookup(hits.rows[0])


def test_index_on_a_server_equals_that_on_disk_and_survives_a_restart(server: Server) -> None:
    index = module.MilvusIndex.build(embeddings(), metadata(), FACTS, server.uri, "scans")
    on_disk = RetrievalIndex.build(embeddings(), metadata(), FACTS)
    queries = embeddings(seed=2)[:6]
    assert_equal_to_disk(index, on_disk, queries)
    index = index.add(embeddings(30, seed=5), metadata(30, first=600))
    on_disk = on_disk.add(embeddings(30, seed=5), metadata(30, first=600))
    assert_equal_to_disk(index, on_disk, queries)
    index.remove(["id-629", "id-628"])  # the last rows, so that rows on disk keep their numbers
    on_disk = on_disk.remove(["id-629", "id-628"])
    assert_equal_to_disk(index, on_disk, queries)

    server.stop()
    for request in (
        lambda: index.search(queries, 3),
        lambda: len(index),
        lambda: index.add(embeddings(1), metadata(1, first=900)),
        lambda: module.MilvusIndex.load(server.uri, "scans"),
    ):
        with pytest.raises(module.MilvusServerError) as error:
            request()
        assert "\n" not in str(error.value)
    server.start()
    loaded = module.MilvusIndex.load(server.uri, "scans", FACTS)
    assert len(loaded) == 628
    for client in (loaded, index):  # the one that was open reconnects
        assert_equal_to_disk(client, on_disk, queries)


def test_equal_scans_are_found_in_the_order_of_their_rows(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the index on disk, also if a message holds fewer scans than are equal."""
    vectors = torch.randn(1, 32).repeat(300, 1)
    vectors[::40] = torch.randn(8, 32)
    index = module.MilvusIndex.build(vectors, metadata(300), FACTS, server.uri, "equal")
    on_disk = RetrievalIndex.build(vectors, metadata(300), FACTS)
    queries = torch.cat([vectors[:3], torch.randn(3, 32)])
    assert_equal_to_disk(index, on_disk, queries)
    monkeypatch.setattr(module, "MESSAGE_BYTES", 4 * 32 * 50)
    assert torch.equal(index.search(queries, 60).rows, on_disk.search(queries, 60).rows)
