"""safetensors files (github.com/huggingface/safetensors#format): one or many, read in parallel, written atomically."""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.errors import UserError

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


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_json(file: Path) -> dict:
    """Read a file that holds one JSON object.

    Raises:
        UserError: it does not.
    """
    try:
        value = json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise UserError(f"{file}:{e.lineno}: not JSON: {e.msg}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a text file.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, expected a JSON object.")
    return value


def index(file: Path) -> dict[str, Entry]:
    """Read the header of one safetensors file.

    Raises:
        UserError: the file is cut short, malformed or not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is not a safetensors file, or is cut short ({size} bytes). Fetch it again.")
        try:
            header = json.loads(f.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise UserError(f"{file} is not a safetensors file: its header is no JSON ({e}).") from None
    if not isinstance(header, dict):
        raise UserError(f"{file} is not a safetensors file: its header is no JSON object.")
    header.pop("__metadata__", None)
    entries = {}
    for name, item in header.items():
        try:
            kind, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}: the header's entry for tensor {name!r} is malformed: {item}.") from None
        if kind not in DTYPES:
            raise UserError(f"{file}: tensor {name!r} has dtype {kind}, which is not supported.")
        dtype = np.dtype(DTYPES[kind])
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{file}: tensor {name!r} is {kind}{list(shape)} but takes {stop - start} bytes.")
        if 8 + length + stop > size:
            raise UserError(
                f"{file} is cut short: tensor {name!r} ends at byte {8 + length + stop}, the file at {size}. "
                "Fetch it again."
            )
        entries[name] = Entry(file, dtype, shape, 8 + length + start, stop - start)
    return entries


def index_dir(folder: Path, stem: str = "model") -> dict[str, Entry]:
    """Index the weights of a directory: `{stem}.safetensors`, or the shards that `{stem}.safetensors.index.json` lists.

    Raises:
        UserError: there are none, only pickle files, or a shard is missing.
    """
    listing = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if listing.exists():
        shards = sorted(set(read_json(listing).get("weight_map", {}).values()))
        if not shards:
            raise UserError(f"{listing} lists no shards: it has no 'weight_map'.")
        absent = [s for s in shards if not (folder / s).exists()]
        if absent:
            raise UserError(f"{listing} lists {len(absent)} missing shard(s): {', '.join(absent)}.")
        return {name: entry for shard in shards for name, entry in index(folder / shard).items()}
    if single.exists():
        return index(single)
    pickles = sorted(p.name for ext in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{ext}"))
    if pickles:
        raise UserError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when loaded and is never read. "
            'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise UserError(f"{folder} holds no weights: neither {single.name} nor {listing.name} is there.")


def read(entry: Entry, out: np.ndarray | None = None) -> np.ndarray:
    """Read one tensor by position, without mapping the file; threads may call it at once.

    With `out`, the numbers are cast into that array, which may be a transposed or strided view.
    """
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
    """Read and cast `rows` rows at a time, which the processor's cache holds while they are transposed."""
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
    """Read many tensors into their places in parallel; `done` hears of the bytes of each."""

    def one(pair: tuple[Entry, np.ndarray]) -> None:
        read(*pair)
        done(pair[0].nbytes)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, entries):
            pass


def read_ahead(entries: Sequence[Entry], limit: int, threads: int = 4) -> Iterator[np.ndarray]:
    """Yield tensors in order, the next of them read in threads: as many as `limit` bytes hold, at least one."""
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[np.ndarray]] = deque()
        nbytes, at = 0, 0
        for entry in entries:
            while at < len(entries) and (not under_way or nbytes + entries[at].nbytes <= limit):
                under_way.append(pool.submit(read, entries[at]))
                nbytes, at = nbytes + entries[at].nbytes, at + 1
            yield under_way.popleft().result()
            nbytes -= entry.nbytes


def write(folder: Path, tensors: Mapping[str, np.ndarray], stem: str = "model", shard_bytes: int = 5 * 10**9) -> None:
    """Write tensors as `{stem}.safetensors`, or as shards with an index where they exceed `shard_bytes`."""
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    sizes = [0]
    for name, array in tensors.items():
        if sizes[-1] and sizes[-1] + array.nbytes > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = np.ascontiguousarray(array)
        sizes[-1] += array.nbytes
    meta = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / f"{stem}.safetensors", metadata=meta)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata=meta)
        weight_map |= dict.fromkeys(shard, name)
    listing = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n")
