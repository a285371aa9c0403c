"""Short rows of a batch, several in a line: the losses and gradients of a line each, with less padding."""

from functools import partial

import jax
import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import data, models
from jaxtune.data.embeddings import TextsAssembler
from jaxtune.data.label_rows import LabelAssembler
from jaxtune.data.lines import dealt, most_segments
from jaxtune.data.reranking import TYPE, RankAssembler
from jaxtune.hf.vectors import Pooled
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, TOKEN, Labels, with_labels
from jaxtune.objectives.classification import classification
from jaxtune.objectives.embedding import embedding, infonce
from jaxtune.objectives.reranking import pairwise, reranking
from jaxtune.train.step import value_and_grad
from jaxtune.tree import TRAIN, partition

BERT = {
    **{"model_type": "bert", "vocab_size": small.VOCAB, "hidden_size": 16, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3},
    **{"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}
COUNT, BATCH = 64, 16


def rows_of(texts, mark, size, seed=0):
    """Rows of 1 to `texts` texts of 2 to 9 tokens; `mark(number of a text, places)` are a text's marks."""
    rng = np.random.default_rng(seed)
    tokens, marks, length = [], [], []
    for _ in range(COUNT):
        each = rng.integers(2, 10, rng.integers(min(2, texts), texts + 1))
        length.append(each.sum())
        tokens.append(rng.integers(0, small.VOCAB, each.sum()))
        marks += [mark(k + 1, np.arange(n)) for k, n in enumerate(each)]
    start = np.r_[0, np.cumsum(length)[:-1]]
    return data.Rows(
        tokens=np.concatenate(tokens).astype(np.int32),
        mask=np.concatenate(marks).astype("u1"),
        start=start.astype(np.int64),
        length=np.array(length, np.int32),
        origin=np.arange(1, COUNT + 1),
        source=np.zeros(COUNT, np.int32),
        digest=np.arange(COUNT, dtype=np.uint64),
        labels=("row {}",),
        target=rng.integers(0, 3, (COUNT, size)).astype(np.float32),
    )


def number(k, at):
    return np.full(len(at), k)


def labelled(kind, pooling, config=BERT):
    labels = Labels(kind, ("a", "b", "c"), PROBLEMS[0], pooling)
    module = with_labels(models.build(config), labels)
    return module, classification(module)


def vectors(pooling):
    module = small.decoder().without_head() if pooling == "last" else models.build(BERT)
    return module, embedding(module, Pooled(pooling), infonce)


def ranked():
    module = with_labels(models.build(BERT), Labels(SEQUENCE, ("score",), PROBLEMS[2]))
    return module, reranking(module, pairwise)


CASES = {
    "labels, cls": (LabelAssembler, lambda: rows_of(1, number, 1), partial(labelled, SEQUENCE, None)),
    "labels, mean": (LabelAssembler, lambda: rows_of(1, number, 1), partial(labelled, SEQUENCE, "mean")),
    "labels, decoder": (LabelAssembler, lambda: rows_of(1, number, 1), partial(labelled, SEQUENCE, None, small.CONFIG)),
    "labels of tokens": (LabelAssembler, lambda: rows_of(1, lambda k, at: at % 4, 0), partial(labelled, TOKEN, None)),
    "vectors": (TextsAssembler, lambda: rows_of(4, number, 0), partial(vectors, "mean")),
    "vectors, decoder": (TextsAssembler, lambda: rows_of(4, number, 0), partial(vectors, "last")),
    "rankings": (RankAssembler, lambda: rows_of(3, lambda k, at: k + TYPE * (at > 3), 3), ranked),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_a_line_each(name):
    assembler, rows, task = CASES[name]
    module, loss_fn = task()
    params = jax.jit(module.init_params)(jax.random.key(0))
    part = partition(params, jax.tree.map(lambda x: TRAIN, params))
    fn, found = jax.jit(value_and_grad(loss_fn)), []
    for packing in (False, True):
        stream = data.EvalBatches(
            rows(), batch_size=BATCH, grad_accum=2, max_length=64, assembler=assembler, packing=packing
        )
        # The last batch lacks rows, too.
        stream._plan = stream._plan[: 2 * BATCH - 3]
        found.append([(batch, fn(*part, batch, None)) for batch in stream])
    for (wide, want), (batch, got) in zip(*found, strict=True):
        np.testing.assert_allclose(got[:2], want[:2], rtol=2e-6)
        assert small.apart(got[2], want[2]) < 1e-5
        assert batch["tokens"].size < 0.8 * wide["tokens"].size


@given(st.lists(st.integers(0, 60), min_size=1, max_size=32), st.integers(1, 8))
def test_rows_are_dealt_once_and_evenly(length, count):
    length, count = np.array(length), min(count, len(length))
    most = most_segments(len(length), count)
    lines = dealt(length, count, most)
    assert sorted(row for line in lines for row in line) == list(range(len(length)))
    assert len(lines) == count and max(map(len, lines)) <= most


def test_lines_divide_the_rows_of_a_device():
    rows = rows_of(1, number, 1)
    for parts, accum in ((1, 1), (4, 1), (4, 2), (16, 1)):
        laid = LabelAssembler([rows], BATCH, accum, 64, True, parts=parts)
        batch = laid.assemble(np.arange(BATCH)[:, None])
        lines, each = batch["tokens"].shape[1] // parts, BATCH // parts // accum
        assert batch["tokens"].shape[:2] == (accum, lines * parts) and lines <= each
        assert batch["place"].max() < lines * most_segments(each, lines)
    # A batch longer than any that was drawn has a width, too.
    longest = np.argsort(-rows.length, kind="stable")[:BATCH, None]
    laid = LabelAssembler([rows], BATCH, 1, 64, True)
    assert (laid.assemble(longest)["segments"] > 0).sum() == rows.length[longest].sum()
