"""The two ways a run ends that are not a defect: wrong input, and a signal."""

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong. The command line prints the message alone and exits with status 2.

    The message names the file, row or field, what was found, what was expected, and what to do.
    """


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was saved. The command line exits with status 3."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """Return `" Did you mean 'x' or 'y'?"` for the closest candidates, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


class RunFailed(Exception):
    """The run itself failed: a non-finite loss, no device memory. The message alone is printed; status 1."""


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the disk is full; libraries in C++ say so in words only."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def printable(text: str) -> str:
    """Text from data as a terminal may be given it: control characters and half characters are spelled out."""
    keep = "\n\t"
    return "".join(
        c if c in keep or (c.isprintable() and not "\ud800" <= c <= "\udfff") else repr(c)[1:-1] for c in text
    )
