"""Fewer bits beside more, over seeds: the held-out loss of small models on a CPU, the same rows in the same order.

    python benchmarks/precision.py [--seeds=3] [--steps=30] [--json=OUT]
    python benchmarks/precision.py --model=DIR --data=FILE.jsonl --columns=prompt=question,completion=answer

Without --model it is the packaged base and its rows. Full fine-tuning by AdamW in float32, and with 8-bit moments and
bfloat16 weights; LoRA over the base in bfloat16, over fp8 that is stored, and over fp8 that is multiplied, whose
rounding is the same on a CPU and on a GPU. "Apart" is the mean over seeds of the difference from the first of a kind,
"noise" the standard deviation of that one's losses over seeds.
"""

import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

import common

HALF = {"model.dtype": "bfloat16"}
SIDES = {
    "full": {
        "float32": {"model.dtype": "float32"},
        "8-bit moments, bfloat16 weights": {"optim.state": "8bit", "optim.weights": "bfloat16"},
    },
    "lora": {
        "bfloat16": HALF,
        "fp8": HALF | {"model.quantization": "fp8"},
        "fp8_matmul": HALF | {"model.quantization": "fp8_matmul"},
    },
}
OWN = {
    "full": {"tune.method": "full", "optim.lr": 3e-4},
    "lora": {"tune.method": "lora", "tune.lora.r": 16, "tune.lora.lora_alpha": 32.0, "optim.lr": 4e-3},
}


def losses(a, values: dict) -> list[float]:
    """The held-out losses of a run, the first one before training."""
    from jaxtune.cli import main

    tiny = common.ROOT / "jaxtune" / "assets" / "tiny"
    values = {
        "model.path": str(a.model or tiny / "base"),
        "data.train": str(a.data or tiny / "train.jsonl"),
        **(
            {"data.eval_fraction": 0.02, "data.columns": dict(pair.split("=") for pair in a.columns.split(","))}
            if a.data
            else {"data.eval": str(tiny / "eval.jsonl")}
        ),
        "data.max_length": 256,
        "data.packing": True,
        "train.batch_size": 8,
        "train.steps": a.steps,
        "train.eval_every": max(1, a.steps // 2),
        **values,
    }
    config: dict = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        at = config
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.py").write_text(f"def get_config():\n    return {config!r}\n")
        argv = ["train", f"--config={folder}/config.py", f"--workdir={folder}/run"]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            status = main(argv)
        if status:
            raise SystemExit(f"{config}\nexit {status}:\n{shown.getvalue()[-2000:]}")
        return [row["eval/loss"] for row in common.read_metrics(Path(folder, "run")) if "eval/loss" in row]


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--model", type=Path, help="a directory; default: the packaged base")
    p.add_argument("--data", type=Path, help="its rows")
    p.add_argument("--columns", default="prompt=prompt,completion=completion")
    p.add_argument("--only", choices=SIDES, help="one method")
    a = p.parse_args()
    found = {}
    for method, sides in SIDES.items():
        if a.only not in (None, method):
            continue
        curves = {name: [] for name in sides}
        for seed in range(a.seeds):
            for name, values in sides.items():
                curves[name].append(losses(a, OWN[method] | values | {"train.seed": seed}))
                print(f"{method}, {name}, seed {seed}: {[round(x, 4) for x in curves[name][-1]]}", flush=True)
        first = [curve[-1] for curve in next(iter(curves.values()))]
        for name, runs in curves.items():
            last = [curve[-1] for curve in runs]
            found[f"{method}, {name}"] = {
                "loss": last,
                "apart": [statistics.mean(x - y for x, y in zip(last, first, strict=True))],
                "noise": [statistics.stdev(first) if len(first) > 1 else float("nan")],
            }
    common.report(f"{a.model or 'the packaged base'}, {a.steps} steps, {a.seeds} seeds", found, {}, a.json)


if __name__ == "__main__":
    sys.path.insert(0, str(common.ROOT))
    main()
