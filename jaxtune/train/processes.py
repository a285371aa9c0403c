"""Several processes that share a run: how they meet, agree, write and end. JAX's own runtime does the rest.

Each process makes the same global batch, a pure function of (data, seed, step), and keeps the rows of its devices. The
first one writes; the others work in a copy of the run's directory that is thrown away.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.errors import RunFailed, UserError

COME = 300  # seconds for all processes to come
GRACE = 2  # seconds that the others have to find the same error, before JAX's runtime aborts them without the first
STUCK = 900  # seconds without a step, an evaluation or a checkpoint before a process ends the job
_shared: dict[Path, Path] = {}
_beat = [time.monotonic(), "the start"]


def start(coordinator: str | None, process_id: int | None, count: int | None, come: int = COME) -> bool:
    """Meet the other processes; return whether there are any. Called before JAX looks for devices.

    Without arguments, Slurm and Open MPI say who and where the others are, if they started more than one task. With a
    `count` of 1 alone each task is a run of its own.

    Args:
        coordinator: host:port of the first process.
        process_id: this one's number, from 0.
        count: how many there are.
        come: seconds to wait for them.

    Raises:
        UserError: only some of the three are given, or they do not fit.
        RunFailed: the others did not come.
    """
    if count == 1 and coordinator is None and process_id in (None, 0):
        return False
    given = {"--coordinator": coordinator, "--process-id": process_id, "--num-processes": count}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{', '.join(missing)} is missing: several processes need {', '.join(given)}.")
    if missing and not _launched(os.environ):
        return False
    if not missing and not 0 <= process_id < count:
        raise UserError(f"--process-id={process_id}: expected a number from 0 to {count - 1}, below --num-processes.")
    if not missing and not (":" in coordinator and coordinator.rpartition(":")[2].isdecimal()):
        raise UserError(f"--coordinator={coordinator}: expected host:port of process 0.")
    if count == 1:
        return False
    try:
        jax.distributed.initialize(coordinator, count, process_id, initialization_timeout=come)
    except Exception as error:  # of XLA's coordination service
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunFailed(
            f"The {count or 'other'} processes did not all come within {come} s to {coordinator or 'the coordinator'}: "
            f"{lines[0][:300] if lines else type(error).__name__}"
        ) from None
    return True


def _launched(env: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several tasks of this job."""
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1")  # of the step: a shell is one task
    slurm = "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and tasks > 1
    return slurm or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether other processes share the run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if not several() else bool(_gathered(np.int32(flag)).any())


def from_first(value: int) -> int:
    """The first process's value."""
    return value if not several() else int(_gathered(np.int64(value).astype(np.int32))[0])


def _gathered(value: Any) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=isinstance(value, jax.Array)))


def agree(facts: Mapping[str, Any]) -> None:
    """Compare what each process is about to do.

    Raises:
        UserError: in all of them, if they differ.
    """
    if not several():
        return
    texts = [json.dumps(value, sort_keys=True, default=str) for value in facts.values()]
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    found = _gathered(np.frombuffer(b"".join(digests), np.uint8).reshape(len(facts), -1))
    for i, name in enumerate(facts):
        if others := [p for p in range(len(found)) if not np.array_equal(found[p, i], found[0, i])]:
            raise UserError(
                f"The processes of this run differ in {name}: process 0 has another than {str(others)[1:-1]}. "
                "Start all of them with the same command, files and versions; tasks that are runs of their own need "
                "--num-processes=1."
            )


def put(tree: Any, where: Any) -> Any:
    """Put host arrays, or arrays that each process has, on devices, of which a process may reach its own only.

    Args:
        tree: of arrays.
        where: a sharding, or a tree of them.
    """
    if not several():
        return jax.device_put(tree, where)
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda x: where, tree)
    return jax.tree.map(_put, tree, where)


def _put(x: Any, where: Any) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, where)  # from one global array to another
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(x), where))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def on_host(x: Any, keep: bool = True) -> np.ndarray | None:
    """An array as this process can read it, whole; all processes call it. Without `keep` it takes part, for None.

    A stack of matrices that is split over processes is gathered a matrix at a time: a device holds one of them whole.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x) if keep else None
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0)) if keep else None
    if x.ndim < 3:
        found = _gathered(x)
        return found if keep else None
    out = np.empty(x.shape, x.dtype) if keep else None
    for i in range(x.shape[0]):
        part = on_host(x[i], keep)
        if keep:
            out[i] = part
    return out


def to_first(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as the first process can read them, whole; None in the others. All processes call it."""
    return {name: on_host(x, is_first()) for name, x in arrays.items()} if several() else dict(arrays)


@contextlib.contextmanager
def own_folder(workdir: Path | None) -> Iterator[Path | None]:
    """The run's directory for the first process, and for each other one a copy of its small files.

    Checkpoints are read from the run's directory itself; see `shared`.
    """
    if workdir is None or not several():
        yield workdir
        return
    from jax.experimental import multihost_utils

    with contextlib.ExitStack() as opened:
        folder = workdir
        if not is_first():
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="jaxtune-")))
            for file in workdir.glob("*.json*"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(file, folder)
            _shared[folder] = workdir
            opened.enter_context(contextlib.redirect_stdout(opened.enter_context(open(os.devnull, "w"))))
        multihost_utils.sync_global_devices("folders")
        yield folder


def shared(workdir: Path) -> Path:
    """The run's directory, of which `workdir` may be a copy."""
    return _shared.get(workdir, workdir)


def beat(what: str) -> None:
    """Tell the watchdog that something was done."""
    _beat[:] = time.monotonic(), what


def watch(seconds: float = STUCK) -> None:
    """End this process, with status 1 and a message, once nothing was done for so many seconds.

    What counts is `beat`: the end of a part of the setup, a step, a batch of an evaluation.

    A process that waits for one that is dead or stuck waits for ever in the collective of a step (jax-ml/jax#38503).
    """
    beat("the start")

    def look():
        while time.monotonic() - _beat[0] < seconds:
            time.sleep(min(1.0, seconds / 10))
        end(f"nothing has happened for {seconds:g} s, since {_beat[1]}; another process may be dead or stuck")

    threading.Thread(target=look, daemon=True).start()


def wait(name: str) -> None:
    """Wait for all processes, for as long as the first one writes results."""
    from jax.experimental import multihost_utils

    beat(name)
    _beat[0] = math.inf
    multihost_utils.sync_global_devices(name)


def end(why: str, status: int = 1) -> None:
    """End this process at once: a proper shutdown would wait for the others."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    again = " Start all processes again to go on from the last checkpoint." if status == 1 else ""
    print(f"jaxtune: {who}: error: {why.rstrip('.')}. The job ends.{again}", file=sys.stderr, flush=True)
    if is_first():
        time.sleep(GRACE)
    os._exit(status)
