"""Evaluate models that continue text on held-out rows: losses, scores of generated answers, or the likeliest label."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError
from jaxtune.evaluate import evaluation, statistics
from jaxtune.evaluate import labels as label_scores
from jaxtune.evaluate.comparison import Column, compare
from jaxtune.evaluate.evaluation import MOST_SAMPLES, Options, Progress, silent
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.metrics import Metric, choose, load_scorer, schema_metric
from jaxtune.evaluate.reward import PREFIX as REWARD
from jaxtune.evaluate.reward import reward_metric
from jaxtune.evaluate.rows import Row, as_row, check_format, data_names, read_rows
from jaxtune.evaluate.systems import System, systems
from jaxtune.infer.continuations import scorer
from jaxtune.infer.generation import decode_new, generate
from jaxtune.infer.logprobs import batches_by_length, most_tokens, score_batch
from jaxtune.infer.source import Tuned, check_continues, eos_ids, tokenizer_of

MOST_LABELS = 200
LOSSES = ("loss", "perplexity")


@dataclass
class Measured:
    """The results of one model, each list in the order of the rows.

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
    """What to measure.

    Attributes:
        metrics: scores of generated answers, by name; without any, nothing is generated.
        labels: the answers are labels: the prediction is the likeliest of those that occur.
        max_new_tokens: longest answer; see `answer_length` for the default.
        batch_size: prompts decoded together.
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
    """The default length of an answer in tokens: 1.25 times the longest expected one."""
    longest = max((len(row.answer) for row in rows if row.prompt), default=1)
    return longest + max(4, longest // 4)


def label_names(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The labels that occur as expected answers, sorted: name -> its tokens as a row has them.

    Raises:
        UserError: there is only one, or there are too many to be labels.
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
    request: Request,
    kept: Kept,
    progress: Progress = silent,
) -> Measured:
    """Run one model over the rows; results stored by an earlier, interrupted run are not computed again.

    Raises:
        UserError: a row is longer than the model's positions.
    """
    nats = losses(system, rows, kept, progress)
    found = measure_answers(system, rows, tokenizer, request, kept, progress)
    found.nats = nats
    return found


def losses(system: System, rows: Sequence[Row], kept: Kept, progress: Progress = silent) -> list[float]:
    """The nats of each row's trained tokens.

    Raises:
        UserError: a row is longer than the model's positions.
    """

    def nats(batch):
        masks = [rows[i].mask[1:] for i in batch]
        scored = score_batch(system.module, system.params, [rows[i].tokens for i in batch], masks=masks)
        return [-float(logprobs.sum()) for logprobs, _ in scored]

    keys = [key_of("loss", system.identity, row.tokens, row.mask) for row in rows]
    batches = batches_by_length([len(row.tokens) for row in rows], most_tokens())
    return in_batches(kept, keys, batches, nats, progress(f"{system.name}: loss", len(rows)))


def measure_answers(
    system: System, rows: Sequence[Row], tokenizer: Any, request: Request, kept: Kept, progress: Progress = silent
) -> Measured:
    """What one model answers, without its losses."""
    found = Measured(tokens=[sum(row.mask) for row in rows])
    asked = answerable(rows, room_for(system.module), request)
    if request.labels:
        found.labels = _choose_labels(system, rows, asked, kept, progress)
    if request.metrics:
        found.answers = _answer(system, rows, asked, tokenizer, request, kept, progress)
    return found


def room_for(module: Any) -> int:
    """The positions that a prompt and its answer share; an encoder-decoder reads and writes them apart."""
    return module.spec.positions * (2 if module.reads_source else 1)


def answerable(rows: Sequence[Row], positions: int, request: Request) -> list[int]:
    """Indices of the rows with a whole prompt and room for an answer after it."""
    room = positions - request.virtual - request.max_new_tokens
    return [i for i, row in enumerate(rows) if row.prompt and len(row.prompt) <= room]


def _answer(system, rows, asked, tokenizer, request, kept, progress) -> list[str | None]:
    prompts = [rows[i].prompt for i in asked]

    def answers(batch):
        new = generate(
            system.module,
            system.params,
            [prompts[i] for i in batch],
            max_new_tokens=request.max_new_tokens,
            eos_ids=request.eos_ids,
            batch_size=request.batch_size,
        )
        return [decode_new(tokenizer, prompts[i], ids) for i, ids in zip(batch, new, strict=True)]

    keys = [key_of("answer", system.identity, p, request.max_new_tokens, list(request.eos_ids)) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[at : at + request.batch_size] for at in range(0, len(order), request.batch_size)]
    texts = in_batches(kept, keys, batches, answers, progress(f"{system.name}: answers", len(prompts)))
    found: list[str | None] = [None] * len(rows)
    for i, text in zip(asked, texts, strict=True):
        found[i] = text.strip()
    return found


def _choose_labels(system, rows, asked, kept, progress) -> list[tuple[int, float] | None]:
    """The likeliest label after each prompt, with its probability relative to all labels."""
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


def columns(rows: Sequence[Row], measured: Mapping[str, Measured], request: Request) -> dict[str, Column]:
    """Everything that was measured, as columns of per-row values."""
    every = np.arange(len(rows))
    nats = {name: np.stack([m.nats, m.tokens], axis=1) for name, m in measured.items()}

    def perplexity(values):
        return np.exp(np.minimum(statistics.mean(values), 700.0))

    found = {
        "loss": Column("held-out loss", -1, False, statistics.mean, nats, every),
        "perplexity": Column("perplexity", -1, False, perplexity, nats, every),
    }
    return found | answer_columns(rows, measured, request)


def answer_columns(rows: Sequence[Row], measured: Mapping[str, Measured], request: Request) -> dict[str, Column]:
    """What the answers are worth, as columns of per-row values."""
    found = {}
    expected = [row.expected for row in rows]
    for name, metric in request.metrics.items():
        score = metric.batch or (lambda rows, answers, metric=metric: _scores(metric, expected, answers))
        scores = {who: score(rows, m.answers) for who, m in measured.items()}
        if (column := _column(metric, scores)) is not None:
            found[name] = column
    if request.labels:
        found |= _label_columns(rows, measured)
    return found


def _scores(metric: Metric, expected: Sequence[str], answers: Sequence[str | None]) -> list[float | bool | None]:
    """A score for each row; None where the metric does not apply."""
    return [None if a is None else metric.score(a, e) for e, a in zip(expected, answers, strict=True)]


def _column(metric: Metric, scores: Mapping[str, Sequence[float | bool | None]]) -> Column | None:
    """The scores of rows to which the metric applies for all models; None if there are none. Booleans give a share."""
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

    def calibrated(v):
        return label_scores.ece_interval(v[:, 2], v[:, 0] == v[:, 1])

    return {
        "accuracy": Column("accuracy", 1, True, right, values, at),
        "macro_f1": Column("macro-F1", 1, True, macro_f1, values, at),
        "ece": Column("calibration error (ECE)", -1, True, calibration, values, at, interval=calibrated),
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
    """Compare the answers of base and tuned model by metrics, as `compare` does, without metrics that apply to no row.

    Args:
        metrics: by name.
        expected: the reference answer of each row, [N].
        answers: model name ("base", "tuned") -> its answer to each row, [N].
    """
    found = {}
    for name, metric in metrics.items():
        values = {who: _scores(metric, expected, texts) for who, texts in answers.items()}
        if (column := _column(metric, values)) is not None:
            found[name] = column
    return compare(found)


def row_records(
    rows: Sequence[Row], measured: Mapping[str, Measured], found: Mapping[str, Column]
) -> Iterable[dict[str, Any]]:
    """One JSON object for each row: its place, the prompt, the expected answer, and each model's results."""
    lookup = {name: {int(i): n for n, i in enumerate(column.at)} for name, column in found.items()}
    labels = list(label_names(rows)) if any(m.labels for m in measured.values()) else []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"where": row.where, "prompt": row.asked, "expected": row.expected}
        if row.group is not None:
            record["group"] = row.group
        for who, m in measured.items():
            scores: dict[str, Any] = {"loss": m.nats[i] / max(1, m.tokens[i]), "tokens": m.tokens[i]}
            if m.answers and m.answers[i] is not None:
                scores["answer"] = m.answers[i]
            if m.labels and m.labels[i] is not None:
                scores["label"], scores["confidence"] = labels[m.labels[i][0]], m.labels[i][1]
            for name, column in found.items():
                if column.values[who].ndim == 1 and i in lookup[name]:
                    scores[name] = float(column.values[who][lookup[name][i]])
            record[who] = scores
        yield record


class AnswerScores:
    """Scores of greedy answers to held-out rows, before a run and after it: parameters -> {"eval/...": score}.

    Attributes:
        rows: those that are answered.
        answers: for each call, one text for each row.
    """

    def __init__(
        self,
        module: Any,
        rows: Any,
        tokenizer: Any,
        names: Sequence[str],
        *,
        most_rows: int,
        max_new_tokens: int,
        eos_ids: tuple[int, ...],
        virtual: int = 0,
    ):
        """Choose the first `most_rows` rows that have a prompt, and room for an answer after `virtual` positions.

        Raises:
            UserError: a metric is unknown or applies to no row, or there is no such row.
        """
        room, prefix = room_for(module) - virtual - max_new_tokens, len(Encoder(tokenizer).prefix)
        found = (as_row(rows, i, tokenizer, prefix) for i in range(len(rows)))
        self.rows = list(itertools.islice((r for r in found if r.prompt and len(r.prompt) <= room), most_rows))
        if not self.rows:
            raise UserError(
                "evaluate.metrics: no held-out row has a prompt and an answer, with room for "
                f"evaluate.max_new_tokens={max_new_tokens} in the {module.spec.positions:,} positions of the model."
            )
        self.metrics = choose(names, [row.expected for row in self.rows], "evaluate.metrics")
        self.module, self.tokenizer, self.max_new_tokens, self.eos_ids = module, tokenizer, max_new_tokens, eos_ids
        self.answers: list[list[str]] = []

    def __call__(self, params: Any) -> dict[str, float]:
        prompts = [row.prompt for row in self.rows]
        new = generate(self.module, params, prompts, max_new_tokens=self.max_new_tokens, eos_ids=self.eos_ids)
        texts = [decode_new(self.tokenizer, p, ids).strip() for p, ids in zip(prompts, new, strict=True)]
        self.answers.append(texts)
        pairs = list(zip(texts, [row.expected for row in self.rows], strict=True))
        return {f"eval/{name}": _mean([m.score(*pair) for pair in pairs]) for name, m in self.metrics.items()}

    def samples(self, most: int = MOST_SAMPLES) -> list[dict[str, str]]:
        """The first rows with their answers before and after training."""
        if not self.answers:
            return []
        before = self.answers[0] if len(self.answers) > 1 else [""] * len(self.rows)
        rows = zip(self.rows[:most], before, self.answers[-1])
        return [{"prompt": r.asked, "expected": r.expected, "before": b, "after": a} for r, b, a in rows]

    def scores(self) -> dict[str, Any]:
        """Scores of the answers before and after, with intervals and a paired test, as in `jaxtune eval`."""
        if len(self.answers) < 2:
            return {}
        expected = [row.expected for row in self.rows]
        return answer_scores(self.metrics, expected, base=self.answers[0], tuned=self.answers[-1])


def _mean(scores: Sequence[float | None]) -> float:
    """The mean over the rows that a metric applies to; there is at least one."""
    return float(np.mean([score for score in scores if score is not None]))


# ------------------------------------------------------------------------------------------------------ the evaluator


class Answers:
    """The `jaxtune.evaluate.evaluation.Evaluator` of models that continue text."""

    def __init__(self, source: Tuned, cfg: Any, options: Options):
        check_continues(source)
        self.source, self.cfg = source, cfg
        own = {"json_schema": schema_metric(options.schema)} if options.schema else {}
        self.tokenizer = tokenizer_of(source)
        own |= dict(
            reward_metric(given, self.tokenizer) if given.startswith(REWARD) else load_scorer(given)
            for given in options.scorer
        )
        virtual = _virtual(source)
        positions = self._read(options, virtual)
        self.request = _request(options, self.rows, own, eos_ids(self.tokenizer, source), virtual)
        self.base, self.notes = evaluation.base_to_compare(cfg, options)
        self.notes += _left_out(self.rows, positions, self.request)
        self.groups = [row.group for row in self.rows] if options.group_by else None
        self.tokens = sum(sum(row.mask) for row in self.rows)

    def _read(self, options: Options, virtual: int) -> int:
        """Read the held-out rows; return the positions of the model."""
        from jaxtune import data, models
        from jaxtune.hf.load import read_config
        from jaxtune.hf.peft import rows_in
        from jaxtune.objectives.task import row_length

        cfg, given = self.cfg, options.columns
        settings, sources, fraction = evaluation.sources(self.source, cfg, options)
        module = models.build(read_config(self.source.model))
        added = 0 if self.source.adapter is None else rows_in(self.source.adapter, module)
        form = _form(self.source, settings, module)
        read_as = data.reading(settings.data)
        allowed = read_as.pop("allow_left_out")
        read_as["format"] = options.format or read_as["format"]
        if given is not None:
            read_as["columns"] = given
        if given is not None or options.format is not None:
            read_as["template"] = None
        self.names = data_names(sources)
        if form is not None:
            form = replace(form, **{name: read_as[name] for name in ("format", "columns", "template")})
        elif options.data and cfg is not None and given is None and options.format is None:
            chat = bool(self.tokenizer.chat_template) and read_as["template"] is None
            check_format(data_names(cfg.data.train)[0], self.names, read_as | {"chat": chat})
        self.rows, self.lines = read_rows(
            self.tokenizer,
            sources,
            group_by=options.group_by,
            limit=options.rows,
            eval_fraction=fraction,
            max_length=form.longest if form else row_length(settings.data.max_length, module) - virtual,
            labels=form,
            overlength=settings.data.overlength,
            vocab_size=max(module.spec.vocab, added),
            cache=settings.data.cache,
            allow_left_out=allowed,
            **read_as,
        )
        return room_for(module)

    def systems(self) -> Iterator[System]:
        return systems(self.source, base=self.base, dtype=evaluation.dtype_of(self.cfg))

    def measure(self, system: System, kept: Kept, progress: Progress) -> Measured:
        return measure(system, self.rows, self.tokenizer, self.request, kept, progress)

    def columns(self, measured: Mapping[str, Measured]) -> dict[str, Column]:
        return columns(self.rows, measured, self.request)

    def records(self, measured: Mapping[str, Measured], found: Mapping[str, Column]) -> Iterable[dict[str, Any]]:
        return row_records(self.rows, measured, found)

    def confusion(self, measured: Mapping[str, Measured]) -> dict[str, Any] | None:
        return confusions(self.rows, measured) if self.request.labels else None


def _form(source: Tuned, settings: Any, module: Any) -> Any:
    """How rows of an encoder-decoder are read; None: as text to continue."""
    from jaxtune.config import replaced
    from jaxtune.config.recipe import open_model

    if not module.reads_source:
        return None
    settings = replaced(settings, {"objective.name": "seq2seq", "model.path": source.model, "tune.method": "full"})
    return open_model(settings, source.model)[1].form


def _virtual(source: Tuned) -> int:
    """Positions that a soft prompt takes before each row."""
    from jaxtune.hf.peft import read_adapter_config

    return 0 if source.adapter is None else read_adapter_config(source.adapter).get("num_virtual_tokens") or 0


def _request(
    options: Options, rows: Sequence[Row], own: Mapping[str, Metric], stops: tuple[int, ...], virtual: int
) -> Request:
    """Choose what to measure on these rows."""
    shared = {"batch_size": options.batch_size, "eos_ids": stops, "virtual": virtual}
    references = [row.expected for row in rows if row.prompt]
    named = None if options.metrics is None else [name for name in options.metrics if name not in LOSSES]
    if not references and (named or own or options.labels):
        raise UserError(
            f"{rows[0].where}: no row has a prompt and an answer to compare with, so there is only a loss; "
            "leave out --metrics, --schema, --scorer and --labels."
        )
    if options.labels:
        return Request({}, labels=True, max_new_tokens=max(map(len, label_names(rows).values())), **shared)
    metrics = choose(named, references) if references else {}
    return Request({**metrics, **own}, max_new_tokens=options.max_new_tokens or answer_length(rows), **shared)


def _left_out(rows: Sequence[Row], positions: int, request: Request) -> list[str]:
    """A sentence on the rows for which nothing is generated."""
    if not request.metrics and not request.labels:
        return []
    asked = len(answerable(rows, positions, request))
    if not asked:
        raise UserError(
            f"No row has a prompt that leaves room for {request.max_new_tokens} new tokens in the model's "
            f"{positions:,} positions; lower --max-new-tokens."
        )
    without = len(rows) - asked
    why = f"no whole prompt, or no room for {request.max_new_tokens} new tokens in the model's {positions:,} positions"
    return [f"{without:,} of {len(rows):,} rows have {why}; only their loss is counted."] if without else []
