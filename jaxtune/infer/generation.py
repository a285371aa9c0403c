"""Text from a model: a prefill, then a loop on the device over a key-value cache, for batches of unequal prompts.

A row's buffer and its cache share one index: slot s holds the token at position s. Prompts are padded on the right, and
a padding slot is overwritten by the token decoded for it before any query sees it.

    slot        0 1 2 3 4 5 6 7
    row 0       a b c d x y .        x, y: decoded; last = 5
    row 1       e f u v . .          last = 3

An encoder-decoder reads prompts with its encoder, once; its rows begin with the token that targets begin with.

Shapes are rounded up, and lengths, limits and temperatures are arguments of the programs, so that few are compiled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.limits import time_limit
from jaxtune.train.processes import on_host
from jaxtune.weights.adapters import LoraWeight, virtual_tokens
from jaxtune.weights.leaf import is_weight, row_keys

Array = jax.Array
Prompt = str | list[dict[str, Any]]
NEG = float(jnp.finfo(jnp.float32).min)


class Sampling(NamedTuple):
    """How tokens are chosen: arrays, so that other values need no other program.

    Attributes:
        temperature: f32[].
        top_k: i32[], 0 for no limit.
        top_p: f32[], 1 for no limit.
        eos: i32[E], the tokens that end a row.
        keys: one PRNG key a row, [B]; folded with the position of the token that is drawn.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    eos: Array
    keys: Array


class State(NamedTuple):
    """A batch between two tokens.

    Attributes:
        tokens: i32[B, S], the prompt and what follows it.
        last: i32[B], the slot of the newest token; the cache holds all before it.
        done: bool[B].
        new: i32[], tokens decoded in every row that is not done.
        cache: as from `module.init_cache(B, S)`.
    """

    tokens: Array
    last: Array
    done: Array
    new: Array
    cache: Any


def generate(
    module: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 32,
    watch: Callable[[int, list[int]], bool] | None = None,
    watch_every: int = 16,
) -> list[list[int]]:
    """Continue prompts of any lengths.

    Args:
        module: a decoder, or an encoder-decoder, whose answers to the prompts are written.
        params: its parameters; leaves may be polymorphic: LoRA factors are merged, a soft prompt is put first.
        prompts: token ids, at least one a prompt.
        max_new_tokens: how many tokens are decoded at most.
        temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens whose probabilities reach this sum (Holtzman et al. 2019, arXiv:1904.09751).
        top_k: draw from the k most probable tokens, taken before `top_p`; 0: from all.
        eos_ids: tokens that end a row; the row keeps the one that ended it.
        seed: a draw depends on (seed, index of the prompt, position), however prompts are batched.
        batch_size: prompts that are decoded together.
        watch: called with (index of the prompt, its new tokens) every `watch_every` tokens and when the row ends;
            returns True to end the row.
        watch_every: tokens between two calls of `watch`.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: an empty prompt, a token outside the vocabulary, a setting out of range, or a prompt that together
            with `max_new_tokens` exceeds the model's positions.
    """
    prefix = virtual_tokens(params)
    _check(module, prompts, max_new_tokens + len(prefix), temperature, top_p, top_k, batch_size)
    prompts = [[*prefix, *prompt] for prompt in prompts]
    params = prepare(module, params)
    mode = "greedy" if temperature == 0 else "filtered" if top_k or top_p < 1 else "plain"
    eos = jnp.asarray(sorted(set(eos_ids)), jnp.int32)
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        size = min(batch_size, 1 << (len(rows) - 1).bit_length())
        keys = row_keys(jax.random.key(seed), jnp.asarray(rows + [0] * (size - len(rows))))
        sampling = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), eos, keys)
        batch = [prompts[i] for i in rows]
        watched = None if watch is None else lambda row, new, rows=rows: watch(rows[row], new)
        continued = _continue(module, params, batch, size, sampling, mode, max_new_tokens, watched, watch_every)
        for i, new in zip(rows, continued, strict=True):
            results[i] = new
    return results


def prepare(module: Any, params: Any) -> Any:
    """Return params prepared for decoding: LoRA merged into plain bases, matrices in the module's dtype.

    Each step reads every weight once, so a cast or a low-rank product repeated in it would double its cost.
    """

    def ready(path, leaf):
        # An adapted embedding is not merged: that would change the head that is tied to it.
        if isinstance(leaf, LoraWeight) and not is_weight(leaf.w) and path[-1].key.endswith(("kernel", "_experts")):
            leaf = leaf.merge()
        matrix = not is_weight(leaf) and path[-1].key not in ("scale", "bias")
        return leaf.astype(module.dtype) if matrix else leaf

    return jax.tree_util.tree_map_with_path(ready, params, is_leaf=is_weight)


def bucket(n: int) -> int:
    """Round up to a multiple of 64, or above 512 of an eighth of the next power of two: few shapes, little padding."""
    step = max(64, 1 << (n - 1).bit_length() >> 3)
    return -(-n // step) * step


def filter_logits(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Mask logits [..., V] that are not among the `top_k`, or not in the `top_p` nucleus of those.

    Logits equal to the last one kept are kept.
    """
    size = logits.shape[-1]
    ranked = -jnp.sort(-logits, axis=-1)
    ranked = jnp.where(jnp.arange(size) < jnp.where(top_k > 0, top_k, size), ranked, NEG)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (ranked > NEG) & ((before < top_p) | (top_p >= 1))
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, NEG)


def _choose(logits: Array, sampling: Sampling, positions: Array, mode: str) -> Array:
    """Logits f32[B, V] -> tokens i32[B] for `positions` i32[B]."""
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if mode == "filtered":
        logits = filter_logits(logits, sampling.top_k, sampling.top_p)
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _append(module, params, state: State, hidden: Array, sampling: Sampling, mode: str) -> State:
    """Choose the token that follows hidden [B, D] and write it into the rows that are not done."""
    logits = module.apply({"params": params}, hidden, method="head")
    token = _choose(logits, sampling, state.last + 1, mode)
    rows = jnp.arange(len(token))
    # A row that is done does not advance: it decodes its last token again, into the same slot.
    last = jnp.where(state.done, state.last, state.last + 1)
    token = jnp.where(state.done, state.tokens[rows, state.last], token)
    return state._replace(
        tokens=state.tokens.at[rows, last].set(token),
        last=last,
        done=state.done | (token[:, None] == sampling.eos).any(-1),
        new=state.new + 1,
    )


@partial(jax.jit, static_argnames=("module", "slots", "mode"))
def _prefill(module, params, tokens, lengths, done, sampling, source=None, *, slots: int, mode: str) -> State:
    """Read prompts i32[B, P] of `lengths` i32[B] and decode the first token of each; `source` as for `hidden`."""
    size, width = tokens.shape
    if source is None:
        read, cache = {}, module.init_cache(size, slots)
    else:
        read, cache = {"source": source}, module.init_cache(size, slots, source[0].shape[1])
    hidden, cache = module.apply({"params": params}, tokens, cache=cache, **read, method="hidden")
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - width)))
    state = State(tokens, lengths - 1, done, jnp.int32(0), cache)
    return _append(module, params, state, hidden[jnp.arange(size), lengths - 1], sampling, mode)


@partial(jax.jit, static_argnames=("module", "mode"), donate_argnames="state")
def _decode(module, params, state: State, sampling: Sampling, limit: Array, *, mode: str) -> State:
    """Decode until every row is done or has `limit` new tokens."""
    rows = jnp.arange(len(state.last))

    def step(state: State) -> State:
        token, position = state.tokens[rows, state.last][:, None], state.last[:, None]
        hidden, cache = module.apply({"params": params}, token, position, cache=state.cache, method="hidden")
        return _append(module, params, state._replace(cache=cache), hidden[:, 0], sampling, mode)

    return jax.lax.while_loop(lambda s: (s.new < limit) & ~s.done.all(), step, state)


def _padded(
    rows: Sequence[Sequence[int]], size: int, rounded: Callable[[int], int], most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right to `size` of them, i32[B, P], and their lengths i32[B], 1 where there is no row."""
    lengths = np.array([len(row) for row in rows] + [1] * (size - len(rows)), np.int32)
    width = rounded(int(lengths.max()))
    tokens = np.zeros((size, width if most is None else min(width, most)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


def _continue(module, params, prompts, size: int, sampling, mode: str, limit: int, watch, every: int):
    """Return the new tokens of one batch of prompts, padded to `size` rows."""
    count, source = len(prompts), None
    if module.reads_source:
        tokens, lengths = _padded(prompts, size, bucket)
        source = tokens, (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
        prompts = [[module.spec.start]] * count
    tokens, lengths = _padded(prompts, size, int if module.reads_source else bucket, module.spec.positions)
    done = np.arange(size) >= count
    slots = bucket(int(lengths.max()) + limit)
    state = _prefill(module, params, tokens, lengths, done, sampling, source, slots=slots, mode=mode)
    while True:
        upto = limit if watch is None else min(limit, int(state.new) + every)
        state = _decode(module, params, state, sampling, jnp.int32(upto), mode=mode)
        buffer, last, ended = map(on_host, (state.tokens, state.last, state.done))
        new = [buffer[row, lengths[row] : last[row] + 1].tolist() for row in range(count)]
        if watch is not None:
            stopped = [not done[row] and watch(row, new[row]) for row in range(count)]
            ended = ended | np.array(stopped + [True] * (size - count))
        done = ended
        if upto == limit or done.all():
            return new
        state = state._replace(done=jnp.asarray(done))


def _check(module, prompts, max_new_tokens, temperature, top_p, top_k, batch_size) -> None:
    spec = module.spec
    for name, value, fine, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("batch_size", batch_size, batch_size >= 1, "1 or more"),
    ):
        if not fine:
            raise UserError(f"{name}={value!r}: expected {expected}.")
    if module.reads_source:  # whose target has positions of its own, one of them for the token that it begins with
        if max_new_tokens >= spec.positions:
            raise UserError(f"max_new_tokens={max_new_tokens}: the model's targets have {spec.positions} positions.")
        max_new_tokens = 0
    for i, prompt in enumerate(prompts, 1):
        n = len(prompt)
        if n == 0:
            raise UserError(f"Prompt {i} is empty: a model needs at least one token to continue.")
        if min(prompt) < 0 or max(prompt) >= spec.vocab:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"Prompt {i} holds the token {wrong}; the model's vocabulary has {spec.vocab} tokens.")
        if n + max_new_tokens > spec.positions:
            room = spec.positions - n
            lower = f"set max_new_tokens to {room} or less, or " if room > 0 else ""
            raise UserError(
                f"Prompt {i} has {n} tokens; with {max_new_tokens} new ones that is {n + max_new_tokens}, "
                f"and the model has {spec.positions} positions: {lower}shorten the prompt."
            )


# ---------------------------------------------------------------------------------------------------------------- text


def generate_text(
    module: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    chat: bool = False,
    eos_ids: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    **settings: Any,
) -> list[str]:
    """Continue texts, or answer messages.

    Args:
        module: as for `generate`.
        params: as for `generate`.
        tokenizer: a fast transformers tokenizer.
        prompts: texts; with `chat`, a text is the user's message, and a list of messages (`role`, `content`) is a
            conversation to continue.
        max_new_tokens: as for `generate`.
        stop: strings, or special tokens, at which a text ends; they are cut off.
        chat: render prompts with the tokenizer's chat template, or `jaxtune.data.chat.DEFAULT_TEMPLATE`.
        eos_ids: default: the tokenizer's.
        on_text: called with (index of the prompt, its text so far) every few tokens, and at the end with the whole.
            Text that may be the start of a stop string is held back until it is known not to be.
        settings: as for `generate`.

    Returns:
        The continuation of each prompt, without special tokens.

    Raises:
        UserError: as `generate`, a conversation that the template refuses, or an empty stop string.
    """
    if "" in stop:
        raise UserError("An empty stop string would end every text where it begins; leave it out.")
    if eos_ids is None:
        eos_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    added = tokenizer.get_added_vocab()  # decoded text contains no special tokens
    eos_ids = [*eos_ids, *(added[token] for token in stop if token in added)]
    ids = encode_prompts(tokenizer, prompts, chat, module.reads_source)

    def watch(i: int, new: list[int]) -> bool:
        text, stopped = cut(decode_new(tokenizer, ids[i], new), stop)
        if on_text:
            on_text(i, text if stopped else text[: len(text) - _begun(text, stop)])
        return stopped

    if on_text or stop:
        settings |= {"watch": watch, "watch_every": 4 if on_text else 16}
    results = generate(module, params, ids, max_new_tokens=max_new_tokens, eos_ids=eos_ids, **settings)
    texts = [cut(decode_new(tokenizer, p, new), stop)[0] for p, new in zip(ids, results, strict=True)]
    for i, text in enumerate(texts if on_text else ()):
        on_text(i, text)
    return texts


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], chat: bool = False, source: bool = False
) -> list[list[int]]:
    """Tokenise prompts as training does: a text after the tokenizer's BOS if it has one, a conversation as rendered;
    with `source`, for an encoder, with all that the tokenizer puts around a text.

    Raises:
        UserError: a conversation that the template refuses, or any for an encoder.
    """
    from jaxtune.data.embeddings import Tokenize
    from jaxtune.data.tokenize import Encoder

    if source:
        if chat:
            raise UserError("An encoder-decoder reads a text and no conversation: leave out --chat.")
        return [ids for ids, _ in Tokenize(tokenizer)(list(prompts))]
    encoder = Encoder(tokenizer)
    texts = [_render(tokenizer, i, prompt) for i, prompt in enumerate(prompts, 1)] if chat else prompts
    ids = [encoding.ids for encoding in encoder.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    prefix = [] if chat else encoder.prefix
    return [row if row[: len(prefix)] == prefix else prefix + row for row in ids]


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut `text` before the stop string in it that ends first; also return whether there was one.

    So the result does not depend on how many tokens lie between two looks at the text.
    """
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def _begun(text: str, stop: Sequence[str]) -> int:
    """The characters at the end of a text that may be the start of a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def _render(tokenizer: Any, number: int, prompt: Prompt) -> str:
    from jaxtune.data.chat import DEFAULT_TEMPLATE, TEMPLATE_SECONDS

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    try:
        with time_limit(TEMPLATE_SECONDS, "it"):
            return tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
    except Exception as error:  # a template may raise anything: jinja2's errors, TypeError from its expressions
        raise UserError(f"Prompt {number}: the chat template refuses this conversation: {error}") from None


def decode_new(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of `new` after the prompt; decoded alone, sentencepiece would drop the space before its first word."""
    whole, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt + new, prompt))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
