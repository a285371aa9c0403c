"""`jaxtune plan` against XLA's plan and the measured peak: several shapes, methods and remat policies, on this device.

    python benchmarks/plan.py [--json=OUT]
    python benchmarks/plan.py --h100        XLA's plan for an H100 that is not there; needs the jax[cuda] wheels only
                                            (never run as a whole: tried on a toy function)

Each case is a process of its own. It compiles the step, gives back what the compiler used, and then measures how far
its resident memory rises while it allocates the state and runs three steps. Nothing is loaded: weights are ones.
"""

import ctypes
import functools
import gc
import json
import os
import sys
from pathlib import Path

import common

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SIZES = {
    "56M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "160M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "8B": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256},
    },
}
BERT = {
    **{"model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6},
    **{"num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 512},
}
CASES = {  # model, method, rows, tokens, remat
    "56M lora": ("56M", "lora", 4, 512, "none"),
    "56M lora, remat": ("56M", "lora", 4, 512, "full"),
    "56M lora, dots": ("56M", "lora", 4, 512, "dots"),
    "56M full": ("56M", "full", 4, 512, "none"),
    "56M head": ("56M", "head", 4, 512, "none"),
    "160M lora": ("160M", "lora", 4, 512, "none"),
    "160M full, remat": ("160M", "full", 4, 512, "full"),
    "BERT 6 x 384 full": ("bert", "full", 16, 128, "none"),
    "BERT 6 x 384 lora": ("bert", "lora", 16, 128, "none"),
}
H100_CASES = {
    "8B lora": ("8B", "lora", 2, 4096, "none"),
    "8B lora, dots": ("8B", "lora", 2, 4096, "dots"),
    "8B lora, attention": ("8B", "lora", 2, 4096, "attention"),
    "8B lora, remat": ("8B", "lora", 2, 4096, "full"),
    "8B full, remat": ("8B", "full", 2, 4096, "full"),
    "160M full": ("160M", "full", 8, 1024, "none"),
}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 13 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def recipe(case: tuple, backend: str):
    import jax.numpy as jnp

    from jaxtune import models
    from jaxtune.methods.table import tune
    from jaxtune.models.classifier import SEQUENCE, Labels, with_labels
    from jaxtune.objectives.causal_lm import causal_lm_task
    from jaxtune.objectives.labels import label_task
    from jaxtune.objectives.task import BatchShape
    from jaxtune.train import optim
    from jaxtune.train.recipe import Recipe

    name, method, rows, length, remat = case
    gpu = backend == "gpu"
    fields = {"remat": remat, "dtype": jnp.dtype("bfloat16" if gpu else "float32")}
    fields["attention"] = "xla" if gpu else "auto"  # cuDNN's is not there to be compiled
    module = models.build(BERT if name == "bert" else LLAMA | SIZES[name], **fields)
    if name == "bert":
        module = with_labels(module, Labels(SEQUENCE, ("a", "b"), drawn=True))
    settings = {"r": 16} if method == "lora" else {}
    optimizer = functools.partial(optim.optimizer, "adamw", lr=1e-3, grad_clip=1.0)
    task = (label_task if name == "bert" else causal_lm_task)(module)
    return Recipe(module, task, functools.partial(tune, method, settings=settings), optimizer, BatchShape(rows, length))


def on_device(case: tuple) -> dict[str, float]:
    """MiB by formula, by XLA's plan, and as measured on this CPU."""
    import jax
    import jax.numpy as jnp

    from jaxtune.train import cost as plan
    from jaxtune.train.recipe import planned_bytes
    from jaxtune.train.step import make_train_step

    s, backend = recipe(case, jax.default_backend()), jax.default_backend()
    known = s.abstract
    formula = plan.measure(s, backend).bytes(s.batch.rows).total
    step = make_train_step(s.loss(), s.tx)
    compiled = step.lower(known.state, known.frozen, s.task.batch_like(s.batch)).compile()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def fill(x):
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key(0) if key else jnp.ones(x.shape, x.dtype)

    state, frozen, batch = jax.tree.map(fill, (known.state, known.frozen, s.task.batch_like(s.batch)))
    for _ in range(3):
        state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready(metrics)
    measured = resident("VmHWM") - before
    return {"formula": formula / 2**20, "XLA": planned_bytes(compiled) / 2**20, "measured": measured / 1024}


def resident(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def on_h100(case: tuple) -> dict[str, float]:
    """MiB by formula and by XLA's plan for an H100; nothing runs."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jaxtune.train import cost as plan
    from jaxtune.train.recipe import planned_bytes
    from jaxtune.train.step import make_train_step

    s, backend = recipe(case, "gpu"), "gpu"
    known = s.abstract
    formula = plan.measure(s, backend).bytes(s.batch.rows).total
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1 x 1 x 1", target_config=H100
    )
    there = SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
        (known.state, known.frozen, s.task.batch_like(s.batch)),
    )
    jax.default_backend = lambda: "gpu"  # what the model asks where it depends on the device
    step = make_train_step(s.loss(), s.tx)
    return {
        "formula": formula / 2**20,
        "XLA": planned_bytes(step.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()) / 2**20,
    }


def main() -> None:
    p = common.parser(__doc__, repeats=1)
    p.add_argument("--h100", action="store_true", help="plan for an H100 without one")
    p.add_argument("--case", help="one case, in this process; prints JSON")
    a = p.parse_args()
    cases = H100_CASES if a.h100 else CASES
    if a.case:
        print(json.dumps((on_h100 if a.h100 else on_device)(cases[a.case])))
        return
    flags = ["--h100"] * a.h100
    sides = {
        name: functools.partial(
            lambda name: common.last_json(
                common.run([sys.executable, __file__, *flags, f"--case={name}"], a.threads).stdout
            ),
            name,
        )
        for name in cases
    }
    found = common.alternate(sides, a.repeats)
    ratios = {}
    for over, under in (("formula", "XLA"), ("formula", "measured"), ("XLA", "measured")):
        values = [side[over][0] / side[under][0] for side in found.values() if under in side]
        if values:
            ratios[f"lowest {over} / {under}"] = (min(values), "1")
            ratios[f"highest {over} / {under}"] = (max(values), "1")
    common.report("MiB a step", found, ratios, a.json)


if __name__ == "__main__":
    main()
