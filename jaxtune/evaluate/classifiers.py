"""Evaluate label heads on held-out rows: predictions for each text or word, scored with intervals, and by group.

Each row contributes a vector of counts, so that a resample of rows is a sum of vectors: macro-F1, entity F1 and
calibration are functions of such sums.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.data import LabelForm, Rows
from jaxtune.data.label_rows import has_types, token_types
from jaxtune.data.labels import JOINED
from jaxtune.evaluate import evaluation, statistics
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Options, Progress, silent
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.labels import confusion, gap_bins
from jaxtune.evaluate.rows import data_names, group_values, tokenised
from jaxtune.evaluate.systems import System, base_identity, identity
from jaxtune.hf import load as hf
from jaxtune.infer.generation import bucket
from jaxtune.infer.logprobs import batches_by_length, most_tokens
from jaxtune.infer.source import Tuned, open_source, same_base, tokenizer_of
from jaxtune.models.classifier import PROBLEMS, TOKEN
from jaxtune.objectives.classification import entity_counts, entity_tables

BINS = 10  # of calibration


class Predictions(NamedTuple):
    """The predictions of a head for one row.

    Attributes:
        loss: summed over the row's labels: nats, or squared errors of values.
        labels: ids: one for each word, or any number for a text; or a text's value.
        confidence: the probability of each; empty for values and for texts with several labels.
    """

    loss: float
    labels: list[Any]
    confidence: list[float]


def truth(rows: Rows, i: int, form: LabelForm) -> list[Any]:
    """The true labels of row i, as `Predictions.labels`."""
    if form.per_token:
        return [int(mark) - 1 for mark in rows[i][1] if mark]
    target = rows.target[i]
    if form.several:
        return np.flatnonzero(target).tolist()
    return [float(target[0]) if form.value else int(target[0])]


def classify(
    system: System,
    rows: Rows,
    form: LabelForm,
    kept: Kept,
    progress: Progress = silent,
) -> list[Predictions]:
    """Run a label head over every row; results stored by an earlier, interrupted run are not computed again."""

    def predict(batch):
        width = bucket(max(int(rows.length[i]) for i in batch))
        width = min(width, max(system.module.spec.positions, int(rows.length[list(batch)].max())))
        tokens, segments, types = np.zeros((3, 1 << (len(batch) - 1).bit_length(), width), np.int32)
        for row, i in enumerate(batch):
            ids, marks = rows[i]
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
            if has_types(rows):
                types[row, : len(ids)] = token_types(marks)
        logits = np.asarray(_logits(system.module, system.params, tokens, segments, types), np.float64)
        return [_predicted(logits[row, : rows.length[i]] if form.per_token else logits[row], rows, i, form)
                for row, i in enumerate(batch)]  # fmt: skip

    lengths = rows.length.tolist()
    keys = [key_of("class", system.identity, rows[i][0].tolist(), truth(rows, i, form)) for i in range(len(rows))]
    batches = batches_by_length(lengths, most_tokens())
    found = in_batches(kept, keys, batches, predict, progress(f"{system.name}: labels", len(rows)))
    return [Predictions(*record) for record in found]


@partial(jax.jit, static_argnames="module")
def _logits(module: Any, params: Any, tokens: jax.Array, segments: jax.Array, types: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return module.apply({"params": params}, tokens, positions, segments, types=types)


def _predicted(logits: np.ndarray, rows: Rows, i: int, form: LabelForm) -> Predictions:
    """logits [C] of a text, or [T, C]."""
    wanted = truth(rows, i, form)
    if form.value:
        return Predictions(float((logits[0] - wanted[0]) ** 2), [float(logits[0])], [])
    if form.several:
        there = np.isin(np.arange(len(logits)), wanted)
        nats = np.logaddexp(0, np.where(there, -logits, logits)).sum()
        return Predictions(float(nats), np.flatnonzero(logits > 0).tolist(), [])
    at = logits[rows[i][1] > 0] if form.per_token else logits[None]
    logprobs = at - np.logaddexp.reduce(at, axis=-1, keepdims=True)
    best = logprobs.argmax(-1)
    nth = np.arange(len(at))
    return Predictions(float(-logprobs[nth, wanted].sum()), best.tolist(), np.exp(logprobs[nth, best]).tolist())


def columns(rows: Rows, predicted: Mapping[str, Sequence[Predictions]], form: LabelForm) -> dict[str, Column]:
    """Everything that was measured, as columns of per-row values."""
    wanted = [truth(rows, i, form) for i in range(len(rows))]
    every = np.arange(len(rows))
    count = len(form.names)

    def column(label, better, share, statistic, values):
        return Column(label, better, share, statistic, values, every)

    weight = [count if form.several else len(labels) for labels in wanted]
    losses = {who: np.array([(s.loss, w) for s, w in zip(found, weight)]) for who, found in predicted.items()}
    loss = "squared error" if form.value else "held-out loss"
    found = {"loss": column(loss, -1, False, statistics.mean, losses)}
    if form.value:
        return found
    right = {
        who: np.array([_right(s.labels, w, form) for s, w in zip(f, wanted)], float) for who, f in predicted.items()
    }
    found["accuracy"] = column("accuracy", 1, True, statistics.mean, right)
    hits = {who: np.stack([_hits(s.labels, w, form, count) for s, w in zip(f, wanted)]) for who, f in predicted.items()}
    found["macro_f1"] = column("macro-F1", 1, True, *summed(hits, _macro_f1))
    tables = entity_tables(form.names) if form.per_token else None
    if tables is not None:
        entities = {who: _entities(tables, [s.labels for s in f], wanted) for who, f in predicted.items()}
        found["entity_f1"] = column("entity F1", 1, True, *summed(entities, _macro_f1))
    if not form.several:
        gaps = {who: np.stack([_gaps(s, w) for s, w in zip(f, wanted)]) for who, f in predicted.items()}
        table = np.concatenate(list(gaps.values()))
        found["ece"] = replace(
            column("calibration error (ECE)", -1, True, *summed(gaps, _ece)),
            interval=lambda rows: statistics.gaps_interval(
                table[rows.astype(int), :-1], table[rows.astype(int), -1].sum()
            ),
        )
    return found


def summed(
    counts: Mapping[str, np.ndarray], score: Callable[[np.ndarray], float]
) -> tuple[statistics.Statistic, dict[str, np.ndarray]]:
    """A score of summed counts as (statistic, values): a row's value is the index of its counts in counts [N, K]."""
    table = np.concatenate(list(counts.values()))
    starts = np.cumsum([0, *(len(part) for part in counts.values())])

    def statistic(draw: np.ndarray) -> float:
        return score(np.bincount(draw.astype(int), minlength=len(table)) @ table)

    return statistics.each(statistic), {
        who: np.arange(start, start + len(part), dtype=float) for (who, part), start in zip(counts.items(), starts)
    }


def _right(labels: list[int], wanted: list[int], form: LabelForm) -> tuple[float, float]:
    """(number right, number in all): of words, or of the row as a whole."""
    if form.per_token:
        return sum(a == b for a, b in zip(labels, wanted, strict=True)), len(wanted)
    return float(labels == wanted), 1.0


def _hits(labels: list[int], wanted: list[int], form: LabelForm, count: int) -> np.ndarray:
    """[3 C]: for each label true positives, predictions and occurrences."""
    hits = [a for a, b in zip(labels, wanted) if a == b] if not form.several else [*{*labels} & {*wanted}]
    return np.concatenate([np.bincount(np.array(ids, int), minlength=count) for ids in (hits, labels, wanted)])


def _macro_f1(counts: np.ndarray) -> float:
    hits, predicted, present = np.split(counts, 3)
    both = predicted + present
    return float(np.mean(2 * hits[both > 0] / both[both > 0])) if both.any() else 0.0


def _entities(tables: Any, predicted: Sequence[list[int]], wanted: Sequence[list[int]]) -> np.ndarray:
    """[N, 3]: true positives, predicted and true entities in each row."""
    width = max(map(len, wanted))
    tags, weights = np.zeros((2, len(wanted), width), np.int32), np.zeros((len(wanted), width), np.float32)
    for i, (ours, theirs) in enumerate(zip(predicted, wanted)):
        tags[0, i, : len(ours)], tags[1, i, : len(theirs)], weights[i, : len(theirs)] = ours, theirs, 1

    def one(ours, theirs, weight):
        return entity_counts(tables, ours[None], theirs[None], weight[None])

    return np.asarray(jax.jit(jax.vmap(one))(*tags, weights), float)


def _gaps(predicted: Predictions, wanted: list[int]) -> np.ndarray:
    """[BINS + 1]: confidence minus correctness, summed by bin of confidence; and the number of predictions."""
    right = [float(a == b) for a, b in zip(predicted.labels, wanted, strict=True)]
    return np.append(gap_bins(predicted.confidence, right, BINS), len(wanted))


def _ece(counts: np.ndarray) -> float:
    return float(np.abs(counts[:-1]).sum() / max(counts[-1], 1))


def confusions(rows: Rows, predicted: Mapping[str, Sequence[Predictions]], form: LabelForm) -> dict[str, Any] | None:
    """Label names, and for each model its counts: row the expected label, column the predicted one."""
    if form.value or form.several:
        return None
    true = [form.names[label] for i in range(len(rows)) for label in truth(rows, i, form)]
    tables = {
        who: confusion(true, [form.names[label] for s in found for label in s.labels], form.names).tolist()
        for who, found in predicted.items()
    }
    return {"names": list(form.names), "confusion": tables}


def majority_baseline(rows: Rows, form: LabelForm) -> str | None:
    """A sentence on the majority baseline: the accuracy of always predicting the commonest label."""
    if form.value or form.several:
        return None
    labels = [label for i in range(len(rows)) for label in truth(rows, i, form)]
    ids, counts = np.unique(labels, return_counts=True)
    most = int(counts.argmax())
    what = "words" if form.per_token else "rows"
    return f"Always saying {form.names[ids[most]]!r} would be right in {counts[most] / len(labels):.1%} of the {what}."


def records(
    rows: Rows,
    predicted: Mapping[str, Sequence[Predictions]],
    form: LabelForm,
    tokenizer: Any,
    groups: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """One JSON object for each row: its place, its text, the expected labels, and each model's predictions."""
    found = []
    for i in range(len(rows)):
        ids, marks = rows[i]
        pieces = np.split(ids, np.flatnonzero(marks)[1:]) if form.per_token else []
        words = [tokenizer.decode(piece, skip_special_tokens=True).strip() for piece in pieces]

        def named(labels, words=words):
            if form.value:
                return f"{labels[0]:g}"
            names = [form.names[label] for label in labels]
            if form.per_token:
                names = [f"{word}: {name}" for word, name in zip(words, names) if name != "O"]
            return ", ".join(names) or "none"

        record = {
            "where": rows.where(i),
            "prompt": tokenizer.decode(ids, skip_special_tokens=True),
            "expected": named(truth(rows, i, form)),
        }
        if groups is not None:
            record["group"] = groups[i]
        for who, of_rows in predicted.items():
            record[who] = {"loss": of_rows[i].loss, "label": named(of_rows[i].labels)}
            if of_rows[i].confidence and not form.per_token:
                record[who]["confidence"] = of_rows[i].confidence[0]
        found.append(record)
    return found


# ------------------------------------------------------------------------------------------------------ the evaluator

OF_TEXT = ("format", "metrics", "schema", "scorer", "labels", "max_new_tokens")  # options
NO_HEAD = "The base has no head for these labels, so there is nothing to compare with."


class Classes:
    """The `jaxtune.evaluate.evaluation.Evaluator` of models with a label head."""

    def __init__(self, source: Tuned, cfg: Any, options: Options):
        from jaxtune.objectives.task import row_length

        options.refuse(OF_TEXT, f"{source.model}, which has a label head")
        self.tokenizer = tokenizer_of(source)
        self.heads = _heads(source, evaluation.dtype_of(cfg), options.base)
        module = self.heads[0].module
        self.form = _form(module, cfg, options.columns)
        settings, sources, fraction = evaluation.sources(source, cfg, options)
        self.rows, self.lines = tokenised(
            self.tokenizer,
            sources,
            options.rows,
            eval_fraction=fraction,
            labels=self.form,
            max_length=row_length(settings.data.max_length, module),
            overlength=settings.data.overlength,
            vocab_size=module.spec.vocab,
            cache=settings.data.cache,
        )
        self.names = data_names(sources)
        self.groups = group_values(self.rows, self.names, options.group_by) if options.group_by else None
        self.tokens = int(self.rows.length.sum())
        self.notes = [] if not options.base or self.heads[0].name == "base" else [NO_HEAD]
        self.notes += [sentence] if (sentence := majority_baseline(self.rows, self.form)) else []

    def systems(self) -> Iterator[System]:
        return iter(self.heads)

    def measure(self, system: System, kept: Kept, progress: Progress) -> list[Predictions]:
        return classify(system, self.rows, self.form, kept, progress)

    def columns(self, measured: Mapping[str, Sequence[Predictions]]) -> dict[str, Column]:
        return columns(self.rows, measured, self.form)

    def records(self, measured: Mapping[str, Sequence[Predictions]], found: Any) -> list[dict[str, Any]]:
        return records(self.rows, measured, self.form, self.tokenizer, self.groups)

    def confusion(self, measured: Mapping[str, Sequence[Predictions]]) -> dict[str, Any] | None:
        return confusions(self.rows, measured, self.form)


def _heads(source: Tuned, dtype: Any, base: bool) -> list[System]:
    """The models that have a head for the labels, the tuned one last."""
    if source.adapter is None:
        module, params = hf.load(source.model, dtype=dtype)
        name = "tuned" if source.run else "model"
        return [System(name, module, params, identity(source.model, str(dtype)))]
    module, tuned, _ = open_source(source, dtype=dtype)
    below = base_identity(source, dtype)
    heads = [System("tuned", module, tuned, key_of(below, identity(source.adapter)))]
    if not module.new_head and base:
        with same_base(source):
            params = hf.read_params(module, source.model, key=jax.random.key(0), quantization=source.quantization)
        heads.insert(0, System("base", module, params, below))
    return heads


def _form(module: Any, cfg: Any, given: Mapping[str, str] | None) -> LabelForm:
    """How rows for a label head are read."""
    labels = module.labels
    return LabelForm(
        per_token=labels.kind == TOKEN,
        names=labels.names,
        several=labels.problem == PROBLEMS[1],
        value=labels.problem == PROBLEMS[2],
        columns=given if given is not None else dict(cfg.data.columns) if cfg else {},
        origin="the model",
        first=cfg.objective.first_label if cfg else None,
        joined=None if module.is_encoder else JOINED,
    )
