"""Labelled rows as token ids and marks, and laid into the arrays of a batch."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data.batches import Plan
from jaxtune.data.lines import LinesAssembler
from jaxtune.data.rows import ROW, Rows
from jaxtune.data.tokenize import check_unicode
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jaxtune.data.labels import LabelForm


class LabelEncoder:
    """Labelled rows to token ids, as the tokenizer prepares a text by itself, with the tokens that begin and end it.

    A mark is 1 at each token of a text. Of a pair it also holds which text the token is of and its type:
    1 + type + 2 * (0 for a special token, 1 or 2 for those of a text). Of tagged words it is 1 + the label's id at the
    first token of each word, else 0: later tokens of a word are not trained, as in BERT.
    """

    FIRST = 0  # the first token can be trained, too

    def __init__(self, tokenizer: Any, form: "LabelForm"):
        self.form = form
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may set both, silently
        self.backend.no_padding()
        self.typed = "token_type_ids" in tokenizer.model_input_names
        self.MARK = np.dtype("<i4" if form.per_token else "u1")
        size = 0 if form.per_token else len(form.names) if form.several else 1
        lost = [("lost", "<i4")] if form.per_token else []
        self.ROW = np.dtype([*ROW.descr, ("label", "<f4", (size,)), *lost])
        self.spaced = form.per_token and self._glues()
        x = self.backend.encode("x")
        self.wraps = any(x.special_tokens_mask)
        behind = len(x.ids) - max((i for i, special in enumerate(x.special_tokens_mask) if not special), default=0) - 1
        self.suffix = x.ids[len(x.ids) - behind :]

    def _glues(self) -> bool:
        """Whether words given separately need a leading space to get the tokens that they have in a text."""

        def second(*words):
            found = self.backend.encode(words, is_pretokenized=True, add_special_tokens=False)
            return [i for i, word in zip(found.ids, found.word_ids) if word == 1]

        text = self.backend.encode("river river", add_special_tokens=False)
        in_text = [i for i, (_, end) in zip(text.ids, text.offsets) if end > len("river")]
        return second("river", "river") != in_text and second(" river", " river") == in_text

    def encode(self, places: list[str], examples: list) -> Iterator[tuple[list[int], Any, Any]]:
        """Yield (ids, marks, labels) for each example, in order; of tagged words also how many gave no token."""
        for place, (text, _) in zip(places, examples):
            check_unicode(place, text if isinstance(text, str) else " ".join(text))
        texts = [text for text, _ in examples]
        if self.spaced:
            texts = [[f" {word}" for word in words] for words in texts]
        encodings = self.backend.encode_batch(texts, is_pretokenized=self.form.per_token)
        for encoding, (text, labels) in zip(encodings, examples):
            if self.form.per_token:
                yield self._tagged(encoding, labels)
            elif isinstance(text, str):
                yield encoding.ids, [1] * len(encoding.ids), labels
            else:
                of = encoding.sequence_ids
                if self.wraps and not any(encoding.special_tokens_mask):
                    raise UserError(
                        "the tokenizer begins and ends a text but not a pair (no pair in the post_processor of its "
                        "tokenizer.json), so nothing would divide two texts. Add it, or take a tokenizer that has it."
                    )
                types = encoding.type_ids if self.typed else [0] * len(of)
                yield encoding.ids, [1 + t + 2 * (0 if s is None else s + 1) for s, t in zip(of, types)], labels

    def _tagged(self, encoding: Any, labels: list[int | None]) -> tuple[list[int], list[int], list, int]:
        words, offsets = encoding.word_ids, encoding.offsets
        marks, at = [0] * len(words), {}
        for i, word in enumerate(words):
            if word is None:
                continue
            first = at.setdefault(word, i)
            # A separate space token before a word is not its first token.
            if self.spaced and i == first + 1 and offsets[first][1] <= 1:
                at[word] = i
        for word, i in at.items():
            if labels[word] is not None:
                marks[i] = 1 + labels[word]
        lost = sum(label is not None and word not in at for word, label in enumerate(labels))
        return encoding.ids, marks, [], lost

    def closed(self, rows: Rows, max_length: int, whole: Rows) -> Rows:
        """`rows` of `whole`, cut to `max_length`; rows that were cut get the tokenizer's end tokens again.

        Of two texts the longer is cut first, as in transformers.
        """
        n = len(self.suffix)
        full = np.flatnonzero(rows.length == max_length)
        origin = np.minimum(np.searchsorted(whole.start, rows.start[full]), len(whole) - 1)
        longer = (whole.start[origin] == rows.start[full]) & (whole.length[origin] > max_length)
        pairs = {int(i): int(o) for i, o in zip(full[longer], origin[longer]) if (whole[o][1] > 2).any()}
        if self.form.per_token:
            pairs = {}
        cut = [i for i in full if i not in pairs and n and rows[i][0][-n:].tolist() != self.suffix]
        if not cut and not pairs:
            return rows
        tokens, mask = np.array(rows.tokens), np.array(rows.mask)
        for i in cut:
            end = int(rows.start[i]) + max_length
            tokens[end - n : end] = self.suffix
            mask[end - n : end] = 0 if self.form.per_token else 1
        for i, o in pairs.items():
            ids, marks = whole[o]
            kept = longest_first(marks, max_length)
            span = slice(int(rows.start[i]), int(rows.start[i]) + max_length)
            tokens[span], mask[span] = ids[kept], marks[kept]
        return replace(rows, tokens=tokens, mask=mask)


def has_types(rows: Rows) -> bool:
    """Whether the marks of the rows hold token types: they are texts with labels."""
    return rows.target is not None and rows.target.shape[1] > 0


def token_types(marks: np.ndarray) -> np.ndarray:
    """The token types in a text's marks, i32[n]."""
    return (np.asarray(marks, np.int32) - 1) & 1


def longest_first(marks: np.ndarray, max_length: int) -> np.ndarray:
    """Which tokens of a pair are kept, bool[n], as with transformers' `truncation="longest_first"`."""
    text = (np.asarray(marks, np.int32) - 1) >> 1
    a, b = int((text == 1).sum()), int((text == 2).sum())
    room = max(0, max_length - (len(marks) - a - b))
    short, long = sorted((a, b))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    keep_a, keep_b = (short, long) if a <= b else (long, short)
    nth = np.where(text == 1, np.cumsum(text == 1), np.cumsum(text == 2))
    return (text == 0) | ((text == 1) & (nth <= keep_a)) | ((text == 2) & (nth <= keep_b))


def label_counts(rows: Sequence[Rows], form: "LabelForm") -> np.ndarray:
    """How often each label occurs in the training rows, i64[C]."""
    counts = np.zeros(len(form.names), np.int64)
    for part in rows:
        if form.per_token:
            for i in range(len(part)):
                counts += np.bincount(part[i][1], minlength=len(counts) + 1)[1:]
        elif form.several:
            counts += part.target.sum(0).astype(np.int64)
        else:
            counts += np.bincount(part.target[:, 0].astype(int), minlength=len(counts))
    return counts


class LabelAssembler(LinesAssembler):
    """Lays labelled rows into arrays: label f32[A,B,n] and weights f32[A,B], or targets and weights [A,R,T].

    tokens, positions, segments and, where pairs of texts have token types, `types` are i32[A,R,T]: R lines hold B rows,
    and with packing `place` i32[A,B] tells where; see `data.lines`.
    """

    @functools.cached_property
    def typed(self) -> bool:
        return any(has_types(r) and token_types(r.mask).any() for r in self.rows)

    def assemble(self, plan: Plan, width: int | None = None) -> dict[str, np.ndarray]:
        lines, t = self.lines(plan), width or self.width(plan)
        n, size = self.batch_size, self.rows[0].target.shape[1]
        tokens, positions, segments, targets, types = (self.empty(t) for _ in range(5))
        label, place = np.zeros((n, size), np.float32), np.zeros(n, np.int32)
        weights = np.zeros(n if size else tokens.shape, np.float32)
        for number, line in enumerate(lines):
            at = 0
            for segment, b in enumerate(line, 1):
                rows, i = self.rows[self.source[plan[b][0]]], self.index[plan[b][0]]
                ids, marks = rows[i]
                here = np.s_[number, at : at + len(ids)]
                tokens[here], positions[here], segments[here] = ids, np.arange(len(ids)), segment
                if size:
                    label[b], weights[b], place[b] = rows.target[i], 1, self.place(number, segment)
                    types[here] = token_types(marks)
                else:
                    targets[here], weights[here] = np.maximum(marks, 1) - 1, marks > 0
                at += len(ids)
        batch = {"tokens": tokens, "positions": positions, "segments": segments, "weights": weights}
        batch |= {"label": label} if size else {"targets": targets}
        batch |= {"types": types} if self.typed else {}
        batch |= {"place": place} if self.packs else {}
        return self.finished(batch, plan, lines, t)
