"""Read a run directory: its settings, its metrics by step, and its summary."""

import contextlib
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import BY_PATH, DERIVED, load_file
from jaxtune.errors import UserError
from jaxtune.reading import parse_json, read_text
from jaxtune.report.evaluation import check_metrics, read_evaluation
from jaxtune.train.best import sign
from jaxtune.train.log import read_metrics


class Measured(NamedTuple):
    """A value at a step."""

    step: int
    value: float


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        folder: as it was given, for commands to paste.
        settings: all settings, "section.key" -> value.
        overrides: those that differ from their defaults.
        versions: package -> version.
        metrics: the lines of metrics.jsonl that have a step.
        summary: summary.json; empty where there is none.
        evaluation: eval.json, see `read_evaluation`; empty if there is none for the last step.
        data: the report of `jaxtune data` in the run, or of training's own checks; empty if there is neither.
        sampled: texts generated at evaluations, if configured: {"prompt", "expected", "before", "after"},
            of the base and of the last evaluation.
    """

    folder: Path
    settings: dict[str, Any]
    overrides: dict[str, Any]
    versions: dict[str, str]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    sampled: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """The base, short: a hub id, or the last two parts of a path."""
        path = str(self.settings["model.path"] or "a model")
        return "/".join([part for part in path.split("/") if part][-2:])

    def fact(self, name: str) -> float | None:
        """A number of the summary."""
        value = self.summary.get(name)
        return value if is_number(value) else None

    def facts(self, name: str, kind: type) -> list:
        """The entries of a list of the summary that are of this kind."""
        value = self.summary.get(name)
        return [entry for entry in value if isinstance(entry, kind)] if isinstance(value, list) else []

    def series(self, key: str) -> list[Measured]:
        """A metric by step. If a step was logged twice, the last value counts; NaN and infinity are left out."""
        values = {line["step"]: line[key] for line in self.metrics if _in_curve(line) and is_number(line.get(key))}
        return [Measured(step, values[step]) for step in sorted(values)]

    def best(self) -> Measured | None:
        """The loss of the best evaluation by train.best, the first of equals; that of the base, at step 0, is none."""
        metric, losses = self.settings["train.best"], dict(self.series("eval/loss"))
        tuned = (point for point in self.series(metric) if point.step > 0 and point.step in losses)
        best = max(tuned, key=lambda point: sign(metric) * point.value, default=None)
        return best and Measured(best.step, losses[best.step])

    def cost_of_best(self) -> float:
        """What the best evaluation has of train.best, negated where more is better; infinity where there is none."""
        metric, best = self.settings["train.best"], self.best()
        found = {point.step: -sign(metric) * point.value for point in self.series(metric)}
        return found[best.step] if best else math.inf

    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    def before(self) -> dict[str, float]:
        """Evaluation metrics of the untuned model: those of step 0, and lines marked as such."""
        at_zero = [line for line in self.metrics if line["step"] == 0 and "phase" not in line]
        return _evaluations([*at_zero, *(line for line in self.metrics if line.get("phase") == "before")])

    def after(self) -> dict[str, float]:
        """Evaluation metrics of the result: those of the best evaluation, and lines marked as such.

        A metric that evaluations of the loss do not log is taken from its last line after step 0.
        """
        best = self.best()
        tuned = [line for line in self.metrics if line["step"] > 0 and "phase" not in line]
        rare = [{k: v for k, v in line.items() if k not in ("eval/loss", "eval/perplexity")} for line in tuned]
        at_best = [line for line in tuned if best and line["step"] == best.step]
        marked = [line for line in self.metrics if line.get("phase") == "after"]
        return _evaluations([*rare, *at_best, *marked])

    def seconds(self) -> float | None:
        """Wall time of the run: a number in the summary, or the sum of its parts."""
        parts = self.seconds_by_part()
        return sum(parts.values()) if parts else self.fact("seconds")

    def seconds_by_part(self) -> dict[str, float]:
        value = self.summary.get("seconds")
        return {str(k): v for k, v in value.items() if is_number(v)} if isinstance(value, dict) else {}

    def groups(self) -> dict[str, tuple[int, int]]:
        """Module name -> (trainable, all) parameters."""
        value = self.summary.get("groups")
        pairs = value.items() if isinstance(value, dict) else ()
        return {str(k): tuple(v) for k, v in pairs if isinstance(v, list) and len(v) == 2 and all(map(is_number, v))}

    def cost(self, name: str) -> float | None:
        """A number on the run's cost: "flops", "peak_bytes", "runs" that shared the process."""
        value = self.summary.get("cost")
        value = value.get(name) if isinstance(value, dict) else None
        return value if is_number(value) else None

    def scores(self) -> dict[str, dict[str, Any]]:
        """The run's own scores with intervals: metric -> an entry as in eval.json."""
        try:
            return check_metrics(_object_in(self.summary, "scores"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder / 'summary.json'}: its scores are not what a run writes: {error!r}"
            ) from None

    def speed(self) -> float | None:
        """Median of the logged tokens per second."""
        values = [point.value for point in self.series("train/tokens_per_second")]
        return statistics.median(values) if values else None

    def tokens(self) -> int | None:
        """Tokens read from the start to the end."""
        return max((int(point.value) for point in self.series("train/tokens")), default=None)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _in_curve(line: Mapping[str, Any]) -> bool:
    """The evaluation of the finished result belongs to no step of the curve."""
    return line.get("phase") != "after"


def _evaluations(lines: list[dict[str, Any]]) -> dict[str, float]:
    return {k: v for line in lines for k, v in line.items() if k.startswith("eval/") and is_number(v)}


def read_run(folder: str | os.PathLike) -> RunRecord:
    """Read a run directory.

    Raises:
      UserError: it is not a run, has logged nothing yet, or one of its files is not what a run writes.
    """
    folder = Path(folder).expanduser()
    _check(folder)
    if folder.name in ("", ".."):  # commands to paste contain the folder's name
        folder = folder.resolve()
    overrides, _ = load_file(str(folder / "config.json"))
    metrics = [line for line in read_metrics(folder) if isinstance(line, dict) and _is_step(line.get("step"))]
    if not metrics:
        raise UserError(f"{folder / 'metrics.jsonl'}: no step is logged yet; there is nothing to report")
    summary, report = (
        read_object(file, whose) if file.is_file() else {}
        for file, whose in ((folder / "summary.json", "a run"), (folder / "data_report.json", "jaxtune data"))
    )
    evaluation = read_evaluation(folder, max(line["step"] for line in metrics))
    versions = read_object(folder / "config.json", "a run").get("versions")
    run = as_run({**overrides, "versions": versions}, metrics, summary)
    sampled = _sampled(folder / "samples.jsonl")
    found = {"evaluation": evaluation, "data": report or run.data, "sampled": sampled}
    return replace(run, folder=folder, overrides=_flat(overrides), **found)


def _sampled(file: Path) -> list[dict[str, Any]]:
    """The texts of the last evaluation with those of step 0."""
    by_step: dict[int, dict[str, dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(UserError):  # cut off by a kill
            entry = parse_json(line, str(file), halves=True)
            if isinstance(entry, dict) and _is_step(entry.get("step")) and isinstance(entry.get("prompt"), str):
                by_step.setdefault(entry["step"], {})[entry["prompt"]] = entry
    last, first = by_step.get(max(by_step, default=0), {}), by_step.get(0, {})
    return [
        {"prompt": prompt, "expected": entry.get("expected"), "after": entry.get("text")}
        | ({"before": first[prompt].get("text")} if prompt in first and entry["step"] else {})
        for prompt, entry in last.items()
    ]


def as_run(
    config: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]] = (), summary: Mapping[str, Any] | None = None
) -> RunRecord:
    """A run record from values in memory: the sections of its config, with versions, its metrics and its summary."""
    given, summary = _flat({name: keys for name, keys in config.items() if name != "versions"}), dict(summary or {})
    versions = {str(k): str(v) for k, v in _object_in(config, "versions").items()}
    data = _object_in(summary, "data_report")
    return RunRecord(Path("run"), _settings(given), given, versions, list(metrics), summary, data=data)


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give the --workdir of a run")
    missing = [name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        inside = sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))
        hint = f". It holds runs; give those: {' '.join(inside[:4])}{' ...' * (len(inside) > 4)}" if inside else ""
        raise UserError(f"{folder} is not the directory of a run: it has no {' and no '.join(missing)}{hint}")


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_object(path: Path, whose: str) -> dict[str, Any]:
    """Read a JSON object that `whose` wrote; raises UserError if it is none."""
    value = parse_json(read_text(path), str(path), halves=True)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, as {whose} writes it; found {type(value).__name__}")
    return value


def _object_in(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _settings(overrides: Mapping[str, Any]) -> dict[str, Any]:
    values = {path: overrides.get(path, setting.default) for path, setting in BY_PATH.items()}
    return values | {path: rule(values) for path, rule in DERIVED.items() if values[path] is None}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"tune": {"lora": {"r": 16}}} -> {"tune.lora.r": 16}; a mapping that is a setting's value stays whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in BY_PATH:
            flat[path] = value
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{path}.")
    return flat
