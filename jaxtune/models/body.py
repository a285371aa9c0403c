"""Shared by decoders and encoders: segments of stacked blocks under `scan`, and the fields that set how they run."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models import rope
from jaxtune.models.attention import Segments, choose, segments_of
from jaxtune.models.layers import Context, leaf
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Segment
from jaxtune.weights.leaf import Array, embed, fold, is_sharded

DEPTHS = "depths"  # the collection of what each block returns; `depths` reads it

# The activations of a block that are kept for the backward pass; the rest is recomputed. Memory grows downwards.
REMAT = {
    "full": (),
    "attention": ("qkv", "attention"),
    "dots": ("qkv", "attention", "mlp", "low"),
    "everything": None,  # on any backend what "none" is on a GPU
}
# Kept in the host's memory by "offload", copied there and back beside the layers' own work: each block's input, and the
# output of attention, whose recomputation grows with the square of a row.
OFFLOADED = ("input", "attention")
# On a CPU "none" keeps only results of large matrix products and random bits: the rest is cheaper to recompute than
# to write and read, and each use of it would be kept as a separate array.
PRODUCTS = ("qkv", "heads", "scores", "attention", "residual", "mlp", "low", "dropout")


def keeping(remat: str) -> Any:
    """The policy of `jax.checkpoint` for a value of `Body.remat`; None: all is kept, and nothing is recomputed."""
    policies = jax.checkpoint_policies
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(OFFLOADED),
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = REMAT.get(remat, PRODUCTS if jax.default_backend() == "cpu" else None)
    return None if kept is None else policies.save_only_these_names(*kept)


@functools.lru_cache(maxsize=64)
def _abstract_params(module: "Body") -> Any:
    """Traced once for each model: it takes a tenth of a second, and loading asks for it several times."""
    return jax.eval_shape(module.init_params, jax.random.key(0))


class Pattern(nn.Module):
    """One repeat of a segment: its blocks in order. Scanned over the repeats."""

    block: type[nn.Module]
    segment: Segment
    first: int  # index of the segment's first layer in the model
    implementation: str
    std: float

    @nn.compact
    def __call__(self, carry, repeat: Array, ctx: Context):
        x, caches = carry
        caches = list(caches)
        for i, spec in enumerate(self.segment.pattern):
            layer = self.first + repeat * len(self.segment.pattern) + i
            here = ctx._replace(keys=fold(ctx.keys, layer))
            x = checkpoint_name(
                x, "residual" if i else "input"
            )  # unless it is offloaded, the scan keeps the first itself
            x, caches[i] = self.block(spec, self.implementation, self.std, name=f"block_{i}")(
                x, here, caches[i], repeat
            )
            self.sow(DEPTHS, f"after_{i}", x)  # nothing, unless they are asked for
        return (x, tuple(caches)), None


class Body(nn.Module):
    """A model's embeddings and blocks.

    Attributes:
        spec: the architecture.
        dtype: of activations; parameters are cast to it when they are used.
        attention: "auto", "mapped", "blocks", "xla" or "cudnn".
        most_segments: of a packed row; 0: any number.
        remat: "none" keeps every activation for the backward pass, "offload" what `OFFLOADED` names; see `REMAT`.
        unroll: blocks in one iteration of the scan.
        start, stop: the segments that `hidden` runs, as a slice. Above 0, `start` makes it take the residual stream
            [B, T, D] that the segments below left in place of tokens; a `stop` makes it return that stream.
    """

    spec: Any
    dtype: Any = jnp.float32
    attention: str = "auto"
    most_segments: int = 0
    remat: str = "none"
    unroll: int = 1
    start: int = 0
    stop: int | None = None

    # The interface of any model; `Decoder` and `Classifier` override what differs.
    continues = False
    is_encoder = True
    reads_source = False  # whether an encoder reads another text than the one that is predicted
    label_head = False
    new_head = False  # whether a label head is newly initialised rather than read from a checkpoint
    label_config = None  # the HF config with the labels' names
    auto_class = "AutoModel"  # the class of transformers that loads an export
    task_type = "FEATURE_EXTRACTION"  # peft's

    def names(self, table: NameTable) -> NameTable:
        """The family's name table, as it applies to a checkpoint of this model."""
        return dataclasses.replace(table, bare=True)

    def drawn(self, entries: Mapping[str, Any], table: NameTable, key: Array | None) -> dict[str, Array]:
        """{path: array} of parameters that are initialised instead of read from a checkpoint with these tensors."""
        return {}

    def run(
        self, block: type[nn.Module], x: Array, positions: Array, ctx: Context, cache: Any = None
    ) -> tuple[Array, Any]:
        """Run the segments over the residual stream: (x [B, T, D], the new cache or None).

        Args:
            block: the class of the segments' blocks: `(spec, implementation, std)`, called as `layers.Block` is.
            x: [B, T, D].
            positions: i32[B, T].
            ctx: what every block reads; its ropes are filled in here.
            cache: a tree of keys and values a segment, to read and extend; None: no cache.
        """
        spec, length = self.spec, positions.max(-1) + 1
        if cache is not None:
            length = jnp.full_like(length, min(jax.tree.leaves(cache)[0].shape[2], spec.positions))
        # Not a set: its order, and so the program, would change from process to process.
        ropes = dict.fromkeys(b.rope for s in spec.segments for b in s.pattern if b.rope is not None)
        tables = {str(r): (rope.tables(r, positions, length), rope.heat(r, positions)) for r in ropes}
        ctx = ctx._replace(ropes=tables, segments=self._laid(ctx.segments))
        pattern = Pattern
        policy = keeping(self.remat)
        if policy is None and any(map(is_sharded, jax.tree.leaves(self.variables, is_leaf=is_sharded))):
            # All of it would be kept: what each layer has gathered as well.
            policy = jax.checkpoint_policies.save_only_these_names(*PRODUCTS)
        if policy is not None and cache is None:
            pattern = nn.remat(Pattern, policy=policy, prevent_cse=False)
        first, caches = sum(segment.layers for segment in spec.segments[: self.start]), []
        for i, segment in list(enumerate(spec.segments))[self.start : self.stop]:
            scanned = nn.scan(
                pattern,
                variable_axes={"params": 0, DEPTHS: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=segment.repeats,
                unroll=min(self.unroll, segment.repeats),
            )(block, segment, first, self.attention, spec.init_std, name=f"segment_{i}")
            held = (None,) * len(segment.pattern) if cache is None else cache[i]
            (x, held), _ = scanned((x, held), jnp.arange(segment.repeats), ctx)
            caches.append(held)
            first += segment.layers
        return x, None if cache is None else tuple(caches)

    def bias(self, tokens: int, queries: Array | None = None) -> Array | None:
        """The bias of scores by distance, f32[1 or B, H, T, S] of S = `tokens` keys; None: the model has none.

        Args:
            tokens: keys, at positions 0, 1, ...
            queries: positions i32[B, T] of the queries; None: those of the keys.
        """
        relative = self.spec.relative
        if relative is None:
            return None
        block = self.spec.segments[0].pattern[0]
        keys = np.arange(tokens)
        ahead = keys - (keys[None] if queries is None else queries)[..., None]
        most = relative.distance
        buckets = jnp.asarray(relative.of(block.causal))[jnp.clip(ahead, -most, most) + most]
        table = Table(relative.buckets, block.heads, self.spec.init_std, name="relative_bias")()
        return jnp.moveaxis(embed(buckets, table).astype(jnp.float32), -1, 1)

    def depths(self, params: Any, *given: Any, **named: Any) -> list[Array]:
        """The residual stream [B, T, D] after each block, before the first one as well; the last one is what `hidden`
        returns. Arguments as those of `hidden`.
        """
        x, found = self.apply({"params": params}, *given, **named, method="hidden", mutable=[DEPTHS])
        (first,), stream = found[DEPTHS].pop("embedded"), []
        for i, segment in enumerate(self.spec.segments):
            blocks = [found[DEPTHS][f"segment_{i}"][f"after_{j}"][0] for j in range(len(segment.pattern))]
            stream += [block[repeat] for repeat in range(segment.repeats) for block in blocks]
        return [first, *stream[:-1], x]

    def _laid(self, ids: Array | None) -> Segments | None:
        """The segments, with what attention's kernel wants to know of them: once, not in each layer."""
        if ids is None:
            return None
        for block in {b for s in self.spec.segments for b in s.pattern}:
            rows = {"causal": block.causal, "window": block.window, "segmented": True}
            rows |= {"softcap": block.softcap, "tokens": ids.shape[1], "most_segments": self.most_segments}
            rows |= {"sinks": block.sinks}
            if choose(self.attention, self.dtype, block.head_dim, **rows) == "cudnn":
                return segments_of(ids, block.causal, self.most_segments)
        return Segments(ids, most=self.most_segments)

    def init_params(self, key: Array) -> Any:
        """Random float32 parameters, as for pretraining."""
        return self.init(key, jnp.zeros((1, 2), jnp.int32), method="hidden")["params"]

    def abstract_params(self) -> Any:
        """Shapes and dtypes of `init_params`, nothing allocated."""
        return jax.tree.map(lambda leaf: leaf, _abstract_params(self))

    def table(self, name: str, rows: int) -> Any:
        """An embedding table [rows, D], or as wide as the spec says tables are."""
        width = getattr(self.spec, "embed_width", None) or self.spec.width
        return Table(rows, width, self.spec.init_std, name=name)()


class Table(nn.Module):
    rows: int
    width: int
    std: float

    @nn.compact
    def __call__(self):
        return leaf(self, "embedding", nn.initializers.normal(self.std), (self.rows, self.width))
