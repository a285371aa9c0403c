"""The losses of embeddings against live sentence-transformers, and gradients through the vectors of a whole batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxtune.hf.vectors import Pooled
from jaxtune.objectives.embedding import LOSSES, Told, Vectors, cosines, embedding, infonce, matryoshka
from jaxtune.train.step import make_eval_step, value_and_grad
from jaxtune.tree import TRAIN, partition

N, D = 7, 12


def vectors(texts, label=(), seed=0, missing=0):
    """Random vectors of N rows, and `missing` rows of weight 0 behind them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N + missing, texts, D)).astype(np.float32)
    label = np.asarray(label, np.float32).reshape(N, -1)
    weights = np.r_[np.ones(N), np.zeros(missing)].astype(np.float32)
    there = np.repeat(weights[:, None], texts, 1)
    same = np.arange(x.shape[0] * texts, dtype=np.int32).reshape(-1, texts)
    return Vectors(x, there, np.pad(label, ((0, missing), (0, 0))), weights, same)


SCORES = np.array([0.1, 0.9, 0.4, 0.4, 1.0, 0.0, 0.7])
CLASSES = np.array([0, 0, 1, 1, 2, 1, 0])
TEACHER = np.random.default_rng(3).normal(size=(N, 3))
# name -> (texts, label, told, their class, its arguments, theirs of the label)
CASES = {
    "infonce": (2, (), Told(0.05), "MultipleNegativesRankingLoss", {"scale": 20.0}),
    "infonce hard": (4, (), Told(0.1), "MultipleNegativesRankingLoss", {"scale": 10.0}),
    "infonce symmetric": (
        *(3, (), Told(0.05), "MultipleNegativesRankingLoss"),
        {"scale": 20.0, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ),
    "cosent": (2, SCORES, Told(0.05), "CoSENTLoss", {"scale": 20.0}),
    "angle": (2, SCORES, Told(0.05), "AnglELoss", {"scale": 20.0}),
    "cosine_mse": (2, SCORES, Told(), "CosineSimilarityLoss", {}),
    "triplet": (3, (), Told(margin=5.0), "TripletLoss", {}),
    "triplet near": (3, (), Told(margin=0.1), "TripletLoss", {"triplet_margin": 0.1}),
    "contrastive": (2, CLASSES % 2, Told(margin=0.5), "ContrastiveLoss", {}),
    "batch_hard": (1, np.stack([CLASSES, CLASSES], 1), Told(margin=0.3), "BatchHardTripletLoss", {"margin": 0.3}),
    "margin_mse": (4, TEACHER, Told(), "MarginMSELoss", {}),
    "margin_mse apart": (3, TEACHER[:, :1], Told(), "MarginMSELoss", {}),
    "kl": (4, TEACHER, Told(2.0), "DistillKLDivLoss", {"temperature": 2.0}),
}


def ours(name):
    loss = LOSSES[name.partition(" ")[0]]
    return partial(loss, symmetric=True) if name.endswith("symmetric") else loss


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' own
@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_sentence_transformers(name, missing):
    import torch
    from sentence_transformers.sentence_transformer import losses

    texts, label, told, theirs, settings = CASES[name]
    v = vectors(texts, label, missing=missing)
    value, grad = jax.jit(jax.value_and_grad(lambda x: ours(name)(v._replace(texts=x), told)))(v.texts)
    x = [torch.tensor(v.texts[:N, i], requires_grad=True) for i in range(texts)]
    wanted = torch.tensor(v.label[:N] if name not in ("batch_hard",) else v.label[:N, 0])
    wanted = wanted[:, 0] if wanted.ndim > 1 and wanted.shape[1] == 1 else wanted
    loss = getattr(losses, theirs)(None, **settings).compute_loss_from_embeddings(x, wanted)
    loss.backward()
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(grad[:N], np.stack([t.grad.numpy() for t in x], 1), atol=1e-5, rtol=1e-5)
    assert not np.asarray(grad[N:]).any()


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' own
def test_matryoshka_is_that_of_sentence_transformers():
    import torch
    from sentence_transformers.sentence_transformer import losses
    from torch.nn.functional import normalize

    v, widths = vectors(2), (4, 8, 12)
    both = jax.value_and_grad(lambda x: matryoshka(infonce, widths)(v._replace(texts=x), Told(0.05)))
    value, grad = jax.jit(both)(v.texts)
    x = [torch.tensor(v.texts[:, i], requires_grad=True) for i in range(2)]
    loss = losses.MultipleNegativesRankingLoss(None)
    total = sum(loss.compute_loss_from_embeddings([normalize(t[:, :w], dim=-1) for t in x], None) for w in widths)
    total.backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-5)
    np.testing.assert_allclose(grad, np.stack([t.grad.numpy() for t in x], 1), atol=1e-5)


def test_texts_that_are_the_same_are_no_negatives_of_each_other():
    """A row whose positive recurs loses that candidate: as if it stood alone."""
    v = vectors(2)
    same = v.same.copy()
    same[1, 1] = same[0, 1]
    logits = np.asarray(cosines(v.texts[:, None, 0], v.texts[None, :, 1])) / 0.05
    logits[0, 1] = logits[1, 0] = -np.inf
    want = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    assert float(infonce(v._replace(same=same), Told(0.05))) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_belongs_to_one_query_is_no_negative_of_it(symmetric):
    """Two rows of one query: neither's document is a negative for the other's query, nor the reverse."""
    v = vectors(2)
    same = v.same.copy()
    same[1, 0] = same[0, 0]
    logits = np.asarray(cosines(v.texts[:, None, 0], v.texts[None, :, 1])) / 0.05
    logits[0, 1] = logits[1, 0] = -np.inf
    want = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    if symmetric:
        want = 0.5 * (want + np.log(np.exp(logits).sum(0)) - np.diag(logits))
    found = infonce(v._replace(same=same), Told(0.05), symmetric=symmetric)
    assert float(found) == pytest.approx(want.mean(), rel=1e-5)


def test_rows_may_have_fewer_negatives():
    v = vectors(4)
    there = v.there.copy()
    there[2:, 3] = 0
    moved = v.texts.copy()
    moved[2:, 3] = 5.0
    a, b = (infonce(v._replace(texts=x, there=there), Told(0.05)) for x in (v.texts, moved))
    assert float(a) == float(b) != float(infonce(v, Told(0.05)))


# ------------------------------------------------------------------------------------------ through micro-batches


def batch(rows, accum, texts=2, length=6, seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.integers(2, length + 1, (rows, texts))
    segments = (np.arange(length) < ends[..., None]).astype(np.int32)
    flat = {
        "tokens": rng.integers(0, small.VOCAB, (rows, texts, length)).astype(np.int32) * segments,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, texts, length)) * segments,
        "segments": segments,
        "there": np.ones((rows, texts), np.float32),
        "same": np.arange(rows * texts, dtype=np.int32).reshape(rows, texts),
        "label": np.zeros((rows, 0), np.float32),
        "weights": np.ones(rows, np.float32),
        "row": np.arange(rows, dtype=np.int32),
    }
    return {k: v.reshape(accum, rows // accum, *v.shape[1:]) for k, v in flat.items()}


def loss_fn():
    return embedding(small.decoder().without_head(), Pooled("last"), infonce)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_micro_batches_give_the_gradients_of_one_batch(dropout):
    part, _ = small.tuned("lora", r=2, lora_dropout=dropout)
    fn = jax.jit(value_and_grad(loss_fn()))
    one, many = (fn(*part, batch(512, accum), jax.random.key(5)) for accum in (1, 32))
    assert float(one[0]) == pytest.approx(float(many[0]), rel=1e-5) and float(one[1]) == float(many[1]) == 512
    assert small.apart(many[2], one[2]) < 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one[2])) > 0


def test_one_batch_gives_the_gradients_of_plain_autodiff():
    params = small.weights()
    part = partition(params, jax.tree.map(lambda x: TRAIN, params))
    fn, given = loss_fn(), batch(8, 1)
    flat = jax.tree.map(lambda x: x[0], given)
    total, _, grads = jax.jit(value_and_grad(fn))(*part, given, None)
    want, direct = jax.jit(jax.value_and_grad(lambda p: fn.alone(p, flat, None)[0][0]))(params)
    assert float(total) == pytest.approx(float(want), rel=1e-6)
    assert small.apart(jax.tree.leaves(grads), jax.tree.leaves(direct)) < 1e-6


def test_micro_batches_hold_the_activations_of_one():
    """32 x 16 plans little more memory than 16 alone, far less than 512 at once."""
    part, _ = small.tuned("full")
    fn = value_and_grad(loss_fn())

    def planned(rows, accum):
        memory = jax.jit(fn).lower(*part, batch(rows, accum, length=32), jax.random.key(0)).compile().memory_analysis()
        return memory.temp_size_in_bytes

    whole, parts, alone = planned(512, 1), planned(512, 32), planned(16, 1)
    assert parts < 3 * alone + 2**21 and parts < whole / 3


def test_evaluation_sees_the_whole_batch():
    part, _ = small.tuned("lora", r=2)
    evaluate = make_eval_step(loss_fn())
    (a, weight, aux), (b, *_) = (evaluate(*part, batch(16, accum)) for accum in (1, 4))
    assert float(a) == pytest.approx(float(b), rel=1e-5) and float(weight) == 16
    assert -1 <= float(aux["means"]["cosine"][0]) / 16 <= 1
