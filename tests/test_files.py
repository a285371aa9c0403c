"""Writes that no reader finds half done, and a directory that one process holds."""

import subprocess
import sys

import pytest

from jaxtune.errors import UserError
from jaxtune.files import atomic_dir, atomic_write_text, exclusive


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
