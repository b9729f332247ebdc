"""Build a search index from the embeddings that `m3ret embed` wrote.

    m3ret index embeddings.parquet -o index/
    m3ret index hospital-a.parquet hospital-b.parquet -o index/

The files must be of one model. The index is exact up to a million scans; docs/evaluation.md has the details.
"""

from __future__ import annotations

from pathlib import Path

from .command_line import CommandLine, user_errors
from .search.embedding_table import read_embeddings
from .search.index import RetrievalIndex


METHODS = ("auto", "exact", "ivf", "rabitq", "hnsw")


def main() -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("embeddings", nargs="+", type=Path, metavar="EMBEDDINGS", help="Parquet files of m3ret embed")
    add("-o", "--output", required=True, type=Path, help="folder of the index; an index in it is replaced")
    add("--method", choices=METHODS, default="auto", help="auto is exact up to a million scans")
    options = parser.parse_args()
    with user_errors(parser.prog):
        embeddings, metadata, facts = read_embeddings(options.embeddings)
        index = RetrievalIndex.build(embeddings, metadata, facts, options.method)
        index.save(options.output)
    print(f"{options.output}: {len(index)} scans, embedded by {facts.model}")


if __name__ == "__main__":
    main()
