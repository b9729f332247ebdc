"""The gallery in a Milvus collection, for more scans than one machine holds: searched as `RetrievalIndex` is.

Milvus Lite's file serves tests and small galleries, a server's address the large ones. Vectors are what the index on
disk holds, directions in float16, so scores are the same.

A scan's primary key is its row. What a collection is lies in one of its properties, beside the row at which it ends: a
search looks before that row only, so a build or an addition that was cut off is never seen. Rows of removed scans stay
empty. One process at a time may change a collection; any number may search it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from pymilvus import DataType, MilvusClient
from torch import Tensor

from ..model_facts import ModelFacts
from .approximate import AIM, TRIED_QUERIES
from .exact import Hits, bfloat16_rounding, search_exactly
from .index import IndexFormatError, MetadataFilter, directions, expect_of_each_query, with_all_columns


logger = logging.getLogger(__name__)

FORMAT = 1
PROPERTY = "m3ret"
TOKEN = "MILVUS_TOKEN"  # the variable that holds "user:password" or a key of the server
DIGESTED = ("id", "patient", "modality", "anatomy", "source")
MOST_HITS = 16384  # that Milvus gives to a search, https://milvus.io/docs/limitations.md
MESSAGE_BYTES = 2**24  # a quarter of the 64 MB that Milvus takes or gives at a time, by the same page
METADATA_BYTES = 1024  # of a scan, about: some words and digests
BYTES_OF_A_HIT = 16  # its row and score
DIGESTS_TOGETHER = 8192  # 35 bytes each in an expression


@dataclass(frozen=True)
class MilvusSearch:
    """How Milvus searches: a type of its vector indices, what it is built with (`nlist`, `M`) and searched with
    (`nprobe`, `ef`). FLAT compares all, as the index on disk does by default."""

    index_type: str = "FLAT"
    build: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """What a collection is. end: the row before which its scans lie. recall: at 10, of scans of the gallery itself,
    when it was built; None for FLAT, which is exact, and after an addition."""

    facts: ModelFacts
    dimension: int
    end: int
    method: MilvusSearch
    recall: float | None = None

    def text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def of(cls, text: str) -> Manifest:
        told = json.loads(text)
        if (found := told.pop("format")) != FORMAT:
            raise IndexFormatError(f"found format {found}, expected {FORMAT}")
        facts, method = ModelFacts(**told.pop("facts")), MilvusSearch(**told.pop("method"))
        return cls(facts=facts, method=method, **told)


class MilvusIndex:
    """Build with `build`, open with `load`."""

    def __init__(self, client: MilvusClient, collection: str, manifest: Manifest):
        self.client = client
        self.collection = collection
        self.manifest = manifest

    @property
    def facts(self) -> ModelFacts:
        return self.manifest.facts

    @classmethod
    def build(
        cls,
        embeddings: Tensor,
        metadata: pa.Table,
        facts: ModelFacts,
        place: str,
        collection: str,
        method: MilvusSearch = MilvusSearch(),
        aim: float = AIM,
    ) -> MilvusIndex:
        """Make a collection, which must not be there yet; one that a build left unfinished is made anew.

        Args:
            embeddings, metadata: as for `RetrievalIndex.build`. place: a file `….db` of Milvus Lite, or a server's
                `https://…` or `http://…:19530`, whose token is read from the environment (`MILVUS_TOKEN`).
            aim: recall@10, below which an approximate search is warned of.

        Raises:
            ValueError: if there is no scan, they do not fit, ids repeat, an embedding has no direction, or there is
                such a collection.
        """
        vectors = directions(embeddings)
        metadata = with_all_columns(metadata, len(vectors))
        if not len(vectors):  # what ends at row 0 is unfinished
            raise ValueError(f"{collection}: found no scan, expected some to build an index of")
        client = _connect(place)
        if client.has_collection(collection):
            if _read_manifest(client, collection).end:
                raise ValueError(f"{place}: found a collection {collection}, expected none of that name")
            client.drop_collection(collection)
        manifest = Manifest(facts, vectors.shape[1], 0, method)
        client.create_collection(
            collection,
            schema=_schema(manifest.dimension),
            consistency_level="Strong",  # what was added is found by the next search, whoever searches
            properties={PROPERTY: manifest.text()},
        )
        built = cls(client, collection, manifest)
        built._insert(vectors, metadata)
        client.flush(collection)
        words, nearest = client.prepare_index_params(), client.prepare_index_params()
        for column in DIGESTED:
            words.add_index(f"{column}_digest", index_type="INVERTED")
        nearest.add_index("embedding", index_type=method.index_type, metric_type="IP", params=dict(method.build or {}))
        client.create_index(collection, words, sync=False)
        client.create_index(collection, nearest)  # waits until it is built, else recall would be that of no index
        client.load_collection(collection)
        built.manifest = replace(manifest, end=len(vectors))
        if method.index_type != "FLAT":
            recall = built._recall(vectors)
            if recall < aim:
                logger.warning("%s: recall@10 is %.3f, not %.3f: raise %s", collection, recall, aim, method)
            built.manifest = replace(built.manifest, recall=recall)
        built._publish()
        return built

    @classmethod
    def load(cls, place: str, collection: str, expected: ModelFacts | None = None) -> MilvusIndex:
        """
        Args:
            expected: whose embeddings the queries will be; others are refused.

        Raises:
            IndexFormatError: if there is no such collection, it is no index of ours, unfinished, or another model's.
        """
        client = _connect(place)
        if not client.has_collection(collection):
            raise IndexFormatError(f"{place}: found no collection {collection}, expected an index")
        manifest = _read_manifest(client, collection)
        if not manifest.end:
            raise IndexFormatError(f"{place}: found {collection} unfinished, expected a whole index: build it again")
        if expected is not None and manifest.facts != expected:
            raise IndexFormatError(f"{place}: found embeddings of {manifest.facts}, expected those of {expected}")
        client.load_collection(collection)
        return cls(client, collection, manifest)

    def __len__(self) -> int:
        (counted,) = self.client.query(self.collection, filter=self._before_end(), output_fields=["count(*)"])
        return int(counted["count(*)"])

    def close(self) -> None:
        """Let go of the server, or of the file, which only one process may have open."""
        self.client.close()

    # ------------------------------------------------------------------------------------------------------ searching

    def search(
        self,
        queries: Tensor,
        k: int = 10,
        *,
        where: MetadataFilter | None = None,
        query_patients: Sequence[str] | None = None,
    ) -> Hits:
        """As `RetrievalIndex.search`; of scans as similar as the last hit, any may be missing. Queries of one patient
        go together, so many patients are many searches.

        Raises:
            ValueError: if shapes do not fit, k is not from 1 to 16384, or the filter is larger than a message.
        """
        if queries.ndim != 2 or queries.shape[1] != self.manifest.dimension or not 1 <= k <= MOST_HITS:
            raise ValueError(
                f"queries {tuple(queries.shape)} do not fit {self.manifest.dimension} dimensions, "
                f"or k is {k}, not 1 to {MOST_HITS}"
            )
        expect_of_each_query(query_patients, queries)
        queries = torch.nn.functional.normalize(queries.float(), dim=-1)
        scores = torch.full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1, dtype=torch.int64)
        asking: dict[str, list[int]] = {}
        for place, patient in enumerate([""] * len(queries) if query_patients is None else query_patients):
            asking.setdefault(patient, []).append(place)
        allowed = self._before_end() if where is None else f"{self._before_end()}{_expression(where)}"
        for patient, places in asking.items():
            foreign = f'{allowed} and patient_digest != "{_digest(patient)}"' if patient else allowed
            for some in _batches(places, max(4 * queries.shape[1], BYTES_OF_A_HIT * k)):
                found = self.client.search(
                    self.collection,
                    data=queries[some].tolist(),
                    anns_field="embedding",
                    filter=foreign,
                    limit=k,
                    search_params={"metric_type": "IP", "params": dict(self.manifest.method.search or {})},
                )
                for place, hits in zip(some, found, strict=True):
                    best = sorted((-hit["distance"], hit["row"]) for hit in hits)
                    scores[place, : len(best)] = torch.tensor([-distance for distance, _ in best])
                    rows[place, : len(best)] = torch.tensor([row for _, row in best], dtype=torch.int64)
        return Hits(scores, rows)

    def rows(self, found: Tensor) -> list[dict[str, Any]]:
        """The metadata of rows that a search found, without those that are -1.

        Raises:
            LookupError: if one was removed since it was found.
        """
        wanted = found[found >= 0].flatten().tolist()
        told: dict[int, dict[str, Any]] = {}
        for some in _batches(sorted(set(wanted)), METADATA_BYTES):
            answers = self.client.query(self.collection, filter=f"row in {some}", output_fields=["metadata"])
            told |= {answer["row"]: answer["metadata"] for answer in answers}
        if gone := set(wanted) - set(told):
            raise LookupError(f"{self.collection}: row {min(gone)} was removed since it was found: search again")
        return [told[row] for row in wanted]

    # ------------------------------------------------------------------------------------------------------- changing

    def add(self, embeddings: Tensor, metadata: pa.Table) -> MilvusIndex:
        """The index with these scans too. Who has it open without them goes on without.

        Raises:
            ValueError: as `build` does, or if others were added since this was opened, whose rows these would take.
        """
        vectors = directions(embeddings)
        metadata = with_all_columns(metadata, len(vectors))
        if vectors.shape[1] != self.manifest.dimension:
            raise ValueError(f"embeddings {tuple(vectors.shape)} are not of {self.manifest.dimension} dimensions")
        found, expected = _read_manifest(self.client, self.collection).end, self.manifest.end
        if found != expected:
            raise ValueError(
                f"{self.collection}: found {found} rows, expected {expected} as when it was opened: load it again"
            )
        for digests in _digests(metadata.column("id").to_pylist()):
            filtered = f"{self._before_end()} and id_digest in {digests}"
            if self.client.query(self.collection, filter=filtered, output_fields=["row"], limit=1):
                raise ValueError("ids of a gallery are all there and all different")
        # what an addition left that was cut off
        self.client.delete(self.collection, filter=f"row >= {self.manifest.end}")
        self._insert(vectors, metadata)
        larger = replace(self.manifest, end=self.manifest.end + len(vectors), recall=None)
        added = MilvusIndex(self.client, self.collection, larger)
        added._publish()
        return added

    def remove(self, ids: Collection[str]) -> MilvusIndex:
        """The index without these scans, which nobody finds any more; ids that it does not have are passed over."""
        for digests in _digests(ids):
            self.client.delete(self.collection, filter=f"id_digest in {digests}")
        return self

    def _before_end(self) -> str:
        return f"row < {self.manifest.end}"

    def _insert(self, vectors: Tensor, metadata: pa.Table) -> None:
        for some in _batches(range(len(vectors)), 4 * self.manifest.dimension + METADATA_BYTES):
            told = metadata.slice(some[0], len(some)).to_pylist()
            scans = [
                {"row": self.manifest.end + row, "embedding": vector, "metadata": scan}
                | {f"{column}_digest": _digest(scan[column]) for column in DIGESTED}
                for row, vector, scan in zip(some, vectors[some].float().tolist(), told, strict=True)
            ]
            self.client.insert(self.collection, scans)

    def _publish(self) -> None:
        self.client.alter_collection_properties(self.collection, {PROPERTY: self.manifest.text()})

    def _recall(self, vectors: Tensor) -> float:
        """Of the ten nearest of scans of the gallery, itself left out, the part that is found."""
        tried = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:TRIED_QUERIES]
        queries, itself = vectors[tried].float(), [row[None] for row in tried]
        k = max(1, min(10, len(vectors) - 1))
        truth = search_exactly(vectors, queries, k, itself, bfloat16_rounding(vectors)).rows
        found = self.search(queries, k + 1).rows
        hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True))
        return hits / max(1, truth.numel())


def _connect(place: str) -> MilvusClient:
    return MilvusClient(place, token=os.environ.get(TOKEN, ""))


def _schema(dimension: int) -> Any:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dimension)
    schema.add_field("metadata", DataType.JSON)
    for column in DIGESTED:
        schema.add_field(f"{column}_digest", DataType.VARCHAR, max_length=32)
    return schema


def _read_manifest(client: MilvusClient, collection: str) -> Manifest:
    told = client.describe_collection(collection)["properties"].get(PROPERTY)
    try:
        return Manifest.of(told)
    except IndexFormatError as error:
        raise IndexFormatError(f"{collection}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFormatError(f"found a collection {collection} of others, expected an index") from error


def _digest(word: str | None) -> str:
    """What a word is compared by. Expressions are built of these alone, so no word can be taken for a part of one."""
    return "" if word is None else hashlib.blake2b(word.encode(), digest_size=16).hexdigest()


def _digests(words: Collection[str]) -> Iterator[str]:
    """Lists as an expression has them."""
    digests = sorted({_digest(word) for word in words})
    for start in range(0, len(digests), DIGESTS_TOGETHER):
        yield json.dumps(digests[start : start + DIGESTS_TOGETHER])


def _expression(where: MetadataFilter) -> str:
    """What follows another condition; empty if all are allowed."""
    conditions = []
    for column in ("modality", "anatomy", "source"):
        if (names := getattr(where, column)) is not None:
            alternatives = " or ".join(f"{column}_digest in {digests}" for digests in _digests(names))
            conditions.append(f" and ({alternatives or 'row < 0'})")
    conditions += [f" and patient_digest not in {digests}" for digests in _digests(where.excluded_patients)]
    expression = "".join(conditions)
    if len(expression) > MESSAGE_BYTES:
        raise ValueError(f"found a filter of {len(expression):,} characters, expected at most {MESSAGE_BYTES:,}")
    return expression


def _batches(places: Sequence[int], bytes_each: int) -> Iterator[list[int]]:
    together = max(1, min(MOST_HITS, MESSAGE_BYTES // bytes_each))
    for start in range(0, len(places), together):
        yield list(places[start : start + together])
