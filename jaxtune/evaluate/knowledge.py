"""What a model knows before it is tuned: each question sorted by how often the model answers it rightly.

Gekhman et al. 2024, arXiv:2405.05904, section 3: a question is put to the model behind several sets of examples, once
greedily and several times at a temperature. Rows of facts that the model does not know are learnt slowly, and teach it
to invent.

    HighlyKnown   the greedy answer is always right
    MaybeKnown    it is right sometimes
    WeaklyKnown   it is never right, but a sampled one is
    Unknown       no answer is right
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxtune.curate.finding import NOTE, SHOWN, WARNING, Finding
from jaxtune.data.tokenize import Encoder
from jaxtune.evaluate.asks import BETWEEN, Ask, Instruction, fitted
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.known import CLASSES
from jaxtune.evaluate.metrics import Metric
from jaxtune.evaluate.systems import System
from jaxtune.infer.generation import cut, decode_new, generate

MUCH = 0.2  # the share of unknown rows from which there is a warning


class Recall(NamedTuple):
    """The shares of right answers of a question: greedy ones and sampled ones."""

    greedy: float
    sampled: float


def class_of(recall: Recall) -> str:
    """The class of a question."""
    if recall.greedy == 1:
        return "HighlyKnown"
    if recall.greedy > 0:
        return "MaybeKnown"
    return "WeaklyKnown" if recall.sampled > 0 else "Unknown"


@dataclass(frozen=True)
class Trials:
    """How often a question is put, and how.

    Attributes:
        sets: of examples, each of which a question is put behind.
        shots: examples in a set; 0: none, and `sets` is 1.
        samples: answers that are drawn behind each set, beside the greedy one.
        temperature: of those.
        instruction: what stands before or around the questions.
        max_new_tokens: longest answer.
        batch_size: questions answered together.
    """

    sets: int = 4
    shots: int = 4
    samples: int = 4
    temperature: float = 0.5
    instruction: Instruction = Instruction()  # noqa: RUF009
    max_new_tokens: int = 32
    batch_size: int = 32


def recall(
    system: System,
    tokenizer: Any,
    asks: Sequence[Ask],
    metric: Metric,
    trials: Trials,
    *,
    shown: Sequence[Ask] | None = None,
    eos_ids: Sequence[int] = (),
    kept: Kept | None = None,
    done: Callable[[int], None] = lambda n: None,
) -> list[Recall]:
    """Put each question to a model behind several sets of examples.

    Args:
        system: the model.
        tokenizer: of it.
        asks: the questions.
        metric: whether an answer is right: 1, or less.
        trials: how often, and how.
        shown: the examples, in an order of chance; default: the questions. A question is no example of itself.
        eos_ids: tokens that end an answer.
        kept: what an interrupted run has found.
        done: called with the number of questions after each batch.

    Returns:
        The shares of right answers of each question.
    """
    if not trials.shots:
        trials = replace(trials, sets=1)
    shown = asks if shown is None else shown
    encoder, size = Encoder(tokenizer), trials.shots
    stop = BETWEEN if any("\n" in ask.answer for ask in asks) else "\n"

    def examples(of: Ask, number: int) -> list[Ask]:
        others = [a for a in shown[number * (size + 1) : (number + 1) * (size + 1)] if a.digest != of.digest]
        return others[:size]

    def tried(batch: Sequence[int]) -> list[Recall]:
        right = np.zeros((2, len(batch)))
        for number in range(trials.sets):
            own = [asks[i] for i in batch]
            shots = [examples(ask, number) for ask in own]
            positions, new = system.module.spec.positions, trials.max_new_tokens
            rows = fitted(tokenizer, encoder, own, trials.instruction, shots, positions, new)
            for sample in range(1 + trials.samples):
                texts = generate(
                    system.module,
                    system.params,
                    [row.prompt for row in rows],
                    max_new_tokens=trials.max_new_tokens,
                    temperature=trials.temperature if sample else 0.0,
                    seed=number * trials.samples + sample,
                    eos_ids=eos_ids,
                    batch_size=trials.batch_size,
                )
                for i, (ask, row, ids) in enumerate(zip(own, rows, texts, strict=True)):
                    answer = cut(decode_new(tokenizer, row.prompt, ids).strip(), [stop])[0].strip()
                    right[min(sample, 1), i] += metric.score(answer, ask.answer) == 1
        right /= [[trials.sets], [max(1, trials.sets * trials.samples)]]
        return [Recall(*map(float, pair)) for pair in right.T]

    order = sorted(range(len(asks)), key=lambda i: len(asks[i].text))
    batches = [order[at : at + trials.batch_size] for at in range(0, len(order), trials.batch_size)]
    how = [trials.sets, size, trials.samples, trials.temperature, trials.instruction.text, trials.max_new_tokens]
    sets = [ask.digest for ask in shown[: trials.sets * (size + 1)]] if size else []
    keys = [key_of("recall", system.identity, how, sets, ask.text, ask.answer) for ask in asks]
    return [Recall(*pair) for pair in in_batches(kept or Kept(), keys, batches, tried, done)]


def shares(classes: Sequence[str]) -> dict[str, float]:
    """The share of each class."""
    counts = Counter(classes)
    return {name: counts[name] / max(1, len(classes)) for name in CLASSES}


def over_cap(classes: Sequence[str], most: float) -> list[int]:
    """The unknown rows, the last ones first dropped, without which at most a share `most` of the rest is unknown.

    Args:
        classes: of the rows, in an order of chance.
        most: the share, from 0 to below 1.
    """
    unknown = [i for i, name in enumerate(classes) if name == "Unknown"]
    known = len(classes) - len(unknown)
    return unknown[int(most * known / (1 - most) + 1e-9) :]


def known_finding(asks: Sequence[Ask], classes: Sequence[str], total: int, drops: np.ndarray | None = None) -> Finding:
    """What the data report says of the classes.

    Args:
        asks: the rows that were sorted.
        classes: of each.
        total: training rows in all.
        drops: ledger indices of the rows that a clean set leaves out.
    """
    found = shares(classes)
    listed = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    of = "all" if len(asks) == total else f"{len(asks):,} of {total:,}"
    much = found["Unknown"] >= MUCH
    fix = "facts that the base does not know are learnt slowly and teach it to invent: leave such rows out or cap them"
    return Finding(
        "known",
        WARNING if much else NOTE,
        f"what the base knows of {of} training rows before tuning: {listed}",
        f"{fix} (--write-clean=FILE.jsonl --most-unknown=0.05)" if much else "score by the column known of known.jsonl",
        tuple(ask.where for ask, name in zip(asks, classes, strict=True) if name == "Unknown")[:SHOWN],
        sum(name == "Unknown" for name in classes),
        np.zeros(0, np.int64) if drops is None else drops,
    )
