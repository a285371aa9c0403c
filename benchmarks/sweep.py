"""Eight learning rates in one step (`jaxtune sweep`) against eight runs one after another (`jaxtune train`).

    python benchmarks/sweep.py --model=MODEL_DIR --data=FILE.jsonl [--length=64] [--json=OUT]

Wall time from command to results on disk. Each measurement starts with an empty compilation cache, which the eight
processes of the one side share. Rows are cut to `--length` tokens, so that nothing is padded.
"""

import tempfile
from pathlib import Path

import common

RATES = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "2e-3", "3e-3", "5e-3")


def flags(a) -> list[str]:
    return [
        f"--config={common.ROOT}/configs/lora_sft.py",
        f"--config.model.path={a.model}",
        f"--config.data.train={a.data}",
        f"--config.data.columns=prompt={a.prompt},completion={a.completion}",
        f"--config.data.max_length={a.length}",
        "--config.data.overlength=truncate",
        f"--config.train.batch_size={a.batch}",
        "--config.train.epochs=none",
        f"--config.train.steps={a.steps}",
        f"--config.data.eval_fraction={a.eval_fraction}",
        "--config.log.progress=false",
    ]


def together(folder: Path, a) -> dict[str, float]:
    work = Path(tempfile.mkdtemp(dir=folder))
    end = common.run(
        common.jaxtune("sweep", *flags(a), f"--sweep.optim.lr={','.join(RATES)}", f"--workdir={work / 'sweep'}"),
        a.threads,
        JAXTUNE_CACHE=str(work / "cache"),
    )
    return {"wall, s": end.wall, "processor, s": end.cpu, "peak MiB": end.peak_mib}


def apart(folder: Path, a) -> dict[str, float]:
    work = Path(tempfile.mkdtemp(dir=folder))
    ends = [
        common.run(
            common.jaxtune("train", *flags(a), f"--config.optim.lr={rate}", f"--workdir={work / rate}"),
            a.threads,
            JAXTUNE_CACHE=str(work / "cache"),
        )
        for rate in RATES
    ]
    return {
        "wall, s": sum(e.wall for e in ends),
        "processor, s": sum(e.cpu for e in ends),
        "peak MiB": max(e.peak_mib for e in ends),
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--model", required=True, help="a model directory")
    p.add_argument("--data", required=True, help="a jsonl file")
    p.add_argument("--prompt", default="question")
    p.add_argument("--completion", default="answer")
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--eval-fraction", type=float, default=0.01)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides = {"in one step": lambda: together(folder, a), "one after another": lambda: apart(folder, a)}
        found = common.alternate(sides, a.repeats)
    target = "<= 0.6" if a.length <= 64 else "<= 0.9"
    ratios = {
        "wall": (common.ratio(found, "wall, s", "in one step", "one after another"), target),
        "peak memory": (common.ratio(found, "peak MiB", "in one step", "one after another"), "said"),
    }
    title = f"{len(RATES)} learning rates, {a.steps} steps of {a.batch} rows of {a.length} tokens"
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
