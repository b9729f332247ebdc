"""Measure search in a gallery of the paper's size: latency, memory, and recall of approximate indices.

    python benchmarks/index_search.py                       # 867,653 x 768, clustered
    python benchmarks/index_search.py --hard                # uniform directions, which have no clusters to index
    python benchmarks/index_search.py --peer                # also faiss' flat index in float32

Embeddings are synthetic: 5,000 random directions with noise or, with --hard, uniform directions. Queries are further
samples, not rows of the gallery.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from timing import seconds
from torch import Tensor

from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search.approximate import ApproximateSearch
from modeling_m3ret.search.filters import MetadataFilter
from modeling_m3ret.search.index import RetrievalIndex


FACTS = ModelFacts("synthetic", "0", "0")


def sample_embeddings(rows: int, dimension: int, centres: Tensor | None, seed: int) -> Tensor:
    """Return `(rows, dimension)` float32 of norm 1: around random centres, or uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(rows, dimension)
    for start in range(0, rows, 65536):
        count = min(65536, rows - start)
        block = torch.randn(count, dimension, generator=generator)
        if centres is not None:
            block = centres[torch.randint(len(centres), (count,), generator=generator)] + 0.7 * block
        vectors[start : start + count] = torch.nn.functional.normalize(block, dim=1)
    return vectors


def print_latencies(name: str, search: Callable[[Tensor], Any], queries: Tensor) -> None:
    """Print the latency of single queries, of 100 queries and of 1,000 queries."""
    search(queries[:1]), search(queries[:100])
    print_single(name, [seconds(partial(search, query[None])) for query in queries[:100]])
    hundred = statistics.median(seconds(partial(search, queries[:100])) for _ in range(3))
    thousand = seconds(partial(search, queries))
    print(f"{name:34} 100 queries {1e3 * hundred:8.0f} ms, 1,000 queries {1e3 * thousand:8.0f} ms", flush=True)


def print_single(name: str, times: list[float]) -> None:
    """Print the median and the 95th percentile of the seconds of single queries."""
    p50, p95 = 1e3 * np.percentile(times, [50, 95])
    print(f"{name:34} one query p50 {p50:8.2f} ms, p95 {p95:8.2f} ms", flush=True)


def measure_filters(index: RetrievalIndex, queries: Tensor) -> None:
    """Print the latency of single queries with a filter to 1 % of the gallery."""
    index.search(queries[:1], 10, where=MetadataFilter(anatomy=["99"]))  # reads the columns
    times = []
    for number, query in enumerate(queries[:50]):
        where = MetadataFilter(anatomy=[str(number)])
        times.append(seconds(partial(index.search, query[None], 10, where=where)))
    print_single("exact, filter to 1 %", times)


def measure_files(index: RetrievalIndex) -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"saved in {seconds(lambda: index.save(Path(folder))):.1f} s")
        for verify in (True, False):
            taken = seconds(lambda verify=verify: RetrievalIndex.load(Path(folder), verify=verify))
            print(f"loaded in {taken:.2f} s, {'with SHA-256 check' if verify else 'memory-mapped'}")


def measure_approximate(index: RetrievalIndex, method: str, queries: Tensor, truth: Tensor) -> None:
    """Build an approximate index; print its settings, the recall@10 of new queries, its size and its latencies."""
    start = time.perf_counter()
    built = RetrievalIndex(index.embeddings, index.metadata, FACTS)
    built.approximate = ApproximateSearch.build(index.embeddings, method)
    taken = time.perf_counter() - start
    size = len(faiss.serialize_index(built.approximate.index)) / 2**20
    found = built.search(queries, 10).rows
    hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True))
    print(f"{built.approximate.settings}, of new queries {hits / truth.numel():.4f}")
    print(f"{method}: built in {taken:.0f} s, {size:,.0f} MiB")
    print_latencies(method, lambda q: built.search(q, 10), queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=867_653, help="scans in the gallery")
    parser.add_argument("--dimension", type=int, default=768, help="dimension of the embeddings")
    help_methods = "approximate indices; hnsw takes minutes to build"
    parser.add_argument("--methods", nargs="*", default=["ivf", "rabitq"], help=help_methods)
    parser.add_argument("--hard", action="store_true", help="uniform directions instead of clusters")
    parser.add_argument("--peer", action="store_true", help="also measure faiss' flat index in float32")
    arguments = parser.parse_args()
    prepare_cpu(1)
    rows, dimension = arguments.rows, arguments.dimension
    centres = None if arguments.hard else torch.randn(5000, dimension, generator=torch.Generator().manual_seed(1))
    queries = sample_embeddings(1000, dimension, centres, 3)
    gallery = sample_embeddings(rows, dimension, centres, 2)
    numbers = np.arange(rows)
    columns = {"id": numbers, "patient": numbers // 3, "anatomy": numbers % 100}
    metadata = pa.table({name: values.astype(str) for name, values in columns.items()})
    start = time.perf_counter()
    index = RetrievalIndex.build(gallery, metadata, FACTS, "exact")
    print(f"exact: built in {time.perf_counter() - start:.1f} s, {index.embeddings.nbytes / 2**20:,.0f} MiB")
    print_latencies("exact", lambda q: index.search(q, 10), queries)
    measure_filters(index, queries)
    measure_files(index)
    if arguments.peer:
        flat = faiss.IndexFlatIP(dimension)
        for block in index.embeddings.split(65536):
            flat.add(block.float().numpy())
        print_latencies("faiss flat, float32", lambda q: flat.search(q.numpy(), 10), queries)
    truth = index.search(queries, 10).rows
    for method in arguments.methods:
        measure_approximate(index, method, queries, truth)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
