"""Atomic writes: a temporary sibling, fsync, rename. A reader finds the old, or the new, never half of it."""

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jaxtune.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def atomic_dir(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into; it becomes `out` when the block ends well, and vanishes otherwise.

    Args:
        out: the target. Its parents are made; an empty folder may stand there already.
        overwrite: replace the folder there, in one step where the file system can. For a writer that owns `out`: what
            an earlier one left when it was killed is swept away.

    Raises:
        UserError: `out` exists and `overwrite` is False, or there is no room on the disk.
    """
    out = Path(out).expanduser().absolute()
    if out.is_symlink() and out.is_dir():
        out = out.resolve()  # what a link names is written, and the link stays
    if not overwrite:
        refuse_existing(out)
    with _plain_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for left in out.parent.glob(f".{out.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for path in temporary.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors makes files that only their owner can read
                _fsync(path)
            _fsync(temporary)
            if not overwrite:
                refuse_existing(out)
            _put_in_place(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _fsync(out.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file, or replace it.

    Raises:
        UserError: there is no room on the disk.
    """
    with atomic_open(path) as file:
        file.write(text)


@contextlib.contextmanager
def atomic_open(path: str | Path) -> Iterator[TextIO]:
    """Give a UTF-8 file to write to; it becomes `path`, or replaces it, when the block ends well.

    Raises:
        UserError: there is no room on the disk.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give the name of a file to write; that becomes `path`, or replaces it, when the block ends well.

    Raises:
        UserError: there is no room on the disk, or nothing can be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)


def refuse_existing(out: Path) -> None:
    """Raise UserError if something stands at `out`, except an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists and is not overwritten; remove it or name another target.")


def require_space(folder: Path, nbytes: int) -> None:
    """Raise UserError if the disk that holds `folder` has no room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise UserError(f"No room in {folder}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free.")


def _put_in_place(new: Path, out: Path) -> None:
    """Rename the folder `new` to `out`; a folder that stood there is then at `new`."""
    try:
        os.rename(new, out)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchange(new, out):
        old = new.with_suffix(".old.tmp")  # the name that a later sweep would find
        os.rename(out, old)
        os.rename(new, out)
        os.rename(old, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _plain_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No room on the disk for {out}; nothing was written there.") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{out} cannot be written: {error.strerror}.") from None
        raise


def cache_root() -> Path:
    """Where tokens and compiled programs are kept: $JAXTUNE_CACHE or ~/.cache/jaxtune."""
    return Path(os.environ.get("JAXTUNE_CACHE") or "~/.cache/jaxtune").expanduser()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it against other processes; the lock goes with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is running in {folder}; wait for it, or give another directory."
            ) from None
        yield
