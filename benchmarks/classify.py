"""Labels for texts and for words, tuned from a real encoder beside plain transformers and peft: scores, speed, memory.

    python benchmarks/classify.py rates --model=DIR --texts=BANKING77 --words=WNUT17 --out=FILE.jsonl
    python benchmarks/classify.py runs ...      # with the best of those rates; goes on where it was stopped
    python benchmarks/classify.py report --out=FILE.jsonl
    python benchmarks/classify.py speed --case="texts lora" --model=DIR --texts=BANKING77    # alone on the machine

BANKING77 holds train.csv and test.csv (text, category); WNUT17 train.conll, dev.conll and test.conll.

jaxtune's side is the command `jaxtune train` with the config that is measured, the peer a plain loop in a process of
its own (classify_peer.py). Both have the same batches in the same order, steps, optimizer, schedule, decay and
clipping, the same model and head, and no dropout (jaxtune has none in a body). A text is pooled by the mean over its
tokens; BERT's pooler (dense and tanh, trained) and the classifier follow. Rates are chosen for each side among the
same candidates, on every tenth training row or the dev file, by one seed. What either side wrote is loaded by
transformers or peft, asked for labels and scored by the same code.
"""

import csv
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np

PEER = Path(__file__).with_name("classify_peer.py")
MOST_TOKENS = 512  # of a row: what the model knows
SIDES = ("jaxtune", "transformers")


@dataclass(frozen=True)
class Case:
    """What is tuned, how, and what is tried.

    Attributes:
        task: texts or words.
        method: full, lora or head.
        config: of jaxtune.
        batch: rows a step.
        epochs: of a run; of the search for a rate, `search`.
        rates: the candidates, of both sides.
        weight_decay: the config's.
        grouped: whether rows of like length share a batch.
        packed: whether jaxtune lays several rows of a batch in a line instead.
        sides: who is measured.
    """

    task: str
    method: str
    config: str
    batch: int
    epochs: float
    search: float
    rates: tuple[float, ...]
    weight_decay: float = 0.0
    grouped: bool = True
    packed: bool = False
    sides: tuple[str, ...] = SIDES


CASES = {
    "texts lora": Case("texts", "lora", "classify_lora.py", 32, 1, 0.3, (1e-3, 3e-3, 1e-2)),
    "texts full": Case("texts", "full", "classify_full.py", 32, 1, 0.3, (1e-4, 3e-4, 1e-3), weight_decay=0.01),
    "texts head": Case(
        *("texts", "head", "classify_head.py", 32, 20, 20, (3e-4, 1e-3, 3e-3)), grouped=False, sides=("jaxtune",)
    ),
    "words full": Case("words", "full", "token_classification.py", 16, 1, 0.5, (1e-4, 3e-4, 1e-3), weight_decay=0.01),
}


# ------------------------------------------------------------------------------------------------------------- data


class Row(NamedTuple):
    """A text and its label, or words and the tag of each."""

    text: Any
    label: Any


def read(file: Path) -> list[Row]:
    """The rows of a csv file with text and category, or of a CoNLL file."""
    if file.suffix == ".csv":
        with file.open(newline="") as f:
            return [Row(row["text"], row["category"]) for row in csv.DictReader(f)]
    rows, words = [], []
    for line in [*file.read_text().splitlines(), ""]:
        if line.strip():
            words.append(line.split())
        elif words:
            rows.append(Row([word[0] for word in words], [word[-1] for word in words]))
            words = []
    return rows


def names_of(rows: Sequence[Row]) -> list[str]:
    """All labels, in the order of their ids."""
    found = {label for row in rows for label in (row.label if isinstance(row.label, list) else [row.label])}
    return sorted(found, key=lambda name: (name != "O", name))


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(what is trained to choose a rate, every tenth row)."""
    return [row for i, row in enumerate(rows) if i % 10], list(rows[::10])


def write(rows: Sequence[Row], file: Path) -> Path:
    """Write texts to a csv file."""
    with file.open("w", newline="") as f:
        csv.writer(f).writerows([("text", "category"), *rows])
    return file


def data(a, case: Case, searching: bool, folder: Path) -> tuple[Path, list[Row]]:
    """(training file, rows to score)."""
    if case.task == "words":
        return a.words / "train.conll", read(a.words / ("dev.conll" if searching else "test.conll"))
    if not searching:
        return a.texts / "train.csv", read(a.texts / "test.csv")
    train, held_out = split(read(a.texts / "train.csv"))
    return write(train, folder / "train.csv"), held_out


class Lengths:
    """As much of rows as decides the order of batches."""

    def __init__(self, rows: Sequence[Row], model: Path):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(MOST_TOKENS)
        words = isinstance(rows[0].text, list)
        self.length = np.array([len(e.ids) for e in tokenizer.encode_batch([r.text for r in rows], words)])

    def __len__(self) -> int:
        return len(self.length)

    def where(self, i: int) -> int:
        return int(i)


def order(rows: Sequence[Row], model: Path, case: Case, epochs: float, seed: int, steps: int | None) -> list[list[int]]:
    """The rows of each step of a `jaxtune train`."""
    from jaxtune.data.batches import Batches

    batches = Batches(
        [Lengths(rows, model)],
        batch_size=case.batch,
        max_length=MOST_TOKENS,
        seed=seed,
        group_by_length=case.grouped,
    )
    return [batches.places(step) for step in range(steps or batches.steps(epochs))]


# ------------------------------------------------------------------------------------------------------------ one run


def run_child(a, job: dict[str, Any]) -> dict[str, Any]:
    job = {"threads": a.threads, "seed": 0, "model": str(a.model), **job}
    return common.last_json(common.run([sys.executable, PEER, json.dumps(job)], a.threads).stdout)


def train(a, case: Case, side: str, file: Path, lr: float, seed: int, epochs: float, out: Path, steps=None, more=()):
    """One run of one side, whose result lies in `out`; what is told of it has seconds and tokens of each step."""
    if side == "jaxtune":
        return train_jaxtune(a, case, file, lr, seed, epochs, out, steps, more)
    plan = out / "order.json"
    plan.write_text(json.dumps(order(read(file), a.model, case, epochs, seed, steps)))
    of_case = {"task": case.task, "method": case.method, "weight_decay": case.weight_decay}
    of_run = {"file": str(file), "order": str(plan), "lr": lr, "seed": seed, "out": str(out)}
    return run_child(a, {"do": "train", **of_case, **of_run})


def train_jaxtune(a, case: Case, file: Path, lr, seed, epochs, out: Path, steps, more) -> dict[str, Any]:
    settings = {
        "model.path": a.model,
        "data.train": file,
        "optim.lr": lr,
        "train.seed": seed,
        "train.batch_size": case.batch,
        **({"train.epochs": epochs} if steps is None else {"train.steps": steps}),
        "log.every": 1,
        "log.tensorboard": "false",
        "log.progress": "false",
    }
    if case.task == "texts":
        settings |= {"data.columns": "text=text,label=category", "objective.pooling": "mean"}
    if case.packed:
        settings["data.packing"] = "true"
    elif case.grouped:
        settings["data.group_by_length"] = "true"
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = common.jaxtune("train", f"--config={common.ROOT}/configs/{case.config}", *flags, *more)
    done = common.run([*command, f"--workdir={out}"], a.threads, JAXTUNE_CACHE=str(a.out.with_suffix(".cache")))
    counts = next(line for line in done.stdout.splitlines() if line.startswith("trainable params: ")).split()
    lines = [m for m in common.read_metrics(out) if "train/loss" in m]
    tokens = np.diff([0, *(m["train/tokens"] for m in lines)])
    return {
        "trained": int(counts[2].replace(",", "")),
        "all": int(counts[6].replace(",", "")),
        "seconds": (tokens / np.array([m["train/tokens_per_second"] for m in lines])).tolist(),
        "tokens": tokens.tolist(),
        "losses": [m["train/loss"] for m in lines],
        "peak MiB": done.peak_mib,
        "wall": done.wall,
    }


def measure(a, name: str, side: str, lr: float, seed: int, searching: bool) -> dict[str, Any]:
    """Train, ask for the labels of the held-out rows, and score them."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=a.tmp) as temporary:
        folder = Path(temporary)
        file, held_out = data(a, case, searching, folder)
        out = folder / "run"
        out.mkdir()
        if side == "jaxtune":
            shutil.rmtree(out)  # it makes its own
        told = train(a, case, side, file, lr, seed, case.search if searching else case.epochs, out)
        names, asked = names_of(read(file)), folder / "rows.json"
        asked.write_text(json.dumps(held_out))
        of_run = {"task": case.task, "names": names, "file": str(asked), "out": str(out)}
        said = run_child(a, {"do": "ask", **of_run})["said"]
    losses, seconds, tokens = (told.pop(key) for key in ("losses", "seconds", "tokens"))
    steps = len(losses)
    record = {"case": name, "side": side, "lr": lr, "seed": seed, "searching": searching, "settings": asdict(case)}
    record |= {"steps": steps, "tokens": sum(tokens)} | pace(seconds, tokens)
    record |= {"first loss": losses[0], "last loss": float(np.mean(losses[-10:]))}
    record |= told | {"score": score(case, held_out, said, names), "rows": len(held_out)}
    return record if searching else record | {"said": said}


def pace(seconds: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Of the second half of the steps, by when nearly every width has been compiled."""
    half = len(seconds) // 2
    return {"step, s": statistics.median(seconds[half:]), "tokens/s": sum(tokens[half:]) / sum(seconds[half:])}


# ------------------------------------------------------------------------------------------------------------- scores


def counts(case: Case, rows: Sequence[Row], said: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """What of each row adds up to its score, [N, 2]: hits twice (of texts, right; of words, entities), and of how many.

    Both halves of F1's denominator, 2 hits / (said + there), are in the second.
    """
    place = {name: i for i, name in enumerate(names)}
    if case.task == "texts":
        return np.array([(place[row.label] == label, 1) for row, label in zip(rows, said, strict=True)], float)
    spans = [(entities([names[i] for i in ours]), entities(row.label)) for row, ours in zip(rows, said, strict=True)]
    return np.array([(2 * len(ours & there), len(ours) + len(there)) for ours, there in spans], float)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first, behind the last, type) of each entity, as conlleval and seqeval read B- and I- tags."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        kind = tag[2:]
        if start is not None and (tag == "O" or tag[0] == "B" or kind != tags[start][2:]):
            found.add((start, i, tags[start][2:]))
            start = None
        if tag != "O" and start is None:
            start = i
    return found


def score(case: Case, rows: Sequence[Row], said: Sequence[Any], names: Sequence[str]) -> float:
    """Accuracy, or F1 of entities."""
    hits, out_of = counts(case, rows, said, names).sum(0)
    return float(hits / max(out_of, 1))


# ------------------------------------------------------------------------------------------------------------- stages


def known(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def do(a, wanted: Iterator[tuple[str, str, float, int]], searching: bool) -> None:
    """Measure what is not in the file yet, at most `--most`, and write it there at once."""
    done = 0
    for name, side, lr, seed in wanted:
        if done == a.most:
            return
        found = {(r["case"], r["side"], r["lr"], r["seed"], r["searching"]) for r in known(a.out)}
        if (name, side, lr, seed, searching) in found:
            continue
        record = measure(a, name, side, lr, seed, searching)
        with a.out.open("a") as f:
            f.write(json.dumps(record) + "\n")
        print(f"{name}, {side}, lr {lr:g}, seed {seed}: {record['score']:.4f}", file=sys.stderr, flush=True)
        done += 1


def best_rate(records: Sequence[dict[str, Any]], name: str, side: str) -> float:
    """Of the candidates, that with the best score.

    Raises:
        SystemExit: not all of them have been tried.
    """
    tried = {r["lr"]: r["score"] for r in records if r["searching"] and (r["case"], r["side"]) == (name, side)}
    if missing := {*CASES[name].rates} - {*tried}:
        raise SystemExit(f"{name}, {side}: rates {sorted(missing)} have not been tried; run the stage `rates` first.")
    return max(CASES[name].rates, key=tried.get)


def sides(a, name: str) -> list[str]:
    return [side for side in CASES[name].sides if side in a.side]


def rates(a) -> None:
    do(a, ((n, side, lr, 0) for n in a.case for side in sides(a, n) for lr in CASES[n].rates), searching=True)


def runs(a) -> None:
    tried = known(a.out)
    todo = ((n, side, seed) for n in a.case for seed in range(a.seeds) for side in sides(a, n))
    do(a, ((n, side, best_rate(tried, n, side), seed) for n, side, seed in todo), searching=False)


def report(a) -> None:
    """Print Markdown: each side's score over its seeds with an interval over the rows, and the difference."""
    from jaxtune.evaluate import statistics as stats

    records = known(a.out)
    heads = ("", "side", "rate", "seeds", "score, 95% interval", "by seed", "trained, %", "peak MiB")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    differences = []
    for name, case in CASES.items():
        values = {}
        for side in case.sides:
            own = [r for r in records if not r["searching"] and (r["case"], r["side"]) == (name, side)]
            if not own:
                continue
            folder = a.texts if case.task == "texts" else a.words
            rows = read(folder / ("test.csv" if case.task == "texts" else "test.conll"))
            names = names_of(read(folder / ("train.csv" if case.task == "texts" else "train.conll")))
            # A row's results with all seeds stay together: what is drawn is rows.
            values[side] = np.mean([counts(case, rows, r["said"], names) for r in own], axis=0)
            value, low, high = stats.interval(values[side])
            each = ", ".join(f"{r['score']:.4f}" for r in own)
            peak = common.spread([r["peak MiB"] for r in own])
            share = 100 * own[0]["trained"] / own[0]["all"]
            cells = [name, side, f"{own[0]['lr']:g}", len(own), f"{value:.4f} ({low:.4f} to {high:.4f})", each]
            print(f"| {' | '.join(map(str, [*cells, f'{share:.2f}', peak]))} |")
        if len(values) == 2:
            apart = stats.paired(values["transformers"], values["jaxtune"])
            gap = apart.difference
            differences.append(f"{name}: {gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f}), p = {apart.p:.3f}")
    print("\njaxtune less transformers, paired over the rows:", *differences, sep="\n")
    print("\nRates tried, score on rows held out of training:")
    for r in records:
        if r["searching"]:
            print(f"{r['case']}, {r['side']}, {r['lr']:g}: {r['score']:.4f} ({r['steps']} steps)")


def speed(a) -> None:
    """Steps of both sides in turn: the second half of `--steps`, when every width has been compiled."""
    (name,) = a.case
    case = replace(CASES[name], grouped=not a.ungrouped, packed=a.packed)
    file = a.texts / "train.csv" if case.task == "texts" else a.words / "train.conll"

    def side(who):
        def call():
            with tempfile.TemporaryDirectory(dir=a.tmp) as folder:
                out = Path(folder) / "run"
                if who != "jaxtune":
                    out.mkdir()
                told = train(a, case, who, file, case.rates[0], 0, 1, out, a.steps)
            return {
                **pace(told["seconds"], told["tokens"]),
                "tokens": sum(told["tokens"]),
                "last loss": told["losses"][-1],
                "peak MiB": told["peak MiB"],
            }

        return call

    measured = {who: side(who) for who in case.sides}
    if a.warm:
        measured["jaxtune"]()  # compiles
    found = common.alternate(measured, a.repeats)
    ratios = {
        "median step, transformers over jaxtune": (common.ratio(found, "step, s", *SIDES[::-1]), ">= 1.0"),
        "tokens/s, jaxtune over transformers": (common.ratio(found, "tokens/s", *SIDES), ">= 1.0"),
    }
    how = "rows of like length together" if case.grouped else "rows in any order"
    how += ", jaxtune's packed" * case.packed
    common.report(f"Steps: {name}, {case.batch} rows a step, {how}, {a.steps} steps", found, ratios, a.json)


def main() -> None:
    stages = {"rates": rates, "runs": runs, "report": report, "speed": speed}
    p = common.parser(__doc__, repeats=2)
    p.add_argument("stage", choices=stages)
    p.add_argument("--model", type=Path, help="a BERT encoder's directory")
    p.add_argument("--texts", type=Path, help="the folder of banking77")
    p.add_argument("--words", type=Path, help="the folder of wnut17")
    p.add_argument("--out", type=Path, default=Path("classify.jsonl"), help="where results are kept")
    p.add_argument("--case", nargs="*", choices=CASES, default=list(CASES), help="speed: one that has two sides")
    p.add_argument("--side", nargs="*", choices=SIDES, default=list(SIDES), help="rates, runs: of these")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--most", type=int, help="rates, runs: stop after so many")
    p.add_argument("--tmp", type=Path, help="where runs lie until they are scored")
    p.add_argument("--steps", type=int, default=60, help="of a run of the stage `speed`")
    p.add_argument("--ungrouped", action="store_true", help="speed: rows of any length in a batch")
    p.add_argument("--packed", action="store_true", help="speed: jaxtune packs rows, in any order")
    p.add_argument("--warm", action="store_true", help="speed: fill the compilation cache first")
    a = p.parse_args()
    stages[a.stage](a)


if __name__ == "__main__":
    main()
