"""safetensors files (github.com/huggingface/safetensors#format): one or many, read in parallel, written atomically."""

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.errors import UserError
from jaxtune.reading import LIMIT, parse_json
from jaxtune.reading import read_json as read_json

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """The location of a tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def index(file: Path) -> dict[str, Entry]:
    """Read the header of one safetensors file.

    Raises:
        UserError: the file is cut short, malformed or not safetensors.
    """
    header, begin, size = _header(file)
    entries, spans = {}, []
    for name, item in header.items():
        if name == "__metadata__":
            continue
        entry = _entry(file, name, item, begin)
        if entry.offset + entry.nbytes > size:
            raise UserError(
                f"{file} is cut short: tensor {name!r} ends at byte {entry.offset + entry.nbytes}, the file at {size}. "
                "Fetch it again."
            )
        entries[name] = entry
        spans.append((entry.offset, entry.offset + entry.nbytes, name))
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise UserError(f"{file}: tensors {one!r} and {other!r} overlap; the file is damaged. Fetch it again.")
    return entries


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where the tensors begin, and the file's size."""
    if not file.is_file():
        raise UserError(f"{file} is no regular file.")
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file} is not a safetensors file, or is cut short ({size} bytes). Fetch it again.")
            if length > LIMIT:
                raise UserError(f"{file}: a header of {length / 1e6:,.0f} MB is too large for safetensors.")
            text = f.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        header = parse_json(text, "its header", object_pairs_hook=_different)
    except UserError as error:
        raise UserError(f"{file} is not a safetensors file: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{file} is not a safetensors file: its header is no JSON object.")
    return header, 8 + length, size


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice.")
    return found


def _entry(file: Path, name: str, item: Any, begin: int) -> Entry:
    try:
        kind, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 2**62 for n in (*shape, start, stop)) and len(shape) <= 32
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or start > stop:
        raise UserError(f"{file}: the header's entry for tensor {name!r} is malformed: {str(item)[:200]}.")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(f"{file}: tensor {name!r} has dtype {str(kind)[:40]}, which is not supported.")
    dtype = np.dtype(DTYPES[kind])
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{file}: tensor {name!r} is {kind}{list(shape)} but takes {stop - start} bytes.")
    return Entry(file, dtype, shape, begin + start, stop - start)


def index_dir(folder: Path, stem: str = "model") -> dict[str, Entry]:
    """Index the weights of a directory: `{stem}.safetensors`, or the shards that `{stem}.safetensors.index.json` lists.

    Raises:
        UserError: there are none, only pickle files, or a shard is missing.
    """
    listing = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.exists():  # preferred over shards next to it, as in transformers
        return index(single)
    if listing.exists():
        return _index_shards(folder, listing)
    pickles = sorted(p.name for ext in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{ext}"))
    if pickles:
        raise UserError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when loaded and is never read. "
            'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise UserError(f"{folder} holds no weights: neither {single.name} nor {listing.name} is there.")


def has_weights(folder: Path, stem: str = "model") -> bool:
    """Whether there are files for `index_dir` to read."""
    return any((folder / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))


def equal(one: Entry, other: Entry, rows: int = 4096) -> bool:
    """Whether two tensors of one shape are equal; reading stops at the first difference."""
    if one.shape != other.shape:
        return False
    step = max(1, rows)
    for start in range(0, one.shape[0] if one.shape else 1, step):
        parts = [read(_rows(entry, start, step)) for entry in (one, other)]
        if not np.array_equal(*(part.astype(np.float32) for part in parts), equal_nan=True):
            return False
    return True


def _rows(entry: Entry, start: int, count: int) -> Entry:
    """Some rows of a tensor."""
    if not entry.shape:
        return entry
    row = entry.nbytes // max(entry.shape[0], 1)
    count = min(count, entry.shape[0] - start)
    return entry._replace(shape=(count, *entry.shape[1:]), offset=entry.offset + start * row, nbytes=count * row)


def _index_shards(folder: Path, listing: Path) -> dict[str, Entry]:
    weight_map = read_json(listing).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{listing} lists no shards: it has no 'weight_map'.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", "..") or len(os.fsencode(shard)) > 255:
            raise UserError(
                f"{listing}: the shard {shard[:80]!r} is not a file name; shards must be next to their index."
            )
    absent = [s for s in shards if not (folder / s).is_file()]
    if absent:
        raise UserError(f"{listing} lists {len(absent)} missing shard(s): {', '.join(absent[:5])}.")
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in index(folder / shard).items():
            if weight_map.get(name, shard) == shard:
                entries[name] = entry
    return entries


def read(entry: Entry, out: np.ndarray | None = None) -> np.ndarray:
    """Read one tensor by position, without mapping the file; threads may call it at once.

    With `out`, the numbers are cast into that array, which may be a transposed or strided view.
    """
    if not isinstance(entry, Entry):  # one that is stored in another way
        return entry.read(out)
    if out is None:
        out = np.empty(entry.shape, entry.dtype)
    fd = os.open(entry.file, os.O_RDONLY)
    try:
        if out.dtype == entry.dtype and out.flags.c_contiguous:
            _read_bytes(fd, entry.file, [out.reshape(-1).view(np.uint8)], entry.offset)
        else:
            _read_blocks(fd, entry, out)
    finally:
        os.close(fd)
    return out


def read_part(entry: Entry, part: Sequence[slice], block: int = 2**22) -> np.ndarray:
    """Read a part of a tensor: of rows their own bytes alone; of columns `block` bytes of whole rows at a time.

    A row's columns are too few bytes for a read of their own, and the processes of a machine share what is cached.
    """
    spans = [s.indices(n)[:2] for s, n in zip(part, entry.shape, strict=True)]
    if not spans:
        return read(entry)
    if not isinstance(entry, Entry):  # one that is stored in another way
        return read(entry)[tuple(part)]
    (start, stop), *rest = spans
    entry = _rows(entry, start, stop - start)
    if all(b - a == n for (a, b), n in zip(rest, entry.shape[1:], strict=True)):
        return read(entry)
    out = np.empty([b - a for a, b in spans], entry.dtype)
    step, bits = max(1, block * len(out) // max(1, entry.nbytes)), f"u{entry.dtype.itemsize}"
    # As integers: numpy copies bfloat16 element by element.
    for at in range(0, len(out), step):
        rows = read(_rows(entry, at, step)).view(bits)
        out.view(bits)[at : at + step] = rows[:, *(slice(*span) for span in rest)]
    return out


def _read_bytes(fd: int, file: Path, parts: Sequence[np.ndarray], offset: int) -> None:
    """Fill arrays of bytes, one after another."""
    views = deque(map(memoryview, parts))
    while views:
        n = os.preadv(fd, list(views), offset)
        if n == 0 and any(len(view) for view in views):
            raise UserError(f"{file} became shorter while it was read.")
        offset += n
        while views and n >= len(views[0]):
            n -= len(views.popleft())
        if n:
            views[0] = views[0][n:]


def _read_blocks(fd: int, entry: Entry, out: np.ndarray, rows: int = 512) -> None:
    """Read and cast `rows` rows at a time, few enough for the processor's cache while they are transposed."""
    dtype, shape = entry.dtype, entry.shape or (1,)
    if out.dtype == dtype:  # as integers: numpy copies bfloat16 element by element
        dtype = np.dtype(f"u{dtype.itemsize}")
        out = out.view(dtype)
    out, row = out.reshape(shape), math.prod(shape[1:])
    # Rows a power of two apart share few lines of a cache: half the speed.
    block = np.empty((min(rows, shape[0]), row + 96), dtype)[:, :row]
    for start in range(0, shape[0], rows):
        part = block[: shape[0] - start]
        at = entry.offset + start * row * dtype.itemsize
        _read_bytes(fd, entry.file, [line.view(np.uint8) for line in part], at)
        np.copyto(out[start : start + rows], part.reshape(-1, *shape[1:]), casting="unsafe")


def read_all(
    entries: Iterable[tuple[Entry, np.ndarray]], threads: int = 4, done: Callable[[int], None] = lambda n: None
) -> None:
    """Read many tensors into their places in parallel; `done` is called with the bytes of each."""

    def one(pair: tuple[Entry, np.ndarray]) -> None:
        read(*pair)
        done(pair[0].nbytes)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, entries):
            pass


_EXPONENTS = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}}


def finite(array: np.ndarray) -> bool:
    """Whether a contiguous array of floats has neither NaN nor infinity, by its exponents; of other types, True."""
    ones = _EXPONENTS.get(array.dtype.itemsize, {}).get(array.dtype.name)
    if ones is None:
        return True
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    return not any(((bits[i : i + 2**18] & ones) == ones).any() for i in range(0, bits.size, 2**18))


def read_ahead(
    entries: Sequence[Entry], limit: int, threads: int = 4, parts: Sequence[Sequence[slice]] | None = None
) -> Iterator[np.ndarray]:
    """Yield tensors in order, the next of them read in threads: as many as `limit` bytes hold, at least one.

    `parts`: what to read of each; default: all.
    """
    parts = [[slice(None)] * len(entry.shape) for entry in entries] if parts is None else parts
    sizes = [_part_bytes(*pair) for pair in zip(entries, parts, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[np.ndarray]] = deque()
        nbytes, at = 0, 0
        for size in sizes:
            while at < len(entries) and (not under_way or nbytes + sizes[at] <= limit):
                under_way.append(pool.submit(read_part, entries[at], parts[at]))
                nbytes, at = nbytes + sizes[at], at + 1
            yield under_way.popleft().result()
            nbytes -= size


def _part_bytes(entry: Entry, part: Sequence[slice]) -> int:
    return entry.dtype.itemsize * math.prod(len(range(*s.indices(n))) for s, n in zip(part, entry.shape, strict=True))


class Made(NamedTuple):
    """A tensor that is made when it is written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path, tensors: Mapping[str, np.ndarray | Made], stem: str = "model", shard_bytes: int = 5 * 10**9
) -> None:
    """Write tensors as `{stem}.safetensors`, or as shards with an index where they exceed `shard_bytes`.

    Of those that are `Made` one at a time is in memory.
    """
    shards = files(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    listing = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n")


def files(tensors: Mapping[str, np.ndarray | Made], shard_bytes: int) -> list[dict[str, np.ndarray | Made]]:
    """The tensors of each file, in the order in which they are written: wide ones first, so that each is aligned."""
    shards: list[dict[str, np.ndarray | Made]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return [dict(sorted(shard.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))) for shard in shards]


def _write_file(file: Path, tensors: Mapping[str, np.ndarray | Made]) -> None:
    """What `safetensors.numpy.save_file` writes, which needs all tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        stop = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            array = tensor.make() if isinstance(tensor, Made) else tensor
            if (array.dtype, array.shape) != (tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{name} is {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}")
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
