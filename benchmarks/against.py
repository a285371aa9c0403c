"""This checkout against another one: start-up, a job, generation and a sweep, in turn. No number should get worse.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before --model=MODEL_DIR --data=FILE.jsonl [--only=job] [--json=OUT]

Every measurement is a command as users type it, a process of its own, on the configs of its own checkout. Each side has
caches of its own: the first turn fills them and is not counted, so that what is compared is warm.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common

RATES = "1e-4,3e-4,1e-3,3e-3"


def measure(checkout: Path, caches: Path, command: list[str], threads: int) -> dict[str, float]:
    """Run a command of a checkout, in whose place "WORKDIR" stands for a new directory."""
    with tempfile.TemporaryDirectory(dir=caches) as work:
        end = common.run(
            [sys.executable, "-P", *(part.replace("WORKDIR", work) for part in command)],
            threads,
            PYTHONPATH=str(checkout),
            JAXTUNE_CACHE=str(caches),
            JAX_COMPILATION_CACHE_DIR=str(caches / "xla"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        metrics = Path(work) / "run" / "metrics.jsonl"
        loss = json.loads(metrics.read_text().splitlines()[-1]).get("train/loss") if metrics.exists() else None
    return {"wall, s": end.wall, "processor, s": end.cpu, "peak MiB": end.peak_mib} | (
        {"last loss": loss} if loss else {}
    )


def commands(checkout: Path, a) -> dict[str, list[str]]:
    """What is measured, by name: the arguments of Python."""
    flags = [
        f"--config={checkout}/configs/lora_sft.py",
        f"--config.model.path={a.model}",
        f"--config.data.train={a.data}",
        f"--config.data.columns=prompt={a.prompt},completion={a.completion}",
        "--config.data.max_length=128",
        "--config.data.overlength=truncate",
        "--config.data.packing=false",
        "--config.train.batch_size=8",
        "--config.train.epochs=none",
        "--config.data.eval_fraction=0.01",
        "--config.log.progress=false",
    ]
    run = ["-m", "jaxtune"]
    return {
        "jaxtune --help": [*run, "--help"],
        "import": ["-c", "from jaxtune import make_train_step, load, lora"],
        "first step": [*run, "train", *flags, "--workdir=WORKDIR/run", "--config.train.steps=1"],
        "job": [*run, "train", *flags, "--workdir=WORKDIR/run", f"--config.train.steps={a.steps}"],
        "generate": [*run, "generate", a.model, "--prompt=Once upon a time", "--max-new-tokens=256"],
        "sweep": [
            *(*run, "sweep", *flags, "--workdir=WORKDIR/sweep", f"--config.train.steps={a.steps // 2}"),
            f"--sweep.optim.lr={RATES}",
        ],
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("other", type=Path, help="another checkout of this repository")
    p.add_argument("--model", required=True, help="a model directory")
    p.add_argument("--data", required=True, help="a jsonl file")
    p.add_argument("--prompt", default="question")
    p.add_argument("--completion", default="answer")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--only", help="one of the measurements")
    a = p.parse_args()
    checkouts = {"before": a.other.resolve(), "now": common.ROOT}
    for checkout in checkouts.values():  # -P: not the package of the directory that this runs in
        found = common.run(
            [sys.executable, "-P", "-c", "import jaxtune; print(jaxtune.__file__)"], 1, PYTHONPATH=str(checkout)
        )
        if not Path(found.stdout.strip()).is_relative_to(checkout):
            raise SystemExit(f"{checkout} has no package jaxtune: found {found.stdout.strip()}")
    ratios, rows = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in commands(common.ROOT, a):
            if a.only not in (None, name):
                continue
            sides: dict[str, Callable[[], dict[str, float]]] = {}
            for side, checkout in checkouts.items():
                caches = Path(temporary) / side
                caches.mkdir(exist_ok=True)
                sides[f"{name}, {side}"] = partial(measure, checkout, caches, commands(checkout, a)[name], a.threads)
            for warm in sides.values():
                warm()
            found = common.alternate(sides, a.repeats)
            rows |= found
            before, now = sides
            ratios |= {
                f"{name}: wall": (common.ratio(found, "wall, s", now, before), "<= 1"),
                f"{name}: processor": (common.ratio(found, "processor, s", now, before), "<= 1"),
                f"{name}: memory": (common.ratio(found, "peak MiB", now, before), "<= 1"),
            }
    common.report("This checkout (now) against another (before)", rows, ratios, a.json)


if __name__ == "__main__":
    main()
