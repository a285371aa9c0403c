"""Where rows come from: files, saved data sets and the hub, all as an iterator of numbered dictionaries.

`read("train.jsonl")` gives a `Source`. Iterating it yields `(number, row)`, and `Source.where(number)` says in words
where that row stands. Files are read as they are iterated: a large JSON-lines file never lies in memory as a whole.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from jaxtune import torchless
from jaxtune.errors import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".conll")
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
DOCUMENT_SEPARATOR = "<|endoftext|>"
KINDS = {
    type(None): "null",
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}

DECODE = json.JSONDecoder().decode
Numbered = Iterator[tuple[int, dict]]


@dataclass(frozen=True)
class Source:
    """Numbered rows with a name.

    `label` turns a number into a place: `"train.jsonl:{}"` where rows are found by line (the line a row starts on,
    counted from 1), else `"train.parquet, row {}"` (counted from 1).
    """

    name: str
    label: str
    _rows: Callable[[], Numbered]
    _digest: Callable[[], str]

    def __iter__(self) -> Numbered:
        return self._rows()

    def where(self, number: int) -> str:
        return self.label.replace("{}", str(number))

    def digest(self) -> str:
        """Return a hex hash of the content (not of the name or the time stamp)."""
        return self._digest()


def read(source: str) -> Source:
    """Open a data set: a file, a directory written by `Dataset.save_to_disk`, or a hub id.

    Files: `.jsonl`; `.json` (a list of objects, or one object a line); `.csv` and `.tsv` with a header; `.parquet`;
    `.txt`, which has one column `text`: one document a block of text between blank lines, or, where the file has lines
    that are exactly `<|endoftext|>`, between those; `.conll`, which has columns `tokens` and `labels`: the first and
    the last field of each line, up to a blank line. Saved data sets and hub ids take a split after a colon
    (`"openai/gsm8k:test"`); without one it is `train`.

    Raises UserError for a missing file (naming the nearest ones), an unknown or pickled format, and, while iterated,
    for an empty file, a malformed line or a row that is not an object, with the file and line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(source, path)
    folder, _, split = source.partition(":")
    if path.is_dir() or Path(folder).expanduser().is_dir():
        return _read_saved(source, path, "") if path.is_dir() else _read_saved(source, Path(folder).expanduser(), split)
    if path.suffix.lower() not in SUFFIXES + PICKLED and re.fullmatch(
        r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.\[\]%:+-]+)?", source
    ):
        return _read_hub(source, folder, split or "train")
    raise _missing(source, path)


def _missing(source: str, path: Path) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError(f"{source}: no such file, and no folder {str(folder)!r} to hold it.")
    files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    hint = nearest(path.name, files)
    if not hint and files:
        hint = f" Data files in that folder: {', '.join(files[:8])}."
    return UserError(f"{source}: no such file.{hint}")


def _read_file(name: str, path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        raise UserError(f"{name}: {suffix} files can run code when loaded and are never read. Save the data as .jsonl.")
    readers = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": lambda n, p: _table(n, p, ","),
        ".tsv": lambda n, p: _table(n, p, "\t"),
        ".parquet": _parquet,
        ".txt": _text,
        ".conll": _conll,
    }
    if suffix not in readers:
        raise UserError(f"{name}: cannot read a {suffix or 'file without a suffix'}. Known: {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise UserError(f"{name}: the file is empty.")
    by_row = suffix == ".parquet" or (suffix == ".json" and _is_json_list(path))
    return Source(
        name,
        f"{name}, row {{}}" if by_row else f"{name}:{{}}",
        lambda: _not_empty(name, _decoded(name, path, readers[suffix](name, path))),
        lambda: suffix + hash_files([path]),  # the suffix decides how the bytes are read
    )


def _not_empty(name: str, rows: Numbered) -> Numbered:
    number = None
    for number, row in rows:
        yield number, row
    if number is None:
        raise UserError(f"{name}: no rows in it.")


def _decoded(name: str, path: Path, rows: Numbered) -> Numbered:
    try:
        yield from rows
    except UnicodeDecodeError:
        with path.open("rb") as lines:  # the error counts from the start of a block
            for number, line in enumerate(lines, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    found = f"{error.reason} at byte {error.start + 1} of the line"
                    raise UserError(f"{name}:{number}: not UTF-8 text ({found}). Save it as UTF-8.") from None
        raise


def _object(where: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object {{...}} with one field a column, found {kind(value)}.")
    return value


def _json_lines(name: str, path: Path) -> Numbered:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    value = DECODE(line)
                except json.JSONDecodeError as error:
                    found = line.strip()
                    found = found if len(found) <= 60 else found[:57] + "..."
                    raise UserError(
                        f"{name}:{number}: malformed JSON ({error.msg} at column {error.colno}): {found}"
                    ) from None
                yield number, _object(f"{name}:{number}", value)


def _is_json_list(path: Path) -> bool:
    with path.open("rb") as file:
        while block := file.read(4096):
            block = block.removeprefix(b"\xef\xbb\xbf").lstrip()
            if block:
                return block.startswith(b"[")
    return False


def _json(name: str, path: Path) -> Numbered:
    if not _is_json_list(path):
        text = path.read_text(encoding="utf-8-sig")
        try:
            yield 1, _object(f"{name}:1", json.loads(text))  # one object over the whole file
        except json.JSONDecodeError:
            yield from _json_lines(name, path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: malformed JSON ({error.msg} at column {error.colno}).") from None
    for number, value in enumerate(values, 1):
        yield number, _object(f"{name}, row {number}", value)


def _table(name: str, path: Path, delimiter: str) -> Numbered:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, start = None, 1
        try:
            for cells in reader:
                number, start = start, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    if len(set(header)) < len(header) or "" in header:
                        raise UserError(
                            f"{name}:1: the header needs distinct column names, found {', '.join(map(repr, header))}."
                        )
                elif len(cells) != len(header):
                    raise UserError(
                        f"{name}:{number}: {len(cells)} fields, but the header has {len(header)} ({', '.join(header)})."
                    )
                else:
                    yield number, dict(zip(header, cells))
        except csv.Error as error:
            raise UserError(f"{name}:{start}: malformed {path.suffix[1:]} ({error}).") from None


def _text(name: str, path: Path) -> Numbered:
    with path.open(encoding="utf-8-sig") as lines:
        marked = any(line.strip() == DOCUMENT_SEPARATOR for line in lines)
        ends = {DOCUMENT_SEPARATOR} if marked else {""}
        lines.seek(0)
        block, start = [], 1
        for number, line in enumerate(chain(lines, [DOCUMENT_SEPARATOR if marked else ""]), 1):
            if line.strip() not in ends:
                block.append(line)
                continue
            if text := "".join(block).strip("\n"):
                yield start, {"text": text}
            block, start = [], number + 1


def _conll(name: str, path: Path) -> Numbered:
    """One word a line, with its label in the last field; a blank line ends a sentence."""
    with path.open(encoding="utf-8-sig") as lines:
        words, tags, start = [], [], 1
        for number, line in enumerate(chain(lines, [""]), 1):
            line = line.rstrip("\n")
            if line.strip() and not line.startswith("-DOCSTART-"):
                fields = line.split("\t") if "\t" in line else line.split()
                if len(fields) < 2:
                    raise UserError(f"{name}:{number}: expected a word and its label, found {line!r}.")
                words.append(fields[0])
                tags.append(fields[-1])
                continue
            if words:
                yield start, {"tokens": words, "labels": tags}
            words, tags, start = [], [], number + 1


def _parquet(name: str, path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name}: not a readable parquet file ({error}).") from None


def _read_saved(name: str, path: Path, split: str) -> Source:
    is_dict, is_single = (path / "dataset_dict.json").is_file(), (path / "state.json").is_file()
    if not (is_dict or is_single):
        files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        found = f" Name one of its files: {', '.join(files[:8])}." if files else ""
        raise UserError(f"{name}: a folder, but not a data set written by save_to_disk.{found}")
    folder = path
    if is_dict:
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if chosen not in splits:
            raise UserError(f"{name}: no split {chosen!r}. Found: {', '.join(splits)}. Choose with {path}:SPLIT.")
        folder = path / chosen
    elif split:
        raise UserError(f"{name}: this saved data set has no splits; leave out ':{split}'.")

    def rows() -> Numbered:
        try:
            data = _datasets().load_from_disk(str(folder))
        except Exception as error:
            raise UserError(f"{name}: cannot load the saved data set ({error}).") from None
        yield from enumerate(data, 1)

    return Source(
        name, f"{name}, row {{}}", lambda: _not_empty(name, rows()), lambda: hash_files(sorted(folder.iterdir()))
    )


def _datasets() -> Any:
    """The library, which looks for torch again, and breaks where the command line hides it."""
    torchless.unhide()
    import datasets

    return datasets


def _read_hub(name: str, hub_id: str, split: str) -> Source:
    loaded = []  # loaded once, by whichever of the two below comes first

    def data():
        if not loaded:
            try:
                loaded.append(_datasets().load_dataset(hub_id, split=split))
            except Exception as error:
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"{name}: no such file here, and as a hub id with split {split!r} it cannot be loaded: {first}"
                ) from None
        return loaded[0]

    def digest() -> str:
        files = [Path(file["filename"]) for file in data().cache_files]
        return hash_files(files) if files else hash_rows(data())

    return Source(name, f"{name}, row {{}}", lambda: _not_empty(name, enumerate(data(), 1)), digest)


def hash_files(paths: list[Path]) -> str:
    """Return one sha256 (hex) over the bytes of the files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def hash_rows(rows) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, default=str).encode())
    return total.hexdigest()


def kind(value: object) -> str:
    """Return the everyday name of a JSON value's type: `text`, `a number`, `a list`, ..."""
    return KINDS.get(type(value)) or type(value).__name__
