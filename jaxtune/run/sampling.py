"""Texts generated at evaluations: held-out prompts and the user's own prompts, continued greedily."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.train import loop
from jaxtune.train.log import JsonLines
from jaxtune.train.step import TrainState

FILE = "samples.jsonl"
SHOWN = 60  # characters of a prompt's end and of its continuation, on the terminal


class Prompt(NamedTuple):
    """A prompt, and the expected continuation if known."""

    ids: list[int]
    text: str
    expected: str | None


def prompts(experiment: Any, data: Any) -> list[Prompt]:
    """Return the prompts of evaluate.samples and evaluate.prompts.

    Raises:
        UserError: a prompt leaves no room for evaluate.max_new_tokens.
    """
    e, positions = experiment.evaluate, experiment.module.spec.positions
    room = positions - e.max_new_tokens - len(data.prefix)
    found = _held_out(data, e.samples, room) if e.samples else []
    if e.prompts:
        from jaxtune.infer.generation import encode_prompts

        source = experiment.module.reads_source
        chat = any(source.chat for source in data.report.sources)
        for text, ids in zip(e.prompts, encode_prompts(data.tokenizer, e.prompts, chat, source), strict=True):
            if len(ids) > room:
                raise UserError(
                    f"evaluate.prompts: {text[:40]!r} has {len(ids)} tokens, and with "
                    f"evaluate.max_new_tokens={e.max_new_tokens} more it exceeds the {positions} "
                    "positions of the model; shorten one of them."
                )
            found.append(Prompt(ids, text, None))
    return found


def _held_out(data: Any, count: int, room: int) -> list[Prompt]:
    """The first held-out rows with room for an answer, cut where their trained part begins, or in the middle."""
    found, rows, decode = [], data.eval, data.tokenizer.decode
    for i in range(len(rows)):
        tokens, mask = rows[i]
        cut = int(np.argmax(mask > 0)) or len(tokens) // 2
        if 0 < cut <= room and len(found) < count:
            prompt, answer = tokens[:cut].tolist(), tokens[cut:].tolist()
            found.append(
                Prompt(
                    prompt,
                    decode(prompt, skip_special_tokens=True),
                    decode(answer, skip_special_tokens=True).strip(),
                )
            )
    if not found:
        raise UserError(
            f"evaluate.samples: no held-out row leaves room for an answer: at most {room} tokens before it; lower "
            "evaluate.max_new_tokens."
        )
    return found


class Samples:
    """Called after each evaluation: writes `samples.jsonl` for each run, and prints those of a single run.

    Attributes:
        job: the job.
        say: prints a line.
    """

    def __init__(self, job: Any, folders: Mapping[str, Path], step: int, say: Callable[[str], None]):
        """`folders`: name of a run -> its directory. `step`: lines of later steps are dropped."""
        self.job, self.say = job, say
        self.prompts = prompts(job.experiment, job.rows)
        self.files = {name: JsonLines(folder / FILE, step) for name, folder in folders.items() if self.prompts}

    def __call__(self, step: int, state: TrainState, runs: Sequence[loop.Run]) -> None:
        for index, run in enumerate(runs):
            if run.ended or not self.prompts:
                continue
            alone = self.job.alone(state, index, self.job.members[run.index])
            for prompt, text in zip(self.prompts, self._continued(self.job.params(alone)), strict=True):
                self.files[run.name].write(step, {"prompt": prompt.text, "expected": prompt.expected, "text": text})
                if not self.job.stacked:
                    self.say(f"  {_short(prompt.text[-SHOWN:])} -> {_short(text[:SHOWN])}")

    def _continued(self, params: Any) -> list[str]:
        from jaxtune.infer.generation import decode_new, generate

        tokenizer, limit = self.job.rows.tokenizer, self.job.experiment.evaluate.max_new_tokens
        ids = [prompt.ids for prompt in self.prompts]
        new = generate(self.job.module, params, ids, max_new_tokens=limit, eos_ids=self.job.rows.stops)
        return [decode_new(tokenizer, before, after).strip() for before, after in zip(ids, new, strict=True)]

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _short(text: str) -> str:
    """On one line."""
    return " ".join(text.split())
