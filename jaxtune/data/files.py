"""Files as rows: JSON, tables, parquet and arrow, plain text and tagged words, compressed or not.

Each reader takes (name for messages, path) and yields `(number, row)`, lazily where the format allows it.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TextIO

from jaxtune.errors import UserError

PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _zstd(path),
}
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
# Columns of rows: an object with one of them is a row, not a wrapper around rows.
ROW_COLUMNS = {
    *("text", "prompt", "messages", "conversations", "instruction", "question", "input", "label", "labels", "tokens"),
    *("chosen", "rejected"),
}
LIKE_TAG = re.compile(r"[BIELSU]-\S+|O")
MOST_FIELDS = 4  # fields of a CoNLL file without an index; with more, it is unclear which are the word and the label
SAMPLED = 5000  # lines read to find the layout of a CoNLL file


class Decoder(json.JSONDecoder):
    """Python's, with one type of error for all that is wrong with a text."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise json.JSONDecodeError("nested too deep", s, idx) from None
        except ValueError:  # the limit of Python's int
            raise json.JSONDecodeError("a number of thousands of digits", s, idx) from None


# JSON has no NaN, but Python writes it for a value that is missing.
DECODER = Decoder(parse_constant=lambda word: None if word == "NaN" else float(word))
DECODE = DECODER.decode
Numbered = Iterator[tuple[int, dict]]


def kind(value: object) -> str:
    """Return a plain name of a JSON value's type: `text`, `a number`, `a list`, ..."""
    return KINDS.get(type(value)) or type(value).__name__


def suffix(path: Path) -> str:
    """The suffix that decides how a file is read, in lower case, without that of compression."""
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def open_bytes(path: Path) -> Any:
    """Open a file for reading bytes, decompressed if its suffix is one of COMPRESSED."""
    return COMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))(path)


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a file as UTF-8 text, decompressed if its suffix is one of COMPRESSED."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


def decoded(name: str, path: Path, rows: Numbered) -> Numbered:
    """`rows`, with errors of encoding and compression as UserError."""
    try:
        yield from rows
    except UnicodeDecodeError:
        with open_bytes(path) as lines:  # the error counts from the start of a block
            for number, line in enumerate(lines, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    found = f"{error.reason} at byte {error.start + 1} of the line"
                    raise UserError(f"{name}:{number}: not UTF-8 text ({found}). Save it as UTF-8.") from None
        raise
    except (EOFError, OSError, lzma.LZMAError) as error:
        if path.suffix.lower() not in COMPRESSED:
            raise
        raise UserError(f"{name}: not a readable {path.suffix} file ({error}).") from None


def _object(where: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object {{...}} with one field a column, found {kind(value)}.")
    return value


# ---------------------------------------------------------------------------------------------------------- JSON


def json_lines(name: str, path: Path) -> Numbered:
    """Yield (line number, row) of a JSON Lines file."""
    with open_text(path) as lines:
        first = True
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                other = shlex.quote(re.sub(r"\.(jsonl|ndjson)", ".json", str(path)))
                raise UserError(
                    f"{name}:{number}: a JSON list, where each line should be an object: such a file is called .json. "
                    f"Rename it: mv {shlex.quote(str(path))} {other}"
                )
            try:
                value = DECODE(line)
            except json.JSONDecodeError as error:
                if first and line.strip()[-1] in "{[,":
                    yield from _objects(name, number, line + lines.read())
                    return
                found = line.strip()
                found = found if len(found) <= 60 else found[:57] + "..."
                raise UserError(
                    f"{name}:{number}: malformed JSON ({error.msg} at column {error.colno}): {found}"
                ) from None
            first = False
            yield number, _object(f"{name}:{number}", value)


def _objects(name: str, first: int, text: str) -> Numbered:
    """Objects one after another, each over several lines."""
    at, line = 0, first
    while True:
        start = len(text) - len(text[at:].lstrip())
        line += text.count("\n", at, start)
        if start == len(text):
            return
        try:
            value, at = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            place = f"{name}:{first + error.lineno - 1}"
            raise UserError(f"{place}: malformed JSON ({error.msg} at column {error.colno}).") from None
        yield line, _object(f"{name}:{line}", value)
        line += text.count("\n", start, at)


def is_json_list(path: Path) -> bool:
    """Whether the first character of a file, after white space, opens a JSON list."""
    with open_bytes(path) as file:
        while block := file.read(4096):
            block = block.removeprefix(b"\xef\xbb\xbf").lstrip()
            if block:
                return block.startswith(b"[")
    return False


def json_file(name: str, path: Path, part: str = "") -> Numbered:
    """A list of objects, one object a line, or with `part` the rows under that key of one object."""
    whole = is_json_list(path)
    with open_text(path) as file:
        text = file.read()
    try:
        values = DECODE(text)
    except json.JSONDecodeError as error:
        if not whole and not part:
            yield from json_lines(name, path)
            return
        raise UserError(f"{name}:{error.lineno}: malformed JSON ({error.msg} at column {error.colno}).") from None
    if part:
        if not isinstance(values, dict) or not _is_rows(values.get(part)):
            found = (
                ", ".join(key for key, value in values.items() if _is_rows(value)) if isinstance(values, dict) else ""
            )
            raise UserError(
                f"{name}: no rows under {part!r}. {f'Found: {found}.' if found else 'It holds no such key.'}"
            )
        values, whole = values[part], True
    if not whole:
        _refuse_wrapped(name, path, _object(f"{name}:1", values))
        yield 1, values  # one object over the whole file
        return
    for number, value in enumerate(values, 1):
        yield number, _object(f"{name}, row {number}", value)


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _refuse_wrapped(name: str, path: Path, value: dict) -> None:
    """Raise UserError for an object that contains rows instead of being one."""
    if ROW_COLUMNS & set(value) and not all(isinstance(v, dict) for v in value.values()):
        return
    if keys := [key for key, rows in value.items() if _is_rows(rows)]:
        raise UserError(
            f"{name}: one object, with rows under {', '.join(map(repr, keys))}. Name them: {path}:{keys[0]}"
        )
    split = {"columns", "data"} <= set(value)
    if split or (value and all(isinstance(v, dict) and v for v in value.values())):
        orient = "orient='split'" if split else ""
        read = f"pandas.read_json({str(path)!r}{', ' + orient if orient else ''})"
        write = f"to_json({str(path.with_suffix('.jsonl'))!r}, orient='records', lines=True, force_ascii=False)"
        raise UserError(
            f"{name}: a table as pandas writes it, by columns; rows are needed, one a line. Convert it: "
            f"python -c {shlex.quote(f'import pandas; {read}.{write}')}"
        )


# -------------------------------------------------------------------------------------------------------- tables


def csv_file(name: str, path: Path) -> Numbered:
    """Yield (line number, row) of a CSV file with a header."""
    return _table(name, path, ",")


def tsv_file(name: str, path: Path) -> Numbered:
    """Yield (line number, row) of a TSV file; quotation marks count only if the file quotes throughout."""
    return _table(name, path, "\t", quoted=_quotes(path))


def _quotes(path: Path) -> bool:
    """Whether quotation marks at the start of a cell quote it, rather than being part of its text."""
    width, ragged, opened, closed = None, False, False, False
    with open_text(path) as lines:
        for line in lines:
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            width = width or len(cells)
            ragged |= len(cells) != width
            for cell in cells:
                if cell.startswith('"'):
                    whole = len(cell) > 1 and cell.endswith('"') and '"' not in cell[1:-1].replace('""', "")
                    closed, opened = closed or whole, opened or not whole
    if not ragged:
        return closed and not opened
    with open_text(path, newline="") as file, contextlib.suppress(csv.Error):
        return all(len(row) in (0, width) for row in csv.reader(file, delimiter="\t", strict=True))
    return False


def _table(name: str, path: Path, delimiter: str, quoted: bool = True) -> Numbered:
    csv.field_size_limit(2**31 - 1)
    with open_text(path, newline="" if quoted else None) as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True) if quoted else _literal(file, delimiter)
        header, start, number = None, 1, 0
        try:
            for cells in rows:
                number, start = start, (rows.line_num if quoted else start) + 1
                if not cells:
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    _check_header(name, path, header, delimiter)
                elif len(cells) != len(header):
                    raise UserError(
                        f"{name}:{number}: {len(cells)} fields, but the header has {len(header)} ({', '.join(header)})."
                    )
                elif cells == header and len(header) > 1:
                    file, out = shlex.quote(str(path)), shlex.quote(_beside(path))
                    raise UserError(
                        f"{name}:{number}: the header is repeated here: were files joined? Remove it: "
                        f"awk 'NR == 1 {{h = $0}} NR == 1 || $0 != h' {file} > {out}"
                    )
                else:
                    yield number, dict(zip(header, cells))
        except csv.Error as error:
            raise UserError(f"{name}:{start}: malformed {suffix(path)[1:]} ({error}).{_escaped(path)}") from None


def _literal(lines: TextIO, delimiter: str) -> Iterator[list[str]]:
    for line in lines:
        yield line.rstrip("\r\n").split(delimiter) if line.strip("\r\n") else []


def _check_header(name: str, path: Path, header: list[str], delimiter: str) -> None:
    if re.fullmatch(r"sep=.?", header[0]):
        raise UserError(
            f"{name}:1: {header[0]!r} is for Excel alone. Leave it out: "
            f"tail -n +2 {shlex.quote(str(path))} > {shlex.quote(_beside(path))}"
        )
    other = next((mark for mark in ";\t|" if mark in header[0]), None) if len(header) == 1 else None
    if other is not None and delimiter == ",":
        raise UserError(
            f"{name}:1: the columns are separated by {other!r}, and a .csv file has commas. Convert it: "
            f"{_rewritten(path, reading=f'delimiter={other!r}')}"
        )
    if "" in header and len(set(header)) == len(header) > 1 and header.index("") in (0, len(header) - 1):
        first = header[0] == ""
        what = "the first column has no name, as where pandas wrote an index" if first else "the header ends in a comma"
        raise UserError(
            f"{name}:1: {what}. Leave that column out: "
            f"{_rewritten(path, row='r[1:]' if first else 'r[:-1]', delimiter=delimiter)}"
        )
    if len(set(header)) < len(header) or "" in header:
        raise UserError(
            f"{name}:1: the header needs distinct column names, found {', '.join(map(repr, header))}."
            f"{header_hint(name, header)}"
        )


def _escaped(path: Path) -> str:
    """A hint for quotation marks that are escaped with a backslash."""
    with open_text(path) as lines:
        if not any('\\"' in line for line in islice(lines, SAMPLED)):
            return ""
    how = 'escapechar="\\\\", doublequote=False'
    return f' Quotation marks in a cell are written "", not \\". Convert it: {_rewritten(path, reading=how)}'


def _beside(path: Path) -> str:
    return str(path.with_name(f"{path.name.partition('.')[0]}.clean{suffix(path)}"))


def _rewritten(path: Path, *, row: str = "r", reading: str = "", delimiter: str = ",") -> str:
    """A command that rewrites a table: `reading` holds arguments of csv.reader, `row` an expression over each row r."""
    given = ", ".join(part for part in ("newline=''", "encoding='utf-8-sig'") if part)
    how = reading or (f"delimiter={delimiter!r}" if delimiter != "," else "")
    write = f", delimiter={delimiter!r}" if delimiter != "," else ""
    program = (
        f"import csv; csv.writer(open({_beside(path)!r}, 'w', newline='', encoding='utf-8'){write}).writerows("
        f"{row} for r in csv.reader(open({str(path)!r}, {given}){', ' + how if how else ''}))"
    )
    return f"python -c {shlex.quote(program)}"


def header_hint(name: str, columns: Sequence[str]) -> str:
    """A hint on a table whose first line may not be a header, for messages about unknown columns."""
    path = Path(name)
    if suffix(path) not in (".csv", ".tsv") or path.suffix.lower() in COMPRESSED or not path.is_file():
        return ""
    divider, shown = (",", ",") if suffix(path) == ".csv" else ("\t", "\\t")
    names = [f"column_{i}" for i in range(1, len(columns) + 1)]
    if len(columns) == 2:  # a label is what repeats
        with open_text(path, newline="") as file, contextlib.suppress(csv.Error, UnicodeDecodeError):
            rows = [row for row in islice(csv.reader(file, delimiter=divider), 200) if len(row) == 2]
            values = [len({row[i] for row in rows}) for i in (0, 1)]
            names = ["label", "text"] if values[0] < values[1] else ["text", "label"]
    file, out = shlex.quote(name), shlex.quote(_beside(path))
    return f" If the first line is no header, give the file one: (printf '{shown.join(names)}\\n'; cat {file}) > {out}"


# ---------------------------------------------------------------------------------------------- text and tagged words


def text_file(name: str, path: Path) -> Numbered:
    """Yield (line number, {"text": document}) of a text file, split at DOCUMENT_SEPARATOR or else at blank lines."""
    with open_text(path) as lines:
        marked = any(line.strip() == DOCUMENT_SEPARATOR for line in lines)
    ends = {DOCUMENT_SEPARATOR} if marked else {""}
    with open_text(path) as lines:
        block, start = [], 1
        for number, line in enumerate(chain(lines, [DOCUMENT_SEPARATOR if marked else ""]), 1):
            if line.strip() not in ends:
                block.append(line)
                continue
            if text := "".join(block).strip("\n"):
                yield start, {"text": text}
            block, start = [], number + 1


def conll_file(name: str, path: Path) -> Numbered:
    """One word a line, with its label in another field; a blank line ends a sentence.

    Raises:
        UserError: it is unclear which field is the word and which the label.
    """
    word, label, tabs, indexed, width = _conll_layout(name, path)
    with open_text(path) as lines:
        words, tags, start = [], [], 1
        for number, line in enumerate(chain(lines, [""]), 1):
            line = line.rstrip("\r\n")
            if line.strip() and not line.startswith("-DOCSTART-"):
                fields = line.split("\t") if tabs else line.split()
                if line.startswith("#") and (indexed or len(fields) != width):
                    continue  # a comment
                if len(fields) < max(word + 1, 2):
                    raise UserError(f"{name}:{number}: expected a word and its label, found {line!r}.")
                if indexed and not fields[0].isdecimal():
                    continue  # 1-2, 1.1: multiword and empty tokens
                words.append(fields[word])
                tags.append(fields[label])
                continue
            if words:
                yield start, {"tokens": words, "labels": tags}
            words, tags, start = [], [], number + 1


def looks_tagged(path: Path) -> bool:
    """Whether a file has words with tags such as B-LOC and O, one a line, and blank lines between sentences."""
    try:
        with open_text(path) as lines:
            sample = [line.split() for line in islice(lines, 200)]
    except (UnicodeDecodeError, OSError):
        return False
    words = [fields for fields in sample if fields and not fields[0].startswith(("#", "-DOCSTART-"))]
    tagged = [len(fields) > 1 and bool(LIKE_TAG.fullmatch(fields[-1])) for fields in words]
    return len(words) > 2 and all(tagged) and len({fields[-1] for fields in words}) > 1


def _conll_layout(name: str, path: Path) -> tuple[int, int, bool, bool, int]:
    """(field of the word, field of the label, whether tabs separate, whether an index is first, usual field count)."""
    with open_text(path) as lines:
        sample = [line.rstrip("\r\n") for line in islice(lines, SAMPLED)]
    sample = [line for line in sample if not line.startswith("-DOCSTART-")]
    tabs = any("\t" in line for line in sample if not line.startswith("#"))
    rows = [line.split("\t") if tabs else line.split() for line in sample if line.strip() and line[0] != "#"]
    if not rows:
        return 0, -1, tabs, False, 2
    width = Counter(map(len, rows)).most_common(1)[0][0]
    indexed = width > 2 and _counts_up([line.split()[0] for line in sample if line.strip() and line[0] != "#"])
    if width > MOST_FIELDS + indexed:
        raise UserError(
            f"{name}: {width} fields a line{' (CoNLL-U)' * (indexed and width == 10)}; which of them are the word and "
            f"its label is unclear. Keep two, for example {_two_fields(path, rows, width, tabs, indexed)}"
        )
    columns = [[row[i] for row in rows if len(row) == width] for i in range(width)]
    tags = [all(map(LIKE_TAG.fullmatch, column)) for column in columns]
    if indexed:
        nested = width == 4 and tags[2] and tags[3] and _types(columns[3]) <= _types(columns[2])
        return 1, 2 if nested else width - 1, tabs, True, width  # the outer labels of nested entities
    if tags[0] and not tags[-1]:
        if width > 2:
            raise UserError(
                f"{name}: the label comes first, and {width - 1} fields follow; keep the label and the word: "
                f"{_cut(path, (0, 1), tabs)}"
            )
        return 1, 0, tabs, False, width
    return 0, width - 1, tabs, False, width


def _two_fields(path: Path, rows: Sequence[list[str]], width: int, tabs: bool, indexed: bool) -> str:
    """The likely word and label among many fields, as numbers, and the command that keeps them."""
    columns = [[row[i] for row in rows if len(row) == width] for i in range(width)]
    label = 3 if indexed else next((i for i in range(width)[::-1] if all(map(LIKE_TAG.fullmatch, columns[i]))), -1)
    label %= width
    spread = [
        len(set(column)) * (i != label and not any(v.isdecimal() for v in column)) for i, column in enumerate(columns)
    ]
    word = 1 if indexed else spread.index(max(spread))
    fields = sorted((word, label))
    return f"{fields[0] + 1} and {fields[1] + 1}: {_cut(path, fields, tabs)}"


def _cut(path: Path, fields: Sequence[int], tabs: bool) -> str:
    """A command that keeps some fields of a file of tagged words, counted from 0, and no comments."""
    divided = "" if tabs else " | tr -s ' ' '\\t'"
    numbers = ",".join(str(i + 1) for i in fields)
    return f"grep -v '^#' {shlex.quote(str(path))}{divided} | cut -f{numbers} > {shlex.quote(_beside(path))}"


def _counts_up(firsts: Sequence[str]) -> bool:
    """Whether first fields count 1, 2, 3, ... or 0, 1, 2, ... in each sentence."""
    numbers = [int(f) for f in firsts if f.isdecimal()]
    odd = [f for f in firsts if not f.isdecimal() and not re.fullmatch(r"\d+[-.]\d+", f)]
    if odd or not numbers or numbers[0] not in (0, 1):
        return False
    return all(b == a + 1 or b == numbers[0] for a, b in pairwise(numbers))


def _types(tags: Sequence[str]) -> set[str]:
    return {tag[2:] for tag in tags if tag != "O"}


# ---------------------------------------------------------------------------------------------------------- arrow


def parquet_file(name: str, path: Path) -> Numbered:
    """Yield (row number, row) of a Parquet file, from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        yield from arrow_rows(file.iter_batches(batch_size=1024), class_names(_features(file.schema_arrow)))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name}: not a readable parquet file ({error}).") from None


def arrow_file(name: str, path: Path) -> Numbered:
    """Yield (row number, row) of an Arrow stream, as `datasets` writes it, or of an Arrow file with a footer."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            footed = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            reader = pa.ipc.open_file(mapped) if footed else pa.ipc.open_stream(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if footed else reader
            yield from arrow_rows(batches, class_names(_features(reader.schema)))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{name}: not a readable arrow file ({error}).") from None


def arrow_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """The names of the classes in the columns of a parquet or arrow file that `datasets` wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix(path) == ".parquet":
        return class_names(_features(pq.read_schema(path)))
    with pa.memory_map(str(path)) as mapped:
        footed = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        return class_names(_features((pa.ipc.open_file if footed else pa.ipc.open_stream)(mapped).schema))


def arrow_rows(batches: Any, classes: Mapping[str, Sequence[str]]) -> Numbered:
    """Yield (row number, row) of Arrow batches, from 1; class ids become their names."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, from_arrow(row, classes)


def from_arrow(row: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> dict:
    """A row as it was before Arrow: class ids become names; NaN and fields that Arrow filled in are left out.

    Arrow gives each object of a column the fields of all objects; those that it did not have are null.
    """
    return {
        column: _named(value, classes[column]) if column in classes else _padding_off(value)
        for column, value in row.items()
    }


def _padding_off(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list) and value and not isinstance(value[0], str | int):
        return [_padding_off(one) for one in value]
    if isinstance(value, dict):
        return {key: kept for key, one in value.items() if (kept := _padding_off(one)) is not None}
    return value


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _features(schema: Any) -> dict[str, Any]:
    """The features of the columns that `datasets` stored in a schema's metadata."""
    stored = (schema.metadata or {}).get(b"huggingface")
    return (json.loads(stored).get("info") or {}).get("features") or {} if stored else {}


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """{column: class names in the order of their ids} of columns of classes or of lists of classes."""
    found = {}
    for column, feature in features.items():
        while isinstance(feature, list) or (isinstance(feature, dict) and isinstance(feature.get("feature"), dict)):
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[column] = tuple(feature["names"])
    return found


READERS: dict[str, Callable[[str, Path], Numbered]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": tsv_file,
    ".parquet": parquet_file,
    ".arrow": arrow_file,
    ".txt": text_file,
    ".conll": conll_file,
}
SUFFIXES = tuple(READERS)
UNCOMPRESSED = (".parquet", ".arrow")  # compressed inside, and read in parts
