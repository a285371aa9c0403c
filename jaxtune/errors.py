"""Errors that end a command without a traceback: wrong input, a signal, a failed run, a full disk."""

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong. The command line prints the message alone and exits with status 2.

    The message names the file, row or field, what was found, what was expected, and what to do. What was found may be
    of any length: the middle of a message is left out beyond LONGEST characters.
    """

    LONGEST = 3000

    def __str__(self) -> str:
        text = super().__str__()
        over = len(text) - self.LONGEST
        return text if over <= 0 else f"{text[:2000]} [... {over:,} characters ...] {text[over + 2000 :]}"


class Help(Exception):
    """`--help` was given: the message is the text to print."""


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was saved. The command line exits with status 3."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """Return `" Did you mean 'x' or 'y'?"` for the closest candidates, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


class RunFailed(Exception):
    """The run itself failed: a non-finite loss, no device memory. The message alone is printed; status 1."""


class DiskError(UserError):
    """Something cannot be written. During a run it becomes a `RunFailed`.

    `number`: the errno, where there was one.
    """

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.number = number

    @property
    def refused(self) -> bool:
        """Whether the path belongs to another user or is read-only."""
        return self.number in (errno.EACCES, errno.EPERM, errno.EROFS)


_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ESTALE}
_REFUSED |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOLCK}
_IN_WORDS = {
    os.strerror(number).lower(): number for number in (*_FULL, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
}


def disk_trouble(error: BaseException | None) -> str | None:
    """A sentence on the disk error in an error or its causes; None if there is none.

    C++ libraries (tensorstore) report it in the message only.
    """
    while error is not None:
        if isinstance(error, DiskError):
            return str(error)
        number, where = None, ""
        if isinstance(error, OSError):
            number, where = error.errno, error.filename2 or error.filename or ""
        else:
            found = next((words for words in _IN_WORDS if words in str(error).lower()), None)
            number = found and _IN_WORDS[found]
        if number in _FULL:
            return f"No room is left on the disk{f' for {_text(where)}' if where else ''}; free some."
        if number in _REFUSED:
            return f"{_text(where) or 'A file of this run'} cannot be read or written: {os.strerror(number)}."
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _text(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)


def printable(text: str) -> str:
    """Text that is safe to print: control characters and half characters are escaped."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)
