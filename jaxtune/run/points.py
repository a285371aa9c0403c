"""The points of a sweep: from `--sweep.section.key=v1,v2` and files to named configs, and which may share a step."""

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtune import config
from jaxtune.errors import UserError
from jaxtune.objectives.task import TASKS
from jaxtune.reading import parse_json, read_text
from jaxtune.report import sweep_table
from jaxtune.train.optimizers import OPTIMIZERS

# Settings that may differ between members of one compiled step: they are values in the state, not in the program.
IN_STEP = (
    *("optim.lr", "optim.weight_decay", "optim.loraplus_lr_ratio", "train.seed"),
    *("tune.lora.lora_alpha", "tune.lora.lora_dropout", "tune.lora.r", "tune.lora.use_rslora"),
)
# Settings that do not affect what is compared, or make evaluations incomparable.
FIXED = (
    *("log", "evaluate", "data.cache", "data.eval", "data.eval_fraction"),
    *("train.eval_every", "train.eval_batches", "train.save_every", "train.keep", "train.early_stop", "train.best"),
    *("train.cache_features", "train.cache_gib"),
)
LIMIT = 64  # runs, without --yes


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: of its directory, "lr=0.0001,seed=0".
        values: setting path -> value.
        cfg: resolved.
    """

    name: str
    values: dict[str, Any]
    cfg: Any

    def flags(self) -> list[str]:
        """The flags to add to the sweep's command line to train this run alone."""
        return [f"--config.{path}={text_of(value)}" for path, value in self.values.items()]


def _in_step() -> list[str]:
    """What differs between members of one step, of every task."""
    return list(dict.fromkeys([*IN_STEP, *(path for entry in TASKS.values() for path in entry.in_step)]))


def check_path(path: str, origin: str) -> config.Setting:
    """Return the setting that a sweep varies.

    Raises:
        UserError: there is none, or it cannot be swept.
    """
    setting = config.find_setting(path, origin)
    if any(path == fixed or path.startswith(f"{fixed}.") for fixed in FIXED):
        raise UserError(
            f"{origin}: {path} cannot be swept: it does not change what is learned, or makes evaluations incomparable. "
            f"In one step: {', '.join(_in_step())}. Group after group: every other setting of model, tune, data, "
            "objective, optim and train."
        )
    return setting


def read_grid(flags: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the points of a grid, the last setting varying fastest.

    Args:
        flags: setting path -> "v1,v2,..." as typed.

    Raises:
        UserError: a value is empty, wrong or given twice.
    """
    axes = []
    for path, text in flags.items():
        origin = f"--sweep.{path}={text}"
        check_path(path, origin)
        values = []
        for item in text.split(","):
            if not item.strip():
                raise UserError(f"{origin}: an empty value; give values with commas between them, such as 1e-5,1e-4")
            value = config.read_value(path, item.strip(), f"--sweep.{path}={item.strip()}")
            if value in values:
                raise UserError(f"{origin}: {item.strip()} is given twice")
            values.append(value)
        axes.append([(path, value) for value in values])
    return [dict(point) for point in itertools.product(*axes)]


def read_points(file: Path) -> list[dict[str, Any]]:
    """Read points from a .jsonl file ({"optim.lr": 1e-4, ...} a line) or a .csv file (a column a setting).

    Raises:
        UserError: all problems, with their lines.
    """
    text = read_text(file)
    if file.suffix == ".csv":
        try:
            found = [(n, dict(row)) for n, row in enumerate(csv.DictReader(io.StringIO(text)), 2)]
        except csv.Error as error:
            raise UserError(f"--points={file}: {error}") from None
    elif file.suffix == ".jsonl":
        found = [(n, _json_line(file, n, line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        raise UserError(f"--points={file}: expected a .jsonl or a .csv file")
    if not found:
        raise UserError(f"--points={file}: no point in it")
    points = []
    for n, row in found:
        origin = f"{file}:{n}"
        if not row or any(value in (None, "") or path is None for path, value in row.items()):
            raise UserError(f"{origin}: an empty point or value: {row}")
        point = {}
        for path, value in row.items():
            check_path(path, origin)
            flag = f"--sweep.{path}={value}" if file.suffix == ".csv" else origin
            point[path] = config.read_value(path, value, flag)
        points.append(point)
    return points


def _json_line(file: Path, n: int, line: str) -> dict[str, Any]:
    row = parse_json(line, f"{file}:{n}")
    if not isinstance(row, dict):
        raise UserError(f"{file}:{n}: expected an object of settings, found {type(row).__name__}")
    return row


def cross(points: Sequence[dict[str, Any]], more: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every point with every other.

    Raises:
        UserError: a setting is in both, or a point comes twice.
    """
    for a, b in itertools.product(points, more):
        if both := set(a) & set(b):
            raise UserError(f"{sorted(both)[0]} is swept twice: by a flag and by --points")
    return [a | b for a, b in itertools.product(points, more)]


def resolve_points(
    points: Iterable[dict[str, Any]], resolve: Callable[[Mapping[str, str]], Any], *, limit: int | None = LIMIT
) -> list[Point]:
    """Name and resolve the points; `resolve` takes settings as text and returns a config.

    Raises:
        UserError: too many, two are the same, or one is no valid config (a setting without effect, too).
    """
    points = list(points)
    if limit is not None and len(points) > limit:
        raise UserError(f"the sweep has {len(points)} runs, more than {limit}; add --yes if that is meant")
    labels = sweep_table.short_names({path for point in points for path in point})
    found: dict[str, Point] = {}
    for values in points:
        name = _name(values, labels)
        if name in found:
            raise UserError(f"the sweep has the point {name} twice")
        found[name] = Point(name, values, resolve({path: text_of(value) for path, value in values.items()}))
    return list(found.values())


def _name(values: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    text = ",".join(f"{labels[path]}={text_of(value)}" for path, value in values.items())
    safe = re.sub(r"[^\w.=,+-]", "_", text)
    if safe == text and len(safe) <= 120:
        return safe
    return f"{safe[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        pair = value and isinstance(value[0], tuple)
        return ",".join(f"{item[0]}={text_of(item[1])}" if pair else text_of(item) for item in value)
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    return repr(value)


def signature(cfg: Any) -> str:
    """The settings that members of one step must share, as text: points with equal signatures may share a step."""
    tree = json.loads(config.to_json(cfg))
    apart = {*IN_STEP, *TASKS[cfg.objective.name].in_step}
    if cfg.model.init == "random" or (cfg.data.packing and cfg.data.weights and not cfg.train.steps):
        apart.discard("train.seed")  # another base, or another number of steps
    if not OPTIMIZERS[cfg.optim.name].elementwise or cfg.optim.state == "8bit":  # blocks lie across what pads a rank
        apart.discard("tune.lora.r")
    for path in apart:
        section, _, key = path.rpartition(".")
        node = tree
        for name in section.split("."):
            node = node[name]
        node.pop(key)
    return json.dumps(tree, sort_keys=True)


def together(points: Sequence[Point]) -> list[list[Point]]:
    """Group the points that may share a step, in their order."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(signature(point.cfg), []).append(point)
    return list(groups.values())
