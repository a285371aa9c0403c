"""`jaxtune data` on generated rows: rows a second, the search for near duplicates alone, memory.

    python benchmarks/data_report.py [--rows=100000] [--threads=2] [--only=report]

Rows are questions and answers of 8 to 20 words, drawn from the packaged training set; one row in 50 is a near copy of
an earlier one. The tokenizer is the packaged model's. Each measurement is a process of its own; what it imports and
loads is not counted.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from common import last_json, machine, run

from jaxtune import tiny

COPIES = 50
WHAT = {"report": "report", "bare": "report, --near=0", "near": "near duplicates alone"}


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    texts = [json.loads(line)["prompt"] for line in Path(tiny.TRAIN).read_text().splitlines()]
    words = [word for text in texts for word in text.split()]
    kept: list[list[str]] = []
    with path.open("w") as file:
        for i in range(rows):
            if i % COPIES == COPIES - 1:
                text = list(rng.choice(kept))
                text[rng.randrange(len(text))] = rng.choice(words)
            else:
                text = rng.choices(words, k=rng.randint(8, 20))
                kept = [*kept[-99:], text]
            cut = len(text) // 3
            file.write(json.dumps({"prompt": " ".join(text[:cut]) + "?", "completion": " ".join(text[cut:])}) + "\n")


def measure(path: str, near: float) -> None:
    """In a process of its own: print {"seconds", "rows", "findings"}."""
    from jaxtune import curate, data

    tokenizer = data.load_tokenizer(str(tiny.BASE))
    began, cpu = time.monotonic(), time.process_time()
    report = curate.examine(tokenizer, path, max_length=512, near=near)
    _print(began, cpu, report.summary["rows"])


def measure_near(path: str) -> None:
    """The same for near duplicates alone, from words in memory."""
    import numpy as np

    from jaxtune.curate import near

    rows = map(json.loads, Path(path).read_text().splitlines())
    words = [f"{row['prompt']} {row['completion']}".casefold().split() for row in rows]
    began, cpu = time.monotonic(), time.process_time()
    kept = []
    for at in range(0, len(words), 1024):
        hashes, owner = near.shingles(words[at : at + 1024])
        kept.append(near.signatures(hashes, np.bincount(owner)))
    near.superfluous(*near.similar_pairs(np.concatenate(kept), 0.8))
    _print(began, cpu, len(words))


def _print(began: float, cpu: float, rows: int) -> None:
    print(json.dumps({"rows": rows, "seconds": time.monotonic() - began, "cpu": time.process_time() - cpu}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=WHAT)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, path = args.one
        return measure_near(path) if what == "near" else measure(path, 0.8 if what == "report" else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.rows)
        print(machine())
        print(f"{'':<24}{'rows':>10}{'s':>8}{'rows/s':>10}{'cpu us/row':>12}{'peak MiB':>10}")
        for what, label in WHAT.items():
            if args.only not in (None, what):
                continue
            done = run([sys.executable, __file__, "--one", what, str(path)], args.threads)
            found = last_json(done.stdout)
            rate = found["rows"] / found["seconds"]
            print(
                f"{label:<24}{found['rows']:>10,}{found['seconds']:>8.1f}{rate:>10,.0f}"
                f"{1e6 * found['cpu'] / found['rows']:>12.0f}{done.peak_mib:>10,.0f}"
            )


if __name__ == "__main__":
    main()
