"""Which training rows a prompt shows as examples, and what they answer by themselves."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import UserError

Search = Callable[[str, int], list[tuple[int, float]]]  # (text, k) -> the k most similar (index, score), best first


def at_random(count: int, k: int) -> list[int]:
    """The first k of rows that are in an order of chance."""
    return list(range(min(k, count)))


def balanced(labels: Sequence[str], k: int) -> list[int]:
    """k rows, of each label in turn."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        by_label[label].append(i)
    turns = chain.from_iterable(zip_longest(*by_label.values()))
    return [i for i in turns if i is not None][:k]


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def bm25(texts: Sequence[str]) -> Search:
    """Search by BM25 (Robertson et al. 1994; Lucene's form) over words."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it says each step, as DEBUG
    index = bm25s.BM25()
    index.index([words(text) or ["-"] for text in texts], show_progress=False)

    def search(text: str, k: int) -> list[tuple[int, float]]:
        scores = index.get_scores(known) if (known := [w for w in words(text) if w in index.vocab_dict]) else None
        return _best(np.zeros(len(texts)) if scores is None else scores, k)

    return search


def encoder(folder: Path, texts: Sequence[str]) -> Search:
    """Search by the cosine of an encoder's mean-pooled states.

    Args:
        folder: of the encoder, with its tokenizer.
        texts: to search among.

    Raises:
        UserError: it is no encoder.
    """
    embed = embedder(folder)
    known = embed(texts)

    def search(text: str, k: int) -> list[tuple[int, float]]:
        return _best(known @ embed([text])[0], k)

    return search


def check_encoder(folder: Path) -> None:
    """Raise UserError unless the directory's config.json is an encoder's; no weights are read."""
    from jaxtune.hf.load import open_module, read_config, resolve

    where = resolve(folder)
    if not open_module(read_config(where), where).is_encoder:
        raise UserError(f"--encoder={folder} continues text; name an encoder, such as a sentence encoder.")


def embedder(folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """Load an encoder: texts -> their mean-pooled states of length 1, f32[N, D]."""
    import jax
    import jax.numpy as jnp

    from jaxtune.data import load_tokenizer
    from jaxtune.hf.load import load, resolve
    from jaxtune.infer.generation import bucket
    from jaxtune.infer.logprobs import batches_by_length, most_tokens
    from jaxtune.models.classifier import pool

    check_encoder(folder)
    module, params = load(folder, dtype=jnp.float32)
    body, tokenizer = getattr(module, "body", module), load_tokenizer(str(resolve(folder)))
    most = module.spec.positions

    @jax.jit
    def states(params, tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = body.apply({"params": params}, tokens, positions, segments, method="hidden")
        pooled = pool(hidden, segments, "mean")
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    def embed(texts: Sequence[str]) -> np.ndarray:
        ids: list[Any] = tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
        found = np.zeros((len(texts), module.spec.width), np.float32)
        for batch in batches_by_length([len(row) for row in ids], most_tokens()):
            width = min(bucket(max(len(ids[i]) for i in batch)), most)
            tokens, segments = np.zeros((2, 1 << (len(batch) - 1).bit_length(), width), np.int32)
            for row, i in enumerate(batch):
                tokens[row, : len(ids[i])], segments[row, : len(ids[i])] = ids[i], 1
            found[batch] = np.asarray(states(params, tokens, segments))[: len(batch)]
        return found

    return embed


def vote(found: Sequence[tuple[int, float]], answers: Sequence[str]) -> str:
    """The answer that the found rows give together, each weighted by its similarity; of a tie, the nearest one's."""
    votes: dict[str, float] = defaultdict(float)
    for i, similarity in found:
        votes[answers[i]] += max(similarity, 0.0) + 1e-9
    return max(votes, key=votes.__getitem__)


def _best(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    order = np.argsort(-scores, kind="stable")[:k]
    return [(int(i), float(scores[i])) for i in order]
