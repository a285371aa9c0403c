"""Tuning on facts that a model does not know: what becomes of those that it knew.

Gekhman et al. 2024, arXiv:2405.05904, in small.

    python benchmarks/invention.py [--seeds=3] [--out=runs/invention]
    python benchmarks/invention.py --small               one seed, two shares, few steps

The packaged base is first taught where 240 of the tiny world's people live, so that it is known what it knows. Then it
is tuned on 120 questions of the same form, of which a share is about people that it never met, and answers, at every
evaluation, the rows that it is tuned on and 120 other questions whose answers it knew. A wrong answer to one of those
is an invention: the model names a city, and another one than it knew. `jaxtune data --known` sorts the rows before each
tuning; the table says how many of its classes are those that the making of the rows implies.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random

import common

sys.path.insert(0, str(common.ROOT / "examples" / "tiny"))
from world import CITIES, FIRST_NAMES, LAST_NAMES

from jaxtune import tiny

ROWS = 120  # that a model is tuned on; as many are held out
SHARES = (0, 25, 50, 75, 100)  # percent of them that are unknown


def facts() -> tuple[list[dict], list[dict], list[dict]]:
    """Questions with their answers: known and tuned on, known and held out, unknown."""
    rng = Random("facts")
    people = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(people)
    rows = [
        {"prompt": f"Question: Where does {name} live?\nAnswer:", "completion": f" {rng.choice(CITIES)}"}
        for name in people[: 3 * ROWS]
    ]
    return rows[:ROWS], rows[ROWS : 2 * ROWS], rows[2 * ROWS :]


def write(file: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def flags(train: Path, steps: int, **more: object) -> list[str]:
    """Those of a training, with "__" for dots."""
    values = {"data__train": train, "train__batch_size": 16, "train__steps": steps, "log__progress": "false"} | more
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]


def taught(a: argparse.Namespace, known: list[dict]) -> Path:
    """The packaged base, taught the facts that count as known."""
    run = a.out / "base"
    if not (run / "summary.json").is_file():
        rows = write(a.out / "facts.jsonl", known)
        more = flags(rows, a.lessons, model__path=tiny.BASE, tune__method="full", optim__lr=1e-3)
        common.quiet("train", *more, f"--workdir={run}")
    return run / "model"


def measure(a: argparse.Namespace, base: Path, share: int, seed: int) -> dict[str, float]:
    """Tune on rows of which a share is unknown, and see what the model answers."""
    tuned, held_out, unknown = facts()
    rng, news = Random(f"{seed}/{share}"), ROWS * share // 100
    rows = [*rng.sample(unknown, news), *rng.sample(tuned, ROWS - news)]
    folder = a.out / f"{share}-{seed}"
    train, other = write(folder / "train.jsonl", rows), write(folder / "eval.jsonl", held_out)
    shared = [f"--config.model.path={base}", f"--config.data.eval={other}"]
    if not (folder / "known_held_out.jsonl").is_file():
        common.quiet("data", *shared, *flags(train, 1)[:1], "--known", "--shots=0", "--near=0", f"--workdir={folder}")
    if not (folder / "run" / "summary.json").is_file():
        more = flags(
            train, a.steps, tune__method="lora", tune__lora__r=16, tune__lora__target_modules="all-linear",
            optim__lr=2e-3, train__seed=seed, train__eval_every=a.steps // 8, evaluate__rows=ROWS,
            evaluate__known=f"{folder / 'known.jsonl'},{folder / 'known_held_out.jsonl'}",
        )  # fmt: skip
        common.quiet("train", *shared, *more, f"--workdir={folder / 'run'}")
    names = {row["prompt"] for row in unknown}
    sorted_rows = [json.loads(line) for line in (folder / "known.jsonl").read_text().splitlines()]
    told = [(row["known"] == "Unknown") == (row["prompt"] in names) for row in sorted_rows]
    lines = {m["step"]: m for m in common.read_metrics(folder / "run") if "eval/loss" in m and "phase" not in m}
    last = lines[max(lines)]
    best = min((m for step, m in lines.items() if step), key=lambda m: m["eval/loss"])

    def right(line: dict, side: str, among: str) -> float:
        """Of all held-out questions that the base knew, or of trained ones of a class, the share that is right."""
        found = {k.rpartition("/")[2]: v for k, v in line.items() if k.startswith(f"eval/known/{side}/")}
        return found.get(among, float("nan"))

    def half(name: str) -> float:
        """The first evaluation at which half of the trained rows of a class are right."""
        reached = [step for step, line in lines.items() if step and right(line, "train", name) >= 0.5]
        return float(min(reached, default=float("nan")))

    found = {
        "classes as made": sum(told) / len(told),
        "invented, best": 1 - right(best, "held_out", "HighlyKnown"),
        "invented, last": 1 - right(last, "held_out", "HighlyKnown"),
        "known, trained": right(last, "train", "HighlyKnown"),
        "unknown, trained": right(last, "train", "Unknown"),
        "step of half the unknown": half("Unknown"),
    }
    return {name: value for name, value in found.items() if value == value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lessons", type=int, default=500, help="steps in which the base is taught what it knows")
    parser.add_argument("--out", type=Path, default=Path("runs/invention"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--small", action="store_true", help="one seed, two shares, few steps: does it work")
    a = parser.parse_args()
    if a.small:
        a.seeds, a.steps, a.lessons = 1, 24, 120
    tuned, held_out, _ = facts()
    base = taught(a, [*tuned, *held_out])
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(a.seeds):
        for share in (0, 100) if a.small else SHARES:
            values = measure(a, base, share, seed)
            common.tally(found, f"{share}% unknown", values)
    common.report(f"Median (range) of {a.seeds} seeds, {a.steps} steps, {ROWS} rows.", found, {}, a.json)


if __name__ == "__main__":
    main()
