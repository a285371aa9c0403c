"""Grouped products: rows sorted by group, each group multiplied by a matrix of its own."""

import jax

Array = jax.Array

# jax batches a grouped product only if both matrices are batched; members of a sweep share one, so they run in turn.
_product = jax.custom_batching.sequential_vmap(jax.lax.ragged_dot)


@jax.custom_batching.sequential_vmap
def _slope(rows: Array, w: Array, sizes: Array, g: Array) -> Array:
    return jax.vjp(lambda w: jax.lax.ragged_dot(rows, w, sizes), w)[1](g)[0]


def _kept(rows: Array, w: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(rows, w, sizes), (rows, w, sizes)


def _of_rows(kept: tuple[Array, Array, Array], g: Array) -> Array:
    return _product(g, kept[1].swapaxes(1, 2), kept[2])


@jax.custom_vjp
def grouped_dot(rows: Array, w: Array, sizes: Array) -> Array:
    """rows [N, K] times w [E, K, M] -> [N, M]: the first sizes[0] rows by w[0], the next sizes[1] by w[1], ..."""
    return _product(rows, w, sizes)


grouped_dot.defvjp(_kept, lambda kept, g: (_of_rows(kept, g), _slope(*kept, g), None))


@jax.custom_vjp
def frozen_grouped_dot(rows: Array, w: Array, sizes: Array) -> Array:
    """`grouped_dot` by matrices that have no gradient: none is built, [E, K, M] as it would be."""
    return _product(rows, w, sizes)


frozen_grouped_dot.defvjp(_kept, lambda kept, g: (_of_rows(kept, g), None, None))
