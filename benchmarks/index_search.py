"""How fast is a gallery of the paper's size searched, and how much of the truth is found?

    python benchmarks/index_search.py                       # 867,653 x 768, clustered
    python benchmarks/index_search.py --hard                # spread evenly: nothing for cells to find

Synthetic embeddings: a mixture of 5,000 directions with noise, or, --hard, directions spread evenly. Queries are new
draws, not rows of the gallery. Beside it, as the peer, faiss' own flat index in float32.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
import torch
from torch import Tensor

from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search.approximate import ApproximateSearch
from modeling_m3ret.search.index import MetadataFilter, RetrievalIndex


def draw(rows: int, dimension: int, centres: Tensor | None, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(rows, dimension, dtype=torch.float16)
    for start in range(0, rows, 65536):
        count = min(65536, rows - start)
        block = torch.randn(count, dimension, generator=generator)
        if centres is not None:
            block = centres[torch.randint(len(centres), (count,), generator=generator)] + 0.7 * block
        vectors[start : start + count] = torch.nn.functional.normalize(block, dim=1).half()
    return vectors


def milliseconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def latencies(name: str, search: Callable[[Tensor], Any], queries: Tensor) -> None:
    search(queries[:1]), search(queries[:100])
    single = sorted(milliseconds(lambda q=query: search(q[None])) for query in queries[:100])
    hundred = statistics.median(milliseconds(lambda: search(queries[:100])) for _ in range(3))
    thousand = milliseconds(lambda: search(queries))
    print(
        f"{name:34} one query p50 {single[50]:8.2f} ms, p95 {single[95]:8.2f} ms   100: {hundred:8.0f} ms   "
        f"1,000: {thousand:8.0f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=867_653)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument(
        "--methods", nargs="*", default=["ivf", "rabitq"], help="also hnsw, which takes minutes to build"
    )
    parser.add_argument("--hard", action="store_true")
    parser.add_argument("--peer", action="store_true", help="also faiss' flat index in float32")
    arguments = parser.parse_args()
    prepare_cpu(1)
    rows, dimension = arguments.rows, arguments.dimension
    centres = None if arguments.hard else torch.randn(5000, dimension, generator=torch.Generator().manual_seed(1))
    gallery, queries = (draw(count, dimension, centres, seed).float() for count, seed in ((rows, 2), (1000, 3)))
    metadata = pa.table(
        {
            "id": pa.array(map(str, range(rows))),
            "patient": pa.array(str(n // 3) for n in range(rows)),
            "anatomy": pa.array(str(n % 100) for n in range(rows)),
        }
    )
    facts = ModelFacts("synthetic", "0", "0")
    start = time.perf_counter()
    index = RetrievalIndex.build(gallery, metadata, facts, "exact")
    del gallery
    print(f"exact: built in {time.perf_counter() - start:.1f} s, {index.embeddings.nbytes / 2**20:,.0f} MiB")
    latencies("exact", lambda q: index.search(q, 10), queries)
    index.search(queries[:1], 10, where=MetadataFilter(anatomy=["99"]))  # which reads the column
    for name, filters in (
        ("new", [MetadataFilter(anatomy=[str(number)]) for number in range(50)]),
        ("asked before", [MetadataFilter(anatomy=["99"])] * 50),
    ):
        filtered = sorted(
            milliseconds(lambda q=query, where=where: index.search(q[None], 10, where=where))
            for query, where in zip(queries, filters, strict=False)
        )
        title = f"exact, filter to 1 %, {name}"
        print(f"{title:34} one query p50 {filtered[25]:8.2f} ms, p95 {filtered[47]:8.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        print(f"saved in {milliseconds(lambda: index.save(Path(folder))) / 1e3:.1f} s")
        for verify in (True, False):
            took = milliseconds(lambda verify=verify: RetrievalIndex.load(Path(folder), verify=verify))
            print(f"loaded in {took / 1e3:.2f} s, {'sha256 verified' if verify else 'mapped'}")
    truth = index.search(queries, 10).rows
    if arguments.peer:
        flat = faiss.IndexFlatIP(dimension)
        for block in index.embeddings.split(65536):
            flat.add(block.float().numpy())
        latencies("faiss flat, float32", lambda q: flat.search(q.numpy(), 10), queries)
        del flat
    for method in arguments.methods:
        start = time.perf_counter()
        built = RetrievalIndex(index.embeddings, index.metadata, facts)
        built.approximate = ApproximateSearch.build(index.embeddings, method)
        seconds = time.perf_counter() - start
        size = len(faiss.serialize_index(built.approximate.index)) / 2**20
        found = built.search(queries, 10).rows
        hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True))
        print(f"{built.approximate.settings}, of new queries {hits / truth.numel():.4f}")
        print(f"{method}: built in {seconds:.0f} s, {size:,.0f} MiB")
        latencies(method, lambda q, built=built: built.search(q, 10), queries)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
