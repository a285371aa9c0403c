"""A reward model as a metric of generated answers: `jaxtune eval --scorer reward:DIR`."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate.metrics import Metric
from jaxtune.evaluate.rows import Row
from jaxtune.infer.generation import bucket
from jaxtune.infer.logprobs import batches_by_length, most_tokens
from jaxtune.infer.source import find, open_source, tokenizer_of
from jaxtune.models.classifier import SEQUENCE

PREFIX = "reward:"


class Rewards:
    """Scores answers behind their prompts by a reward model, which reads the tokens that the answering model does.

    Args:
        path: a run, adapter or model with one label a text.
        tokenizer: of the rows.

    Raises:
        UserError: it is no such model, or has other tokens.
    """

    def __init__(self, path: str, tokenizer: Any):
        flag = f"--scorer={PREFIX}{path}"
        self.source, self.tokenizer = find(path), tokenizer
        own = tokenizer_of(self.source).get_vocab()
        wrong = next((token for token, i in sorted(tokenizer.get_vocab().items()) if own.get(token) != i), None)
        if wrong is not None:
            raise UserError(f"{flag}: its tokenizer has another vocabulary: {wrong!r} is not the same token in both.")
        self.module, self.params, _ = open_source(self.source)
        labels = getattr(self.module, "labels", None)
        if labels is None or labels.kind != SEQUENCE or len(labels.names) != 1:
            raise UserError(f"{flag} is no reward model: one gives a single number for a text (objective.name=reward).")

    @cached_property
    def _run(self) -> Any:
        return jax.jit(lambda params, *given: self.module.apply({"params": params}, *given)[:, 0])

    def __call__(self, rows: Sequence[Row], answers: Sequence[str | None]) -> list[float | None]:
        """The score of each answer; None where there is none, or no room for it."""
        found: list[float | None] = [None] * len(rows)
        most = self.module.spec.positions
        texts = {i: self.tokens(rows[i], a) for i, a in enumerate(answers) if a is not None and rows[i].prompt}
        at = [i for i, ids in texts.items() if len(ids) <= most]
        for batch in batches_by_length([len(texts[i]) for i in at], most_tokens()):
            members = [at[j] for j in batch]
            for i, score in zip(members, self.scores([texts[i] for i in members]), strict=True):
                found[i] = float(score)
        return found

    def tokens(self, row: Row, answer: str) -> list[int]:
        """A row's prompt, an answer in the place of its own, and how the row ends."""
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        before, whole = encode(row.asked), encode(row.asked + answer)
        new = whole[len(before) :] if whole[: len(before)] == before else encode(answer)
        special, end = set(self.tokenizer.all_special_ids), list(row.answer)
        while end and end[-1] not in special:
            end.pop()
        ends = [i for i in end if i in special]
        return [*row.prompt, *new, *ends, *row.tokens[len(row.prompt) + len(row.answer) :]]

    def scores(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The score of each text, f32[N]."""
        size = 1 << (len(texts) - 1).bit_length()
        width = min(bucket(max(map(len, texts))), self.module.spec.positions)
        tokens, positions, segments = (np.zeros((size, width), np.int32) for _ in range(3))
        segments[:, 0] = 1
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)], positions[row, : len(ids)], segments[row, : len(ids)] = ids, np.arange(len(ids)), 1
        return np.asarray(self._run(self.params, tokens, positions, segments))[: len(texts)]


def reward_metric(given: str, tokenizer: Any) -> tuple[str, Metric]:
    """The metric that `--scorer reward:DIR` asks for, with its name."""
    rewards = Rewards(given.removeprefix(PREFIX), tokenizer)
    return "reward", Metric("reward", None, share=False, batch=rewards)
