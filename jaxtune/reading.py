"""Read users' files: JSON and text of any shape or size, with one error message for anything wrong."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError

LIMIT = 100_000_000  # bytes of a JSON file, and of a safetensors header (as in safetensors itself)


def read_bytes(path: str | Path, limit: int = LIMIT) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        UserError: it is missing, a folder, a pipe or a device, too large, or not readable.
    """
    try:
        # Opened first and examined afterwards, without waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file.")
    with os.fdopen(descriptor, "rb") as file:
        if info.st_size > limit:
            raise UserError(f"{path} has {info.st_size / 1e6:,.0f} MB, more than the {limit / 1e6:,.0f} that are read.")
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_text(path: str | Path, limit: int = LIMIT) -> str:
    """As `read_bytes`, as UTF-8 text.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: {error.reason} at byte {error.start}.") from None


def parse_json(text: str | bytes, where: str, *, halves: bool = False, **hooks: Any) -> Any:
    """Parse JSON.

    Args:
        text: the JSON text.
        where: "FILE" or "FILE:LINE", for error messages.
        halves: allow half a character (a lone surrogate), which models may write.
        hooks: options of `json.loads`.

    Raises:
        UserError: it is not JSON, is nested too deep, has a number beyond range or half a character.
    """
    try:
        value = json.loads(text, **hooks)
        if not halves and "\\ud" in (text if isinstance(text, str) else text.decode()).lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if error.lineno > 1 or "\n" in error.doc.strip() else ""
        raise UserError(f"{where}{line}: not valid JSON: {error.msg}.") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a character (a lone surrogate, \\ud800 to \\udfff).") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not a text file.") from None
    except RecursionError:
        raise UserError(f"{where}: JSON is nested too deep to be read.") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{where}: a value is beyond range: {error}.") from None


def read_json(path: str | Path, *, halves: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object; `halves` as for `parse_json`.

    Raises:
        UserError: it does not.
    """
    value = parse_json(read_text(path), str(path), halves=halves)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def is_inside(file: Path, folder: Path) -> bool:
    """Whether what a file is, links followed, lies in its folder, or in the hub's cache that the folder is part of."""
    real = file.resolve()
    if real.is_relative_to(folder.resolve()):
        return True
    cache = re.match(r"(.*/models--[^/]+)/snapshots/", f"{folder.absolute()}/")
    return cache is not None and real.is_relative_to(Path(cache[1]).resolve() / "blobs")


def not_copied(file: Path) -> str:
    """What is said of a file that is not `is_inside`."""
    return f"{file.name} is a link to a file outside of the model's directory, and was not copied."
