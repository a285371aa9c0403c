"""Whether a tuned model memorised its training rows in place of learning from them.

    membership   how well a row's loss tells whether it was trained on: an AUC, 0.5 where it tells nothing
    verbatim     training rows that go on word for word from their first tokens, by how often they were seen
    canaries     the exposure of made-up secrets (Carlini et al. 2019, arXiv:1802.08232), where data.canaries put some

Each is measured of held-out rows or of the base as well: an answer that follows from its prompt is no memory.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from jaxtune import data
from jaxtune.data.canaries import EACH, canaries, ids, others
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError
from jaxtune.evaluate import statistics
from jaxtune.evaluate.answers import Answers, losses
from jaxtune.evaluate.evaluation import Options, Progress, last_step, run_config, silent, tuning_rows, write_part
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.known import memory_from, sure_from
from jaxtune.evaluate.rows import Row, as_row
from jaxtune.evaluate.systems import System
from jaxtune.infer.continuations import scorer
from jaxtune.infer.generation import generate

PREFIX = 32  # tokens that are given of a row, and the most that are asked for
SHORTEST = 8  # tokens that have to follow
ROWS = 300  # of training rows, unless --rows says otherwise, and of those of each number of copies
SECRETS = 1023  # to which a canary is compared: an exposure is at most 10 bits
COPIES = ((1, "once"), (2, "2 or 3 times"), (4, "4 to 15 times"), (16, "16 times or more"))  # from so many on
LEVEL = 0.05


class Training(NamedTuple):
    """Training rows that are measured, each text once.

    Attributes:
        rows: as an evaluation sees them.
        group: of each, its place in `COPIES`.
    """

    rows: list[Row]
    group: list[int]


def training(rows: data.Rows, tokenizer: Any, most: int) -> Training:
    """Choose at most `most` of the rows of each number of copies, by a hash of their content."""
    pieces = np.array([crc32(rows[i][0].tobytes()) for i in range(len(rows))], np.uint64)  # of a row that was split
    keys = rows.digest ^ (pieces << np.uint64(32))
    _, first, copies = np.unique(keys, return_index=True, return_counts=True)
    group = np.searchsorted([least for least, _ in COPIES], copies, side="right") - 1
    chosen = np.concatenate([np.flatnonzero(group == g)[:most] for g in range(len(COPIES))])
    prefix = len(Encoder(tokenizer).prefix)
    return Training([as_row(rows, int(first[i]), tokenizer, prefix) for i in chosen], group[chosen].tolist())


def reproduced(
    system: System, rows: Sequence[Row], virtual: int, batch_size: int, kept: Kept, progress: Progress = silent
) -> list[bool | None]:
    """Which rows go on word for word from their first tokens, greedily; None of those that are too short."""
    positions = system.module.spec.positions - virtual
    asked = [i for i, row in enumerate(rows) if len(row.tokens) >= PREFIX + SHORTEST]
    wanted = {i: rows[i].tokens[PREFIX : min(2 * PREFIX, positions)] for i in asked}

    def same(batch):
        prompts = [rows[asked[k]].tokens[:PREFIX] for k in batch]
        most = max(len(wanted[asked[k]]) for k in batch)
        new = generate(system.module, system.params, prompts, max_new_tokens=most, batch_size=batch_size)
        return [got[: len(wanted[asked[k]])] == wanted[asked[k]] for k, got in zip(batch, new, strict=True)]

    keys = [key_of("verbatim", system.identity, rows[i].tokens[: 2 * PREFIX], PREFIX) for i in asked]
    order = sorted(range(len(asked)), key=lambda k: len(wanted[asked[k]]))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found: list[bool | None] = [None] * len(rows)
    told = in_batches(kept, keys, batches, same, progress(f"{system.name}: continuations", len(asked)))
    for i, value in zip(asked, told, strict=True):
        found[i] = value
    return found


def exposures(
    system: System,
    tokenizer: Any,
    times: Sequence[int],
    kept: Kept,
    progress: Progress = silent,
    secrets: int = SECRETS,
) -> list[float]:
    """The exposure of each canary in bits: log2 of all secrets, by log2 of its rank among them by their likelihood.

    The rank is estimated by so many others, drawn at random (their section 4.3, "approximation by sampling").
    """
    encoder, found = Encoder(tokenizer), []
    every = canaries(times)
    done = progress(f"{system.name}: canaries", len(every))
    for canary in every:
        key = key_of("canary", system.identity, canary.asked, canary.secret, secrets)
        if key not in kept.records:
            rows = ids(encoder, canary, [canary.secret, *others(canary, secrets)])
            pairs = [(tokens[:start], tokens[start:]) for tokens, start in rows]
            batches, score = scorer(system.module, system.params, pairs)
            values = np.zeros(len(pairs))
            for batch in batches:
                values[list(batch)] = [value for value, _ in score(batch)]
            kept.add([(key, exposure(values))])
        found.append(kept.records[key])
        done(1)
    return found


def exposure(values: np.ndarray) -> float:
    """The exposure in bits of the first of these log-probabilities among all: log2 n - log2 of its rank."""
    return float(np.log2(len(values)) - np.log2(1 + (values[1:] >= values[0]).sum()))


def by_chance(found: Sequence[float]) -> float:
    """How likely exposures as high are of secrets that the model never saw.

    Of such the share of others that are likelier is uniform, so that -ln of it is exponential, and the sum over secrets
    has a gamma distribution (Fisher's method).
    """
    from scipy.special import gammaincc

    return float(gammaincc(len(found), sum(found) * np.log(2)))


def memory(
    source: Any,
    options: Options,
    out: Path | None = None,
    *,
    say: Any = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure what a run remembers of its training rows.

    Args:
        source: from `infer.source.find`.
        options: `data` are rows of the same kind that it was not trained on; None: what the run held out. `rows` is the
            most of either.
        out: folder for eval.json and eval/; None: nothing is written.
        say: called with each sentence on the data, before anything is measured.
        progress: see `evaluation.Progress`.

    Returns:
        The part `memory` of eval.json.

    Raises:
        UserError: it is no run, or as `evaluate`.
    """
    from jaxtune.train.runtime import prepare_jax

    began, step = time.time(), last_step(source)
    cfg = run_config(source)
    if cfg is None:
        where = source.adapter or source.model
        raise UserError(f"--memory: {where} is no run, so what it was trained on is not known; give the run.")
    prepare_jax()
    most = options.rows or ROWS
    held = Answers(source, cfg, Options(data=options.data, format=options.format, columns=options.columns,
                                        metrics=["loss"], rows=most))  # fmt: skip
    every = tuning_rows(cfg, held.tokenizer)
    train = training(every, held.tokenizer, most)
    for line in held.lines:
        say(line)
    rows = [*train.rows, *held.rows]
    nats, verbatim, secrets = {}, {}, {}
    with Kept(out and out / "eval" / "kept.jsonl") as kept:
        for system in held.systems():
            tokens = np.maximum(1, [sum(row.mask) for row in rows])
            nats[system.name] = np.array(losses(system, rows, kept, progress)) / tokens
            verbatim[system.name] = reproduced(system, rows, held.request.virtual, options.batch_size, kept, progress)
            secrets[system.name] = exposures(system, held.tokenizer, cfg.data.canaries or (), kept, progress, SECRETS)
            del system
    passes = _passes(source.run, every)
    members = len(train.rows)
    report = {
        "target": str(source.run),
        "data": held.names,
        "rows": members,
        "held_out_rows": len(held.rows),
        "passes": passes,
        "membership": _membership(nats, members),
        "verbatim": list(_verbatim(verbatim, train.group, members)),
        "canaries": list(_by_times(secrets, cfg.data.canaries or ())),
        "steps": _steps(source.run, cfg.data.canaries or ()),
        "notes": held.notes,
    }
    report |= conclusion(report)
    report["seconds"] = round(time.time() - began, 2)
    if out is not None:
        write_part(source, out, "memory", report, step)
    return report


def _passes(run: Path, rows: data.Rows) -> float | None:
    """How often a run read each row, on average."""
    from jaxtune.train.log import read_metrics

    metrics = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    read = max((m["train/tokens"] for m in metrics if "train/tokens" in m), default=None)
    return None if read is None else round(read / int(rows.length.sum()), 3)


def _steps(run: Path, times: Sequence[int]) -> dict[str, int | None]:
    """What a run's evaluations say of when: its last step, that of the lowest held-out loss, and see `since`."""
    from jaxtune.train.log import read_metrics

    metrics = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    losses = {m["step"]: m["eval/loss"] for m in metrics if m.get("eval/loss") is not None and "phase" not in m}
    exposed = {
        m["step"]: [m[f"eval/canaries/{n}"] for n in times if n]
        for m in metrics
        if all(m.get(f"eval/canaries/{n}") is not None for n in times if n)
    }
    return {
        "last": max(losses, default=None),
        "lowest": min(losses, key=losses.__getitem__, default=None),
        "since": since(exposed) if any(times) else None,
        **memory_from(metrics),
    }


def since(exposed: Mapping[int, Sequence[float]]) -> int | None:
    """The step from whose evaluation on, until the last, exposures of canaries are no chance; None: there is none.

    Args:
        exposed: step -> the mean exposure of the `EACH` canaries of each number of repetitions.
    """
    return sure_from({step: [by_chance([bits] * EACH) for bits in means] for step, means in exposed.items()}, LEVEL)


def _membership(nats: dict[str, np.ndarray], members: int) -> dict[str, Any]:
    """By what is told whether a row was trained on -> its AUC."""
    scores = {who: -values for who, values in nats.items()}
    if {"base", "tuned"} <= scores.keys():
        scores["gain"] = nats["base"] - nats["tuned"]
    return {name: statistics.auc(values[:members], values[members:])._asdict() for name, values in scores.items()}


def _verbatim(found: dict[str, list[bool | None]], group: Sequence[int], members: int) -> Iterator[dict[str, Any]]:
    """A row of a table for each number of copies, and for the held-out rows, where any are long enough."""
    places = [(name, [i for i in range(members) if group[i] == g]) for g, (_, name) in enumerate(COPIES)]
    held = range(members, len(next(iter(found.values()))))
    for name, index in (*places, ("held out", held)):
        counted = {who: [values[i] for i in index if values[i] is not None] for who, values in found.items()}
        rows = len(next(iter(counted.values())))
        if rows:
            yield {"group": name, "rows": rows} | {who: sum(values) for who, values in counted.items()}


def _by_times(found: dict[str, list[float]], times: Sequence[int]) -> Iterator[dict[str, Any]]:
    """For each number of repetitions the mean exposure under each model, and how likely the last one's is by chance."""
    secrets = canaries(times)
    tuned = list(found)[-1]
    for n in sorted(times):
        index = [i for i, canary in enumerate(secrets) if canary.times == n]
        means = {who: float(np.mean([values[i] for i in index])) for who, values in found.items()}
        yield {"times": n, "count": len(index), "p": by_chance([found[tuned][i] for i in index])} | means


def conclusion(report: dict[str, Any]) -> dict[str, Any]:
    """{"memorised": "yes", "closer" or "no", "why": a sentence} from the measurements of `memory`."""
    told = []
    held = next((row for row in report["verbatim"] if row["group"] == "held out"), None)
    trained = [row for row in report["verbatim"] if row is not held]
    if trained and held:
        who = "tuned" if "tuned" in held else "model"
        k, n = (sum(row[key] for row in trained) for key in (who, "rows"))
        if statistics.more_often(k, n, held[who], held["rows"]) < LEVEL:
            told.append(
                f"it goes on word for word in {k:,} of {n:,} training rows after their first {PREFIX} tokens, and in "
                f"{held[who]:,} of {held['rows']:,} held-out ones"
            )
    rows = report["canaries"]
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["p"] = p
    if seen := [row for row in rows if row["p"] < LEVEL and row["times"]]:
        most = max(seen, key=lambda row: row["times"])
        who = "tuned" if "tuned" in most else "model"
        times = "once" if most["times"] == 1 else f"{most['times']} times"
        told.append(
            f"made-up secrets that stand {times} in the data have an exposure of {most[who]:.1f} bits (1.4 by chance)"
        )
    if told:
        at = report["steps"]
        first = min((at[key] for key in ("since", "verbatim") if at[key] is not None), default=None)
        when = "" if first is None else f" from step {first:,} on"
        later = ""
        if at["last"] and at["lowest"] < at["last"]:
            later = f" Its held-out loss was lowest at step {at['lowest']:,} of {at['last']:,}."
        return {"memorised": "yes", "why": f"The model memorised{when}: {', and '.join(told)}.{later}"}
    auc = report["membership"].get("gain") or next(iter(report["membership"].values()))
    said = f"membership AUC {auc['value']:.2f}"
    said += f" [{auc['low']:.2f}, {auc['high']:.2f}]" if auc["low"] is not None else ""
    if auc["low"] is not None and auc["low"] > 0.5:
        when = "" if (first := report["steps"]["auc"]) is None else f", from step {first:,} on"
        why = (
            f"No row was memorised word for word, but the model fits training rows closer than held-out ones "
            f"({said}){when}."
        )
        return {"memorised": "closer", "why": why}
    return {"memorised": "no", "why": f"No sign that the model memorised its training rows ({said}; 0.5 is chance)."}
