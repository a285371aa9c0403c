"""Checkpoints of a run: the train state and the loop's own counters, by orbax, asynchronous and atomic.

The state is stored flat, `{"trainable/segment_0/...": array}`: a checkpoint can be read without the code that wrote
it, and the polymorphic leaves need no registration. Beside it stand the counters, and checksums of every array and of
the counters, which are verified when they are read. orbax has no checksums: a flipped bit in an array came back as
another number.
"""

import copy
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash

from jaxtune.errors import RunFailed, UserError
from jaxtune.train import processes
from jaxtune.train.step import TrainState
from jaxtune.tree import flatten


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _not_of_its_tasks(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage() or "orbax" not in record.getMessage()


def _not_of_its_loop(told: Any) -> None:
    if told.exc_type is not RuntimeError or str(told.exc_value) != "Event loop is closed":
        _unraisablehook(told)


# orbax raises the first error of a write, and closes its event loop then. All that shows the errors of the other arrays
# as tracebacks is silenced: its log, asyncio's, and what callbacks of tensorstore raise on the closed loop.
logging.getLogger("absl").addFilter(_not_of_orbax)
logging.getLogger("asyncio").addFilter(_not_of_its_tasks)
_unraisablehook, sys.unraisablehook = sys.unraisablehook, _not_of_its_loop


def _flat(state: TrainState) -> dict[str, Any]:
    return flatten(state._replace(key=jax.random.key_data(state.key)))


def _abstract(state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    """What `_flat` returns, for a state that may itself be abstract."""
    key = jax.eval_shape(jax.random.key_data, state.key)
    flat = flatten(state._replace(key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.step.sharding)))
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in flat.items()}


def _unflat(arrays: dict[str, jax.Array], like: TrainState) -> TrainState:
    raw = jax.tree.unflatten(jax.tree.structure(like._replace(key=0)), arrays.values())
    return raw._replace(key=jax.random.wrap_key_data(raw.key))


class Damaged(RunFailed):
    """A checkpoint cannot be read, and has been renamed."""


class Checkpoints:
    """The checkpoints of one run directory.

    The newest `keep` are kept, and those whose steps are `counters["runs"][...]["best"]["step"]` in the newest. Nothing
    is deleted before its replacement is complete, so there is one more while one is written. Those at or before step
    `since` are not kept here.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None] = print, since: int = 0):
        self.folder, self.keep, self.say, self.since = folder.absolute(), keep, say, since
        self._counters: dict[str, Any] = {}  # of the newest checkpoint
        self._warned = False  # whether the warning on checkpoints without checksums was printed
        self.manager = None  # in processes that do not write
        if not processes.is_first():
            return
        for left in self.folder.glob("*.orbax-checkpoint-tmp*"):  # by a process that was killed; orbax would warn
            shutil.rmtree(left)
        options = {"create": True, "enable_async_checkpointing": True}
        if processes.several():
            only = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            options = {"create": False, "enable_async_checkpointing": False, "multiprocessing_options": only}
            self.folder.mkdir(parents=True, exist_ok=True)  # which orbax does for all processes or none
        self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(**options))

    def save(self, step: int, state: TrainState, counters: dict[str, Any]) -> None:
        """Start writing; returns once the arrays are copied from the device."""
        self.wait()
        flat = processes.to_first(_flat(state))
        if self.manager is None or step in self.manager.all_steps():
            return
        self._counters = copy.deepcopy(counters)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(flat),
            counters=ocp.args.JsonSave(self._counters),
            checksums=ocp.args.JsonSave(_checksums(flat, self._counters)),
        )
        self.manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Wait until nothing is being written; then delete checkpoints that are neither new nor best."""
        if self.manager is None:
            return
        self.manager.wait_until_finished()
        steps = self.steps()
        wanted = {*steps[-self.keep :], *_best_steps(self._counters)}
        for step in steps:
            if step not in wanted:
                self.manager.delete(step)

    def steps(self) -> list[int]:
        if self.manager is None:
            return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())
        return sorted(self.manager.all_steps())

    def restore(
        self, like: Callable[[dict[str, Any]], TrainState], step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the state and counters of `step`, or of the newest checkpoint that can be read; None: there is none.

        `like` returns a state of the same structure, shapes and places for the counters that were saved with it. A
        checkpoint that cannot be read, or is damaged, is reported and renamed, and the one before it
        taken.

        Raises:
            Damaged: the checkpoint of `step` cannot be read.
            UserError: a checkpoint is intact, but of another model or method.
        """
        if processes.several() and step is None:
            found = self._restore(like, None) if processes.is_first() else None
            read = processes.from_first(_first(found[0].step) if found else -1)
            return found if processes.is_first() or read < 0 else self._read(read, like)
        return self._restore(like, step)

    def _restore(
        self, like: Callable[[dict[str, Any]], TrainState], step: int | None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                state, counters = self._read(candidate, like)
            except UserError:
                raise
            except Exception as e:  # a damaged directory can be wrong in many ways
                why = str(e).partition("\n")[0][:200] or type(e).__name__
                aside = self._set_aside(candidate)
                message = f"The checkpoint of step {candidate} cannot be read ({why}) and is set aside as {aside.name}"
                if step is not None:
                    raise Damaged(f"{message}.") from None
                self.say(f"{message}; {'using the one before' if self.steps() else 'there is none before it'}.")
                continue
            if step is None:
                for run in counters["runs"]:
                    if run["best"] and run["best"]["step"] > self.since and run["best"]["step"] not in self.steps():
                        run["best"] = None  # it was deleted for a better one, which training will find again
                self._counters = copy.deepcopy(counters)
            return state, counters
        return None

    def _set_aside(self, step: int) -> Path:
        names = (f"damaged-{step}{suffix}" for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
        aside = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        (self.folder / str(step)).rename(aside)
        if self.manager is not None:
            self.manager.reload()
        return aside

    def _read(self, step: int, like: Callable[[dict[str, Any]], TrainState]) -> tuple[TrainState, dict[str, Any]]:
        folder = self.folder / str(step)
        counters = json.loads((folder / "counters" / "metadata").read_bytes())
        checksums = _read_checksums(folder, counters)
        if checksums is None and not self._warned:
            self._warned = True
            self.say("The checkpoints here were written without checksums, so they cannot be verified.")
        wanted = like(counters)
        abstract = _abstract(wanted)
        if checksums and checksums.keys() != abstract.keys():
            unlike = sorted(checksums.keys() ^ abstract.keys())[:5]
            raise _of_another_run(folder, f"only one of them has {', '.join(unlike)}")
        return _unflat(_read_arrays(folder / "state", abstract, checksums), wanted), counters

    def close(self) -> None:
        self.wait()
        self.leave()

    def leave(self) -> None:
        """Close, and delete nothing."""
        if self.manager is not None:
            self.manager.close()


def _first(array: jax.Array) -> int:
    """The first entry of an array that is whole in each process."""
    return int(np.asarray(array.addressable_data(0)).ravel()[0])


def checksum(array: Any) -> str:
    """A hash of an array's type, shape and bytes, hex."""
    host = np.ascontiguousarray(jax.device_get(array))
    found = xxhash.xxh3_128(f"{host.dtype}{host.shape}".encode())
    found.update(host.reshape(-1).view(np.uint8))
    return found.hexdigest()


def _checksums(flat: Mapping[str, Any], counters: dict[str, Any]) -> dict[str, Any]:
    """Checksums of every array, of the counters, and of these checksums themselves, to store with a checkpoint."""
    with ThreadPoolExecutor(4) as pool:
        arrays = dict(zip(flat, pool.map(checksum, flat.values()), strict=True))
    found = {"arrays": arrays, "counters": _of_json(counters)}
    return found | {"all": _of_json(found)}


def _of_json(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _read_checksums(folder: Path, counters: dict[str, Any]) -> dict[str, str] | None:
    """The checksums of a checkpoint's arrays; None: it was written without them.

    Raises:
        ValueError: they, or the counters, are damaged.
    """
    file = folder / "checksums" / "metadata"
    if not file.exists():
        return None
    found = json.loads(file.read_bytes())
    if found.pop("all") != _of_json(found):
        raise ValueError("the checksums are damaged")
    if found["counters"] != _of_json(counters):
        raise ValueError("the counters are damaged")
    return found["arrays"]


def _of_another_run(folder: Path, differ: str) -> UserError:
    return UserError(
        f"The checkpoint in {folder} is whole, and of another model, method or precision than this run: {differ}. "
        "Nothing was changed; give another --workdir."
    )


def _read_arrays(
    folder: Path, wanted: dict[str, jax.ShapeDtypeStruct], checksums: Mapping[str, str] | None
) -> dict[str, jax.Array]:
    """Read the arrays that orbax wrote to `folder`.

    orbax is not used: it reads on an event loop and closes it at the first error, and the other pending reads then
    end in tracebacks about a closed loop, which cannot be caught.

    Raises:
        ValueError: they are damaged, or not those expected and without checksums.
        UserError: they are intact, and not those expected.
    """
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = (key.decode().rpartition("/") for key in ts.KvStore.open(store).result().list().result())
    if unlike := {name for name, _, kind in keys if kind == ".zarray"} ^ set(wanted):
        raise ValueError(f"checkpoint and run differ in {sorted(unlike)[:5]}")

    def read(name: str) -> jax.Array:
        spec = {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
        array, like = ts.open(spec, open=True, read=True).result().read().result(), wanted[name]
        if checksums is not None and checksum(array) != checksums[name]:
            raise ValueError(f"{name} is not what was written")
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            differ = f"{name} is {array.dtype}{array.shape} there and {like.dtype}{like.shape} here"
            if checksums is None:
                raise ValueError(differ)
            raise _of_another_run(folder.parent, differ)
        if checksums is None and jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")  # no run saves these
        return processes.put(array, like.sharding)

    with ThreadPoolExecutor() as pool:
        return dict(zip(wanted, pool.map(read, wanted), strict=True))


def _best_steps(counters: dict[str, Any]) -> set[int]:
    return {int(run["best"]["step"]) for run in counters.get("runs", ()) if run["best"]}


def state_bytes(state: TrainState) -> int:
    """Bytes of one checkpoint."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in _flat(state).values())


def check_disk(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of `folder`, which need not be there yet, has room for `needed` bytes."""
    folder = folder.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < needed:
        raise UserError(
            f"The disk of {folder} has {_size(free)} free; this run writes up to {_size(needed)} "
            "(checkpoints and the result). Free some, lower train.keep, or give another --workdir."
        )


def _size(n: int) -> str:
    return f"{n / 2**30:,.2f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"
