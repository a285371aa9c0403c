"""Log-probabilities of given tokens, in batches of few shapes; logits exist for a chunk of positions at a time."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.infer.generation import bucket
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.token_nats import chunk_size, token_nats
from jaxtune.train.processes import on_host
from jaxtune.weights.adapters import virtual_tokens

Array = jax.Array


class Shape(NamedTuple):
    """The shape of a batch of tokens."""

    rows: int
    width: int


@partial(jax.jit, static_argnames="module")
def token_logprobs(
    module: Any,
    params: Any,
    tokens: Array,
    targets: Array,
    where: Array | None = None,
    source: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """For tokens i32[B, T]: (log-probability of the target after each f32[B, T], is it the most probable bool[B, T]).

    `targets`: i32[B, T]. Rows are padded on the right. Where `where` [B, T] is False the result is 0; None: nowhere.
    `source`: of an encoder-decoder, as for `hidden`.
    """
    read = {} if source is None else {"source": source}
    hidden = module.apply({"params": params}, tokens, **read, method="hidden")
    return head_logprobs(module, params, hidden, targets, where)


def head_logprobs(
    module: Any, params: Any, hidden: Array, targets: Array, where: Array | None = None
) -> tuple[Array, Array]:
    """Hidden states [B, T, D], targets i32[B, T] -> (log-probabilities f32[B, T], is it the likeliest? bool[B, T])."""
    project = partial(head_logits, spec=module.spec)
    nats, likeliest = token_nats(project, head_leaf(params), hidden, targets, where, also=_is_likeliest)
    return -nats, likeliest


def _is_likeliest(logits: Array, targets: Array) -> Array:
    return jnp.argmax(logits, axis=-1) == targets


def batches_by_length(lengths: Sequence[int], most_tokens: int, most_rows: int = 256) -> list[list[int]]:
    """Indices in batches of rows of similar length, the longest first.

    A batch has at most `most_rows` rows and, padded, `most_tokens` tokens, but at least one row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    at = 0
    while at < len(order):
        room = max(1, min(most_rows, most_tokens // bucket(max(1, lengths[order[at]]))))
        rows = 1 << (room.bit_length() - 1)  # a power of two: few shapes
        batches.append(order[at : at + rows])
        at += rows
    return batches


def shapes(lengths: Sequence[int], batches: Sequence[Sequence[int]], room: int, positions: int) -> list[Shape]:
    """The shape to which each of `batches_by_length` is padded: few, since each is compiled.

    Batches of a shape are padded to the one before it if all together grow by no more than `room` tokens (see
    `worth_a_compile`). With many batches of each shape, none is padded further.
    """
    own = []
    for batch in batches:
        longest = max(1, *(lengths[i] for i in batch))
        step = max(16, 1 << (longest - 1).bit_length() >> 4)
        own.append(Shape(1 << (len(batch) - 1).bit_length(), min(-(-longest // step) * step, positions)))
    counts, taken = Counter(own), {}
    for shape in counts:  # the widest first
        last = next(reversed(taken.values()), shape)
        holds = last.rows >= shape.rows and last.width >= shape.width
        grown = counts[shape] * (last.rows * last.width - shape.rows * shape.width)
        taken[shape] = last if holds and grown <= room else shape
    return [taken[shape] for shape in own]


def worth_a_compile(params: Any) -> int:
    """How many tokens a model reads in the time that a new shape takes to compile: many for a small model.

    Compiling takes 0.7 s; a token takes two operations a parameter, at speeds that are rough estimates.
    """
    speed = 5e10 if jax.default_backend() == "cpu" else 2e14
    return int(0.7 * speed / (2 * sum(leaf.size for leaf in jax.tree.leaves(params))))


def score_batch(
    module: Any,
    params: Any,
    rows: Sequence[Sequence[int]],
    shape: Shape | None = None,
    masks: Sequence[Sequence[bool]] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row of n tokens, of all but the first: log-probability f64[n - 1], is it the most probable bool[n - 1].

    A soft prompt is put before each row.

    Args:
        module: a decoder.
        params: its parameters.
        rows: token ids, two or more a row.
        shape: (rows, tokens) that the batch is padded to; default: chosen from the rows.
        masks: for each row n - 1 truth values, which tokens to score; the others are 0. None: all.

    Raises:
        UserError: a row is longer than the model's positions.
    """
    if module.reads_source:
        return _score_targets(module, params, rows, masks)
    prefix = virtual_tokens(params)
    longest = len(prefix) + max(len(row) - 1 for row in rows)
    _check_length(longest, len(prefix), module)
    size, width = shape or (1 << (len(rows) - 1).bit_length(), min(bucket(longest), module.spec.positions))
    tokens, targets = np.zeros((2, size, width), np.int32)
    where, spans = np.zeros((size, width), bool), []
    for i, row in enumerate(rows):
        whole = [*prefix, *row]
        tokens[i, : len(whole) - 1], targets[i, : len(whole) - 1] = whole[:-1], whole[1:]
        spans.append(slice(len(prefix), len(prefix) + len(row) - 1))
        where[i, spans[-1]] = True if masks is None else masks[i]
    logprobs, greedy = map(on_host, token_logprobs(module, params, tokens, targets, where))
    return [(logprobs[i, span].astype(np.float64), greedy[i, span]) for i, span in enumerate(spans)]


def _score_targets(
    module: Any, params: Any, rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`score_batch` of rows whose scored tokens are the target, behind the source that an encoder reads."""
    at = [int(np.argmax(mask)) + 1 for mask in masks]
    size = 1 << (len(rows) - 1).bit_length()
    longest = max(at), max(len(row) - start for row, start in zip(rows, at, strict=True))
    source, read = np.zeros((2, size, bucket(longest[0])), np.int32)
    tokens, targets, where = np.zeros((3, size, bucket(longest[1])), np.int32)
    tokens[:, 0], read[:, 0] = module.spec.start, 1
    for i, (row, start) in enumerate(zip(rows, at, strict=True)):
        n = len(row) - start
        source[i, :start], read[i, :start], targets[i, :n], where[i, :n] = row[:start], 1, row[start:], 1
        tokens[i, 1:n] = row[start:-1]
    scored = token_logprobs(module, params, tokens, targets, where > 0, (source, read))
    logprobs, greedy = map(on_host, scored)
    found = []
    for i, (row, start) in enumerate(zip(rows, at, strict=True)):
        before, n = np.zeros(start - 1), len(row) - start
        found.append((np.concatenate([before, logprobs[i, :n]]), np.concatenate([before > 0, greedy[i, :n]])))
    return found


# ------------------------------------------------------------------------------------------- one model against another


class Beside(NamedTuple):
    """What two models give each token of a row, f64[n].

    Attributes:
        base, tuned: -log of the probability.
        kl: of the tuned model's next-token distribution from the base's, KL(tuned || base), in nats.
    """

    base: np.ndarray
    tuned: np.ndarray
    kl: np.ndarray


@partial(jax.jit, static_argnames=("modules", "size"))
def _beside(modules, params, tokens, at, targets, size: int) -> tuple[Array, Array, Array]:
    """Nats of both models and their divergence, f32[n] each, `size` tokens at a time: n is a multiple of it.

    Args:
        modules: of the base and of the tuned model.
        params: of both.
        size: tokens in a chunk.
        tokens: of each, i32[B, T]; they differ where a soft prompt lies before the rows.
        at: of each, the flat positions whose logits count, i32[n].
        targets: i32[n].
    """

    def states(module, own, ids, where):
        hidden = module.apply({"params": own}, ids, method="hidden")
        return hidden.reshape(-1, hidden.shape[-1])[where].reshape(-1, size, hidden.shape[-1])

    def chunk(each):
        *hidden, target = each
        logits = [head_logits(head_leaf(p), h, m.spec) for m, p, h in zip(modules, params, hidden, strict=True)]
        common = min(x.shape[-1] for x in logits)  # tokens that tuning added have no probability under the base
        base, tuned = (jax.nn.log_softmax(x[:, :common]) for x in logits)
        nats = [-jnp.take_along_axis(x, target[:, None], 1)[:, 0] for x in (base, tuned)]
        return *nats, jnp.sum(jnp.exp(tuned) * (tuned - base), axis=-1)

    hidden = [states(*each) for each in zip(modules, params, tokens, at, strict=True)]
    found = jax.lax.map(chunk, (*hidden, targets.reshape(-1, size)))
    return jax.tree.map(lambda x: x.reshape(-1), found)


def beside(
    modules: tuple[Any, Any],
    params: tuple[Any, Any],
    rows: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
) -> list[Beside]:
    """Score tokens under a base and a tuned model in one pass; logits exist for a chunk of tokens at a time.

    Args:
        modules: (the base's, the tuned model's).
        params: (the base's, the tuned model's).
        rows: token ids.
        masks: for each row of n tokens n - 1 truth values, which of those but the first to score.

    Returns:
        Of each row, what the scored tokens have.

    Raises:
        UserError: a row is longer than the models' positions.
    """
    laid = [_laid(m, p, rows) for m, p in zip(modules, params, strict=True)]
    counts = [int(np.sum(mask)) for mask in masks]
    n = 1 << max(0, sum(counts) - 1).bit_length()  # few shapes
    size = min(chunk_size(n, modules[0].spec.vocab), n)
    padded = size * (1 << (-(-n // size) - 1).bit_length())
    targets = np.zeros(padded, np.int32)
    scored = [np.flatnonzero(mask) for mask in masks]
    if sum(counts):
        targets[: sum(counts)] = np.concatenate([np.asarray(r)[s + 1] for r, s in zip(rows, scored, strict=True)])
    at = []
    for tokens, prefix in laid:
        own = np.zeros(padded, np.int32)
        if sum(counts):
            own[: sum(counts)] = np.concatenate([i * tokens.shape[1] + prefix + s for i, s in enumerate(scored)])
        at.append(own)
    found = _beside(tuple(modules), tuple(params), tuple(t for t, _ in laid), tuple(at), targets, size)
    parts = [np.split(on_host(x).astype(np.float64)[: sum(counts)], np.cumsum(counts)[:-1]) for x in found]
    return [Beside(*row) for row in zip(*parts, strict=True)]


def _laid(module: Any, params: Any, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, int]:
    """(the rows but for their last tokens, behind a soft prompt, i32[B, T]; the length of that)."""
    prefix = virtual_tokens(params)
    longest = len(prefix) + max(len(row) - 1 for row in rows)
    _check_length(longest, len(prefix), module)
    tokens = np.zeros((1 << (len(rows) - 1).bit_length(), min(bucket(longest), module.spec.positions)), np.int32)
    for i, row in enumerate(rows):
        whole = [*prefix, *row][:-1]
        tokens[i, : len(whole)] = whole
    return tokens, len(prefix)


def _check_length(longest: int, virtual: int, module: Any) -> None:
    """Raise UserError where `longest` tokens, `virtual` of them a soft prompt's, exceed the positions."""
    most = module.spec.positions
    if longest > most:
        soft = f", {virtual} of them virtual," if virtual else ""
        raise UserError(f"A row has {longest + 1:,} tokens{soft} and the model has {most:,} positions; shorten it.")


def most_tokens() -> int:
    """Tokens of a batch that keep the device busy without filling its memory."""
    return 4096 if jax.default_backend() == "cpu" else 32768
