"""Examples to token ids with a mask, in flat arrays, cached on disk by content.

The cache holds every row of a source in full; `rows.fit` then drops, truncates or splits rows by selecting spans,
without a copy. So another `max_length` or evaluation split needs no new tokenisation.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data import cache as token_cache
from jaxtune.data.chat import ChatRenderer, special_tokens
from jaxtune.data.formats import ColumnTypes, Conversation, Document, Reader
from jaxtune.data.messages import Notes
from jaxtune.data.rows import NO_END, ROW, Rows, SourceReport
from jaxtune.data.sources import Source
from jaxtune.errors import DiskError, UserError
from jaxtune.files import cache_root

FORMAT_VERSION = 2  # raise it when the same input would give other tokens
CHUNK = 512  # rows tokenised at a time
TOLD = 32  # blocks between two lines on how far it is


class Encoder:
    """Examples to (ids, mask), many at a time.

    A document is [BOS, if the tokenizer adds one] + its pieces + EOS. Pieces are tokenised apart, so that the prompt's
    tokens, made at generation from the prompt alone, are a prefix of the row's; a piece that continues another never
    gets the space that sentencepiece tokenizers put before a text.
    """

    # Put before a piece and cut off again, so that the piece is not the start of a text. The second is for a piece that
    # merge with the first.
    ANCHORS = ("\n", "\x02")
    # How rows are stored, and the first token of a row that can be trained.
    ROW, MARK, FIRST = ROW, np.dtype("u1"), 1

    def __init__(self, tokenizer, allow_left_out: Sequence[str] = ()):
        self.notes, self.ends, self.chats = Notes(), Counter(), 0  # counted over all that was encoded
        self.special = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may set both, silently
        self.backend.no_padding()
        self.chat = ChatRenderer(tokenizer, allow_left_out)
        self.eos = tokenizer.eos_token_id
        with_special, without = (self.backend.encode("x", add_special_tokens=s).ids for s in (True, False))
        self.prefix = next(
            (with_special[:i] for i in range(len(with_special)) if with_special[i:][: len(without)] == without), []
        )
        self.prefix = [i for i in self.prefix if i in tokenizer.all_special_ids]
        anchored = self.backend.encode(self.ANCHORS[0] + "x", add_special_tokens=False)
        tail = [i for i, (start, _) in zip(anchored.ids, anchored.offsets) if start >= 1]
        self.prepends = tail != without  # the start of a text is tokenised differently from its middle

    def encode(self, places: list[str], examples: list) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (ids, mask) for each example, in order. `places` name the rows in errors."""
        if self.eos is None and not (self.chat.own and all(isinstance(e, Conversation) for e in examples)):
            raise UserError("the tokenizer has no end-of-sequence token, so the model could never learn to stop.")
        for place, example in zip(places, examples):
            if isinstance(example, Document):
                for text, _ in example.pieces:
                    check_unicode(place, text)
        documents = iter(self._documents([e for e in examples if isinstance(e, Document)]))
        chats = [(p, e) for p, e in zip(places, examples) if isinstance(e, Conversation)]
        conversations = iter(self._conversations(*zip(*chats)) if chats else ())
        for example in examples:
            yield next(documents) if isinstance(example, Document) else next(conversations)

    def _documents(self, documents: list[Document]) -> Iterator[tuple[list[int], list[int]]]:
        pieces = [[p for p in d.pieces if p[0]] for d in documents]
        starts = iter(self._ids([row[0][0] for row in pieces if row]))
        rest = iter(self._continuations([text for row in pieces for text, _ in row[1:]]))
        for row in pieces:
            ids, mask = list(self.prefix), [0] * len(self.prefix)
            for i, (_, trained) in enumerate(row):
                piece = next(rest) if i else next(starts)
                if not i and piece[: len(ids)] == ids:
                    ids, mask = [], []  # the text brings its own BOS
                ids += piece
                mask += [int(trained)] * len(piece)
            ends_itself = ids[-1:] == [self.eos] and len(ids) > len(self.prefix)
            if not ends_itself:
                ids.append(self.eos)
                mask.append(int(row[-1][1]) if row else 0)
            trains = [trained for _, trained in row]
            turns = sum(now and not after for now, after in zip(trains, [*trains[1:], False]))
            self.ends[self.eos] += mask[-1]
            self.ends[NO_END] += turns - mask[-1]  # what is not trained follows them
            yield ids, mask

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Tokenise texts as continuations of another, without the space that is put before the start of a text."""
        if not self.prepends:
            return self._ids(texts)
        result: list[list[int] | None] = [None] * len(texts)
        for anchor in self.ANCHORS:
            todo = [i for i, done in enumerate(result) if done is None]
            batch = self.backend.encode_batch([anchor + texts[i] for i in todo], add_special_tokens=False)
            for i, encoding in zip(todo, batch):
                if all(start >= 1 or end <= 1 for start, end in encoding.offsets):
                    result[i] = [t for t, (_, end) in zip(encoding.ids, encoding.offsets) if end > 1]
        return [ids if ids is not None else self._ids([text])[0] for ids, text in zip(result, texts)]

    def _conversations(self, places: Sequence[str], conversations: Sequence[Conversation]):
        rendered = [self.chat.render(p, c) for p, c in zip(places, conversations)]
        for place, row in zip(places, rendered):
            check_unicode(place, row.text)
        for row in rendered:  # only after all are rendered: if one is refused, the others are rendered again
            self.notes.merge(row.notes)
        self.chats += len(rendered)
        encodings = self.backend.encode_batch([row.text for row in rendered], add_special_tokens=False)
        for (text, spans, unended, _), encoding in zip(rendered, encodings):
            ids, offsets = encoding.ids, encoding.offsets
            if any(s < start < e for start, _ in spans for s, e in offsets):
                ids, offsets = self._seamed(text, [cut for span in spans for cut in span])
            mask = [0] * len(ids)
            token = 0
            for n, (start, end) in enumerate(spans):  # in order, and no token lies across a start: one pass over tokens
                last, content_end = NO_END, start + len(text[start:end].rstrip())
                while token < len(ids) and offsets[token][0] < start:
                    token += 1
                while token < len(ids) and offsets[token][0] < end:
                    mask[token] = 1
                    last = ids[token] if offsets[token][0] < content_end else last
                    token += 1
                if not (unended and n == len(spans) - 1):
                    self.ends[last if last in self.special else NO_END] += 1
            if unended and self.eos is not None:
                ids, mask = [*ids, self.eos], [*mask, 1]
                self.ends[self.eos] += 1
            yield ids, mask

    def _seamed(self, text: str, cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise in parts, cut at `cuts`: a prompt ends there, and no token may span its end."""
        ids, offsets = [], []
        cuts = sorted({0, *cuts, len(text)})
        for a, b in pairwise(cuts):
            part = self._continuations([text[a:b]])[0] if a else self._ids([text[a:b]])[0]
            ids += part
            offsets += [(a, b)] * len(part)  # coarse, but a part is trained as a whole or not at all
        return ids, offsets


def check_unicode(where: str, text: str) -> None:
    """Raise UserError for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start][-40:]
        raise UserError(
            f"{where}: {text[error.start]!r} is half a character (a surrogate), after {before!r}."
        ) from None


def tokenise(
    source: Source,
    reader: Reader,
    encoder: Encoder,
    key: str,
    *,
    cache: bool = True,
    cache_dir: str | Path | None = None,
) -> tuple[Rows, SourceReport]:
    """Return all rows of a source in full, and the report on them, which tells whether they came from the cache.

    `key` (hex) is a hash of everything that decides the tokens; rows are cached in `cache_dir/key`. A damaged set is
    made again; one that another user owns and that cannot be read or written is not used.
    """
    note = None
    if cache:
        folder = Path(cache_dir or cache_root() / "tokens") / key
        try:
            wrong = token_cache.damage(folder)
            if wrong is not None:
                chunks = _chunks(source, reader, encoder)
                token_cache.build(folder, (encoder.MARK, encoder.ROW), chunks, lambda: _notes(source, reader, encoder))
            if wrong not in (None, "absent"):
                note = f"The cached tokens of {source.name} were damaged ({folder / wrong}) and are recomputed."
            *arrays, stored = token_cache.read(folder, encoder.MARK)
            return _rows(source, *arrays), _report(source, reader, stored, wrong is None, note)
        except (PermissionError, DiskError) as error:
            if isinstance(error, DiskError) and not error.refused:
                raise
        note = (
            f"The token cache in {folder.parent} belongs to another user, so {source.name} is tokenised each time; set "
            "JAXTUNE_CACHE to a folder of your own."
        )
    tokens, masks, tables = zip(*_chunks(source, reader, encoder))
    rows = np.concatenate(tables)
    rows["start"] = np.cumsum(rows["length"], dtype=np.int64) - rows["length"]
    flat = np.frombuffer(b"".join(tokens), "<i4"), np.frombuffer(b"".join(masks), encoder.MARK)
    return _rows(source, *flat, rows), _report(source, reader, _notes(source, reader, encoder), False, note)


def stored(
    source: Source, reader: Reader, encoder: Encoder, key: str, cache_dir: str | Path | None, say: Callable[[str], None]
) -> tuple[Path, np.ndarray, SourceReport]:
    """Tokenise a source into the cache block by block: (its folder, the table of its blocks, the report on it).

    Killed at any time, it goes on behind the last whole block. Blocks are verified as they are read.
    """
    folder = Path(cache_dir or cache_root() / "tokens") / key
    before: dict[str, Any] = {}

    def chunks(rows: int, notes: dict[str, Any] | None) -> Iterator[token_cache.Chunk]:
        if rows:
            before.update(notes)
            say(f"{source.name}: {rows:,} rows were tokenised before and are kept")
        return _chunks(source, reader, encoder, rows)

    def notes() -> dict[str, Any]:
        found = _notes(source, reader, encoder)
        if before:
            all_notes, ends = Notes(before["notes"]), Counter(dict(before["ends"]))
            all_notes.merge(Notes(found["notes"]))
            ends.update(dict(found["ends"]))
            found |= {"notes": all_notes.as_json(), "ends": list(ends.items()), "chat": before["chat"] or found["chat"]}
        return found

    count = itertools.count(1)

    def told(rows: int, tokens: int) -> None:
        if next(count) % TOLD == 0:
            say(f"{source.name}: {rows:,} rows tokenised, {tokens:,} tokens")

    try:
        wrong = token_cache.damage(folder, blocks=True)
        if wrong is not None:
            token_cache.build_in_parts(folder, (encoder.MARK, encoder.ROW), chunks, notes, told)
        table, found = token_cache.blocks(folder)
    except PermissionError as error:
        raise UserError(
            f"data.streaming keeps rows in the token cache, and {error.filename} belongs to another user; set "
            "JAXTUNE_CACHE to a folder of your own."
        ) from None
    return folder, table, _report(source, reader, found, wrong is None, None)


def rows_of(source: Source, encoder: Encoder, folder: Path, table: np.ndarray, block: int, verify: bool) -> Rows:
    """The rows of one block of what `stored` wrote."""
    return _rows(source, *token_cache.block(folder, encoder.MARK, table, block, verify))


def _notes(source: Source, reader: Reader, encoder: Any) -> dict[str, Any]:
    """Notes on reading and tokenising a source, as JSON; labelled rows have none from a chat template."""
    notes = Notes(reader.notes.as_json())
    notes.merge(getattr(encoder, "notes", Notes()))
    ends, chat = getattr(encoder, "ends", {}), getattr(encoder, "chats", 0)
    return {"source": source.name, "notes": notes.as_json(), "ends": list(ends.items()), "chat": bool(chat)}


def _report(source: Source, reader: Reader, stored: dict[str, Any], cached: bool, note: str | None) -> SourceReport:
    moved = stored["source"], source.name  # the same content may have been cached from another path
    notes = Notes([(what, detail, n, place.replace(*moved, 1)) for what, detail, n, place in stored["notes"]])
    ends = {token: n for token, n in stored["ends"] if n}
    fields = {"notes": notes, "ends": ends, "chat": stored["chat"], "on_cache": note}
    return SourceReport(source.name, reader.format, cached=cached, **fields)


def _rows(source: Source, tokens: np.ndarray, mask: np.ndarray, rows: np.ndarray) -> Rows:
    names = rows.dtype.names
    found = Rows(
        tokens=tokens,
        mask=mask,
        source=np.zeros(len(rows), np.int32),
        labels=(source.label,),
        target=rows["label"] if "label" in names else None,
        lost=int(rows["lost"].sum()) if "lost" in names else 0,
        **{name: np.ascontiguousarray(rows[name]) for name in ("start", "length", "origin", "digest")},
    )
    if "first" not in names:
        return found
    first = np.ascontiguousarray(rows["first"])  # tokens of the first of two texts, which lie one behind the other
    other = replace(found, start=found.start + first, length=found.length - first, target=None)
    return replace(found, length=first, other=other)


def _chunks(source: Source, reader: Reader, encoder: Encoder, skip: int = 0) -> Iterator[token_cache.Chunk]:
    """Yield (tokens, masks, table of ROW) of `CHUNK` rows at a time; `skip` rows are read and not tokenised."""
    types = ColumnTypes(source, reader.columns)
    numbered = iter(source)
    for number, row in islice(numbered, skip):
        types.check(number, row)
    while chunk := list(islice(numbered, CHUNK)):
        places = [source.where(number) for number, _ in chunk]
        for number, row in chunk:
            types.check(number, row)
        examples = [reader.convert(place, row) for place, (_, row) in zip(places, chunk)]
        tokens, masks, table, start = [], [], [], 0
        for (number, row), (ids, mask, *label) in zip(chunk, encoder.encode(places, examples)):
            tokens.append(np.asarray(ids, "<i4").tobytes())
            masks.append(np.asarray(mask, encoder.MARK).tobytes())
            table.append((start, len(ids), number, reader.digest(row), *label))
            start += len(ids)
        yield b"".join(tokens), b"".join(masks), np.array(table, encoder.ROW)
