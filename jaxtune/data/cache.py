"""Tokenised rows on the disk, in a folder called by a hash of all that decides them, and verified at every use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxtune.errors import DiskError
from jaxtune.files import atomic_dir, hash_of

TOKENS, MASK, ROWS, SAID, CHECKSUMS = "tokens.bin", "mask.bin", "rows.npy", "said.json", "checksums.json"


def damage(folder: Path) -> str | None:
    """What is wrong with a set: "absent", or a file that is not what was written; None: nothing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        written = json.loads((folder / CHECKSUMS).read_bytes())
        for name in (TOKENS, MASK, ROWS, SAID):
            if written[name] != hash_of(folder / name):
                return name
    except FileNotFoundError as error:
        return "absent" if Path(error.filename).name == CHECKSUMS else Path(error.filename).name
    except (ValueError, KeyError, TypeError):
        return CHECKSUMS
    return None


def build(
    folder: Path, write: Callable[[IO[bytes], IO[bytes]], np.ndarray], said: Callable[[], dict[str, Any]]
) -> None:
    """Write a set, replacing one that is there; a reader finds all of it or nothing.

    Args:
        folder: of the set.
        write: writes tokens and masks to the two files it is given and returns the table of rows.
        said: called after `write`; returns the notes on the data, as JSON values.

    Raises:
        DiskError: it cannot be written.
    """
    try:
        with atomic_dir(folder, overwrite=True) as temporary:
            with open(temporary / TOKENS, "wb") as tokens, open(temporary / MASK, "wb") as mask:
                rows = write(tokens, mask)
            np.save(temporary / ROWS, rows)
            (temporary / SAID).write_text(json.dumps(said()), encoding="utf-8")
            checksums = {name: hash_of(temporary / name) for name in (TOKENS, MASK, ROWS, SAID)}
            (temporary / CHECKSUMS).write_text(json.dumps(checksums))
    except DiskError as error:
        raise DiskError(f"The token cache: {error} Set JAXTUNE_CACHE or data.cache=false.", error.number) from None


def read(folder: Path, mark: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """The tokens and masks of a set, mapped from their files, its table of rows, and what was noticed."""
    tokens, mask = (np.memmap(folder / name, kind, mode="r") for name, kind in ((TOKENS, "<i4"), (MASK, mark)))
    return tokens, mask, np.load(folder / ROWS), json.loads((folder / SAID).read_text(encoding="utf-8"))
