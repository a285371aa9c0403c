"""Tokenised rows on disk, in a folder named by a hash of everything that decides them, and verified at every use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxtune.errors import DiskError
from jaxtune.files import atomic_dir, hash_of

TOKENS, MASK, ROWS, NOTES, CHECKSUMS = "tokens.bin", "mask.bin", "rows.npy", "said.json", "checksums.json"


def damage(folder: Path) -> str | None:
    """What is wrong with a set: "absent", or the name of a damaged file; None: nothing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        written = json.loads((folder / CHECKSUMS).read_bytes())
        for name in (TOKENS, MASK, ROWS, NOTES):
            if written[name] != hash_of(folder / name):
                return name
        np.load(folder / ROWS)  # raises where it is no array of numbers
    except FileNotFoundError as error:
        return "absent" if Path(error.filename).name == CHECKSUMS else Path(error.filename).name
    except (ValueError, KeyError, TypeError):
        return CHECKSUMS
    return None


def build(
    folder: Path, write: Callable[[IO[bytes], IO[bytes]], np.ndarray], notes: Callable[[], dict[str, Any]]
) -> None:
    """Write a set, replacing one that is there; a reader finds all of it or nothing.

    Args:
        folder: of the set.
        write: writes tokens and masks to the two files it is given and returns the table of rows.
        notes: called after `write`; returns the notes on the data, as JSON values.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        with atomic_dir(folder, overwrite=True) as temporary:
            with open(temporary / TOKENS, "wb") as tokens, open(temporary / MASK, "wb") as mask:
                rows = write(tokens, mask)
            np.save(temporary / ROWS, rows)
            (temporary / NOTES).write_text(json.dumps(notes()), encoding="utf-8")
            checksums = {name: hash_of(temporary / name) for name in (TOKENS, MASK, ROWS, NOTES)}
            (temporary / CHECKSUMS).write_text(json.dumps(checksums))
    except DiskError as error:
        raise DiskError(f"The token cache: {error} Set JAXTUNE_CACHE or data.cache=false.", error.number) from None


def read(folder: Path, mark: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """The tokens and masks of a set, mapped from their files, its table of rows, and the notes on it."""
    tokens, mask = (np.memmap(folder / name, kind, mode="r") for name, kind in ((TOKENS, "<i4"), (MASK, mark)))
    return tokens, mask, np.load(folder / ROWS), json.loads((folder / NOTES).read_text(encoding="utf-8"))
