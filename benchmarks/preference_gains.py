"""What tuning on real pairs gains on pairs that were held out: accuracy and margins of three seeds, fold by fold.

    python benchmarks/preference_gains.py --model=DIR --dpo=dpo_en_demo.json --kto=kto_en_demo.json --work=DIR

The files are LLaMA-Factory's. Rows are in one of three folds by the hash of their prompt, so that no prompt is on both
sides; one fold is held out, and three seeds train on the others in one step. Nothing is chosen by the held-out rows.
"""

import argparse
import hashlib
import json
from pathlib import Path

import common

FOLDS = 3
SETTINGS = {
    **{"data.eval_fraction": 0, "data.max_length": 512, "data.overlength": "truncate"},
    **{"train.epochs": 1, "train.batch_size": 8, "train.eval_every": 100},
    **{"optim.lr": 1e-4, "objective.beta": 0.1, "log.tensorboard": "false"},
}


def fold_of(row: dict) -> int:
    """The fold of a row, by its prompt."""
    prompt = row["conversations"] if "conversations" in row else row["messages"][:-1]
    return int(hashlib.sha256(json.dumps(prompt).encode()).hexdigest(), 16) % FOLDS


def split(file: Path, fold: int, out: Path) -> tuple[Path, Path]:
    """Write (training rows, held-out rows) of a fold."""
    sides = out / "train.json", out / "held_out.json"
    out.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text(encoding="utf-8"))
    for side, held in zip(sides, (False, True), strict=True):
        side.write_text(json.dumps([row for row in rows if (fold_of(row) == fold) == held]))
    return sides


def measure(a, objective: str, file: Path, fold: int) -> None:
    """Train three seeds on the other folds, and print the evaluations of each before and after."""
    train, held_out = split(file, fold, a.work / f"{objective}{fold}")
    settings = {"model.path": a.model, "data.train": train, "data.eval": held_out, **SETTINGS}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    run = a.work / f"{objective}{fold}" / "run"
    where = [f"--config={common.ROOT}/configs/{objective}.py", f"--workdir={run}"]
    common.run(common.jaxtune("sweep", *where, *flags, "--sweep.train.seed=0,1,2"), a.threads)
    for folder in sorted(path.parent for path in run.glob("*/metrics.jsonl")):
        for line in common.read_metrics(folder):
            found = {name: round(line[name], 4) for name in line if name.startswith("eval/") and "logps" not in name}
            if found:
                print(objective, f"fold {fold}", folder.name, f"step {line['step']}", found, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dpo", type=Path)
    parser.add_argument("--kto", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="directory for folds and runs")
    parser.add_argument("--folds", type=lambda text: [int(x) for x in text.split(",")], default=list(range(FOLDS)))
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    for objective in ("dpo", "kto"):
        for fold in a.folds if (file := getattr(a, objective)) else ():
            measure(a, objective, file, fold)


if __name__ == "__main__":
    main()
