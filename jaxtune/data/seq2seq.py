"""Rows of a source, which an encoder reads, and a target, which the decoder writes.

    source, target              also document, summary; article, highlights; dialogue, summary; text, summary
    prompt, completion          or instruction (with input) and output, as `jaxtune.data.formats` has them
    translation                 {"en": ..., "de": ...}; data.columns=source=en,target=de says which is which

A row is stored as text to be continued is: the source's tokens, which are not trained, and behind them the target's,
which are. Both are as the tokenizer prepares a text by itself, with the tokens that begin and end one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.data.batches import Assembler, Plan, widths
from jaxtune.data.embeddings import Tokenize
from jaxtune.data.formats import Conversation, Document, Reader, make_reader, own_columns, text_sides
from jaxtune.data.messages import Notes
from jaxtune.data.row_form import RowForm
from jaxtune.data.rows import ROW, Rows
from jaxtune.data.sources import Source, kind
from jaxtune.data.tokenize import check_unicode
from jaxtune.errors import UserError, nearest

NAMES = (
    *(("source", "target"), ("document", "summary"), ("article", "highlights"), ("dialogue", "summary")),
    ("text", "summary"),
)
OURS = {"source": "prompt", "target": "completion"}
TRANSLATION = "translation"
MULTIPLE = 16  # of tokens: what is proposed for targets is rounded up to it
FORMATS = ("prompt_completion", "instruction", "template")


@dataclass
class Seq2SeqForm(RowForm):
    """How such rows are read.

    Attributes:
        columns: our name of a column -> the file's.
        format, template, ignore: as for `make_reader`.
        longest: tokens of a source at most.
        target: tokens of a target at most.
        cuts: longer sources and targets are cut; otherwise their rows are left out.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    format: str = "auto"
    template: str | None = None
    ignore: Sequence[str] = ()
    longest: int = 512
    target: int = 128
    cuts: bool = False

    text = True
    cuts_itself = True

    @property
    def settings(self) -> dict[str, Any]:
        limits = [self.longest, self.target] if self.cuts else [self.target]
        return {
            **{"form": "seq2seq", "columns": dict(self.columns), "format": self.format, "template": self.template},
            **{"ignore": sorted(self.ignore), "limits": limits},
        }

    def reader(self, source: Source) -> Reader:
        number, row = next(iter(source))
        where, columns = source.where(number), own_columns(source, self.columns)
        if isinstance(row.get(TRANSLATION), dict) and TRANSLATION not in self.ignore and self.template is None:
            return self._translations(where, row[TRANSLATION], columns)
        if self.template is None and self.format == "auto" and not columns:
            columns = next(({"source": a, "target": b} for a, b in NAMES if a in row and b in row), {})
        for ours, theirs in columns.items():
            if ours in OURS and theirs not in row:
                raise UserError(
                    f"{where}: no column {theirs!r} for {ours!r} (data.columns).{nearest(theirs, row)} "
                    f"Columns found: {', '.join(row)}."
                )
        if len(OURS.keys() & columns) == 1:
            other = next(iter(OURS.keys() - columns.keys()))
            raise UserError(f"{where}: data.columns names no {other}: give source=THEIRS,target=THEIRS.")
        inner = make_reader(
            source,
            format=self.format,
            columns={OURS.get(ours, ours): theirs for ours, theirs in columns.items()},
            template=self.template,
            ignore=self.ignore,
        )
        if inner.format not in FORMATS:
            raise UserError(
                f"{where}: {inner.format} rows have no source and target, as objective.name=seq2seq needs. Columns "
                f"found: {', '.join(row)}. Name them with data.columns=source=THEIRS,target=THEIRS."
            )

        def convert(where: str, row: dict) -> Document:
            example = inner.convert(where, row)
            if isinstance(example, Conversation):
                raise UserError(f"{where}: messages; objective.name=seq2seq reads a source and a target that are text.")
            given, answer = text_sides(example)
            return _example(where, given.removesuffix("\n"), answer)  # the line break is what joins them for a decoder

        return Reader(inner.format, inner.columns, convert, inner.notes)

    def _translations(self, where: str, first: Mapping[str, Any], columns: Mapping[str, str]) -> Reader:
        notes = Notes()
        if not columns and len(first) == 2:
            a, b = first
            notes.add(f"translated from {a} to {b}, as rows have them in this order", "", where)
        else:
            a, b = (columns.get(ours) for ours in OURS)
        if a is None or b is None or columns.keys() - OURS.keys():
            raise UserError(
                f"{where}: column {TRANSLATION!r} has {', '.join(first)}: name two of them with "
                "data.columns=source=THEIRS,target=THEIRS."
            )

        def convert(where: str, row: dict) -> Document:
            both = row.get(TRANSLATION)
            texts = [both.get(name) if isinstance(both, dict) else None for name in (a, b)]
            for name, text in zip((a, b), texts, strict=True):
                if not isinstance(text, str):
                    found = f"has {kind(text)} as {name!r}" if isinstance(both, dict) else f"is {kind(both)}"
                    raise UserError(f"{where}: column {TRANSLATION!r} {found}, expected text.")
            for name in row.keys() - {TRANSLATION, *self.ignore}:
                notes.add("columns that are not used", name, where)
            return _example(where, *texts)

        return Reader("prompt_completion", (TRANSLATION,), convert, notes)

    def encoder(self, tokenizer: Any) -> "Seq2SeqEncoder":
        return Seq2SeqEncoder(tokenizer, self)

    def lengths(self, rows: Rows) -> np.ndarray:
        """Tokens of each source; above the limit where the source fits and the target does not."""
        source, target = both_lengths(rows)
        return np.where(target > self.target, np.maximum(source, self.longest + 1), source)

    def incomplete(self, rows: Rows) -> np.ndarray:
        return (both_lengths(rows)[1] >= self.target) & self.cuts

    def sides(self, example: Document) -> tuple[str, str]:
        return text_sides(example)

    def pieces(self, example: Document) -> list[tuple[str, bool]]:
        given, answer = self.sides(example)
        return [(f"{given}\n", False), (answer, True)]

    def seen(self, rows: Rows) -> None:
        high = int(np.percentile(both_lengths(rows)[1], 99, method="inverted_cdf"))
        self.target = -(-high // MULTIPLE) * MULTIPLE

    def proposes(self) -> list[tuple[str, Any, str]]:
        return [
            ("data.max_target_length", self.target, "tokens of a target"),
            ("objective.name", "seq2seq", "an encoder reads the source, the decoder writes the target"),
        ]

    def cut_to(self, length: int) -> None:
        self.longest = length

    def render(self, rows: Rows, tokenizer: Any, n: int = 2) -> str:
        """The first n rows: what the encoder reads, and the target, which is trained, between ⟦ and ⟧."""
        shown = []
        for i in range(min(n, len(rows))):
            source, target = split(*rows[i])
            shown.append(
                f"{rows.where(i)}: a source of {len(source)} tokens, a target of {len(target)}\n"
                f"{tokenizer.decode(source.tolist())}\n⟦{tokenizer.decode(target.tolist())}⟧\n"
            )
        return "\n".join(shown)


def _example(where: str, source: str, target: str) -> Document:
    for name, text in (("source", source), ("target", target)):
        if not text.strip():
            raise UserError(f"{where}: the {name} is empty; a row needs a source and a target. Remove the row.")
    return Document(((source, False), (target, True)))


def split(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the source and of the target of a row."""
    at = int(np.argmax(np.asarray(mask) > 0))
    return tokens[:at], tokens[at:]


def both_lengths(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's source and target, i64[R] each."""
    target = np.array([np.count_nonzero(rows[i][1]) for i in range(len(rows))], np.int64)
    return rows.length - target, target


class Seq2SeqEncoder:
    """Sources and targets to token ids, one behind the other, and a mask that is 1 at the target."""

    ROW, MARK, FIRST = ROW, np.dtype("u1"), 0

    def __init__(self, tokenizer: Any, form: Seq2SeqForm):
        self.form, self.notes, self.end = form, Notes(), tokenizer.eos_token_id
        limits = (form.longest, form.target) if form.cuts else (None, None)
        self.tokenize = [Tokenize(tokenizer, limit) for limit in limits]
        if self.end is None:
            raise UserError("the tokenizer has no end-of-sequence token, so the model could never learn to stop.")

    def encode(self, places: list[str], examples: list[Document]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (ids, mask) for each example, in order."""
        sides = [[text for text, _ in example.pieces] for example in examples]
        for place, texts in zip(places, sides, strict=True):
            for text in texts:
                check_unicode(place, text)
        found = [list(t([texts[n] for texts in sides])) for n, t in enumerate(self.tokenize)]
        for place, (source, was_cut), (target, target_cut) in zip(places, *found, strict=True):
            if target[-1:] != [self.end]:
                target = [*target[: self.form.target - 1 if self.form.cuts else None], self.end]
            if was_cut:
                self.notes.add("sources that are cut", f"over {self.form.longest} tokens", place)
            if target_cut:
                self.notes.add("targets that are cut", f"over {self.form.target} tokens", place)
            elif len(target) > self.form.target:
                self.notes.add("rows left out for their target", f"over {self.form.target} tokens", place)
            yield source + target, [0] * len(source) + [1] * len(target)

    def longer(self, made: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        """Of what `encode` yields, as many tokens as its longer side has, the target's among them."""
        ids, mask = made
        shorter = min(sum(mask), len(mask) - sum(mask))
        return ids[shorter:], mask[shorter:]

    def closed(self, rows: Rows, max_length: int, whole: Rows) -> Rows:
        if not len(rows) and len(whole):
            source, target = both_lengths(whole)
            raise UserError(
                f"{whole.labels[0].partition(':')[0]}: every row has a source over data.max_length={max_length} tokens "
                f"(the longest has {source.max()}) or a target over data.max_target_length={self.form.target} (the "
                f"longest has {target.max()}): raise them, or set data.overlength=truncate."
            )
        return rows


class Seq2SeqAssembler(Assembler):
    """Lays rows into source, segments (1 at its tokens) i32[A, B, S], targets i32[A, B, T], weights f32[A, B, T].

    `max_length` and widths are of sources. With each width goes one of targets, so that there are no more programs: a
    batch takes the first width at which both its longest source and its longest target fit.
    """

    def __init__(self, rows: list[Rows], batch_size: int, *args: Any, **more: Any):
        super().__init__(rows, batch_size, *args, **more)
        sides = [both_lengths(r) for r in rows]
        self.target = np.concatenate([target for _, target in sides])
        self.target_widths = self._beside(widths(self.target, batch_size))

    def _beside(self, found: np.ndarray) -> np.ndarray:
        """For each width of sources one of targets, out of `found`: that which as many rows have at most."""
        shares = np.searchsorted(np.sort(self.length), self.widths, side="right") / len(self.length)
        wanted = np.quantile(self.target, shares, method="inverted_cdf")
        return found[np.minimum(np.searchsorted(found, wanted), len(found) - 1)]

    def _lengths(self, rows: Rows) -> np.ndarray:
        return both_lengths(rows)[0]

    def width(self, plan: Plan) -> int:
        source, target = (max((int(of[row].max()) for row in plan), default=1) for of in (self.length, self.target))
        level = max(np.searchsorted(self.widths, source), np.searchsorted(self.target_widths, target))
        return int(self.widths[level])

    def assemble(self, plan: Plan, width: int | None = None) -> dict[str, np.ndarray]:
        n, s = self.batch_size, width or self.width(plan)
        t = int(self.target_widths[min(np.searchsorted(self.widths, s), len(self.widths) - 1)])
        source, segments = np.zeros((n, s), np.int32), np.zeros((n, s), np.int32)
        targets, weights = np.zeros((n, t), np.int32), np.zeros((n, t), np.float32)
        segments[:, 0] = 1  # a row that is missing reads one token, so that nothing is divided by 0
        for b, (member,) in enumerate(plan):
            given, answer = split(*self.rows[self.source[member]][self.index[member]])
            source[b, : len(given)], segments[b, : len(given)] = given, 1
            targets[b, : len(answer)], weights[b, : len(answer)] = answer, 1
        return self._finished({"source": source, "segments": segments, "targets": targets, "weights": weights}, plan, t)
