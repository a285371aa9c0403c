"""DPO with LoRA beside TRL's DPOTrainer on the same tokens: pairs a second, peak memory, alternating.

    python benchmarks/preferences.py [--repeats=3] [--json=OUT]

A random Llama in float32, pairs whose answers are all of one length, so that neither side pads. Pairs a second are
those of the second half of the steps; memory is the whole process's, with what either side needs before its first step.
TRL computes its reference with the adapter switched off, in each step; with --precompute it is measured a second time
with the reference computed once before, as ours is.
"""

import functools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import common

LORA = {"r": 16, "lora_alpha": 32}


def make_pairs(file: Path, a) -> None:
    """Pairs of `a.length` tokens a side, the end of sequence included, of which `a.prompt` are the prompt's."""
    draw = random.Random(0)
    with file.open("w") as f:
        for _ in range(a.batch * a.steps):
            words = [f"w{draw.randrange(a.vocab - 2)}" for _ in range(2 * a.length - a.prompt - 2)]
            prompt, answers = words[: a.prompt], words[a.prompt :]
            half = a.length - a.prompt - 1
            row = {"prompt": prompt, "chosen": answers[:half], "rejected": answers[half:]}
            f.write(json.dumps({name: " ".join(text) for name, text in row.items()}) + "\n")


def ours(folder: Path, a) -> dict[str, float]:
    """`jaxtune train` in a process of its own."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        **{"model.path": folder / "model", "data.train": folder / "pairs.jsonl", "data.max_length": a.length},
        **{"objective.name": "preference", "tune.lora.r": LORA["r"], "tune.lora.lora_alpha": LORA["lora_alpha"]},
        **{"train.steps": a.steps, "train.batch_size": a.batch, "log.every": a.steps // 2, "log.tensorboard": "false"},
        **{"optim.lr": 1e-5, "optim.warmup": 0, "optim.schedule": "constant", "model.dtype": "float32"},
    }
    flags = [f"--config.{path}={value}" for path, value in settings.items()]
    config = folder / "config.py"
    config.write_text("def get_config():\n    return {}\n")
    command = common.jaxtune("train", f"--config={config}", *flags, f"--workdir={workdir / 'run'}")
    done = common.run(command, a.threads, JAXTUNE_CACHE=str(workdir / "cache"))
    speed = [line["train/tokens_per_second"] for line in common.read_metrics(workdir / "run") if "train/loss" in line]
    return {"pairs/s": speed[-1] / (2 * a.length), "peak MiB": done.peak_mib, "whole, s": done.wall}


def theirs(folder: Path, a, precompute: bool) -> dict[str, float]:
    """TRL in a process of its own."""
    flags = [f"--{name}={getattr(a, name)}" for name in ("steps", "batch", "length")]
    command = [sys.executable, __file__, f"--trl={folder}", *flags, *["--precompute"] * precompute]
    done = common.run(command, a.threads)
    return {**common.last_json(done.stdout), "peak MiB": done.peak_mib, "whole, s": done.wall}


def trl(folder: Path, a) -> None:
    """Train with DPOTrainer, and print its speed as JSON."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.monotonic())

    tokenizer = AutoTokenizer.from_pretrained(folder / "model", pad_token="<unk>")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=a.batch,
        max_steps=a.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_length=a.length,
        precompute_ref_log_probs=a.precompute,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=a.steps,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **LORA),
        callbacks=[Clock()],
    )
    trainer.train()
    half = len(times) // 2
    print(json.dumps({"pairs/s": a.batch * (len(times) - half) / (times[-1] - times[half - 1])}))


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument(
        "--precompute", action="store_true", help="measure TRL also with its reference computed before the first step"
    )
    p.add_argument("--trl", type=Path, help="what the TRL side runs in a process of its own")
    a = p.parse_args()
    if a.trl:
        trl(a.trl, a)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden_size": a.hidden, "intermediate_size": a.hidden * 43 // 16, "num_hidden_layers": a.layers}
        heads = {"num_attention_heads": a.hidden // 64, "num_key_value_heads": a.hidden // 128}
        common.make_llama(
            folder / "model", vocab_size=a.vocab, max_position_embeddings=max(512, a.length), **shape, **heads
        )
        make_pairs(folder / "pairs.jsonl", a)
        peers = {"trl": False} | ({"trl, precomputed": True} if a.precompute else {})
        sides = {"jaxtune": lambda: ours(folder, a)}
        sides |= {name: functools.partial(theirs, folder, a, once) for name, once in peers.items()}
        found = common.alternate(sides, a.repeats)
    ratios = {}
    for peer in peers:
        ratios[f"pairs/s, jaxtune over {peer}"] = common.ratio(found, "pairs/s", "jaxtune", peer), ">= 1.3"
        ratios[f"peak MiB, jaxtune over {peer}"] = common.ratio(found, "peak MiB", "jaxtune", peer), "<= 0.7"
    title = f"DPO with LoRA: hidden {a.hidden}, {a.layers} layers, {a.batch} pairs of {a.length} tokens a side"
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
