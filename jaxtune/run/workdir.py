"""A run's directory: whether it holds a run to go on with, and whether its disk has room."""

import json
from pathlib import Path
from typing import Any

import jax

from jaxtune import config
from jaxtune.errors import UserError
from jaxtune.train.checkpoint import check_disk, state_bytes


def _left_behind(name: str) -> bool:
    """Whether a file may be there before config.json: log, lock, report on the data, or a config.json half written."""
    return name in ("jaxtune.log", ".lock", "data_report.json") or (
        name.startswith(".config.json.") and name.endswith(".tmp")
    )


def check_is_folder(workdir: Path) -> None:
    """Raise UserError if something stands at `workdir`, or at a folder above it, that is no folder."""
    if there := next((p for p in (workdir, *workdir.parents) if p.exists() and not p.is_dir()), None):
        raise UserError(f"--workdir={workdir}: {there} is a file, not a directory; nothing was changed.")


def check_workdir(workdir: Path, cfg: Any, fingerprint: str | None = None, *, member: bool = False) -> bool:
    """Return whether the workdir holds a run of this config to go on with; `member`: as one of a sweep.

    Raises:
        UserError: it holds something else, or a run with another config or other data.
    """
    check_is_folder(workdir)
    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and not all(_left_behind(p.name) for p in workdir.iterdir()):
            raise UserError(f"--workdir={workdir} is not empty and holds no run (no config.json); nothing was changed.")
        return False
    text = file.read_text()
    config.check_resume(config.from_json(text, str(file)), cfg)
    before = json.loads(text).get("versions", {}).get("data")
    if (workdir / "member.json").exists() and not member:
        raise UserError(
            f"The run in {workdir} is a member of a sweep; nothing was changed. Go on with `jaxtune sweep`, or give "
            "another --workdir."
        )
    if fingerprint and before and before != fingerprint:
        raise UserError(
            f"The data of the run in {workdir} has changed since it started (fingerprint {before[:12]} -> "
            f"{fingerprint[:12]}); nothing was changed. Restore the files or give another --workdir."
        )
    return True


def check_room(workdir: Path, job: Any) -> None:
    """Raise UserError unless the disk has room for the checkpoints (kept, best ones, being written) and the results."""
    result = sum(leaf.size * 4 for leaf in jax.tree.leaves(job.state.trainable))
    check_disk(workdir, (job.experiment.train.keep + 1 + len(job.members)) * state_bytes(job.state) + result)


def as_begun(cfg: Any, workdir: Path | None) -> Any:
    """The config with train.micro_batch=auto as the run in `workdir` has settled it, if there is one."""
    file = None if workdir is None else workdir / "config.json"
    if cfg.train.micro_batch != "auto" or file is None or not file.exists():
        return cfg
    before = config.from_json(file.read_text(), str(file))
    values = {"train.micro_batch": before.train.micro_batch, "train.grad_accum": before.train.grad_accum}
    return config.replaced(cfg, values | ({"model.remat": before.model.remat} if cfg.model.remat == "none" else {}))
