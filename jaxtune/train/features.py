"""Feature extraction: outputs of the layers below the lowest trained one, computed once, in memory-mapped files.

      tokens -> embedding -> segments below the cut (-> rest of the body -> pooling)   frozen, no dropout: once a row
                                      |
                            features.bin, by row   [tokens, D] or [rows, D]
                                      |
    features -> segments above -> norm -> head -> loss                                 each epoch, each evaluation

The mask decides the cut: `find_cut` knows no method. A row's features depend only on its tokens,
so they serve every order, packing and batch size; `data.with_features` puts them in the place of the tokens, and
`above` is the module that takes them. Stored features are found by a hash of the weights below the cut, the tokens, and
everything else that affects the result.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.data import Rows
from jaxtune.data.label_rows import has_types, token_types
from jaxtune.errors import Interrupted, RunFailed, UserError
from jaxtune.files import atomic_write_text, cache_root, may, open_lock, sweep
from jaxtune.train.parallel import row_axes
from jaxtune.tree import FROZEN, PyTree, flatten

VERSION = 2  # raise it when the same input gives other features
TOKENS = 4096  # in one forward pass
SAVE_SECONDS = 10.0
HASHED = 2**26  # bytes of a weight at a time
BLOCK = 2**22  # bytes of a file under one checksum
FILE, CHECKSUMS, PROGRESS = "features.bin", "checksums.json", "progress.json"
GIB = 2**30
ROOM = GIB // 4  # of the disk, left free

# ---------------------------------------------------------------------------------------------------------- the cut


@dataclass(frozen=True)
class Cut:
    """The place where a model is cut in two.

    Attributes:
        segments: of the body, below the cut.
        layers: in them.
        pooled: the whole body and the pooling are below.
    """

    segments: int
    layers: int
    pooled: bool = False

    def __str__(self) -> str:
        return f"the first {self.layers} layers" + ", pooled" * self.pooled


def find_cut(module: Any, mask: PyTree) -> Cut | None:
    """The highest cut below which nothing is trained or differs between members; None: none above the first block.

    Dropout rates are MEMBER leaves, so there is no dropout below, either.
    """

    def is_frozen(name):
        return all(role is FROZEN for role in jax.tree.leaves(mask.get(name)))

    segments = module.spec.segments
    if not all(is_frozen(name) for name in mask if name.startswith("embed_")):
        return None
    below = next((i for i in range(len(segments)) if not is_frozen(f"segment_{i}")), len(segments))
    if not below:
        return None
    pools = getattr(module, "pooling", None) is not None
    layers = sum(segment.layers for segment in segments[:below])
    return Cut(below, layers, pools and below == len(segments) and is_frozen("norm"))


def above(module: Any, cut: Cut) -> Any:
    """The part above the cut: the same module over the same tree, with features as input in place of tokens."""
    return replace(module, pooled=True) if cut.pooled else module.clone(start=cut.segments)


def below(module: Any, cut: Cut) -> Callable[..., jax.Array]:
    """`f(params, tokens, positions, segments, types) -> features`, [B, T, D] or pooled [B, D]."""
    if cut.pooled:
        return module.pooled_body
    body = getattr(module, "body", module)
    is_encoder = body.is_encoder
    lower = body.clone(stop=cut.segments)

    def features(params, tokens, positions, segments, types):
        typed = {"types": types} if is_encoder and lower.spec.types > 1 else {}
        seen = segments if is_encoder else None
        return lower.apply({"params": params}, tokens, positions, seen, **typed, method="hidden")

    return features


def weights_below(module: Any, cut: Cut, params: PyTree) -> dict[str, Any]:
    """The part of the tree that `below` reads."""
    own = {f"segment_{i}" for i in range(cut.segments)} | ({"norm"} if cut.pooled else set())
    return {name: leaf for name, leaf in params.items() if name in own or name.startswith("embed_")}


def by_length_of_batch(module: Any, cut: Cut) -> bool:
    """Whether the layers below rotate by the length of the longest text in a packed row."""
    return any(
        block.rope is not None and block.rope.kind in ("dynamic", "longrope")
        for segment in module.spec.segments[: cut.segments]
        for block in segment.pattern
    )


# ----------------------------------------------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class FileLayout:
    """The layout of features in a file: the longest row first, so that little padding is computed.

    Attributes:
        order: i64[R], the row at each place.
        first: i64[R], the entry at which a row's features begin.
        length: i64[R], its entries; 1 where they are pooled.
        tokens: i64[R], the row's tokens.
        width: D.
    """

    order: np.ndarray
    first: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    width: int
    dtype: Any
    per_token: bool

    @classmethod
    def of(cls, tokens: np.ndarray, width: int, dtype: Any, per_token: bool) -> "FileLayout":
        tokens = np.asarray(tokens, np.int64)
        length = tokens if per_token else np.ones_like(tokens)
        order = np.argsort(-tokens, kind="stable")
        first = np.empty_like(length)
        first[order] = np.cumsum(length[order]) - length[order]
        return cls(order, first, length, tokens, width, np.dtype(dtype), per_token)

    @property
    def entries(self) -> int:
        return int(self.length.sum())

    @property
    def nbytes(self) -> int:
        return self.entries * self.width * self.dtype.itemsize

    def bytes_before(self, place: int) -> int:
        """Bytes of the features of all rows before a place."""
        return int(self.length[self.order[:place]].sum()) * self.width * self.dtype.itemsize

    def batches(self, devices: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first place, end, rows, T) of forward passes of about TOKENS tokens, in at most eight shapes."""
        unit = max(8, -(-int(self.tokens.max()) // 8 // 8) * 8)
        at = 0
        while at < len(self.order):
            t = -(-int(self.tokens[self.order[at]]) // unit) * unit
            rows = max(1, TOKENS // t // devices) * devices
            end = min(at + rows, len(self.order))
            yield at, end, rows, t
            at = end


class Features:
    """The features of the rows of one data set, read from their file; a row is counted over all sources.

    The file was verified when it was opened. Each row is again as it is read: by a hash of it that was made then.
    """

    def __init__(self, file: Path, layout: FileLayout, lock: "_Lock"):
        self.file, self.layout, self.lock = file, layout, lock  # shared: the file is not removed while this lives
        self.flat = np.memmap(file, layout.dtype, "r", shape=(layout.entries, layout.width))
        known = _known(file)
        self.sums = _verified.get(known)
        if self.sums is None:
            self.sums = _verified[known] = _row_sums(self.flat, layout)

    @property
    def per_token(self) -> bool:
        return self.layout.per_token

    def __len__(self) -> int:
        return len(self.layout.first)

    def __getitem__(self, row: int) -> np.ndarray:
        """[n, D] of the row's tokens; [1, D] where they are pooled."""
        first = self.layout.first[row]
        return self.flat[first : first + self.layout.length[row]]

    def lay(self, plan: Sequence[Sequence[int]], n: int, t: int) -> np.ndarray:
        """See `data.batches.Features`."""
        shape = (n, t if self.per_token else 1, self.layout.width)
        out = np.zeros(shape, self.layout.dtype)
        for b, members in enumerate(plan):
            at = 0
            for member in members:
                end = at + self.layout.length[member]
                out[b, at:end] = self[member]
                if xxhash.xxh3_64_intdigest(out[b, at:end].view(np.uint8)) != self.sums[member]:
                    raise RunFailed(
                        f"The features in {self.file.parent} have been damaged since this run opened them (row "
                        f"{member + 1}). The same command goes on, and recomputes them."
                    )
                at = end
        return out if self.per_token else out[:, 0]


class Store:
    """A folder of features, each set in one of its own, together no larger than `limit` bytes.

    A set is built under another name and renamed when complete; a build that was killed is resumed. Both are verified
    by the checksums of their blocks before use, and recomputed where damaged. Sets that are in use
    are locked; of the others the least recently used is removed first. Users may share the folder.
    `off` is how to do without it.
    """

    def __init__(self, limit: int, folder: Path | None = None, off: str = "set train.cache_features=off"):
        self.limit, self.folder, self.off = limit, folder or cache_root() / "features", off

    def path(self, key: str) -> Path:
        return self.folder / key

    def partial(self, key: str) -> Path:
        return self.folder / f".{key}.partial"

    def has(self, key: str, nbytes: int) -> bool:
        return _size(self.path(key)) == nbytes

    def why_not(self, sizes: Mapping[str, int]) -> str | None:
        """The reason why these sets (key -> bytes) cannot all be kept; None: they can."""
        total = sum(sizes.values())
        if total > self.limit:
            return f"they take {_gib(total)}, and train.cache_gib is {self.limit / GIB:.3g}"
        if all(self.has(key, n) for key, n in sizes.items()):
            return None
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path in (path for key in sizes for path in (self.path(key), self.partial(key))):
            if may(self.folder, os.X_OK) and path.exists() and not may(path, os.R_OK | os.X_OK):
                return f"{path} belongs to another user and cannot be read; set JAXTUNE_CACHE"
        if not may(self.folder, os.R_OK | os.W_OK | os.X_OK):
            return f"{self.folder} cannot be written; set JAXTUNE_CACHE"
        new = sum(n for key, n in sizes.items() if not self.has(key, n))
        others = {key: _size(self.folder / key) for key in self._others(sizes)}
        used = sum(n for key, n in others.items() if self._in_use(key))
        begun = sum(_size(self.partial(key)) for key in sizes)
        if used + total > self.limit:
            return (
                f"they take {_gib(total)} beside {_gib(used)} that other runs use, and train.cache_gib is "
                f"{self.limit / GIB:.3g}"
            )
        free = shutil.disk_usage(self.folder).free + sum(others.values()) - used + begun - ROOM
        if new > free:
            return f"they take {_gib(new)}, and the disk of {self.folder} has {_gib(max(free, 0))} free"
        return None

    def open(
        self,
        key: str,
        layout: FileLayout,
        fill: Callable[[Any, int, Callable[[int], None]], None],
        stop: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ) -> Features:
        """The features of `key`; those that are missing or damaged are computed.

        Args:
            key: of the features' content.
            layout: how the file is laid out.
            fill: (file, first place, done) writes the features from a place of the layout's order on; it calls
                done(place) where all before that place is written.
            stop: asked while another process computes them; True ends the waiting.
            say: called with a sentence when something was damaged.

        Raises:
            UserError: there is no room, or damaged features are in use.
            Interrupted: `stop` returned True.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _Lock(self.folder / f"{key}.lock")
        while True:
            lock.wait(fcntl.LOCK_SH, stop)
            damaged = self.has(key, layout.nbytes) and not _is_whole(self.path(key))
            if self.has(key, layout.nbytes) and not damaged:
                with contextlib.suppress(PermissionError):  # another user's
                    os.utime(self.path(key))
                return Features(self.path(key) / FILE, layout, lock)
            lock.release()
            if damaged:
                if not lock.take(fcntl.LOCK_EX):
                    raise UserError(
                        f"The features in {self.path(key)} are damaged, and another run uses them: stop that one, or "
                        f"{self.off}."
                    )
            else:
                lock.wait(fcntl.LOCK_EX, stop)
            if damaged or not self.has(key, layout.nbytes):
                if self.path(key).exists():
                    say(f"The features in {self.path(key)} were damaged and are recomputed.")
                    shutil.rmtree(self.path(key))
                self._build(key, layout, fill, say)

    def _build(self, key: str, layout: FileLayout, fill: Callable[..., None], say: Callable[[str], None]) -> None:
        folder = self.partial(key)
        folder.mkdir(exist_ok=True)
        sweep(folder)
        begun = _begun(folder, layout)
        if begun is None and (folder / PROGRESS).exists():
            say(f"The partial features in {folder} were damaged and are recomputed.")
        done = begun["places"] if begun else 0
        self._make_room(key, layout.nbytes)
        with (folder / FILE).open("r+b" if begun else "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, layout.nbytes)  # a full disk shows now rather than later
            file.seek(layout.bytes_before(done))
            saved, checksums = file.tell(), begun["blocks"] if begun else []

            def save(places: int) -> None:
                nonlocal saved, checksums
                file.flush()
                os.fsync(file.fileno())
                whole = checksums[: saved // BLOCK]  # the last one is of less than a block
                saved = layout.bytes_before(places)
                checksums = _checksums(folder / FILE, saved, whole)
                atomic_write_text(folder / PROGRESS, json.dumps({"places": places, "blocks": checksums}))

            if not begun:
                save(0)
            fill(file, done, save)
            save(len(layout.order))
        atomic_write_text(folder / CHECKSUMS, json.dumps(checksums))
        os.rename(folder, self.path(key))
        (self.path(key) / PROGRESS).unlink()

    def _make_room(self, key: str, nbytes: int) -> None:
        """Remove other sets until one of `nbytes` fits."""
        new = nbytes - _size(self.partial(key))
        others, foreign = sorted(self._others([key]), key=lambda k: (self.folder / k).stat().st_mtime), 0
        while True:
            kept = sum(_size(self.folder / k) for k in others) + foreign
            short = shutil.disk_usage(self.folder).free - ROOM < new
            if kept + nbytes <= self.limit and not short:
                return
            oldest = next((k for k in others if not self._in_use(k)), None)
            if oldest is None:
                raise UserError(
                    f"No room for features in {self.folder}: {_gib(new)} more are needed, "
                    f"{_gib(shutil.disk_usage(self.folder).free)} are free, and other runs use {_gib(kept)} of "
                    f"train.cache_gib={self.limit / GIB:.3g}. Make room, or {self.off}."
                )
            others.remove(oldest)
            with contextlib.suppress(PermissionError):  # one of another user stays, and counts
                shutil.rmtree(self.folder / oldest)
                continue
            foreign += _size(self.folder / oldest)

    def _others(self, keys: Any) -> list[str]:
        """Folders of other sets, complete or partial."""
        own = {name for key in keys for name in (key, self.partial(key).name)}
        found = [p.name for p in self.folder.iterdir() if p.is_dir()] if self.folder.is_dir() else []
        return [name for name in found if name not in own]

    def _in_use(self, name: str) -> bool:
        """Whether a process reads a set, or computes it."""
        key = name.removeprefix(".").removesuffix(".partial")
        return not _Lock(self.folder / f"{key}.lock").take(fcntl.LOCK_EX)


class _Lock:
    """A lock on a file against other processes and other locks of this process; it is released with the object."""

    def __init__(self, path: Path):
        self.fd = open_lock(path)

    def __del__(self, close: Callable[[int], None] = os.close):  # `os` may be gone when the process ends
        close(self.fd)

    def take(self, how: int) -> bool:
        """Try at once."""
        try:
            fcntl.flock(self.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self, how: int, stop: Callable[[], bool]) -> None:
        while not self.take(how):
            if stop():
                raise Interrupted("Stopped by a signal while another process computes features.")
            time.sleep(0.1)

    def release(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_UN)


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.3g} GiB"


def _size(folder: Path) -> int:
    """Bytes of a set; 0 if it is missing or unreadable."""
    try:
        return (folder / FILE).stat().st_size
    except OSError:
        return 0


def _checksums(file: Path, end: int, known: Sequence[str] = ()) -> list[str]:
    """Hashes of the blocks of a file up to `end`, the last of them cut there; `known`: of the first whole blocks."""
    if not end:
        return []
    data = np.memmap(file, np.uint8, "r", shape=(end,))
    starts = range(len(known) * BLOCK, end, BLOCK)
    with ThreadPoolExecutor(4) as pool:
        return [*known, *pool.map(lambda at: xxhash.xxh3_128_hexdigest(data[at : at + BLOCK]), starts)]


def _row_sums(flat: np.ndarray, layout: FileLayout) -> np.ndarray:
    """A hash of the features of each row, u64[R]."""
    data, size = memoryview(flat.view(np.uint8).reshape(-1)), layout.width * layout.dtype.itemsize
    firsts, ends = layout.first * size, (layout.first + layout.length) * size
    spans = zip(firsts.tolist(), ends.tolist(), strict=True)
    return np.fromiter((xxhash.xxh3_64_intdigest(data[a:b]) for a, b in spans), np.uint64, len(firsts))


# Files that this process has verified, and the hashes of their rows once they have been opened.
_verified: dict[tuple[str, int, int, int], np.ndarray | None] = {}


def _known(file: Path) -> tuple[str, int, int, int]:
    found = file.stat()
    return str(file), found.st_ino, found.st_size, found.st_mtime_ns


def _is_whole(folder: Path) -> bool:
    """Whether a set is undamaged."""
    try:
        known = _known(folder / FILE)
        if known not in _verified and _checksums(folder / FILE, known[2]) == json.loads(
            (folder / CHECKSUMS).read_bytes()
        ):
            _verified[known] = None
        return known in _verified
    except (OSError, ValueError):
        return False


def _begun(folder: Path, layout: FileLayout) -> dict[str, Any] | None:
    """The progress of a build, {"places", "blocks"}; None: it has not begun, or is damaged."""
    try:
        found = json.loads((folder / PROGRESS).read_bytes())
        end = layout.bytes_before(found["places"])
        return found if _checksums(folder / FILE, end) == found["blocks"] else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


# -------------------------------------------------------------------------------------------------- computing them


def weights_digest(params: PyTree) -> str:
    """A hash of every array of a tree, with its path, shape and type; little is copied to the host at a time."""

    def digest(item):
        path, leaf = item
        found = hashlib.sha256(f"{path} {leaf.shape} {leaf.dtype}".encode())
        rows = leaf.reshape(1, -1) if leaf.ndim < 2 else leaf
        step = max(1, len(rows) * HASHED // max(leaf.nbytes, 1))
        for at in range(0, len(rows), step):
            found.update(np.ascontiguousarray(jax.device_get(rows[at : at + step])).reshape(-1).view(np.uint8))
        return found.digest()

    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, flatten(params).items()))).hexdigest()


def rows_digest(sources: Sequence[Rows]) -> str:
    """A hash of the tokens of all rows and of their types, in order."""
    total = hashlib.sha256()
    for rows in sources:
        total.update(np.ascontiguousarray(rows.length, np.int32))
        for start, length in zip(rows.start.tolist(), rows.length.tolist()):
            total.update(np.ascontiguousarray(rows.tokens[start : start + length]))
            if has_types(rows):
                total.update(token_types(rows.mask[start : start + length]))
    return total.hexdigest()


def both(sources: Sequence[Rows]) -> list[Rows]:
    """The rows of all sources, and behind all of them the second texts of rows that have one."""
    if sources[0].other is None:
        return list(sources)
    first = [replace(rows, target=None, other=None) for rows in sources]
    return [*first, *(rows.other for rows in sources)]


class OncePerRow:
    """Computes what is kept of each row of data sets, or finds it. A subclass says what, by `run` and `facts`.

    Args:
        params: what `run` reads.
        width, dtype, per_token: of what is kept, as in `FileLayout`.
        store: where it is kept.
        mesh: whose devices share the rows.

    Attributes:
        name: of the array in batches, where it lies beside the tokens.
        what: what is kept, in words.
        found: of each set of a run, once it is there.
    """

    name = what = "features"
    found: "list[Features] | None" = None

    def __init__(self, params: PyTree, width: int, dtype: Any, per_token: bool, store: Store, mesh: Mesh):
        self.params, self.store, self.mesh = params, store, mesh
        self.width, self.dtype, self.per_token = width, dtype, per_token

    def run(self, params: PyTree, tokens: Any, positions: Any, segments: Any, types: Any) -> jax.Array:
        """i32[B, T] each -> [B, T, width], or [B, width] where it is not kept per token; traced."""
        raise NotImplementedError

    @property
    def facts(self) -> list[Any]:
        """All that decides a bit of it beside parameters and tokens, as JSON."""
        raise NotImplementedError

    def layout(self, sources: Sequence[Rows]) -> FileLayout:
        tokens = np.concatenate([rows.length for rows in both(sources)])
        return FileLayout.of(tokens, self.width, self.dtype, self.per_token)

    @cached_property
    def _model_key(self) -> list[Any]:
        device = [jax.default_backend(), jax.devices()[0].device_kind, self.mesh.size, jax.__version__]
        return [VERSION, TOKENS, weights_digest(self.params), *self.facts, device]

    def key(self, sources: Sequence[Rows]) -> str:
        """A hash, in hex, of everything that affects what is kept."""
        return hashlib.sha256(json.dumps([*self._model_key, rows_digest(both(sources))]).encode()).hexdigest()[:40]

    def sizes(self, sets: Sequence[Sequence[Rows]]) -> dict[str, int]:
        """Bytes of each set, by its key."""
        return {self.key(part): self.layout(part).nbytes for part in sets}

    def open(
        self,
        sources: Sequence[Rows],
        stop: Callable[[], bool] = lambda: False,
        say: Callable[[int, int], None] = lambda done, total: None,
        tell: Callable[[str], None] = print,
    ) -> Features:
        """What is kept of the rows of all sources.

        Args:
            sources: the rows of each.
            stop: asked between forward passes.
            say: called now and then with (tokens done, tokens in all).
            tell: called with a sentence when something was damaged.

        Raises:
            UserError: there is no room for them.
            Interrupted: `stop` returned True; what is done is kept.
        """
        rows, layout = Rows.concatenate(both(sources)), self.layout(sources)

        def fill(file, first, done):
            saved = time.monotonic()
            total, before = int(layout.tokens.sum()), None
            for at, end, n, t in layout.batches(self.mesh.size):
                if at < first:
                    continue
                now = (self._pass(rows, layout.order[at:end], n, t), layout.order[at:end], end)
                if before is not None:  # while the device computes the next
                    self._write(file, layout, *before)
                before = now
                if stop() or time.monotonic() - saved > SAVE_SECONDS:
                    self._write(file, layout, *before)
                    before, saved = None, time.monotonic()
                    done(end)
                    say(int(layout.tokens[layout.order[:end]].sum()), total)
                    if stop():
                        raise Interrupted(
                            "Stopped by a signal; the features so far are kept. Run the same command to resume."
                        )
            if before is not None:
                self._write(file, layout, *before)

        return self.store.open(self.key(sources), layout, fill, stop, tell)

    def _pass(self, rows: Rows, chosen: np.ndarray, n: int, t: int) -> jax.Array:
        tokens, positions, segments, types = (np.zeros((n, t), np.int32) for _ in range(4))
        for b, i in enumerate(chosen):
            ids, marks = rows[i]
            end = len(ids)
            tokens[b, :end], positions[b, :end], segments[b, :end] = ids, np.arange(end), 1
            if has_types(rows):
                types[b, :end] = token_types(marks)
        put = NamedSharding(self.mesh, PartitionSpec(row_axes(self.mesh)))
        return self._run(self.params, *(jax.device_put(x, put) for x in (tokens, positions, segments, types)))

    @cached_property
    def _run(self) -> Callable[..., jax.Array]:
        whole, split = PartitionSpec(), PartitionSpec(row_axes(self.mesh))
        specs = (whole, split, split, split, split)
        return jax.jit(jax.shard_map(self.run, mesh=self.mesh, in_specs=specs, out_specs=split, check_vma=False))

    def _write(self, file: Any, layout: FileLayout, features: jax.Array, chosen: np.ndarray, end: int) -> None:
        found = np.asarray(features)[: len(chosen)]
        if self.per_token:
            found = found[np.arange(found.shape[1]) < layout.tokens[chosen][:, None]]
        file.write(found.astype(layout.dtype, copy=False).tobytes())


class Extractor(OncePerRow):
    """Computes the features of data sets under one cut, or finds them.

    Args:
        params: the tree; what lies below the cut is all there.
        store, mesh: as in `OncePerRow`.
    """

    def __init__(self, module: Any, cut: Cut, params: PyTree, store: Store, mesh: Mesh):
        below_cut = weights_below(module, cut, params)
        super().__init__(below_cut, module.spec.width, module.dtype, not cut.pooled, store, mesh)
        self.module, self.cut, self.run = module, cut, below(module, cut)

    @property
    def facts(self) -> list[Any]:
        spec = self.module.spec
        shape = replace(spec, config="", segments=spec.segments[: self.cut.segments])
        body = getattr(self.module, "body", self.module)
        pooling = self.module.pooling if self.cut.pooled else None
        return [repr(shape), str(body.dtype), body.attention, pooling]
