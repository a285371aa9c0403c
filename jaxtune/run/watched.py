"""What a run remembers and learns anew, measured at every evaluation beside its loss, so that one sees from when.

eval/canaries/N                exposure of the secrets that stand N times in the data, in bits (data.canaries)
eval/known/train/Unknown       right answers to the rows of evaluate.known that it is trained on, by what the base
eval/known/held_out/Unknown    knew of them (`jaxtune data --known`), and to those that it is not
eval/memory/auc                how well training rows are told from held-out ones by how much training lowered their
                               loss (evaluate.memory): 0.5 is chance; auc_p: how likely so much is by chance
eval/memory/verbatim           share of training rows that go on word for word, and verbatim_held_out of the others;
                               verbatim_p: how likely so many more are by chance
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
FEWEST = 5  # rows on either side of evaluate.memory

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


@dataclass(frozen=True)
class Sides:
    """Rows that a run is trained on, and as many of the same kind that it is not: `trained` first, then the others."""

    rows: list[Row]
    trained: int


def read_sides(
    experiment: Any, tokenizer: Any, train: Sequence[data.Rows], held_out: data.Rows | None
) -> tuple[Sides | None, list[str]]:
    """The rows of evaluate.memory, drawn by a hash of their content, and a sentence on them.

    Raises:
        UserError: there are too few.
    """
    most = experiment.evaluate.memory
    if not most:
        return None, []
    prefix, found = len(Encoder(tokenizer).prefix), []
    for rows in (data.Rows.concatenate(list(train)), held_out):
        _, first = np.unique(rows.digest, return_index=True)  # each text once
        found.append([as_row(rows, int(i), tokenizer, prefix) for i in first[:most]])
    counts = [len(rows) for rows in found]
    if min(counts) < FEWEST:
        raise UserError(
            f"evaluate.memory tells training rows from held-out ones, and there are {counts[0]:,} and {counts[1]:,} "
            f"different ones; it needs {FEWEST} of either."
        )
    line = (
        f"evaluate.memory: {counts[0]:,} training and {counts[1]:,} held-out rows are told apart at every evaluation, "
        "by their losses and by what goes on word for word."
    )
    return Sides([*found[0], *found[1]], counts[0]), [line]


def measures(job: Any) -> list[Measure]:
    """What is measured of a run's parameters at every evaluation; to be called before its first step."""
    from jaxtune.infer.generation import prepare

    rows, times, found = job.rows, job.experiment.data.canaries, []
    if times and job.experiment.evaluate.canaries:
        found.append(partial(secrets, job.module, rows.tokenizer, times))
    if rows.known is not None:
        found.append(partial(right, job.module, rows.tokenizer, rows.known, rows.stops))
    if rows.told_apart is not None:
        start = prepare(job.module, job.params(job.alone(job.state, 0, job.members[0])))
        before = nats(job.module, rows.told_apart, start)
        found.append(partial(remembered, job.module, rows.told_apart, len(rows.prefix), before))
    return found


def nats(module: Any, sides: Sides, params: Any) -> np.ndarray:
    """The loss of each row, f64[N]; `params` are ready to decode, so that equal ones give equal bits."""
    from jaxtune.evaluate.answers import losses
    from jaxtune.evaluate.kept import Kept
    from jaxtune.evaluate.systems import System

    found = losses(System("run", module, params, ""), sides.rows, Kept())
    return np.array(found) / np.maximum(1, [sum(row.mask) for row in sides.rows])


def remembered(module: Any, sides: Sides, virtual: int, before: np.ndarray, params: Any) -> dict[str, float]:
    """How well the two sides are told apart, and what goes on word for word; see the top of the module."""
    from jaxtune.evaluate import statistics
    from jaxtune.evaluate.kept import Kept
    from jaxtune.evaluate.memory import reproduced
    from jaxtune.evaluate.systems import System
    from jaxtune.infer.generation import prepare

    n, system = sides.trained, System("run", module, prepare(module, params), "")
    gain = before - nats(module, sides, system.params)
    found = {"auc": statistics.auc(gain[:n], gain[n:]).value, "auc_p": statistics.higher(gain[:n], gain[n:])}
    same = reproduced(system, sides.rows, virtual, len(sides.rows), Kept())
    trained, others = ([s for s in part if s is not None] for part in (same[:n], same[n:]))
    if trained and others:
        found |= {"verbatim": float(np.mean(trained)), "verbatim_held_out": float(np.mean(others))}
        found["verbatim_p"] = statistics.more_often(sum(trained), len(trained), sum(others), len(others))
    return {f"eval/memory/{name}": value for name, value in found.items()}


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
