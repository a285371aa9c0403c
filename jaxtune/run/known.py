"""What the base of a config knows of its training rows, for `jaxtune data --known`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import data, models
from jaxtune.config.recipe import compute_dtype
from jaxtune.curate.finding import Finding
from jaxtune.curate.stream import EVAL, TRAIN
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError
from jaxtune.evaluate.asks import Instruction, fitted, read_asks, read_instruction
from jaxtune.evaluate.kept import key_of
from jaxtune.evaluate.knowledge import Trials, class_of, known_finding, over_cap, recall, shares
from jaxtune.evaluate.metrics import rightness
from jaxtune.evaluate.systems import System, identity
from jaxtune.hf import load as hf
from jaxtune.hf.stops import named_ids
from jaxtune.infer.generation import prepare


class Sorted(NamedTuple):
    """What came of sorting rows by what the base knows.

    Attributes:
        finding: for the data report, on the training rows.
        shares: of each class among them.
        train, held_out: the rows with a column `known`, as JSON lines.
    """

    finding: Finding
    shares: dict[str, float]
    train: str
    held_out: str


def know(
    cfg: Any,
    ledger: Any,
    *,
    rows: int | None,
    shots: int,
    prompt: Path | None = None,
    most_unknown: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sorted:
    """Sort training rows by whether the base knows their answers, and the held-out rows, where there are any.

    Args:
        cfg: a resolved config of a model that continues text.
        ledger: of the report on its data.
        rows: how many of either, drawn by a hash of their content; None: all.
        shots: examples before a question, all of them training rows.
        prompt: a file with an instruction.
        most_unknown: the share of unknown rows that a clean set keeps; None: all of them.
        progress: called with the rows done and all.

    Raises:
        UserError: rows have no prompt and answer, or the model does not continue text.
    """
    if cfg.objective.name != "causal_lm":
        raise UserError(
            f"--known asks questions of a model that continues text; objective.name is {cfg.objective.name}."
        )
    tokenizer = data.load_tokenizer(cfg.model.tokenizer, cfg.model.chat_template, cfg.data.date)
    reading = data.reading(cfg.data)
    del reading["allow_left_out"]
    sets = [names for names in (cfg.data.train, cfg.data.eval) if names]
    every = [ask for names in sets for ask in read_asks(names, tokenizer, **reading)]
    every = sorted(every, key=lambda ask: key_of(ask.digest))
    place, held = ({ledger.where(i): i for i in np.flatnonzero(ledger.split == side)} for side in (TRAIN, EVAL))
    trained = [ask for ask in every if ask.where in place]
    asks, others = trained[:rows], [ask for ask in every if ask.where in held][:rows]
    both = [*asks, *others]
    answers = [ask.answer for ask in both]
    longest = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
    folder = hf.resolve(cfg.model.path)
    instruction = Instruction() if prompt is None else read_instruction(prompt)
    trials = Trials(shots=shots, instruction=instruction, max_new_tokens=longest + 4)
    positions = models.build(hf.read_config(folder)).spec.positions
    fitted(tokenizer, Encoder(tokenizer), both, instruction, [[]] * len(both), positions, trials.max_new_tokens)
    module, params = hf.load(folder, dtype=compute_dtype(cfg.model.dtype))
    system = System("base", module, prepare(module, params), identity(folder))
    so_far = 0

    def done(count: int) -> None:
        nonlocal so_far
        so_far += count
        progress(so_far, len(asks) + len(others))

    metric = rightness(answers)
    stops = named_ids(tokenizer, folder, None)
    found = recall(system, tokenizer, both, metric, trials, shown=asks, eos_ids=stops, done=done)
    told = [class_of(each) for each in found]
    classes = told[: len(asks)]
    drops = np.zeros(0, np.int64)
    if most_unknown is not None:
        drops = np.sort(np.array([place[asks[i].where] for i in over_cap(classes, most_unknown)], np.int64))
    lines = [
        json.dumps({**ask.row, "known": name}, ensure_ascii=False, default=str) + "\n"
        for ask, name in zip(both, told, strict=True)
    ]
    finding = known_finding(asks, classes, len(trained), drops)
    return Sorted(finding, shares(classes), "".join(lines[: len(asks)]), "".join(lines[len(asks) :]))
