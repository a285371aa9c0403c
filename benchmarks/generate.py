"""New tokens a second, greedy with a key-value cache, against transformers: a 56M-parameter Llama, float32, on CPU.

    python benchmarks/generate.py [--json=OUT]

Each side is a process of its own, in turn; each loads the model, generates once to compile or warm up, and is measured
over `--calls` more. Prompts have one length, so nothing is padded on either side, and no row ends early.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np


def prompts(a) -> list[list[int]]:
    return np.random.default_rng(0).integers(2, a.vocab, (a.batch, a.prompt)).tolist()


def ours(a):
    """A call that generates once with jaxtune."""
    import jax.numpy as jnp

    from jaxtune.hf.load import load
    from jaxtune.infer.generation import generate

    module, params = load(a.model, dtype=jnp.float32)
    return lambda: generate(module, params, prompts(a), max_new_tokens=a.new, batch_size=a.batch)


def theirs(a):
    """A call that generates once with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(a.threads)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts(a))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": a.new, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **settings)[:, a.prompt :].tolist()


SIDES = {"jaxtune": ours, "transformers": theirs}


def child(a) -> None:
    """Measure one side in this process; print the figures and what was generated as JSON."""
    import json

    call = SIDES[a.side](a)
    seconds = []
    for _ in range(1 + a.calls):
        began = time.monotonic()
        tokens = call()
        seconds.append(time.monotonic() - began)
    assert all(len(row) == a.new for row in tokens)
    first, middle = seconds[0], statistics.median(seconds[1:])
    figures = {"tokens/s": a.batch * a.new / middle, "ms a step": 1e3 * middle / a.new, "first call, s": first}
    print(json.dumps({"figures": figures, "tokens": tokens}))


def main() -> None:
    p = common.parser(__doc__, repeats=5)
    p.add_argument("--side", choices=list(SIDES), help="measure this side alone, on --model")
    p.add_argument("--model", type=Path, help="default: a random Llama of the shape below")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--calls", type=int, default=3)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--layers", type=int, default=8)
    a = p.parse_args()
    if a.side:
        return child(a)
    told: dict[str, list] = {}

    def measure(side: str, model: Path) -> dict[str, float]:
        shape = [f"--{k}={getattr(a, k)}" for k in ("batch", "prompt", "new", "calls", "vocab", "threads")]
        end = common.run([sys.executable, __file__, f"--side={side}", f"--model={model}", *shape], a.threads)
        result = common.last_json(end.stdout)
        told[side] = result["tokens"]
        return result["figures"] | {"peak MiB": end.peak_mib}

    with tempfile.TemporaryDirectory() as folder:
        model = a.model or Path(folder)
        if not a.model:
            common.make_llama(
                model,
                vocab_size=a.vocab,
                hidden_size=a.hidden,
                intermediate_size=a.hidden * 43 // 16,
                num_hidden_layers=a.layers,
                num_attention_heads=a.hidden // 64,
                num_key_value_heads=a.hidden // 128,
                max_position_embeddings=1024,
            )
        found = common.alternate({side: lambda side=side: measure(side, model) for side in SIDES}, a.repeats)
    pairs = zip(told["jaxtune"], told["transformers"], strict=True)
    ratios = {
        "tokens/s": (common.ratio(found, "tokens/s", "jaxtune", "transformers"), ">= 1.1"),
        "rows with the same tokens": (statistics.mean(x == y for x, y in pairs), "1"),
    }
    title = (
        f"Generation: hidden {a.hidden}, {a.layers} layers, vocabulary {a.vocab}, {a.batch} prompts of {a.prompt} "
        f"tokens, {a.new} new"
    )
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
