"""Checks that look at one row at a time."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from jaxtune.curate.finding import ERROR, SHOWN, WARNING, Finding, graded, share
from jaxtune.curate.stream import TRAIN, Chunk, Ledger
from jaxtune.data.chat import special_tokens
from jaxtune.data.formats import Conversation
from jaxtune.data.row_form import RowForm

# Replacement and private-use characters, controls except tab and line ends, marks of no width or that set the direction
# (except joiners, which Persian, Indic scripts and emoji use), and UTF-8 that was once read as Latin-1 or Windows-1252.
ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ue000-\uf8ff\ufeff\ufffd]"
    "|â€[\x80-\xbf™œ“”˜¦\u2018-\u201f]|Ã[\x80-\xbf]|Â[\xa0-\xbf]"
)


ODD_ASCII = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # the part of ODD that plain text can have: faster


class Check(Protocol):
    """The interface of a check: `examine` calls `see` with every chunk, then `findings`."""

    def see(self, chunk: Chunk) -> None: ...

    def findings(self, ledger: Ledger) -> Iterable[Finding]: ...


class RowCheck:
    """A check for a defect of single rows.

    Args:
        name: of the check.
        find: a chunk -> (index in the chunk, a detail or "") of each row with the defect.
        message: follows the number of rows: "12 rows (3.4%) have an empty answer".
        fix: what to do.
        severity: of the finding; None: by the share of rows.
        drops: whether a clean set leaves them out.
    """

    def __init__(
        self,
        name: str,
        find: Callable[[Chunk], Iterable[tuple[int, str]]],
        message: str,
        fix: str,
        *,
        severity: str | None = None,
        drops: bool = False,
    ):
        self.name, self.find, self.message, self.fix = name, find, message, fix
        self.severity, self.drops = severity, drops
        self._index: list[np.ndarray] = []
        self._shown: list[str] = []

    def see(self, chunk: Chunk) -> None:
        found = list(self.find(chunk))
        if not found:
            return
        self._index.append(chunk.first + np.array([k for k, _ in found], np.int64))
        for k, what in found[: SHOWN - len(self._shown)]:
            self._shown.append(f"{chunk.where(k)}: {what or _excerpt(chunk.prompts[k] or chunk.answers[k])}")

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if not self._index:
            return
        index = np.concatenate(self._index)
        yield Finding(
            self.name,
            self.severity or graded(len(index), int(ledger.readable.sum())),
            f"{share(len(index), len(ledger))} {self.message}",
            self.fix,
            tuple(self._shown),
            len(index),
            index[ledger.split[index] == TRAIN] if self.drops else np.zeros(0, np.int64),
        )


class Unreadable:
    """Rows that training refuses. Training would stop at the first; this lists them all."""

    def __init__(self):
        self._broken: list[tuple[int, str]] = []

    def see(self, chunk: Chunk) -> None:
        self._broken += [(i, message) for i, _, message in chunk.broken]

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if self._broken:
            index = np.array([i for i, _ in self._broken], np.int64)
            yield Finding(
                "unreadable",
                ERROR,
                f"{share(len(index), len(ledger))} cannot be read, and training stops at the first",
                "correct them, or leave them out with jaxtune data --write-clean",
                tuple(message for _, message in self._broken[:SHOWN]),
                len(index),
                index[ledger.split[index] == TRAIN],
            )


def _excerpt(text: str, n: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= n else line[: n - 3] + "...")


def has_prompts(chunk: Chunk) -> bool:
    """Whether rows have a prompt; plain text has none."""
    return any(chunk.prompts)


def empty_answers(chunk: Chunk) -> Iterator[tuple[int, str]]:
    """Rows with a prompt and an empty answer: (index in the chunk, "")."""
    if has_prompts(chunk):
        yield from ((k, "") for k, text in enumerate(chunk.answers) if not text.strip())


def empty_prompts(chunk: Chunk) -> Iterator[tuple[int, str]]:
    """Rows whose prompt is empty: (index in the chunk, an excerpt of the answer)."""
    if has_prompts(chunk):
        yield from ((k, _excerpt(chunk.answers[k])) for k, text in enumerate(chunk.prompts) if not text.strip())


def odd_characters(chunk: Chunk) -> Iterator[tuple[int, str]]:
    """Rows with control characters and the like: (index in the chunk, the first one and the text around it)."""
    for k, pair in enumerate(zip(chunk.prompts, chunk.answers)):
        for text in pair:
            if found := (ODD_ASCII if text.isascii() else ODD).search(text):
                around = text[max(0, found.start() - 20) : found.end() + 20]
                yield k, f"{found[0]!a} in {around!r}"
                break


def roles(chunk: Chunk) -> Iterator[tuple[int, str]]:
    """Conversations whose roles do not alternate as expected: (index in the chunk, what is wrong)."""
    for k, example in enumerate(chunk.examples):
        if isinstance(example, Conversation) and (problem := _role_problem([m["role"] for m in example.messages])):
            yield k, problem


def _role_problem(roles: list[str]) -> str:
    """What is unusual in the order of a conversation's roles, or ""."""
    if "system" in roles[1:]:
        return f"a system message at place {roles.index('system', 1) + 1}, not first"
    spoken = [r for r in roles if r != "system"]
    if "assistant" not in spoken:
        return "no assistant's turn: nothing is trained"
    if spoken[0] == "assistant":
        return "the assistant speaks first"
    for i, (a, b) in enumerate(pairwise(spoken), 1):
        if a == b and a != "tool":
            return f"{a} speaks twice in a row, at places {i} and {i + 1}"
    return "" if spoken[-1] == "assistant" else f"ends with {spoken[-1]}: its last message is never answered"


def template_checks(tokenizer: Any) -> list[RowCheck]:
    """Checks that need to know the tokenizer's special tokens."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    specials = sorted(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))
    names = [t for t in tokenizer.all_special_tokens if t.strip()]
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None
    begins = {name[0] for name in names}  # nearly always "<" or "[", and searching for one character is fast
    edges = [t or "" for t in (tokenizer.bos_token, tokenizer.eos_token)]

    def double_bos(chunk: Chunk):
        if bos is not None and len(chunk.ids):
            at = np.flatnonzero(chunk.length >= 2)
            start = chunk.start[at]
            yield from ((int(k), "") for k in at[(chunk.ids[start] == bos) & (chunk.ids[start + 1] == bos)])

    def no_end(chunk: Chunk):
        """Each turn that is trained, and each text, should end with a special token."""
        trained = chunk.mask > 0
        row = np.repeat(np.arange(len(chunk)), chunk.length)
        last = trained & ~np.append(trained[1:] & (row[1:] == row[:-1]), False)  # the last token of each trained run
        ends = [*specials, *([] if eos is None else [eos])]
        found = set()
        for place in np.flatnonzero(last & ~np.isin(chunk.ids, ends)).tolist():
            k = int(row[place])
            first, at = int(chunk.start[k]), place
            if k in found or (
                trained[place : chunk.end[k]][1:].any() and not isinstance(chunk.examples[k], Conversation)
            ):
                continue  # a text has one end only, the last run's
            while at > first and is_blank(int(chunk.ids[at])):  # white space may follow the end token
                at -= 1
            if int(chunk.ids[at]) not in ends:
                found.add(k)
                text = tokenizer.decode(chunk.ids[max(first, at - 20) : at + 1].tolist())
                yield k, f"a trained turn ends with {_excerpt(text[-40:])}"

    @cache
    def is_blank(token: int) -> bool:
        return not tokenizer.decode([token]).strip()

    def special_text(chunk: Chunk):
        for k, (prompt, answer) in enumerate(zip(chunk.prompts, chunk.answers)):
            text = (prompt + "\n" + answer) if prompt else answer
            if not any(c in text for c in begins):
                continue
            if found := pattern.search(text.removeprefix(edges[0]).removesuffix(edges[1])):
                yield k, f"{found[0]!r} in its text"

    checks = [
        RowCheck(
            "double_bos",
            double_bos,
            "begin with two start tokens, which the model never saw in pretraining",
            "remove the start token from the chat template or from the text",
            severity=WARNING,
        ),
        RowCheck(
            "no_end",
            no_end,
            "train no token that ends the answer, so the model does not learn to stop",
            "give a chat template that writes the end-of-turn token after an answer (model.chat_template)",
            severity=ERROR,
        ),
    ]
    if pattern:
        checks.append(
            RowCheck(
                "special_text",
                special_text,
                "have a special token of the tokenizer spelled out in their text: it is read as the token itself",
                "remove it, unless it is meant",
            )
        )
    return checks


def lost_words(chunk: Chunk) -> Iterator[tuple[int, str]]:
    """Rows of tagged words in which some labelled words give no token."""
    trained = chunk.sums(chunk.mask > 0)
    for k, (_, labels) in enumerate(chunk.examples):
        if lost := sum(label is not None for label in labels) - int(trained[k]):
            yield k, f"{lost} of {len(labels)} words"


def label_row_checks(tokenizer: Any, labels: RowForm) -> list[Check]:
    """Return new checks of single labelled rows."""
    lost = RowCheck(
        "lost_words",
        lost_words,
        "have labelled words that give no token, so that their labels are not trained",
        "they are white space or characters that the tokenizer drops: remove them",
        severity=WARNING,
    )
    return [
        Unreadable(),
        *([lost] if labels.per_token else []),
        RowCheck(
            "empty_texts",
            empty_prompts,
            "have an empty text, from which no label can be predicted",
            "fill them in, or leave them out with jaxtune data --write-clean; check data.columns if there are many",
            severity=WARNING,
            drops=True,
        ),
        _odd_characters(),
        *(check for check in template_checks(tokenizer) if check.name == "special_text"),
    ]


def _odd_characters() -> RowCheck:
    return RowCheck(
        "odd_characters",
        odd_characters,
        "have odd characters: controls, replacement marks, no-width marks, or UTF-8 once read as another encoding",
        "save the original as UTF-8 again, or repair the text (the package ftfy does much of it)",
    )


def row_checks(tokenizer: Any) -> list[Check]:
    """Return new checks of single rows."""
    return [
        Unreadable(),
        RowCheck(
            "empty_answers",
            empty_answers,
            "have an empty answer: the model learns to answer nothing",
            "fill them in, or leave them out with jaxtune data --write-clean",
            severity=WARNING,
            drops=True,
        ),
        RowCheck(
            "empty_prompts",
            empty_prompts,
            "have an empty prompt: the answer is trained without a question",
            "fill them in, or leave them out with jaxtune data --write-clean; check data.columns if there are many",
            severity=WARNING,
            drops=True,
        ),
        _odd_characters(),
        RowCheck(
            "roles",
            roles,
            "have an unusual order of roles",
            "a conversation is system (if any), user, assistant, user, assistant, ...: merge or drop the odd turns",
        ),
        *template_checks(tokenizer),
    ]
