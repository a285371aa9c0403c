"""Ways to answer held-out rows: a model under prompts, nearest training rows, tuned models. Each gives an `Outcome`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from jaxtune.data.formats import Document
from jaxtune.data.tokenize import Encoder
from jaxtune.decide.race import race
from jaxtune.evaluate.asks import Ask, Instruction, encoded, fitted, put
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.metrics import Metric
from jaxtune.evaluate.rows import Row
from jaxtune.evaluate.systems import System
from jaxtune.infer.continuations import scorer
from jaxtune.infer.generation import cut, decode_new, generate

PROMPT, NEIGHBOURS, TUNED = "prompt", "neighbours", "tuned"  # sides of a decision
TIMED = 2  # measurements of the time that requests take


@dataclass
class Outcome:
    """What a candidate came to.

    Attributes:
        name: of the candidate.
        side: PROMPT, NEIGHBOURS or TUNED.
        what: the candidate in words.
        scores: of the first held-out rows, or of all, from 0 to 1.
        read, written: tokens a request.
        seconds: a request, answered in batches.
        latency: seconds of a request that is answered alone.
        stopped: why it was not measured on all rows.
        needs: rows of data: trained on, or to draw examples from.
        took: seconds that training and measuring it took.
        training: seconds, tokens, trainable parameters and folder of its training; None: it had none.
        forgetting: what it lost on general text, see `tuning.forgotten`; None: it was not measured.
    """

    name: str
    side: str
    what: str
    scores: list[float]
    read: float
    written: float
    seconds: float
    latency: float
    stopped: str | None = None
    needs: int = 0
    took: float = 0.0
    training: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @property
    def score(self) -> float:
        """The mean score."""
        return float(np.mean(self.scores))


@dataclass
class Answerer:
    """A model that answers rows, greedily, or with the likeliest of given labels.

    Attributes:
        system: the model.
        tokenizer: of it.
        kept: answers of an interrupted run.
        max_new_tokens: longest answer.
        eos_ids: tokens that end an answer.
        stop: text that ends an answer.
        labels: name -> its tokens after a prompt; empty: answers are generated.
        batch_size: rows answered together.
    """

    system: System
    tokenizer: Any
    kept: Kept
    max_new_tokens: int
    eos_ids: Sequence[int]
    stop: str
    labels: dict[str, list[int]] = field(default_factory=dict)
    batch_size: int = 32

    def __call__(self, rows: Sequence[Row]) -> list[str]:
        """The answers to rows with a prompt."""
        prompts = [row.prompt for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
        batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        how = list(self.labels) or [self.max_new_tokens, list(self.eos_ids)]
        keys = [key_of("decide", self.system.identity, prompt, how) for prompt in prompts]

        texts = in_batches(self.kept, keys, batches, lambda batch: self._answer([prompts[i] for i in batch]))
        return [cut(text.strip(), [self.stop])[0].strip() for text in texts]

    def _answer(self, prompts: Sequence[list[int]]) -> list[str]:
        module, params = self.system.module, self.system.params
        if not self.labels:
            new = generate(
                module,
                params,
                prompts,
                max_new_tokens=self.max_new_tokens,
                eos_ids=self.eos_ids,
                batch_size=self.batch_size,
            )
            return [decode_new(self.tokenizer, prompt, ids) for prompt, ids in zip(prompts, new, strict=True)]
        pairs = [(prompt, label) for prompt in prompts for label in self.labels.values()]
        batches, score = scorer(module, params, pairs)
        sums = np.zeros(len(pairs))
        for batch in batches:
            sums[batch] = [value for value, _ in score(batch)]
        names = list(self.labels)
        return [names[best] for best in sums.reshape(len(prompts), -1).argmax(1)]

    def seconds(self, rows: Sequence[Row], together: int) -> float:
        """Seconds a request where so many are answered together: the median of some, after one that compiles."""
        prompts = sorted((row.prompt for row in rows), key=len)[:together]
        seconds = []
        for _ in range(1 + TIMED):
            began = time.perf_counter()
            self._answer(prompts)
            seconds.append((time.perf_counter() - began) / len(prompts))
        return median(seconds[1:])


@dataclass(frozen=True)
class Questions:
    """What is asked of every candidate.

    Attributes:
        asks: the held-out rows.
        metric: scores an answer.
        tokenizer, encoder: of the model.
        positions: that the model knows.
        max_new_tokens: longest answer.
    """

    asks: Sequence[Ask]
    metric: Metric
    tokenizer: Any
    encoder: Encoder
    positions: int
    max_new_tokens: int

    def scored(self, start: int, answers: Sequence[str]) -> list[float]:
        """The scores of answers to the rows from `start` on."""
        asks = self.asks[start : start + len(answers)]
        return [float(self.metric.score(a, ask.answer) or 0.0) for a, ask in zip(answers, asks, strict=True)]

    def rows(self, instruction: Instruction | None, shots: Callable[[Ask], list[Ask]] | None = None) -> list[Row]:
        """The held-out rows as they are put to a model; examples that do not fit are left out, the first ones first.

        Args:
            instruction: None: rows as training reads them.
            shots: ask -> its examples.

        Raises:
            UserError: a row is too long without any example.
        """
        chosen = [shots(ask) if shots else [] for ask in self.asks]
        settings = self.positions, self.max_new_tokens, "shorten the prompt, or give --max-new-tokens"
        return fitted(self.tokenizer, self.encoder, self.asks, instruction, chosen, *settings)

    def label_tokens(self, names: Sequence[str], instruction: Instruction | None) -> dict[str, list[int]]:
        """The tokens of each label after a prompt; of plain text without the token that ends a text."""
        first = self.asks[0]
        asks = [first] * len(names)
        examples = [put(first._replace(answer=name), instruction or Instruction()) for name in names]
        found = encoded(self.tokenizer, self.encoder, asks, examples)
        ends = self.tokenizer.eos_token_id if isinstance(first.example, Document) else None
        return {
            name: row.answer[:-1] if row.answer[-1] == ends and len(row.answer) > 1 else row.answer
            for name, row in zip(names, found, strict=True)
        }


def answered(
    name: str,
    side: str,
    what: str,
    questions: Questions,
    rows: Sequence[Row],
    answerer: Answerer,
    leader: Sequence[float] | None,
    **more: Any,
) -> Outcome:
    """Let a model answer the held-out rows, until it has lost against the leader."""
    texts: list[str] = []

    def measure(start: int, stop: int) -> list[float]:
        new = answerer(rows[start:stop])
        texts.extend(new)
        return questions.scored(start, new)

    raced = race(measure, len(rows), leader)
    virtual = more.pop("virtual", 0)
    read = [virtual + len(row.prompt) for row in rows[: len(texts)]]
    written = [0 if answerer.labels else 1 + len(ids) for ids in _ids(questions.tokenizer, texts)]
    return Outcome(
        name,
        side,
        what,
        raced.scores,
        read=float(np.mean(read)),
        written=float(np.mean(written)),
        seconds=answerer.seconds(rows, answerer.batch_size),
        latency=answerer.seconds(rows, 1),
        stopped=raced.stopped,
        **more,
    )


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def nearest_answers(name: str, what: str, questions: Questions, search: Any, answers: Sequence[str], k: int) -> Outcome:
    """Answer each row as its most similar training rows do, by a vote.

    Args:
        name: of the candidate.
        what: in words.
        questions: what is asked.
        search: (text, k) -> the k most similar (index, score) of the training rows.
        answers: of the training rows.
        k: how many vote.
    """
    from jaxtune.decide.examples import vote

    found, seconds = [], []
    for ask in questions.asks:
        began = time.perf_counter()
        found.append(vote(search(ask.text, k), answers))
        seconds.append(time.perf_counter() - began)
    scores = questions.scored(0, found)
    usual = median(seconds)
    return Outcome(name, NEIGHBOURS, what, scores, 0.0, 0.0, usual, usual, needs=len(answers))
