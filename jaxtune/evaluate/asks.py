"""Rows as questions with answers, put to a model under an instruction and after examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import data
from jaxtune.data.formats import Conversation, Document, Example, make_reader
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError
from jaxtune.evaluate.rows import Row, row_of
from jaxtune.reading import read_text

INPUT = "{input}"  # in an instruction: where the row's own prompt stands
CUE = "\nLabel:"  # between a text and its label
BETWEEN = "\n\n"  # examples, and after an instruction
FEWEST_OF_A_LABEL = 4  # rows of each answer, on average, from which answers are labels
MOST_LABELS = 200


class Ask(NamedTuple):
    """A row of the data.

    Attributes:
        where: its place in words.
        row: its columns, as the file has them.
        digest: of the columns in use.
        text: what is asked; texts are compared by it.
        answer: what is expected.
        example: what is asked and expected as a model reads it.
        cue: what stands between the text and the answer, where no instruction says how the text is put.
    """

    where: str
    row: Mapping[str, Any]
    digest: int
    text: str
    answer: str
    example: Example
    cue: str = ""


@dataclass(frozen=True)
class Instruction:
    """A user's prompt: a text before the row's own prompt, or around it where it holds {input}; "": none."""

    name: str = "as it is"
    text: str = ""

    def around(self, prompt: str) -> str:
        """The prompt of a row, where the instruction says how it is put."""
        return self.text.replace(INPUT, prompt.strip()) if INPUT in self.text else prompt

    @property
    def before(self) -> str:
        """What stands once, before all examples."""
        return "" if INPUT in self.text or not self.text else self.text + BETWEEN


def read_instruction(file: Path) -> Instruction:
    """Read a prompt from a file; the line break at its end does not count.

    Raises:
        UserError: it is missing or empty.
    """
    if not file.is_file():
        raise UserError(f"--prompt={file}: no such file; expected a text with {INPUT} for the row's prompt.")
    text = read_text(file).removesuffix("\n")
    if not text.strip():
        raise UserError(f"--prompt={file}: the file is empty; leave it out to ask rows as they are.")
    return Instruction(file.stem, text)


def read_asks(sources: str | Sequence[str], tokenizer: Any, **reading: Any) -> list[Ask]:
    """Read rows with a prompt and an answer.

    Args:
        sources: as `jaxtune.data.prepare` takes them.
        tokenizer: decides whether rows are conversations.
        reading: as for `jaxtune.data.reader_settings`.

    Raises:
        UserError: a row has no prompt, or its answer is no text.
    """
    settings = data.reader_settings(tokenizer, **reading)
    found = []
    for name in data.source_names(sources):
        source = data.read(name)
        reader = make_reader(source, **settings)
        for number, row in source:
            where = source.where(number)
            example = reader.convert(where, row)
            asked, answer = _parts(where, example)
            found.append(Ask(where, row, reader.digest(row), asked, answer.strip(), example))
    return found


def read_labelled(sources: str | Sequence[str], form: Any, chat: bool) -> list[Ask]:
    """Read texts with one label each; for a model that continues text, the label follows the text.

    Args:
        sources: as `jaxtune.data.prepare` takes them.
        form: a `jaxtune.data.LabelForm` with the names of the labels.
        chat: whether the model reads conversations.

    Raises:
        UserError: the rows do not fit the form, which has more than one label a text, or values.
    """
    if form.several or form.value:
        raise UserError("objective.problem_type: decide compares answers that are one label each.")
    found = []
    for name in data.source_names(sources):
        source = data.read(name)
        reader = form.reader(source)
        for number, row in source:
            where = source.where(number)
            texts, [label] = reader.convert(where, row)
            text, answer = texts if isinstance(texts, str) else "\n".join(texts), form.names[int(label)]
            if chat:
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
                example: Example = Conversation(turns)
            else:
                example = Document(((text + CUE, False), (f" {answer}", True)))
            found.append(Ask(where, row, reader.digest(row), text, answer, example, "" if chat else CUE))
    return found


def _parts(where: str, example: Example) -> tuple[str, str]:
    """What is asked last, and the answer."""
    if isinstance(example, Conversation):
        *before, last = example.messages
        if last["role"] != "assistant" or not isinstance(last.get("content"), str) or last.get("tool_calls"):
            raise UserError(f"{where}: decide compares texts; this conversation ends with none of the assistant.")
        asked = [m["content"] for m in before if m["role"] == "user" and isinstance(m["content"], str)]
        return asked[-1] if asked else "", last["content"]
    trained = [i for i, (_, trained) in enumerate(example.pieces) if trained]
    prompt = "".join(text for text, _ in example.pieces[: trained[-1]]) if trained else ""
    if not prompt.strip():
        raise UserError(
            f"{where}: decide compares answers, and this row has no prompt before its text: give columns prompt and "
            "completion, or say where answers begin (--config.data.completion_from)."
        )
    return prompt, example.pieces[trained[-1]][0]


def labels_of(asks: Sequence[Ask]) -> tuple[str, ...]:
    """The answers, sorted, where they are labels: two or more, each of them of several rows."""
    names = sorted({ask.answer for ask in asks})
    return tuple(names) if 2 <= len(names) <= min(MOST_LABELS, len(asks) // FEWEST_OF_A_LABEL) else ()


def put(ask: Ask, instruction: Instruction, shots: Sequence[Ask] = ()) -> Example:
    """A row under an instruction and after examples, as the model reads it.

    Text: the instruction, each example with its answer, the row, with an empty line between them. Conversations: the
    instruction is the system message, and examples are earlier turns.
    """
    if isinstance(ask.example, Conversation):
        return _conversation(ask.example, instruction, [shot.example for shot in shots])
    parts = [_joined(_asked(shot, instruction), shot.answer) for shot in shots]
    before = instruction.before + "".join(part + BETWEEN for part in parts)
    prompt = _asked(ask, instruction)
    return Document(((before + prompt, False), (_seam(prompt) + ask.answer, True)))


def _asked(ask: Ask, instruction: Instruction) -> str:
    return instruction.around(ask.text) if INPUT in instruction.text else ask.text + ask.cue


def _conversation(own: Conversation, instruction: Instruction, shots: Sequence[Conversation]) -> Conversation:
    def turns(messages):
        messages = [m for m in messages if m["role"] != "system"]
        return [
            m | {"content": instruction.around(m["content"])}
            if m["role"] == "user" and i == len(messages) - 2 and isinstance(m["content"], str)
            else m
            for i, m in enumerate(messages)
        ]

    system = [m["content"] for m in own.messages if m["role"] == "system"]
    system = [text for text in (instruction.before.strip(), *system) if text]
    messages = [{"role": "system", "content": BETWEEN.join(system)}] if system else []
    for each in (*shots, own):
        messages += turns(each.messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return replace(own, messages=messages, untrained=frozenset(answers[:-1]))


def _joined(prompt: str, answer: str) -> str:
    return prompt + _seam(prompt) + answer


def _seam(prompt: str) -> str:
    return "" if not prompt or prompt[-1].isspace() else " "


def encoded(tokenizer: Any, encoder: Encoder, asks: Sequence[Ask], examples: Sequence[Example]) -> list[Row]:
    """Examples as rows to answer, each of the ask at its place."""
    found = encoder.encode([ask.where for ask in asks], list(examples))
    prefix = len(encoder.prefix)
    return [
        row_of(tokenizer, list(ids), np.asarray(mask, bool), ask.where, prefix)
        for ask, (ids, mask) in zip(asks, found, strict=True)
    ]


def fitted(
    tokenizer: Any,
    encoder: Encoder,
    asks: Sequence[Ask],
    instruction: Instruction | None,
    shots: Sequence[Sequence[Ask]],
    positions: int,
    new: int,
    fix: str = "shorten the prompt",
) -> list[Row]:
    """Rows as they are put to a model; examples that do not fit are left out, the first ones first.

    Args:
        tokenizer: of the model.
        encoder: of it.
        asks: the rows.
        instruction: None: rows as training reads them, without examples.
        shots: the examples of each row.
        positions: that the model knows.
        new: tokens that an answer may have.
        fix: what to do where a row is too long.

    Raises:
        UserError: a row is too long without any example.
    """
    chosen = [list(own) for own in shots]
    examples = [ask.example if instruction is None else put(ask, instruction, own) for ask, own in zip(asks, chosen)]
    rows = encoded(tokenizer, encoder, asks, examples)
    room = positions - new
    while over := [i for i, row in enumerate(rows) if len(row.prompt or ()) > room]:
        for i in over:
            if not chosen[i]:
                name = f"the prompt {instruction.name!r}" if instruction and instruction.text else "its prompt"
                raise UserError(
                    f"{asks[i].where}: with {name} it has {len(rows[i].prompt):,} tokens, and the model's "
                    f"{positions:,} positions leave {room:,} beside an answer of {new}; {fix}."
                )
            chosen[i] = chosen[i][1:]
        again = [put(asks[i], instruction, chosen[i]) for i in over]
        for i, row in zip(over, encoded(tokenizer, encoder, [asks[i] for i in over], again)):
            rows[i] = row
    return rows


def lines(asks: Sequence[Ask]) -> str:
    """Rows as JSON lines, as their files had them."""
    return "".join(json.dumps(ask.row, ensure_ascii=False, default=str) + "\n" for ask in asks)


def labelled_lines(asks: Sequence[Ask]) -> str:
    """What is asked and answered as texts with labels."""
    return "".join(json.dumps({"text": ask.text, "label": ask.answer}, ensure_ascii=False) + "\n" for ask in asks)
