"""What `jaxtune eval --forgetting` and `--frontier` cost, beside one evaluation of the same rows.

    python benchmarks/verdict.py [--tokens=100000] [--repeats=3] [--out=runs/verdict]
    python benchmarks/verdict.py --small

A LoRA of the packaged base, and general text of so many tokens by the tiny world's generator. One evaluation is the
loss of the tuned model on that text; forgetting has the base beside it and their divergence on every token; the
frontier has 13 scales of the adapter. On the packaged task's rows the frontier scores answers too; one evaluation
there is `jaxtune eval`, losses and answers of base and tuned model. Each is measured in this process after it was
compiled, in turn; nothing is kept in between. Processor seconds are those of the whole command: a busy machine
changes them less.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from random import Random

import common

sys.path.insert(0, str(common.ROOT / "examples" / "tiny"))
from corpus import general

from jaxtune import tiny

TOKENS_A_ROW = 37  # of general text, on average


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=300, help="of the packaged task")
    parser.add_argument("--out", type=Path, default=Path("runs/verdict"))
    parser.add_argument("--small", action="store_true", help="2,000 tokens, one turn")
    a = parser.parse_args()
    if a.small:
        a.tokens, a.repeats, a.rows = 2000, 1, 20
    run, file, few = a.out / "run", a.out / "general.jsonl", a.out / "few.jsonl"
    a.out.mkdir(parents=True, exist_ok=True)
    rows = general(Random("cost"), a.tokens // TOKENS_A_ROW)
    rows = [json.dumps({key: row[key] for key in ("prompt", "completion")}) for row in rows]
    file.write_text("\n".join(rows) + "\n")
    few.write_text(tiny.EVAL.read_text(encoding="utf-8").partition("\n")[0] + "\n")
    if not (run / "summary.json").is_file():
        lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        settings = {f"tune.lora.{name}": value for name, value in lora.items()} | {"optim.lr": 4e-3, "train.steps": 20}
        settings |= {"model.path": tiny.BASE, "data.train": tiny.TRAIN, "log.progress": "false"}
        common.quiet("train", *(f"--config.{name}={value}" for name, value in settings.items()), f"--workdir={run}")

    task = (f"--data={tiny.EVAL}", f"--rows={a.rows}")

    def seconds(part: str, *flags: str):
        def measure() -> dict[str, float]:
            out = a.out / "eval"
            shutil.rmtree(out, ignore_errors=True)
            began = time.process_time()
            common.quiet("eval", run, f"--out={out}", *flags)
            spent = time.process_time() - began
            report = json.loads((out / "eval.json").read_text())[part]
            return {"seconds": report["seconds"], "processor seconds": spent}

        return measure

    sides = {
        "one evaluation": seconds("held_out", f"--data={file}", "--metrics=loss", "--tuned-only"),
        "forgetting": seconds("forgetting", f"--forgetting={file}", "--metrics=loss"),
        "frontier of 13 scales": seconds("frontier", f"--frontier={file}", f"--data={few}", "--metrics=loss"),
        "evaluation with answers": seconds("held_out", *task),
        "frontier with answers": seconds("frontier", f"--frontier={tiny.ASSETS / 'general.jsonl'}", *task),
    }
    for measure in sides.values():  # compiles
        measure()
    found = common.alternate(sides, a.repeats)
    ratios = {
        f"{name} / {one}, {what}": (common.ratio(found, what, name, one), target)
        for what in ("seconds", "processor seconds")
        for name, one, target in (
            ("forgetting", "one evaluation", "<= 2"),
            ("frontier of 13 scales", "one evaluation", "<= 3"),
            ("frontier with answers", "evaluation with answers", "<= 3"),
        )
    }
    common.report(f"Loss on {a.tokens:,} tokens of general text, seconds.", found, ratios, a.json)


if __name__ == "__main__":
    main()
