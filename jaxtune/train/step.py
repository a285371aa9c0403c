"""The train step: differentiate the trainable part, sum over micro-batches and devices, divide once, update."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxtune.objectives import OverBatch, OverVectors
from jaxtune.train.moments import apply_updates, global_norm, in_place
from jaxtune.train.parallel import Held, row_axes, stay
from jaxtune.tree import Field, PyTree, map_fields

LossFn = Callable[[PyTree, Any, Any], tuple[tuple[jax.Array, jax.Array], dict]] | OverBatch | OverVectors


ROUNDING = 2**32 - 1  # of a step's key: no row has this number


class TrainState(NamedTuple):
    """Everything that training changes or that differs between sweep members, so not the frozen parameters."""

    step: jax.Array  # i32[], optimizer steps done
    trainable: PyTree
    member: PyTree
    opt_state: Any
    key: jax.Array  # PRNG key of dropout


def init_state(
    trainable: PyTree, member: PyTree, tx: optax.GradientTransformation, key: jax.Array, *, copy: bool = True
) -> TrainState:
    """Return the state before the first step.

    The step donates its state; with `copy=False` the caller's own arrays are donated and become unusable.
    """
    if copy:
        trainable, member, key = jax.tree.map(jnp.copy, (trainable, member, key))
    return TrainState(jnp.int32(0), trainable, jax.tree.map(jnp.asarray, member), tx.init(trainable), key)


def value_and_grad(loss_fn: LossFn, mesh: Mesh | None = None) -> Callable[..., Any]:
    """Return `f(trainable, member, frozen, batch, key) -> (sum, weight, grads)`, sums over the whole batch.

    `batch` has leading axes [A, B]: A micro-batches one after another, B rows split over the mesh. Gradients are of
    the sum, in float32, and exist for `trainable` only. Nothing is divided here, so any split gives the same numbers.
    """
    gradients = _gradients(loss_fn, mesh)
    return lambda *args: gradients(*args)[:3]


def _gradients(loss_fn: LossFn, mesh: Mesh | None) -> Callable[..., Any]:
    """`value_and_grad`, that also returns the sums of what the loss counts as "means": {name: (sum, count)}."""

    def local(held, trainable, member, frozen, batch, key):
        known = over_batch(loss_fn, held.join(trainable, member, frozen), batch, mesh)

        def loss(trainable, micro):
            (total, weight), aux = known(held.join(trainable, member, frozen), micro, key)
            return total, (weight, aux.get("means", {}))

        micros = jax.tree.leaves(batch)[0].shape[0]

        def one(micro):
            (total, (weight, means)), grads = jax.value_and_grad(loss, has_aux=True)(trainable, micro)
            if micros > 1 or (mesh is not None and mesh.size > 1):  # else a sum of one, which needs no wider copy
                grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return total, weight, grads, means

        sums = one(jax.tree.map(lambda x: x[0], batch))
        if micros > 1:
            rest = jax.tree.map(lambda x: x[1:], batch)
            sums, _ = jax.lax.scan(lambda s, m: (jax.tree.map(jnp.add, s, one(m)), None), sums, rest)
        total, weight, grads, means = sums
        total, weight, means = held.sum((total, weight, means))
        return total, weight, held.sum_grads(grads), means

    if isinstance(loss_fn, OverVectors):
        local = _through_vectors(loss_fn, mesh)
    return _over_mesh(local, mesh, grads=True)


def _over_mesh(local: Callable[..., Any], mesh: Mesh | None, *, grads: bool = False) -> Callable[..., Any]:
    """Run `local(held, trainable, member, frozen, batch, ...)` on every device, with its rows and parts of the trees.

    With `grads` its third result are gradients by `trainable`, which lie where that does.
    """
    if mesh is None:
        return partial(local, Held())

    def over_mesh(trainable, member, frozen, batch, *rest):
        held = Held.of(mesh, trainable, member, frozen)
        whole, rows = PartitionSpec(), PartitionSpec(None, row_axes(mesh))
        return jax.shard_map(
            partial(local, held),
            mesh=mesh,
            in_specs=(*held.specs, rows, *[whole] * len(rest)),
            out_specs=(whole, whole, held.specs[0], whole) if grads else whole,
            axis_names=held.names,
            check_vma=False,
        )(trainable, member, frozen, batch, *rest)

    return over_mesh


def _through_vectors(loss_fn: OverVectors, mesh: Mesh | None) -> Callable[..., Any]:
    """The gradients of a loss over the vectors of the whole batch; see `OverVectors`."""

    def local(held, trainable, member, frozen, batch, key):
        def vectors(trainable, micro):
            return loss_fn.vectors(held.join(trainable, member, frozen), micro, key)

        micros = jax.tree.leaves(batch)[0].shape[0]
        first = jax.tree.map(lambda x: x[0], batch)
        if micros == 1:
            own, back = jax.vjp(lambda trainable: vectors(trainable, first)[None], trainable)
        else:
            own = jax.lax.map(lambda micro: vectors(trainable, micro), batch)
        params, about = held.join(trainable, member, frozen), whole_batch(loss_fn.about(batch), mesh)

        def loss(every):
            (total, weight), aux = loss_fn.loss(params, every, about)
            return total, (weight, aux.get("means", {}))

        every = whole_batch(own, mesh)
        (total, (weight, means)), wanted = jax.value_and_grad(loss, has_aux=True)(every)
        wanted = _own_rows(wanted, own, mesh)
        if micros == 1:
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), back(wanted)[0])
        else:

            def add(sums, given):
                micro, wanted = given
                grads = jax.vjp(lambda trainable: vectors(trainable, micro), trainable)[1](wanted)[0]
                return jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, grads), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
            grads, _ = jax.lax.scan(add, zeros, (batch, wanted))
        return total, weight, held.sum_grads(grads), means

    return local


def whole_batch(part: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays [A, B, ...] of a device to those of all rows of the batch [D * A * B, ...], device by device."""
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), part)
    return flat if mesh is None else jax.tree.map(lambda x: jax.lax.all_gather(x, row_axes(mesh), tiled=True), flat)


def _own_rows(whole: jax.Array, own: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The rows of a device out of those of all, in the shape of `own` [A, B, ...]."""
    if mesh is None:
        return whole.reshape(own.shape)
    count = own.shape[0] * own.shape[1]
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(row_axes(mesh)) * count, count).reshape(own.shape)


def over_batch(loss_fn: LossFn, params: PyTree, batch: Any, mesh: Mesh | None = None) -> Callable[..., Any]:
    """The loss of a micro-batch, told what it has to know of the whole batch [A, B, ...]."""
    if isinstance(loss_fn, OverVectors):
        return loss_fn.alone
    if not isinstance(loss_fn, OverBatch):
        return loss_fn
    found = jax.tree.map(lambda x: x.sum(0), jax.lax.map(lambda micro: loss_fn.sums(params, micro, None), batch))
    found = jax.lax.stop_gradient(found if mesh is None else jax.lax.psum(found, row_axes(mesh)))
    return lambda params, micro, key: loss_fn.loss(params, micro, key, found)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    group: Callable[[str, Field | None], str] | None = None,
    jit: bool = True,
) -> Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Return `step(state, frozen, batch) -> (state, metrics)`.

    `state` is donated, `frozen` never is. `metrics` are f32[]: loss (mean over trained tokens), weight (their number),
    grad_norm (before clipping), and the means that the loss counts.

    Args:
        loss_fn: (params, batch, key) -> ((sum, weight), counts); see `value_and_grad`.
        tx: the optimizer of `state.trainable`.
        mesh: of the devices that share a batch; None: one device.
        group: (path of a trainable array, what it is to its leaf) -> group, as `watch.group`; then `metrics` also hold
            grad_norm/GROUP (before clipping), and update_ratio/GROUP: the norm of the update over that of the updated
            weights.
        jit: compile the step; False leaves that to the caller, who may `vmap` over the state first.
    """
    gradients, update = _gradients(loss_fn, mesh), optax.with_extra_args_support(tx).update

    def step(state, frozen, batch):
        key = jax.random.fold_in(state.key, state.step)
        total, weight, grads, means = gradients(state.trainable, state.member, frozen, batch, key)
        weight = jnp.where(weight > 0, weight, 1.0)
        grads = in_place(lambda g: g / weight, grads)
        metrics = {"loss": total / weight, "weight": weight, "grad_norm": global_norm(grads)}
        metrics |= {name: value / jnp.maximum(count, 1) for name, (value, count) in means.items()}
        norms = {} if group is None else _norms(group, grads)
        # Read before the update: it may then write over the gradients, where XLA would keep a copy of them.
        grads, metrics, norms = jax.lax.optimization_barrier((grads, metrics, norms))
        updates, opt_state = update(grads, state.opt_state, state.trainable, grad_norm=metrics["grad_norm"])
        trainable = apply_updates(state.trainable, updates, jax.random.fold_in(key, ROUNDING))
        if group is not None:
            moved, weights = _norms(group, updates), _norms(group, trainable)
            for name, norm in norms.items():
                metrics[f"grad_norm/{name}"] = norm
                metrics[f"update_ratio/{name}"] = moved[name] / jnp.where(weights[name] > 0, weights[name], 1.0)
        state = TrainState(state.step + 1, trainable, state.member, opt_state, state.key)
        return stay(state, mesh), metrics

    return jax.jit(step, donate_argnums=0) if jit else step


def _norms(group: Callable[..., str], arrays: PyTree) -> dict[str, jax.Array]:
    """The norm of each group of arrays."""
    squares = Counter()

    def add(path, array, field):
        squares[group(path, field)] += jnp.square(array.astype(jnp.float32)).sum()

    map_fields(add, arrays)
    return {name: jnp.sqrt(square) for name, square in squares.items()}


def make_eval_step(loss_fn: LossFn, mesh: Mesh | None = None, *, jit: bool = True) -> Callable[..., Any]:
    """Return `evaluate(trainable, member, frozen, batch) -> (sum, weight, aux)`, batch [A, B, ...], no dropout.

    All are sums over the rows; `aux` are the loss's further counts.
    """

    def local(held, trainable, member, frozen, batch):
        params = held.join(trainable, member, frozen)
        if isinstance(loss_fn, OverVectors):
            own = jax.lax.map(lambda micro: loss_fn.vectors(params, micro, None), batch)
            (total, weight), aux = loss_fn.loss(params, whole_batch(own, mesh), whole_batch(loss_fn.about(batch), mesh))
            return total, weight, aux
        known = over_batch(loss_fn, params, batch, mesh)

        def one(micro):
            (total, weight), aux = known(params, micro, None)
            return total, weight, aux

        return held.sum(jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, batch)))

    local = _over_mesh(local, mesh)
    return jax.jit(local) if jit else local
