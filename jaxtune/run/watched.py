"""What a run remembers and learns anew, measured at every evaluation beside its loss, so that one sees from when.

eval/canaries/N                exposure of the secrets that stand N times in the data, in bits (data.canaries)
eval/known/train/Unknown       right answers to the rows of evaluate.known that it is trained on, by what the base
eval/known/held_out/Unknown    knew of them (`jaxtune data --known`), and to those that it is not
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxtune import data
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError
from jaxtune.evaluate.known import CLASSES
from jaxtune.evaluate.rows import Row, as_row, data_names, group_values, tokenised

SECRETS = 127  # to which a canary is compared at an evaluation: an exposure is at most 7 bits
COLUMN = "known"

Measure = Callable[[Any], dict[str, float]]  # parameters -> values to log


@dataclass(frozen=True)
class Known:
    """Questions by what the base knew of their answers.

    Attributes:
        rows: those with a prompt.
        groups: of each, "train/CLASS" or "held_out/CLASS".
    """

    rows: list[Row]
    groups: list[str]


def read_known(experiment: Any, tokenizer: Any, train: Sequence[data.Rows]) -> tuple[Known | None, list[str]]:
    """The rows that evaluate.known names, and a sentence on them.

    At most evaluate.rows of those that are trained on, and as many of the others.

    Raises:
        UserError: they cannot be read, have no column `known` with the classes, or no prompt.
    """
    from jaxtune.evaluate.answers import answer_length

    names = experiment.evaluate.known
    if not names:
        return None, []
    reading = data.reading(experiment.data)
    found, _ = tokenised(
        tokenizer,
        names,
        **reading,
        max_length=experiment.recipe.batch.length - len(experiment.prefix),
        vocab_size=experiment.module.spec.vocab,
        cache=experiment.data.cache,
    )
    try:
        classes = group_values(found, data_names(names), COLUMN)
    except UserError as error:
        raise UserError(f"evaluate.known: {str(error).replace(f'--group-by={COLUMN}: ', '')}") from None
    wrong = next((i for i, name in enumerate(classes) if name not in CLASSES), None)
    if wrong is not None:
        raise UserError(
            f"evaluate.known: {found.where(wrong)} has {COLUMN}={classes[wrong]!r}; expected one of "
            f"{', '.join(CLASSES)}, as `jaxtune data --known` writes them."
        )
    trained = np.isin(found.digest, np.concatenate([part.digest for part in train]))
    prefix = len(Encoder(tokenizer).prefix)
    every = [as_row(found, i, tokenizer, prefix) for i in range(len(found))]
    room = experiment.module.spec.positions - len(experiment.prefix) - answer_length(every)
    rows, groups, counts = [], [], dict.fromkeys(("train", "held_out"), 0)
    for i in np.argsort(found.digest, kind="stable"):
        side = "train" if trained[i] else "held_out"
        if every[i].prompt and len(every[i].prompt) <= room and counts[side] < experiment.evaluate.rows:
            rows.append(every[i])
            groups.append(f"{side}/{classes[i]}")
            counts[side] += 1
    if not rows:
        raise UserError(
            f"evaluate.known: {found.where(0)} has no prompt, or no room for an answer after it, and no other row has; "
            "give rows with columns prompt and completion."
        )
    line = (
        f"evaluate.known: {counts['train']:,} training rows and {counts['held_out']:,} others are answered at every "
        "evaluation, by what the base knew of them."
    )
    return Known(rows, groups), [line]


def measures(job: Any) -> list[Measure]:
    """What is measured of a run's parameters at every evaluation."""
    rows, times, found = job.rows, job.experiment.data.canaries, []
    if times:
        found.append(partial(secrets, job.module, rows.tokenizer, times))
    if rows.known is not None:
        found.append(partial(right, job.module, rows.tokenizer, rows.known, rows.stops))
    return found


def secrets(module: Any, tokenizer: Any, times: Sequence[int], params: Any) -> dict[str, float]:
    """The mean exposure of the canaries of each number of repetitions."""
    from jaxtune.data.canaries import canaries
    from jaxtune.evaluate.kept import Kept
    from jaxtune.evaluate.memory import exposures
    from jaxtune.evaluate.systems import System

    bits = exposures(System("run", module, params, ""), tokenizer, times, Kept(), secrets=SECRETS)
    stand = np.array([canary.times for canary in canaries(times)])
    return {f"eval/canaries/{n}": float(np.mean(np.array(bits)[stand == n])) for n in times}


def right(module: Any, tokenizer: Any, known: Known, stops: Sequence[int], params: Any) -> dict[str, float]:
    """The share of right answers in each group."""
    from jaxtune.evaluate.answers import answer_length
    from jaxtune.evaluate.metrics import rightness
    from jaxtune.infer.generation import decode_new, generate

    metric = rightness([row.expected for row in known.rows])
    prompts = [row.prompt for row in known.rows]
    new = generate(module, params, prompts, max_new_tokens=answer_length(known.rows), eos_ids=stops)
    texts = [decode_new(tokenizer, prompt, ids).strip() for prompt, ids in zip(prompts, new, strict=True)]
    scores = np.array([metric.score(text, row.expected) == 1 for text, row in zip(texts, known.rows, strict=True)])
    groups = np.array(known.groups)
    return {f"eval/known/{name}": float(scores[groups == name].mean()) for name in sorted(set(known.groups))}
