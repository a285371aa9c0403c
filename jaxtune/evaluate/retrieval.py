"""Measures of retrieval: for each query a number, from the ranks of what is relevant.

qrels: query -> {document: grade above 0}        rankings: the documents of each query, nearest first
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtune.errors import UserError

DEPTH = 100  # how far rankings go
AT_ONCE = 2**24  # similarities in memory


class Task(NamedTuple):
    """Queries over a corpus.

    Attributes:
        queries, documents: texts.
        relevant: for each query, {document: grade}.
        own: for each query, the document that it is itself, and that is not ranked; -1: none.
        where: the place of each query, in words.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    relevant: Sequence[Mapping[int, float]]
    own: np.ndarray
    where: Sequence[str]


def rank(queries: np.ndarray, documents: np.ndarray, own: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """The nearest documents of each query by dot product, i64[Q, K], nearest first; ties by number.

    Args:
        queries: f32[Q, D].
        documents: f32[M, D].
        own: i64[Q], a document of each query to leave out; -1: none.
        depth: K, at most M (less one where `own` names any).
    """
    depth = min(depth, len(documents) - int((own >= 0).any()))
    found = np.zeros((len(queries), depth), np.int64)
    step = max(1, AT_ONCE // len(documents))
    for at in range(0, len(queries), step):
        scores = queries[at : at + step] @ documents.T
        mine = own[at : at + step]
        scores[np.flatnonzero(mine >= 0), mine[mine >= 0]] = -np.inf
        if depth < scores.shape[1]:
            near = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        else:
            near = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        near = np.sort(near, axis=1)
        order = np.argsort(-np.take_along_axis(scores, near, 1), axis=1, kind="stable")
        found[at : at + step] = np.take_along_axis(near, order, 1)
    return found


def measures(ranking: Sequence[int], relevant: Mapping[int, float]) -> dict[str, float]:
    """The measures of one query, as trec_eval has them: hit@1, recall@10, mrr@10, ndcg@10 (gains are the grades,
    discounted by log2(rank + 1); Järvelin & Kekäläinen 2002) and map@100.
    """
    gains = np.array([relevant.get(int(d), 0.0) for d in ranking])
    hits = gains > 0
    ranks = np.flatnonzero(hits[:10])
    discount = 1 / np.log2(np.arange(2, 12))
    best = np.sort(np.array(list(relevant.values())))[::-1][:10]
    at = np.flatnonzero(hits[:DEPTH])
    precision = (np.arange(len(at)) + 1) / (at + 1)
    return {
        "hit@1": float(hits[:1].sum()),
        "recall@10": float(hits[:10].sum() / len(relevant)),
        "mrr@10": float(1 / (ranks[0] + 1)) if len(ranks) else 0.0,
        "ndcg@10": float((gains[:10] * discount[: len(gains[:10])]).sum() / (best * discount[: len(best)]).sum()),
        "map@100": float(precision.sum() / min(len(relevant), DEPTH)),
    }


def read_beir(folder: Path, split: str = "test") -> Task:
    """Read a corpus in BEIR's layout: corpus.jsonl and queries.jsonl (_id, text, maybe title), qrels/SPLIT.tsv.

    Raises:
        UserError: a file or a field is missing, or an id has no text.
    """
    documents, queries = (_texts(folder / name) for name in ("corpus.jsonl", "queries.jsonl"))
    numbers = {key: i for i, key in enumerate(documents)}
    file = folder / "qrels" / f"{split}.tsv"
    if not file.is_file():
        raise UserError(
            f"{file} does not exist: it says which documents answer which query (query-id, corpus-id, score)."
        )
    relevant: dict[str, dict[int, float]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if number == 1 and not _is_number(fields[-1]):
            continue
        where = f"{file}, line {number}"
        if len(fields) != 3 or not _is_number(fields[2]):
            raise UserError(f"{where}: expected a query id, a document id and a number, divided by tabs.")
        query, document, grade = fields
        for kind, key, known, name in (
            ("query", query, queries, "queries.jsonl"),
            ("document", document, documents, "corpus.jsonl"),
        ):
            if key not in known:
                raise UserError(f"{where}: {kind} {key!r} has no text: there is no such _id in {folder / name}.")
        if float(grade) > 0:
            relevant.setdefault(query, {})[numbers[document]] = float(grade)
    if not relevant:
        raise UserError(f"{file}: no document is relevant to any query (all scores are 0), so nothing can be measured.")
    asked = list(relevant)
    return Task(
        [queries[key] for key in asked],
        list(documents.values()),
        [relevant[key] for key in asked],
        np.array([numbers[key] if documents.get(key) == queries[key] else -1 for key in asked], np.int64),
        [f"{folder / 'queries.jsonl'}, {key}" for key in asked],
    )


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _texts(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise UserError(f"{file} does not exist; a corpus has corpus.jsonl, queries.jsonl and qrels/test.tsv.")
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
            key, text = str(row["_id"]), row["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{where}: expected a JSON object with _id and text.") from None
        if not isinstance(text, str) or not (text.strip() or row.get("title")):
            raise UserError(f"{where}: document {key!r} has no text.")
        found[key] = f"{row.get('title') or ''} {text}".strip()
    return found
