"""Results stored by a hash of their inputs, one JSON object a line, so that an evaluation that was killed can resume.

Work is cut into batches before any of it is done, and a batch is done again unless all of it is stored: rounding
depends on what is computed together, so a run that was killed ends with the same bytes as an uninterrupted one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class Kept:
    """Records by key, in memory and, if a file is given, at its end."""

    def __init__(self, file: Path | None = None):
        self.records: dict[str, Any] = {}
        self.file = None
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file.open("a+b")
        self.file.seek(0)
        whole = 0
        for line in self.file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                entry = None
            whole_entry = isinstance(entry, dict) and isinstance(entry.get("key"), str) and "record" in entry
            if not whole_entry:  # torn by a kill, or damaged
                break
            whole += len(line)
            self.records[entry["key"]] = entry["record"]
        self.file.truncate(whole)

    def add(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Store records; they are on disk when this returns."""
        pairs = list(pairs)
        self.records.update(pairs)
        if self.file is not None:
            lines = [json.dumps({"key": key, "record": record}) + "\n" for key, record in pairs]
            self.file.write("".join(lines).encode())
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def key_of(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def in_batches(
    kept: Kept,
    keys: Sequence[str],
    batches: Sequence[Sequence[int]],
    compute: Callable[[Sequence[int]], Sequence[Any]],
    done: Callable[[int], None] = lambda n: None,
) -> list[Any]:
    """The records of `keys`, in their order; a batch with a missing record is computed and stored.

    Args:
        kept: the records stored so far.
        keys: of all rows.
        batches: indices into `keys`.
        compute: indices -> their records, JSON values.
        done: called after each batch with its number of rows.
    """
    for batch in batches:
        if not all(keys[i] in kept.records for i in batch):
            kept.add(zip([keys[i] for i in batch], compute(batch), strict=True))
        done(len(batch))
    return [kept.records[key] for key in keys]
