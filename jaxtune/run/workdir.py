"""A run's directory: locking it, checking whether it holds a run to resume, and whether its disk has room."""

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune import config
from jaxtune.data.chat import uses_date
from jaxtune.errors import DiskError, Interrupted, RunFailed, UserError, disk_trouble
from jaxtune.files import exclusive
from jaxtune.reading import read_text


@contextlib.contextmanager
def held(workdir: Path | None, record: str = "config.json") -> Iterator[None]:
    """Lock the directory of a run or of a sweep, before reading what is in it.

    Args:
        workdir: None: nothing is locked.
        record: the file that marks such a directory.

    Raises:
        UserError: another process has locked it, it holds something else, or nothing can be written there.
    """
    if workdir is None:
        yield
        return
    check_is_ours(workdir, record)  # before a lock file is written into an unrelated folder
    with exclusive(workdir):
        yield


@contextlib.contextmanager
def explained_disk(workdir: Path, kept: str | None = None) -> Iterator[None]:
    """Turn disk errors during a run into one sentence that says what is kept.

    Args:
        workdir: its directory.
        kept: a sentence; None: the last good checkpoint is named.

    Raises:
        RunFailed: in their place.
    """
    try:
        yield
    except (RunFailed, Interrupted):
        raise
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None or (isinstance(error, UserError) and not isinstance(error, DiskError)):
            raise
        if kept is None:
            steps = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
            kept = f"The last good checkpoint is of step {max(steps)}." if steps else "No checkpoint was saved."
        raise RunFailed(f"{trouble} {kept} The same command resumes.") from None


def _left_behind(name: str) -> bool:
    """Whether a file may exist before the record: a lock, logs, a report on the data, temporary files."""
    return name in ("jaxtune.log", ".lock", "data_report.json", "base.json") or (
        name.startswith(".") and name.endswith(".tmp")
    )


def check_is_ours(workdir: Path, record: str = "config.json") -> bool:
    """Return whether `record` is in the directory.

    Raises:
        UserError: it is not a directory, or it holds other files but no record.
    """
    if there := next((p for p in (workdir, *workdir.parents) if p.exists() and not p.is_dir()), None):
        raise UserError(f"--workdir={workdir}: {there} is a file, not a directory; nothing was changed.")
    if (workdir / record).exists():
        return True
    if workdir.exists() and not all(_left_behind(p.name) for p in workdir.iterdir()):
        what = {"config.json": "run", "sweep.json": "sweep"}.get(record, "decision")
        raise UserError(f"--workdir={workdir} is not empty and holds no {what} (no {record}); nothing was changed.")
    return False


def check_workdir(
    workdir: Path, cfg: Any, fingerprint: str | None = None, base: Any = None, *, member: bool = False
) -> bool:
    """Return whether the workdir holds a run of this config to resume; `member`: as one of a sweep.

    Raises:
        UserError: it holds something else, or a run with another config, other data or another base.
    """
    if not check_is_ours(workdir):
        return False
    file = workdir / "config.json"
    text = read_text(file)
    config.check_resume(config.from_json(text, str(file)), cfg)
    versions = versions_of(text)
    before = versions.get("rows")
    if fingerprint and before is None and "data" in versions:  # which the readers of version 0.1.0 entered into
        print(f"The run in {workdir} was started by an older version; its data cannot be compared.")
    if (workdir / "member.json").exists() and not member:
        raise UserError(
            f"The run in {workdir} is a member of a sweep; nothing was changed. Resume it with `jaxtune sweep`, or "
            "give another --workdir."
        )
    if fingerprint and before and before != fingerprint:
        raise UserError(
            f"The data of the run in {workdir} has changed since it started (fingerprint {before[:12]} -> "
            f"{fingerprint[:12]}); nothing was changed. Restore the files or give another --workdir."
        )
    if base is not None:
        base.check(workdir)
    return True


def versions_of(text: str) -> dict[str, Any]:
    """What the config.json of a run records beside its settings: versions, and what its rows and features were."""
    found = json.loads(text).get("versions")
    return found if isinstance(found, dict) else {}


def dated(cfg: Any, rows: Any) -> Any:
    """The config with the date that the chat template of `rows` writes, which a run resumed later uses again."""
    chat = any(source.chat for source in rows.report.sources)
    if cfg.data.date or not chat or not uses_date(rows.tokenizer.chat_template):
        return cfg
    return config.replaced(cfg, {"data.date": datetime.date.today().isoformat()})


def check_room(workdir: Path, job: Any) -> None:
    """Raise UserError unless the disk has room for the checkpoints (kept, best ones, being written) and the results."""
    import jax

    from jaxtune.train.checkpoint import check_disk, state_bytes

    result = sum(leaf.size * 4 for leaf in jax.tree.leaves(job.state.trainable))
    check_disk(workdir, (job.experiment.train.keep + 1 + len(job.members)) * state_bytes(job.state) + result)


def as_begun(cfg: Any, workdir: Path | None) -> Any:
    """The config with the date and micro-batch that the run in `workdir`, if there is one, has chosen."""
    file = None if workdir is None else workdir / "config.json"
    if file is None or not file.exists():
        return cfg
    before = config.from_json(read_text(file), str(file))
    if not cfg.data.date and before.data.date:
        cfg = config.replaced(cfg, {"data.date": before.data.date})
    if cfg.train.micro_batch != "auto":
        return cfg
    values = {"train.micro_batch": before.train.micro_batch, "train.grad_accum": before.train.grad_accum}
    return config.replaced(cfg, values | ({"model.remat": before.model.remat} if cfg.model.remat == "none" else {}))
