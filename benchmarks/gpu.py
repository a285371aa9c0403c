"""LoRA on a GPU at the shapes of 1B and 8B Llamas: tokens a second, share of the peak, memory.

    python benchmarks/gpu.py --shape=1b [--documents=1] [--peer=PEFT_SFT.py] [--json=OUT]     on a GPU
    python benchmarks/gpu.py --small                                  the same code at a tiny size, on any machine

Weights are random and drawn on the device in bfloat16; r=16 on the seven projections. Rows hold `--length` tokens of
`--documents` documents: with one, attention is causal over the row, with more it is packed. The peak is that of a
square matrix product measured here, not the vendor's. FLOPs a token are 4 N, N being the parameters of the matrix
products (the head, not the embedding); attention's own and recomputation are not counted, so the share is a lower
bound. `--peer` runs the other side too, on rows of one document.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

SHAPES = {
    "small": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Time a call that returns device arrays, after one that is not counted."""
    import jax

    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return found


def matmul_peak(size: int, dtype: Any) -> float:
    """FLOP/s of a chain of square products, the best of several."""
    import jax
    import jax.numpy as jnp

    chain = 16
    x = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.sqrt(size).astype(dtype)
    many = jax.jit(lambda x: jax.lax.fori_loop(0, chain, lambda i, y: y @ x, x))
    return chain * 2 * size**3 / min(seconds(lambda: many(x), 5))


def batch(rows: int, length: int, documents: int, vocab: int) -> dict[str, np.ndarray]:
    """Random tokens, every one trained but each document's last: arrays [1, rows, length]."""
    draw = np.random.default_rng(0)
    segments = np.arange(length) * documents // length + 1
    last = np.append(segments[1:] != segments[:-1], True)
    starts = np.searchsorted(segments, segments)
    tokens = draw.integers(vocab, size=(rows, length))

    def whole(row, dtype=np.int32):
        return np.broadcast_to(row, (1, rows, length)).astype(dtype)

    return {
        "tokens": whole(tokens),
        "targets": whole(np.where(last, 0, np.roll(tokens, -1, axis=1))),
        "positions": whole(np.arange(length) - starts),
        "segments": whole(segments),
        "weights": whole(~last, np.float32),
        "row": np.arange(rows, dtype=np.int32)[None],
    }


def ours(a, shape: dict) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from jaxtune import causal_lm, init_state, lora, make_train_step, optimizer, partition
    from jaxtune.models import build
    from jaxtune.tree import flatten

    dtype = jnp.float32 if a.small else jnp.bfloat16
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": a.length, **shape}
    module = build(config, dtype=dtype, remat=a.remat)
    draw = jax.jit(lambda key: jax.tree.map(lambda p: p.astype(dtype), module.init_params(key)))
    base = draw(jax.random.key(0))
    products = sum(x.size for path, x in flatten(base).items() if path.endswith("/kernel"))
    products += base["embed_tokens"]["embedding"].size * ("lm_head" not in base)
    part = partition(*lora(base, jax.random.key(1), r=16, lora_alpha=32, module=module))
    del base
    tx = optimizer("adamw", lr=2e-4, grad_clip=1.0)
    state = init_state(part.trainable, part.member, tx, jax.random.key(2))
    step = make_train_step(causal_lm(module, packed=a.documents > 1), tx)
    data = jax.device_put(batch(a.batch, a.length, a.documents, shape["vocab_size"]))

    def advance():
        nonlocal state
        state, metrics = step(state, part.frozen, data)
        return metrics

    times = seconds(advance, a.steps)
    rate = a.batch * a.length / statistics.median(times)
    peak = matmul_peak(512 if a.small else 8192, dtype)
    stats = jax.local_devices()[0].memory_stats() or {}
    bytes_ = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens/s": rate,
        "median step, s": statistics.median(times),
        "4N TFLOP/s": 4 * products * rate / 1e12,
        "matmul peak, TFLOP/s": peak / 1e12,
        "share of the peak": 4 * products * rate / peak,
        "peak GiB": bytes_ / 2**30,
    }


def theirs(a, shape: dict) -> dict[str, float]:
    """The other side in a process of its own, on rows of one document."""
    dtype = "float32" if a.small else "bfloat16"
    with tempfile.TemporaryDirectory() as temporary:
        model, data = Path(temporary, "model"), Path(temporary, "rows.jsonl")
        common.make_llama(model, dtype=dtype, max_position_embeddings=a.length, **shape)
        common.make_rows(data, rows=a.batch * a.steps, length=a.length, prompt=1, vocab=shape["vocab_size"])
        command = [sys.executable, a.peer, model, data, Path(temporary, "out"), "--dtype", dtype, "--steps", a.steps]
        end = common.run([*command, "--batch", a.batch, "--max-length", a.length, *a.peer_args.split()], a.threads)
    result = common.last_json(end.stdout)
    return {
        "tokens/s": result["tokens_per_second"],
        "median step, s": result["step"],
        "peak GiB": result["peak_mib"] / 1024,
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--small", action="store_true", help="a tiny size in float32, on any machine")
    p.add_argument("--shape", choices=("1b", "8b"), default="1b")
    p.add_argument("--length", type=int, default=4096)
    p.add_argument("--documents", type=int, default=4, help="documents packed into a row")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--remat", default="dots", choices=("none", "full", "dots", "attention"))
    p.add_argument("--peer", help="the script of the other side")
    p.add_argument("--peer-args", default="", help="its further flags, such as '--compile'")
    a = p.parse_args()
    if a.small:
        a.shape, a.length = "small", 256
    # In turn would need both on the device at once: the other side goes first, and ends, before JAX takes its memory.
    found = {}
    if a.peer:
        found["peft"] = {k: [v] for k, v in theirs(a, SHAPES[a.shape]).items()}
    found["jaxtune"] = {k: [v] for k, v in ours(a, SHAPES[a.shape]).items()}
    ratios = {"tokens/s": (common.ratio(found, "tokens/s", "jaxtune", "peft"), ">= 1.0")} if a.peer else {}
    title = f"LoRA, {a.shape}: {a.batch} rows of {a.length} tokens, {a.documents} document(s) a row, remat {a.remat}"
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    sys.path.insert(0, str(common.ROOT))
    main()
