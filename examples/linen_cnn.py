"""LoRA and a new head on a Flax Linen CNN with running statistics: python examples/linen_cnn.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtune


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3), (2, 2))(x)))
        return nn.Dense(4, name="head")(x.reshape(len(x), -1))


def gratings(rng, n):  # striped images; the label is the direction of the stripes
    label = rng.integers(4, size=n)
    angle, phase = (label * np.pi / 4)[:, None, None], rng.uniform(0, 6, (n, 1, 1))
    y, x = np.mgrid[:16, :16]
    wave = np.sin(x * np.cos(angle) + y * np.sin(angle) + phase) + rng.normal(0, 0.5, (n, 16, 16))
    return {"image": wave[..., None].astype(np.float32), "label": label}


def main(steps=60):
    rng, key, model = np.random.default_rng(0), jax.random.key(0), Cnn()
    test = gratings(rng, 256)
    variables = model.init(key, test["image"])
    apply = jaxtune.adapt(model.apply)
    layouts = apply.layouts(variables, test["image"])
    params, mask = jaxtune.lora(variables, key, r=4, target_modules=["Conv_0", "Conv_1"], layouts=layouts)
    mask["params"]["head"] = jax.tree.map(lambda _: jaxtune.TRAIN, mask["params"]["head"])
    print(jaxtune.count(params, mask))

    def loss_fn(params, batch, key):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, batch["image"]), batch["label"])
        return (losses.sum(), jnp.float32(losses.size)), {}

    trainable, member, frozen = jaxtune.partition(params, mask)
    tx = optax.adamw(3e-3)
    state, step = jaxtune.init_state(trainable, member, tx, key), jaxtune.make_train_step(loss_fn, tx)
    for _ in range(steps):
        state, metrics = step(state, frozen, jax.tree.map(lambda x: x[None], gratings(rng, 64)))
    tuned = jaxtune.combine(state.trainable, state.member, frozen)
    accuracy = (apply(tuned, test["image"]).argmax(-1) == test["label"]).mean()
    print(f"loss {metrics['loss']:.3f}, held-out accuracy {accuracy:.3f}")
    return float(accuracy)


if __name__ == "__main__":
    main()
