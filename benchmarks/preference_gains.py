"""What tuning on real pairs gains on pairs that were held out: accuracy and margins of three seeds, fold by fold.

    python benchmarks/preference_gains.py --model=DIR --dpo=dpo_en_demo.json --kto=kto_en_demo.json --work=DIR

The files are LLaMA-Factory's. Of a prompt the last hundred characters of its last turn are kept, so that a model of 512
positions sees most of an answer; answers are cut at its end. Rows are in one of three folds by the hash of their
prompt, so that no prompt is on both sides; one fold is held out, three seeds train on the others in one step, and
the weights of the last step are measured. Nothing is chosen by the held-out rows. Intervals are bootstraps over the
rows.
"""

import argparse
import hashlib
import json
from pathlib import Path

import common
import numpy as np

FOLDS, SEEDS, KEPT = 3, (0, 1, 2), 100
SHARED = {
    **{"data.max_length": 512, "data.overlength": "truncate", "tune.lora.r": 16, "tune.lora.lora_alpha": 32},
    **{"optim.schedule": "cosine", "optim.warmup": 0.03, "train.epochs": 1, "train.batch_size": 8},
    **{"log.tensorboard": "false", "log.progress": "false"},
}
SETTINGS = {
    "dpo": {"objective.name": "preference", "objective.loss": "sigmoid_norm", "objective.beta": 10, "optim.lr": 5e-4},
    "kto": {"objective.name": "kto", "objective.beta": 0.02, "optim.lr": 1e-4},
}


def fold_of(turns: list) -> int:
    """The fold of a prompt."""
    return int(hashlib.sha256(json.dumps(turns).encode()).hexdigest(), 16) % FOLDS


def end(text: str) -> str:
    """The last characters of a prompt, from a word on."""
    text = text.strip()
    return text if len(text) <= KEPT else text[-KEPT:].split(" ", 1)[-1]


def read(file: Path) -> list[tuple[int, dict]]:
    """(fold, row) of each row: prompt, chosen and rejected; or prompt, completion and label."""
    found = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        if "conversations" in row:
            turns = row["conversations"]
            answers = {side: row[side]["value"] for side in ("chosen", "rejected")}
            found.append((fold_of(turns), {"prompt": end(turns[-1]["value"]), **answers}))
        else:
            *turns, last = row["messages"]
            judged = {"completion": last["content"], "label": row["label"]}
            found.append((fold_of(turns), {"prompt": end(turns[-1]["content"]), **judged}))
    return found


def measure(a, objective: str, rows: list[tuple[int, dict]], fold: int) -> list[list[dict]]:
    """Train all seeds on the other folds; what each makes of the held-out rows, as `jaxtune eval` writes it."""
    out = a.work / f"{objective}{fold}"
    out.mkdir(parents=True, exist_ok=True)
    for name, held in (("train", False), ("held_out", True)):
        lines = [json.dumps(row) for own, row in rows if (own == fold) == held]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"model.path": a.model, "data.train": out / "train.jsonl", **SHARED, **SETTINGS[objective]}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    common.quiet("sweep", f"--workdir={out}/run", *flags, f"--sweep.train.seed={','.join(map(str, SEEDS))}")
    held_out, found = [row for own, row in rows if own == fold], []
    for seed in SEEDS:
        run = out / "run" / f"seed={seed}"
        common.quiet("eval", run, f"--data={out}/held_out.jsonl")
        records = [json.loads(line) for line in (run / "eval" / "rows.jsonl").read_text().splitlines()]
        for record in records:
            record["good"] = held_out[int(record["where"].rpartition(":")[2]) - 1].get("label")
        found.append(records)
        print(objective, f"fold {fold}, seed {seed}:", said(objective, records), flush=True)
    return found


def figures(objective: str, records: list[dict]) -> tuple[float, float]:
    """(share of pairs in which the better answer has the higher reward, mean difference of the rewards).

    Of judged answers, pairs are all of a good and a bad one.
    """
    own = [record["tuned"] for record in records]
    if objective == "dpo":
        return float(np.mean([row["accuracy"] for row in own])), float(np.mean([row["margins"] for row in own]))
    good = np.array([row["rewards"] for row, record in zip(own, records) if record["good"]])
    bad = -np.array([row["rewards"] for row, record in zip(own, records) if not record["good"]])
    return float((good[:, None] > bad).mean()), float(good.mean() - bad.mean())


def said(objective: str, records: list[dict]) -> str:
    """The figures with 95% intervals."""
    rng = np.random.default_rng(0)
    drawn = [figures(objective, [records[i] for i in rng.integers(0, len(records), len(records))]) for _ in range(1000)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    right, margin = figures(objective, records)
    return (
        f"{len(records)} rows, {right:.1%} right [{low[0]:.1%}, {high[0]:.1%}], "
        f"margin {margin:.4f} [{low[1]:.4f}, {high[1]:.4f}]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dpo", type=Path)
    parser.add_argument("--kto", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="directory for folds and runs")
    parser.add_argument("--folds", type=lambda text: [int(x) for x in text.split(",")], default=list(range(FOLDS)))
    a = parser.parse_args()
    for objective in ("dpo", "kto"):
        if file := getattr(a, objective):
            rows = read(file)
            found = [measure(a, objective, rows, fold) for fold in a.folds]
            for seed, parts in zip(SEEDS, zip(*found, strict=True), strict=True):
                print(objective, f"seed {seed}, all:", said(objective, [record for part in parts for record in part]))


if __name__ == "__main__":
    main()
