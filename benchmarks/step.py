"""Tokens a second of a LoRA step, against plain transformers and peft: a 56M-parameter Llama, float32, on CPU.

    python benchmarks/step.py --peer=PEFT_SFT.py [--json=OUT]

Each side is a process of its own, in turn. Both see the same rows of exactly `--length` tokens, so nothing is padded,
and train r=16 on the seven projections. The first steps (compilation, warm-up) are not counted on either side.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import common


def ours(model: Path, data: Path, folder: Path, a) -> dict[str, float]:
    workdir = Path(tempfile.mkdtemp(dir=folder))
    end = common.run(
        common.jaxtune(
            "train",
            f"--config={common.ROOT}/configs/lora_sft.py",
            f"--workdir={workdir}",
            f"--config.model.path={model}",
            f"--config.data.train={data}",
            f"--config.data.max_length={a.length}",
            f"--config.train.batch_size={a.batch}",
            "--config.train.epochs=none",
            f"--config.train.steps={a.steps}",
            "--config.log.every=1",
            "--config.log.progress=false",
        ),
        a.threads,
        JAXTUNE_CACHE=str(folder / "cache"),
    )
    rows = [m for m in common.read_metrics(workdir) if "train/loss" in m]
    seconds = [a.batch * a.length / m["train/tokens_per_second"] for m in rows][warmup(a.steps) :]
    return {
        "tokens/s": a.batch * a.length * len(seconds) / sum(seconds),
        "median step, s": statistics.median(seconds),
        "peak MiB": end.peak_mib,
    }


def theirs(model: Path, data: Path, folder: Path, a) -> dict[str, float]:
    command = [
        sys.executable,
        a.peer,
        model,
        data,
        tempfile.mkdtemp(dir=folder),
        "--steps",
        a.steps,
        "--batch",
        a.batch,
    ]
    end = common.run([*command, "--max-length", a.length, "--threads", a.threads], a.threads)
    result = common.last_json(end.stdout)
    return {"tokens/s": result["tokens_per_second"], "median step, s": result["step"], "peak MiB": end.peak_mib}


def warmup(steps: int) -> int:
    """Steps that are not counted, as the peer has them."""
    return max(1, min(10, steps // 5))


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--peer", required=True, help="the script of the other side")
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--prompt", type=int, default=64, help="tokens of a row that are not trained")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--vocab", type=int, default=32000)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = folder / "model", folder / "rows.jsonl"
        common.make_llama(
            model,
            vocab_size=a.vocab,
            hidden_size=a.hidden,
            intermediate_size=a.hidden * 43 // 16,
            num_hidden_layers=a.layers,
            num_attention_heads=a.hidden // 64,
            num_key_value_heads=a.hidden // 128,
            max_position_embeddings=a.length,
        )
        common.make_rows(data, rows=a.batch * a.steps, length=a.length, prompt=a.prompt, vocab=a.vocab)
        sides = {"jaxtune": lambda: ours(model, data, folder, a), "peft": lambda: theirs(model, data, folder, a)}
        found = common.alternate(sides, a.repeats)
    ratios = {
        "tokens/s": (common.ratio(found, "tokens/s", "jaxtune", "peft"), ">= 1.0"),
        "peak memory": (common.ratio(found, "peak MiB", "jaxtune", "peft"), "<= 1.0"),
    }
    title = (
        f"LoRA step: hidden {a.hidden}, {a.layers} layers, vocabulary {a.vocab}, {a.batch} rows of {a.length} tokens"
    )
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
