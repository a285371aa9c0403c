"""What a family says about a model: static, hashable descriptions that the one decoder is built from."""

import dataclasses
import json
from typing import Literal

from jaxtune.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated as in HF checkpoints.

    Attributes:
        theta: the base of the frequencies.
        dim: channels that are rotated.
        scaling: None, or the "llama3" rule as (factor, low_freq_factor, high_freq_factor, original positions).
    """

    theta: float
    dim: int
    scaling: tuple[float, float, float, int] | None = None


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One transformer block; the defaults are Llama's."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int  # hidden width of the feed-forward part
    rope: Rope | None
    norm: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    act: str = "silu"
    gated: bool = True  # down(act(gate x) * up x); otherwise down(act(up x))
    fused_qkv: bool = False  # one projection qkv_proj over [q | k | v]
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # tokens a query looks back, itself included


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of blocks, repeated; its weights are stacked on axis 0 and scanned."""

    pattern: tuple[BlockSpec, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.pattern) * self.repeats


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A causal language model.

    Attributes:
        vocab: rows of the embedding table.
        width: D, channels of the residual stream.
        segments: the body, lowest first.
        positions: the longest sequence the model knows.
        tied: whether the output head is the embedding table.
        learned_positions: whether a table of position embeddings is added to the tokens'.
        config: the HF config.json, as text (so that the spec stays hashable).
    """

    vocab: int
    width: int
    segments: tuple[Segment, ...]
    positions: int
    tied: bool
    config: str
    learned_positions: bool = False
    norm: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    init_std: float = 0.02

    @property
    def layers(self) -> int:
        return sum(s.layers for s in self.segments)

    @property
    def hf_config(self) -> dict:
        return json.loads(self.config)


def uniform(block: BlockSpec, layers: int) -> tuple[Segment, ...]:
    """The body of a model whose blocks are all alike."""
    return (Segment((block,), layers),)


def by_layer(blocks: list[BlockSpec]) -> tuple[Segment, ...]:
    """Group a list of blocks, one a layer, into segments of equal neighbours."""
    segments: list[Segment] = []
    for block in blocks:
        if segments and segments[-1].pattern == (block,):
            segments[-1] = Segment((block,), segments[-1].repeats + 1)
        else:
            segments.append(Segment((block,), 1))
    return tuple(segments)


class Config:
    """Strict reading of an HF config.json: what a family does not understand is an error, never ignored."""

    def __init__(self, values: dict):
        self.values = values
        self.model_type = values.get("model_type")

    def get(self, key: str, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str):
        if self.values.get(key) is None:
            raise UserError(f"config.json ({self.model_type}) lacks {key!r}.{nearest(key, self.values)}")
        return self.values[key]

    def choice(self, key: str, default, allowed):
        """Return the value of `key` if it is one of `allowed`, which may be a mapping to our names."""
        value = self.get(key, default)
        if value not in allowed:
            raise UserError(
                f"config.json ({self.model_type}): {key}={value!r} is not supported; supported: "
                f"{', '.join(map(repr, allowed))}."
            )
        return allowed[value] if isinstance(allowed, dict) else value

    def rope(self, dim: int) -> Rope:
        """Read `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both."""
        scaling = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        theta = float(scaling.pop("rope_theta", None) or self.get("rope_theta", 10000.0))
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        if kind == "default":
            return Rope(theta, dim)
        if kind == "llama3":
            rule = Config({"model_type": f"{self.model_type}, rope llama3"} | scaling)
            return Rope(
                theta,
                dim,
                (
                    float(rule.need("factor")),
                    float(rule.need("low_freq_factor")),
                    float(rule.need("high_freq_factor")),
                    int(rule.need("original_max_position_embeddings")),
                ),
            )
        raise UserError(
            f"config.json ({self.model_type}): rope type {kind!r} is not supported; supported: 'default', 'llama3'."
        )
