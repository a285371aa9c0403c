"""Losses over pairs of answers: each a pure function of a few numbers a row, which come from `token_nats`.

    log p(y | x) = -sum of nats over the trained tokens of y       `answer_logprobs`
    a pair       = its chosen and its rejected answer, each under the policy and under the reference

With r_c = log p(chosen) - log p_ref(chosen), r_r likewise, and the margin m = r_c - r_r, a loss is f32[R] of these. The
losses of `FREE` need no reference.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.weights.leaf import Array


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
    """DPO's loss without a reference (Xu et al. 2024, arXiv:2401.08417, eq. 3), less their nats of chosen answers."""
    return _smoothed(s.beta * _margin(_alone(p)), s)


def orpo(p: Pairs, s: Strength) -> Array:
    """-beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) of means a token (Hong et al. 2024,
    arXiv:2403.07691, eq. 4 and 7), less their nats of chosen answers.
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
FREE = frozenset({"simpo", "cpo", "orpo"})  # need no reference


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
