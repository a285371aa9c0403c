"""Tokenised rows on disk, in a folder named by a hash of everything that decides them, and verified at every use.

tokens.bin, mask.bin   flat, as they are written
rows.npy               a record a row: its span, its place in the source, a hash of its content
blocks.npy             a record for each run of rows that is read together by `data.streaming`, with checksums of it
said.json              notes on the data
checksums.json         of the other files
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxtune.errors import DiskError, UserError
from jaxtune.files import atomic_dir, atomic_write_text, hash_of, plain_errors, updating

TOKENS, MASK, ROWS, NOTES, CHECKSUMS = "tokens.bin", "mask.bin", "rows.npy", "said.json", "checksums.json"
BLOCKS, JOURNAL, RECORDS = "blocks.npy", "done.json", "rows.bin"
BLOCK_ROWS, BLOCK_TOKENS = 2**15, 2**20  # a block ends when it has as many of either
BLOCK = np.dtype([("rows", "<i8"), ("tokens", "<i8"), ("check", "<u8", (3,))])  # where it ends; of its three parts

Kinds = tuple[np.dtype, np.dtype]
Chunk = tuple[bytes, bytes, np.ndarray]  # tokens i4, marks, and a record a row, whose spans begin at 0


def damage(folder: Path, *, blocks: bool = False) -> str | None:
    """What is wrong with a set: "absent", or the name of a damaged file; None: nothing.

    Args:
        folder: of the set.
        blocks: its blocks will be verified as they are read (`block`), so that here only their table is.

    Raises:
        OSError: it cannot be read.
    """
    try:
        written = json.loads((folder / CHECKSUMS).read_bytes())
        if blocks and BLOCKS not in written:
            return "absent"  # it was written before there were blocks
        for name in (BLOCKS, NOTES) if blocks else (TOKENS, MASK, ROWS, NOTES):
            if written[name] != hash_of(folder / name):
                return name
        if not blocks:
            np.load(folder / ROWS)  # raises where it is no array of numbers
    except FileNotFoundError as error:
        return "absent" if Path(error.filename).name == CHECKSUMS else Path(error.filename).name
    except (ValueError, KeyError, TypeError):
        return CHECKSUMS
    return None


def build(folder: Path, kinds: Kinds, chunks: Iterable[Chunk], notes: Callable[[], dict[str, Any]]) -> None:
    """Write a set, replacing one that is there; a reader finds all of it or nothing.

    Args:
        folder: of the set.
        kinds: of marks, and of the record of a row.
        chunks: its rows.
        notes: called after the last chunk; returns the notes on the data, as JSON values.

    Raises:
        DiskError: it cannot be written.
    """
    with _as_told("Set JAXTUNE_CACHE or data.cache=false."), atomic_dir(folder, overwrite=True) as temporary:
        with _Writer(temporary, kinds) as out:
            for chunk in chunks:
                out.add(*chunk)
        _close(temporary, out, kinds[1], notes())
        (temporary / RECORDS).unlink()


def build_in_parts(
    folder: Path,
    kinds: Kinds,
    chunks: Callable[[int, dict[str, Any] | None], Iterable[Chunk]],
    notes: Callable[[], dict[str, Any]],
    say: Callable[[int, int], None] = lambda rows, tokens: None,
) -> None:
    """Write a set as `build` does, and keep what is done: killed at any time, the next call goes on behind a block.

    Another process that builds the same set is waited for.

    Args:
        folder: of the set.
        kinds: of marks, and of the record of a row.
        chunks: (rows, notes) -> the chunks behind so many rows, given the notes on these.
        notes: returns the notes on all chunks so far.
        say: called at the end of each block, with the rows and tokens that are done.

    Raises:
        DiskError: it cannot be written.
    """
    part = folder.with_name(f"{folder.name}.part")
    with _as_told("Set JAXTUNE_CACHE to a disk with room."), plain_errors(part):
        part.mkdir(parents=True, exist_ok=True)
        with updating(part):
            if damage(folder, blocks=True) is None:
                shutil.rmtree(part, ignore_errors=True)
                return
            done = _done(part, kinds)
            with _Writer(part, kinds, done) as out:
                for chunk in chunks(out.rows, done and done["notes"]):
                    if out.add(*chunk):
                        out.sync()
                        ends = [[*map(int, b[:2]), *map(int, b[2])] for b in out.blocks]
                        atomic_write_text(part / JOURNAL, json.dumps({"blocks": ends, "notes": notes()}))
                        say(out.rows, out.tokens)
            _close(part, out, kinds[1], notes())  # which may take minutes: what is done stays where it is
            with atomic_dir(folder, overwrite=True) as temporary:
                for name in (TOKENS, MASK, ROWS, BLOCKS, NOTES, CHECKSUMS):
                    _lay(part / name, temporary / name)
            shutil.rmtree(part, ignore_errors=True)


def _done(part: Path, kinds: Kinds) -> dict[str, Any] | None:
    """The journal of an unfinished set; None: there is none, or what it tells of is not there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        done = json.loads((part / JOURNAL).read_bytes())
        done["blocks"] = [(rows, tokens, tuple(check)) for rows, tokens, *check in done["blocks"]]
        if all((part / name).stat().st_size >= size for name, size in _sizes(kinds, *done["blocks"][-1][:2]).items()):
            return done
    return None


def _sizes(kinds: Kinds, rows: int, tokens: int) -> dict[str, int]:
    """Bytes of the three growing files that hold so many."""
    return {TOKENS: 4 * tokens, MASK: kinds[0].itemsize * tokens, RECORDS: kinds[1].itemsize * rows}


class _Writer:
    """The three growing files of a set, cut into blocks: `blocks` holds (rows, tokens, checks) at the end of each."""

    def __init__(self, folder: Path, kinds: Kinds, done: dict[str, Any] | None = None):
        self.blocks: list[tuple[int, int, tuple[int, ...]]] = list(done["blocks"]) if done else []
        self.rows, self.tokens = self.blocks[-1][:2] if self.blocks else (0, 0)
        self.files = []
        with contextlib.ExitStack() as opened:
            for name, size in _sizes(kinds, self.rows, self.tokens).items():
                self.files.append(opened.enter_context(open(folder / name, "ab")))
                self.files[-1].truncate(size)  # behind the last block is what was being written
            self.opened = opened.pop_all()
        self._fresh()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *failed: Any) -> None:
        if not any(failed) and self.rows > (self.blocks[-1][0] if self.blocks else 0):
            self._end()
        self.opened.close()

    def _fresh(self) -> None:
        self.hashes = [xxhash.xxh3_64() for _ in range(3)]

    def _end(self) -> None:
        self.blocks.append((self.rows, self.tokens, tuple(found.intdigest() for found in self.hashes)))
        self._fresh()

    def add(self, tokens: bytes, mask: bytes, table: np.ndarray) -> bool:
        """Write a chunk; return whether a block ends here."""
        table = table.copy()
        table["start"] += self.tokens
        for file, found, data in zip(self.files, self.hashes, (tokens, mask, table.tobytes()), strict=True):
            file.write(data)
            found.update(data)
        self.rows, self.tokens = self.rows + len(table), self.tokens + len(tokens) // 4
        rows, tokens, _ = self.blocks[-1] if self.blocks else (0, 0, ())
        whole = self.rows - rows >= BLOCK_ROWS or self.tokens - tokens >= BLOCK_TOKENS
        if whole:
            self._end()
        return whole

    def sync(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())


def _close(folder: Path, out: _Writer, row: np.dtype, notes: dict[str, Any]) -> None:
    """Turn the records into an array's file, and write the rest."""
    with open(folder / ROWS, "wb") as rows, open(folder / RECORDS, "rb") as records:
        header = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (out.rows,)}
        np.lib.format.write_array_header_1_0(rows, header)
        shutil.copyfileobj(records, rows, 2**24)
    np.save(folder / BLOCKS, np.array(out.blocks, BLOCK))
    (folder / NOTES).write_text(json.dumps(notes), encoding="utf-8")
    checksums = {name: hash_of(folder / name) for name in (TOKENS, MASK, ROWS, BLOCKS, NOTES)}
    (folder / CHECKSUMS).write_text(json.dumps(checksums))


def _lay(file: Path, there: Path) -> None:
    """Give a file a second name, or where the file system knows no links, another one."""
    try:
        os.link(file, there)
    except OSError:
        os.replace(file, there)


@contextlib.contextmanager
def _as_told(advice: str) -> Iterator[None]:
    try:
        yield
    except DiskError as error:
        raise DiskError(f"The token cache: {error} {advice}", error.number) from None


def read(folder: Path, mark: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """The tokens and masks of a set, mapped from their files, its table of rows, and the notes on it."""
    tokens, mask = (np.memmap(folder / name, kind, mode="r") for name, kind in ((TOKENS, "<i4"), (MASK, mark)))
    return tokens, mask, np.load(folder / ROWS), json.loads((folder / NOTES).read_text(encoding="utf-8"))


def blocks(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The table of a set's blocks, and the notes on it."""
    return np.load(folder / BLOCKS), json.loads((folder / NOTES).read_text(encoding="utf-8"))


def block(folder: Path, mark: np.dtype, table: np.ndarray, i: int, verify: bool) -> tuple[np.ndarray, ...]:
    """The tokens, masks and records of block i, mapped from their files; spans begin at 0.

    Raises:
        UserError: they are not what was written.
    """
    first, last = table[i - 1] if i else np.zeros((), BLOCK), table[i]
    try:
        records = np.load(folder / ROWS, mmap_mode="r")[first["rows"] : last["rows"]]
        span, at = int(last["tokens"] - first["tokens"]), int(first["tokens"])
        tokens, mask = (
            np.memmap(folder / name, kind, mode="r", offset=at * np.dtype(kind).itemsize, shape=(span,))
            for name, kind in ((TOKENS, "<i4"), (MASK, mark))
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"The tokens in {folder} cannot be read ({error}); remove that folder and start again."
        ) from None
    if verify:
        found = [xxhash.xxh3_64_intdigest(part) for part in (tokens, mask, records.tobytes())]
        if found != last["check"].tolist():
            raise UserError(
                f"Block {i + 1} of the tokens in {folder} is damaged; remove that folder and start again: the rows are "
                "tokenised anew."
            )
    records = np.array(records)
    records["start"] -= at
    return tokens, mask, records
