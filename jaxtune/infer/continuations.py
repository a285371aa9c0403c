"""Log-probabilities of continuations, many of which share a context: each context is read once.

contexts [C, P] --prefill--> cache [C, S] --a copy for each continuation--> cache [R, S]
continuations [R, T], from the last token of their context on, over those slots
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.infer.logprobs import (
    batches_by_length,
    head_logprobs,
    most_tokens,
    score_batch,
    shapes,
    worth_a_compile,
)
from jaxtune.train.processes import on_host
from jaxtune.weights.adapters import virtual_tokens

Array = jax.Array
Pair = tuple[Sequence[int], Sequence[int]]  # the ids of a context, at least one, and of what follows it
MOST_ROWS = 256
WORTH_SHARING = 0.75  # the most tokens, as a share of those of full rows, for sharing to pay
BY_LENGTH = (
    "dynamic",
    "longrope",
)  # ropes that depend on the length of the text, which differs between rows of a shared context


Score = tuple[float, bool]  # the log-probability of a continuation, and whether it is the greedy one


def scorer(
    module: Any, params: Any, pairs: Sequence[Pair]
) -> tuple[list[list[int]], Callable[[Sequence[int]], list[Score]]]:
    """How to score pairs: batches of indices, and a function that scores one batch.

    Raises:
        UserError: a pair is longer than the model's positions.
    """
    prefix, most = len(virtual_tokens(params)), module.spec.positions
    lengths = [prefix + len(context) + len(new) - 1 for context, new in pairs]
    apart = module.reads_source  # source and target have positions of their own
    if max((max(map(len, pair)) for pair in pairs) if apart else lengths, default=0) > most:
        raise UserError(
            f"A context and what follows it have {max(lengths) + 1:,} tokens, and the model has {most:,} positions."
        )
    if sharing_pays(module, params, pairs):
        planned = {batch.groups[0][0]: batch for batch in shared_batches(module, params, pairs)}
        return (
            [batch.members for batch in planned.values()],
            lambda members: score_shared(module, params, pairs, planned[members[0]]),
        )
    batches = batches_by_length(lengths, most_tokens())
    padded = shapes(lengths, batches, worth_a_compile(params), most)
    shape = {batch[0]: shape for batch, shape in zip(batches, padded, strict=True)}

    def whole(members: Sequence[int]) -> list[Score]:
        rows = [[*pairs[i][0], *pairs[i][1]] for i in members]
        starts = [len(pairs[i][0]) - 1 for i in members]
        masks = [[at >= start for at in range(len(row) - 1)] for row, start in zip(rows, starts, strict=True)]
        scored = score_batch(module, params, rows, shape[members[0]], masks)
        return [(float(p[at:].sum()), bool(g[at:].all())) for at, (p, g) in zip(starts, scored, strict=True)]

    return batches, whole


class GroupShape(NamedTuple):
    """The shape of a batch: contexts, tokens of each, continuations, tokens of each."""

    contexts: int
    width: int
    rows: int
    length: int


class Batch(NamedTuple):
    """Indices of pairs grouped by shared context, and the shape that the arrays are padded to."""

    groups: list[list[int]]
    shape: GroupShape

    @property
    def members(self) -> list[int]:
        return [i for group in self.groups for i in group]


@partial(jax.jit, static_argnames="module")
def shared_logprobs(
    module: Any, params: Any, contexts: Array, owners: Array, starts: Array, tokens: Array, targets: Array, where: Array
) -> tuple[Array, Array]:
    """Log-probabilities of targets, f32[R, T], and whether each is the most probable token, bool[R, T].

    Args:
        module: a decoder.
        params: its parameters.
        contexts: i32[C, P], padded on the right.
        owners: i32[R], the context of each row.
        starts: i32[R], the position of each row's first token; tokens of the context from there on are not seen.
        tokens: i32[R, T], the inputs that follow the context.
        targets: i32[R, T], the token to score after each input.
        where: bool[R, T], which of them to compute.
    """
    spec, (count, width), length = module.spec, contexts.shape, tokens.shape[1]
    slots = min(width + length, spec.positions)
    _, cache = module.apply({"params": params}, contexts, cache=module.init_cache(count, slots), method="hidden")
    cache = jax.tree.map(lambda x: x[:, owners], cache)
    positions = starts[:, None] + jnp.arange(length)
    hidden, _ = module.apply({"params": params}, tokens, positions, cache=cache, method="hidden")
    return head_logprobs(module, params, hidden, targets, where)


def sharing_pays(module: Any, params: Any, pairs: Sequence[Pair]) -> bool:
    """Whether reading each context once saves enough tokens to outweigh its larger program."""
    if module.reads_source:  # a context is its source
        return False
    if any(block.rope and block.rope.kind in BY_LENGTH for s in module.spec.segments for block in s.pattern):
        return False
    whole = sum(len(context) + len(continuation) for context, continuation in pairs)
    shared = sum(map(len, {tuple(context) for context, _ in pairs})) + sum(len(new) for _, new in pairs)
    return shared <= WORTH_SHARING * whole and whole - shared > worth_a_compile(params) // 2


def shared_batches(module: Any, params: Any, pairs: Sequence[Pair]) -> list[Batch]:
    """Pairs in batches of few shapes: by the length of their continuations, then by that of their contexts."""
    room, prefix = worth_a_compile(params), len(virtual_tokens(params))
    batches = []
    for groups in _by_length(pairs, room):
        longest = max(1, *(len(pairs[i][1]) for group in groups for i in group))
        length = min(_rounded(longest, 4), module.spec.positions)
        batches += _cut(module, pairs, groups, length, prefix, room)
    taken: list[GroupShape] = []
    padded = []
    for groups, shape in batches:
        grown = sum(s == shape for _, s in batches)
        fits = [s for s in taken if all(a >= b for a, b in zip(s, shape, strict=True))]
        best = min(fits, key=_tokens, default=None)
        if best is None or grown * (_tokens(best) - _tokens(shape)) > room:
            best = shape
            taken.append(shape)
        padded.append(Batch(groups, best))
    return padded


def score_shared(module: Any, params: Any, pairs: Sequence[Pair], batch: Batch) -> list[Score]:
    """The scores of a batch's members."""
    prefix, most = virtual_tokens(params), module.spec.positions
    size, width, rows, length = batch.shape
    contexts, (tokens, targets) = np.zeros((size, width), np.int32), np.zeros((2, rows, length), np.int32)
    owners, starts = np.zeros((2, rows), np.int32)
    where = np.zeros((rows, length), bool)
    spans = []
    for owner, group in enumerate(batch.groups):
        context = [*prefix, *pairs[group[0]][0]]
        contexts[owner, : len(context) - 1] = context[:-1]
        for i in group:
            row, whole = len(spans), [*context, *pairs[i][1]]
            # A row starts at the last token of its context, or earlier, so that its padding has positions too.
            start = min(len(context) - 1, most - length)
            inputs = len(whole) - 1 - start
            owners[row], starts[row] = owner, start
            tokens[row, :inputs], targets[row, :inputs] = whole[start:-1], whole[start + 1 :]
            spans.append(slice(inputs - len(pairs[i][1]), inputs))
            where[row, spans[-1]] = True
    scored = shared_logprobs(module, params, contexts, owners, starts, tokens, targets, where)
    logprobs, greedy = map(on_host, scored)
    return [
        (float(logprobs[row, span].sum(dtype=np.float64)), bool(greedy[row, span].all()))
        for row, span in enumerate(spans)
    ]


def _by_length(pairs: Sequence[Pair], room: int) -> list[list[list[int]]]:
    """Groups of pairs with the same context, split where padding continuations would cost more than a compile."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    classes: dict[int, list[list[int]]] = {}
    for group in groups.values():
        longest = max(1, *(len(pairs[i][1]) for i in group))
        classes.setdefault(1 << (longest - 1).bit_length(), []).append(group)
    found: list[list[list[int]]] = []
    width = 0
    for longest in sorted(classes, reverse=True):
        rows = sum(map(len, classes[longest]))
        if found and rows * (width - longest) <= room:
            found[-1] += classes[longest]
        else:
            found.append(classes[longest])
            width = longest
    return found


def _cut(module, pairs, groups, length: int, prefix: int, room: int) -> list[tuple[list[list[int]], GroupShape]]:
    """Batches of groups, the longest contexts first, and their own shapes."""
    slot = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: module.init_cache(1, 1))))

    def width(group):
        return min(_rounded(max(1, prefix + len(pairs[group[0]][0]) - 1), 16), module.spec.positions)

    groups = sorted(groups, key=width, reverse=True)
    widest = width(groups[0])
    one_width = sum(widest - width(group) for group in groups) <= room

    def shape(batch):
        wide = widest if one_width else width(batch[0])
        return GroupShape(_rounded(len(batch), 4), wide, _rounded(sum(map(len, batch)), 4), length)

    def fits(batch):
        size, wide, rows, _ = shape(batch)
        return (
            size * wide <= most_tokens()
            and rows <= MOST_ROWS
            and rows * length <= most_tokens()
            and rows * (wide + length) * slot <= most_bytes()
        )

    batches: list[list[list[int]]] = [[]]
    for group in groups:
        # A context with more continuations than fit in a batch is read again.
        for part in _parts(group, lambda part: fits([part])):
            if batches[-1] and not fits([*batches[-1], part]):
                batches.append([])
            batches[-1].append(part)
    return [(batch, shape(batch)) for batch in batches]


def _parts(group: list[int], fits) -> list[list[int]]:
    size = len(group)
    while size > 1 and not fits(group[:size]):
        size = -(-size // 2)
    return [group[at : at + size] for at in range(0, len(group), size)]


def _tokens(shape: GroupShape) -> int:
    return shape.contexts * shape.width + shape.rows * shape.length


def _rounded(n: int, least: int) -> int:
    """Up to a multiple of `least`, or of an eighth of the next power of two; 1 stays."""
    step = max(least, 1 << (n - 1).bit_length() >> 3)
    return 1 if n == 1 else -(-n // step) * step


def most_bytes() -> int:
    """The most bytes for copies of a cache: less than the activations on a CPU, a small part of a GPU's memory."""
    return 2**27 if jax.default_backend() == "cpu" else 2**32
