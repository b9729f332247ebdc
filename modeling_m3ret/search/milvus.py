"""A search index in a Milvus collection, for galleries larger than one machine; searched like `RetrievalIndex`.

A file of Milvus Lite serves tests and small galleries, a server (2.3 or later) large ones. Milvus stores the same
vectors as an index on disk (float16, norm 1). Scores are computed from the vectors that it returns, so scores and the
order of equal ones are those of `RetrievalIndex`.

The primary key of a scan is its row. A property of the collection holds the manifest with the row at which the gallery
ends, and searches look before that row only: an interrupted build or addition is never seen. Rows of removed scans stay
empty. Only one process at a time may change a collection; any number may search it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
import torch
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from torch import Tensor

from ..data.schema import require_words
from ..errors import InputError
from ..model_facts import ModelFacts
from .approximate import TARGET_RECALL, RecallSample
from .exact import Hits, check_queries, exact_scores
from .filters import MetadataFilter
from .index import FORMAT, IndexFormatError, check_format, check_model, prepare_gallery


logger = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")

PROPERTY = "m3ret"  # property of the collection that holds the manifest
TOKEN_VARIABLE = "MILVUS_TOKEN"  # environment variable with "user:password" or an API key
DIGEST_COLUMNS = ("id", "patient", "modality", "anatomy", "source")
MAX_HITS = 16384  # per search, https://milvus.io/docs/limitations.md
MESSAGE_BYTES = 2**24  # a quarter of the 64 MB that Milvus allows per message, by the same page
METADATA_BYTES = 1024  # approximate size of a scan's metadata
HIT_BYTES = 16  # a row and a score
DIGEST_BYTES = 36  # in a list in an expression


class MilvusServerError(InputError):
    """Milvus does not answer, or refuses a request."""


def server_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that errors of Milvus are raised as MilvusServerError with a message of one line."""

    @functools.wraps(function)
    def decorated(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return function(*arguments, **options)
        except MilvusException as error:
            reason = (str(error.message).strip().splitlines() or ["no reason"])[0]
            problem = f"Milvus request failed: {reason}. Check the address, and that the server is running."
            raise MilvusServerError(problem) from error

    return decorated


@dataclass(frozen=True)
class MilvusSearch:
    """How Milvus searches."""

    index_type: str = "FLAT"  # FLAT compares all vectors, as the index on disk does by default
    build: Mapping[str, Any] | None = None  # parameters of building the index, such as `nlist` or `M`
    search: Mapping[str, Any] | None = None  # parameters of searching it, such as `nprobe` or `ef`


@dataclass(frozen=True)
class Manifest:
    """Description of a collection, stored in one of its properties."""

    facts: ModelFacts
    dimension: int
    end: int  # row before which the scans lie; 0 while the collection is being built
    method: MilvusSearch
    recall: float | None = None  # recall@10 at the build; None for FLAT, which is exact, and after an addition

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | None, collection: str) -> Manifest:
        """Parse the manifest of a collection.

        Raises:
            IndexFormatError: if its format is not supported, or it is not a manifest.
        """
        try:
            values = json.loads(text or "")
            check_format(collection, values.pop("format"))
            facts, method = ModelFacts(**values.pop("facts")), MilvusSearch(**values.pop("method"))
            return cls(facts=facts, method=method, **values)
        except IndexFormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            details = "the collection is not an index of m3ret. Choose another name."
            raise IndexFormatError(collection, "unsupported", details) from error


@dataclass
class MilvusIndex:
    """A gallery in Milvus. Create it with `build` or `load`."""

    client: MilvusClient
    collection: str
    manifest: Manifest

    @property
    def facts(self) -> ModelFacts:
        return self.manifest.facts

    @classmethod
    @server_errors
    def build(
        cls,
        embeddings: Tensor,
        metadata: pa.Table,
        facts: ModelFacts,
        uri: str,
        collection: str,
        method: MilvusSearch = MilvusSearch(),
        target_recall: float = TARGET_RECALL,
    ) -> MilvusIndex:
        """Create a collection from at least one scan. One that an interrupted build left behind is replaced.

        Args:
            embeddings, metadata, facts: as for `RetrievalIndex.build`.
            uri: a file `*.db` of Milvus Lite, or a server's `https://…` or `http://…:19530`. The token is read from the
                environment (`MILVUS_TOKEN`).
            collection: name of the collection.
            method: how Milvus searches.
            target_recall: a warning is logged if the recall@10 of an approximate search is below it.

        Raises:
            InputError: as `RetrievalIndex.build`, if there is no scan, or if the collection exists.
            MilvusServerError: if the server does not answer. Every other method raises it too.
        """
        vectors, metadata = prepare_gallery(embeddings, metadata)
        if not len(vectors):  # a collection that ends at row 0 is unfinished
            raise InputError(f"cannot build the collection {collection}: expected at least one scan, got none.")
        client = _connect(uri)
        if client.has_collection(collection):
            if _read_manifest(client, collection).end:
                raise InputError(f"{uri}: the collection {collection} exists. Choose another name or drop it.")
            client.drop_collection(collection)
        manifest = Manifest(facts, vectors.shape[1], 0, method)
        client.create_collection(
            collection,
            schema=_schema(manifest.dimension),
            consistency_level="Strong",  # every client's next search sees what was added
            properties={PROPERTY: manifest.to_json()},
        )
        built = cls(client, collection, manifest)
        built._insert(vectors, metadata)
        client.flush(collection)
        string_indices, vector_index = client.prepare_index_params(), client.prepare_index_params()
        for column in DIGEST_COLUMNS:  # a server chooses the type: INVERTED, or Trie before Milvus 2.4
            string_indices.add_index(f"{column}_digest", index_type="INVERTED" if uri.endswith(".db") else "")
        build = dict(method.build or {})
        vector_index.add_index("embedding", index_type=method.index_type, metric_type="IP", params=build)
        client.create_index(collection, string_indices, sync=False)
        client.create_index(collection, vector_index)  # waits for the index, with which the recall is measured
        client.load_collection(collection)
        built.manifest = replace(manifest, end=len(vectors))
        if method.index_type != "FLAT":
            recall = RecallSample(vectors).recall(built.search)
            if recall < target_recall:
                logger.warning(
                    "recall@10 of the collection %s is too low: expected %.3f, got %.3f. Raise the parameters of %s.",
                    *(collection, target_recall, recall, method),
                )
            built.manifest = replace(built.manifest, recall=recall)
        built._publish()
        return built

    @classmethod
    @server_errors
    def load(cls, uri: str, collection: str, expected: ModelFacts | None = None) -> MilvusIndex:
        """Open a collection, which must be of the `expected` model if that is given.

        Raises:
            IndexFormatError: if the collection is missing, not an index, unfinished, or of another model.
        """
        client = _connect(uri)
        if not client.has_collection(collection):
            raise IndexFormatError(collection, "not_found", f"no such collection in {uri}.")
        manifest = _read_manifest(client, collection)
        if not manifest.end:
            raise IndexFormatError(collection, "unfinished", "the collection was not built to its end. Build it again.")
        check_model(collection, manifest.facts, expected)
        client.load_collection(collection)
        return cls(client, collection, manifest)

    @server_errors
    def __len__(self) -> int:
        return self._count(self._before_end())

    def close(self) -> None:
        """Close the connection, or the file, which only one process may have open."""
        self.client.close()

    # ---- search -----------------------------------------------------------------------------------------------------

    @server_errors
    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        where: MetadataFilter | None = None,
        query_patients: Sequence[str] | None = None,
    ) -> Hits:
        """Return the k most similar scans of each query, as `RetrievalIndex.search` does.

        Queries of one patient share a request, so queries of many patients take many requests. If more scans have the
        score of the last hit than fit, or an approximate search finds too few, scans are read in the order of their
        rows until the hits are certain.

        Raises:
            InputError: if the shapes do not match, k is not in 1 to 16,384, or the filter is too long for a request.
        """
        check_queries(queries, self.manifest.dimension, k, query_patients)
        if k > MAX_HITS:
            raise InputError(f"k is out of range: expected at most {MAX_HITS:,}, got {k:,}.")
        queries = torch.nn.functional.normalize(queries.float(), dim=-1)
        hits = Hits.empty(len(queries), k)
        queries_of: dict[str, list[int]] = {}
        for index, patient in enumerate([""] * len(queries) if query_patients is None else query_patients):
            queries_of.setdefault(patient, []).append(index)
        expression = self._before_end() + (_expression(where) if where else "")
        for patient, indices in queries_of.items():
            condition = f'{expression} and patient_digest != "{_digest(patient)}"' if patient else expression
            for batch in _batches(indices, (4 * queries.shape[1] + HIT_BYTES) * (k + 1)):
                found = self.client.search(
                    self.collection,
                    data=queries[batch].tolist(),
                    anns_field="embedding",
                    filter=condition,
                    limit=min(k + 1, MAX_HITS),  # the last one shows whether more scans have the score of the k-th
                    output_fields=["row", "embedding"],
                    search_params={"metric_type": "IP", "params": dict(self.manifest.method.search or {})},
                )
                for index, entities in zip(batch, found, strict=True):
                    known = _scores(entities, queries[index])
                    _set_best(hits, index, known)
                    last = float(hits.scores[index, -1])
                    better = sum(score > last for score in known.values())
                    tied = sum(score == last for score in known.values())
                    short = len(known) <= k and self.manifest.method.index_type != "FLAT"
                    if better + tied > k or (short and len(known) < self._count(condition)):
                        self._read_in_order(known, queries[index], condition, last, k - better)
                        _set_best(hits, index, known)
        return hits

    def _read_in_order(self, known: dict[int, float], query: Tensor, condition: str, last: float, missing: int) -> None:
        """Add scans to the known scores in the order of their rows, until `missing` have the score of the last hit."""
        step = max(1, min(MAX_HITS, MESSAGE_BYTES // (4 * len(query))))
        for start in range(0, self.manifest.end, step):
            interval = f"{condition} and row >= {start} and row < {start + step}"
            read = self.client.query(self.collection, filter=interval, output_fields=["row", "embedding"])
            scores = _scores(read, query)
            known |= scores
            missing -= sum(score == last for score in scores.values())
            if missing <= 0:
                return

    def _count(self, condition: str) -> int:
        (counted,) = self.client.query(self.collection, filter=condition, output_fields=["count(*)"])
        return int(counted["count(*)"])

    @server_errors
    def lookup(self, rows: Tensor) -> list[dict[str, Any]]:
        """Return the metadata of rows that a search found; rows of -1 are skipped.

        Raises:
            LookupError: if a row was removed since.
        """
        wanted = rows[rows >= 0].flatten().tolist()
        metadata: dict[int, dict[str, Any]] = {}
        for batch in _batches(sorted(set(wanted)), METADATA_BYTES):
            answers = self.client.query(self.collection, filter=f"row in {batch}", output_fields=["metadata"])
            metadata |= {answer["row"]: answer["metadata"] for answer in answers}
        if removed := set(wanted) - set(metadata):
            raise LookupError(f"row {min(removed)} of {self.collection} was removed after the search. Search again.")
        return [metadata[row] for row in wanted]

    # ---- changes ----------------------------------------------------------------------------------------------------

    @server_errors
    def add(self, embeddings: Tensor, metadata: pa.Table) -> MilvusIndex:
        """Add scans and return the larger index. Indices that are open already do not see them.

        Raises:
            InputError: as `build`, if an id is in the index already, or if the collection changed since it was opened.
        """
        vectors, metadata = prepare_gallery(embeddings, metadata, self.manifest.dimension)
        end = _read_manifest(self.client, self.collection).end
        if end != self.manifest.end:
            raise InputError(
                f"the collection {self.collection} changed since it was opened: "
                f"expected {self.manifest.end} rows, got {end}. Load it again."
            )
        for digests in _digest_lists(metadata.column("id").to_pylist()):
            condition = f"{self._before_end()} and id_digest in {digests}"
            if found := self.client.query(self.collection, filter=condition, output_fields=["metadata"], limit=1):
                known = f"{found[0]['metadata']['id']}, which {self.collection} contains"
                raise InputError(f"an id is not unique: expected new ids, got {known}.")
        self.client.delete(self.collection, filter=f"row >= {self.manifest.end}")  # of an interrupted addition
        self._insert(vectors, metadata)
        manifest = replace(self.manifest, end=self.manifest.end + len(vectors), recall=None)
        larger = MilvusIndex(self.client, self.collection, manifest)
        larger._publish()
        return larger

    @server_errors
    def remove(self, ids: Collection[str]) -> MilvusIndex:
        """Remove the scans of these ids from the collection, for all processes; unknown ids are ignored."""
        for digests in _digest_lists(require_words("ids", ids)):
            self.client.delete(self.collection, filter=f"id_digest in {digests}")
        return self

    def _before_end(self) -> str:
        return f"row < {self.manifest.end}"

    def _insert(self, vectors: Tensor, metadata: pa.Table) -> None:
        for batch in _batches(range(len(vectors)), 4 * self.manifest.dimension + METADATA_BYTES):
            scans = metadata.slice(batch[0], len(batch)).to_pylist()
            entities = [
                {"row": self.manifest.end + row, "embedding": vector, "metadata": scan}
                | {f"{column}_digest": _digest(scan[column]) for column in DIGEST_COLUMNS}
                for row, vector, scan in zip(batch, vectors[batch].float().tolist(), scans, strict=True)
            ]
            self.client.insert(self.collection, entities)

    def _publish(self) -> None:
        for _ in range(2):  # a Milvus 2.3 server that is killed forgets the last change of a collection's properties
            self.client.alter_collection_properties(self.collection, {PROPERTY: self.manifest.to_json()})


def _scores(entities: Sequence[Mapping[str, Any]], query: Tensor) -> dict[int, float]:
    """Return exact scores by row of scans that Milvus returned. Its own scores of equal vectors may differ."""
    vectors = torch.tensor([entity["embedding"] for entity in entities]).reshape(len(entities), len(query))
    scores = exact_scores(vectors, torch.arange(len(entities)), query)
    return dict(zip((entity["row"] for entity in entities), scores.tolist(), strict=True))


def _set_best(hits: Hits, query: int, known: Mapping[int, float]) -> None:
    hits.set_best(query, torch.tensor([*known.values()]), torch.tensor([*known], dtype=torch.int64))


def _connect(uri: str) -> MilvusClient:
    return MilvusClient(uri, token=os.environ.get(TOKEN_VARIABLE, ""))


def _schema(dimension: int) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dimension)
    schema.add_field("metadata", DataType.JSON)
    for column in DIGEST_COLUMNS:
        schema.add_field(f"{column}_digest", DataType.VARCHAR, max_length=32)
    return schema


def _read_manifest(client: MilvusClient, collection: str) -> Manifest:
    return Manifest.from_json(client.describe_collection(collection)["properties"].get(PROPERTY), collection)


def _digest(value: str | None) -> str:
    """Return the digest by which a string is compared; expressions hold digests only, so no value can alter one."""
    return "" if value is None else hashlib.blake2b(value.encode(), digest_size=16).hexdigest()


def _digest_lists(values: Collection[str]) -> Iterator[str]:
    """Yield the digests of values as lists in the syntax of an expression."""
    yield from map(json.dumps, _batches(sorted({_digest(value) for value in values}), DIGEST_BYTES))


def _expression(where: MetadataFilter) -> str:
    """Return a filter as conditions that follow another one; empty if it allows all scans."""
    conditions = []
    for column, values in where.allowed_values().items():
        alternatives = " or ".join(f"{column}_digest in {digests}" for digests in _digest_lists(values))
        conditions.append(f" and ({alternatives or 'row < 0'})")
    conditions += [f" and patient_digest not in {digests}" for digests in _digest_lists(where.excluded_patients)]
    expression = "".join(conditions)
    if len(expression) > MESSAGE_BYTES:
        raise InputError(
            f"the filter is too long for Milvus: expected at most {MESSAGE_BYTES:,} characters, "
            f"got {len(expression):,}. Name fewer values."
        )
    return expression


def _batches(items: Sequence[T], bytes_each: int) -> Iterator[list[T]]:
    """Split items so that each batch fits a message."""
    size = max(1, min(MAX_HITS, MESSAGE_BYTES // bytes_each))
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
