"""Static, hashable descriptions of models, which families make and the one decoder is built from."""

import dataclasses
import json
import math
import re
from typing import Any, Literal

import numpy as np

from jaxtune.errors import UserError, nearest
from jaxtune.models.rope import Rope, check_rule

# "offset": RMSNorm that multiplies by 1 + weight.
NormKind = Literal["rms", "offset", "layer"]


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One transformer block; the defaults are Llama's."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int  # hidden width of the feed-forward part
    rope: Rope | None  # None: no position embedding in the block
    norm: NormKind = "rms"
    norm_bias: bool = True  # whether LayerNorm has one
    eps: float = 1e-6
    # Where attention and the feed-forward part are normalised; "sums": behind each residual sum.
    norms: Literal["before", "after", "around", "sums"] = "before"
    residual: Literal["serial", "parallel", "shared"] = "serial"  # "shared": parallel after one norm
    residual_scale: float = 1.0  # on what is added to the residual stream
    act: str = "silu"
    gated: bool = True  # down(act(gate x) * up x); otherwise down(act(up x))
    fused_gate_up: bool = False  # one projection gate_up_proj over [gate | up]
    fused_qkv: Literal["", "blocks", "heads"] = ""  # one projection qkv_proj over [q | k | v], or that for each head
    experts: int = 0  # feed-forward parts of width `mlp` that each token is routed to; 0: one for all tokens
    experts_per_token: int = 0
    norm_topk: bool = False  # whether the chosen experts' weights sum to 1
    experts_bias: bool = False  # of experts and router
    pairs: tuple[float, float] | None = None  # experts' gates and ups lie side by side; (a, most), see `layers.Experts`
    shared: int = 0  # hidden width of a gated expert for all tokens beside them
    qk_norm: Literal["", "head", "width", "heads"] = ""  # over a head, all heads, or a head with scales of its own
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # tokens a query looks back (without `causal` also ahead), itself included
    causal: bool = True
    scale: float | None = None  # multiplies q.k; default: head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: bool = False  # a trained score a head that stands beside those of the keys and has no value
    cross: bool = False  # whether attention over an encoder's states follows that over the tokens before


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of blocks, repeated; its weights are stacked on axis 0 and scanned."""

    pattern: tuple[BlockSpec, ...]
    repeats: int

    @property
    def layers(self) -> int:
        return len(self.pattern) * self.repeats


@dataclasses.dataclass(frozen=True)
class Relative:
    """A learned bias of attention's scores for each head and bucket of distances, the same in all layers.

    T5's (Raffel et al. 2020, arXiv:1910.10683, section 2.1): half of the buckets are single distances, the others grow
    with their logarithm up to `distance`. Without causality, distances ahead have half of all buckets.
    """

    buckets: int = 32
    distance: int = 128

    def of(self, causal: bool) -> np.ndarray:
        """The bucket of each distance key - query from -`distance` to `distance`, i32[2 * distance + 1]."""
        ahead = np.arange(-self.distance, self.distance + 1)
        count = self.buckets if causal else self.buckets // 2
        far, exact = np.maximum(-ahead, 0) if causal else np.abs(ahead), count // 2
        # In float32, as transformers: at some distances the last digit decides.
        log = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
        wide = exact + (log / np.float32(math.log(self.distance / exact)) * np.float32(count - exact)).astype(np.int32)
        found = np.where(far < exact, far, np.minimum(wide, count - 1))
        return (found if causal else found + (ahead > 0) * count).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A causal language model, or the decoder of an encoder-decoder and its encoder.

    Attributes:
        vocab: rows of the embedding table.
        width: D, channels of the residual stream.
        segments: the body, lowest first.
        positions: tokens of the longest sequence.
        tied: whether the output head is the embedding table.
        head_bias: whether an untied head has a bias.
        learned_positions: whether a table of position embeddings is added to the tokens'.
        first_position: row of that table for a sequence's first token.
        config: the HF config.json, as text (so that the spec stays hashable).
        embed_scale: multiplies the tokens' embeddings.
        scales_prompt: whether it multiplies a soft prompt's vectors, too; not if the embedding module itself scales.
        logits_divisor: divides the logits.
        logits_softcap: logits become softcap * tanh(logits / softcap).
        new_tokens: how many of the table's last rows `resize` added; they are untrained.
        relative: the bias of scores by distance; None: there is none.
        encoder: an `EncoderSpec` that shares the table of tokens; blocks with `cross` attend to its states. None: none.
        start: with an encoder, the token that a target begins with, which is not predicted.
        embed_norm: whether a norm follows the embeddings.
        last_norm: whether one follows the last block.
        logits_bias: whether a bias is added to the logits, f32[1, V], also of a tied head.
        says_tied: config.json says that the head is tied where it is not: transformers lets weights decide, and by this
            setting ties other tables as well.
    """

    vocab: int
    width: int
    segments: tuple[Segment, ...]
    positions: int
    tied: bool
    config: str
    head_bias: bool = False
    learned_positions: bool = False
    first_position: int = 0
    norm: NormKind = "rms"
    norm_bias: bool = True
    eps: float = 1e-6
    init_std: float = 0.02
    embed_scale: float = 1.0
    scales_prompt: bool = True
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    new_tokens: int = 0
    relative: Relative | None = None
    encoder: Any = None
    start: int = 0
    embed_norm: bool = False
    last_norm: bool = True
    logits_bias: bool = False
    says_tied: bool = False

    @property
    def layers(self) -> int:
        return sum(s.layers for s in self.segments)

    @property
    def hf_config(self) -> dict:
        return json.loads(self.config)


def uniform(block: BlockSpec, layers: int) -> tuple[Segment, ...]:
    """The segments of a model whose blocks are all alike."""
    return (Segment((block,), layers),)


def by_layer(blocks: list[BlockSpec]) -> tuple[Segment, ...]:
    """Group a list of blocks, one a layer: a pattern that recurs from the first layer on, then runs of equal ones."""
    layers = len(blocks)
    if not layers:
        return ()
    period = next(p for p in range(1, layers + 1) if blocks[p:] == blocks[:-p])
    segments: list[Segment] = []
    if layers // period > 1:
        segments.append(Segment(tuple(blocks[:period]), layers // period))
        blocks = blocks[layers - layers % period :]
    runs: list[Segment] = []
    for block in blocks:
        if runs and runs[-1].pattern == (block,):
            runs[-1] = Segment((block,), runs[-1].repeats + 1)
        else:
            runs.append(Segment((block,), 1))
    return (*segments, *runs)


# The values that a key of config.json may have: (regex over its name, words, test). The first match applies.
_VALUES = [
    (re.compile(pattern), words, test)
    for pattern, words, test in (
        (
            r"(num_(hidden_|decoder_)?layers|n_layers?|(en|de)coder_layers)",
            "a whole number from 1 to 10,000",
            lambda v: type(v) is int and 0 < v <= 10_000,
        ),
        (
            r"(num_(local_)?experts|type_vocab_size|sliding_window|shared_expert_intermediate_size)",
            "a whole number, 0 or more",
            lambda v: type(v) is int and 0 <= v < 2**31,
        ),
        (
            r"(vocab|hidden|(moe_)?intermediate)_size|num_(attention|key_value)_heads|num_experts_per_tok|num_channels"
            r"|n_(embd|heads?|positions|inner)|dim|hidden_dim|head_dim|max_position_embeddings|local_attention|rotary_dim|ffn_dim|embedding_size"
            r"|d_(model|kv|ff)|num_heads|(en|de)coder_(attention_heads|ffn_dim)|relative_attention_(num_buckets|max_distance)|decoder_sparse_step|sliding_window_pattern|global_attn_every_n_layers|num_labels",
            "a whole number above 0",
            lambda v: type(v) is int and 0 < v < 2**31,
        ),
        (
            r"\w+_(eps|epsilon|theta|factor|multiplier|range|softcapping|scalar|base|freq|pct)|logits?_scal(e|ing)",
            "a finite number",
            lambda v: type(v) in (int, float) and math.isfinite(v),
        ),
        (
            r"(use|tie|is|scale_attn|norm_topk|add|enable)_\w+|\w+_bias",
            "true or false",
            lambda v: type(v) is bool,
        ),
        (r"\w+_(act|activation)|activation\w*|model_type|feed_forward_proj", "text", lambda v: isinstance(v, str)),
        (r"rope_(scaling|parameters)|id2label", "an object", lambda v: isinstance(v, dict)),
        (r"layer_types|architectures|mlp_only_layers|no_rope_layers", "a list", lambda v: isinstance(v, list)),
    )
]


class _Read(dict):
    """The values of a config.json: each is tested when it is read, and which were read is recorded.

    Raises:
        UserError: a value that is invalid for its key.
    """

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        value = super().get(key, default)
        if value is not None and key in self:
            for pattern, words, test in _VALUES:
                if pattern.fullmatch(key):
                    if not test(value):
                        raise UserError(
                            f"config.json ({super().get('model_type')}): {key}={value!r}, expected {words}."
                        )
                    break
        return value

    def __getitem__(self, key):
        return self.get(key)


# Settings that change a model wherever transformers reads them, often undocumented in the family's own config:
# {key: the value that changes nothing}.
_CHANGES = {
    "is_causal": True,
    "use_bidirectional_attention": False,
    "attention_chunk_size": 0,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}


class Config:
    """Strict reading of an HF config.json: a setting that a family does not understand is an error."""

    def __init__(self, values: dict):
        self.values = _Read(values)
        self.model_type = values.get("model_type")

    def get(self, key: str, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def refuse_unread(self) -> None:
        """Raise UserError for a setting that changes models of any family and that this family did not read."""
        left = {k: v for k, v in self.values.items() if v is not None and k not in self.values.asked}
        found = [k for k, inert in _CHANGES.items() if k in left and left[k] != inert]
        if "layer_types" in left and set(self.values["layer_types"]) != {"full_attention"}:
            found.append("layer_types")
        if "head_dim" in left and self.get("hidden_size") != left["head_dim"] * (self.get("num_attention_heads") or 0):
            found.append("head_dim")
        if found:
            raise UserError(
                f"config.json ({self.model_type}): {found[0]}={left[found[0]]!r} is not supported for this model_type."
            )

    def need(self, key: str):
        if self.values.get(key) is None:
            raise UserError(f"config.json ({self.model_type}) lacks {key!r}.{nearest(key, self.values)}")
        return self.values[key]

    def stated(self, key: str, default):
        """Return the value of `key`, `default` where it is absent; where null is no value, unlike in `get`."""
        return self.need(key) if key in self.values else default

    def choice(self, key: str, default, allowed):
        """Return the value of `key` if it is one of `allowed`, which may be a mapping to jaxtune's names."""
        value = self.get(key, default)
        if value not in allowed:
            raise UserError(
                f"config.json ({self.model_type}): {key}={value!r} is not supported; supported: "
                f"{', '.join(map(repr, allowed))}."
            )
        return allowed[value] if isinstance(allowed, dict) else value

    def layer_types(self, default: list[str]) -> list[str]:
        """Each layer's attention, "full_attention" or "sliding_attention"; `default` is what older configs mean."""
        kinds, layers = self.get("layer_types", default), self.need("num_hidden_layers")
        if len(kinds) != layers:
            raise UserError(
                f"config.json ({self.model_type}): layer_types lists {len(kinds)} layers, "
                f"num_hidden_layers is {layers}."
            )
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(
                    f"config.json ({self.model_type}): layer_types={kind!r} is not supported; supported: "
                    "'full_attention', 'sliding_attention'."
                )
        return kinds

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        partial: float | None = None,
        keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
        parameters: dict | None = None,
        interleaved: bool = False,
    ) -> Rope:
        """Read `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both.

        Args:
            head_dim: channels of a head.
            theta: transformers' default for the family.
            partial: the default part of a head that is rotated; None: the family rotates whole heads only.
            keys: names of the base and the part in the family's older configs.
            parameters: used instead of the config's own.
            interleaved: whether neighbouring channels are rotated as pairs.
        """
        if parameters is None:
            parameters = self.get("rope_scaling") or self.get("rope_parameters") or {}
        rule = {key: value for key, value in parameters.items() if value is not None}
        theta = float(rule.pop("rope_theta", None) or self.get(keys[0], theta))
        part = rule.pop("partial_rotary_factor", None) or self.get(keys[1], partial or 1.0)
        if partial is None and part != 1.0:
            raise UserError(f"config.json ({self.model_type}): partial_rotary_factor={part} is not supported here.")
        kind = rule.pop("type", "default")
        kind = rule.pop("rope_type", kind)
        if not isinstance(kind, str):
            raise UserError(f"config.json ({self.model_type}): rope_type={kind!r}, expected text.")
        if kind in ("llama3", "yarn", "longrope"):  # a key outside the rule takes precedence over one in it
            rule |= {k: self.values[k] for k in ("original_max_position_embeddings",) if self.get(k) is not None}
        if kind in ("dynamic", "longrope"):
            rule["max_position_embeddings"] = self.need("max_position_embeddings")
        check_rule(kind, rule, int(head_dim * part), self.model_type)
        frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in rule.items()}
        return Rope(theta, int(head_dim * part), kind, tuple(sorted(frozen.items())), interleaved)

    def ropes(self, head_dim: int, full: float, sliding: float, key: str = "rope_theta") -> dict[str, Rope]:
        """Read a rope for each kind of layer: scaling belongs to "full_attention", `key` to the base of the other.

        Args:
            head_dim: channels of a head.
            full: transformers' default base of layers that see all.
            sliding: of those with a window.
            key: what older configs call the latter.
        """
        rules = self.get("rope_parameters", {})
        if others := rules.keys() - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"config.json ({self.model_type}): rope_parameters has {min(others)!r}, expected a rule for "
                "'full_attention' and one for 'sliding_attention'."
            )
        whole = self.get("rope_scaling", {}) | (rules.get("full_attention") or {})
        local, keys = rules.get("sliding_attention") or {}, (key, "partial_rotary_factor")
        return {
            "full_attention": self.rope(head_dim, theta=full, parameters=whole),
            "sliding_attention": self.rope(head_dim, theta=sliding, keys=keys, parameters=local),
        }
