"""What a training step costs, before anything is loaded: bytes, operations and time, from shapes alone.

    recipe -- method, optimizer --> state, frozen        their bytes are exact
           -- autodiff, traced ---> what it saves        activations, by remat policy
                                    matrix products      operations a token

`measure` counts from JAX's own trace of the loss and its gradient, for any family, method and policy: nothing
is written down per architecture, nothing is compiled, and depth costs nothing since layers are scanned.
`recipe.compiled_bytes` asks XLA for the plan of the whole step on the backend at hand. `Card` says what a device holds
and how fast it goes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.models.attention import choose
from jaxtune.objectives.task import Task
from jaxtune.train.recipe import Recipe, Start
from jaxtune.train.step import over_batch

GIB = 2**30
POLICIES = ("none", "dots", "attention", "full")  # from most memory to least
LAYER = 1.25  # a layer's backward pass holds all values of its forward pass, and some of their gradients
LOGITS = 2  # a chunk's logits and their gradient, float32
COMPUTE, BANDWIDTH = 0.40, 0.80  # fractions of a card's peaks that training reaches: 8B LoRA on an H100 runs at 0.41
SLACK, WORKSPACE = 1.05, GIB  # allocator overhead and library workspaces, beyond the sum of buffers


class Card(NamedTuple):
    """A device: dense bfloat16 FLOP/s with float32 sums, bytes/s, bytes. Vendors' data sheets, memory as shown."""

    flops: float
    bandwidth: float
    memory: int


def _card(tera_flops: float, giga_bytes: float, gib: float) -> Card:
    return Card(tera_flops * 1e12, giga_bytes * 1e9, int(gib * GIB))


CARDS = {
    "b200": _card(2250, 8000, 179),
    "h200": _card(989, 4800, 140),
    "h100": _card(989, 3350, 79.6),
    "h100-pcie": _card(756, 2000, 79.6),
    "a100-80": _card(312, 2039, 80),
    "a100-40": _card(312, 1555, 40),
    "l40s": _card(362, 864, 45),
    "a6000": _card(155, 768, 48),
    "l4": _card(121, 300, 22.5),
    "a10": _card(125, 600, 22.5),
    "rtx5090": _card(209, 1792, 31.8),
    "rtx4090": _card(165, 1008, 24),
    "rtx3090": _card(71, 936, 24),
}


class Bytes(NamedTuple):
    """Device memory of a step by part; `total` is its peak."""

    frozen: int
    trainable: int
    optimizer: int
    gradients: int
    activations: int  # kept by the forward pass for the backward pass
    layer: int  # held by one layer while it is differentiated
    logits: int  # of one chunk of tokens, with their gradient
    batch: int

    @property
    def total(self) -> int:
        """The peak: the head is differentiated before the body, so the larger of the two counts."""
        own = self.trainable + self.optimizer + self.gradients + self.activations
        return self.frozen + self.batch + own + max(self.layer, self.logits)


@dataclass(frozen=True)
class Cost:
    """What a step of a recipe costs on a backend, for any number of rows.

    Attributes:
        backend: "cpu" or "gpu".
        counts: parameters.
        fixed: bytes that do not depend on rows; the other parts are 0.
        kept, layer: (bytes without rows, bytes a row) of what is saved, and of a layer's backward pass.
        flops: of the matrix products, a row of a micro-batch.
    """

    recipe: Recipe
    backend: str
    counts: tree.Counts
    fixed: Bytes
    kept: tuple[float, float]
    layer: tuple[float, float]
    flops: float

    def bytes(self, rows: int, members: int = 1) -> Bytes:
        """Return the memory of a step with `rows` in a micro-batch, for as many members of a sweep."""
        f, batch, chunk = self.fixed, self.recipe.batch, self.recipe.task.chunk
        logits = 0 if chunk is None else chunk(rows * batch.length, members, self.backend)
        return Bytes(
            frozen=f.frozen,
            trainable=members * f.trainable,
            optimizer=members * f.optimizer,
            gradients=members * f.gradients,
            activations=members * int(self.kept[0] + rows * self.kept[1]),
            layer=members * int(self.layer[0] + rows * self.layer[1]),
            logits=members * LOGITS * 4 * logits * self.recipe.module.spec.vocab,
            batch=batch.micros * rows * (batch.length * 20 + 4),
        )

    def split(self, micros: int) -> "Cost":
        """The cost with another number of micro-batches, whose gradients are summed."""
        batch = self.recipe.batch
        once = self.fixed.gradients // (2 if batch.micros > 1 else 1)
        fixed = self.fixed._replace(gradients=once * (2 if micros > 1 else 1))
        return replace(self, recipe=replace(self.recipe, batch=batch._replace(micros=micros)), fixed=fixed)

    def largest(self, memory: int) -> int:
        """Return the most rows of a micro-batch that fit into `memory` bytes; 0: not even one."""
        return _most(lambda rows: fits(self.bytes(rows).total, memory))

    def widest(self, rows: int, memory: int) -> int:
        """Return the most members of a sweep that fit."""
        return _most(lambda members: fits(self.bytes(rows, members).total, memory), 1024)

    def seconds(self, rows: int, card: Card) -> float:
        """Return the time of a step: that of its products or that of its memory traffic, whichever is longer.

        Weights are read three times, saved activations are written and read, and the update reads and writes its state.
        """
        b, micros = self.bytes(rows), self.recipe.batch.micros
        moved = micros * (3 * (b.frozen + b.trainable) + 2 * b.activations)
        moved += 2 * (b.trainable + b.optimizer) + b.gradients
        return max(micros * rows * self.flops / (COMPUTE * card.flops), moved / (BANDWIDTH * card.bandwidth))


class MicroBatch(NamedTuple):
    """A micro-batch: rows on one device, and the remat policy."""

    rows: int
    policy: str


def choose_micro_batch(policies: dict[str, Cost], rows: int, memory: int, card: Card) -> MicroBatch | None:
    """Return the fastest micro-batch and policy that fit `memory` bytes of one device; None: nothing does.

    Args:
        policies: remat policy -> cost, the cheapest to run first.
        rows: of an optimizer step, on one device; it is split into equal parts.
        memory: of one device, in bytes.
        card: its speed, for `Cost.seconds`. Of equals the one with the fewest parts, then the first policy, is taken.
    """
    found = []
    for order, (policy, cost) in enumerate(policies.items()):
        for parts in (n for n in range(1, rows + 1) if rows % n == 0):
            part = cost.split(parts)
            if fits(part.bytes(rows // parts).total, memory):
                found.append((part.seconds(rows // parts, card), parts, order, MicroBatch(rows // parts, policy)))
    return min(found)[-1] if found else None


def card_of(device_kind: str, memory: int) -> Card:
    """The card of a device by its name; for unknown ones only the ratio of the speeds is meaningful."""
    plain = device_kind.lower().replace(" ", "")
    known = next((card for name, card in CARDS.items() if name.partition("-")[0] in plain), None)
    if known is None:
        known = Card(1e12, 4e10, memory) if "cpu" in plain else Card(1.5e14, 1e12, memory)
    return known._replace(memory=memory)


def fits(total: int, memory: int) -> bool:
    """Whether a sum of buffers fits a device, with the needs of its allocator and libraries."""
    return SLACK * total + WORKSPACE <= memory


def _most(holds: Callable[[int], bool], limit: int = 2**20) -> int:
    """Return the largest n up to `limit` for which `holds`, 0 if there is none; it holds for all below it, too."""
    low, high = 0, 1
    while high <= limit and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return min(low, limit)


def nbytes(shapes: Any) -> int:
    """Bytes of a tree of abstract arrays."""
    return sum(_size(x) for x in jax.tree.leaves(shapes))


def _size(x: Any) -> int:
    itemsize = 8 if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.dtype(x.dtype).itemsize
    return math.prod(x.shape) * itemsize


def measure(
    recipe: Recipe, backend: str, known: Start | None = None, everything: tuple[float, float] | None = None
) -> Cost:
    """Return what a step costs.

    The memory is a formula: arguments, gradients, what autodiff saves, and the larger of one layer's backward pass and
    a chunk of logits. The saved arrays are those of JAX's tracing, so what XLA would fuse is counted as it is written.

    Args:
        recipe: the step.
        backend: "cpu" or "gpu".
        known: `recipe.abstract`, or that of a recipe with the same parameters.
        everything: `saved_by(recipe, backend, known, "everything")`, likewise; no policy changes it.
    """
    known = known or recipe.abstract
    everything = everything or saved_by(recipe, backend, known, "everything")
    gradients = 4 * sum(x.size for x in jax.tree.leaves(known.state.trainable))
    fixed = Bytes(
        frozen=nbytes(known.frozen),
        trainable=nbytes((known.state.trainable, known.state.member)),
        optimizer=nbytes(known.state.opt_state),
        gradients=gradients * (2 if recipe.batch.micros > 1 else 1),
        activations=0,
        layer=0,
        logits=0,
        batch=0,
    )
    all_kept = recipe.module.remat == "none" and backend != "cpu"
    kept = everything if all_kept else saved_by(recipe, backend, known, recipe.module.remat)
    base, slope = everything
    # The gradient of a head over chunks is made in the forward pass; it is one of the gradients already.
    head = 0 if recipe.task.chunk is None else nbytes(_head(known.state.trainable))
    layers = recipe.module.spec.layers
    return Cost(
        recipe=recipe,
        backend=backend,
        counts=known.counts,
        fixed=fixed,
        kept=(max(0.0, kept[0] - head), kept[1]),
        layer=(max(0.0, LAYER * (base - head) / layers), LAYER * slope / layers),
        flops=_flops(recipe, backend, known),
    )


def by_policy(recipe: Recipe, backend: str) -> dict[str, Cost]:
    """Return the cost under each remat policy."""
    known = recipe.abstract
    everything = saved_by(recipe, backend, known, "everything")
    return {policy: measure(recipe.with_module(remat=policy), backend, known, everything) for policy in POLICIES}


def _head(trainable: Any) -> list[Any]:
    """The part of the trainable tree that is the output head."""
    own = "lm_head" if "lm_head" in trainable else "embed_tokens"
    return jax.tree.leaves(trainable.get(own))


def saved_by(recipe: Recipe, backend: str, known: Start, policy: str) -> tuple[float, float]:
    """Bytes that the forward pass of a policy saves: (without rows, a row of a micro-batch)."""
    one, two = (_saved(_forward(recipe, backend, known, policy, rows)) for rows in (1, 2))
    return 2 * one - two, two - one


def _traceable(recipe: Recipe, backend: str, policy: str) -> Any:
    """The module as on the planned backend, in a form that any backend can trace.

    cuDNN's attention and blocks keep what the mapped form keeps: their inputs, their output, and two numbers a row.
    """
    module = recipe.module
    block = module.spec.segments[0].pattern[0]
    segmented = recipe.batch.packed or not block.causal  # an encoder tells padding by segments
    rows = {"tokens": recipe.batch.length, "causal": block.causal, "softcap": block.softcap, "segmented": segmented}
    chosen = choose(module.attention, module.dtype, block.head_dim, backend, **rows)
    if policy == "none" and backend != "cpu":
        policy = "everything"
    return module.clone(attention="mapped" if chosen in ("cudnn", "blocks") else chosen, remat=policy)


def _loss(recipe: Recipe, backend: str, known: Start, policy: str, rows: int) -> tuple[Callable[..., Any], tuple]:
    """The differentiated loss of one micro-batch and its abstract arguments."""
    loss_fn = recipe.loss(_traceable(recipe, backend, policy))
    batch = recipe.task.batch_like(recipe.batch._replace(rows=rows, micros=1))
    micro = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batch.items()}

    def forward(trainable, member, frozen, micro, key):
        def loss(trainable):
            params = tree.combine(trainable, member, frozen)
            known = over_batch(loss_fn, params, jax.tree.map(lambda x: x[None], micro))
            (total, weight), _ = known(params, micro, key)
            return total, weight

        return jax.vjp(loss, trainable, has_aux=True)

    return forward, (known.state.trainable, known.state.member, known.frozen, micro, known.state.key)


def _forward(recipe: Recipe, backend: str, known: Start, policy: str, rows: int) -> Any:
    forward, arguments = _loss(recipe, backend, known, policy, rows)
    return jax.make_jaxpr(forward)(*arguments).jaxpr


def _saved(jaxpr: Any) -> int:
    """Bytes of a forward pass's outputs that are not among its inputs."""
    kept = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)} - set(jaxpr.invars)
    return sum(_size(v.aval) for v in kept)


def _flops(recipe: Recipe, backend: str, known: Start) -> float:
    """FLOPs of one row, forward and backward."""
    forward, arguments = _loss(recipe, backend, known, recipe.module.remat, 1)

    def both(*arguments):
        total, pull, _ = forward(*arguments)
        return total, pull(jnp.ones_like(total))

    return dot_flops(jax.make_jaxpr(both)(*arguments).jaxpr, chunks(recipe.task, recipe.batch.length))


def chunks(task: Task, tokens: int, members: int = 1) -> int:
    """Return the iterations of a task's loop over chunks of tokens on this backend; 1 if there is no loop."""
    return 1 if task.chunk is None else math.ceil(tokens / task.chunk(tokens, members, None))


def dot_flops(jaxpr: Any, trips: int = 1) -> float:
    """Return the FLOPs of the matrix products of a jaxpr, 2 a multiplication; loops by their length.

    Args:
        jaxpr: of the function to count.
        trips: iterations of each while loop (the chunks of the cross-entropy), which a jaxpr does not tell.
    """
    total, live = 0.0, {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live & set(eqn.outvars) and not eqn.effects:
            continue  # XLA drops unused results: the gradient of a frozen expert
        live |= {v for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)}
        name = eqn.primitive.name
        if name.startswith("ragged_dot"):  # each row of the left side is multiplied by one of the matrices
            total += 2.0 * eqn.invars[0].aval.size * eqn.outvars[0].aval.shape[-1]
        elif name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        times = {"scan": eqn.params.get("length", 1), "while": trips}.get(name, 1)
        inner = [dot_flops(sub, trips) for sub in _inner(eqn)]
        total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
