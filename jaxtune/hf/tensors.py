"""safetensors files (github.com/huggingface/safetensors#format): one or many, read in parallel, written atomically."""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    raw = np.empty(entry.nbytes, np.uint8)
    view, done = memoryview(raw), 0
    fd = os.open(entry.file, os.O_RDONLY)
    try:
        while done < entry.nbytes:
            n = os.preadv(fd, [view[done:]], entry.offset + done)
            if n == 0:
                raise UserError(f"{entry.file} became shorter while it was read.")
            done += n
    finally:
        os.close(fd)
    array = raw.view(entry.dtype).reshape(entry.shape)
    if out is None:
        return array
    np.copyto(out, array, casting="unsafe")
    return out


def read_all(entries: Iterable[tuple[Entry, np.ndarray]], threads: int = 8) -> None:
    """Read many tensors into their places in parallel."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda pair: read(*pair), entries):
            pass


def read_ahead(entries: Sequence[Entry], threads: int = 4, limit: int = 256 * 2**20) -> Iterator[np.ndarray]:
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
