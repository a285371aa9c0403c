"""Rows whose answers the student writes itself, between steps, by the decoder of `jaxtune.infer` (on-policy).

    batch of step s -> prompts of the chosen rows -> student after s steps -> its answers -> the same step

What is drawn depends on (train.seed, step) and the weights only, so that a run that was stopped draws the same again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.infer.generation import bucket, generate
from jaxtune.objectives.task import Draws
from jaxtune.train.loop import Run
from jaxtune.train.step import TrainState

LAID = ("tokens", "targets", "positions", "segments", "weights")  # what a batch has of each token


def redraw(job: Any) -> Callable[[int, TrainState, Sequence[Run], Mapping[str, np.ndarray]], dict] | None:
    """Return what puts the students' own answers into the batch of a step; None: the task draws none.

    It takes (steps done, state, its runs, host batch [A, B, ...], or [K, A, B, ...] with rows for each member).
    """
    draws = job.experiment.task.draws
    if draws is None:
        return None
    length, stops = job.rows.length, job.rows.stops

    def drawn(step: int, state: TrainState, runs: Sequence[Run], batch: Mapping[str, np.ndarray]) -> dict:
        if (step + 1) % draws.every:
            return dict(batch)
        if not job.stacked:
            seed = job.experiment.train.seed
            return lay(batch, answers(draws, job.module, job.params(state), batch, (seed, step), length, stops), length)
        found = {}
        for i, run in enumerate(runs):
            member = job.members[run.index]
            own, seed = {k: v[run.index] for k, v in batch.items()}, member.experiment.train.seed
            params = job.params(job.alone(state, i, member))
            found[run.index] = answers(draws, job.module, params, own, (seed, step), length, stops)
        widest = max((len(ids) for rows in found.values() for ids, _ in rows.values()), default=0)
        laid = [
            lay({k: v[i] for k, v in batch.items()}, found.get(i, {}), length, widest) for i in range(len(job.members))
        ]
        return {k: np.stack([one[k] for one in laid]) for k in batch}

    return drawn


def answers(
    draws: Draws,
    module: Any,
    params: Any,
    batch: Mapping[str, np.ndarray],
    key: tuple[int, int],
    length: int,
    stops: Sequence[int],
) -> dict[int, tuple[list[int], int]]:
    """Let a model answer some rows of a batch itself.

    A row's prompt is all before its last trained span. Rows whose prompt leaves no room for a whole answer keep theirs.

    Args:
        draws: which rows, and how.
        module: the model.
        params: its parameters.
        batch: tokens i32[A, B, T], weights f32[A, B, T].
        key: (seed, steps done), of all draws.
        length: most tokens of a row.
        stops: tokens that end an answer.

    Returns:
        {row of A * B: (token ids of prompt and answer, how many of them are the prompt)}.
    """
    tokens, weights = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "weights"))
    random = np.random.default_rng(key)
    chosen, seed = random.random(len(tokens)) < draws.share, int(random.integers(2**31))
    prompts = {}
    for row in np.flatnonzero(chosen & (weights > 0).any(-1)):
        trained = np.flatnonzero(weights[row] > 0)
        gaps = np.flatnonzero(np.diff(trained) > 1)
        first = int(trained[gaps[-1] + 1 if len(gaps) else 0])
        if first + 1 + draws.max_new_tokens <= length:
            prompts[int(row)] = tokens[row, : first + 1].tolist()
    if not prompts:
        return {}
    how = {"max_new_tokens": draws.max_new_tokens, "temperature": draws.temperature, "eos_ids": stops, "seed": seed}
    new = generate(module, params, list(prompts.values()), **how)
    return {row: ([*prompt, *more], len(prompt)) for (row, prompt), more in zip(prompts.items(), new, strict=True)}


def lay(
    batch: Mapping[str, np.ndarray], rows: Mapping[int, tuple[list[int], int]], length: int, widest: int = 0
) -> dict[str, np.ndarray]:
    """Return the batch with these rows in place of its own, trained behind their prompts.

    Args:
        batch: [A, B, ...].
        rows: of `answers`.
        length: most tokens of a row.
        widest: make it wide enough for rows of so many tokens, too; wider batches take one of few widths.
    """
    longest = max([widest, *(len(ids) for ids, _ in rows.values())], default=0)
    before = batch["tokens"].shape
    width = before[-1] if longest <= before[-1] else min(bucket(longest), length)
    more = [(0, 0)] * (len(before) - 1) + [(0, width - before[-1])]
    laid = {name: np.pad(batch[name], more) for name in LAID}
    flat = {name: array.reshape(-1, width) for name, array in laid.items()}
    for row, (ids, prompt) in rows.items():
        n = len(ids)
        for array in flat.values():
            array[row] = 0
        flat["tokens"][row, :n], flat["positions"][row, :n], flat["segments"][row, :n] = ids, np.arange(n), 1
        flat["targets"][row, : n - 1], flat["weights"][row, prompt - 1 : n - 1] = ids[1:], 1
    return {**batch, **laid}
