"""The evaluation pipeline: rows through one model or two, compared and written, whatever the task.

An `Evaluator` knows the rows of its task, how a model is run on them and which metrics that gives. Everything else is
the same for all tasks: results stored by an interrupted run, intervals, groups, eval.json and eval/rows.jsonl.
"""

import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxtune.data import Rows
from jaxtune.errors import UserError
from jaxtune.evaluate.comparison import Column, compare, compare_groups
from jaxtune.evaluate.kept import Kept
from jaxtune.evaluate.systems import System
from jaxtune.files import atomic_write_text
from jaxtune.hf.load import read_config
from jaxtune.hf.peft import read_adapter_config
from jaxtune.hf.vectors import MODULES
from jaxtune.infer.source import Tuned
from jaxtune.objectives.task import TASKS, of_model

MOST_SAMPLES = 20

Progress = Callable[
    [str, int], Callable[[int], None]
]  # (task, rows) -> a function to call with the rows done since its last call


def silent(what: str, total: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda count: None


@dataclass(frozen=True)
class Options:
    """The options of an evaluation, named as the flags of `jaxtune eval`; a task may read only some of them.

    Attributes:
        data: files of rows; None: what the run held out.
        format, columns: of `data`; None: those of the run's data.
        metrics: scores of generated answers; None: those that fit the expected ones.
        schema: a JSON schema that answers should conform to.
        scorer: the user's own metrics, each as FILE.py:FUNCTION.
        labels: the answers are labels, and each one is scored.
        group_by: a column; everything is also measured for each of its values.
        rows: how many rows to use, drawn by a hash of their content; None: all.
        max_new_tokens: longest answer; None: 1.25 times the longest expected one.
        batch_size: prompts decoded together.
        base: compare with the base.
    """

    data: Sequence[str] | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    metrics: Sequence[str] | None = None
    schema: Path | None = None
    scorer: Sequence[str] = ()
    labels: bool = False
    group_by: str | None = None
    rows: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    base: bool = True

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise UserError if one of the options `names` is given."""
        for field in fields(self):
            if field.name in names and getattr(self, field.name) not in (field.default, None):
                raise UserError(f"--{field.name.replace('_', '-')} has no effect on {why}.")


class Evaluator(Protocol):
    """Measures held-out rows of a task; `(source, config of the run or None, options) -> Evaluator` makes one.

    Attributes:
        names: the single sources of the rows.
        lines: sentences on the rows that were read and left out.
        notes: sentences that belong to the results.
        tokens: how many tokens of the rows count.
        groups: the group of each row, or None.
    """

    names: list[str]
    lines: list[str]
    notes: list[str]
    tokens: int
    groups: list[str] | None

    def systems(self) -> Iterator[System]:
        """Yield the models to measure, the tuned one last."""

    def measure(self, system: System, kept: Kept, progress: Progress) -> Any:
        """Run one model over the rows; results stored by an earlier, interrupted run are not computed again."""

    def columns(self, measured: Mapping[str, Any]) -> dict[str, Column]:
        """Everything that was measured, by the name of the model, as columns of per-row values."""

    def records(self, measured: Mapping[str, Any], found: Mapping[str, Column]) -> Iterable[dict[str, Any]]:
        """One JSON object for each row: its place `where`, `prompt`, what is `expected`, and each model's results."""

    def confusion(self, measured: Mapping[str, Any]) -> dict[str, Any] | None:
        """Label names, and by model the counts: row the expected label, column the predicted one."""


class Part(NamedTuple):
    """A part of eval.json: what is measured of a source.

    Attributes:
        name: its key there.
        opener: `(source, config of the run or None, options) -> Evaluator`; None: that of the task.
        file: the rows, in eval/.
        more: `(evaluator, measured, columns) -> dict`, what the part has beside metrics, groups and labels.
    """

    name: str
    opener: Callable[..., Evaluator] | None = None
    file: str = "rows.jsonl"
    more: Callable[[Any, Mapping[str, Any], Mapping[str, Column]], dict[str, Any]] | None = None


HELD_OUT = Part("held_out")


def run_config(source: Tuned) -> Any:
    """The resolved config of a run; None if the source is not a run."""
    from jaxtune import config

    if source.run is None:
        return None
    file = source.run / "config.json"
    return config.from_json(file.read_text(encoding="utf-8"), str(file))


def open_evaluator(source: Tuned, cfg: Any, options: Options) -> Evaluator:
    """Make the evaluator of a source: that of its run's task, else that of the model's head."""
    if cfg is not None:
        name = cfg.objective.name
    elif any((folder / MODULES).is_file() for folder in (source.adapter, source.model) if folder):
        name = "embedding"
    else:
        name = of_model(read_config(source.model), source.adapter and read_adapter_config(source.adapter)["task_type"])
    module, _, opener = TASKS[name].evaluator.partition(":")
    return getattr(importlib.import_module(module), opener)(source, cfg, options)


def evaluate(
    source: Tuned,
    options: Options,
    out: Path | None = None,
    *,
    part: Part = HELD_OUT,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a tuned model on held-out rows, beside its base.

    Args:
        source: from `infer.source.find`.
        options: the data and what to measure.
        out: folder for eval.json and eval/; None: nothing is written.
        part: what is measured; default: the task, on held-out rows.
        say: called with each sentence on the data, before anything is measured.
        progress: see `Progress`.

    Returns:
        The value of the part in eval.json.

    Raises:
        UserError: the data cannot be read, or does not fit the model or the options.
    """
    from jaxtune.train.runtime import prepare_jax

    began, step = time.time(), last_step(source)
    prepare_jax()
    evaluator = (part.opener or open_evaluator)(source, run_config(source), options)
    for line in evaluator.lines:
        say(line)
    measured: dict[str, Any] = {}
    with Kept(out and out / "eval" / "kept.jsonl") as kept:
        for system in evaluator.systems():
            measured[system.name] = evaluator.measure(system, kept, progress)
            del system  # frees a whole base before the tuned model is loaded
    found = evaluator.columns(measured)
    records = list(evaluator.records(measured, found))
    quantised = [f"The base is in {q}, as it was in the run."] if (q := source.quantization) else []
    report = {
        "target": str(source.run or source.adapter or source.model),
        "data": evaluator.names,
        "rows": len(records),
        "tokens": evaluator.tokens,
        "metrics": compare(found),
        "notes": evaluator.notes + quantised,
    }
    if evaluator.groups is not None:
        report["groups"] = {"column": options.group_by or "file"} | compare_groups(found, evaluator.groups)
        if absent := absent_groups(run_config(source), options.group_by, evaluator.groups):
            report["groups"]["absent_from_training"] = absent
    if (labels := evaluator.confusion(measured)) is not None:
        report["labels"] = labels
    if part.more is not None:
        report |= part.more(evaluator, measured, found)
    report["samples"] = [_sample(record, measured) for record in records[:MOST_SAMPLES]]
    report["seconds"] = round(time.time() - began, 2)
    if out is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic_write_text(out / "eval" / part.file, lines)
        write_part(source, out, part.name, report, step)
    return report


def absent_groups(cfg: Any, column: str | None, groups: Sequence[str]) -> list[str]:
    """The groups of which no training row is; none where the training data cannot be read, or lacks the column.

    Args:
        cfg: of the run; None: there is no run.
        column: that rows are grouped by; None: they are not.
        groups: of the held-out rows.
    """
    from jaxtune import data

    if cfg is None or column is None:
        return []
    seen: set[str] = set()
    try:
        for name in data.source_names(cfg.data.train):
            seen |= {
                "(none)" if row[column] is None else str(row[column]) for _, row in data.read(name) if column in row
            }
    except UserError:
        return []
    return sorted({*groups} - seen) if seen else []


def _sample(record: dict[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """A row in the form that a run's page shows."""
    names = {"base": "before", "tuned": "after", "model": "after"}
    answers = {names[who]: record[who].get("answer", record[who].get("label")) for who in measured}
    kept = {key: record[key] for key in ("where", "prompt", "expected", "beside", "group") if key in record}
    return kept | {name: answer for name, answer in answers.items() if answer is not None}


def last_step(source: Tuned) -> int | None:
    """The last step of a source's run, to be read before its weights: the run may go on while they are measured."""
    from jaxtune.train.log import read_metrics

    if not source.run or not (source.run / "metrics.jsonl").is_file():
        return None
    return max((m["step"] for m in read_metrics(source.run)), default=None)


def write_part(source: Tuned, out: Path, part: str, report: dict[str, Any], step: int | None) -> None:
    """Write one part of eval.json, with the step of the run (`last_step`); the other parts are kept."""
    from jaxtune.hf.tensors import read_json

    if source.run and (source.run / "metrics.jsonl").is_file():
        report |= {"step": step}
    file = out / "eval.json"
    whole = read_json(file) if file.is_file() else {}
    atomic_write_text(file, json.dumps(whole | {part: report}, indent=1, ensure_ascii=False) + "\n")


# --------------------------------------------------------------------------------------- what evaluators have in common


def sources(source: Tuned, cfg: Any, options: Options) -> tuple[Any, Any, float]:
    """(settings, sources, the fraction of them that is held out) of --data, or of the rows that the run held out."""
    settings = settings_of(cfg)
    if options.data:
        return settings, options.data, 0.0
    if cfg is None:
        where = source.adapter or source.model
        raise UserError(f"{where} is not a run, so it has no data of its own; give --data=FILE.")
    if cfg.data.eval:
        return settings, cfg.data.eval, 0.0
    if not cfg.data.eval_fraction:
        raise UserError(f"The run in {source.run} held out no rows; give --data=FILE.")
    return settings, cfg.data.train, cfg.data.eval_fraction


def settings_of(cfg: Any) -> Any:
    """The config of a run, or the defaults."""
    from jaxtune import config

    return cfg or config.resolve({}, {}, source="the defaults", required=())


def tuning_rows(cfg: Any, tokenizer: Any) -> Rows:
    """The rows of text that a run was tuned on.

    Raises:
        UserError: they cannot be read any more.
    """
    from jaxtune import data
    from jaxtune.objectives.task import DEFAULT_LENGTH

    d = cfg.data
    train, _, _ = data.prepare(
        tokenizer,
        d.train,
        eval_fraction=d.eval_fraction,
        max_length=d.max_length or DEFAULT_LENGTH,
        overlength=d.overlength,
        cache=d.cache,
        **data.reading(d),
    )
    return data.Rows.concatenate(train)


def base_to_compare(cfg: Any, options: Options) -> tuple[bool, list[str]]:
    """Whether there is a base to compare with, and a sentence if one is missing unexpectedly."""
    if cfg is not None and cfg.model.init == "random":
        return False, ["The run started from random weights: there is no base to compare with."]
    return options.base, []


def dtype_of(cfg: Any) -> Any:
    """The dtype of activations: that of the run."""
    from jaxtune.config.recipe import compute_dtype

    return compute_dtype(cfg.model.dtype if cfg else "auto")
