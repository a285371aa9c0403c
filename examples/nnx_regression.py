"""A Flax NNX network pretrained on one curve, then tuned to another by LoRA alone: python examples/nnx_regression.py"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtune


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in ((1, 64), (64, 64), (64, 1))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


def train(apply, params, mask, curve, steps, lr):
    def loss_fn(params, batch, key):
        error = apply(params, batch) - curve(batch)
        return (jnp.sum(error**2), jnp.float32(error.size)), {}

    trainable, member, frozen = jaxtune.partition(params, mask)
    tx, rng = optax.adam(lr), np.random.default_rng(0)
    state, step = jaxtune.init_state(trainable, member, tx, jax.random.key(0)), jaxtune.make_train_step(loss_fn, tx)
    for _ in range(steps):
        state, metrics = step(state, frozen, rng.uniform(-3, 3, (1, 64, 1)).astype(np.float32))
    return jaxtune.combine(state.trainable, state.member, frozen), float(metrics["loss"])


def main(steps=400):
    graph, params = nnx.split(Mlp(nnx.Rngs(0)))
    apply = jaxtune.adapt(lambda params, x: nnx.merge(graph, params)(x))
    params, base = train(apply, *jaxtune.full(params), jnp.sin, 2 * steps, 1e-2)
    layouts = apply.layouts(params, jnp.zeros((1, 1)))
    params, mask = jaxtune.lora(params, jax.random.key(1), r=4, target_modules=["layers.1"], layouts=layouts)
    print(jaxtune.count(params, mask))
    _, tuned = train(apply, params, mask, lambda x: jnp.sin(x) * 0.5 + 0.3, steps, 1e-2)
    print(f"squared error: {base:.4f} on the first curve, {tuned:.4f} on the second after tuning")
    return base, tuned


if __name__ == "__main__":
    main()
