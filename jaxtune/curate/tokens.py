"""Checks of tokens: lengths against the limit, trained tokens, packing, and how well the tokenizer fits the text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from jaxtune.curate.finding import ERROR, NOTE, SHOWN, WARNING, Finding, graded, share
from jaxtune.curate.sets import SetCheck
from jaxtune.curate.stream import TRAIN, Chunk, Ledger
from jaxtune.data.batches import Batches
from jaxtune.data.messages import Notes
from jaxtune.data.packing import pack

PIECES = 3.0  # tokens a word from which a tokenizer fits its text badly; English takes 1.2 to 1.5
UNKNOWN = 0.001  # share of tokens
BYTES = 0.05
PADDING = 0.5  # share of a batch
PACKED_ROWS = 200_000  # packing is measured on that many rows


class Lengths(SetCheck):
    """What data.max_length drops, cuts or splits.

    Args:
        overlength: "drop", "truncate" or "split".
        positions: tokens of the longest row that the model can read.
    """

    def __init__(self, overlength: str, positions: int):
        self.overlength, self.positions = overlength, positions

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        rows = ledger.rows(TRAIN)
        lengths, limit = ledger.length[rows], ledger.max_length
        long = rows[lengths > limit]
        if not len(long):
            return
        lost = int(lengths.sum() - np.minimum(lengths, limit).sum())
        fate = {
            "drop": "are dropped",
            "truncate": f"are cut, with {lost:,} tokens",
            "split": "are split, later pieces without what came before",
        }[self.overlength]
        longest = int(lengths.max())
        fits = min(self.positions, -(-int(np.percentile(lengths, 99)) // 32) * 32)
        if longest <= self.positions:
            fix = f"data.max_length={longest} keeps all; the model has {self.positions:,} positions"
        else:
            fix = f"the model has {self.positions:,} positions: shorten these rows, or data.overlength=split for text"
        if limit < fits < longest:
            fix += f"; data.max_length={fits} keeps {np.mean(lengths <= fits):.1%}"
        yield Finding(
            "max_length",
            NOTE if self.overlength == "split" else graded(len(long), len(rows)),
            f"{share(len(long), len(rows))} of the training data exceed data.max_length={limit:,} and {fate} "
            f"(the longest has {longest:,})",
            fix,
            ledger.places(long, SHOWN),
            len(long),
        )


class EmptyMasks(SetCheck):
    """Rows without a token to predict, whole or within data.max_length."""

    def __init__(self, overlength: str):
        self.overlength = overlength

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        rows = ledger.rows(TRAIN)
        never = rows[ledger.trained[rows] == 0]
        if len(never):
            yield Finding(
                "empty_masks",
                graded(len(never), len(rows)),
                f"{share(len(never), len(rows))} of the training data have no token to train on and are dropped",
                "a conversation needs an assistant's turn, a pair a completion; jaxtune data --write-clean drops them",
                ledger.places(never, SHOWN),
                len(never),
                never,
            )
        cut = rows[(ledger.trained[rows] > 0) & (ledger.fitted[rows] == 0) & (ledger.length[rows] > ledger.max_length)]
        if self.overlength == "truncate" and len(cut):
            yield Finding(
                "empty_masks",
                graded(len(cut), len(rows)),
                f"{share(len(cut), len(rows))} of the training data lose their whole answer to data.max_length="
                f"{ledger.max_length:,} and are dropped",
                "raise data.max_length, or shorten the prompts",
                ledger.places(cut, SHOWN),
                len(cut),
            )


class NotUsed(SetCheck):
    """Columns and fields that change nothing, and what the chat template left out.

    Args:
        notes: of the readers.
        encoder: of the rows; one of conversations has notes of its own.
    """

    def __init__(self, notes: Sequence[Notes], encoder: Any):
        self.notes, self.encoder = notes, encoder

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        found = Notes()
        for notes in (*self.notes, getattr(self.encoder, "notes", Notes())):
            found.merge(notes)
        for what in dict.fromkeys(what for what, _ in found.found):
            of_kind = {detail: entry for (kind, detail), entry in found.found.items() if kind == what}
            plain = what.endswith("not used")
            yield Finding(
                "not_used" if plain else "left_out",
                NOTE if plain else WARNING,
                f"{what}: " + ", ".join(f"{detail} ({n:,})".strip() for detail, (n, _) in of_kind.items()),
                "nothing to do if the answers do not depend on them; data.ignore leaves them out without this note"
                if plain
                else "make sure this is meant: what is not in the text is not learned",
                tuple(f"{place}: {detail}" if detail else place for detail, (_, place) in of_kind.items())[:SHOWN],
                max(n for n, _ in of_kind.values()),
            )


@dataclass
class _Lengths:
    """The part of `Rows` that packing and batching look at: lengths."""

    length: np.ndarray

    def __len__(self) -> int:
        return len(self.length)


class Packing(SetCheck):
    """How much of a batch is padding, with packing and without."""

    def __init__(self, overlength: str, packing: bool, rows_a_batch: int, group_by_length: bool):
        self.overlength, self.packing, self.rows_a_batch = overlength, packing, rows_a_batch
        self.group_by_length = group_by_length
        self.padded = self.packed = 1.0  # share of a batch that is tokens

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        rows, limit = ledger.rows(TRAIN), ledger.max_length
        lengths = ledger.length[rows]
        lengths = lengths[lengths <= limit] if self.overlength == "drop" else np.minimum(lengths, limit)
        if not len(lengths):
            return
        lengths = np.random.default_rng(0).permutation(lengths)[:PACKED_ROWS].astype(np.int64)
        form = {"batch_size": min(self.rows_a_batch, len(lengths)), "max_length": limit}
        batches = Batches([_Lengths(lengths)], **form, group_by_length=self.group_by_length)
        self.padded = batches.filled(len(lengths) // batches.batch_size)
        self.packed = lengths.sum() / (len(pack(lengths, limit)) * limit)
        if not self.packing and self.padded < PADDING and self.packed > 1.5 * self.padded:
            yield Finding(
                "padding",
                NOTE,
                f"{1 - self.padded:.0%} of a batch is padding; packed it would be {1 - self.packed:.0%}",
                f"data.packing=true does the same work in about {self.padded / self.packed:.0%} of the steps "
                "(a step then holds more rows: lower train.batch_size)",
            )


class TokenQuality:
    """Tokens a word, unknown tokens, characters split into bytes, and tokens that the model does not have."""

    def __init__(self, tokenizer: Any, vocab_size: int | None = None, *, labelled: bool = False):
        self.labelled = labelled  # answers are then not text
        self.vocab_size, self.largest = vocab_size, -1
        self.unknown = tokenizer.unk_token_id
        self.pieces = byte_pieces(tokenizer)
        self.tokens = self.words = self.unknowns = self.bytes = 0
        self._rows: list[tuple[int, float]] = []

    def see(self, chunk: Chunk) -> None:
        self.tokens += len(chunk.ids)
        self.largest = max(self.largest, int(chunk.ids.max(initial=-1)))
        self.words += sum(map(len, chain.from_iterable(chunk.words[:1] if self.labelled else chunk.words)))
        odd = self.pieces[np.minimum(chunk.ids, len(self.pieces) - 1)]
        self.bytes += int(odd.sum())
        if self.unknown is not None:
            is_unknown = chunk.ids == self.unknown
            self.unknowns += int(is_unknown.sum())
            odd = odd | is_unknown
        if odd.any():
            shares = chunk.sums(odd) / np.maximum(chunk.length, 1)
            for k in np.argsort(-shares, kind="stable")[:SHOWN]:
                self._rows.append((chunk.first + int(k), float(shares[k])))
            self._rows = sorted(self._rows, key=lambda pair: -pair[1])[:SHOWN]

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        if not self.tokens:
            return
        rows = tuple(f"{ledger.where(i)}: {s:.0%} of its tokens" for i, s in self._rows if s > 0)
        if self.vocab_size is not None and self.largest >= self.vocab_size:
            yield Finding(
                "vocabulary",
                ERROR,
                f"the data has token {self.largest:,}, and the model's embedding has {self.vocab_size:,} rows",
                "use the tokenizer that belongs to the model",
            )
        if self.unknowns:
            yield Finding(
                "unknown_tokens",
                WARNING if self.unknowns >= UNKNOWN * self.tokens else NOTE,
                f"{self.unknowns:,} tokens ({self.unknowns / self.tokens:.2%}) are unknown to the tokenizer: their "
                "text is lost",
                "replace these characters, or use a model whose tokenizer knows them",
                rows,
            )
        if self.bytes >= BYTES * self.tokens:
            yield Finding(
                "byte_tokens",
                WARNING,
                f"{self.bytes / self.tokens:.1%} of the tokens are parts of characters: the tokenizer does not know "
                "this script",
                "sequences are long and learning is slow: a model trained on this language would do better",
                rows,
            )
        if self.words and self.tokens / self.words > PIECES:
            yield Finding(
                "fertility",
                NOTE,
                f"{self.tokens / self.words:.1f} tokens a word; a tokenizer that fits the text takes 1.2 to 2",
                "normal for code, numbers and scripts without spaces; otherwise the model may not know this language",
            )


def byte_pieces(tokenizer: Any) -> np.ndarray:
    """Which tokens are bytes rather than whole characters, bool[V]: `<0xE2>`, or part of a UTF-8 sequence."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = tokenizer.get_vocab()
    table = np.zeros(max(vocab.values(), default=0) + 1, bool)
    special = set(tokenizer.all_special_tokens)
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    to_byte = {c: b for b, c in bytes_to_unicode().items()}
    for token, i in vocab.items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[i] = int(token[3:5], 16) >= 0x80
        elif byte_level and not token.isascii() and token not in special and all(c in to_byte for c in token):
            try:
                bytes(to_byte[c] for c in token).decode()
            except UnicodeDecodeError:
                table[i] = True
    return table
