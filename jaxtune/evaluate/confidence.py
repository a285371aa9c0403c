"""Whether a model knows when it does not know: confidence against correctness, invention, and abstention.

A greedy answer has three confidences: the mean and the lowest probability of its tokens, and the share of sampled
answers that agree with it. Each is judged by its calibration, by the risk that remains where only the surest answers
are given (risk-coverage; El-Yaniv and Wiener 2010), and by how well it tells right from wrong answers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate import labels as label_scores
from jaxtune.evaluate import statistics
from jaxtune.evaluate.answers import Answers, answerable, room_for
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Options, Part, Progress
from jaxtune.evaluate.json_fields import NULL, parse_json
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.known import SURENESS
from jaxtune.evaluate.metrics import RIGHT
from jaxtune.evaluate.systems import System
from jaxtune.infer.generation import decode_new, generate
from jaxtune.infer.logprobs import score_batch

SURE = 0.9  # the mean probability of the tokens from which an answer counts as confident
ABSTENTIONS = (
    *(
        "i don't know",
        "i do not know",
        "don't know",
        "not sure",
        "cannot be answered",
        "can't be answered",
        "cannot answer",
    ),
    *("unanswerable", "no answer", "not enough information", "not mentioned", "not stated", "cannot tell", "unknown"),
)
STOP_WORDS = frozenset(
    [
        "about",
        "above",
        "after",
        "again",
        "against",
        "also",
        "among",
        "because",
        "been",
        "before",
        "being",
        "below",
        "between",
        "both",
        "could",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "from",
        "further",
        "have",
        "having",
        "here",
        "into",
        "itself",
        "just",
        "more",
        "most",
        "only",
        "other",
        "over",
        "same",
        "should",
        "some",
        "such",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "through",
        "under",
        "until",
        "very",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "whom",
        "will",
        "with",
        "would",
        "your",
        "yours",
    ]
)


# ----------------------------------------------------------------------------------------- scores of one set of answers


def risk_coverage(right: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """The share of wrong answers among the k surest, for k = 1..N: f64[N]; answers of equal confidence are averaged.

    Args:
        right: bool[N].
        confidence: f64[N].
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], 1.0 - np.asarray(right, float)[order]
    _, group, counts = np.unique(-sure, return_inverse=True, return_counts=True)
    even = np.bincount(group, wrong)[group] / counts[group]
    return np.cumsum(even) / np.arange(1, len(even) + 1)


def aurc(right: np.ndarray, confidence: np.ndarray) -> float:
    """The area under the risk-coverage curve: its mean. The lower the better; right and confidence are [N]."""
    return float(risk_coverage(right, confidence).mean())


def auroc(right: np.ndarray, confidence: np.ndarray) -> float:
    """How likely a right answer is surer than a wrong one, ties by half; 0.5 where one kind is missing. [N] each."""
    right = np.asarray(right, bool)
    good, bad = confidence[right], np.sort(confidence[~right])
    if not len(good) or not len(bad):
        return 0.5
    return float((np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")).mean() / (2 * len(bad)))


def ungrounded(answer: str, context: str) -> float | None:
    """The share of an answer's numbers and content words that its context lacks; None where it has none.

    Content words have four letters or more and are no English function words; case does not count. Of JSON the values
    count.
    """
    known = set(_words(context))
    said = _words(_said(answer))
    asked = [w for w in said if any(c.isdigit() for c in w) or (len(w) > 3 and w not in STOP_WORDS)]
    return None if not asked else sum(w not in known for w in asked) / len(asked)


def _said(answer: str) -> str:
    """What an answer says: of JSON the values, whose names are the task's."""
    value = parse_json(answer)
    if not isinstance(value, dict | list):
        return answer
    leaves, stack = [], [value]
    while stack:
        here = stack.pop()
        inner = here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
        stack += inner
        leaves += [] if isinstance(here, dict | list) or here is None or here is NULL else [str(here)]
    return " ".join(leaves)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:[.,]\d+)*", text.lower())


def abstains(answer: str, phrases: Sequence[str] = ABSTENTIONS) -> bool:
    """Whether an answer says that it cannot be given: it holds one of the phrases, or is empty."""
    text = " ".join(answer.lower().replace("’", "'").split())
    return not text or any(phrase.lower() in text for phrase in phrases)


# ------------------------------------------------------------------------------------------------------- the evaluator


@dataclass
class Sure:
    """What one model answers, and how sure it is: a value for each row that is asked.

    `probabilities` are (mean, lowest) of each answer's tokens; `samples` other answers.
    """

    answers: list[str] = field(default_factory=list)
    probabilities: list[tuple[float, float]] = field(default_factory=list)
    samples: list[list[str]] = field(default_factory=list)


class Asking(NamedTuple):
    """How confidence is measured.

    Attributes:
        samples: drawn answers beside the greedy one; 0: no agreement.
        temperature: of those.
        unanswerable: a column that is true where a question has no answer; None: all have one.
        phrases: by which a model abstains.
    """

    samples: int = 4
    temperature: float = 1.0
    unanswerable: str | None = None
    phrases: Sequence[str] = ABSTENTIONS


class Confidence(Answers):
    """The evaluator of answers with their confidence; see `jaxtune.evaluate.evaluation.Evaluator`."""

    def __init__(self, source: Any, cfg: Any, options: Options, *, asking: Asking):
        options.refuse(("labels", "schema", "scorer"), "--confidence")
        if asking.unanswerable and options.group_by not in (None, asking.unanswerable):
            raise UserError("--group-by has no effect with --unanswerable, which groups the rows; leave one out.")
        grouped = options if not asking.unanswerable else Options(**vars(options) | {"group_by": asking.unanswerable})
        super().__init__(source, cfg, grouped)
        self.asking = asking
        fits = self.request.metrics
        self.metric = next((fits[name] for name in RIGHT if name in fits), None) or next(
            (metric for metric in fits.values() if metric.share), None
        )
        if self.metric is None:
            raise UserError("--confidence needs rows with a prompt and an answer.")
        self.asked = answerable(self.rows, source_positions(source), self.request)
        self.no_answer = np.array([_is_true(self.rows[i].group) for i in self.asked]) if asking.unanswerable else None
        if self.no_answer is not None and not self.no_answer.any():
            raise UserError(f"--unanswerable={asking.unanswerable}: the column is true in no row.")
        if asking.unanswerable:
            self.groups = None
        self.notes.append(
            f"Right is {self.metric.label}; an answer is confident from a mean token probability of {SURE:g} on; "
            f"{asking.samples} samples at temperature {asking.temperature:g}."
        )

    def measure(self, system: System, kept: Kept, progress: Progress) -> Sure:
        request, asking = self.request, self.asking
        prompts = [self.rows[i].prompt for i in self.asked]
        how = [request.max_new_tokens, list(request.eos_ids), asking.samples, asking.temperature]
        keys = [key_of("sure", system.identity, prompt, how) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = [order[at : at + request.batch_size] for at in range(0, len(order), request.batch_size)]

        def answers(batch: Sequence[int]) -> list[Any]:
            own = [prompts[i] for i in batch]
            make = partial(
                generate,
                system.module,
                system.params,
                own,
                max_new_tokens=request.max_new_tokens,
                eos_ids=request.eos_ids,
                batch_size=request.batch_size,
            )
            new = make()
            rows = [[*prompt, *ids] for prompt, ids in zip(own, new, strict=True)]
            masks = [[at >= len(p) - 1 for at in range(len(row) - 1)] for p, row in zip(own, rows, strict=True)]
            scored = score_batch(system.module, system.params, rows, masks=masks)
            drawn = [make(temperature=asking.temperature, seed=1 + n) for n in range(asking.samples)]
            found = []
            for i, (prompt, ids) in enumerate(zip(own, new, strict=True)):
                logprobs = scored[i][0][len(prompt) - 1 :]
                sure = (float(np.exp(logprobs.mean())), float(np.exp(logprobs.min()))) if len(ids) else (0.0, 0.0)
                others = [decode_new(self.tokenizer, prompt, one[i]).strip() for one in drawn]
                found.append([decode_new(self.tokenizer, prompt, ids).strip(), sure, others])
            return found

        rows = in_batches(kept, keys, batches, answers, progress(f"{system.name}: answers", len(prompts)))
        return Sure([r[0] for r in rows], [tuple(r[1]) for r in rows], [r[2] for r in rows])

    def right(self, answers: Sequence[str]) -> np.ndarray:
        """Which answers are right, bool[N]; where a question has none, those that abstain."""
        expected = [self.rows[i].expected for i in self.asked]
        found = np.array([self.metric.score(a, e) == 1 for a, e in zip(answers, expected, strict=True)], bool)
        if self.no_answer is None:
            return found
        return np.where(self.no_answer, [abstains(a, self.asking.phrases) for a in answers], found)

    def sureness(self, measured: Sure) -> dict[str, np.ndarray]:
        """The confidences of all answers, f64[N] each."""
        mean, lowest = np.array(measured.probabilities).T
        found = {"mean": mean, "lowest": lowest}
        if self.asking.samples:
            found["agreement"] = np.array(
                [np.mean([s == a for s in own]) for a, own in zip(measured.answers, measured.samples, strict=True)]
            )
        return found

    def columns(self, measured: Mapping[str, Sure]) -> dict[str, Column]:
        every = np.array(self.asked)
        right = {who: self.right(m.answers) for who, m in measured.items()}
        sure = {who: self.sureness(m) for who, m in measured.items()}
        found = {"right": _share("right answers", 1, {who: r.astype(float) for who, r in right.items()}, every)}
        wrong = {who: ((sure[who]["mean"] >= SURE) & ~right[who]).astype(float) for who in measured}
        found["wrong_and_sure"] = _share("wrong and confident", -1, wrong, every)
        for kind, words in SURENESS.items():
            if kind not in next(iter(sure.values())):
                continue
            pairs = {who: np.stack([right[who], sure[who][kind]], 1).astype(float) for who in measured}
            for name, label, better, score in (
                ("ece", "calibration error", -1, lambda r, c: label_scores.ece(c, r)),
                ("aurc", "area under risk-coverage", -1, aurc),
                ("auroc", "right answers are surer (AUROC)", 1, auroc),
            ):
                statistic = statistics.each(lambda draw, score=score: score(draw[:, 0] > 0, draw[:, 1]))
                own = (lambda v: label_scores.ece_interval(v[:, 1], v[:, 0] > 0)) if name == "ece" else None
                found[f"{name}_{kind}"] = Column(f"{label}, {words}", better, False, statistic, pairs, every, own)
        chance = [
            f"{label_scores.ece_by_chance(own['mean']):.3f}{f' ({who})' if len(sure) > 1 else ''}"
            for who, own in sure.items()
        ]
        self.notes.append(
            f"Even a perfectly calibrated model has a calibration error of about {' and '.join(chance)} on "
            f"{len(every):,} answers, by chance."
        )
        found |= self._invented(measured, every)
        return found

    def _invented(self, measured: Mapping[str, Sure], every: np.ndarray) -> dict[str, Column]:
        """Words that are not in the prompt, and abstentions."""
        shares = {
            who: [ungrounded(a, self.rows[i].asked) for a, i in zip(m.answers, self.asked, strict=True)]
            for who, m in measured.items()
        }
        at = np.array([n for n, pair in enumerate(zip(*shares.values(), strict=True)) if None not in pair], int)
        found = {}
        if len(at):
            values = {who: np.array([own[n] for n in at], float) for who, own in shares.items()}
            found["ungrounded"] = Column(
                "numbers and content words not in the prompt", 0, True, statistics.mean, values, every[at]
            )
        if self.no_answer is None:
            return found
        for name, label, better, which in (
            ("abstained", "abstains where there is no answer", 1, self.no_answer),
            ("abstained_wrongly", "abstains where there is one", -1, ~self.no_answer),
        ):
            if which.any():
                values = {
                    who: np.array([abstains(a, self.asking.phrases) for a in m.answers], float)[which]
                    for who, m in measured.items()
                }
                found[name] = _share(label, better, values, every[which])
        return found

    def records(self, measured: Mapping[str, Sure], found: Mapping[str, Column]) -> list[dict[str, Any]]:
        right = {who: self.right(m.answers) for who, m in measured.items()}
        sure = {who: self.sureness(m) for who, m in measured.items()}
        records = []
        for n, i in enumerate(self.asked):
            row = self.rows[i]
            record: dict[str, Any] = {"where": row.where, "prompt": row.asked, "expected": row.expected}
            if row.group is not None:
                record["group"] = row.group
            for who, m in measured.items():
                own = {kind: round(float(values[n]), 6) for kind, values in sure[who].items()}
                record[who] = {"answer": m.answers[n], "right": bool(right[who][n]), **own, "samples": m.samples[n]}
            records.append(record)
        return records

    def confusion(self, measured: Mapping[str, Sure]) -> None:
        return None


def _share(label: str, better: int, values: dict[str, np.ndarray], at: np.ndarray) -> Column:
    return Column(label, better, True, statistics.mean, values, at)


def source_positions(source: Any) -> int:
    """The positions that a prompt and its answer share in a source's model."""
    from jaxtune import models
    from jaxtune.hf.load import read_config

    return room_for(models.build(read_config(source.model)))


def _is_true(value: str | None) -> bool:
    return str(value).lower() in ("true", "1", "yes", "unanswerable")


def curves(evaluator: Confidence, measured: Mapping[str, Sure], found: Mapping[str, Column]) -> dict[str, Any]:
    """{"risk_coverage": {confidence: {model: [[coverage, risk], ...]}}}, at 50 coverages at most."""
    right = {who: evaluator.right(m.answers) for who, m in measured.items()}
    sure = {who: evaluator.sureness(m) for who, m in measured.items()}
    n = len(evaluator.asked)
    at = np.unique(np.linspace(1, n, min(n, 50)).astype(int))
    kinds = next(iter(sure.values()))
    return {
        "risk_coverage": {
            kind: {
                who: [[round(k / n, 4), round(float(risk), 6)] for k, risk in zip(at, curve[at - 1])]
                for who in measured
                for curve in [risk_coverage(right[who], sure[who][kind])]
            }
            for kind in kinds
        }
    }


def confidence_part(asking: Asking) -> Part:
    """The part of eval.json with the confidence of answers."""
    opener: Callable[..., Confidence] = partial(Confidence, asking=asking)
    return Part("confidence", opener, "confidence.jsonl", curves)
