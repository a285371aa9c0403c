"""Writes that no reader finds half done, and a directory that one process holds."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
import xxhash

from jaxtune import files
from jaxtune.errors import DiskError, RunFailed, UserError, disk_trouble
from jaxtune.files import atomic_dir, atomic_file, atomic_write_text, cache_root, exclusive, sweep
from jaxtune.run.workdir import explained_disk, held
from jaxtune.train.runtime import out_of_memory


def test_a_failed_write_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    with atomic_dir(out) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(out, overwrite=True) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (out / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_directory_is_refused(tmp_path):
    (tmp_path / "a").write_text("kept")
    with pytest.raises(UserError, match="exists"), atomic_dir(tmp_path):
        pass


def test_text_is_replaced_whole(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("one", "two"):
        atomic_write_text(file, text)
        assert file.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_directory_is_held_by_one_process_until_it_ends(tmp_path):
    hold = (
        f"from pathlib import Path; from jaxtune.files import exclusive\nwith exclusive(Path({str(tmp_path)!r})): pass"
    )
    with exclusive(tmp_path):
        other = subprocess.run([sys.executable, "-c", hold], capture_output=True, text=True)
        assert "Another process is running" in other.stderr
    assert subprocess.run([sys.executable, "-c", hold]).returncode == 0


def test_a_hash_is_that_of_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1000)
    (tmp_path / "a").write_bytes(bytes(range(256)) * 15)
    assert files.hash_of(tmp_path / "a") == xxhash.xxh3_128_hexdigest(bytes(range(256)) * 15)


def held_by_another(path):
    """A lock as another process has it: flock is between open files."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def leave(folder, *names):
    """What processes that were killed left."""
    for name in names:
        path = folder / name
        if name.startswith(".adapter"):
            path.mkdir()
            (path / "adapter_model.safetensors").write_text("half")
        else:
            path.write_text("half")


LEFT = (".metrics.jsonl.0f1e2d3c.tmp", ".adapter.0f1e2d3c.tmp", ".adapter.0f1e2d3c.old.tmp")


def test_what_killed_processes_left_is_swept_when_a_directory_is_taken(tmp_path):
    (tmp_path / "eval").mkdir()
    leave(tmp_path, *LEFT, ".own.tmp", "notes.tmp")
    leave(tmp_path / "eval", ".rows.jsonl.0f1e2d3c.tmp")
    with exclusive(tmp_path):
        assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", ".own.tmp", "eval", "notes.tmp"]


@pytest.mark.parametrize("write", [lambda out: atomic_dir(out, overwrite=True), atomic_file])
def test_the_next_writer_of_a_name_sweeps_what_was_left_of_it_and_no_writer_that_lives(write, tmp_path):
    leave(tmp_path, ".out.0f1e2d3c.tmp", ".other.0f1e2d3c.tmp")
    with write(tmp_path / "out") as first:
        assert not (tmp_path / ".out.0f1e2d3c.tmp").exists()
        sweep(tmp_path)
        assert first.exists()
        assert not (tmp_path / ".other.0f1e2d3c.tmp").exists()
        if first.is_file():
            first.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_temporary_that_is_held_is_not_swept(tmp_path):
    leave(tmp_path, LEFT[0])
    fd = held_by_another(tmp_path / LEFT[0])
    sweep(tmp_path)
    assert (tmp_path / LEFT[0]).exists()
    os.close(fd)
    sweep(tmp_path)
    assert not (tmp_path / LEFT[0]).exists()


def test_a_directory_that_was_made_for_nothing_does_not_stay(tmp_path):
    with pytest.raises(UserError, match="wrong"), exclusive(tmp_path / "runs" / "a"):
        raise UserError("wrong")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with exclusive(tmp_path / "there"):
        pass
    assert not list((tmp_path / "there").iterdir())
    with exclusive(tmp_path / "there"):
        (tmp_path / "there" / "a").write_text("kept")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == [".lock", "a"]


@pytest.mark.security
def test_a_lock_is_never_what_a_link_points_to(tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("kept")
    folder.mkdir()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock is a link"), exclusive(folder):
        pass
    assert precious.read_text() == "kept"
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"\.lock is a link"), exclusive(folder):
        pass
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.security
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file(make, tmp_path):
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock"), exclusive(tmp_path):
        pass


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path, monkeypatch):
    """Another process opened the file, the holder removed it on leaving, and a third made a new one."""
    real, turns = fcntl.flock, []

    def flock(fd, how):
        if not turns:
            turns.append(os.unlink(tmp_path / ".lock"))
        return real(fd, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with exclusive(tmp_path):
        again = os.open(tmp_path / ".lock", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            real(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(again)
        (tmp_path / "a").touch()


def test_somebody_elses_folder_gets_no_lock(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds no run"), held(tmp_path):
        pass
    with pytest.raises(UserError, match="holds no sweep"), held(tmp_path, "sweep.json"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("home", [None, "nowhere", "read-only"])
def test_without_a_home_the_cache_is_a_private_folder(home, tmp_path, monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAXTUNE_CACHE", raising=False)
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    files._private_folder.cache_clear()
    if home is None:
        monkeypatch.setattr(files.Path, "expanduser", no_home)
    elif home == "nowhere":
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(files, "may", lambda *args: False)
    folder = cache_root()
    assert folder.parent == tmp_path / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_root() == folder
    files._private_folder.cache_clear()


def test_a_cache_that_somebody_else_prepared_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    files._private_folder.cache_clear()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"jaxtune-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert files._private_folder().name not in ("elsewhere", f"jaxtune-{os.getuid()}")
    files._private_folder.cache_clear()


# --- what the disk refuses

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "No room is left on the disk for /runs/a/metrics.jsonl; free some."),
        (OSError(errno.EDQUOT, "quota"), "No room is left on the disk; free some."),
        (OSError(errno.EROFS, "ro", "/runs/a"), "/runs/a cannot be read or written: Read-only file system."),
        (PermissionError(errno.EACCES, "no", "a"), "a cannot be read or written: Permission denied."),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), "No room is left on the disk"),
        (RuntimeError("PERMISSION_DENIED: Permission denied [source locations='x']"), "Permission denied"),
        (DiskError("No room for features"), "No room for features"),
    ],
)
def test_what_the_disk_refused_is_one_sentence(error, words, tmp_path):
    for step in (3, 12):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    try:
        raise ValueError("asynchronous save failed") from error
    except ValueError as found:
        assert words in disk_trouble(found)
        assert not out_of_memory(found)
    with pytest.raises(RunFailed) as failed, explained_disk(tmp_path):
        raise error
    assert words in str(failed.value)
    assert "The last good checkpoint is of step 12." in str(failed.value)
    with pytest.raises(RunFailed, match=r"It is kept\. The same command"), explained_disk(tmp_path, "It is kept."):
        raise error


@pytest.mark.parametrize("error", [UserError("wrong"), ValueError("a bug"), KeyError(28), FileNotFoundError("x")])
def test_other_errors_are_left_as_they_are(error, tmp_path):
    assert disk_trouble(error) is None
    with pytest.raises(type(error)), explained_disk(tmp_path):
        raise error


def test_an_error_that_takes_the_place_of_one_of_the_disk_is_not_the_disks():
    try:
        try:
            raise FULL
        except OSError:
            raise UserError("give another file") from None
    except UserError as error:
        assert disk_trouble(error) is None
