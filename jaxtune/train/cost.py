"""What a training step costs, before anything is loaded: bytes, operations and time, from shapes alone.

    recipe -- method, optimizer --> state, frozen        their bytes are exact
           -- autodiff, traced ---> what it saves        activations, by remat policy
                                    what it holds        one layer's backward pass, by `liveness`
                                    matrix products      operations a token

`measure` counts from JAX's own trace of the loss and its gradient, for any family, method and policy: nothing
is written down per architecture, nothing is compiled, and depth costs nothing since layers are scanned.
`recipe.compiled_bytes` asks XLA for the plan of the whole step on the backend at hand. `Card` says what a device holds
and how fast it goes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.models.attention import choose
from jaxtune.objectives.task import Task
from jaxtune.train import liveness
from jaxtune.train.moments import without_host
from jaxtune.train.parallel import BODY, DATA, FSDP, MODEL, lying
from jaxtune.train.recipe import Recipe, Start
from jaxtune.train.step import over_batch

GIB = 2**30
POLICIES = ("none", "dots", "attention", "full", "offload")  # from most memory to least
LOGITS = {4: 2, 2: 3}  # arrays of a chunk's logits, by the bytes of an activation: in float32 one less, made in place
HOST = 20e9  # bytes/s to the host's memory and back, of a card on 16 lanes of PCIe 4
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
    host: int  # kept in the host's memory, no part of the total

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
        gradients: bytes if there is one micro-batch, and if there are several, whose gradients are summed in float32.
        kept, host, layer: (bytes without rows, bytes a row) of what is saved on the device, of what lies in the host's
            memory, and of a layer's backward pass.
        flops: of the matrix products, a row of a micro-batch.
    """

    recipe: Recipe
    backend: str
    counts: tree.Counts
    fixed: Bytes
    gradients: tuple[int, int]
    kept: tuple[float, float]
    host: tuple[float, float]
    layer: tuple[float, float]
    flops: float

    def bytes(self, rows: int, members: int = 1) -> Bytes:
        """Return the memory of a step with `rows` in a micro-batch, for as many members of a sweep."""
        f, batch, chunk = self.fixed, self.recipe.batch, self.recipe.task.chunk
        logits = 0 if chunk is None else chunk(rows * batch.length, members, self.backend)
        itemsize = np.dtype(self.recipe.module.dtype).itemsize
        return f._replace(
            trainable=members * f.trainable,
            optimizer=members * f.optimizer,
            gradients=members * self.gradients[batch.micros > 1],
            activations=members * _line(self.kept, rows),
            layer=members * _line(self.layer, rows),
            logits=members * LOGITS[itemsize] * itemsize * logits * self.recipe.module.spec.vocab,
            batch=batch.micros * rows * (batch.length * 20 + 4),
            host=members * _line(self.host, rows),
        )

    def split(self, micros: int) -> "Cost":
        """The cost with another number of micro-batches."""
        return replace(self, recipe=replace(self.recipe, batch=self.recipe.batch._replace(micros=micros)))

    def largest(self, memory: int) -> int:
        """Return the most rows of a micro-batch that fit into `memory` bytes; 0: not even one."""
        return _most(lambda rows: fits(self.bytes(rows).total, memory))

    def widest(self, rows: int, memory: int) -> int:
        """Return the most members of a sweep that fit."""
        return _most(lambda members: fits(self.bytes(rows, members).total, memory), 1024)

    def seconds(self, rows: int, card: Card) -> float:
        """Return the time of a step: that of its products or that of its memory traffic, whichever is longer.

        What is kept in the host's memory goes there and back; that this overlaps with work has not been seen.
        """
        micros = self.recipe.batch.micros
        seconds = micros * rows * self.flops / (COMPUTE * card.flops)
        host = micros * 2 * self.bytes(rows).host / HOST
        return max(seconds, self.moved(rows) / (BANDWIDTH * card.bandwidth)) + host

    def moved(self, rows: int, members: int = 1) -> int:
        """Return the bytes that a step reads and writes at least in the device's memory.

        Weights are read three times, saved activations are written and read, and the update reads and writes its state.
        """
        b, micros = self.bytes(rows, members), self.recipe.batch.micros
        moved = micros * (3 * (b.frozen + b.trainable) + 2 * b.activations)
        return moved + 2 * (b.trainable + b.optimizer) + b.gradients


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


def _line(line: tuple[float, float], rows: int) -> int:
    return max(0, int(line[0] + rows * line[1]))


def nbytes(shapes: Any) -> int:
    """Bytes of a tree of abstract arrays."""
    return sum(map(liveness.size, jax.tree.leaves(shapes)))


def measure(recipe: Recipe, backend: str, known: Start | None = None) -> Cost:
    """Return what a step costs.

    The memory is a formula: arguments, gradients, what autodiff saves, and the larger of one layer's backward pass and
    a chunk of logits. The saved arrays are those of JAX's tracing, so what XLA would fuse is counted as it is written.

    Args:
        recipe: the step.
        backend: "cpu" or "gpu".
        known: `recipe.abstract`, or that of a recipe with the same parameters.
    """
    known = known or recipe.abstract
    trained = known.state.trainable
    fixed = Bytes(
        frozen=nbytes(known.frozen),
        trainable=nbytes((trained, known.state.member)),
        optimizer=nbytes(without_host(known.state.opt_state)),
        **dict.fromkeys(("gradients", "activations", "layer", "logits", "batch", "host"), 0),
    )
    one, two = (_passes(recipe, backend, known, rows) for rows in (1, 2))
    kept, host, layer = ((2 * a - b, b - a) for a, b in zip(one, two, strict=True))
    host = host[0] + nbytes(known.state.opt_state) - fixed.optimizer, host[1]
    return Cost(
        recipe=recipe,
        backend=backend,
        counts=known.counts,
        fixed=fixed,
        gradients=(nbytes(trained), 8 * sum(x.size for x in jax.tree.leaves(trained))),
        kept=kept,
        host=host,
        layer=layer,
        flops=_flops(recipe, backend, known),
    )


def on_mesh(found: Cost, known: Start, sizes: Mapping[str, int]) -> Cost:
    """The cost on one device of a mesh, a row of that device.

    Args:
        found: on a device alone.
        known: the recipe's `abstract`.
        sizes: devices along each axis of the mesh.
    """
    state, fixed = known.state, found.fixed
    whole, held = held_bytes(state.trainable, {}), held_bytes(state.trainable, sizes)
    fixed = fixed._replace(
        frozen=held_bytes(known.frozen, sizes),
        trainable=held + nbytes(state.member),
        optimizer=held_bytes(without_host(state.opt_state), sizes),
    )
    gradients = tuple(n * held // max(whole, 1) for n in found.gradients)
    layer, rest = gathered_bytes((known.frozen, state.trainable), sizes)
    room = found.layer[0] + 2 * layer + rest  # a layer, while the next is gathered
    layer, flops = (room, found.layer[1]), found.flops / sizes.get(MODEL, 1)
    return replace(found, fixed=fixed, gradients=gradients, layer=layer, flops=flops)


def held_bytes(tree: tree.PyTree, sizes: Mapping[str, int]) -> int:
    """Bytes of a tree, which may be abstract, on one device of a mesh with `sizes`."""
    return sum(liveness.size(x) // math.prod(sizes[axis] for axis in spec if axis) for _, x, spec in lying(tree, sizes))


def gathered_bytes(tree: tree.PyTree, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of the largest layer that a device gathers, and of what it gathers once a micro-batch."""
    layers, rest = Counter(), 0
    for path, x, spec in lying(tree, sizes):
        if FSDP in spec and (segment := BODY.search(path)):
            layers[segment[0]] += liveness.size(x) // x.shape[0]
        elif FSDP in spec:
            rest += liveness.size(x)
    return max(layers.values(), default=0), rest


class Wire(NamedTuple):
    """Bytes that a device sends in a step, by rings."""

    gradients: float  # summed over the devices of the rows
    weights: float  # gathered, forward and backward
    activations: float  # summed over `model`


def wire(recipe: Recipe, known: Start, sizes: Mapping[str, int], rows: int) -> Wire:
    """Return what a device sends in a step.

    Args:
        recipe: the step.
        known: its `abstract`.
        sizes: devices along each axis of the mesh.
        rows: of a micro-batch, on the device.
    """
    data, fsdp, model = (sizes.get(axis, 1) for axis in (DATA, FSDP, MODEL))
    micros, spec, gradients, weights = recipe.batch.micros, recipe.module.spec, 0.0, 0.0
    for _, x, where in lying(known.state.trainable, sizes):  # gradients are float32
        if FSDP in where:
            gradients += 4 * x.size * (micros * ring(fsdp) + 2 * ring(data) / fsdp)
        else:
            gradients += 4 * x.size * 2 * ring(data * fsdp)
    for path, x, where in lying((known.frozen, known.state.trainable), sizes):
        if FSDP in where:  # what lies outside the layers is gathered once
            weights += micros * ring(fsdp) * liveness.size(x) * (2 if BODY.search(path) else 1)
    stream = rows * recipe.batch.length * spec.width * jnp.dtype(recipe.module.dtype).itemsize
    sums = 4 * spec.layers  # attention and feed-forward part, forward and backward
    return Wire(gradients, weights, micros * sums * 2 * ring(model) * stream)


def ring(n: int) -> float:
    """The share of an array that a device sends to gather it, or to sum it and keep a part, among n."""
    return (n - 1) / n


def by_policy(recipe: Recipe, backend: str) -> dict[str, Cost]:
    """Return the cost under each remat policy; on a CPU, whose memory is the host's, nothing is offloaded."""
    known = recipe.abstract
    policies = [p for p in POLICIES if p != "offload" or backend != "cpu" or recipe.module.remat == "offload"]
    return {policy: measure(recipe.with_module(remat=policy), backend, known) for policy in policies}


def _passes(recipe: Recipe, backend: str, known: Start, rows: int) -> tuple[int, int, int]:
    """Bytes of a micro-batch that the forward pass saves, on the device and in the host's memory, and that the backward
    pass holds beside them and the gradients."""
    forward, arguments = _loss(recipe, backend, known, recipe.module.remat, rows)
    jaxpr, (total, pull, _) = jax.make_jaxpr(forward, return_shape=True)(*arguments)
    saved = liveness.returned(jaxpr.jaxpr)
    host = sum(liveness.size(v.aval) for v in saved if liveness.on_host(v.aval))
    kept = sum(liveness.size(v.aval) for v in saved) - host
    if recipe.task.chunk is not None:
        # The gradient of a head over chunks is made in the forward pass; it is one of the gradients already.
        kept -= nbytes(_head(known.state.trainable))
    backward = jax.make_jaxpr(lambda pull, slope: pull(slope))(pull, total).jaxpr
    gradients = sum(liveness.size(v.aval) for v in backward.outvars)
    return kept, host, max(0, liveness.peak(backward) - gradients)


def _head(trainable: Any) -> list[Any]:
    """The part of the trainable tree that is the output head."""
    own = "lm_head" if "lm_head" in trainable else "embed_tokens"
    return jax.tree.leaves(trainable.get(own))


def _chosen(recipe: Recipe, backend: str, policy: str, counted: bool) -> Any:
    """The module as on the planned backend, in a form that any backend can trace.

    Args:
        recipe: of the module.
        backend: "cpu" or "gpu".
        policy: of remat.
        counted: in place of a kernel, whose products a trace does not show, arithmetic that has the same.
    """
    module = recipe.module
    block = module.spec.segments[0].pattern[0]
    segmented = recipe.batch.packed or not block.causal  # an encoder tells padding by segments
    rows = {"tokens": recipe.batch.length, "causal": block.causal, "softcap": block.softcap, "segmented": segmented}
    rows |= {"window": block.window, "most_segments": module.most_segments, "sinks": block.sinks}
    attention = choose(module.attention, module.dtype, block.head_dim, backend, **rows)
    if counted and attention in ("cudnn", "blocks"):
        attention = "mapped"
    if policy == "none" and backend != "cpu":
        policy = "everything"
    return module.clone(attention=attention, remat=policy)


def _loss(
    recipe: Recipe, backend: str, known: Start, policy: str, rows: int, *, counted: bool = False
) -> tuple[Callable[..., Any], tuple]:
    """The differentiated loss of one micro-batch and its abstract arguments; `counted` as in `_chosen`."""
    loss_fn = recipe.loss(_chosen(recipe, backend, policy, counted))
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


def _flops(recipe: Recipe, backend: str, known: Start) -> float:
    """FLOPs of one row, forward and backward."""
    forward, arguments = _loss(recipe, backend, known, recipe.module.remat, 1, counted=True)

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
