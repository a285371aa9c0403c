"""Optimizers and schedules from optax. Values that vary between sweep members are arrays in the optimizer's state."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.errors import UserError, nearest
from jaxtune.train.moments import global_norm, in_8_bits, in_place, on_host, state_in_float32
from jaxtune.train.optimizers import OPTIMIZERS, SETTINGS
from jaxtune.tree import Field, map_fields


def schedule(
    name: str = "constant", *, steps: int, warmup: float = 0.0, min_lr_ratio: float = 0.0
) -> Callable[[Any], Any]:
    """Return the shape of a learning rate over the run: step -> multiplier in (0, 1].

    Args:
        name: "constant", "linear" or "cosine" decay after the warmup.
        steps: optimizer steps of the whole run.
        warmup: steps of linear warmup; below 1, a share of `steps`.
        min_lr_ratio: the multiplier after the last step, except for "constant".
    """
    up = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    span = max(1, steps - up)

    def shape(step):
        rise = jnp.minimum(1.0, (step + 1) / max(1, up))
        done = jnp.clip((step - up) / span, 0.0, 1.0)
        fall = {
            "constant": jnp.ones_like(done),
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        }[name]
        if name != "constant":
            fall = min_lr_ratio + (1.0 - min_lr_ratio) * fall
        return rise * fall

    return shape


def _is_matrix(path: str, array: Any, field: Field | None) -> bool:
    """Whether an array is a matrix: stacked norms, biases and fields that a leaf declares as vectors are not."""
    if field is not None:
        return field.ndim >= 2
    return array.ndim >= 2 and not re.search(r"(^|/)(scale|(\w+_)?bias|sinks)(/value)?$", path)


def decay_mask(params: Any) -> Any:
    """True for matrices (LoRA factors too); norms and biases, stacked or not, are not decayed."""
    return map_fields(_is_matrix, params)


def _faster(params: Any) -> Any:
    """True for LoRA's `b` and for vectors, as in peft's create_loraplus_optimizer; not for an embedding's `b`."""

    def faster(path, array, field):
        table = re.search(r"(^|/)embedding(/|$)", path)
        return (field is not None and field.faster and not table) or not _is_matrix(path, array, field)

    return map_fields(faster, params)


def clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients down to a global norm, which is summed in float32 whatever their dtype is.

    A caller who knows their norm passes it to the update as `grad_norm`.
    """

    def update(updates, state, params=None, *, grad_norm=None, **others):
        norm = global_norm(updates) if grad_norm is None else grad_norm
        share = jnp.where(norm < largest, 1.0, largest / norm)
        return in_place(lambda g: g * share, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def by_matrix(
    matrix: optax.GradientTransformation,
    vector: optax.GradientTransformation,
    over: Callable[..., Any] = jax.vmap,
) -> optax.GradientTransformation:
    """Apply one transformation to every matrix of a tree and another to every vector, over their layer axes.

    A matrix is the last two axes of an array [*L, K, N], a vector the last of a stack of norms, biases or a leaf's
    vectors [*L, N].

    Args:
        matrix: of matrices.
        vector: of vectors.
        over: maps an update over a layer axis: all layers at once, or `one_by_one`.
    """

    def parts(tree):
        """(transformation, number of layer axes) of each array, in the tree's order."""
        found = []

        def see(path, array, field):
            is_matrix = _is_matrix(path, array, field)
            own = min(array.ndim, (1 + is_matrix) if field is None else field.ndim)
            found.append((matrix if is_matrix else vector, array.ndim - own))
            return 0

        map_fields(see, tree)
        return found

    def over_layers(fn, axes, over=jax.vmap):
        for _ in range(axes):
            fn = over(fn)
        return fn

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        states = [over_layers(tx.init, n)(leaf) for (tx, n), leaf in zip(parts(params), leaves, strict=True)]
        return jax.tree.unflatten(structure, states)

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        held = leaves if params is None else structure.flatten_up_to(params)
        done = [
            over_layers(tx.update, n, over)(leaf, own, weight)
            for (tx, n), leaf, own, weight in zip(
                parts(updates), leaves, structure.flatten_up_to(state), held, strict=True
            )
        ]
        return tuple(jax.tree.unflatten(structure, half) for half in zip(*done))

    return optax.GradientTransformation(init, update)


def one_by_one(update: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` of an update, one entry after the other, in place: its other arrays exist for one entry at a time."""

    def mapped(grads, state, weights):
        def body(i, done):
            update_, state_ = update(*jax.tree.map(lambda x: x[i], (*done, weights)))
            return jax.tree.map(lambda x, new: x.at[i].set(new.astype(x.dtype)), done, (update_, state_))

        return jax.lax.fori_loop(0, len(grads), body, (grads, state))

    return mapped


def streamed(update: Callable[..., Any]) -> Callable[..., Any]:
    """`one_by_one` of a state in the host's memory: entries come and go beside the work on others."""

    def mapped(grads, state, weights):
        def body(grads, given):
            i, state, weight = given
            update_, state = update(grads[i], state, weight)
            return grads.at[i].set(update_.astype(grads.dtype)), state

        return jax.lax.scan(body, grads, (jnp.arange(len(grads)), state, weights))

    return mapped


def in_parts(
    tx: optax.GradientTransformation, most: int = 2**24, over: Callable[..., Any] = one_by_one
) -> optax.GradientTransformation:
    """Apply a transformation that works entry by entry to at most so many entries of a matrix at a time."""

    def parts(x):
        rows, columns = x.shape if x.ndim == 2 else (1, 0)
        count = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * columns <= most or n == rows))
        return x.reshape(count, -1, *x.shape[1:]) if count > 1 else None

    def init(weights):
        cut = parts(weights)
        return tx.init(weights) if cut is None else jax.vmap(tx.init)(cut)

    def update(grads, state, weights=None):
        if (cut := parts(grads)) is None:
            return tx.update(grads, state, weights)
        updates, state = over(tx.update)(cut, state, weights if weights is None else parts(weights))
        return updates.reshape(grads.shape), state

    return optax.GradientTransformation(init, update)


def optimizer(
    name: str = "adamw",
    *,
    lr: float,
    shape: Callable[[Any], Any] = lambda step: 1.0,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
    state: str = "float32",
    **settings: float | None,
) -> optax.GradientTransformation:
    """Return an optax transformation; `lr`, `weight_decay`, `loraplus_lr_ratio` live in `opt_state.hyperparams`.

    Args:
        name: a row of `optimizers.OPTIMIZERS`.
        lr: the peak rate, multiplied by `shape(step)`.
        shape: as from `schedule`.
        weight_decay: decoupled, on matrices only.
        grad_clip: largest global norm of the gradient; 0: no clipping.
        loraplus_lr_ratio: multiplies `lr` for LoRA's `b` (LoRA+, Hayou et al. 2024, arXiv:2402.12354) and for vectors
            that are trained beside it (as in peft: magnitudes, biases, norms), but not on an embedding, whose `b` is
            the factor that is random at first.
        state: how moments are kept between steps, "float32", "8bit" or "host": in float32 in the host's memory
            (`jaxtune.train.moments`).
        settings: b1, b2, eps, momentum; None: the row's default. Those of other rows are ignored.

    Raises:
        UserError: unknown name, or a setting that no optimizer has.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim.name={name!r} is not supported; supported: {', '.join(OPTIMIZERS)}.")
    if lost := sorted(settings.keys() - set(SETTINGS)):
        hint = f"{nearest(lost[0], SETTINGS)} Known: {', '.join(SETTINGS)}."
        raise UserError(f"optimizer: {lost[0]!r} is a setting of no optimizer.{hint}")
    row = OPTIMIZERS[name]
    own = {key: default if settings.get(key) is None else settings[key] for key, default in row.settings.items()}

    def direction():
        tx = row.build(**own)
        vector = tx if row.vector is None else row.vector()
        if state == "8bit":
            tx = in_8_bits(tx)
            tx = by_matrix(in_parts(tx) if row.elementwise else tx, vector, one_by_one)
        elif state == "host":
            # A part is larger than a layer's matrix: a table is cut, and no loop runs within another.
            tx = on_host(tx)
            tx = by_matrix(in_parts(tx, 2**27, streamed) if row.elementwise else tx, vector, streamed)
        elif row.by_matrix:
            tx = by_matrix(tx, vector)
        return state_in_float32(tx)

    def build(lr, weight_decay, loraplus_lr_ratio):
        return optax.chain(
            clip(grad_clip) if grad_clip else optax.identity(),
            direction(),
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.scale_by_schedule(shape),
            optax.masked(optax.scale(loraplus_lr_ratio), _faster),
            optax.scale_by_learning_rate(lr),
        )

    return optax.inject_hyperparams(build)(lr=lr, weight_decay=weight_decay, loraplus_lr_ratio=loraplus_lr_ratio)
