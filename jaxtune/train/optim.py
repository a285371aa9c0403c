"""Optimizers and schedules from optax. Values that vary between sweep members are arrays in the optimizer's state."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.errors import UserError, nearest
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
    return array.ndim >= 2 and not re.search(r"(^|/)(scale|bias)(/value)?$", path)


def decay_mask(params: Any) -> Any:
    """True for matrices (LoRA factors too); norms and biases, stacked or not, are not decayed."""
    return map_fields(_is_matrix, params)


def _faster(params: Any) -> Any:
    """True for LoRA's `b` and for vectors, as in peft's create_loraplus_optimizer; not for an embedding's `b`."""

    def faster(path, array, field):
        table = re.search(r"(^|/)embedding(/|$)", path)
        return (field is not None and field.faster and not table) or not _is_matrix(path, array, field)

    return map_fields(faster, params)


def by_matrix(
    matrix: optax.GradientTransformation, vector: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Apply one transformation to every matrix of a tree and another to every vector, vmapped over their layer axes.

    A matrix is the last two axes of an array [*L, K, N], a vector the last of a stack of norms, biases or a leaf's
    vectors [*L, N].
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

    def over_layers(fn, axes):
        for _ in range(axes):
            fn = jax.vmap(fn)
        return fn

    def init(params):
        leaves, structure = jax.tree.flatten(params)
        states = [over_layers(tx.init, n)(leaf) for (tx, n), leaf in zip(parts(params), leaves, strict=True)]
        return jax.tree.unflatten(structure, states)

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        held = leaves if params is None else structure.flatten_up_to(params)
        done = [
            over_layers(tx.update, n)(leaf, own, weight)
            for (tx, n), leaf, own, weight in zip(
                parts(updates), leaves, structure.flatten_up_to(state), held, strict=True
            )
        ]
        return tuple(jax.tree.unflatten(structure, half) for half in zip(*done))

    return optax.GradientTransformation(init, update)


def optimizer(
    name: str = "adamw",
    *,
    lr: float,
    shape: Callable[[Any], Any] = lambda step: 1.0,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
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
        return by_matrix(tx, tx if row.vector is None else row.vector()) if row.by_matrix else tx

    def build(lr, weight_decay, loraplus_lr_ratio):
        return optax.chain(
            optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
            direction(),
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.scale_by_schedule(shape),
            optax.masked(optax.scale(loraplus_lr_ratio), _faster),
            optax.scale_by_learning_rate(lr),
        )

    return optax.inject_hyperparams(build)(lr=lr, weight_decay=weight_decay, loraplus_lr_ratio=loraplus_lr_ratio)
