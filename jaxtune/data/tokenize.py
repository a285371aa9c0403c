"""Examples to token ids with a mask, in flat arrays, cached on disk by content.

The cache holds every row of a source in full; `fit` then drops, truncates or splits rows by selecting spans, without a
copy. So another `max_length` or evaluation split needs no new tokenisation.
"""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxtune.data import cache as token_cache
from jaxtune.data.chat import ChatRenderer, special_tokens, uses_date, with_date
from jaxtune.data.formats import ColumnTypes, Conversation, Document, Reader
from jaxtune.data.messages import Notes
from jaxtune.data.sources import Source, file_of, place_of
from jaxtune.errors import DiskError, UserError
from jaxtune.files import cache_root
from jaxtune.hf.stops import ids_by_file
from jaxtune.reading import parse_json, read_bytes, read_text

FORMAT_VERSION = 2  # raise it when the same input would give other tokens
CHUNK = 512  # rows tokenised at a time
NO_END = -1

# One entry a row: its span in the flat arrays, its line or row number in the source, a hash of its content.
ROW = np.dtype([("start", "<i8"), ("length", "<i4"), ("origin", "<i8"), ("digest", "<u8")])


@dataclass(frozen=True)
class Rows:
    """Tokenised rows as spans of flat arrays, which may be memory-mapped and shared between several Rows.

    tokens i32[N] and mask u8[N] (1: this token is to be predicted) are flat; per row: start i64[R], length i32[R],
    origin i64[R] (its line, or its row counted from 1, in the source), source i32[R] (an index into `labels`) and
    digest u64[R] (of its content); of labelled rows also target f32[R, n], and their mask holds `data.labels`' marks.
    `labels[s].replace("{}", str(origin))` is the row's place in words. `other` holds a second text of each row, in the
    same order: of a pair the rejected answer after its prompt, where the rows themselves are the chosen ones.
    """

    tokens: np.ndarray
    mask: np.ndarray
    start: np.ndarray
    length: np.ndarray
    origin: np.ndarray
    source: np.ndarray
    digest: np.ndarray
    labels: tuple[str, ...]
    target: np.ndarray | None = None
    lost: int = 0  # labelled words of the source that gave no token
    other: "Rows | None" = None

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens i32[n], mask u8[n]) of row i."""
        span = slice(int(self.start[i]), int(self.start[i]) + int(self.length[i]))
        return self.tokens[span], self.mask[span]

    def select(self, index: np.ndarray) -> "Rows":
        """Return the rows of an index or boolean array, over the same flat arrays."""
        pick = {name: getattr(self, name)[index] for name in ("start", "length", "origin", "source", "digest")}
        target = None if self.target is None else self.target[index]
        other = None if self.other is None else self.other.select(index)
        return Rows(self.tokens, self.mask, labels=self.labels, target=target, other=other, **pick)

    @property
    def sides(self) -> tuple["Rows", ...]:
        """The rows, and behind them the second text of each where there is one."""
        return (self,) if self.other is None else (self, self.other)

    @property
    def longest(self) -> np.ndarray:
        """Tokens of each row's longest text, i32[R]."""
        return np.max([side.length for side in self.sides], axis=0)

    def prefixed(self, ids: Sequence[int]) -> "Rows":
        """Return the rows with `ids` before each, which are not to be predicted; the rows are copied."""
        if not ids:
            return self
        rows = [self[i] for i in range(len(self))]
        length = self.length + len(ids)
        return replace(
            self,
            tokens=np.concatenate([part for tokens, _ in rows for part in (ids, tokens)]).astype(np.int32),
            mask=np.concatenate([part for _, mask in rows for part in (np.zeros(len(ids), np.uint8), mask)]),
            start=np.concatenate([[0], np.cumsum(length[:-1], dtype=np.int64)]).astype(np.int64),
            length=length,
            other=None if self.other is None else self.other.prefixed(ids),
        )

    def where(self, i: int) -> str:
        return place_of(self.labels[int(self.source[i])], int(self.origin[i]))

    def file(self, i: int) -> str:
        """The file, or the data set, that row i stands in."""
        return file_of(self.labels[int(self.source[i])], int(self.origin[i]))

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        """Join rows of several sources; more than one part is copied."""
        if len(parts) == 1:
            return parts[0]
        labels: list[str] = []
        tokens, masks, sources = [], [], []
        for part in parts:
            tokens += [part[i][0] for i in range(len(part))]
            masks += [part[i][1] for i in range(len(part))]
            sources.append(part.source + len(labels))
            labels += part.labels
        join = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("length", "origin", "digest")}
        return Rows(
            tokens=np.concatenate(tokens),
            mask=np.concatenate(masks),
            start=np.concatenate([[0], np.cumsum(join["length"][:-1], dtype=np.int64)]).astype(np.int64),
            source=np.concatenate(sources).astype(np.int32),
            labels=tuple(labels),
            target=None if parts[0].target is None else np.concatenate([p.target for p in parts]),
            other=None if parts[0].other is None else Rows.concatenate([p.other for p in parts]),
            **join,
        )


@dataclass
class SourceReport:
    """How many rows and tokens of one source were read, kept and left out, with notes."""

    name: str
    format: str
    rows: int = 0  # in the source
    kept: int = 0  # after `fit`; pieces, where rows were split
    too_long: int = 0
    untrained: int = 0
    equal: int = 0  # pairs whose two answers are the same tokens
    max_length: int = 0
    overlength: str = "drop"
    longest: int = 0  # tokens in the longest row, before `fit`
    tokens: int = 0  # in the rows kept
    trained: int = 0
    cached: bool = False
    on_cache: str | None = None  # a line on the cache for the user
    lost: int = 0  # labelled words that gave no token
    notes: Notes = field(default_factory=Notes)  # what was not used, or left out by the chat template
    chat: bool = False  # whether a chat template made its text
    ends: dict[int, int] = field(default_factory=dict)  # token that ends what is trained -> how often; NO_END: words

    def line(self) -> str:
        """Return one sentence: `FILE (prompt_completion): 7,473 rows: 6,901 kept, 572 over 512 tokens dropped, ...`."""
        done = {"drop": "dropped", "truncate": "truncated", "split": "split"}[self.overlength]
        share = f" ({self.trained / self.tokens:.0%})" if self.tokens else ""
        return (
            f"{self.name} ({self.format}): {self.rows:,} rows: {self.kept:,} kept, "
            f"{self.too_long:,} over {self.max_length:,} tokens {done}, "
            f"{self.untrained:,} without a trained token dropped; "
            f"{self.tokens:,} tokens, {self.trained:,}{share} trained"
            + (f"; {self.equal:,} pairs of two equal answers, which teach nothing, dropped" if self.equal else "")
            + (f"; {self.lost:,} labelled words give no token and are not trained" if self.lost else "")
        )


@dataclass
class Report:
    """What was read and left out. `fingerprint` (hex) changes with anything that changes the rows of a batch."""

    sources: list[SourceReport] = field(default_factory=list)
    eval_sources: list[SourceReport] = field(default_factory=list)
    train_rows: int = 0
    eval_rows: int = 0
    fingerprint: str = ""

    def lines(self) -> list[str]:
        """Return a sentence for each source, and one on the evaluation set."""
        held_out = (
            [f"evaluation: {self.eval_rows:,} rows held out of training"]
            if self.eval_rows and not self.eval_sources
            else []
        )
        evaluation = [f"evaluation: {report.line()}" for report in self.eval_sources]
        notes = [f"{r.name}: {line}" for r in self.sources + self.eval_sources for line in r.notes.lines()]
        notes += [r.on_cache for r in self.sources + self.eval_sources if r.on_cache]
        if endless := self.ends[NO_END]:
            notes.append(
                f"{endless:,} of {self.ends.total():,} trained turns do not end with a special token of the tokenizer: "
                "the model does not learn to stop there"
            )
        return [report.line() for report in self.sources] + evaluation + held_out + notes

    @property
    def ends(self) -> Counter:
        """How often each token ends a turn, or a text, that is trained; NO_END: none does."""
        return sum((Counter(source.ends) for source in self.sources), Counter())


# A directory with a tokenizer has at least one of these files.
TOKENIZER_FILES = (
    *(("tokenizer.json",), ("tokenizer_config.json",), ("vocab.txt",), ("vocab.json", "merges.txt")),
    *(("tokenizer.model",), ("spiece.model",), ("sentencepiece.bpe.model",), ("tekken.json",)),
)
# Texts that must survive encoding and decoding: spaces, code, another script, an emoji, mathematics.
ROUND_TRIP = ("How are you doing today?", "def f(n):\n    return n\n", "你好,世界", "so 😀", "∑ x² ≤ ℕ")


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def load_tokenizer(
    path: str, chat_template: str | None = None, date: str | None = None, new_tokens: Sequence[str] = ()
):
    """Load the tokenizer of a directory or hub id.

    Args:
        path: a directory or hub id.
        chat_template: a file whose text replaces the tokenizer's own template.
        date: the date that chat templates write, YYYY-MM-DD; default: today's, taken once.
        new_tokens: names of tokens to add to it.

    Raises:
        UserError: there is no tokenizer; transformers cannot read or convert it, or text does not survive encoding and
            decoding; it is a slow one, which has no character offsets; the template's file is missing; a new token has
            no name, or is one already.
    """
    tokenizer = _plain_tokenizer(path, new_tokens)
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"model.chat_template: no such file: {chat_template}")
        tokenizer.chat_template = read_text(chat_template)
    if uses_date(tokenizer.chat_template):
        try:
            day = datetime.date.fromisoformat(date) if date else datetime.date.today()
        except ValueError:
            raise UserError(f"data.date: {date!r} is no date; expected YYYY-MM-DD.") from None
        template = tokenizer.chat_template
        named = {name: with_date(text, day) for name, text in template.items()} if isinstance(template, dict) else None
        tokenizer.chat_template = named or with_date(template, day)
    return tokenizer


@contextlib.contextmanager
def tokenizer_with(path: str, new_tokens: Sequence[str]) -> Iterator[Path]:
    """A directory that holds the tokenizer of another, with tokens added, while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="jaxtune-") as folder:
        _plain_tokenizer(path, new_tokens).save_pretrained(folder)
        yield Path(folder)


@functools.lru_cache
def ids_of_new(path: str, new_tokens: tuple[str, ...]) -> tuple[int, ...]:
    """The ids that new tokens get."""
    return tuple(_plain_tokenizer(path, new_tokens).convert_tokens_to_ids(list(new_tokens)))


def _plain_tokenizer(path: str, new_tokens: Sequence[str] = ()):
    import transformers

    folder = Path(path)
    if folder.is_dir() and not has_tokenizer(folder):
        if found := [*folder.glob("tiktoken.model"), *folder.glob("*.tiktoken")]:
            raise UserError(
                f"{path}: no tokenizer.json here. {found[0].name} is read as tokenizer.model, without special tokens: "
                f"cp {shlex.quote(str(found[0]))} {shlex.quote(str(folder / 'tokenizer.model'))}"
            )
        raise UserError(f"{path}: no tokenizer here (tokenizer.json). Name one with model.tokenizer.")
    _check_ids(folder / "tokenizer.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.is_fast:
            check_round_trip(tokenizer, folder)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a panic of the library in Rust is no Exception
        if folder.is_dir():
            ids_by_file(folder)  # of config.json transformers says no more than that a field is wrong
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        first = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise UserError(f"{path}: cannot load a tokenizer: {first}{_conversion(folder)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: {type(tokenizer).__name__} is not a fast tokenizer; a tokenizer.json is needed.")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(
            f"{path}: tokenizer_config.json has model_max_length={tokenizer.model_max_length!r}, no number."
        )
    if new_tokens:
        add_tokens(tokenizer, new_tokens, "model.new_tokens")
    return tokenizer


def _check_ids(file: Path) -> None:
    """Refuse a tokenizer.json with an id for whose table, as long as that, tokenizers would look for memory a minute.

    Raises:
        UserError: it has one.
    """
    if not file.is_file() or not re.search(rb"[:\[,]\s*-?\d{9}", text := read_bytes(file)):
        return
    found = parse_json(text, str(file), halves=True)
    found = found if isinstance(found, dict) else {}
    model, added = found.get("model"), found.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocab.values()] if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if wrong := [i for i in ids if isinstance(i, int) and i >= 10**8]:
        raise UserError(f"{file}: {wrong[0]} is no id of a token.")


def add_tokens(tokenizer: Any, names: Sequence[str], origin: str) -> None:
    """Add tokens to a tokenizer; `origin` names the setting or flag in messages.

    Raises:
        UserError: a name is empty, there twice, or a token already.
    """
    known = tokenizer.get_vocab()
    for name in names:
        if not name.strip() or name in known or list(names).count(name) > 1:
            what = "a token already" if name in known else "empty or given twice"
            raise UserError(f"{origin}: {name!r} is {what}.")
    tokenizer.add_tokens(list(names))


def _conversion(folder: Path) -> str:
    """How to make a tokenizer.json from files of an older format, if there are any."""
    found = [name for names in TOKENIZER_FILES[2:] for name in names if (folder / name).is_file()]
    if not found or (folder / "tokenizer.json").is_file():
        return ""
    code = (
        f"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained('OUT')"
    )
    kinds = {"vocab.txt": "bert", "vocab.json": "gpt2", "spiece.model": "t5", "sentencepiece.bpe.model": "xlm-roberta"}
    kind = kinds.get(found[0], "llama")
    why = (
        ""
        if (folder / "config.json").is_file()
        else f' and a config.json such as {{"model_type": "{kind}"}} beside them'
    )
    return (
        f" It has {', '.join(found)} and no tokenizer.json. With the packages that transformers converts them by "
        f'(pip install sentencepiece protobuf tiktoken){why}, this makes one: python -c "{code}"'
    )


def check_round_trip(tokenizer, folder: Path) -> None:
    """Raise UserError for a tokenizer that loses text without marking it as unknown.

    What its tokenizer.json does to a text (lower case, no spaces) is intended; further losses in transformers are not.
    """
    file = folder / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
    for text in ROUND_TRIP:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            continue
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.strip() == text.strip():
            continue
        covered = {i for start, end in encoding["offset_mapping"] for i in range(start, end)}
        lost = any(i not in covered and not c.isspace() for i, c in enumerate(text))
        if own is not None and not lost:
            kept = own.decode(own.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            lost = kept.strip() == text.strip()
        if lost:
            raise UserError(
                f"{folder}: this tokenizer loses text as transformers {importlib.metadata.version('transformers')} "
                f"reads it: {text!r} comes back as {back!r}. Try another version of transformers, or correct "
                "tokenizer_class in tokenizer_config.json (PreTrainedTokenizerFast takes tokenizer.json as it is)."
            )


def tokenizer_digest(tokenizer) -> str:
    """Return a hex hash of everything in a tokenizer that decides ids: vocabulary, added tokens, chat template."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps(tokenizer.chat_template, sort_keys=True),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


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
                write = functools.partial(_write, source, reader, encoder)
                token_cache.build(folder, write, lambda: _notes(source, reader, encoder))
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
    tokens, mask = io.BytesIO(), io.BytesIO()
    rows = _write(source, reader, encoder, tokens, mask)
    flat = np.frombuffer(tokens.getvalue(), "<i4"), np.frombuffer(mask.getvalue(), encoder.MARK)
    return _rows(source, *flat, rows), _report(source, reader, _notes(source, reader, encoder), False, note)


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


def _write(source: Source, reader: Reader, encoder: Encoder, tokens_file, mask_file) -> np.ndarray:
    """Append the tokens and masks of all rows to two binary files; return the table of ROW."""
    types = ColumnTypes(source, reader.columns)
    table, start = [], 0
    numbered = iter(source)
    while chunk := list(islice(numbered, CHUNK)):
        places = [source.where(number) for number, _ in chunk]
        for number, row in chunk:
            types.check(number, row)
        examples = [reader.convert(place, row) for place, (_, row) in zip(places, chunk)]
        for (number, row), (ids, mask, *label) in zip(chunk, encoder.encode(places, examples)):
            tokens_file.write(np.asarray(ids, "<i4").tobytes())
            mask_file.write(np.asarray(mask, encoder.MARK).tobytes())
            table.append((start, len(ids), number, reader.digest(row), *label))
            start += len(ids)
    return np.array(table, encoder.ROW)


def fit(
    rows: Rows,
    max_length: int,
    overlength: str,
    report: SourceReport,
    first: int = 1,
    lengths: np.ndarray | None = None,
) -> Rows:
    """Bring rows to at most `max_length` tokens and drop those without a token to predict; count both in `report`.

    `overlength`: "drop" the row; "truncate" to its first tokens; "split" into pieces that share one token, so that
    every token of the row but the first is still predicted. `first`: the first token of a row that can be trained.
    `lengths`: what each row takes of max_length; default: the tokens of its longest text.
    """
    if overlength not in ("drop", "truncate", "split"):
        raise UserError(f"data.overlength: unknown {overlength!r}. Known: drop, truncate, split.")
    if max_length < 2:
        raise UserError(f"data.max_length: {max_length} leaves no token to predict; at least 2.")
    lengths = rows.longest if lengths is None else lengths
    long = lengths > max_length
    report.rows += len(rows)
    report.too_long += int(long.sum())
    report.max_length, report.overlength = max_length, overlength
    report.longest = max(report.longest, int(lengths.max(initial=0)))
    if overlength == "drop":
        rows = rows.select(~long)
    elif overlength == "truncate":
        cut = [replace(side, length=np.minimum(side.length, max_length)) for side in rows.sides]
        rows = replace(cut[0], other=cut[1] if cut[1:] else None)
    elif long.any():
        rows = _split(rows, max_length)
    trained = [trained_counts(side, first) for side in rows.sides]
    there = np.all([counts > 0 for counts in trained], axis=0)
    report.untrained += int((~there).sum())
    same = there & equal_sides(rows)
    report.equal += int(same.sum())
    there &= ~same
    kept = rows.select(there)
    report.kept += len(kept)
    report.tokens += sum(int(side.length.sum()) for side in kept.sides)
    report.trained += sum(int(counts[there].sum()) for counts in trained)
    return kept


def equal_sides(rows: Rows) -> np.ndarray:
    """Which rows have a second text of the same tokens, bool[R]: nothing tells the one from the other."""
    found = np.zeros(len(rows), bool)
    if rows.other is not None:
        for i in np.flatnonzero(rows.length == rows.other.length):
            found[i] = np.array_equal(rows[i][0], rows.other[i][0])
    return found


def _split(rows: Rows, max_length: int) -> Rows:
    # The last token of a piece is the first of the next: predicted in one, context in the other.
    stride = max_length - 1
    pieces = np.maximum(1, -(-(rows.length.astype(np.int64) - 1) // stride))
    index = np.repeat(np.arange(len(rows)), pieces)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    split = rows.select(index)
    start = split.start + nth * stride
    length = np.minimum(max_length, split.length - nth * stride).astype(np.int32)
    return replace(split, start=start, length=length)


def trained_counts(rows: Rows, first: int = 1) -> np.ndarray:
    """Count the tokens of each row that are trained, i64[R]."""
    return np.array([np.count_nonzero(rows[i][1][first:]) for i in range(len(rows))], np.int64)


def check_vocabulary(rows: Rows, vocab_size: int, tokenizer) -> None:
    """Raise UserError if a token has no row in an embedding of `vocab_size` rows."""
    largest = int(rows.tokens.max(initial=0))
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer ({len(tokenizer):,} tokens) is larger than the model's embedding ({vocab_size:,} rows): "
            f"the data has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}). "
            "Use the tokenizer that belongs to the model."
        )
