"""Many runs in one step: their states stacked on a leading axis, one frozen base under all of them.

    states [solo, solo, ...] -- stack --> state [K, ...] -- vmapped step --> state' [K, ...] -- unstack --> solo

What differs between members is an array in the state, so one executable serves all. Members of different LoRA ranks are
padded with zeros to the largest: zero rows of `a` and `b` get zero gradients, and stay zero under any optimizer that
works entry by entry (`Optimizer.elementwise`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.train.parallel import row_axes
from jaxtune.train.step import LossFn, TrainState, make_eval_step, make_train_step
from jaxtune.tree import PyTree


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stack the states of K members on a new axis 0; smaller leaves are padded with zeros at their ends.

    A leaf that only some members have (a dropout rate) is 0 in the others.

    Raises:
        ValueError: the states differ in more than shapes and missing leaves.
    """
    return _stack(tuple(states))


@jax.jit  # as `_cut` and `_take`: one program, where each leaf by itself would be several for each shape
def _stack(states: tuple[TrainState, ...]) -> TrainState:
    flat = [_flatten(state) for state in states]
    if len({structure for _, structure in flat}) > 1:
        raise ValueError("the members of a sweep differ in the structure of their states")
    leaves = [_stack_leaf(same) for same in zip(*(leaves for leaves, _ in flat), strict=True)]
    return jax.tree.unflatten(flat[0][1], leaves)


def _stack_leaf(leaves: Sequence[Any]) -> Any:
    there = [leaf for leaf in leaves if leaf is not None]
    if not there:
        return None
    if jnp.issubdtype(there[0].dtype, jax.dtypes.prng_key):
        return jnp.stack(leaves)
    shape = tuple(np.max([leaf.shape for leaf in there], axis=0))

    def fit(leaf):
        if leaf is None:
            return jnp.zeros(shape, there[0].dtype)
        if leaf.shape == shape:
            return leaf
        return jnp.pad(leaf, [(0, most - n) for most, n in zip(shape, leaf.shape, strict=True)])

    return jnp.stack([fit(leaf) for leaf in leaves])


def unstack(state: TrainState, member: int, like: TrainState) -> TrainState:
    """Return the state of one member as a single run; `like` has its shapes and missing leaves, and may be abstract."""
    leaves, structure = _flatten(state)
    shapes = tuple(None if leaf is None else leaf.shape for leaf in _flatten(like)[0])
    return jax.tree.unflatten(structure, _cut(leaves, member, shapes))


@partial(jax.jit, static_argnums=2)
def _cut(leaves: list[Any], member: Any, shapes: tuple[tuple[int, ...] | None, ...]) -> list[Any]:
    def cut(leaf, shape):
        return None if shape is None else leaf[member][tuple(slice(n) for n in shape)]

    return [cut(*pair) for pair in zip(leaves, shapes, strict=True)]


def take(state: TrainState, members: Sequence[int]) -> TrainState:
    """Return the stacked state of some of the members, in this order."""
    return _take(state, np.asarray(members))


@jax.jit
def _take(state: TrainState, members: jax.Array) -> TrainState:
    return jax.tree.map(lambda x: x[members], state)


def _flatten(state: TrainState) -> tuple[list[Any], Any]:
    return jax.tree.flatten(state, is_leaf=lambda x: x is None)


def make_sweep_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    shared_batch: bool = True,
    group: Callable[..., str] | None = None,
) -> Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Return `step(state, frozen, batch) -> (state, metrics)` over a stacked state; metrics are f32[K].

    Args:
        loss_fn: see `make_train_step`.
        tx: the optimizer; its hyperparameters are in the state, one for each member.
        mesh: see `make_train_step`.
        shared_batch: all members see the same batch [A, B, ...]; otherwise batches are [K, A, B, ...].
        group: see `make_train_step`.

    As in `make_train_step`, `state` is donated. Clipping and dropout keys are the member's own.
    """
    step = make_train_step(loss_fn, tx, mesh, group=group, jit=False)
    return jax.jit(jax.vmap(step, in_axes=(0, None, None if shared_batch else 0)), donate_argnums=0)


def make_sweep_eval_step(loss_fn: LossFn, mesh: Mesh | None = None) -> Callable[..., Any]:
    """Return `evaluate(trainable, member, frozen, batch) -> (sum, weight, aux)`, [K, ...] each, of the same batch."""
    return jax.jit(jax.vmap(make_eval_step(loss_fn, mesh, jit=False), in_axes=(0, 0, None, None)))


def shard_members(batch: Any, mesh: Mesh) -> Any:
    """Put a host batch [K, A, B, ...] on the devices, rows split."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, None, row_axes(mesh))))
