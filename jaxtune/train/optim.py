"""Optimizers and schedules from optax. What varies between sweep members is an array in the optimizer's state."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.errors import UserError
from jaxtune.tree import path_str

# Optimizers whose update of an entry depends on that entry alone (but for clipping): zeros that pad a factor stay zero.
ELEMENTWISE = frozenset(["adamw", "sgd", "lion"])


def schedule(
    name: str = "constant", *, steps: int, warmup: float = 0.0, min_lr_ratio: float = 0.0
) -> Callable[[Any], Any]:
    """Return the shape of a learning rate over the run: step -> multiplier in (0, 1].

    Args:
        name: "constant", "linear" or "cosine" decay after the warmup, to `min_lr_ratio` when the last step is done.
        steps: optimizer steps of the whole run.
        warmup: steps of linear warmup; below 1, a share of `steps`.
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


# Vectors, which may be stacked to matrices: fields of adapters (DoRA's magnitudes, (IA)^3's scales), norms and biases.
_VECTORS = [jax.tree_util.GetAttrKey(name) for name in ("magnitude", "out", "inp")]


def _is_matrix(path: Any, leaf: Any) -> bool:
    return leaf.ndim >= 2 and path[-1] not in _VECTORS and not re.search(r"(^|/)(scale|bias)(/value)?$", path_str(path))


def decay_mask(params: Any) -> Any:
    """True for matrices (LoRA factors too); norms and biases, stacked or not, are not decayed."""
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def _faster(params: Any) -> Any:
    """True for LoRA's `b` and for vectors, as peft's create_loraplus_optimizer has it; not for an embedding's `b`."""
    b, table = jax.tree_util.GetAttrKey("b"), jax.tree_util.DictKey("embedding")

    def faster(path, leaf):
        return (path[-1] == b and table not in path) or not _is_matrix(path, leaf)

    return jax.tree_util.tree_map_with_path(faster, params)


def optimizer(
    name: str = "adamw",
    *,
    lr: float,
    shape: Callable[[Any], Any] = lambda step: 1.0,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    loraplus_lr_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Return an optax transformation; `lr`, `weight_decay`, `loraplus_lr_ratio` live in `opt_state.hyperparams`.

    Args:
        name: "adamw" (Loshchilov & Hutter 2019), "sgd" with Nesterov-free momentum, or "lion" (Chen et al. 2023).
        lr: the peak rate, multiplied by `shape(step)`.
        weight_decay: decoupled, on matrices only.
        grad_clip: largest global norm of the gradient; 0: no clipping.
        loraplus_lr_ratio: the rate of LoRA's `b` is this times `lr` (LoRA+, Hayou et al. 2024, arXiv:2402.12354), and
            that of vectors that are trained beside it (as in peft: magnitudes, biases, norms). An embedding, whose `b`
            is the factor that is random at first, is left out.

    Raises:
        UserError: unknown name.
    """
    directions = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        "sgd": lambda: optax.trace(momentum) if momentum else optax.identity(),
        "lion": lambda: optax.scale_by_lion(b1, b2),
    }
    if name not in directions:
        raise UserError(f"optim.name={name!r} is not supported; supported: {', '.join(directions)}.")

    def build(lr, weight_decay, loraplus_lr_ratio):
        return optax.chain(
            optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity(),
            directions[name](),
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.scale_by_schedule(shape),
            optax.masked(optax.scale(loraplus_lr_ratio), _faster),
            optax.scale_by_learning_rate(lr),
        )

    return optax.inject_hyperparams(build)(lr=lr, weight_decay=weight_decay, loraplus_lr_ratio=loraplus_lr_ratio)
