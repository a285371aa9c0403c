"""Hard negatives of training pairs: texts that the model itself takes for near, though they answer something else."""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import data
from jaxtune.config.recipe import open_model
from jaxtune.data.embeddings import TextsForm
from jaxtune.errors import UserError
from jaxtune.evaluate.retrieval import AT_ONCE, rank
from jaxtune.files import atomic_write_text
from jaxtune.infer.vectors import Embedder, open_embedder
from jaxtune.objectives.contrasts import CONTRASTS, NOTHING

DEPTH = 100  # of the nearest documents, how many are looked at


class Mined(NamedTuple):
    """What was found.

    Attributes:
        negatives: for each pair, the numbers of documents, the nearest first.
        near: how many documents were nearer than the margin allows, and may be answers, too.
    """

    negatives: list[list[int]]
    near: int


def mine(
    queries: np.ndarray,
    documents: np.ndarray,
    positive: Sequence[int],
    known: Sequence[frozenset[int]],
    count: int,
    margin: float = 0.05,
) -> Mined:
    """Find the nearest documents of each query that are less alike than its positive by a share of that one's cosine.

    A document that is nearer is likely an answer that nobody labelled, a false negative (Moreira et al. 2024,
    NV-Retriever, arXiv:2407.15831, section 4.1: TopK-PercPos, where 0.95 did best).

    Args:
        queries: f32[N, D], of length 1.
        documents: f32[M, D], of length 1.
        positive: for each query, the number of its positive.
        known: for each query, all documents that are no negatives: its positives, and itself.
        count: negatives of a query, at most.
        margin: kept are cosines c <= p - margin |p|, p that of the positive.
    """
    own = (queries * documents[np.asarray(positive)]).sum(-1)
    highest = own - margin * np.abs(own)
    near, negatives = 0, []
    step = max(1, AT_ONCE // len(documents))
    for at in range(0, len(queries), step):
        part = queries[at : at + step]
        ranking = rank(part, documents, np.full(len(part), -1), min(DEPTH, len(documents)))
        scores = np.take_along_axis(part @ documents.T, ranking, 1)
        for i, (ranks, found) in enumerate(zip(ranking.tolist(), scores), at):
            others = [(d, s) for d, s in zip(ranks, found) if d not in known[i]]
            far = [d for d, s in others if s <= highest[i]]
            near += len(others) - len(far)
            negatives.append(far[:count])
    return Mined(negatives, near)


def mine_negatives(cfg: Any, out: Path, count: int, margin: float) -> list[str]:
    """Write the training pairs of a config with hard negatives that its model finds; return sentences on them.

    The rows keep their columns; negatives that they have come first.

    Args:
        cfg: a resolved config of objective.name=embedding, with a loss of pairs.
        out: the .jsonl file.
        count: mined negatives of a row, at most.
        margin: see `mine`.

    Raises:
        UserError: the config is for no pairs, or nothing was found.
    """
    if cfg.objective.name != "embedding" or CONTRASTS[cfg.objective.contrast].label != NOTHING:
        raise UserError(
            "--mine-negatives takes pairs of texts that belong together: objective.name=embedding with "
            "objective.contrast=infonce or triplet."
        )
    most = CONTRASTS[cfg.objective.contrast].most
    if most is not None and count > most - 2:
        raise UserError(
            f"--negatives={count}: objective.contrast={cfg.objective.contrast} reads {most - 2} a row; give "
            f"--negatives={most - 2}, or choose infonce."
        )
    _, task = open_model(cfg)
    form = task.form
    plain = dataclasses.replace(form, contrast="infonce", reads=CONTRASTS["infonce"], prefixes=("", ""))
    rows, texts, column = _read(cfg.data.train, plain)
    embedder = open_embedder(cfg.model.adapter or cfg.model.path)
    embedder = embedder._replace(pooled=dataclasses.replace(task.result, dense=embedder.pooled.dense))
    documents = list(dict.fromkeys(text for row in texts for text in row[1:]))
    if len(documents) < 2:
        raise UserError("--mine-negatives: all rows have the same second text, and there is nothing to choose from.")
    number = {text: i for i, text in enumerate(documents)}
    answers = defaultdict(set)
    for query, second, *_ in texts:
        answers[query].add(number[second])
    known = [
        frozenset(answers[row[0]] | {number[text] for text in row[2:]} | {number.get(row[0], -1)}) for row in texts
    ]
    asked = list(dict.fromkeys(row[0] for row in texts))
    vectors = dict(zip(asked, _unit(embedder, asked, form.prefixes[0])))
    found = mine(
        np.stack([vectors[row[0]] for row in texts]),
        _unit(embedder, documents, form.prefixes[1]),
        [number[row[1]] for row in texts],
        known,
        count,
        margin,
    )
    lines = []
    for row, own, negatives in zip(rows, texts, found.negatives):
        given = [*own[2:], *(documents[i] for i in negatives)]
        if given or most is None:
            lines.append(json.dumps(row | {column: given}, ensure_ascii=False, default=str) + "\n")
    each = Counter(map(len, found.negatives))
    if not lines or each.keys() == {0}:
        raise UserError(f"--mine-negatives: no document lies below the margin of {margin:g}; lower --margin.")
    atomic_write_text(out, "".join(lines))
    said = [
        f"negatives: {sum(n * k for n, k in each.items()):,} of {len(texts):,} rows, found among {len(documents):,} "
        f"documents; {found.near:,} were within {margin:.0%} of the positive's cosine and may be answers: left out",
        f"written: {out} ({len(lines):,} rows)",
    ]
    if each[0]:
        said.insert(1, f"rows without any: {each[0]:,}" + (", left out" if most is not None else ""))
    return said


def _read(sources: str | Sequence[str], form: TextsForm) -> tuple[list[dict], list[tuple[str, ...]], str]:
    """The rows of data.train without their columns of negatives, the texts of each, and the column for negatives."""
    rows, texts, column = [], [], form.columns.get("negative", "negative")
    for name in data.source_names(sources):
        source = data.read(name)
        reader, (_, negatives, _) = form.reader(source), form.theirs(source)
        for number, row in source:
            texts.append(reader.convert(source.where(number), row).texts)
            rows.append({key: value for key, value in row.items() if key not in negatives})
    return rows, texts, column


def _unit(embedder: Embedder, texts: Sequence[str], prompt: str) -> np.ndarray:
    """Vectors of texts, of length 1."""
    found = embedder(texts, prompt)
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
