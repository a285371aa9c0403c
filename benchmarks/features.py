"""Epochs over features that are computed once, against epochs through the whole model: the second epoch, and the run.

    python benchmarks/features.py --model=DIR --data=train.csv --columns=text=text,label=category [--json=OUT]
    python benchmarks/features.py ... --config=configs/classify_lora.py -- --config.tune.lora.layers_to_transform=5

Two epochs of `--rows` rows, nothing evaluated, each side a `jaxtune train` in a process of its own, taking turns. The
features are computed anew in every repeat. Flags behind -- go to both sides.
"""

import csv
import sys
import tempfile
from pathlib import Path

import common


def some_rows(file: Path, rows: int, out: Path) -> Path:
    """Every k-th row of a csv file, so that all labels are there."""
    with file.open(newline="") as f:
        head, *lines = csv.reader(f)
    with out.open("w", newline="") as f:
        csv.writer(f).writerows([head, *lines[:: max(1, len(lines) // rows)][:rows]])
    return out


def seconds(metrics: list[dict], first: int, last: int) -> float:
    """Seconds of the logged stretches of steps from `first` to `last`."""
    lines = [m for m in metrics if "train/tokens" in m]
    spent = 0.0
    for before, now in zip([{"step": 0, "train/tokens": 0}, *lines], lines):
        if first <= before["step"] and now["step"] <= last:
            spent += (now["train/tokens"] - before["train/tokens"]) / now["train/tokens_per_second"]
    return spent


def main() -> None:
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    p = common.parser(__doc__, repeats=2)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True, help="a csv file")
    p.add_argument("--columns", required=True)
    p.add_argument("--config", default="configs/classify_head.py")
    p.add_argument("--rows", type=int, default=3200)
    p.add_argument("--batch", type=int, default=32)
    a = p.parse_args(own.split())
    per_epoch = a.rows // a.batch

    with tempfile.TemporaryDirectory() as folder:
        rows = some_rows(a.data, per_epoch * a.batch, Path(folder) / "train.csv")

        def measure(cached: bool, number: list[int]):
            def call():
                number[0] += 1
                work = Path(folder) / f"{cached}-{number[0]}"
                settings = {
                    "model.path": a.model,
                    "data.train": rows,
                    "data.columns": a.columns,
                    "train.cache_features": "on" if cached else "off",
                    "train.epochs": 2,
                    "train.batch_size": a.batch,
                    "log.every": 10,
                    "log.tensorboard": "false",
                    "log.progress": "false",
                }
                flags = [f"--config.{key}={value}" for key, value in settings.items()]
                command = common.jaxtune("train", f"--config={a.config}", *flags, *more.split(), f"--workdir={work}")
                cache = Path(folder) / "cache"
                done = common.run(command, a.threads, JAXTUNE_CACHE=str(cache))
                for kept in (cache / "features").glob("*/features.bin"):
                    kept.unlink()
                metrics = common.read_metrics(work)
                return {
                    "second epoch, s": seconds(metrics, per_epoch, 2 * per_epoch),
                    "run, s": done.wall,
                    "peak MiB": done.peak_mib,
                    "last loss": metrics[-1]["train/loss"],
                }

            return call

        sides = {"features kept": measure(True, [0]), "whole model": measure(False, [0])}
        for side in sides.values():
            side()  # compiles
        found = common.alternate(sides, a.repeats)
    ratios = {"second epoch, whole model over features": common.ratio(found, "second epoch, s", *list(sides)[::-1])}
    title = f"Features: {a.config} {more}, 2 epochs of {per_epoch * a.batch} rows, {a.batch} a step".replace("  ", " ")
    common.report(title, found, {name: (value, ">= 20") for name, value in ratios.items()}, a.json)


if __name__ == "__main__":
    main()
