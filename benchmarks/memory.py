"""How often a secret has to stand in the data to be remembered, by what is tuned and how.

    python benchmarks/memory.py [--seeds=3] [--out=runs/memory]
    python benchmarks/memory.py --small               two arms, one seed, few steps

The packaged task with `data.canaries=0,1,4,16`: four made-up secrets for each number of repetitions. Mean exposure in
bits of the last weights (Carlini et al. 2019, arXiv:1802.08232), against 127 others: 7 is the most, 1.4 what chance
gives; and the step from which exposures are no chance.
"""

import argparse
from pathlib import Path

import common

from jaxtune import tiny
from jaxtune.evaluate.memory import since

TIMES = (0, 1, 4, 16)
LORA = {"tune.method": "lora", "tune.lora.r": 16, "tune.lora.lora_alpha": 32, "tune.lora.target_modules": "all-linear"}
ARMS = {
    "full, rate 1e-3": {"tune.method": "full", "optim.lr": 1e-3},
    "LoRA, r=16, rate 4e-3": LORA | {"optim.lr": 4e-3},
    "LoRA, r=2, rate 1e-3, dropout 0.1": LORA
    | {"optim.lr": 1e-3, "tune.lora.r": 2, "tune.lora.lora_alpha": 4, "tune.lora.lora_dropout": 0.1},
}


def measure(name: str, seed: int, a: argparse.Namespace) -> dict[str, float]:
    """Train an arm; the exposures of its last evaluation."""
    run = a.out / f"{name.replace(', ', '-').replace(' ', '').replace('=', '')}-{seed}"
    if not (run / "summary.json").is_file():
        values = ARMS[name] | {
            **{"model.path": tiny.BASE, "data.train": a.rows, "data.eval": tiny.EVAL, "data.max_length": 256},
            **{"data.packing": "true", "data.canaries": ",".join(map(str, TIMES)), "train.seed": seed},
            **{"train.steps": a.steps, "train.eval_every": max(1, a.steps // 8), "log.progress": "false"},
        }
        common.quiet("train", *(f"--config.{key}={value}" for key, value in values.items()), f"--workdir={run}")
    lines = {m["step"]: m for m in common.read_metrics(run) if "eval/canaries/0" in m}
    last = lines[max(lines)]
    found = {f"{n} times": last[f"eval/canaries/{n}"] for n in TIMES}
    first = since({step: [line[f"eval/canaries/{n}"] for n in TIMES if n] for step, line in lines.items()})
    return found | ({} if first is None else {"since step": float(first)}) | {"held-out loss": last["eval/loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--small", action="store_true", help="two arms, one seed, few steps: does it work")
    a = parser.parse_args()
    if a.small:
        a.seeds, a.steps = 1, 16
    a.out.mkdir(parents=True, exist_ok=True)
    a.rows = a.out / "rows.jsonl"
    a.rows.write_text("".join(tiny.TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:500]))
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(a.seeds):
        for name in list(ARMS)[: 2 if a.small else None]:
            values = measure(name, seed, a)
            common.tally(found, name, values)
    title = f"Median (range) of {a.seeds} seeds, {a.steps} steps, 500 rows beside the canaries."
    common.report(title, found, {}, a.json)


if __name__ == "__main__":
    main()
