"""What tuning costs, by remedy: the packaged base tuned hard, softly, and with general text mixed in.

    python benchmarks/forgetting.py [--seeds=3] [--steps=60] [--out=runs/forgetting]
    python benchmarks/forgetting.py --small               three arms, one seed, a few steps

Every arm has the same steps and batches. Measured with packaged rows that no arm was tuned on: messages whose every
field is right (task), loss on general text, general questions answered exactly, KL from the base; then task and answers
again at the scale that `jaxtune eval --frontier` chooses. Replayed text is drawn by another seed than the rows that are
measured. Runs that are there are not trained again, so that a benchmark that was stopped goes on.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

import common

sys.path.insert(0, str(common.ROOT / "examples" / "tiny"))
from corpus import general

from jaxtune import tiny

del sys.modules["common"]  # configs import another module of this name
SHARES = (5, 10, 25)  # percent of replayed text
GENERAL = tiny.ASSETS / "general.jsonl"
CONFIG = f"--config={common.ROOT}/configs/decide_shop.py"
METRICS = {"loss": "loss", "answers": "exact_match"}
SMALL = ("full, rate 3e-3", "LoRA, rate 4e-3", "LoRA, 25% replay")


def arms(replay: Path) -> dict[str, list[str]]:
    """{name: flags of jaxtune train}."""
    mixed = f"--config.data.train={tiny.TRAIN},{replay}"
    unset = [f"--config.tune.lora.{name}=none" for name in ("r", "lora_alpha", "target_modules")]
    full = ["--config.tune.method=full", *unset]
    found = {
        "full, rate 3e-3": [*full, "--config.optim.lr=3e-3"],
        "LoRA, rate 4e-3": [],
    }
    for share in SHARES:
        found[f"LoRA, {share}% replay"] = [mixed, f"--config.data.weights={100 - share},{share}"]
    return found


def evaluated(target: Path, out: Path, part: str, *flags: str) -> dict:
    """A part of what `jaxtune eval` writes into `out` about a run or a model, measured unless it is there."""
    file = out / "eval.json"
    if not file.is_file() or part not in json.loads(file.read_text()):
        common.quiet("eval", str(target), f"--out={out}", *flags)
    return json.loads(file.read_text())[part]


def score(report: dict, metric: str) -> float:
    """A metric of the tuned model of a run, or of the model that was evaluated alone."""
    entry = report["metrics"][metric]
    return next(entry[who]["value"] for who in ("tuned", "model") if who in entry)


def measure(name: str, flags: list[str], seed: int, a: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Train an arm; (what the base has, what the tuned model has)."""
    run = a.out / f"{name.replace(', ', '-').replace(' ', '').replace('%', '')}-{seed}"
    rows = f"--rows={a.rows}"
    if not (run / "summary.json").is_file():
        more = [f"--config.train.seed={seed}", f"--config.train.steps={a.steps}", "--config.log.progress=false"]
        common.quiet("train", CONFIG, "--config.data.eval=none", *flags, *more, f"--workdir={run}")
    task = (f"--data={tiny.EVAL}", "--metrics=json_exact", rows)
    lost = evaluated(run, run, "forgetting", f"--forgetting={GENERAL}", "--metrics=exact_match", rows)
    curve = evaluated(run, run, "frontier", f"--frontier={GENERAL}", f"--data={tiny.EVAL}", "--keep=0.99", rows)
    found = {
        "task": score(evaluated(run, run, "held_out", *task, "--tuned-only"), "json_exact"),
        "loss": score(lost, "loss"),
        "answers": score(lost, "exact_match"),
        "KL": score(lost, "kl"),
    }
    before = {key: lost["metrics"][metric]["base"]["value"] for key, metric in METRICS.items()}
    scale, weaker = curve["chosen"], run / "weaker"
    if scale in (None, 1.0):
        return before, found | {"scale": 1.0, "task, scaled": found["task"], "answers, scaled": found["answers"]}
    if not (weaker / "config.json").is_file():
        common.quiet("export", str(run), str(weaker), f"--scale={scale:g}")
    general = (f"--data={GENERAL}", "--metrics=exact_match", rows)
    return before, found | {
        "scale": scale,
        "task, scaled": score(evaluated(weaker, run / "weaker-task", "held_out", *task), "json_exact"),
        "answers, scaled": score(evaluated(weaker, run / "weaker-general", "held_out", *general), "exact_match"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=120, help="rows to measure with, of either kind")
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--small", action="store_true", help="three arms, one seed, a few steps: does it work")
    a = parser.parse_args()
    if a.small:
        a.seeds, a.steps, a.rows = 1, 20, 40
    a.out.mkdir(parents=True, exist_ok=True)
    replay = a.out / "replay.jsonl"
    if not replay.is_file():
        rows = general(Random("replay"), 1000)
        replay.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows))
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(a.seeds):
        for name, flags in arms(replay).items():
            if a.small and name not in SMALL:
                continue
            before, values = measure(name, flags, seed, a)
            if not found:
                common.tally(found, "the base", before)
            common.tally(found, name, values)
    title = f"Median (range) of {a.seeds} seeds, {a.steps} steps, {a.rows} rows."
    common.report(title, found, {}, a.json)


if __name__ == "__main__":
    main()
