"""Atomic writes: a temporary sibling, fsync, rename. A reader finds the old, or the new, never half of it.

A temporary is locked while its process lives. An unlocked one was left by a process that was killed: the next
writer of the same name removes it, and whoever takes the directory (`exclusive`) removes them all.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import xxhash

from jaxtune.errors import DiskError, UserError

_CHUNK = 2**24  # bytes read at a time
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def atomic_dir(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `out` when the block succeeds, and is removed otherwise.

    Args:
        out: the target. Its parents are made; an empty folder may stand there already.
        overwrite: replace the folder there, in one step where the file system can.

    Raises:
        UserError: `out` exists and `overwrite` is False, or there is no room on the disk, or nothing can be written.
    """
    out = Path(out).expanduser().absolute()
    if out.is_symlink() and out.is_dir():
        out = out.resolve()  # the target of a link is written, and the link stays
    if not overwrite:
        refuse_existing(out)
    with plain_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent, out.name)
        temporary, lock = _temporary(out, os.mkdir)
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
            os.close(lock)
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
    """Yield a UTF-8 file to write to; it becomes `path`, or replaces it, when the block succeeds.

    Raises:
        UserError: there is no room on the disk.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the name of a file to write; it becomes `path`, or replaces it, when the block succeeds.

    Raises:
        UserError: there is no room on the disk, or nothing can be written there.
    """
    path = Path(path)
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        temporary, lock = _temporary(path, Path.touch)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)
        _fsync(path.parent)


def _temporary(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """Make a temporary sibling of `path` and lock it; the caller closes the lock's descriptor after removing it."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        make(temporary)
        with contextlib.suppress(FileNotFoundError):  # another process's `sweep` removed it
            lock = _lock(temporary)
            if lock is not None:
                return temporary, lock


_LEFT = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+(\.old)?\.tmp")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporaries of processes that were killed: those of writes to `name`, or all in `folder`."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        found = _LEFT.fullmatch(entry.name)
        if not found or name not in (None, found["name"]):
            continue
        with contextlib.suppress(OSError):
            lock = _lock(Path(entry.path))
            if lock is not None:
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock an existing path until the descriptor is closed; None: another process holds the lock, or it is gone."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_still(fd, path):
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None


def is_still(fd: int, path: Path) -> bool:
    """Whether the file open as `fd` is still the one at `path`, which may have been removed and made again."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def refuse_existing(out: Path) -> None:
    """Raise UserError if `out` exists, unless it is an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists and is not overwritten; remove it or name another target.")


def require_space(folder: Path, nbytes: int) -> None:
    """Raise UserError if the disk that holds `folder` has no room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskError(f"No room in {folder}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free.")


def _put_in_place(new: Path, out: Path) -> None:
    """Rename the folder `new` to `out`; an existing `out` is renamed to `new`."""
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
def plain_errors(out: Path) -> Iterator[None]:
    """Turn the errors of a full disk, and of a place that cannot be written to, into a `DiskError` about `out`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"No room is left on the disk for {out}; nothing was written there.", error.errno) from None
        if error.errno in _REFUSED:
            raise DiskError(f"{out} cannot be written: {error.strerror}.", error.errno) from None
        raise


_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO, errno.EFBIG)
_REFUSED += (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOLCK)


def hash_of(path: Path) -> str:
    """A hash of the bytes of a file, hex."""
    found, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            found.update(buffer[:n])
    return found.hexdigest()


def cache_root() -> Path:
    """Where tokens, features and compiled programs are kept: $JAXTUNE_CACHE, or ~/.cache/jaxtune.

    Where there is no home, or it cannot be written to (a container): a private folder for temporary files.
    """
    if chosen := os.environ.get("JAXTUNE_CACHE"):
        return Path(chosen).expanduser() if chosen.startswith("~") else Path(chosen)
    with contextlib.suppress(RuntimeError):
        folder = Path("~/.cache/jaxtune").expanduser()
        if is_ours(folder):
            return folder
    return _private_folder()


def is_ours(folder: Path) -> bool:
    """Whether a folder, which is made if missing, can be written to."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return may(folder, os.R_OK | os.W_OK | os.X_OK)
    return False


def may(path: Path, what: int) -> bool:
    """Whether this process may do with a file what `os.R_OK`, `os.W_OK` and `os.X_OK` name, by all its capabilities.

    Without `effective_ids` the system leaves those out that a process has without being root.
    """
    return os.access(path, what, effective_ids=os.access in os.supports_effective_ids)


@functools.cache
def _private_folder() -> Path:
    """A folder for temporary files that no other user can write to."""
    folder = Path(tempfile.gettempdir()) / f"jaxtune-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="jaxtune-"))


def open_lock(path: Path) -> int:
    """Open a lock file, made if missing, which may belong to another user; links are not followed.

    Raises:
        UserError: something else stands there, or none can be made.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with plain_errors(path):
        try:
            fd = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            fd = os.open(path, flags | os.O_RDONLY)  # locking needs no write permission
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise UserError(f"{path} is not a regular file, as a lock must be; remove it.")
        return fd


@contextlib.contextmanager
def updating(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for `folder`: for a file that is read, changed and written again."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a network file system may lock no folders
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it against other processes; the lock ends with the process, however that ends.

    What killed processes left half written in it, and in the folders in it, is removed. Where nothing is written, the
    folder is not left behind.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / ".lock"
    if lock.is_symlink():
        raise UserError(f"{lock} is a link, which a lock must not be; remove it.")
    fresh, fd = not lock.exists(), _hold(folder)
    try:
        if not may(folder, os.W_OK | os.X_OK):  # the lock was there, and could be read
            raise DiskError(f"{folder} cannot be written: {os.strerror(errno.EACCES)}.", errno.EACCES)
        sweep(folder)
        for inside in [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()]:
            sweep(inside)
        yield
    finally:
        with contextlib.suppress(OSError):
            if fresh and [p.name for p in folder.iterdir()] == [".lock"]:
                lock.unlink()
                for path in made:
                    path.rmdir()
        os.close(fd)


def _hold(folder: Path) -> int:
    while True:
        with plain_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        fd = open_lock(folder / ".lock")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UserError(
                f"Another process is running in {folder}; wait for it, or give another directory."
            ) from None
        if is_still(fd, folder / ".lock"):
            return fd
        os.close(fd)  # the process that held it last has removed it
