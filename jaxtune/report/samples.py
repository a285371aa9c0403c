"""Answers beside the expected ones, with differences marked."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 4000  # characters of a text
ALIKE = 0.5  # share of common words from which the other words are marked

Pieces = list[tuple[str, bool]]  # text, and whether it is marked


@dataclass(frozen=True)
class Text:
    """A text of a sample under its heading; `verdict` is "as expected", "differs" or empty."""

    heading: str
    pieces: Pieces
    verdict: str = ""

    @property
    def empty(self) -> bool:
        return not any(text.strip() for text, _ in self.pieces)


@dataclass(frozen=True)
class Sample:
    """A prompt, or None, and the texts to show side by side."""

    prompt: str | None
    texts: list[Text]


def sample(entry: Mapping[str, Any], *, with_before: bool) -> Sample:
    """Make a sample of an entry {"prompt", "expected", "before", "after"}, any of which may be missing.

    With "beside", {heading: text}, instead of "expected", no answer is compared with the text.
    """
    expected = None if entry.get("expected") is None else str(entry["expected"])
    texts, missed = [], None
    for name in ("before", "after") if with_before else ("after",):
        if name in entry:
            answer = str(entry[name])
            ours, theirs = _marked(expected, answer)
            missed = ours if name == "after" else missed
            texts.append(Text(name, theirs, _verdict(expected, answer)))
    if expected is not None:
        texts.insert(0, Text("expected", missed or [(_cut(expected), False)]))
    texts = [*(Text(name, [(_cut(str(text)), False)]) for name, text in (entry.get("beside") or {}).items()), *texts]
    prompt = entry.get("prompt")
    return Sample(None if prompt is None else _cut(str(prompt)), texts)


def _verdict(expected: str | None, answer: str) -> str:
    if expected is None:
        return ""
    return "as expected" if expected.strip() == answer.strip() or _same_json(expected, answer) else "differs"


def _same_json(a: str, b: str) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except (ValueError, RecursionError):
        return False


def _cut(text: str) -> str:
    """The text, whole unless it is very long."""
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]} … ({rest:,} more characters)"


def _marked(expected: str | None, answer: str) -> tuple[Pieces, Pieces]:
    """Both texts; if they are similar, with the words marked that the other lacks."""
    whole = [(_cut(expected or ""), False)], [(_cut(answer), False)]
    if expected is None or not answer.strip() or _verdict(expected, answer) == "as expected":
        return whole
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", _cut(text)) for text in (expected, answer))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    if matcher.ratio() < ALIKE:
        return whole
    ours: Pieces = []
    theirs: Pieces = []
    for kind, a, b, start, end in matcher.get_opcodes():
        for pieces, part in ((ours, "".join(old[a:b])), (theirs, "".join(new[start:end]))):
            if part:
                pieces.append((part, kind != "equal" and bool(part.strip())))
    return ours, theirs
