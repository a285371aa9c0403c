"""A train step by method: seconds, working memory as XLA plans it, share of parameters trained.

    python benchmarks/methods.py [--json=OUT]

A random Llama in float32, packed rows. All sides are compiled in one process and take turns, `--steps` steps each.
"through adapt" is LoRA on the same model as if it were somebody else's.
"""

import statistics
import time

import common
import jax
import jax.numpy as jnp
import numpy as np

import jaxtune
from jaxtune import models
from jaxtune.methods.table import METHODS


class Foreign:
    """The model with every call rewritten by `adapt`; as to the rest, itself."""

    def __init__(self, module):
        self.module, self.apply = module, jaxtune.adapt(module.apply)

    def __getattr__(self, name):
        return getattr(self.module, name)


def sides() -> dict:
    """{name: (quantisation, method, settings, through adapt)}."""
    rank = {"r": 16, "lora_alpha": 32}
    return {
        "lora": (None, "lora", rank, False),
        "lora through adapt": (None, "lora", rank, True),
        "dora": (None, "lora", rank | {"use_dora": True}, False),
        "ia3": (None, "ia3", {}, False),
        "lora on nf4": ("nf4", "lora", rank, False),
        "lora on int8": ("int8", "lora", rank, False),
        "head": (None, "head", {}, False),
        "full": (None, "full", {}, False),
    }


def batch(a) -> dict:
    """One packed batch [1, B, T] of random tokens, two segments a row."""
    draw = np.random.default_rng(0)
    shape = (1, a.batch, a.length)
    half = a.length // 2
    place = np.concatenate([np.arange(half), np.arange(a.length - half)])
    segment = np.repeat([1, 2], [half, a.length - half])
    tokens = draw.integers(0, a.vocab, shape, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "positions": np.broadcast_to(place, shape).astype(np.int32),
        "segments": np.broadcast_to(segment, shape).astype(np.int32),
        "weights": np.ones(shape, np.float32),
        "row": np.arange(a.batch, dtype=np.int32)[None],
    }


def prepare(module, base, quantisation, method, settings, foreign, data):
    """Compile a side: (its step, state, frozen part, planned MiB, % trained)."""
    if quantisation:
        base = jaxtune.quantize(base, quantisation)
    params, mask = METHODS[method](base, jax.random.key(1), module, settings)
    counts = jaxtune.count(params, mask)
    trainable, member, frozen = jaxtune.partition(params, mask)
    tx = jaxtune.optimizer("adamw", lr=1e-4, grad_clip=1.0)
    state = jaxtune.init_state(trainable, member, tx, jax.random.key(2))
    step = jaxtune.make_train_step(jaxtune.causal_lm(Foreign(module) if foreign else module, packed=True), tx)
    plan = step.lower(state, frozen, data).compile().memory_analysis()
    return [step, state, frozen, plan.temp_size_in_bytes / 2**20, 100 * counts.trainable / counts.all]


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--only", nargs="*", help="these sides")
    a = p.parse_args()
    config = {
        "model_type": "llama",
        "vocab_size": a.vocab,
        "hidden_size": a.hidden,
        "intermediate_size": a.hidden * 43 // 16,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.hidden // 64,
        "num_key_value_heads": a.hidden // 128,
        "max_position_embeddings": a.length,
    }
    module, data = models.build(config), jax.tree.map(jnp.asarray, batch(a))
    base = jax.jit(module.init_params)(jax.random.key(0))
    chosen = {name: side for name, side in sides().items() if not a.only or name in a.only}
    ready = {name: prepare(module, base, *side, data) for name, side in chosen.items()}

    def measure(name):
        def call():
            side, seconds = ready[name], []
            for number in range(a.steps + 1):
                began = time.monotonic()
                side[1], metrics = side[0](side[1], side[2], data)
                jax.block_until_ready(metrics)
                if number:  # the first of a turn finds the other sides' data in the caches
                    seconds.append(time.monotonic() - began)
            return {"step, s": statistics.median(seconds), "planned MiB": side[3], "% trained": side[4]}

        return call

    found = common.alternate({name: measure(name) for name in ready}, a.repeats)
    targets = {
        ("lora through adapt", "step, s"): "<= 1.1",
        ("lora through adapt", "planned MiB"): "<= 1.0",
        ("dora", "step, s"): "<= 1.25",
    }
    ratios = {
        f"{name}, {metric} over lora's": (common.ratio(found, metric, name, "lora"), targets.get((name, metric), "-"))
        for name in found
        for metric in ("step, s", "planned MiB")
        if name != "lora" and "lora" in found
    }
    title = f"Methods: hidden {a.hidden}, {a.layers} layers, vocabulary {a.vocab}, {a.batch} rows of {a.length} tokens"
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
