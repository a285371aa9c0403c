"""A LoRA step on a mixture of experts: factors on experts beside attention's alone.

    python benchmarks/experts.py [--json=OUT]

A random model of Mixtral's shape in float32, 60 million parameters. The sides take turns in one process.
"""

import statistics
import time

import common
import jax
import jax.numpy as jnp
import methods

from jaxtune import models

ATTENTION = {"r": 16, "lora_alpha": 32, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
EXPERTS = {"target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--hidden", type=int, default=384)
    p.add_argument("--layers", type=int, default=5)
    p.add_argument("--vocab", type=int, default=16000)
    a = p.parse_args()
    config = {
        "model_type": "mixtral",
        "vocab_size": a.vocab,
        "hidden_size": a.hidden,
        "intermediate_size": a.hidden * 8 // 3,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.hidden // 64,
        "num_key_value_heads": a.hidden // 192,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": a.length,
    }
    module, data = models.build(config), jax.tree.map(jnp.asarray, methods.batch(a))
    base = jax.jit(module.init_params)(jax.random.key(0))
    sides = {"attention": ATTENTION, "attention and experts": ATTENTION | EXPERTS}
    ready = {name: methods.prepare(module, base, None, "lora", s, False, data) for name, s in sides.items()}

    def measure(name):
        def call():
            side, seconds = ready[name], []
            for number in range(a.steps + 1):
                began = time.monotonic()
                side[1], metrics = side[0](side[1], side[2], data)
                jax.block_until_ready(metrics)
                if number:  # the first of a turn finds the other side's data in the caches
                    seconds.append(time.monotonic() - began)
            return {"step, s": statistics.median(seconds), "planned MiB": side[3], "% trained": side[4]}

        return call

    found = common.alternate({name: measure(name) for name in ready}, a.repeats)
    ratios = {
        f"{metric} over attention's": (common.ratio(found, metric, "attention and experts", "attention"), target)
        for metric, target in (("step, s", "<= 1.35"), ("planned MiB", "-"))
    }
    size = sum(x.size for x in jax.tree.leaves(base)) / 1e6
    title = f"Experts: {size:.0f}M, hidden {a.hidden}, {a.layers} layers, {a.batch} rows of {a.length} tokens"
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
