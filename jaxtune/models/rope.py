"""Frequencies of rotary position embeddings, and the rules that scale them for longer texts.

A rule is a function of the plain frequencies; its keyword arguments are the keys of HF's `rope_parameters` that it
reads, so its signature lists what a config may contain. Each returns frequencies and a factor for cos and sin.
"""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError, nearest

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Attributes:
        theta: the base of the frequencies.
        dim: channels of a head that are rotated, the first ones.
        kind: how frequencies are scaled for longer texts, a key of `RULES`.
        rule: arguments of that rule, (key, value) by HF's names.
        interleaved: neighbouring channels are rotated as pairs, as in the paper; otherwise the two halves are.
        heat: (beta, length): queries grow by 1 + beta log(1 + floor(position / length)), as Llama 4's do; None: never.
    """

    theta: float
    dim: int
    kind: str = "default"
    rule: tuple[tuple[str, Any], ...] = ()
    interleaved: bool = False
    heat: tuple[float, int] | None = None


def tables(rope: Rope, positions: Array, length: Array) -> tuple[Array, Array]:
    """cos and sin f32[B, T, 1, dim/2] of the angles position * frequency.

    Args:
        rope: its kind, dimensions and rule.
        positions: i32[B, T].
        length: i32[B], tokens of the longest document in each row: two rules depend on it.
    """
    frequencies, factor = RULES[rope.kind](rope, length, **dict(rope.rule))
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def heat(rope: Rope, positions: Array) -> Array | None:
    """What queries at positions i32[B, T] are multiplied by, f32[B, T, 1, 1]; None: by nothing."""
    if rope.heat is None:
        return None
    beta, length = rope.heat
    return (1 + beta * jnp.log1p(positions // length))[..., None, None]


def check_rule(kind: str, rule: dict[str, Any], dim: int, model_type: str) -> None:
    """Raise a UserError unless `kind` is a rule and `rule` holds what it needs for `dim` channels and nothing else."""
    where = f"config.json ({model_type}): rope type {kind!r}"
    if kind not in RULES:
        raise UserError(f"{where} is not supported; supported: {', '.join(map(repr, RULES))}.")
    arguments = [p for p in inspect.signature(RULES[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for argument in arguments:
        if argument.default is argument.empty and rule.get(argument.name) is None:
            raise UserError(f"{where} lacks {argument.name!r}.{nearest(argument.name, rule)}")
    known = [argument.name for argument in arguments]
    for key in rule:
        if key not in known:
            raise UserError(f"{where}: {key!r} is not supported.{nearest(key, known)}")
        if isinstance(rule[key], list) and len(rule[key]) != dim // 2:
            raise UserError(f"{where}: {key!r} lists {len(rule[key])} numbers, expected {dim // 2}.")


def _plain(rope: Rope) -> np.ndarray:
    """[dim/2], Su et al. 2021 (arXiv:2104.09864), section 3.2.2."""
    return 1.0 / rope.theta ** (np.arange(0, rope.dim, 2) / rope.dim)


def _default(rope, length):
    return _plain(rope), 1.0


def _linear(rope, length, *, factor):
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): every position divided by `factor`."""
    return _plain(rope) / factor, 1.0


def _dynamic(rope, length, *, factor, max_position_embeddings):
    """NTK-aware interpolation: a row longer than the model was made for gets a larger base."""
    scale = factor * jnp.maximum(length, max_position_embeddings) / max_position_embeddings - (factor - 1)
    theta = rope.theta * scale[:, None, None, None] ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta ** (np.arange(0, rope.dim, 2) / rope.dim), 1.0


def _llama3(rope, length, *, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1: long wavelengths are multiplied by `factor`, short ones kept, with a ramp between."""
    frequencies = _plain(rope)
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (1 - ramp) * frequencies / factor + ramp * frequencies, 1.0


def _yarn(
    rope,
    length,
    *,
    factor,
    original_max_position_embeddings,
    attention_factor=None,
    beta_fast=None,
    beta_slow=None,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
):
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3: by rotations of each channel, and a temperature."""

    def channel(turns):
        """The channel that makes this many rotations in the original length."""
        return rope.dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / 2 / math.log(rope.theta)

    def temperature(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low, high = channel(beta_fast or 32), channel(beta_slow or 1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = _plain(rope)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = temperature(mscale) / temperature(mscale_all_dim) if both else temperature(1)
    return ramp * frequencies / factor + (1 - ramp) * frequencies, attention_factor


def _longrope(
    rope,
    length,
    *,
    short_factor,
    long_factor,
    original_max_position_embeddings,
    max_position_embeddings,
    factor=None,
    attention_factor=None,
):
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor for each channel, other ones for longer rows."""
    long = (length > original_max_position_embeddings)[:, None, None, None]
    factors = jnp.where(long, np.asarray(long_factor), np.asarray(short_factor))
    if attention_factor is None:
        ratio = factor or max_position_embeddings / original_max_position_embeddings
        growth = math.log(ratio) / math.log(original_max_position_embeddings)
        attention_factor = math.sqrt(1 + growth) if ratio > 1 else 1.0
    return _plain(rope) / factors, attention_factor


RULES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
