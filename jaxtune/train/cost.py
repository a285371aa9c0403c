"""What a training step costs, before anything is loaded: bytes, operations and time, from shapes alone.

    abstract parameters -- method, optimizer --> state, frozen        their bytes are exact
                        -- autodiff, traced ---> what it saves        activations, by remat policy
                                                 matrix products      operations a token

`measure` counts what JAX's own tracing of the loss and its gradient says, for any family, method and policy: nothing
is written down per architecture, nothing is compiled, and depth costs nothing since layers are scanned. `compiled` asks
XLA for the plan of the whole step on the backend at hand. `Card` says what a device holds and how fast it goes.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.models.attention import choose, is_short
from jaxtune.models.classifier import PROBLEMS, SEQUENCE
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.objectives.classification import classification
from jaxtune.objectives.token_nats import chunk_size
from jaxtune.train import watch
from jaxtune.train.step import init_state, make_train_step
from jaxtune.weights.leaf import Packed
from jaxtune.weights.packed import quantize

GIB = 2**30
POLICIES = ("none", "dots", "attention", "full")  # from most memory to least
LAYER = 1.25  # a layer's backward pass holds all that its forward pass makes, and gradients by it
LOGITS = 2  # a chunk's logits and their gradient, float32
COMPUTE, BANDWIDTH = 0.40, 0.80  # shares of a card's peaks that training reaches: 8B LoRA on an H100 runs at 0.41
SLACK, WORKSPACE = 1.05, GIB  # what allocator and library workspaces take beyond the sum of buffers


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


@dataclass(frozen=True)
class Setup:
    """What decides the cost of a step.

    Attributes:
        module: the decoder or classifier; its dtype, remat policy and attention are those of the step.
        method: params -> (params, mask).
        tx: the optimizer.
        rows, length: of a micro-batch, in tokens.
        micros: micro-batches in a step.
        packed: whether rows hold several documents.
        backend: "cpu" or "gpu".
        quantization: of the frozen body, as model.quantization.
    """

    module: Any
    method: Callable[[Any], tuple[Any, Any]]
    tx: Any
    rows: int
    length: int
    micros: int = 1
    packed: bool = False
    z_loss: float = 0.0
    backend: str = "gpu"
    quantization: str = "none"

    @property
    def body(self) -> Any:
        """The module below a label head."""
        return getattr(self.module, "body", self.module)

    @property
    def labels(self) -> Any:
        """What a classifier classifies into; None of a language model."""
        return getattr(self.module, "labels", None)

    def base(self) -> Any:
        """The abstract parameters before the method."""
        params = self.module.abstract_params()
        if self.quantization == "none":
            return params
        return jax.eval_shape(functools.partial(quantize, kind=self.quantization), params)

    def loss(self, module: Any) -> Callable[..., Any]:
        if self.labels is not None:
            return classification(module)
        return causal_lm(module, packed=self.packed, z_loss=self.z_loss)


class Shapes(NamedTuple):
    """Abstract arrays of a step, and the parameters by role."""

    state: Any
    frozen: Any
    counts: tree.Counts


class Bytes(NamedTuple):
    """Device memory of a step by part; `total` is its peak."""

    frozen: int
    trainable: int
    optimizer: int
    gradients: int
    activations: int  # what the forward pass keeps for the backward pass
    layer: int  # what one layer holds while it is differentiated
    logits: int  # of one chunk of tokens, with their gradient
    batch: int

    @property
    def total(self) -> int:
        """The head is differentiated before the body: the larger of the two counts."""
        own = self.trainable + self.optimizer + self.gradients + self.activations
        return self.frozen + self.batch + own + max(self.layer, self.logits)


@dataclass(frozen=True)
class Cost:
    """What a step of a setup costs for any number of rows.

    Attributes:
        counts: parameters.
        fixed: bytes that rows do not change; the other parts are 0.
        kept, layer: (bytes without rows, bytes a row) of what is saved, and of a layer's backward pass.
        flops: of the matrix products, a row of a micro-batch.
    """

    setup: "Setup"
    counts: tree.Counts
    fixed: Bytes
    kept: tuple[float, float]
    layer: tuple[float, float]
    flops: float

    def bytes(self, rows: int, members: int = 1) -> Bytes:
        """Return the memory of a step with `rows` in a micro-batch, for as many members of a sweep."""
        tokens, vocab = rows * self.setup.length, self.setup.module.spec.vocab
        chunk = min(tokens, chunk_size(tokens, vocab, members, self.setup.backend))
        chunk = 0 if self.setup.labels else chunk  # logits of labels are kept with the activations
        f = self.fixed
        return Bytes(
            frozen=f.frozen,
            trainable=members * f.trainable,
            optimizer=members * f.optimizer,
            gradients=members * f.gradients,
            activations=members * int(self.kept[0] + rows * self.kept[1]),
            layer=members * int(self.layer[0] + rows * self.layer[1]),
            logits=members * LOGITS * 4 * chunk * vocab,
            batch=self.setup.micros * rows * (self.setup.length * 20 + 4),
        )

    def split(self, micros: int) -> "Cost":
        """The same with another number of micro-batches, whose gradients are added up."""
        once = self.fixed.gradients // (2 if self.setup.micros > 1 else 1)
        fixed = self.fixed._replace(gradients=once * (2 if micros > 1 else 1))
        return replace(self, setup=replace(self.setup, micros=micros), fixed=fixed)

    def largest(self, memory: int) -> int:
        """Return the most rows of a micro-batch that fit into `memory` bytes; 0: not even one."""
        return _most(lambda rows: fits(self.bytes(rows).total, memory))

    def widest(self, rows: int, memory: int) -> int:
        """Return the most members of a sweep that fit."""
        return _most(lambda members: fits(self.bytes(rows, members).total, memory), 1024)

    def seconds(self, rows: int, card: Card) -> float:
        """Return the time of a step: that of its products or that of its memory traffic, whichever is longer.

        Weights are read three times, what is saved is written and read, and the update reads and writes its state.
        """
        b, micros = self.bytes(rows), self.setup.micros
        moved = micros * (3 * (b.frozen + b.trainable) + 2 * b.activations)
        moved += 2 * (b.trainable + b.optimizer) + b.gradients
        return max(micros * rows * self.flops / (COMPUTE * card.flops), moved / (BANDWIDTH * card.bandwidth))


class Choice(NamedTuple):
    """A micro-batch: rows on one device, and the remat policy."""

    rows: int
    policy: str


def choose_micro_batch(policies: dict[str, Cost], rows: int, memory: int, card: Card) -> Choice | None:
    """Return what is fastest of all that fits `memory` bytes of one device; None: nothing does.

    Args:
        policies: remat policy -> cost, the cheapest to run first.
        rows: of an optimizer step, on one device; it is split into equal parts.
        card: its speed, for `Cost.seconds`. Of equals the one with the fewest parts, then the first policy, is taken.
    """
    found = []
    for order, (policy, cost) in enumerate(policies.items()):
        for parts in (n for n in range(1, rows + 1) if rows % n == 0):
            part = cost.split(parts)
            if fits(part.bytes(rows // parts).total, memory):
                found.append((part.seconds(rows // parts, card), parts, order, Choice(rows // parts, policy)))
    return min(found)[-1] if found else None


def card_of(device_kind: str, memory: int) -> Card:
    """The card of a device by its name; of unknown ones the speeds are only right in proportion."""
    plain = device_kind.lower().replace(" ", "")
    known = next((card for name, card in CARDS.items() if name.partition("-")[0] in plain), None)
    if known is None:
        known = Card(1e12, 4e10, memory) if "cpu" in plain else Card(1.5e14, 1e12, memory)
    return known._replace(memory=memory)


def fits(total: int, memory: int) -> bool:
    """Whether a sum of buffers fits a device, with what its allocator and libraries need beyond them."""
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


def shapes(setup: Setup) -> Shapes:
    """Apply method and optimizer to abstract parameters."""
    found = []

    def first(base):
        params, mask = setup.method(base)
        found.append(tree.count(params, mask))
        part = tree.partition(params, mask)
        state = init_state(part.trainable, part.member, setup.tx, jax.random.key(0), copy=False)
        cast = functools.partial(_cast, dtype=setup.module.dtype)
        return state, jax.tree.map(cast, part.frozen, is_leaf=lambda leaf: isinstance(leaf, Packed))

    state, frozen = jax.eval_shape(first, setup.base())
    return Shapes(state, frozen, found[0])


def _cast(leaf, dtype):
    plain = not isinstance(leaf, Packed) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(dtype) if plain else leaf


def batch_like(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of a step."""
    lead = (setup.micros, setup.rows)
    tokens = jax.ShapeDtypeStruct((*lead, setup.length), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), tokens)
    batch |= {"weights": jax.ShapeDtypeStruct(tokens.shape, jnp.float32), "row": jax.ShapeDtypeStruct(lead, jnp.int32)}
    if setup.labels is not None and setup.labels.kind == SEQUENCE:
        width = 1 if setup.labels.problem == PROBLEMS[0] else len(setup.labels.names)
        del batch["targets"]
        batch["label"] = jax.ShapeDtypeStruct((*lead, width), jnp.float32)
        batch["weights"] = jax.ShapeDtypeStruct(lead, jnp.float32)
    return batch


def nbytes(shapes: Any) -> int:
    """Bytes of a tree of abstract arrays."""
    return sum(_size(x) for x in jax.tree.leaves(shapes))


def _size(x: Any) -> int:
    itemsize = 8 if jnp.issubdtype(x.dtype, jax.dtypes.extended) else np.dtype(x.dtype).itemsize
    return math.prod(x.shape) * itemsize


def measure(setup: Setup, known: Shapes | None = None, everything: tuple[float, float] | None = None) -> Cost:
    """Return what a step costs.

    The memory is a formula: arguments, gradients, what autodiff saves, and the larger of one layer's backward pass and
    a chunk of logits. The saved arrays are those of JAX's tracing, so what XLA would fuse is counted as it is written.

    Args:
        known: `shapes(setup)`, if it is there already.
        everything: `saved_by(setup, known, "everything")`, likewise; no policy changes it.
    """
    known = known or shapes(setup)
    everything = everything or saved_by(setup, known, "everything")
    gradients = 4 * sum(x.size for x in jax.tree.leaves(known.state.trainable))
    fixed = Bytes(
        frozen=nbytes(known.frozen),
        trainable=nbytes((known.state.trainable, known.state.member)),
        optimizer=nbytes(known.state.opt_state),
        gradients=gradients * (2 if setup.micros > 1 else 1),
        activations=0,
        layer=0,
        logits=0,
        batch=0,
    )
    all_kept = setup.body.remat == "none" and setup.backend != "cpu"
    kept = everything if all_kept else saved_by(setup, known, setup.body.remat)
    base, slope = everything
    # The gradient of the head is made in the forward pass; it is one of the gradients already.
    head = 0 if setup.labels else nbytes({k: known.state.trainable[k] for k in _head_of(known.state.trainable)})
    layers = setup.module.spec.layers
    return Cost(
        setup=setup,
        counts=known.counts,
        fixed=fixed,
        kept=(max(0.0, kept[0] - head), kept[1]),
        layer=(max(0.0, LAYER * (base - head) / layers), LAYER * slope / layers),
        flops=_flops(setup, known),
    )


def _head_of(trainable: Any) -> list[str]:
    """The part of the trainable tree that is the output head."""
    own = "lm_head" if "lm_head" in trainable else "embed_tokens"
    return [own] if jax.tree.leaves(trainable.get(own)) else []


def saved_by(setup: Setup, known: Shapes, policy: str) -> tuple[float, float]:
    """Bytes that the forward pass of a policy saves: (without rows, a row of a micro-batch)."""
    one, two = (_saved(_forward(setup, known, policy, rows)) for rows in (1, 2))
    return 2 * one - two, two - one


def _traceable(setup: Setup, policy: str) -> Any:
    """The module as it is on the planned backend, in a form that any backend traces.

    cuDNN's attention keeps what the mapped form keeps: its inputs, its output, and two numbers a row.
    """
    module = setup.module
    block = module.spec.segments[0].pattern[0]
    special = setup.packed or not block.causal  # an encoder tells padding by segments
    short = is_short(setup.length, block.causal)
    chosen = choose(setup.body.attention, special, module.dtype, block.head_dim, setup.backend, short=short)
    if policy == "none" and setup.backend != "cpu":
        policy = "everything"
    return module.clone(attention="mapped" if chosen == "cudnn" else chosen, remat=policy)


def _loss(setup: Setup, known: Shapes, policy: str, rows: int) -> tuple[Callable[..., Any], tuple]:
    """The differentiated loss of one micro-batch and its abstract arguments."""
    loss_fn = setup.loss(_traceable(setup, policy))
    micro = {k: jax.ShapeDtypeStruct((rows, *x.shape[2:]), x.dtype) for k, x in batch_like(setup).items()}

    def forward(trainable, member, frozen, micro, key):
        def loss(trainable):
            (total, weight), _ = loss_fn(tree.combine(trainable, member, frozen), micro, key)
            return total, weight

        return jax.vjp(loss, trainable, has_aux=True)

    return forward, (known.state.trainable, known.state.member, known.frozen, micro, known.state.key)


def _forward(setup: Setup, known: Shapes, policy: str, rows: int) -> Any:
    forward, arguments = _loss(setup, known, policy, rows)
    return jax.make_jaxpr(forward)(*arguments).jaxpr


def _saved(jaxpr: Any) -> int:
    """Bytes that a forward pass returns and was not given."""
    kept = {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)} - set(jaxpr.invars)
    return sum(_size(v.aval) for v in kept)


def _flops(setup: Setup, known: Shapes) -> float:
    """FLOPs of one row, forward and backward."""
    forward, arguments = _loss(setup, known, setup.body.remat, 1)

    def both(*arguments):
        total, pull, _ = forward(*arguments)
        return total, pull(jnp.ones_like(total))

    tokens = setup.length
    chunks = math.ceil(tokens / min(tokens, chunk_size(tokens, setup.module.spec.vocab)))
    return dot_flops(jax.make_jaxpr(both)(*arguments).jaxpr, chunks)


def dot_flops(jaxpr: Any, trips: int = 1) -> float:
    """Return the FLOPs of the matrix products of a jaxpr, 2 a multiplication; loops by their length.

    Args:
        trips: of while loops, whose length a jaxpr does not say: the chunks of the cross-entropy.
    """
    total, live = 0.0, {v for v in jaxpr.outvars if not isinstance(v, jax.extend.core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live & set(eqn.outvars) and not eqn.effects:
            continue  # XLA drops what nobody reads: the gradient of a frozen expert
        live |= {v for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)}
        name = eqn.primitive.name
        if name.startswith("ragged_dot"):  # each row of the left side meets one of the matrices
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


def compiled(setup: Setup, known: Shapes | None = None) -> int:
    """Return the bytes of a step on one device of the backend at hand, as its compiled program plans them."""
    known = known or shapes(setup)
    step = make_train_step(setup.loss(setup.module), setup.tx, group=watch.group)
    return planned_bytes(step.lower(known.state, known.frozen, batch_like(setup)).compile())


def planned_bytes(executable: Any) -> int:
    """Return the device memory of a compiled program, donated buffers once."""
    plan = executable.memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
