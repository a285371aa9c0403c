"""Where rows come from: files, folders, saved data sets and the hub, all as an iterator of numbered dictionaries.

`read("train.jsonl")` gives a `Source`. Iterating it yields `(number, row)`, and `Source.where(number)` says in words
where that row is. Files are read while they are iterated: a large JSON-lines file is never in memory as a whole.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from jaxtune import torchless
from jaxtune.data.files import (
    COMPRESSED,
    PICKLED,
    READERS,
    SUFFIXES,
    UNCOMPRESSED,
    Numbered,
    arrow_classes,
    class_names,
    decoded,
    from_arrow,
    is_json_list,
    json_file,
    kind,
    suffix,
)
from jaxtune.errors import UserError, nearest

__all__ = ["Source", "hash_files", "hash_rows", "kind", "place_of", "read", "splits"]

# Words for splits in the names of a folder's files; the first word of each is jaxtune's.
SPLITS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev", "eval"),
    ("test", "testing"),
)
OF_FOLDERS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # metadata, not rows
VERSION = 2  # raise it when the same bytes are read as other rows
FILE = 40  # the low bits of a row's number count within its file, the others count the files of a folder


def place_of(label: str, number: int) -> str:
    """The place of a row, in words: see `Source.label`."""
    return label.split("\n")[number >> FILE].replace("{}", str(number & ((1 << FILE) - 1)))


def file_of(label: str, number: int) -> str:
    """The file that a row stands in: see `Source.label`."""
    return label.split("\n")[number >> FILE].rpartition("{}")[0].removesuffix(":").removesuffix(", row ")


@dataclass(frozen=True)
class Source:
    """Numbered rows with a name.

    `label` turns a number into a place: `"train.jsonl:{}"` where rows are found by line (the line a row starts on,
    counted from 1), else `"train.parquet, row {}"` (counted from 1); of several files a line for each.
    """

    name: str
    label: str
    _rows: Callable[[], Numbered]
    _digest: Callable[[], str]
    _classes: Callable[[], Mapping[str, Sequence[str]]] = dict

    def __iter__(self) -> Numbered:
        return self._rows()

    def where(self, number: int) -> str:
        return place_of(self.label, number)

    def digest(self) -> str:
        """Return a hash of the content (not of the name or the time stamp) and of how it is read."""
        return f"{VERSION}-{self._digest()}"

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """{column: names of its classes in the order of their ids}, as `datasets` keeps them; rows hold the names."""
        return self._classes()


def read(source: str, *, streaming: bool = False) -> Source:
    """Open a data set: a file, a folder, a pattern (`data/*.jsonl`), a data set that `datasets` saved, or a hub id.

    Files: `.jsonl` and `.ndjson`; `.json` (a list of objects, or one object a line); `.csv` with a header; `.tsv`,
    whose quotation marks are text unless the file quotes throughout; `.parquet` and `.arrow`; `.txt`, which has
    one column `text`: one document a block of text between blank lines, or, where the file has lines that are exactly
    `<|endoftext|>`, between those; `.conll`, which has columns `tokens` and `labels`: the word and the label of each
    line, up to a blank line. Text may be compressed: `.gz`, `.zst`, `.bz2`, `.xz`.

    A folder is read as its data files, of one kind, or those of a split if names tell one. Folders, saved data sets and
    hub ids take a split after a colon (`"openai/gsm8k:test"`; default: `train`), and before it a configuration
    (`"openai/gsm8k:main:test"`); a `.json` file takes the key that holds the rows.

    Class ids of data sets are read as the names of the classes.

    With `streaming`, `datasets` reads a hub id as it arrives, without a copy on disk. Files are read so in any case.

    Raises:
        UserError: the file is missing (the nearest names are given), or of an unknown or pickled format; and during
            iteration, with file and line: an empty file, a malformed line, or a row that is not an object.
    """
    base, config, split = _parts(source)
    path = Path(base).expanduser()
    if path.is_file():
        return _read_file(source, path, f"{config}:{split}" if config else split)
    if path.is_dir():
        return _read_folder(source, path, config, split, streaming)
    if re.search(r"[*?\[]", source) and (path.suffix or "/" in source):
        files = sorted(Path(name) for name in glob(str(Path(source).expanduser()), recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"{source}: no file fits this pattern (looked in {Path.cwd()}).")
        return _read_files(source, files)
    if suffix(path) not in SUFFIXES + PICKLED and re.fullmatch(
        r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?(:[\w.\[\]%:+-]+)?", source
    ):
        return _read_hub(source, base, config, split or "train", streaming)
    raise _missing(source, path)


def _parts(source: str) -> tuple[str, str, str]:
    """(file, folder or hub id; configuration; split) of `BASE:CONFIG:SPLIT`; the last two may be missing."""
    if Path(source).expanduser().exists():
        return source, "", ""
    base, *rest = re.split(r":(?![^\[]*\])", source)  # no colon of train[:100]
    if len(rest) > 2:
        return source, "", ""
    return base, *([""] * (2 - len(rest))), *rest


def _missing(source: str, path: Path) -> UserError:
    folder = path.parent
    if not folder.is_dir():
        return UserError(f"{source}: no such file, and no folder {str(folder)!r} to hold it.")
    files = sorted(p.name for p in folder.iterdir() if _readable(p))
    hint = nearest(path.name, files)
    if not hint and files:
        hint = f" Data files in that folder: {', '.join(files[:8])}."
    return UserError(f"{source}: no such file.{hint}")


def _readable(path: Path) -> bool:
    return suffix(path) in SUFFIXES and path.name not in OF_FOLDERS and path.is_file()


def _read_file(name: str, path: Path, part: str = "") -> Source:
    known = suffix(path)
    if known in PICKLED:
        raise UserError(f"{name}: {known} files can run code when loaded and are never read. Save the data as .jsonl.")
    if known not in READERS:
        shown = f"{', '.join(SUFFIXES)}; and of text compressed ones: {', '.join(COMPRESSED)}"
        raise UserError(f"{name}: cannot read a {known or 'file without a suffix'}. Known: {shown}.")
    if known in UNCOMPRESSED and path.suffix.lower() != known:
        raise UserError(f"{name}: a {known} file is compressed inside: unpack this one first.")
    if part and known != ".json":
        raise UserError(f"{name}: a {known} file has no splits; leave out ':{part}'.")
    if path.stat().st_size == 0:
        raise UserError(f"{name}: the file is empty.")
    by_row = known in UNCOMPRESSED or (known == ".json" and (bool(part) or is_json_list(path)))

    def rows() -> Numbered:
        return json_file(name, path, part) if part else READERS[known](name, path)

    return Source(
        name,
        f"{name}, row {{}}" if by_row else f"{name}:{{}}",
        lambda: _not_empty(name, decoded(name, path, rows())),
        lambda: path.suffix.lower().removeprefix(known) + known + part + hash_files([path]),  # decides how it is read
        lambda: arrow_classes(path) if known in UNCOMPRESSED else {},
    )


def _not_empty(name: str, rows: Numbered) -> Numbered:
    number = None
    for number, row in rows:
        yield number, row
    if number is None:
        raise UserError(f"{name}: no rows in it.")


def _read_files(name: str, files: Sequence[Path]) -> Source:
    """Read several files of one kind, one after another."""
    kinds = sorted({suffix(path) for path in files})
    if len(kinds) > 1:
        raise UserError(
            f"{name}: files of several kinds ({', '.join(kinds)}). Name those of one kind, for example *{kinds[0]}"
        )
    parts = [_read_file(str(path), path) for path in files]

    def rows() -> Numbered:
        for i, part in enumerate(parts):
            for number, row in part:
                yield i << FILE | number, row

    def classes() -> Mapping[str, Sequence[str]]:
        found = [part.classes for part in parts]
        for other in found[1:]:
            if other != found[0]:
                raise UserError(
                    f"{name}: the files name the classes of their columns differently: {found[0]}, {other}."
                )
        return found[0]

    def digest() -> str:
        return hashlib.sha256("".join(part.digest() for part in parts).encode()).hexdigest()

    return Source(name, "\n".join(part.label for part in parts), rows, digest, classes)


def _split_of(path: Path, folder: Path) -> str | None:
    """The split in a file's name or in that of a folder above it, or None."""
    for text in reversed(path.relative_to(folder).parts):
        words = re.findall(r"[a-z]+", text.lower())
        for split, *others in SPLITS:
            if {split, *others} & set(words):
                return split
    return None


def splits(folder: Path) -> dict[str | None, list[Path]]:
    """{split: its files} of a folder of data files; key None: files whose names tell no split."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        if not hidden and _readable(path):
            found.setdefault(_split_of(path, folder), []).append(path)
    return found


def _read_folder(name: str, path: Path, config: str, split: str, streaming: bool = False) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if config:
            raise UserError(f"{name}: a saved data set has no configurations; choose with {path}:SPLIT.")
        return _read_saved(name, path, split)
    card = path / "README.md"
    if card.is_file() and re.search(
        r"^(configs|dataset_info):", card.read_text(encoding="utf-8", errors="replace"), re.M
    ):
        return _read_hub(name, str(path), config, split or "train", streaming)  # laid out as on the hub
    if config:
        if not (path / config).is_dir():
            raise UserError(
                f"{name}: {path} has no configuration {config!r}: neither a card that names it nor a folder."
            )
        path = path / config
    found = splits(path)
    if not found:
        raise UserError(f"{name}: a folder without data files (known: {', '.join(SUFFIXES)}).")
    named = [key for key in found if key]
    ours = next((names[0] for names in SPLITS if split in names), split)
    if ours and ours not in found:
        known = f"Found: {', '.join(named)}." if named else "The names of its files tell no splits; leave it out."
        raise UserError(f"{name}: no split {split!r}. {known}")
    if not ours and named and "train" not in found:
        raise UserError(
            f"{name}: its files are {', '.join(named)}, and none is for training. Choose with {path}:SPLIT."
        )
    return _read_files(name, found[ours or ("train" if named else None)])


def _read_saved(name: str, path: Path, split: str) -> Source:
    folder = path
    if (path / "dataset_dict.json").is_file():
        known = json.loads((path / "dataset_dict.json").read_text())["splits"]
        chosen = split or ("train" if "train" in known or len(known) != 1 else known[0])
        if chosen not in known:
            raise UserError(f"{name}: no split {chosen!r}. Found: {', '.join(known)}. Choose with {path}:SPLIT.")
        folder = path / chosen
    elif split:
        raise UserError(f"{name}: this saved data set has no splits; leave out ':{split}'.")

    def data() -> Any:
        try:
            return _datasets().load_from_disk(str(folder))
        except Exception as error:
            raise UserError(f"{name}: cannot load the saved data set ({error}).") from None

    return _of_datasets(name, data, lambda data: hash_files(sorted(folder.iterdir())))


def _of_datasets(name: str, load: Callable[[], Any], hashed: Callable[[Any], str]) -> Source:
    """A source that `datasets` loads, once, when it is first needed."""
    loaded = []

    def data() -> Any:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    def classes() -> Mapping[str, Sequence[str]]:
        return class_names((data().features or {}) and data().features.to_dict())

    def rows() -> Numbered:
        names = classes()
        numbered = enumerate(data(), 1)
        while True:
            try:
                number, row = next(numbered)
            except StopIteration:
                return
            except Exception as error:  # a file of a stream that is not like the others, or cannot be reached
                first = str(error).strip().partition("\n")[0]
                raise UserError(f"{name}: `datasets` cannot read on: {type(error).__name__}: {first}") from None
            yield number, from_arrow(row, names)

    return Source(name, f"{name}, row {{}}", lambda: _not_empty(name, rows()), lambda: hashed(data()), classes)


def _datasets() -> Any:
    """Import `datasets`, which looks for torch again and fails where the command line hides it."""
    torchless.unhide()
    import datasets

    return datasets


def _read_hub(name: str, hub_id: str, config: str, split: str, streaming: bool) -> Source:
    opened = []  # what knows the files of a stream

    def data() -> Any:
        given = [hub_id, *([config] if config else [])]
        try:
            if not streaming:
                return _datasets().load_dataset(*given, split=split)
            opened[:] = [_datasets().load_dataset_builder(*given)]
            return opened[0].as_streaming_dataset(split=split)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "Config name is missing" in first:
                known = " ".join(str(error).split())
                raise UserError(f"{name}: {known} Choose with {hub_id}:CONFIG:SPLIT.") from None
            what = f"with split {split!r}" + (f" of configuration {config!r}" if config else "")
            if Path(hub_id).is_dir():
                raise UserError(f"{name}: cannot be loaded {what}: {first}") from None
            raise UserError(f"{name}: no such file here, and as a hub id {what} it cannot be loaded: {first}") from None

    def hashed(data: Any) -> str:
        if streaming:  # their names on the hub hold the commit; of files here the time stamp counts
            files = {key: [list(f), f.origin_metadata] for key, f in (opened[0].config.data_files or {}).items()}
            return hash_rows([[opened[0].config_id, opened[0].hash, split, files]])
        files = [Path(file["filename"]) for file in data.cache_files]
        return hash_files(files) if files else hash_rows(data)

    return _of_datasets(name, data, hashed)


def hash_files(paths: list[Path]) -> str:
    """Return one sha256 (hex) over the bytes of the files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def hash_rows(rows) -> str:
    """SHA-256 of rows as JSON, in hexadecimal."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, default=str).encode())
    return total.hexdigest()
