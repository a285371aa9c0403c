"""Held-out rows through one model or two: losses, answers, scores, intervals and verdicts, also by group."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate import labels as label_scores
from jaxtune.evaluate import statistics
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.metrics import Metric
from jaxtune.evaluate.rows import Row
from jaxtune.evaluate.systems import System
from jaxtune.infer.continuations import scorer
from jaxtune.infer.generation import decode_new, generate
from jaxtune.infer.logprobs import batches_by_length, most_tokens, score_batch

MOST_LABELS = 200
LOSSES = ("loss", "perplexity")


@dataclass
class Measured:
    """What one model did on the rows, each list in their order.

    Attributes:
        nats, tokens: of the trained tokens.
        answers: texts; None where a row has no prompt.
        labels: index of the likeliest label and its probability; None where a row has no prompt.
    """

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    labels: list[tuple[int, float] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        metrics: scores of generated answers, by name; without any, nothing is generated.
        labels: the answers are labels: of those that occur, the likeliest is the prediction.
        max_new_tokens: longest answer; `answer_length` has a default.
        batch_size: prompts answered together.
        eos_ids: tokens that end an answer.
        virtual: positions that a soft prompt takes before each row.
    """

    metrics: Mapping[str, Metric]
    labels: bool = False
    max_new_tokens: int = 64
    batch_size: int = 32
    eos_ids: tuple[int, ...] = ()
    virtual: int = 0


def answer_length(rows: Sequence[Row]) -> int:
    """Room for an answer: that of the longest expected one, and a quarter more."""
    longest = max((len(row.answer) for row in rows if row.prompt), default=1)
    return longest + max(4, longest // 4)


def label_names(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The labels that occur as expected answers, sorted: name -> its tokens as a row has them.

    Raises:
        UserError: there is one only, or so many that they are no labels.
    """
    found = {row.expected: row.answer for row in rows if row.prompt}
    if not 2 <= len(found) <= MOST_LABELS:
        raise UserError(
            f"--labels: the rows have {len(found):,} different expected answers; labels are 2 to {MOST_LABELS}. "
            f"The first is {next(iter(found), '')[:60]!r}."
        )
    return {name: found[name] for name in sorted(found)}


def measure(
    system: System,
    rows: Sequence[Row],
    tokenizer: Any,
    plan: Request,
    kept: Kept,
    progress: Callable[[str, int], Callable[[int], None]] = lambda what, total: lambda n: None,
) -> Measured:
    """Run one model over the rows; what is kept from an earlier start is not computed again.

    Args:
        progress: (what is done, number of rows) -> a function that is told how many more are done.

    Raises:
        UserError: a row is longer than the model's positions.
    """
    found = Measured()
    counts = [sum(row.mask) for row in rows]

    def losses(batch):
        masks = [rows[i].mask[1:] for i in batch]
        scored = score_batch(system.module, system.params, [rows[i].tokens for i in batch], masks=masks)
        return [-float(logprobs.sum()) for logprobs, _ in scored]

    keys = [key_of("loss", system.identity, row.tokens, row.mask) for row in rows]
    batches = batches_by_length([len(row.tokens) for row in rows], most_tokens())
    found.nats = in_batches(kept, keys, batches, losses, progress(f"{system.name}: loss", len(rows)))
    found.tokens = counts
    asked = answerable(rows, system.module.spec.positions, plan)
    if plan.labels:
        found.labels = _choose_labels(system, rows, asked, kept, progress)
    if plan.metrics:
        found.answers = _answer(system, rows, asked, tokenizer, plan, kept, progress)
    return found


def answerable(rows: Sequence[Row], positions: int, plan: Request) -> list[int]:
    """The rows that have a whole prompt, and room behind it for an answer."""
    room = positions - plan.virtual - plan.max_new_tokens
    return [i for i, row in enumerate(rows) if row.prompt and len(row.prompt) <= room]


def _answer(system, rows, asked, tokenizer, plan, kept, progress) -> list[str | None]:
    prompts = [rows[i].prompt for i in asked]

    def answers(batch):
        new = generate(
            system.module,
            system.params,
            [prompts[i] for i in batch],
            max_new_tokens=plan.max_new_tokens,
            eos_ids=plan.eos_ids,
            batch_size=plan.batch_size,
        )
        return [decode_new(tokenizer, prompts[i], ids) for i, ids in zip(batch, new, strict=True)]

    keys = [key_of("answer", system.identity, p, plan.max_new_tokens, list(plan.eos_ids)) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[at : at + plan.batch_size] for at in range(0, len(order), plan.batch_size)]
    texts = in_batches(kept, keys, batches, answers, progress(f"{system.name}: answers", len(prompts)))
    found: list[str | None] = [None] * len(rows)
    for i, text in zip(asked, texts, strict=True):
        found[i] = text.strip()
    return found


def _choose_labels(system, rows, asked, kept, progress) -> list[tuple[int, float] | None]:
    """The likeliest label after each prompt, and its share of the probability of all labels."""
    names = label_names(rows)
    pairs = [(rows[i].prompt, label) for i in asked for label in names.values()]
    batches, score = scorer(system.module, system.params, pairs)
    keys = [key_of("label", system.identity, *pair) for pair in pairs]
    done = progress(f"{system.name}: labels", len(pairs))
    sums = in_batches(kept, keys, batches, lambda batch: [value for value, _ in score(batch)], done)
    found: list[tuple[int, float] | None] = [None] * len(rows)
    for i, of_row in zip(asked, np.reshape(sums, (len(asked), len(names))), strict=True):
        best = int(np.argmax(of_row))
        found[i] = best, float(1 / np.exp(of_row - of_row[best]).sum())
    return found


# -------------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class Column:
    """Per-row values of one metric for each model, on the rows where it applies to all of them.

    values: name of the model -> [N, ...]; at: the rows, i64[N]; statistic: values -> float.
    """

    label: str
    better: int
    share: bool
    statistic: statistics.Statistic
    values: dict[str, np.ndarray]
    at: np.ndarray


def columns(rows: Sequence[Row], measured: Mapping[str, Measured], plan: Request) -> dict[str, Column]:
    """Everything that was measured, as columns of per-row values."""
    every = np.arange(len(rows))
    nats = {name: np.stack([m.nats, m.tokens], axis=1) for name, m in measured.items()}

    def perplexity(values):
        return np.exp(np.minimum(statistics.mean(values), 700.0))

    found = {
        "loss": Column("held-out loss", -1, False, statistics.mean, nats, every),
        "perplexity": Column("perplexity", -1, False, perplexity, nats, every),
    }
    expected = [row.expected for row in rows]
    for name, metric in plan.metrics.items():
        scores = {who: _scores(metric, expected, m.answers) for who, m in measured.items()}
        if (column := _column(metric, scores)) is not None:
            found[name] = column
    if plan.labels:
        found |= _label_columns(rows, measured)
    return found


def _scores(metric: Metric, expected: Sequence[str], answers: Sequence[str | None]) -> list[float | bool | None]:
    """A score for each row; None where the metric does not apply."""
    return [None if a is None else metric.score(a, e) for e, a in zip(expected, answers, strict=True)]


def _column(metric: Metric, scores: Mapping[str, Sequence[float | bool | None]]) -> Column | None:
    """The rows to which the metric applies for all models; None where there are none. Of yes and no, it is a share."""
    at = np.array([i for i, pair in enumerate(zip(*scores.values(), strict=True)) if None not in pair], int)
    if not len(at):
        return None
    share = metric.share or all(isinstance(v[i], bool) for v in scores.values() for i in at)
    values = {who: np.array([v[i] for i in at], float) for who, v in scores.items()}
    return Column(metric.label, metric.better, share, statistics.mean, values, at)


def _label_columns(rows: Sequence[Row], measured: Mapping[str, Measured]) -> dict[str, Column]:
    place = {name: i for i, name in enumerate(label_names(rows))}
    at = np.array([i for i, label in enumerate(next(iter(measured.values())).labels) if label is not None])
    true = [place[rows[i].expected] for i in at]
    values = {who: np.array([(t, *m.labels[i]) for t, i in zip(true, at, strict=True)]) for who, m in measured.items()}

    def right(v):
        return (v[..., 0] == v[..., 1]).mean(1)

    macro_f1 = statistics.each(lambda v: label_scores.macro_f1_ids(v[:, 0].astype(int), v[:, 1].astype(int)))
    calibration = statistics.each(lambda v: label_scores.ece(v[:, 2], v[:, 0] == v[:, 1]))
    return {
        "accuracy": Column("accuracy", 1, True, right, values, at),
        "macro_f1": Column("macro-F1", 1, True, macro_f1, values, at),
        "ece": Column("calibration error (ECE)", -1, True, calibration, values, at),
    }


def confusions(rows: Sequence[Row], measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Label names, and for each model its counts: row the expected label, column the predicted one."""
    names = list(label_names(rows))
    tables = {}
    for who, m in measured.items():
        pairs = [(row.expected, names[got[0]]) for row, got in zip(rows, m.labels, strict=True) if got is not None]
        tables[who] = label_scores.confusion(*zip(*pairs, strict=True), names).tolist()
    return {"names": names, "confusion": tables}


def answer_scores(metrics: Mapping[str, Metric], expected: Sequence[str], **answers: Sequence[str]) -> dict[str, Any]:
    """Compare the answers of base and tuned model by metrics, as `compare` does; metrics that apply to no row are left.

    Args:
        answers: by the name of the model.
    """
    found = {}
    for name, metric in metrics.items():
        values = {who: _scores(metric, expected, texts) for who, texts in answers.items()}
        if (column := _column(metric, values)) is not None:
            found[name] = column
    return compare(found)


def compare(found: Mapping[str, Column]) -> dict[str, Any]:
    """For each metric the values of the models with intervals; of two models also the difference and a verdict."""
    return {name: _compared(column, np.arange(len(column.at))) for name, column in found.items()}


def compare_groups(found: Mapping[str, Column], groups: Sequence[str]) -> dict[str, Any]:
    """The same for each group; p-values are Holm's over the groups of a metric.

    Returns:
        {"rows": {group: n}, "metrics": {metric: {group: ...}}}, without groups where a metric applies to no row.
    """
    names = sorted(set(groups))
    result: dict[str, Any] = {}
    for name, column in found.items():
        own = np.array([groups[i] for i in column.at], object)
        here = {group: np.flatnonzero(own == group) for group in names}
        cells = {group: _compared(column, at) for group, at in here.items() if len(at)}
        adjusted = statistics.holm([cell.get("p") for cell in cells.values()])
        for cell, p in zip(cells.values(), adjusted, strict=True):
            if "p" in cell:
                cell["p"] = p
                cell["verdict"] = statistics.verdict(cell["difference"]["value"], p, column.better)
        result[name] = cells
    return {"rows": {group: sum(g == group for g in groups) for group in names}, "metrics": result}


def _compared(column: Column, at: np.ndarray) -> dict[str, Any]:
    values = {name: v[at] for name, v in column.values.items()}
    entry = {"label": column.label, "better": column.better, "share": column.share, "rows": len(at)}

    def told(interval):
        share = column.share and column.better > 0
        return (statistics.exact_at_the_edge(interval, len(at)) if share else interval)._asdict()

    if set(values) != {"base", "tuned"}:
        [(name, alone)] = values.items()
        return entry | {name: told(statistics.interval(alone, column.statistic))}
    result = statistics.paired(values["base"], values["tuned"], column.statistic)
    verdict = statistics.verdict(result.difference.value, result.p, column.better)
    difference = result.difference
    if column.share:
        difference = statistics.paired_at_the_edge(result, values["base"], values["tuned"])
    models = {"base": told(result.base), "tuned": told(result.tuned), "difference": difference._asdict()}
    return entry | models | {"p": result.p, "verdict": verdict}


def row_records(
    rows: Sequence[Row], measured: Mapping[str, Measured], found: Mapping[str, Column]
) -> Iterable[dict[str, Any]]:
    """One JSON object a row: where it stands, what was asked and expected, and what each model made of it."""
    lookup = {name: {int(i): n for n, i in enumerate(column.at)} for name, column in found.items()}
    labels = list(label_names(rows)) if any(m.labels for m in measured.values()) else []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"where": row.where, "prompt": row.asked, "expected": row.expected}
        if row.group is not None:
            record["group"] = row.group
        for who, m in measured.items():
            told: dict[str, Any] = {"loss": m.nats[i] / max(1, m.tokens[i]), "tokens": m.tokens[i]}
            if m.answers and m.answers[i] is not None:
                told["answer"] = m.answers[i]
            if m.labels and m.labels[i] is not None:
                told["label"], told["confidence"] = labels[m.labels[i][0]], m.labels[i][1]
            for name, column in found.items():
                if column.values[who].ndim == 1 and i in lookup[name]:
                    told[name] = float(column.values[who][lookup[name][i]])
            record[who] = told
        yield record
