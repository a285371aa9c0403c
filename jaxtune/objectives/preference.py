"""Losses over answers: each a pure function of a few numbers a row, all of them from `token_nats`. And their tasks.

    log p(y | x) = -sum of nats over the trained tokens of y       `answer_logprobs`
    a pair       = its chosen and its rejected answer, each under the policy and under the reference

With r_c = log p(chosen) - log p_ref(chosen), r_r likewise, and the margin m = r_c - r_r, a loss is f32[R] of these. The
losses of `FREE` need no reference. What they are told (`Strength`) are arrays in the state, params["objective"], so
that the members of a sweep have each its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.data.pairs import JudgedAssembler, PairAssembler, SharedAssembler
from jaxtune.data.preferences import JudgedForm, PairForm
from jaxtune.errors import UserError
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives import TEXTS, OverBatch, inputs
from jaxtune.objectives.answers import PAIR_LOSSES
from jaxtune.objectives.causal_lm import open_decoder
from jaxtune.objectives.task import OBJECTIVE, BatchShape, Task, TaskInput
from jaxtune.objectives.token_nats import Given, chunk_size, token_loss, token_nats
from jaxtune.weights.leaf import Adapter, Array, map_weights, row_keys


class Pairs(NamedTuple):
    """Sums of log-probabilities of answers, f32[R] each, in nats.

    Attributes:
        chosen, rejected: under the policy.
        ref_chosen, ref_rejected: under the reference; 0 for the losses of `FREE`.
        chosen_tokens, rejected_tokens: how many tokens are summed.
    """

    chosen: Array
    rejected: Array
    ref_chosen: Array
    ref_rejected: Array
    chosen_tokens: Array
    rejected_tokens: Array


@dataclasses.dataclass(frozen=True)
class Strength:
    """The hyperparameters of the losses.

    Attributes:
        beta: how strongly the policy is held to the reference, or the scale of the margin; may be an array.
        gamma: SimPO's target margin, in units of the reward.
        label_smoothing: the probability that chosen and rejected are swapped.
    """

    beta: float | Array = 0.1
    gamma: float | Array = 0.5
    label_smoothing: float | Array = 0.0


def answer_logprobs(nats: Array, weights: Array, segments: Array | None = None, count: int = 0) -> tuple[Array, Array]:
    """Sum log-probabilities over answers.

    Args:
        nats: f32[B, T], of `token_nats`.
        weights: f32[B, T], above 0 at the trained tokens.
        segments: i32[B, T], for rows that hold several answers: the number of each token's answer, below `count`.
        count: how many answers there are.

    Returns:
        (sums of log-probabilities, numbers of tokens), f32[B] each, or f32[count].
    """
    there = (weights > 0).astype(jnp.float32)
    if segments is None:
        return -(nats * there).sum(-1), there.sum(-1)
    flat = segments.reshape(-1)
    sums = (jax.ops.segment_sum((v * there).reshape(-1), flat, num_segments=count) for v in (-nats, there))
    return tuple(sums)


def _ratios(p: Pairs) -> tuple[Array, Array]:
    return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def _margin(p: Pairs) -> Array:
    chosen, rejected = _ratios(p)
    return chosen - rejected


def _mean_margin(p: Pairs) -> Array:
    """The margin of mean log-probabilities of a token."""
    chosen, rejected = _ratios(p)
    return chosen / jnp.maximum(p.chosen_tokens, 1) - rejected / jnp.maximum(p.rejected_tokens, 1)


def _smoothed(logits: Array, s: Strength) -> Array:
    """-log sigmoid, where labels are swapped with probability `label_smoothing`."""
    e = s.label_smoothing
    return -(1 - e) * jax.nn.log_sigmoid(logits) - e * jax.nn.log_sigmoid(-logits)


def sigmoid(p: Pairs, s: Strength) -> Array:
    """DPO, -log sigmoid(beta m) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); smoothed, it is conservative DPO
    (Mitchell 2023).
    """
    return _smoothed(s.beta * _margin(p), s)


def sigmoid_norm(p: Pairs, s: Strength) -> Array:
    """DPO over log-probabilities a token (Lambert et al. 2024, arXiv:2411.15124)."""
    return _smoothed(s.beta * _mean_margin(p), s)


def robust(p: Pairs, s: Strength) -> Array:
    """DPO without bias under flipped labels (Chowdhury et al. 2024, arXiv:2403.00409)."""
    e, logits = s.label_smoothing, s.beta * _margin(p)
    return (-(1 - e) * jax.nn.log_sigmoid(logits) + e * jax.nn.log_sigmoid(-logits)) / (1 - 2 * e)


def hinge(p: Pairs, s: Strength) -> Array:
    """max(0, 1 - beta m): SLiC's loss on DPO's margin (Liu et al. 2023, RSO, arXiv:2309.06657)."""
    return jax.nn.relu(1 - s.beta * _margin(p))


def ipo(p: Pairs, s: Strength) -> Array:
    """(m - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17), of means a token, as trl has it."""
    return jnp.square(_mean_margin(p) - 1 / (2 * s.beta))


def apo_zero(p: Pairs, s: Strength) -> Array:
    """1 - sigmoid(beta r_c) + sigmoid(beta r_r) (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7)."""
    chosen, rejected = _ratios(p)
    return jax.nn.sigmoid(-s.beta * chosen) + jax.nn.sigmoid(s.beta * rejected)


def apo_down(p: Pairs, s: Strength) -> Array:
    """sigmoid(beta r_c) + 1 - sigmoid(beta m) (arXiv:2408.06266, eq. 8)."""
    chosen, _ = _ratios(p)
    return jax.nn.sigmoid(s.beta * chosen) + jax.nn.sigmoid(-s.beta * _margin(p))


def nca(p: Pairs, s: Strength) -> Array:
    """Noise-contrastive alignment of a pair (Chen et al. 2024, arXiv:2402.05369)."""
    chosen, rejected = (s.beta * r for r in _ratios(p))
    return -jax.nn.log_sigmoid(chosen) - 0.5 * (jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected))


def sppo(p: Pairs, s: Strength) -> Array:
    """(r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2 (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)."""
    chosen, rejected = _ratios(p)
    return jnp.square(chosen - 0.5 / s.beta) + jnp.square(rejected + 0.5 / s.beta)


def simpo(p: Pairs, s: Strength) -> Array:
    """-log sigmoid(beta m - gamma), m of means a token and no reference (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    return _smoothed(s.beta * _mean_margin(_alone(p)) - s.gamma, s)


def cpo(p: Pairs, s: Strength) -> Array:
    """DPO's loss without a reference (Xu et al. 2024, arXiv:2401.08417, eq. 3), less their nats of chosen answers.

    Those `preference` adds as `sft`, a mean over each answer's tokens and then over pairs. trl takes the mean over all
    tokens of the batch, so that long answers count more.
    """
    return _smoothed(s.beta * _margin(_alone(p)), s)


def orpo(p: Pairs, s: Strength) -> Array:
    """-beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) of means a token (Hong et al. 2024,
    arXiv:2403.07691, eq. 4 and 7), less their nats of chosen answers (eq. 2), which `preference` adds as `sft`, a mean
    over each answer's tokens, as the paper has it. trl takes the mean over all tokens of the batch, those of prompts
    included.
    """
    chosen, rejected = (
        total / jnp.maximum(n, 1) for total, n in ((p.chosen, p.chosen_tokens), (p.rejected, p.rejected_tokens))
    )
    return -s.beta * jax.nn.log_sigmoid(chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected)))


def _alone(p: Pairs) -> Pairs:
    return p._replace(ref_chosen=jnp.zeros_like(p.chosen), ref_rejected=jnp.zeros_like(p.rejected))


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler 2012)."""
    x = jnp.minimum(x, -jnp.finfo(jnp.float32).tiny)
    near = x > -jnp.log(2.0)
    # Each branch is kept where it is finite, so that the other's gradient is no NaN.
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


LOSSES: dict[str, Callable[[Pairs, Strength], Array]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "nca": nca,
    "sppo": sppo,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}
FREE = frozenset(name for name, loss in PAIR_LOSSES.items() if not loss.reference)


def kto(
    logprobs: Array,
    reference: Array,
    desirable: Array,
    kl: Array,
    beta: float | Array = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Array:
    """Kahneman-Tversky optimisation, for answers that are good or bad by themselves (Ethayarajh et al. 2024,
    arXiv:2402.01306, eq. 7): w (1 - sigmoid(beta (r - z))) of good ones, w (1 - sigmoid(beta (z - r))) of bad ones.

    Args:
        logprobs: f32[R], sums over each answer's tokens under the policy.
        reference: f32[R], the same under the reference.
        desirable: bool[R].
        kl: z, f32[], the estimated KL to the reference: mean log-ratio of mismatched answers; no gradient goes through
            it, and below 0 it counts as 0.
        beta: how strongly the policy is held to the reference.
        weights: of desirable and of undesirable answers.

    Returns:
        f32[R].
    """
    z = jnp.maximum(jax.lax.stop_gradient(kl), 0.0)
    signed = jnp.where(desirable, 1.0, -1.0) * (logprobs - reference - z)
    return jnp.where(desirable, *weights) * jax.nn.sigmoid(-beta * signed)


# --------------------------------------------------------------------------------------- from a batch to those numbers


def answers(module: Any, params: Any, batch: Mapping[str, Array], key: Any, members: int = 1) -> tuple[Array, Array]:
    """Sum log-probabilities over the answers of a batch.

    Args:
        module: a decoder.
        params: its tree.
        batch: tokens (or features), targets, positions i32[B, S, T], answer f32[B, S, T], row i32[B]: S texts a row.
        key: of dropout; None: none.
        members: as in `token_nats`.

    Returns:
        (sums of log-probabilities, numbers of tokens), f32[B, S] each; of packed pairs f32[B * P, 2].
    """
    x, targets, where = _hidden(module, params, batch, key)
    nats = token_nats(
        functools.partial(head_logits, spec=module.spec), head_leaf(params), x, targets, where, members=members
    )
    if "owner" not in batch:
        return tuple(found.reshape(batch["answer"].shape[:2]) for found in answer_logprobs(nats, where))
    pairs = batch["weights"].shape[1]
    owner = batch["owner"] + 2 * pairs * jnp.arange(len(where))[:, None]
    return tuple(array.reshape(-1, 2) for array in answer_logprobs(nats, where, owner, count=2 * pairs * len(where)))


def _hidden(module: Any, params: Any, batch: Mapping[str, Array], key: Any) -> tuple[Array, Array, Array]:
    """(hidden states [N, T, D], targets i32[N, T], where they are an answer's f32[N, T]) of rows: a text, or packed."""
    packed = "owner" in batch

    def flat(x):
        return x if packed else x.reshape(-1, *x.shape[2:])

    sides = 1 if packed else batch["answer"].shape[1]
    rows = batch["row"] if packed else (sides * batch["row"][:, None] + jnp.arange(sides)).reshape(-1)
    keys = None if key is None else row_keys(key, rows)
    at = flat(batch["positions"]), batch["segments"] if packed else None
    x = module.apply({"params": params}, flat(inputs(batch)), *at, keys=keys, method="hidden")
    where = flat(batch["answer"])
    return x, jnp.where(where > 0, flat(batch["targets"]), 0), where


def kl_to_base(module: Any, params: Any, batch: Mapping[str, Array], members: int = 1) -> Array:
    """KL(policy | base) in nats, exact at each token of the answers of a batch, and summed over them: f32[]."""
    base, project = base_of(params), functools.partial(head_logits, spec=module.spec)
    (x, targets, where), (its, _, _) = (_hidden(module, tree, batch, None) for tree in (params, base))

    def score(logits, targets, given):
        log_p, log_q = (jax.nn.log_softmax(z, -1) for z in (logits, project(given.shared, given.tokens)))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1), ()

    told = Given(its, head_leaf(base))
    return token_loss(project, head_leaf(params), x, targets, where, score, told, members=2 * members)[0]


def base_of(params: Any) -> Any:
    """The tree without its adapters: the base, where nothing else is trained."""
    return map_weights(lambda w: w.w if isinstance(w, Adapter) else w, params)


def _reference(
    how: str | None, module: Any, params: Any, batch: Mapping[str, Array], members: int, like: Array
) -> Array:
    """The reference's sums of log-probabilities, of the shape of the policy's, `like`."""
    if how is None:
        return jnp.zeros_like(like)
    if how == "live":
        return jax.lax.stop_gradient(answers(module, base_of(params), batch, None, members)[0])
    return batch["reference"].reshape(like.shape)


def preference(
    module: Any, losses: Mapping[str, float], *, sft: float = 0.0, reference: str | None = None, members: int = 1
) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), aux)` over pairs, as `data.PairAssembler` lays them.

    The sum is over pairs, the weight their number. params["objective"] holds the fields of `Strength`.
    With a live reference, and without a key (at evaluations), the means have the exact KL to the base, nats an answer.

    Args:
        module: a decoder.
        losses: names of `LOSSES`, with their weights (MPO: Wang et al. 2024, arXiv:2411.10442, eq. 1).
        sft: weight of the mean nats a token of the chosen answer, which ORPO and CPO add (arXiv:2403.07691, eq. 6).
        reference: "live": from the base under the adapters; "precomputed": the batch has it; None: there is none.
        members: as in `token_nats`.
    """
    by_token = PAIR_LOSSES[next(iter(losses))].by_token

    def loss_fn(params, batch, key):
        told = Strength(**params[OBJECTIVE])
        sums, tokens = answers(module, params, batch, key, members)
        ref = _reference(reference, module, params, batch, members, sums)
        pairs = Pairs(*sums.T, *ref.T, *tokens.T)
        each = sum(weight * LOSSES[name](pairs, told) for name, weight in losses.items())
        each += sft * -sums[:, 0] / jnp.maximum(tokens[:, 0], 1)
        weights = batch["weights"].reshape(-1)
        scale = told.beta / (jnp.maximum(tokens, 1) if by_token else 1)
        rewards = scale * (sums - ref)
        margins = rewards[:, 0] - rewards[:, 1]
        logps = {"logps/chosen": sums[:, 0], "logps/rejected": sums[:, 1]}
        rounding = ROUNDING * (scale * jnp.abs(sums)).sum(-1)
        found, aux = weighted(each, weights, of_pairs(margins, rewards, rounding) | logps)
        if reference == "live" and key is None:  # an evaluation, which may take two passes more
            aux["means"]["kl"] = kl_to_base(module, params, batch, members), 2 * weights.sum()
        return found, aux

    return loss_fn


def of_pairs(margins: Array, rewards: Array, rounding: float | Array = 0.0) -> dict[str, Array]:
    """What is counted of each pair, from its margin f32[R] and the rewards of both answers f32[R, 2].

    A pair counts half in the accuracy where neither answer is preferred: the margin is no larger than `rounding`.
    """
    return {
        "accuracy": _right(margins, rounding),
        "margins": margins,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
    }


ROUNDING = 1e-6  # of log-probabilities, in float32: before the first step policy and reference differ by as much


def _right(margins: Array, rounding: float | Array) -> Array:
    """1 where a margin is above what rounding makes of 0, 0 where it is below, and a half between."""
    return 0.5 * (jnp.sign(jnp.where(jnp.abs(margins) > rounding, margins, 0.0)) + 1)


def weighted(each: Array, weights: Array, counted: Mapping[str, Array]) -> tuple[tuple[Array, Array], dict[str, Any]]:
    """Return ((sum, weight), aux) of losses f32[R], and of what else is counted of each pair."""
    total = weights.sum()
    sums = {name: ((weights * value).sum(), total) for name, value in counted.items()}
    return ((weights * each).sum(), total), {"means": jax.lax.stop_gradient(sums)}


def judged(module: Any, *, reference: str = "precomputed", members: int = 1) -> OverBatch:
    """Return KTO's loss over judged answers, as `data.JudgedAssembler` lays them; see `kto`.

    Its KL is the mean over all answers of the batch, whatever the micro-batches and devices they lie on.
    params["objective"] holds beta, desirable_weight and undesirable_weight.
    """

    def one(batch, side):
        """The batch of one text an answer: [B, 1, T], or packed [B, T], where the other's sums are 0."""
        if "owner" in batch:
            return {k: v[:, side] if k in (*TEXTS, "targets", "answer", "owner") else v for k, v in batch.items()}
        return {k: v[:, side : side + 1] if v.ndim > 1 else v for k, v in batch.items()}

    def log_ratios(params, batch, key, side):
        batch, column = one(batch, side), side if "owner" in batch else 0
        sums, _ = answers(module, params, batch, key, members)
        return sums[:, column], _reference(reference, module, params, batch, members, sums)[:, column]

    def sums(params, batch, key):
        policy, ref = log_ratios(params, batch, None, 1)
        weights = batch["weights"].reshape(-1)
        return (weights * (policy - ref)).sum(), weights.sum()

    def loss(params, batch, key, found):
        told, weights, good = params[OBJECTIVE], batch["weights"].reshape(-1), batch["good"].reshape(-1) > 0
        policy, ref = log_ratios(params, batch, key, 0)
        kl = found[0] / jnp.maximum(found[1], 1)
        sides = told["desirable_weight"], told["undesirable_weight"]
        each = kto(policy, ref, good, kl, told["beta"], sides)
        rewards, yes, no = told["beta"] * (policy - ref), weights * good, weights * ~good
        z = jnp.maximum(kl, 0.0)
        signed = jnp.where(good, 1.0, -1.0) * (policy - ref - z)
        means = {
            "accuracy": ((weights * _right(signed, ROUNDING * jnp.abs(policy))).sum(), weights.sum()),
            "rewards/chosen": ((yes * rewards).sum(), yes.sum()),
            "rewards/rejected": ((no * rewards).sum(), no.sum()),
            "logps/chosen": ((yes * policy).sum(), yes.sum()),
            "logps/rejected": ((no * policy).sum(), no.sum()),
            "kl": (weights.sum() * z, weights.sum()),
        }
        return ((weights * each).sum(), weights.sum()), {"means": jax.lax.stop_gradient(means)}

    return OverBatch(sums, loss)


# ------------------------------------------------------------------------------------------------------------ the tasks


def open_preference(given: TaskInput) -> tuple[Any, Task]:
    """Open the task of pairs on a model."""
    module = open_decoder("preference", given)
    objective = given.objective
    packed, shared = given.data["packing"], objective["share_prompt"]
    if shared and any(block.window is not None for segment in module.spec.segments for block in segment.pattern):
        raise UserError(
            "objective.share_prompt: the model has layers of sliding-window attention, which counts the tokens of one "
            "answer between the prompt and the other; leave it off."
        )
    names = objective["loss"]
    losses = dict(zip(names, objective["loss_weights"] or (1.0,) * len(names), strict=True))
    compares = any(name not in FREE for name in names)
    values = {name: objective[name] for name in ("beta", "gamma", "label_smoothing")}
    reference = objective["reference"] if compares else None
    task = _task(
        module,
        functools.partial(preference, losses=losses, sft=objective["sft_weight"], reference=reference),
        values,
        reference,
        PairForm.of(given.data, packed=packed, shared=shared),
        SharedAssembler if shared else PairAssembler,
    )
    return module, dataclasses.replace(task, features=not shared)


def open_kto(given: TaskInput) -> tuple[Any, Task]:
    """Open the task of judged answers on a model."""
    module = open_decoder("kto", given)
    objective = given.objective
    values = {name: objective[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    reference = objective["reference"]
    loss = functools.partial(judged, reference=reference)
    return module, _task(module, loss, values, reference, JudgedForm.of(given.data), JudgedAssembler)


def _task(
    module: Any, loss: Any, values: Mapping[str, float], reference: str | None, form: Any, assembler: Any
) -> Task:
    vocab = module.spec.vocab
    return Task(
        loss=lambda module, members: loss(module, members=members),
        batch_like=functools.partial(pairs_like, assembler, reference == "precomputed"),
        metrics=means,
        assembler=assembler,
        form=form,
        chunk=lambda tokens, members, backend: min(tokens, chunk_size(tokens, vocab, members, backend)),
        continues=True,
        values=values,
        reference=reference,
    )


PACKED_PAIRS = 8  # of a packed row whose pairs are not known yet


def pairs_like(assembler: type[PairAssembler], reference: bool, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of pairs or judged answers, as `assembler` lays them."""
    rows = (shape.micros, shape.rows)
    laid = (*rows, shape.length) if shape.packed and assembler.TOGETHER else (*rows, 2, shape.length)
    per = (*rows, PACKED_PAIRS) if shape.packed else rows
    tokens, number = jax.ShapeDtypeStruct(laid, jnp.int32), jax.ShapeDtypeStruct(per, jnp.float32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), tokens)
    batch |= {"owner": tokens} if shape.packed else {}
    batch |= {"answer": jax.ShapeDtypeStruct(laid, jnp.float32), "weights": number, assembler.TARGET: number}
    batch |= {"reference": jax.ShapeDtypeStruct((*per, 2), jnp.float32)} if reference else {}
    return batch | {"row": jax.ShapeDtypeStruct(rows, jnp.int32)}


def means(loss: float, weight: float, aux: Any) -> dict[str, float]:
    """What an evaluation logs: the means that the loss counts, and over how many rows."""
    found = {f"eval/{name}": float(total / count) for name, (total, count) in aux["means"].items() if count}
    return found | {"eval/rows": int(weight)}
