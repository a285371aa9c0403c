"""Seconds from the command to the first step, by part, and what importing costs.

    python benchmarks/startup.py [--model=DIR --data=FILE.jsonl --columns=prompt=question,completion=answer]

Without `--model` and `--data` it runs on the base and the messages that jaxtune carries. The parts are those of the
run's own summary.json: imports, data (tokenise), load (weights, method), setup (workdir, loggers) and train, which is
one step, so nearly all of it compiles.
"""

import json
import sys
import tempfile
from pathlib import Path

import common

IMPORTS = {
    "import jax": "import jax",
    "import jaxtune": "import jaxtune",
    "from jaxtune import make_train_step": "from jaxtune import make_train_step",
    "jaxtune --help": None,
}
PARTS = ("imports", "data", "load", "setup", "train")


def first_step(folder: Path, cache: Path, a) -> dict[str, float]:
    workdir = Path(tempfile.mkdtemp(dir=folder))
    changes = [f"--config.model.path={a.model}", f"--config.data.train={a.data}", f"--config.data.columns={a.columns}"]
    end = common.run(
        common.jaxtune(
            "train",
            f"--config={common.ROOT}/configs/lora_sft.py",
            f"--workdir={workdir}",
            *changes,
            f"--config.train.batch_size={a.batch}",
            "--config.train.epochs=none",
            "--config.train.steps=1",
        ),
        a.threads,
        JAXTUNE_CACHE=str(cache),
    )
    seconds = json.loads((workdir / "summary.json").read_text())["seconds"]
    parts = {part: seconds[part] for part in PARTS}
    # What the run's own clock does not see: the interpreter's start, and its end after the report.
    return parts | {"to the first step": sum(parts.values()), "whole process": end.wall}


def importing(name: str, threads: int) -> dict[str, float]:
    """Wall seconds of a fresh interpreter, less those of an empty one."""
    code = IMPORTS[name]
    command = common.jaxtune("--help") if code is None else [sys.executable, "-c", code]
    empty = common.run([sys.executable, "-c", "pass"], threads).wall
    return {"seconds": common.run(command, threads).wall - empty}


def main() -> None:
    bundled = common.ROOT / "jaxtune" / "assets" / "tiny"
    p = common.parser(__doc__, repeats=5)
    p.add_argument("--model", default=str(bundled / "base"))
    p.add_argument("--data", default=str(bundled / "train.jsonl"))
    p.add_argument("--columns", default="none", help="as data.columns")
    p.add_argument("--batch", type=int, default=8)
    a = p.parse_args()
    imports = common.alternate({n: lambda n=n: importing(n, a.threads) for n in IMPORTS}, a.repeats)
    ratios = {
        "from jaxtune import make_train_step / import jax": (
            common.ratio(imports, "seconds", "from jaxtune import make_train_step", "import jax"),
            "<= 2",
        ),
        "import jaxtune, s": (sorted(imports["import jaxtune"]["seconds"])[a.repeats // 2], "<= 0.1"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        warm = folder / "warm"
        first_step(folder, warm, a)  # fills the cache
        sides = {
            "cold cache": lambda: first_step(folder, Path(tempfile.mkdtemp(dir=folder)), a),
            "warm cache": lambda: first_step(folder, warm, a),
        }
        steps = common.alternate(sides, a.repeats)
    common.report("Importing, seconds beyond an empty interpreter", imports, ratios)
    common.report(f"To the first step: {Path(a.model).name}, seconds", steps, {})
    if a.json:
        record = {"imports": imports, "first step": steps, "machine": common.machine(), "versions": common.versions()}
        a.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
