"""What the base of a config knows of its training rows, for `jaxtune data --known`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import data
from jaxtune.config.recipe import compute_dtype
from jaxtune.curate.finding import Finding
from jaxtune.curate.stream import TRAIN
from jaxtune.errors import UserError
from jaxtune.evaluate.asks import Instruction, read_asks, read_instruction
from jaxtune.evaluate.kept import key_of
from jaxtune.evaluate.knowledge import Trials, class_of, known_finding, over_cap, recall, shares
from jaxtune.evaluate.metrics import choose
from jaxtune.evaluate.systems import System, identity
from jaxtune.hf import load as hf
from jaxtune.hf.stops import named_ids
from jaxtune.infer.generation import prepare

RIGHT = ("json_exact", "numeric", "exact_match")  # the metric that says whether an answer is right: the first that fits


def know(
    cfg: Any,
    ledger: Any,
    *,
    rows: int | None,
    shots: int,
    prompt: Path | None = None,
    most_unknown: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Finding, dict[str, float], str]:
    """Sort training rows by whether the base knows their answers.

    Args:
        cfg: a resolved config of a model that continues text.
        ledger: of the report on its data.
        rows: how many, drawn by a hash of their content; None: all.
        shots: examples before a question.
        prompt: a file with an instruction.
        most_unknown: the share of unknown rows that a clean set keeps; None: all of them.
        progress: called with the rows done and all.

    Returns:
        (the finding, the share of each class, the rows with a column `known` as JSON lines).

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
    place = {ledger.where(i): i for i in np.flatnonzero(ledger.split == TRAIN)}
    asks = [ask for ask in read_asks(cfg.data.train, tokenizer, **reading) if ask.where in place]
    total = len(asks)
    asks = sorted(asks, key=lambda ask: key_of(ask.digest))[:rows]
    folder = hf.resolve(cfg.model.path)
    module, params = hf.load(folder, dtype=compute_dtype(cfg.model.dtype))
    system = System("base", module, prepare(module, params), identity(folder))
    fits = choose(None, [ask.answer for ask in asks])
    longest = max(len(ids) for ids in tokenizer([a.answer for a in asks], add_special_tokens=False)["input_ids"])
    instruction = Instruction() if prompt is None else read_instruction(prompt)
    trials = Trials(shots=shots, instruction=instruction, max_new_tokens=longest + 4)
    so_far = 0

    def done(count: int) -> None:
        nonlocal so_far
        so_far += count
        progress(so_far, len(asks))

    metric = fits[next(name for name in RIGHT if name in fits)]
    stops = named_ids(tokenizer, folder, None)
    found = recall(system, tokenizer, asks, metric, trials, eos_ids=stops, done=done)
    classes = [class_of(each) for each in found]
    drops = np.zeros(0, np.int64)
    if most_unknown is not None:
        drops = np.sort(np.array([place[asks[i].where] for i in over_cap(classes, most_unknown)], np.int64))
    lines = "".join(
        json.dumps({**ask.row, "known": name}, ensure_ascii=False, default=str) + "\n"
        for ask, name in zip(asks, classes, strict=True)
    )
    return known_finding(asks, classes, total, drops), shares(classes), lines
