"""Vectors of texts tuned from a real encoder beside sentence-transformers: retrieval of texts of one class, and speed.

    python benchmarks/embeddings.py quality --model=DIR --texts=BANKING77 --work=DIR [--methods=lora,full,dense]
    python benchmarks/embeddings.py speed   --model=DIR --texts=BANKING77 --work=DIR [--batches=64,512]

BANKING77 holds train.csv and test.csv (text, category). Pairs are made of training texts: each with the next of its
class, in an order that the seed draws. Both sides take the same pairs once, in batches of 64: LoRA of rank 16 on every
linear layer, all weights, or a dense layer alone (it starts as the identity), AdamW, a linear schedule with 10% warmup.
Documents are every eighth training text, relevant those of a query's class. Each side takes, of the same RATES, the one
that is best (MRR, first seed) on queries that are training texts in no pair; then all seeds are measured on every other
test text. What either side wrote is measured by the same code; intervals are over queries, seeds averaged.

Speed: pairs a second are of the second half of the steps, memory is the whole process's. With 512 pairs both sides cut
the batch into parts of 64 (GradCache). Texts a second: the second of two passes over the same texts.
"""

import csv
import dataclasses
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import common
import numpy as np

RATES = {"lora": (1e-4, 3e-4, 1e-3), "full": (1e-5, 3e-5, 1e-4), "dense": (1e-4, 3e-4, 1e-3)}
VALIDATION = slice(4, None, 16)  # training texts that are queries while a rate is chosen
BATCH = 64
LENGTH = 24
AT_ONCE = 1024  # texts of which vectors are timed
NAMES = ("hit@1", "mrr@10", "ndcg@10")
SIDES = ("jaxtune", "sentence-transformers")


def read(file: Path) -> list[tuple[str, str]]:
    """The (text, category) of each row."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [(row["text"], row["category"]) for row in csv.DictReader(lines)]


def make_pairs(rows: list[tuple[str, str]], seed: int, count: int, file: Path) -> Path:
    """Write `count` texts, each with the next one of its class, in an order that `seed` draws."""
    order = np.random.default_rng(seed).permutation(len(rows))
    classes = defaultdict(list)
    for i in order:
        classes[rows[i][1]].append(rows[i][0])
    following = {c: dict(zip(texts, [*texts[1:], texts[0]])) for c, texts in classes.items()}
    pairs = [{"anchor": rows[i][0], "positive": following[rows[i][1]][rows[i][0]]} for i in order[:count]]
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return file


# ------------------------------------------------------------------------------------------------------- the two sides


def flags(model: str, pairs: Path, method: str, rate: float, seed: int, batch: int) -> list[str]:
    """Those of `jaxtune train` that both parts share."""
    settings = {
        **{"model.path": model, "data.train": pairs, "data.overlength": "truncate", "data.max_length": LENGTH},
        **{"objective.name": "embedding", "tune.method": {"dense": "head"}.get(method, method)},
        **({"tune.lora.r": 16, "tune.lora.lora_alpha": 32} if method == "lora" else {}),
        **{"train.batch_size": batch, "train.grad_accum": max(1, batch // BATCH), "train.seed": seed},
        **{"optim.lr": rate, "optim.schedule": "linear", "optim.warmup": 0.1},
        **{"log.progress": "false", "log.tensorboard": "false"},
    }
    return [f"--config.{name}={value}" for name, value in settings.items()]


def ours(a, model: str, pairs: Path, method: str, rate: float, seed: int, out: Path) -> None:
    """Tune by the command."""
    given = [*flags(model, pairs, method, rate, seed, BATCH), *a.settings]
    common.run(common.jaxtune("train", f"--workdir={out}", *given, "--config.train.epochs=1"), a.threads)


def theirs(a, model: str, pairs: Path, method: str, rate: float, seed: int, out: Path) -> None:
    """Tune by sentence-transformers."""
    common.run([sys.executable, __file__, "peer", model, str(pairs), method, rate, seed, BATCH, -1, out], a.threads)


def peer(model: str, pairs: str, method: str, rate: str, seed: str, batch: str, steps: str, out: str) -> None:
    """Train with sentence-transformers, and print its speed as JSON; with `steps` below 0 for an epoch."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.monotonic())

    tuned = SentenceTransformer(model, device="cpu")
    tuned.max_seq_length = LENGTH
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = ["query", "key", "value", "dense"]
        lora = LoraConfig(task_type="FEATURE_EXTRACTION", r=16, lora_alpha=32, target_modules=names)
        tuned[0].model = get_peft_model(tuned[0].model, lora)
    if method == "dense":
        for name, weight in tuned.named_parameters():
            weight.requires_grad = name.startswith("2.")
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    count = int(steps) if int(steps) > 0 else len(rows) // int(batch)
    settings = SentenceTransformerTrainingArguments(
        output_dir=out,
        max_steps=count,
        per_device_train_batch_size=int(batch),
        learning_rate=float(rate),
        lr_scheduler_type="linear",
        warmup_steps=round(0.1 * count),
        seed=int(seed),
        save_strategy="no",
        report_to="none",
        logging_steps=count,
        disable_tqdm=True,
        use_cpu=True,
    )
    cached = {"mini_batch_size": BATCH} if int(batch) > BATCH else None
    loss = (losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss)(
        tuned, **(cached or {})
    )
    data = Dataset.from_list(rows)
    SentenceTransformerTrainer(tuned, args=settings, train_dataset=data, loss=loss, callbacks=[Clock()]).train()
    if method == "lora":
        tuned[0].model = tuned[0].model.merge_and_unload()
    tuned.save(f"{out}/result")
    half = len(times) // 2
    print(json.dumps({"pairs/s": int(batch) * (len(times) - half) / (times[-1] - times[half - 1])}))


# ------------------------------------------------------------------------------------------------------------- quality


def quality(a) -> None:
    """Choose rates, train what is not there yet, measure what is not measured yet, and print the table."""
    train = read(a.texts / "train.csv")
    held_out = set(range(*VALIDATION.indices(len(train))))
    pool = [row for i, row in enumerate(train) if i not in held_out]
    bases = {method: a.model if method != "dense" else str(with_dense(a.model, a.work)) for method in a.methods}
    found: dict[str, np.ndarray] = {}
    for method, base in bases.items():
        key = "dense" if method == "dense" else "base"
        found[f"base {method}"] = measured(a, base, "test", a.work / f"{key}.npy")[None]

        def run(side, tune, rate, seed, queries, method=method, base=base):
            pairs = make_pairs(pool, seed, a.pairs, a.work / f"pairs{seed}.jsonl")
            name = f"{side}{a.name if tune is ours else ''}-{method}-{rate:g}-{seed}"
            out = a.work / name
            if not (out / where(side, method)).is_dir():
                began = time.monotonic()
                tune(a, base, pairs, method, rate, seed, out)
                print(f"{name}: tuned in {time.monotonic() - began:.0f} s", flush=True)
            values = measured(a, out / where(side, method), queries, out / f"{queries}.npy")
            print(name, queries, dict(zip(NAMES, values.mean(0).round(4))), flush=True)
            return values

        for side, tune in zip(SIDES, (ours, theirs)):
            tried = {rate: run(side, tune, rate, 0, "validation")[:, 1].mean() for rate in a.rates or RATES[method]}
            best = max(tried, key=tried.get)
            print(f"{side} {method}: {best:g} of {', '.join(f'{r:g} ({v:.4f})' for r, v in tried.items())}", flush=True)
            found[f"{side} {method}"] = np.stack([run(side, tune, best, seed, "test") for seed in range(a.repeats)])
    table(found, a.methods)


def where(side: str, method: str) -> str:
    """The folder of a side's result in its working directory."""
    return "result" if side != "jaxtune" else "adapter" if method == "lora" else "model"


def table(found: dict[str, np.ndarray], methods: list[str]) -> None:
    """Print the means of measures f64[seeds, queries, names] with intervals, and the differences of the sides."""
    from jaxtune.evaluate.statistics import interval, paired

    print(f"\n| | {' | '.join(NAMES)} | hit@1 by seed |\n|{'---|' * (len(NAMES) + 2)}")
    for name, values in found.items():
        cells = []
        for k in range(len(NAMES)):
            value, low, high = interval(values.mean(0)[:, k])
            cells.append(f"{value:.4f} ({low:.4f} to {high:.4f})")
        seeds = ", ".join(f"{x:.4f}" for x in values[..., 0].mean(1))
        print(f"| {name} | {' | '.join(cells)} | {seeds} |")
    for method in methods:
        for under, over in ((f"base {method}", f"jaxtune {method}"), (f"{SIDES[1]} {method}", f"jaxtune {method}")):
            for k, name in enumerate(NAMES[:2]):
                d = paired(found[under].mean(0)[:, k], found[over].mean(0)[:, k])
                value, low, high = d.difference
                print(f"{over} over {under}, {name}: {value:+.4f} ({low:+.4f} to {high:+.4f})")


def with_dense(model: str, work: Path) -> Path:
    """The model with a dense layer that does nothing yet, as sentence-transformers writes it."""
    out = work / "with-dense"
    if not out.is_dir():
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize

        base = SentenceTransformer(model, device="cpu")
        width = base.get_embedding_dimension()
        dense = Dense(width, width, activation_function=torch.nn.Identity(), init_weight=torch.eye(width))
        torch.nn.init.zeros_(dense.linear.bias)
        SentenceTransformer(modules=[base[0], base[1], dense, Normalize()], device="cpu").save(str(out))
    return out


def measured(a, model: Path | str, queries: str, file: Path) -> np.ndarray:
    """NAMES of each query by the vectors of a directory, f64[queries, names]; kept in `file`."""
    if not file.is_file():
        common.run([sys.executable, __file__, "measure", model, a.texts, queries, file], a.threads)
    return np.load(file)


def measure(model: str, texts: str, queries: str, file: str) -> None:
    """Rank the documents for each query of "test" or "validation", and write NAMES of each."""
    from jaxtune.evaluate.retrieval import measures, rank
    from jaxtune.infer.vectors import open_embedder

    train = read(Path(texts) / "train.csv")
    asked, documents = train[VALIDATION] if queries == "validation" else read(Path(texts) / "test.csv")[::2], train[::8]
    embedder = open_embedder(model)
    # All sides read whole texts: a result remembers, or not, to what its training cut them.
    embedder = embedder._replace(pooled=dataclasses.replace(embedder.pooled, max_length=None))
    vectors, corpus = (embedder([text for text, _ in rows]) for rows in (asked, documents))
    members = defaultdict(dict)
    for i, (_, category) in enumerate(documents):
        members[category][i] = 1.0
    rankings = rank(vectors, corpus, np.full(len(asked), -1))
    each = [measures(ranking, members[category]) for ranking, (_, category) in zip(rankings, asked)]
    np.save(file, np.array([[found[name] for name in NAMES] for found in each]))


# --------------------------------------------------------------------------------------------------------------- speed


def speed(a) -> None:
    """Alternate the sides: training by batch size, and vectors of texts."""
    train = read(a.texts / "train.csv")
    targets = {"pairs/s": ">= 1.0", "peak MiB": "<= 0.6", "texts/s": ">= 1.1"}
    for batch in a.batches:
        steps = a.steps if batch <= BATCH else max(4, a.steps // 4)
        pairs = make_pairs(train, 0, len(train), a.work / "pairs.jsonl")

        def side_ours(batch=batch, steps=steps, pairs=pairs):
            out = a.work / f"speed-{time.monotonic_ns()}"
            given = [*flags(a.model, pairs, "lora", 3e-4, 0, batch), f"--config.train.steps={steps}"]
            given += [f"--config.log.every={steps // 2}"]
            done = common.run(common.jaxtune("train", f"--workdir={out}", *given), a.threads)
            before, last = [line for line in common.read_metrics(out) if "train/loss" in line][-2:]
            seconds = (last["train/tokens"] - before["train/tokens"]) / last["train/tokens_per_second"]
            return {"pairs/s": batch * (last["step"] - before["step"]) / seconds, "peak MiB": done.peak_mib}

        def side_theirs(batch=batch, steps=steps, pairs=pairs):
            out = a.work / f"speed-{time.monotonic_ns()}"
            done = common.run(
                [sys.executable, __file__, "peer", a.model, str(pairs), "lora", 3e-4, 0, batch, steps, out], a.threads
            )
            return {**common.last_json(done.stdout), "peak MiB": done.peak_mib}

        shown(f"LoRA, batches of {batch} pairs, {steps} steps", side_ours, side_theirs, a, targets)
    if a.embed:
        command = [sys.executable, __file__, "embed", a.model, str(a.texts / "train.csv")]
        sides = [lambda side=side: common.last_json(common.run([*command, side], a.threads).stdout) for side in SIDES]
        shown(f"Vectors of {AT_ONCE:,} training texts", *sides, a, targets)


def shown(title: str, ours, theirs, a, targets: dict[str, str]) -> None:
    """Alternate two sides and print their table."""
    found = common.alternate({SIDES[0]: ours, SIDES[1]: theirs}, a.repeats)
    metrics = [name for name in targets if name in found[SIDES[0]]]
    ratios = {f"{name}, ratio": (common.ratio(found, name, *SIDES), targets[name]) for name in metrics}
    common.report(title, found, ratios, a.json)


def embed(model: str, file: str, side: str) -> None:
    """Print the texts a second of one side as JSON."""
    texts = [text for text, _ in read(Path(file))][:AT_ONCE]
    if side == "jaxtune":
        from jaxtune.infer.vectors import open_embedder

        vectors = open_embedder(model)
    else:
        from sentence_transformers import SentenceTransformer

        vectors = SentenceTransformer(model, device="cpu").encode
    vectors(texts)
    began = time.monotonic()
    vectors(texts)
    print(json.dumps({"texts/s": len(texts) / (time.monotonic() - began)}))


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("what", choices=["quality", "speed"])
    p.add_argument("--model", required=True)
    p.add_argument("--texts", type=Path, required=True)
    p.add_argument("--work", type=Path, required=True, help="directory for runs; what is there is not done again")
    p.add_argument("--methods", type=lambda text: text.split(","), default=["lora", "full", "dense"])
    p.add_argument("--pairs", type=int, default=1024, help="of an epoch")
    p.add_argument("--rates", type=lambda text: [float(x) for x in text.split(",")], help="default: RATES")
    p.add_argument("--settings", type=str.split, default=[], help="flags of jaxtune train beside those of both sides")
    p.add_argument("--name", default="", help="of runs with --settings")
    p.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",") if x], default=[64, 512])
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--embed", type=lambda text: text != "false", default=True)
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    {"quality": quality, "speed": speed}[a.what](a)


if __name__ == "__main__":
    others = {"peer": peer, "embed": embed, "measure": measure}
    if sys.argv[1] in others:
        others[sys.argv[1]](*sys.argv[2:])
    else:
        main()
