"""Rows that say which of two answers is better, or whether one answer is good.

    prompt, chosen, rejected         texts, or lists of messages; no prompt where both answers begin with it
    conversations, chosen, rejected  sharegpt: the answers are a message each
    prompt, completion, label        one answer, good or bad (KTO)
    messages, label                  the same as a conversation, whose last turn is judged

The prompt also stands under `instruction` (with `input`), `messages` or `conversations`. A pair may have a `margin`, or
`chosen_score` and `rejected_score`, of which it is the difference.

An objective asks for pairs by `Task.form=PairForm(...)`, which `PairForm.of(data section)` makes of a run's config, and
`Task.assembler=PairAssembler`; for judged answers they are `JudgedForm` and `JudgedAssembler`. What it then gets is:

    Rows         the chosen answers, each behind its prompt, as text to be continued has them: mask 1 at what is trained
    Rows.other   the rejected answers, row by row; of judged answers: the prompt with another row's answer
    Rows.target  f32[R, 1]: the margin (`PairForm(margins=True)`); of judged answers 1 for good, 0 for bad
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.formats import (
    FORMATS,
    MEANT,
    SEEN,
    Columns,
    Document,
    Example,
    Reader,
    make_reader,
    own_columns,
    text_sides,
)
from jaxtune.data.labels import whole_number
from jaxtune.data.messages import Notes, known_roles
from jaxtune.data.pairs import JudgedEncoder, PairEncoder, beside, pair_lengths, shared_prefix
from jaxtune.data.preview import runs
from jaxtune.data.row_form import RowForm
from jaxtune.data.rows import Rows
from jaxtune.data.sources import Source, kind
from jaxtune.errors import UserError, nearest

CHOSEN, REJECTED, MARGIN = "chosen", "rejected", "margin"
SIDES = (CHOSEN, REJECTED)
PROMPTS = ("prompt", "instruction", "messages", "conversations")  # our names of what stands before the answers
SCORES = tuple((f"{side}_score", f"score_{side}", f"{side}-rating", f"{side}_rating") for side in SIDES)
LABELS = ("label", "kto_tag")
MAY = ("input", "context", "system", "history", "tools", "functions")
# What an answer begins after, in texts that hold a whole conversation.
SPEAKERS = ("\n\nAssistant:", "### Response:", "### Assistant:", "\nAssistant:")
TURNS = (*SPEAKERS, "\nA:", "Answer:")
YES, NO = ("true", "1", "good", "yes", "desirable"), ("false", "0", "bad", "no", "undesirable")


class Pair(NamedTuple):
    """Two answers to one prompt, each with it; `margin`: by how much the first is better, where that is known."""

    chosen: Example
    rejected: Example
    margin: float = 0.0


class Judged(NamedTuple):
    """One answer with its prompt, and whether it is good."""

    answer: Example
    good: bool


_BETA = ("objective.beta", 0.1, "the higher, the closer to the base")


@dataclass
class _Answers(RowForm):
    """What pairs and judged answers have in common: how text and conversations are read (`jaxtune.data.formats`).

    Attributes:
        columns: our name of a column -> the file's.
        system, system_as_user, roles, ignore: as for `make_reader`.
        allow_left_out: what the chat template may leave out of a trained turn.
        chat: read texts as conversations of two turns; None: if the tokenizer has a chat template.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    system_as_user: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    allow_left_out: Sequence[str] = ()
    chat: bool | None = None

    text = judged = True

    @classmethod
    def of(cls, data: Mapping[str, Any], **more: Any) -> Any:
        """The form that section `data` of a config describes."""
        names = ("columns", "system", "system_as_user", "roles", "ignore", "allow_left_out")
        return cls(**{name: data[name] for name in names if data[name]}, **more)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "form": type(self).__name__,
            **{"columns": dict(self.columns), "roles": dict(self.roles), "system": self.system},
            **{"system_as_user": self.system_as_user, "ignore": sorted(self.ignore)},
            **{"allow_left_out": sorted(self.allow_left_out), "chat": bool(self.chat)},
            "held_out": "by prompt",
        }

    def on(self, tokenizer: Any) -> "_Answers":
        return replace(self, chat=bool(tokenizer.chat_template)) if self.chat is None else self

    def _known(self, source: Source, known: Sequence[str]) -> dict[str, str]:
        """Our name -> theirs for this source. Raises UserError for a name that is none of ours."""
        columns = own_columns(source, self.columns)
        if wrong := [name for name in columns if name not in known]:
            raise UserError(
                f"data.columns: no column of ours is called {wrong[0]!r} here (ours=theirs)."
                f"{nearest(wrong[0], known)} Known: {', '.join(known)}."
            )
        number, row = next(iter(source))
        needed = {ours: theirs for ours, theirs in columns.items() if ours not in MAY}
        if lost := [(ours, theirs) for ours, theirs in needed.items() if theirs not in row]:
            ours, theirs = lost[0]
            raise UserError(
                f"data.columns: {source.where(number)} has no column {theirs!r} for {ours!r}.{nearest(theirs, row)} "
                f"Columns found: {', '.join(row)}."
            )
        return columns

    def _inner(self, format: str, columns: Mapping[str, str], first: tuple[str, dict], notes: Notes) -> Columns:
        """What reads a prompt and one answer."""
        return Columns(
            format=format,
            columns=columns,
            ignore=tuple(self.ignore),
            completion_from=None,
            prompt_from=None,
            system=self.system,
            system_as_user=self.system_as_user,
            roles=known_roles(self.roles),
            chat=bool(self.chat),
            first=first,
            notes=notes,
        )

    def render(self, rows: Rows, tokenizer: Any, n: int = 2) -> str:
        """The first n rows as the model sees them, what is trained between ⟦ and ⟧."""
        return "".join(f"{self._row(rows, tokenizer, i)}\n" for i in range(min(n, len(rows))))

    def _row(self, rows: Rows, tokenizer: Any, i: int) -> str:
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------------------- pairs


@dataclass
class PairForm(_Answers):
    """How pairs are read.

    Attributes:
        margins: read the margin of each pair; otherwise its column is counted among those that are not used.
        packed: both texts of a pair lie in one packed row.
        shared: there, what both begin with is laid once.
    """

    margins: bool = False
    packed: bool = False
    shared: bool = False

    pairs = True

    def proposes(self) -> list[tuple[str, Any, str]]:
        return [("objective.name", "preference", "pairs of answers: DPO"), _BETA]

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"margins": self.margins}

    def reader(self, source: Source) -> Reader:
        number, row = next(iter(source))
        columns = self._known(source, (*SIDES, *PROMPTS, MARGIN, *MAY))
        where = source.where(number)
        theirs = {name: columns.get(name, name) for name in (*SIDES, *PROMPTS, MARGIN, *MAY)}
        for side in SIDES:
            if theirs[side] not in row:
                judged = ": rows with a label are judged answers, for objective.name=kto" if "label" in row else ""
                raise UserError(
                    f"{where}: no column {theirs[side]!r}, and a pair has a chosen and a rejected answer{judged}. "
                    f"Columns found: {', '.join(row)}. Name them with data.columns=chosen=THEIRS,rejected=THEIRS."
                )
        if theirs[CHOSEN] == theirs[REJECTED]:
            raise UserError(f"data.columns: chosen and rejected are both {theirs[CHOSEN]!r}; name two columns.")
        given = [name for name in PROMPTS if theirs[name] in row and theirs[name] not in self.ignore]
        if len(given) > 1:
            given = [name for name in given if name in columns] or given
        if len(given) > 1:
            raise UserError(
                f"{where}: the prompt could be {' or '.join(theirs[n] for n in given)}: leave one out with "
                f"data.ignore={theirs[given[1]]}."
            )
        prompt = given[0] if given else None
        format = "instruction" if prompt == "instruction" else "prompt_completion"
        asked, answered = FORMATS[format][0]
        may = [name for name in FORMATS[format][1] if theirs.get(name) in row or name in columns]
        inner_columns = {asked: theirs[prompt] if prompt else asked} | {n: theirs[n] for n in may}
        notes = Notes()
        inner = self._inner(format, inner_columns, (where, row), notes)
        asks = inner.theirs(asked)
        margin = self._margin_columns(source, columns) if self.margins else ()
        kept = (*((asks,) if prompt else ()), *(theirs[side] for side in SIDES), *margin)
        kept += tuple(theirs[n] for n in FORMATS[format][1] if theirs[n] not in self.ignore)
        rest = [theirs[n] for n in FORMATS[format][1]]

        def convert(where: str, row: dict) -> Pair:
            for name in row.keys() - {*kept, *self.ignore}:
                self._not_used(where, row, name, notes)
            own = {name: row[name] for name in rest if name in row}
            sides = []
            before, answers, exact = _split(
                where, inner, row.get(asks) if prompt else None, [_there(where, row, theirs[s]) for s in SIDES]
            )
            for answer in answers:
                if exact:
                    sides.append(Document(((before, False), (answer, True))))
                else:
                    sides.append(inner.pair(where, {**own, asks: before, answered: answer}))
            return Pair(*sides, margin=_margin(where, row, margin))

        def common(row: dict) -> Any:
            if prompt:
                return row.get(asks)
            return _begin_alike(*(row.get(theirs[side]) for side in SIDES))

        return Reader("preference", kept, convert, notes, common)

    def _margin_columns(self, source: Source, columns: Mapping[str, str]) -> tuple[str, ...]:
        """The file's column of the margin, or those of the two scores; none where there is neither."""
        there = {name for _, row in islice(source, SEEN) for name in row}
        if (name := columns.get(MARGIN, MARGIN)) in there:
            return (name,)
        for pair in zip(*SCORES):
            if set(pair) <= there:
                return pair
        return ()

    def _not_used(self, where: str, row: dict, name: str, notes: Notes) -> None:
        meant = MEANT.get(name.lower(), name) if name.lower() in MEANT else None
        if name.lower() in MEANT and row[name] not in (None, "", [], {}):
            use = f"read it with data.columns={meant}={name}, or " if meant in MAY else ""
            raise UserError(
                f"{where}: column {name!r} would change what is trained, and is not read: {use}leave it out knowingly "
                f"with data.ignore={name}."
            )
        notes.add("columns that are not used", name, where)

    def lengths(self, rows: Rows) -> np.ndarray:
        return pair_lengths(rows, self.shared) if self.packed else rows.longest

    def said(self, rows: Sequence[Rows]) -> list[str]:
        if not self.shared:
            return []
        apart, laid = (sum(int(pair_lengths(part, shared).sum()) for part in rows) for shared in (False, True))
        return [
            f"objective.share_prompt: {laid:,} tokens are laid in place of {apart:,}, {1 - laid / apart:.0%} fewer: "
            "each prompt once for both answers"
        ]

    def encoder(self, tokenizer: Any) -> "PairEncoder":
        return PairEncoder(tokenizer, self.allow_left_out)

    def sides(self, example: Pair) -> tuple[str, str]:
        """The prompt and the chosen answer."""
        return text_sides(example.chosen)

    def rejected(self, example: Pair) -> str:
        """The rejected answer, as text."""
        return text_sides(example.rejected)[1]

    def pieces(self, example: Pair) -> list[tuple[str, bool]]:
        given, chosen = self.sides(example)
        return [
            (f"{given}\nchosen: ", False),
            (chosen, True),
            ("\nrejected: ", False),
            (self.rejected(example), True),
        ]

    def _row(self, rows: Rows, tokenizer: Any, i: int) -> str:
        """A pair side by side: its prompt, and the two answers in columns."""
        ids, _ = rows[i]
        shared = shared_prefix(rows, i)
        prompt = tokenizer.decode(ids[:shared].tolist(), skip_special_tokens=False)
        texts = []
        for side in rows.sides:
            tokens, marks = side[i]
            marked = "".join(f"⟦{t}⟧" if on else t for t, on in runs(tokenizer, tokens, marks))
            plain = "".join(t for t, on in runs(tokenizer, tokens[:shared], np.zeros(shared, np.uint8)))
            texts.append(marked[len(plain) :] if marked.startswith(plain) else marked)
        counts = [f"{len(side[i][0])} tokens, {int(side[i][1][1:].sum())} trained" for side in rows.sides]
        heads = [f"chosen: {counts[0]}", f"rejected: {counts[1]}"]
        margin = f", margin {rows.target[i, 0]:g}" if rows.target is not None and rows.target[i, 0] else ""
        return f"{rows.where(i)}: a prompt of {shared} tokens{margin}\n{prompt}\n{beside(heads, texts)}"


def _there(where: str, row: dict, column: str) -> Any:
    if row.get(column) is None:
        found = "is null" if column in row else f"is missing. Columns found: {', '.join(row)}"
        raise UserError(f"{where}: column {column!r} {found}; a pair has a chosen and a rejected answer.")
    return row[column]


def _split(where: str, inner: Columns, prompt: Any, sides: list[Any]) -> tuple[Any, list[Any], bool]:
    """(prompt, [chosen, rejected], whether they are texts to be joined as they stand): without what they share.

    Raises:
        UserError: they do not begin with the prompt, where they are whole conversations; there is no prompt.
    """
    if all(isinstance(side, str) for side in sides) and (prompt is None or isinstance(prompt, str)):
        if prompt and len({side.startswith(prompt) for side in sides}) == 2:
            inner.notes.add("pairs of which one answer alone begins with the prompt, and keeps it", "", where)
        return _split_text(where, prompt, sides)
    sides = [[side] if isinstance(side, dict) else side for side in sides]
    whole = [isinstance(side, list) for side in sides]
    told = [
        inner.messages(where, name, side)[0] if is_list else [{"role": "assistant", "content": side}]
        for name, side, is_list in zip(SIDES, sides, whole)
    ]
    for name, side in zip(SIDES, told):
        if not isinstance(side[0]["content"], str):
            raise UserError(f"{where}: column {name!r} is {kind(side[0]['content'])}, expected text or messages.")
    before = [] if prompt is None else _as_messages(where, inner, prompt)
    if before and all(side[: len(before)] == before for side in told):
        told = [side[len(before) :] for side in told]
    elif before and (begins := next((s for s, side in zip(SIDES, told) if side[0]["role"] != "assistant"), None)):
        raise UserError(
            f"{where}: {begins!r} is a whole conversation that does not begin with the prompt: the answers alone, or "
            "conversations that begin with the prompt, are expected."
        )
    elif not before:
        shared = 0
        while shared < min(map(len, told)) - 1 and told[0][shared] == told[1][shared]:
            shared += 1
        before, told = told[0][:shared], [side[shared:] for side in told]
    if not any(m["role"] == "user" for m in before):
        raise UserError(
            f"{where}: no prompt: there is no column prompt, and the two conversations do not begin with the same "
            "messages. Add it, or name it with data.columns=prompt=THEIRS."
        )
    for name, side in zip(SIDES, told):
        if not any(m["role"] == "assistant" for m in side):
            raise UserError(f"{where}: column {name!r} has no answer of the assistant after what both share.")
    return before, told, False


def _begin_alike(chosen: Any, rejected: Any) -> Any:
    """What two whole conversations, or texts, begin with; None: nothing."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        try:
            return _split_text("", None, [chosen, rejected])[0]
        except UserError:
            return None
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return None
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[: min(shared, len(chosen) - 1)] or None


def _as_messages(where: str, inner: Columns, prompt: Any) -> list[dict]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return inner.messages(where, "prompt", [prompt] if isinstance(prompt, dict) else prompt)[0]


def _split_text(where: str, prompt: str | None, sides: list[str]) -> tuple[str, list[str], bool]:
    least = min(map(len, sides))
    shared = sides[0][: next((i for i in range(least) if sides[0][i] != sides[1][i]), least)]
    if prompt:
        if all(side.startswith(prompt) for side in sides):
            return prompt, [side[len(prompt) :] for side in sides], True
        if turn := next((mark for mark in SPEAKERS if mark in shared), None):
            raise UserError(
                f"{where}: both answers are whole conversations (they share {turn.strip()!r}) that do not begin with "
                f"the prompt {prompt[:30]!r}: the answers alone, or texts that begin with the prompt, are expected."
            )
        return prompt, sides, False
    turn = max((shared.rfind(mark) + len(mark) for mark in TURNS if mark in shared), default=0)
    cut = turn or len(shared)
    if not turn and sides[0] != sides[1] and shared and shared[-1] == " ":
        cut -= 1  # a space belongs to the word after it
    if not shared[:cut].strip() and sides[0] != sides[1]:
        raise UserError(
            f"{where}: no prompt: there is no column prompt, and the two texts do not begin alike "
            f"({sides[0][:30]!r}, {sides[1][:30]!r}). Add it, or name it with data.columns=prompt=THEIRS."
        )
    return shared[:cut], [side[cut:] for side in sides], True


def _margin(where: str, row: dict, columns: Sequence[str]) -> float:
    if not columns:
        return 0.0
    values = []
    for name in columns:
        value = row.get(name)
        try:
            if isinstance(value, bool):
                raise TypeError
            values.append(float(value))
        except (TypeError, ValueError):
            raise UserError(f"{where}: column {name!r} is {kind(value)}, expected a number.") from None
        if not math.isfinite(values[-1]):
            raise UserError(f"{where}: column {name!r} is {values[-1]}, expected a finite number.")
    return values[0] if len(values) == 1 else values[0] - values[1]


# ------------------------------------------------------------------------------------------------------ judged answers


@dataclass
class JudgedForm(_Answers):
    """How answers that are good or bad are read."""

    def proposes(self) -> list[tuple[str, Any, str]]:
        return [("objective.name", "kto", "answers judged good or bad"), _BETA]

    def reader(self, source: Source) -> Reader:
        number, row = next(iter(source))
        where = source.where(number)
        known = ("label", *dict.fromkeys(c for needs, may in FORMATS.values() for c in needs + may if c != "text"))
        columns = self._known(source, known)
        label = columns.pop("label", None) or next((name for name in LABELS if name in row), "label")
        if label not in row:
            pairs = ": pairs are for objective.name=preference" if set(SIDES) <= set(row) else ""
            raise UserError(
                f"{where}: no column {label!r}, which says whether an answer is good{pairs}. Columns found: "
                f"{', '.join(row)}. Name it with data.columns=label=THEIRS."
            )
        settings = {"columns": columns, "system": self.system, "system_as_user": self.system_as_user}
        settings |= {"roles": self.roles, "chat": bool(self.chat), "ignore": (*self.ignore, label)}
        inner = make_reader(source, **settings)
        if inner.format == "text":
            raise UserError(
                f"{where}: a text with a label, and no prompt: judged answers are prompt, completion, label or "
                "messages, label. To learn the label itself, set objective.name=sequence_classification."
            )

        def convert(where: str, row: dict) -> Judged:
            return Judged(_last_turn(inner.convert(where, row)), _verdict(where, label, row.get(label)))

        def common(row: dict) -> Any:
            asked = columns.get(FORMATS[inner.format][0][0], FORMATS[inner.format][0][0])
            told = row.get(asked)
            return told[:-1] or None if isinstance(told, list) and len(FORMATS[inner.format][0]) == 1 else told

        return Reader("kto", (*inner.columns, label), convert, inner.notes, common)

    def encoder(self, tokenizer: Any) -> "JudgedEncoder":
        return JudgedEncoder(tokenizer, self.allow_left_out)

    def sides(self, example: Judged) -> tuple[str, str]:
        return text_sides(example.answer)

    def check(self, rows: Sequence[Rows]) -> None:
        good, bad = self.classes(rows).values()
        if not good or not bad:
            which = "good (label true)" if good else "bad (label false)"
            raise UserError(
                f"data.train: all {good + bad:,} answers are {which}, and there is nothing to set them against. "
                "Add the others, or tune on good answers alone with objective.name=causal_lm and data.ignore=label."
            )

    def classes(self, rows: Sequence[Rows]) -> Counter:
        good = sum(int((part.target[:, 0] > 0).sum()) for part in rows)
        return Counter({"good": good, "bad": sum(map(len, rows)) - good})

    def pieces(self, example: Judged) -> list[tuple[str, bool]]:
        given, answer = self.sides(example)
        return [(f"{given}\n{'good' if example.good else 'bad'}: ", False), (answer, True)]

    def _row(self, rows: Rows, tokenizer: Any, i: int) -> str:
        ids, mask = rows[i]
        text = "".join(f"⟦{t}⟧" if on else t for t, on in runs(tokenizer, ids, mask))
        verdict = "good" if rows.target[i, 0] > 0 else "bad"
        return f"{rows.where(i)}: {verdict}; {len(ids)} tokens, {int(mask[1:].sum())} trained\n{text}"


def _last_turn(example: Example) -> Example:
    """A conversation of which the last turn alone is trained."""
    if isinstance(example, Document):
        return example
    turns = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
    return replace(example, untrained=example.untrained | frozenset(turns[:-1]))


def _verdict(where: str, column: str, value: Any) -> bool:
    if isinstance(value, (bool, int, float, str)):
        number = None if isinstance(value, (bool, str)) else whole_number(value)
        said = str(value if number is None else number).strip().lower()
        if said in YES or said in NO:
            return said in YES
    raise UserError(
        f"{where}: column {column!r} is {json.dumps(value, default=str)[:40]}, expected true for a good answer or "
        "false for a bad one."
    )
