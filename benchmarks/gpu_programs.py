"""Steps compiled for GPUs that are not there: memory by XLA's plan, kernels, and what must not be in the program.

    python benchmarks/gpu_programs.py [--cards=h100,a100] [--only=1b] [--json=OUT]

Nothing runs, and no GPU is needed: XLA compiles for a described device with the CUDA wheels alone (`pip install
--no-deps` of jax-cuda13-plugin, jax-cuda13-pjrt and the nvidia-* libraries; 2.5 GB). Autotuning is off and products are
calls of cuBLAS, where a GPU would choose by time; buffers and cuDNN calls are its own. A case is a process of its own.

Every program is held to: no array [., ., T, T] of a long row; cuDNN's attention as often as it should be, forward and
backward; of a frozen matrix no gradient is computed; no dequantised copy of a quantised stack; products in fp8 where
they should be and nowhere else; state donated; nothing sent to the host; the formula of `jaxtune plan` within 10% of
XLA's plan. Exit status 1 where one does not hold. "ms" is a roofline: the longer of the products at the card's peak in
bfloat16 and of the bytes that must move, weights, state and saved activations, at its bandwidth.

OUT has a line of JSON a program; what it holds already is not compiled again.
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import common

# With a GPU XLA tries each product as a kernel of Triton and as a call of cuBLAS, and takes the faster. Without one it
# takes Triton's; the second flag makes calls of all products, by which they can be told.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
NEAR = 0.10  # how far the formula may be from XLA's plan

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": False}
GEMMA = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
         "query_pre_attn_scalar": 256, "sliding_window": 4096, "head_dim": 256, "num_hidden_layers": 26}  # fmt: skip
MODELS = {
    "1b": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "70b": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},  # a tenth of its 80 layers
    "gemma2-2b": GEMMA | {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
                  "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000},
    "gemma3-1b": GEMMA | {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144},
    "bert": {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512},
}  # fmt: skip


class Case(NamedTuple):
    """A program.

    Attributes:
        kind: "train", "sweep" of 8, "classify", "prefill" or "decode".
        state: how moments are kept; unless in float32, weights are in bfloat16.
        segments: of a packed row at most, so that cuDNN can take it; 0: any number.
        r: rank of LoRA.
    """

    model: str
    method: str
    rows: int
    length: int
    remat: str = "none"
    packed: bool = False
    quantization: str = "none"
    kind: str = "train"
    state: str = "float32"
    segments: int = 0
    r: int = 16


CASES = {
    "1b lora": Case("1b", "lora", 2, 4096),
    "1b lora packed": Case("1b", "lora", 2, 4096, packed=True),
    "1b lora packed, dots": Case("1b", "lora", 2, 4096, "dots", packed=True),
    "1b lora packed, attention": Case("1b", "lora", 2, 4096, "attention", packed=True),
    "1b lora packed, full": Case("1b", "lora", 2, 4096, "full", packed=True),
    "1b lora packed, offload": Case("1b", "lora", 2, 4096, "offload", packed=True),
    "1b lora packed by cuDNN, dots": Case("1b", "lora", 2, 4096, "dots", packed=True, segments=16),
    "1b dora packed, dots": Case("1b", "dora", 2, 4096, "dots", packed=True),
    "1b head packed": Case("1b", "head", 2, 4096, packed=True),
    "1b full packed, dots": Case("1b", "full", 1, 4096, "dots", packed=True),
    "1b full packed, dots, 8-bit": Case("1b", "full", 1, 4096, "dots", packed=True, state="8bit"),
    "1b qlora 32k, full": Case("1b", "lora", 1, 32768, "full", quantization="nf4"),
    "1b qlora 32k packed, full": Case("1b", "lora", 1, 32768, "full", packed=True, quantization="nf4"),
    "1b fp8 lora, full": Case("1b", "lora", 2, 4096, "full", quantization="fp8_matmul"),
    "1b sweep of 8": Case("1b", "lora", 8, 512, "dots", kind="sweep"),
    "8b lora, dots": Case("8b", "lora", 2, 4096, "dots"),
    "8b lora packed, dots": Case("8b", "lora", 2, 4096, "dots", packed=True),
    "8b lora packed, full": Case("8b", "lora", 2, 4096, "full", packed=True),
    "8b qlora, full": Case("8b", "lora", 1, 4096, "full", quantization="nf4"),
    "8b qlora packed, full": Case("8b", "lora", 1, 4096, "full", packed=True, quantization="nf4"),
    "8b qlora r32 80k, offload": Case("8b", "lora", 1, 81920, "offload", quantization="nf4", r=32),
    "8b full, full": Case("8b", "full", 1, 4096, "full"),
    "8b full packed, full, 8-bit": Case("8b", "full", 1, 4096, "full", packed=True, state="8bit"),
    "1b full packed, dots, host": Case("1b", "full", 1, 4096, "dots", packed=True, state="host"),
    "8b full packed, full, host": Case("8b", "full", 1, 4096, "full", packed=True, state="host"),
    "70b/10 qlora packed, full": Case("70b", "lora", 1, 4096, "full", packed=True, quantization="nf4"),
    "gemma2-2b lora": Case("gemma2-2b", "lora", 1, 4096),
    "gemma3-1b lora, dots": Case("gemma3-1b", "lora", 2, 4096, "dots"),
    "gemma3-1b lora packed, dots": Case("gemma3-1b", "lora", 2, 4096, "dots", packed=True),
    "bert classify full": Case("bert", "full", 32, 512, kind="classify"),
    "bert classify lora": Case("bert", "lora", 32, 512, kind="classify"),
    "1b prefill": Case("1b", "lora", 4, 4096, kind="prefill"),
    "1b decode": Case("1b", "lora", 32, 2048, kind="decode"),
}


class Card(NamedTuple):
    """A GPU, as XLA describes it: compute capability, cores, shared memory of one, bytes, bytes/s; bfloat16 FLOP/s."""

    capability: tuple[int, int]
    cores: int
    shared: int
    memory: int
    bandwidth: int
    flops: float

    def described(self, name: str) -> str:
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared} threads_per_core_limit: 2048 core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {self.bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 13 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


CARDS = {
    "h100": Card((9, 0), 132, 233472, 84978434048, 3352320000000, 989e12),
    "a100": Card((8, 0), 108, 167936, 85899345920, 2039000000000, 312e12),
    "rtx4090": Card((8, 9), 128, 102400, 25769803776, 1008000000000, 165e12),
    "b200": Card((10, 0), 148, 233472, 206158430208, 8000000000000, 2250e12),
}


def recipe(case: Case) -> Any:
    """The recipe of a training case."""
    import jax.numpy as jnp

    from jaxtune import models
    from jaxtune.methods.table import tune
    from jaxtune.models.classifier import SEQUENCE, Labels, with_labels
    from jaxtune.objectives.causal_lm import causal_lm_task
    from jaxtune.objectives.labels import label_task
    from jaxtune.objectives.task import BatchShape
    from jaxtune.train import optim
    from jaxtune.train.recipe import Recipe

    module = models.build(MODELS[case.model], remat=case.remat, dtype=jnp.bfloat16, most_segments=case.segments)
    if case.kind == "classify":
        module = with_labels(module, Labels(SEQUENCE, ("a", "b"), drawn=True))
        task = label_task(module)
    else:
        task = causal_lm_task(module, packed=case.packed)
    method, settings = case.method, {}
    if method in ("lora", "dora"):
        method, settings = "lora", {"r": case.r, "use_dora": method == "dora"}
    return Recipe(
        module,
        task,
        functools.partial(tune, method, settings=settings),
        functools.partial(optim.optimizer, "adamw", lr=1e-3, grad_clip=1.0, state=case.state),
        BatchShape(case.rows, case.length, packed=case.packed),
        quantization=case.quantization,
        weights="float32" if case.state == "float32" else "bfloat16",
    )


def program(case: Case) -> tuple[Any, tuple, Any]:
    """(jitted function, abstract arguments, the recipe)."""
    import jax
    import jax.numpy as jnp

    from jaxtune.infer.generation import prepare
    from jaxtune.train import stacked

    r = recipe(case)
    start = r.abstract
    batch = r.task.batch_like(r.batch)
    if case.kind == "sweep":
        state = jax.eval_shape(lambda state: stacked.stack([state] * 8), start.state)
        return r.programs(members=8)[0], (state, start.frozen, batch), r
    if case.kind in ("train", "classify"):
        return r.programs()[0], (start.state, start.frozen, batch), r
    params = jax.eval_shape(lambda p: prepare(r.module, r.tuned(p)[0]), r.abstract_base())
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype), params
    )
    tokens = case.length if case.kind == "prefill" else 1
    cache = jax.eval_shape(lambda: r.module.init_cache(case.rows, case.length))
    ids = jax.ShapeDtypeStruct((case.rows, tokens), jnp.int32)

    def forward(params, ids, positions, cache):
        hidden, cache = r.module.apply({"params": params}, ids, positions, None, cache, method="hidden")
        return hidden[:, -1], cache

    return jax.jit(forward, donate_argnums=3), (params, ids, ids, cache), r


def compiled(case: Case, card: Card, name: str) -> dict[str, Any]:
    """What XLA made of a case."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    import jax
    from jax._src.cudnn import fused_attention_stablehlo as fused
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jaxtune.models import cudnn
    from jaxtune.train import cost
    from jaxtune.train.moments import OnHost

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology="1 x 1 x 1", target_config=card.described(name.upper())
    )
    there = SingleDeviceSharding(topology.devices[0])
    host = SingleDeviceSharding(topology.devices[0], memory_kind="pinned_host")
    jax.default_backend = lambda: "gpu"  # what the model asks where it depends on the device
    fused.check_compute_capability = lambda needed, *_: card.capability >= tuple(map(int, str(needed).split(".")))
    fused.check_cudnn_version = lambda: 91000
    cudnn.capability = lambda: card.capability
    fn, arguments, r = program(case)
    where = jax.tree.map(
        lambda x: OnHost(host) if isinstance(x, OnHost) else there, arguments, is_leaf=lambda x: isinstance(x, OnHost)
    )
    arguments = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), arguments, where)
    traced = fn.trace(*arguments)
    executable = traced.lower(lowering_platforms=("cuda",)).compile()
    plan, text = executable.memory_analysis(), executable.as_text()
    calls = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    gib = 2**30
    total = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes
    found = {
        "arguments": plan.argument_size_in_bytes / gib,
        "temporary": plan.temp_size_in_bytes / gib,
        "host": (plan.host_argument_size_in_bytes + plan.host_temp_size_in_bytes) / gib,
        "total": (total - plan.alias_size_in_bytes) / gib,
        "attention": sum(n for c, n in calls.items() if "fmha" in c and "Backward" not in c),
        "backward": sum(n for c, n in calls.items() if "fmha" in c and "Backward" in c),
        "products": sum(n for c, n in calls.items() if "cublas" in c),
        "fp8": sum(n for c, n in calls.items() if c.endswith("$f8")),
        "wrong": wrong(case, r, text, plan, arguments),
    }
    if case.kind in ("train", "classify", "sweep"):
        members = 8 if case.kind == "sweep" else 1
        measured = cost.measure(r, "gpu")
        parts = measured.bytes(case.rows, members)
        found["plan"] = parts.total / gib
        found["plan / total"] = found["plan"] / found["total"]
        found["parts"] = {name: round(x / gib, 2) for name, x in parts._asdict().items()}
        flops, moved = members * case.rows * measured.flops, measured.moved(case.rows, members)
        if abs(found["plan / total"] - 1) > NEAR:
            found["wrong"].append(f"the plan is {found['plan / total']:.2f} of XLA's")
    else:
        flops, moved = cost.dot_flops(traced.jaxpr.jaxpr), plan.argument_size_in_bytes
    found["ms"] = 1e3 * max(flops / card.flops, moved / card.bandwidth)
    found["bound by"] = "products" if flops / card.flops > moved / card.bandwidth else "memory"
    return found


def kernels(case: Case, r: Any) -> int:
    """How many of a scan's blocks have their attention by cuDNN."""
    from jaxtune.models.attention import choose

    rows = {"tokens": case.length, "most_segments": case.segments}
    blocks = [] if case.kind == "decode" else [b for s in r.module.spec.segments for b in s.pattern]
    names = [
        choose(
            *("auto", r.module.dtype, b.head_dim, "gpu"),
            **rows | {"causal": b.causal, "window": b.window, "softcap": b.softcap},
            segmented=case.packed or case.kind == "classify",
        )
        for b in blocks
    ]
    return names.count("cudnn")


class Product(NamedTuple):
    """A call of cuBLAS: the output's sizes but for axes of batches, how many are summed, and whether it is in fp8."""

    shape: tuple[int, ...]
    summed: int
    fp8: bool


def products(text: str) -> list[Product]:
    """The matrix products of a compiled program."""
    shapes = {
        name: tuple(map(int, filter(None, sizes.split(","))))
        for name, sizes in re.findall(r"^ *(?:ROOT )?%([\w.-]+) = \(?\w+\[([\d,]*)\]", text, re.M)
    }
    call = r'^ *(?:ROOT )?%([\w.-]+) = .*custom-call\(%([\w.-]+),.*custom_call_target="__cublas([^"]*)".*'
    call += r'"lhs_contracting_dimensions":\["(\d+)"\]'
    return [
        Product(shapes[name][-2:], shapes[left][int(axis)], "f8" in kind)
        for name, left, kind, axis in re.findall(call, text, re.M)
    ]


def wrong(case: Case, r: Any, text: str, plan: Any, arguments: tuple) -> list[str]:
    """What is in a program that must not be."""
    import jax

    said = []
    block, t, layers = r.module.spec.segments[0].pattern[0], case.length, r.module.spec.layers
    heads = {block.heads, block.kv_heads, case.rows * block.heads, case.rows * block.kv_heads}
    squares = {
        f"[{found},{t},{t}]"
        for found in re.findall(rf"(?:f32|bf16|pred)\[([\d,]+),{t},{t}\]", text)
        if set(map(int, found.split(","))) & heads
        and found not in (f"{layers},{case.rows}", f"{layers}")  # activations [T, D], weights
    }
    matrices = {tuple(x.shape[-2:]) for x in jax.tree.leaves(r.module.abstract_params()) if x.ndim >= 2}
    if t not in {size for shape in matrices for size in shape}:  # then scores can be told when their axes are merged
        few = case.rows * block.heads * t * t
        squares |= {
            f"[{found},{t}]"
            for found in re.findall(rf"(?:f32|bf16|pred)\[([\d,]+),{t}\]", text)
            if case.kind != "decode" and math.prod(map(int, found.split(","))) * t >= few
        }
    if t > 512 and squares:
        said.append(f"[T, T] arrays: {', '.join(sorted(squares)[:3])}")
    base = {x.shape[1:] for x in jax.tree.leaves(r.module.abstract_params()) if x.ndim == 3 and min(x.shape[1:]) > 500}
    tokens, dims = case.rows * t, {size for shape in base for size in shape}
    made = products(text)
    if case.kind in ("train", "sweep") and case.method != "full" and tokens not in dims:
        # A gradient of a frozen matrix is a product over tokens.
        for k, n in {tuple(sorted(p.shape)) for p in made if p.summed == tokens} & set(map(tuple, map(sorted, base))):
            said.append(f"a product of the size of a frozen matrix, {k} x {n}")
    # Not LoRA's, nor the head's. XLA merges those of the same x: fewer than matrices.
    large = [p.fp8 for p in made if p.summed in dims and min(p.shape) > 500 and p.shape[-1] != r.module.spec.vocab]
    if case.quantization == "fp8_matmul" and not (large and all(large)):
        said.append(f"{large.count(False)} of {len(large)} products of frozen matrices are not in fp8")
    if case.quantization != "fp8_matmul" and any(p.fp8 for p in made):
        said.append("products are in fp8")
    if case.quantization != "none":
        for x in jax.tree.leaves(r.module.abstract_params()):
            if x.ndim != 3 or min(x.shape[1:]) <= 1000 or x.shape[0] * x.shape[1] == case.rows * t:
                continue  # of these, such an array may be activations in parts
            if re.search(rf"bf16\[{','.join(map(str, x.shape))}\]", text):
                said.append(f"a dequantised stack {x.shape}")
    donated = arguments[0] if case.kind != "prefill" and case.kind != "decode" else arguments[3]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(donated) if hasattr(x.dtype, "itemsize"))
    aliased = plan.alias_size_in_bytes + plan.host_alias_size_in_bytes
    if aliased < 0.9 * size:
        said.append(f"{aliased:,} of {size:,} bytes of state are donated")
    found = Counter("Backward" in call for call in re.findall(r'custom_call_target="([^"]*fmha[^"]*)"', text))
    wanted = kernels(case, r)
    back = 0 if case.kind == "prefill" else wanted
    if found[True] != back or found[False] not in (wanted, 2 * back):
        said.append(
            f"cuDNN's attention {found[False]} times forward, {found[True]} backward; expected {wanted}, {back}"
        )
    to_host = re.search(r"\b(infeed|outfeed|send|recv)\(|MoveToHost|S\(5\)", text) is not None
    if to_host != (case.remat == "offload" or case.state == "host"):
        said.append("something is sent to the host" if to_host else "nothing is kept in the host's memory")
    return said


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cards", default="h100", help=f"of {', '.join(CARDS)}, with commas")
    p.add_argument("--only", default="", help="cases whose name contains this")
    p.add_argument("--case", help="one case, in this process; prints JSON")
    p.add_argument("--json", type=Path, help="a file for the figures")
    a = p.parse_args()
    cards = a.cards.split(",")
    if unknown := [name for name in cards if name not in CARDS]:
        p.error(f"--cards: {unknown[0]!r} is not one of {', '.join(CARDS)}")
    if a.case:
        print(json.dumps({"card": cards[0], "case": a.case, **compiled(CASES[a.case], CARDS[cards[0]], cards[0])}))
        return 0
    known = map(json.loads, a.json.read_text().splitlines()) if a.json and a.json.exists() else ()
    found = {(row["card"], row["case"]): row for row in known}
    columns = ("arguments", "temporary", "host", "total", "plan / total")
    columns += ("attention", "backward", "products", "fp8", "ms", "bound by")
    print("| card | program | " + " | ".join(columns) + " | wrong |\n|" + "---|" * (len(columns) + 3))
    failed = False
    for card, name in itertools.product(cards, (name for name in CASES if a.only in name)):
        row = found.get((card, name))
        if row is None:
            command = [sys.executable, __file__, f"--case={name}", f"--cards={card}"]
            try:
                row = common.last_json(common.run(command, 2).stdout)
            except SystemExit as error:
                row = {"card": card, "case": name, "wrong": [str(error).strip().splitlines()[-1][:200]]}
            if a.json:
                with a.json.open("a") as file:
                    print(json.dumps(row), file=file)
        cells = (f"{x:.3g}" if isinstance(x := row.get(c, ""), float) else str(x) for c in columns)
        print(f"| {card} | {name} | " + " | ".join(cells) + f" | {'; '.join(row['wrong'])} |", flush=True)
        failed |= bool(row["wrong"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
