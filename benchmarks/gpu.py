"""What to run first on a GPU: stages of at most 8 minutes, each in a process of its own, that write results as they go.

    python benchmarks/gpu.py --out=OUT.jsonl [--only=STAGE,...] [--peer=PEFT_SFT.py]     on a GPU
    python benchmarks/gpu.py --small --out=OUT.jsonl    the same code at a tiny size, a case a stage, on any machine

    check     attention's kernel against plain arithmetic: rows of one text, padded and packed; no segment sees another
    peak      FLOP/s of square matrix products, which the shares below are of
    nemo      8B LoRA r=16 on all projections, 2 rows of one text of 4,096 tokens, dropout 0 and 0.1 (NVIDIA's NeMo
              AutoModel publishes 12,473 tokens/s on an H100 for it, without recomputation)
    packed    1B LoRA at equal tokens: rows of one text, of four by cuDNN, of four by blocks
    qlora     8B over NF4, one packed row of 4,096 tokens, all recomputed
    offload   the same on one row of 32,768 tokens, with what is kept in the host's memory
    fp8       1B LoRA over bfloat16, over fp8 stored, over fp8 multiplied
    full      1B in full: 8-bit moments and bfloat16 weights
    sweep     1B: 8 runs in one step of 8 rows of 512 tokens, beside one run
    decode    1B: new tokens a second, 32 rows
    peer      the peer's script and ours, alternating, at the same shape

Weights are random and drawn on the device in bfloat16. FLOPs a token are 4 N, N being the parameters of the matrix
products (the head, not the embedding), 6 N for full; attention's own and recomputation are not counted, so shares are
lower bounds. A step that does not fit is reported so, and the next stage goes on.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np

SHAPES = {
    "small": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
LIMIT = 480  # seconds of a stage
SMALL = 64  # tokens of a row with --small


class Case(NamedTuple):
    """A training step.

    Attributes:
        documents: in a row; more than one: rows are packed.
        segments: of a packed row at most, as cuDNN has to know; 0: not told.
        dropout: of LoRA.
        members: runs in one step; 0: one, alone.
        light: 8-bit moments and bfloat16 weights.
    """

    shape: str = "1b"
    method: str = "lora"
    rows: int = 2
    length: int = 4096
    documents: int = 1
    segments: int = 0
    remat: str = "dots"
    quantization: str = "none"
    dropout: float = 0.0
    members: int = 0
    light: bool = False


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


def model(a, case: Case) -> tuple[Any, Any]:
    """(module, random parameters in its dtype)."""
    import jax
    import jax.numpy as jnp

    from jaxtune.models import build

    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": case.length}
    dtype = jnp.float32 if a.small else jnp.bfloat16
    config |= SHAPES["small" if a.small else case.shape]
    module = build(config, dtype=dtype, remat=case.remat, most_segments=case.segments)
    draw = jax.jit(lambda key: jax.tree.map(lambda p: p.astype(dtype), module.init_params(key)))
    return module, draw(jax.random.key(0))


def step(a, case: Case) -> dict[str, Any]:
    """Time a training step; {"does not fit": error} if the device has too little memory."""
    import jax

    from jaxtune.methods.table import tune
    from jaxtune.objectives.causal_lm import causal_lm_task
    from jaxtune.objectives.task import BatchShape
    from jaxtune.train import optim, stacked
    from jaxtune.train.recipe import Recipe
    from jaxtune.train.runtime import out_of_memory
    from jaxtune.tree import flatten

    if a.small:
        case = case._replace(length=SMALL, rows=min(case.rows, 2))
    packed = case.documents > 1
    settings = {"r": 16, "lora_dropout": case.dropout} if case.method == "lora" else {}
    try:
        module, base = model(a, case)
        products = sum(x.size for path, x in flatten(base).items() if path.endswith("/kernel"))
        products += base["embed_tokens"]["embedding"].size * ("lm_head" not in base)
        recipe = Recipe(
            module,
            causal_lm_task(module, packed=packed),
            partial(tune, case.method, settings=settings),
            partial(optim.optimizer, lr=2e-4, grad_clip=1.0, state="8bit" if case.light else "float32"),
            BatchShape(case.rows, case.length, packed=packed),
            quantization=case.quantization,
            weights="bfloat16" if case.light else "float32",
        )
        start = recipe.start(recipe.quantized(base))
        del base
        state = stacked.stack([start.state] * case.members) if case.members else start.state
        advance, _ = recipe.programs(members=case.members or None)
        data = jax.device_put(batch(case.rows, case.length, case.documents, module.spec.vocab))

        def once():
            nonlocal state
            state, metrics = advance(state, start.frozen, data)
            return metrics

        times = seconds(once, a.steps)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"does not fit": str(error).splitlines()[0][:200]}
    tokens = case.rows * case.length * (case.members or 1)
    rate = tokens / statistics.median(times)
    stats = jax.local_devices()[0].memory_stats() or {}
    held = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    each = 6 if case.method == "full" else 4
    return {
        "tokens/s": rate,
        "median step, s": statistics.median(times),
        "TFLOP/s": each * products * rate / 1e12,
        "peak GiB of the process": held / 2**30,
    }


def check(a) -> dict[str, Any]:
    from jaxtune.models.attention import trial

    module, _ = model(a, Case("small" if a.small else "1b", length=128))
    began = time.perf_counter()
    said = trial(module)
    return {"kernel": said or "as plain arithmetic", "s": time.perf_counter() - began}


def peak(a) -> dict[str, Any]:
    import jax.numpy as jnp

    kinds = {"float32": (256, jnp.float32)} if a.small else {"bfloat16": (8192, jnp.bfloat16)}
    return {f"{name} TFLOP/s": matmul_peak(*kind) / 1e12 for name, kind in kinds.items()}


def decode(a) -> dict[str, Any]:
    from jaxtune.infer.generation import generate

    rows, prompt, new = (2, 8, 4) if a.small else (32, 512, 256)
    module, params = model(a, Case(length=prompt + new))
    prompts = np.random.default_rng(0).integers(2, module.spec.vocab, (rows, prompt)).tolist()

    def once():
        return generate(module, params, prompts, max_new_tokens=new, batch_size=rows)

    once()
    began = time.perf_counter()
    made = sum(map(len, once()))
    return {"new tokens/s": made / (time.perf_counter() - began), "rows": rows}


def peer(a) -> dict[str, Any]:
    """The other side and ours in turn, each a process of its own, on rows of one document."""
    if not a.peer:
        return {"skipped": "no --peer"}
    shape, length = ("small", SMALL) if a.small else ("1b", 4096)
    dtype = "float32" if a.small else "bfloat16"
    found: dict[str, Any] = {"peft": [], "jaxtune": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = Path(temporary, "model"), Path(temporary, "rows.jsonl")
        common.make_llama(folder, dtype=dtype, max_position_embeddings=length, **SHAPES[shape])
        common.make_rows(data, rows=2 * a.steps, length=length, prompt=1, vocab=SHAPES[shape]["vocab_size"])
        theirs = [sys.executable, a.peer, folder, data, Path(temporary, "out"), "--dtype", dtype, "--steps", a.steps]
        theirs += ["--batch", 2, "--max-length", length, *a.peer_args.split()]
        mine = [sys.executable, __file__, f"--stage=peer-ours{'-small' * a.small}", f"--steps={a.steps}"]
        for _ in range(a.repeats):
            row = common.last_json(common.run(theirs, a.threads).stdout)
            found["peft"].append({"tokens/s": row["tokens_per_second"], "peak MiB": row["peak_mib"]})
            found["jaxtune"].append(common.last_json(common.run(mine, a.threads).stdout))
    return found


LORA = Case()
PACKED = LORA._replace(documents=4)
QLORA = Case("8b", rows=1, documents=4, segments=16, remat="full", quantization="nf4")
EIGHT = LORA._replace(rows=8, length=512)
STAGES: dict[str, dict[str, Case] | Callable[[Any], dict[str, Any]]] = {
    "check": check,
    "peak": peak,
    "nemo": {
        f"dropout {rate}, remat {remat}": Case("8b", remat=remat, dropout=rate)
        for rate in (0.0, 0.1)
        for remat in ("none", "dots")
    },
    "packed": {
        "one text a row": LORA,
        "four, cuDNN": PACKED._replace(segments=16),
        "four, blocks": PACKED,
    },
    "qlora": {"8B NF4": QLORA},
    "offload": {"8B NF4, 32k": QLORA._replace(length=32768, documents=1, segments=0, remat="offload")},
    "fp8": {kind: LORA._replace(quantization=kind) for kind in ("none", "fp8", "fp8_matmul")},
    "full": {"1B, 8 bits": Case(method="full", rows=1, documents=4, light=True)},
    "sweep": {"one run": EIGHT, "8 in one step": EIGHT._replace(members=8)},
    "decode": decode,
    "peer": peer,
}


def stage(name: str, a: Any) -> dict[str, Any]:
    """Run a stage in this process."""
    work = STAGES[name]
    if callable(work):
        return work(a)
    cases = list(work.items())[-1:] if a.small else work.items()
    return {case: step(a, settings) for case, settings in cases}


def main() -> int:
    p = common.parser(__doc__)
    p.add_argument("--small", action="store_true", help="a tiny size in float32, on any machine")
    p.add_argument("--out", type=Path, help="a file of JSON lines, one a stage, added to as they end")
    p.add_argument("--only", help="stages, comma-separated")
    p.add_argument("--stage", help="one stage in this process; prints JSON")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--peer", help="the script of the other side")
    p.add_argument("--peer-args", default="", help="its further flags, such as '--compile'")
    a = p.parse_args()
    if a.stage and a.stage.startswith("peer-ours"):
        a.small = a.small or a.stage.endswith("small")
        print(json.dumps(step(a, LORA)))
        return 0
    if a.stage:
        print(json.dumps(stage(a.stage, a)))
        return 0
    chosen = a.only.split(",") if a.only else list(STAGES)
    if unknown := set(chosen) - set(STAGES):
        p.error(f"--only: no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    failed = False
    for name in chosen:
        began = time.time()
        command = [sys.executable, __file__, f"--stage={name}", *sys.argv[1:]]
        try:
            end = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            found = common.last_json(end.stdout) if end.returncode == 0 else {"error": end.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            found = {"error": f"took more than {LIMIT} s"}
        failed |= "error" in found
        row = {"stage": name, "s": round(time.time() - began, 1), "found": found}
        print(json.dumps(row), flush=True)
        if a.out:
            with a.out.open("a") as file:
                file.write(json.dumps(row | {"machine": common.machine(), "versions": common.versions()}) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(common.ROOT))
    sys.exit(main())
