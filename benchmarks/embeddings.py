"""Vectors of texts tuned from a real encoder beside sentence-transformers: retrieval of texts of one class, and speed.

    python benchmarks/embeddings.py --model=DIR --texts=BANKING77 --work=DIR

BANKING77 holds train.csv and test.csv (text, category). Pairs are made of the training texts: each with the next of its
class. Both sides take the same pairs, one epoch, batches of 64, LoRA of rank 16 on every linear layer or all weights,
AdamW with a linear schedule, at a rate chosen for each way of tuning. Queries are the test texts, the documents the
training texts, relevant those of the same class. What either side wrote is measured by the same code.
"""

import csv
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from common import jaxtune, parser

RATES = {"lora": 1e-3, "full": 5e-5}
BATCH = 64


def read(file: Path) -> list[tuple[str, str]]:
    """The (text, category) of each row."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [(row["text"], row["category"]) for row in csv.DictReader(lines)]


def make_pairs(rows: list[tuple[str, str]], seed: int) -> list[dict[str, str]]:
    """Each text with the next one of its class, in an order that `seed` draws."""
    order = np.random.default_rng(seed).permutation(len(rows))
    classes = defaultdict(list)
    for i in order:
        classes[rows[i][1]].append(rows[i][0])
    following = {c: dict(zip(texts, [*texts[1:], texts[0]])) for c, texts in classes.items()}
    return [{"anchor": rows[i][0], "positive": following[rows[i][1]][rows[i][0]]} for i in order]


def make_corpus(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Path:
    """The test texts over the training texts in BEIR's layout."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", train), ("queries", test)):
        lines = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, (text, _) in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    classes = defaultdict(list)
    for i, (_, category) in enumerate(train):
        classes[category].append(i)
    lines = [f"q{i}\tc{j}\t1" for i, (_, category) in enumerate(test) for j in classes[category]]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


def ours(model: str, pairs: Path, method: str, seed: int, out: Path) -> Path:
    """Tune by the command; return the result."""
    lora = ["--config.tune.lora.r=16", "--config.tune.lora.lora_alpha=32"] if method == "lora" else []
    command = jaxtune(
        *("train", f"--workdir={out}", f"--config.model.path={model}", f"--config.data.train={pairs}"),
        *("--config.objective.name=embedding", f"--config.tune.method={method}", *lora, "--config.train.epochs=1"),
        *(f"--config.train.batch_size={BATCH}", f"--config.optim.lr={RATES[method]}", f"--config.train.seed={seed}"),
        *("--config.optim.schedule=linear", "--config.optim.warmup=0.1", "--config.data.overlength=truncate"),
        *("--config.data.max_length=64", "--config.log.progress=false", "--config.log.tensorboard=false"),
    )
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out / ("adapter" if method == "lora" else "model")


def theirs(model: str, pairs: Path, method: str, seed: int, out: Path) -> Path:
    """Tune by sentence-transformers; return the result."""
    command = [sys.executable, __file__, "--peer", model, str(pairs), method, str(seed), str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out / "result"


def peer(model: str, pairs: str, method: str, seed: str, out: str) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    tuned = SentenceTransformer(model, device="cpu")
    tuned.max_seq_length = 64
    if method == "lora":
        from peft import LoraConfig

        names = ["query", "key", "value", "dense"]
        tuned.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=16, lora_alpha=32, target_modules=names))
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    settings = SentenceTransformerTrainingArguments(
        output_dir=out,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=RATES[method],
        lr_scheduler_type="linear",
        warmup_ratio=0.1,
        seed=int(seed),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    SentenceTransformerTrainer(
        tuned, args=settings, train_dataset=Dataset.from_list(rows), loss=MultipleNegativesRankingLoss(tuned)
    ).train()
    tuned.save(f"{out}/result")


def main() -> None:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--model", required=True)
    flags.add_argument("--texts", type=Path, required=True)
    flags.add_argument("--work", type=Path, required=True, help="directory for runs; what is there is not done again")
    flags.add_argument("--methods", default="lora,full")
    flags.add_argument("--sides", default="jaxtune,sentence-transformers")
    options = flags.parse_args()
    train, test = read(options.texts / "train.csv"), read(options.texts / "test.csv")
    corpus = make_corpus(options.work / "corpus", train, test)
    sides = {"jaxtune": ours, "sentence-transformers": theirs}
    found = {"base": [measure(options.model, corpus, options.work / "base")]}
    for seed in range(options.repeats):
        pairs = options.work / f"pairs{seed}.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(train, seed)))
        for method in options.methods.split(","):
            for side in options.sides.split(","):
                out, began = options.work / f"{side}-{method}-{seed}", time.monotonic()
                result = out / {"jaxtune": {"lora": "adapter", "full": "model"}[method]}.get(side, "result")
                if not result.is_dir():
                    sides[side](options.model, pairs, method, seed, out)
                took = time.monotonic() - began
                figures = measure(str(result), corpus, out / "measured") | {"seconds": took}
                found.setdefault(f"{side} {method}", []).append(figures)
                print(side, method, seed, figures, flush=True)
    for name, rows in found.items():
        shown = {key: [round(row[key], 4) for row in rows if key in row] for key in rows[0]}
        print(name, shown)


def measure(model: str, corpus: Path, out: Path) -> dict[str, float]:
    """hit@1, mrr@10 and ndcg@10 of a directory."""
    if not (out / "eval.json").is_file():
        subprocess.run(
            jaxtune("eval", model, f"--data={corpus}", f"--out={out}", "--tuned-only"),
            check=True,
            stdout=subprocess.DEVNULL,
        )
    metrics = json.loads((out / "eval.json").read_text())["held_out"]["metrics"]
    return {name: metrics[name]["tuned"]["value"] for name in ("hit@1", "mrr@10", "ndcg@10")}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    else:
        main()
