"""Distillation: a student learns the distribution of a teacher at every trained token (Hinton et al. 2015,
arXiv:1503.02531; for language models Kim & Rush 2016, arXiv:1606.07947; Agarwal et al. 2024, GKD, arXiv:2306.13649).

    p = softmax(teacher's logits / temperature)     q = softmax(student's logits / temperature)

    forward_kl   KL(p | q)                                              covers all that the teacher may say
    reverse_kl   KL(q | p)                                              keeps to what the teacher says most
    jsd          b KL(p | m) + (1 - b) KL(q | m),  m = b p + (1 - b) q  between them (GKD, eq. 1), b = jsd_beta
    loss         (1 - ce_weight) * one of these + ce_weight * cross-entropy of the rows' own tokens

The teacher is a frozen tree beside the student's, run in the step; or, with `top_k`, what it says of each row is
computed once and kept: the log-probabilities of its k likeliest tokens, and that of all others together. Divergences of
such coarsened distributions are bounds from below, exact for what the k tokens cover. Logits exist for a chunk of
tokens at a time, the teacher's as the student's.

With `lmbda` that share of a step's rows is answered by the student as it is then (GKD, algorithm 1), at the temperature
of the loss; no gradient goes through the drawing.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.data.batches import Assembler
from jaxtune.errors import UserError
from jaxtune.hf import load as hf
from jaxtune.hf.digest import BaseFiles
from jaxtune.infer.source import Tuned, find, open_source
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives import causal_lm, inputs
from jaxtune.objectives.task import BatchShape, Draws, Task, TaskInput
from jaxtune.objectives.token_nats import Given, chunk_size, token_loss, token_nats
from jaxtune.tree import Beside
from jaxtune.weights.leaf import Array, merge, row_keys

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
TEACHER = "teacher"  # what a batch calls what is kept of the teacher


@dataclass(frozen=True)
class Strength:
    """How the student is held to the teacher.

    Attributes:
        divergence: one of `DIVERGENCES`.
        beta: of jsd, the teacher's weight in the mixture, between 0 and 1.
        temperature: of both distributions. The divergence is not multiplied by its square, as in trl.
        ce_weight: share of the cross-entropy in the loss.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0


def divergence(log_p: Array, log_q: Array, kind: str = "forward_kl", beta: float = 0.5) -> Array:
    """The divergence of the student q from the teacher p in nats, f32[...].

    Args:
        log_p: the teacher's log-probabilities f32[..., V].
        log_q: the student's.
        kind: one of `DIVERGENCES`.
        beta: of jsd, the teacher's weight in the mixture.
    """
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Array, log_b: Array) -> Array:
    return (jnp.exp(log_a) * (log_a - log_b)).sum(-1)


def _score(strength: Strength, logits: Array, targets: Array, log_p: Array, log_q: Array) -> tuple[Array, Any]:
    """(loss f32[n], {"kl", "ce"}) of a chunk, from its logits f32[n, V] and what is compared of both models."""
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    apart = divergence(log_p, log_q, strength.divergence, strength.beta)
    loss = (1 - strength.ce_weight) * apart + strength.ce_weight * nats if strength.ce_weight else apart
    return loss, {"kl": _kl(log_p, log_q), "ce": nats}


def distillation(
    module: Any,
    teacher: "Teacher",
    strength: Strength,
    *,
    packed: bool = False,
    top_k: int = 0,
    members: int = 1,
) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), {"means": {"kl", "ce"}})` for a decoder, the student.

    `batch` is that of `causal_lm`, with `top_k` also `teacher`, which `TopK` computes; without, `params` are
    `tree.Beside(student's, teacher's)`. The sum is of losses over trained tokens, the weight their number; kl is the
    forward KL, whatever the loss, and ce the cross-entropy, each summed likewise beside its weight.

    Args:
        module: the student.
        teacher: what it learns from.
        strength: how it is held to it.
        packed: as in `causal_lm`.
        members: as in `causal_lm`.
        top_k: how many log-probabilities of the teacher are kept; 0: the teacher runs in the step.
    """
    student = functools.partial(head_logits, spec=module.spec)
    vocab = teacher.vocab

    def in_step(logits, targets, given):
        other = teacher.logits(given.shared, given.tokens)[:, :vocab]
        log_p, log_q = (jax.nn.log_softmax(z / strength.temperature, -1) for z in (other, logits[:, :vocab]))
        return _score(strength, logits, targets, log_p, log_q)

    def kept(logits, targets, given):
        log_p, ids = unpacked(given.tokens, top_k)
        log_q = coarse(jax.nn.log_softmax(logits[:, :vocab] / strength.temperature, -1), ids)
        return _score(strength, logits, targets, log_p, log_q)

    def loss_fn(params, batch, key):
        params, other = params if isinstance(params, Beside) else (params, None)
        keys = None if key is None else row_keys(key, batch["row"])
        where = batch["positions"], batch["segments"] if packed else None
        x = module.apply({"params": params}, inputs(batch), *where, keys=keys, method="hidden")
        if top_k:
            score, given = kept, Given(batch[TEACHER])
        else:
            hidden = teacher.module.apply({"params": other}, batch["tokens"], *where, method="hidden")
            score, given = in_step, Given(hidden, head_leaf(other))
        targets = jnp.where(batch["weights"] > 0, batch["targets"], 0)
        total, counts = token_loss(
            student, head_leaf(params), x, targets, batch["weights"], score, given, members=2 * members
        )
        weight = batch["weights"].sum()
        return (total, weight), {"means": {name: (value, weight) for name, value in counts.items()}}

    return loss_fn


def metrics(loss: float, weight: float, aux: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation logs: the forward KL to the teacher, the cross-entropy and its perplexity, and the tokens."""
    kl, ce = (float(aux["means"][name][0] / weight) if weight else math.nan for name in ("kl", "ce"))
    return {"eval/kl": kl, "eval/ce": ce} | causal_lm.metrics(ce, weight, aux)


# ---------------------------------------------------------------------------------------------------- the likeliest k


def coarse(log_q: Array, ids: Array) -> Array:
    """Log-probabilities f32[n, V], ids i32[n, k] -> f32[n, k + 1]: of these tokens, and of all others together."""
    rows = jnp.arange(len(ids))[:, None]
    others = log_q.at[rows, ids].set(-jnp.inf)
    rest = jax.nn.logsumexp(others, -1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(log_q, ids, -1), rest], -1)


def packed_width(vocab: int, top_k: int) -> int:
    """Numbers of 16 bits that are kept a token: k + 1 bfloat16 and k ids of one number, or two where there are more
    tokens than that holds."""
    return top_k + 1 + top_k * (1 if vocab <= 2**16 else 2)


def packed(log_p: Array, vocab: int, top_k: int) -> Array:
    """Log-probabilities f32[n, V] -> u16[n, W], what is kept of them."""
    _, ids = jax.lax.top_k(log_p, top_k)
    values = jax.lax.bitcast_convert_type(coarse(log_p, ids).astype(jnp.bfloat16), jnp.uint16)
    words = [ids & 0xFFFF] if vocab <= 2**16 else [ids & 0xFFFF, ids >> 16]
    return jnp.concatenate([values, *(word.astype(jnp.uint16) for word in words)], -1)


def unpacked(kept: Array, top_k: int) -> tuple[Array, Array]:
    """u16[n, W] -> (log-probabilities f32[n, k + 1], which add up to 1 again, ids i32[n, k])."""
    values, *words = jnp.split(kept, [top_k + 1, 2 * top_k + 1], axis=-1)
    log_p = jax.lax.bitcast_convert_type(values, jnp.bfloat16).astype(jnp.float32)
    words = [word.astype(jnp.int32) for word in words]
    ids = words[0] | words[1] << 16 if words[1].shape[-1] else words[0]
    return jax.nn.log_softmax(log_p, -1), ids


def top_k_of(
    module: Any, params: Any, tokens: Array, positions: Array, vocab: int, top_k: int, temperature: float
) -> Array:
    """Tokens i32[B, T] -> u16[B, T, W]: what is kept of the model's distribution after each."""
    hidden = module.apply({"params": params}, tokens, positions, None, method="hidden")

    def keep(logits, targets):
        return packed(jax.nn.log_softmax(logits[:, :vocab] / temperature, -1), vocab, top_k)

    project = functools.partial(head_logits, spec=module.spec)
    return token_nats(project, head_leaf(params), hidden, jnp.zeros_like(tokens), members=2, also=keep)[1]


# ------------------------------------------------------------------------------------------------------- the teacher


class Teacher:
    """Another language model, as far as its config.json and tokenizer say.

    Args:
        source: where it lies: a model, or a run or adapter, which is merged.
        module: of it.
        vocab: how many logits both models have, first; what lies behind is padding.
    """

    def __init__(self, source: Tuned, module: Any, vocab: int):
        self.source, self.module, self.vocab = source, module, vocab

    @classmethod
    def open(cls, path: str | Path, student: Any, tokenizer: str | Path, fields: Mapping[str, Any]) -> "Teacher":
        """Read what is needed to know that it can teach `student`, a decoder.

        Args:
            path: a model, run or adapter.
            student: its module.
            tokenizer: of the rows.
            fields: of the module, such as dtype.

        Raises:
            UserError: it is no language model, its weights are not there, or its tokens are others.
        """
        try:
            source = find(path)
            config = hf.read_config(source.model)
            module = models.build(config, **fields)
        except UserError as error:
            raise UserError(f"objective.teacher={path}: {error}") from None
        if not module.continues:
            raise UserError(
                f"objective.teacher={path} (model_type={config['model_type']!r}) does not continue text; a teacher is "
                "a model with a language model's head."
            )
        return cls(source, module, _same_tokens(path, source, module, student, tokenizer))

    def logits(self, head: Any, hidden: Array) -> Array:
        return head_logits(head, hidden, self.module.spec)

    @cached_property
    def digest(self) -> str:
        """A hash of its files; of weights: of their sizes, headers and blocks spread over them."""
        source = self.source
        folders = [source.model, *([] if source.adapter is None else [source.adapter])]
        found = [BaseFiles(folder, source.tokenizer if folder is source.model else None).quick for folder in folders]
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:40]

    def abstract(self) -> Any:
        """The parameters as abstract arrays, as a step has them."""
        return jax.tree.map(self._cast, self.module.abstract_params())

    def load(self) -> Any:
        """Read the parameters, in the module's dtype."""
        _, params, adapter = open_source(self.source, dtype=self.module.dtype)
        return jax.tree.map(self._cast, params if adapter is None else merge(params))

    def _cast(self, leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, self.module.dtype)
        return leaf.astype(self.module.dtype)


def _same_tokens(path: Any, source: Tuned, module: Any, student: Any, tokenizer: str | Path) -> int:
    """How many logits teacher and student share.

    Raises:
        UserError: a token of the student's is another token for the teacher.
    """
    sizes = f"{module.spec.vocab:,} tokens, the student {student.spec.vocab:,}"
    mine, its = vocabulary(Path(tokenizer).expanduser()), vocabulary(source.tokenizer)
    if mine is None or its is None:
        if module.spec.vocab != student.spec.vocab:
            raise UserError(
                f"objective.teacher={path} has another vocabulary: {sizes}. Choose a teacher that shares the student's "
                "tokenizer."
            )
        return module.spec.vocab
    wrong = next((token for token, i in sorted(mine.items(), key=lambda pair: pair[1]) if its.get(token) != i), None)
    if wrong is not None:
        there = f"is {its[wrong]}" if wrong in its else "does not exist"
        raise UserError(
            f"objective.teacher={path} has another vocabulary ({sizes}): the student's token {wrong!r} is "
            f"{mine[wrong]} and {there} in the teacher's tokenizer. Choose a teacher that shares the student's "
            "tokenizer."
        )
    return min(module.spec.vocab, student.spec.vocab)


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of a tokenizer's directory; None: it has no tokenizer.json."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True) if file.is_file() else None


# ----------------------------------------------------------------------------------------------------------- the task


def open_task(given: TaskInput) -> tuple[Any, Task]:
    """Open the task on a model, the student.

    Raises:
        UserError: the student or the teacher does not continue text, or they have other tokens.
    """
    module = causal_lm.open_decoder("distillation", given)
    objective = given.objective
    path, top_k = objective["teacher"], objective["top_k"]
    teacher = Teacher.open(path, module, given.tokenizer, {**given.fields, "remat": "none"})
    length, known = given.length(module), teacher.module.spec.positions
    if length > known:
        raise UserError(
            f"objective.teacher={path} knows {known:,} positions, and rows may have {length:,} tokens: set "
            f"data.max_length={known} or less."
        )
    if top_k >= teacher.vocab:
        raise UserError(
            f"objective.top_k={top_k} of a vocabulary of {teacher.vocab:,}: nothing is left out. Choose fewer, or "
            "leave it out to run the teacher in the step."
        )
    if objective["lmbda"] and objective["max_new_tokens"] >= length:
        raise UserError(
            f"objective.max_new_tokens={objective['max_new_tokens']} leaves no room for a prompt in rows of {length:,} "
            "tokens; lower it, or raise data.max_length."
        )
    strength = Strength(
        objective["divergence"], objective["jsd_beta"], objective["temperature"], objective["ce_weight"]
    )

    def loss(module, members):
        return distillation(module, teacher, strength, packed=given.data["packing"], top_k=top_k, members=members)

    def batch_like(shape: BatchShape):
        batch = causal_lm.batch_like(shape)
        width = packed_width(teacher.vocab, top_k)
        kept = jax.ShapeDtypeStruct((*batch["tokens"].shape, width), jnp.uint16)
        return batch | ({TEACHER: kept} if top_k else {})

    return module, Task(
        loss=loss,
        batch_like=batch_like,
        metrics=metrics,
        assembler=Assembler,
        chunk=lambda tokens, members, backend: min(tokens, chunk_size(tokens, module.spec.vocab, 2 * members, backend)),
        continues=True,
        features=bool(top_k),
        companion=None if top_k else teacher,
        others={"objective.teacher": teacher.digest},
        draws=_draws(objective),
        once=functools.partial(_once, teacher, top_k, strength.temperature) if top_k else None,
    )


def _draws(objective: Mapping[str, Any]) -> Draws | None:
    share, every, most = (objective[name] for name in ("lmbda", "draw_every", "max_new_tokens"))
    return Draws(share, every, most, objective["temperature"]) if share else None


def _once(teacher: Teacher, top_k: int, temperature: float, base: Any, store: Any, mesh: Any) -> Any:
    from jaxtune.train.features import OncePerRow

    class TopK(OncePerRow):
        """Computes what is kept of the teacher's distributions over the rows of data sets, or finds it."""

        name, what = TEACHER, f"teacher's top-{top_k} log-probabilities"

        def run(self, params, tokens, positions, segments, types):
            return top_k_of(teacher.module, params, tokens, positions, teacher.vocab, top_k, temperature)

        @property
        def facts(self):
            module = teacher.module
            return ["top_k", top_k, temperature, teacher.vocab, repr(module.spec), str(module.dtype), module.attention]

    store.off = "leave objective.top_k out"
    return TopK(teacher.load(), packed_width(teacher.vocab, top_k), np.uint16, True, store, mesh)
