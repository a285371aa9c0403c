"""`jaxtune eval`: measure a run against its base on held-out rows, or with tasks of lm-evaluation-harness."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtune.cli import OF_ADAPTERS, Flag, parse_options
from jaxtune.errors import UserError

USAGE = """usage: jaxtune eval TARGET [--data=FILE ...] [--metrics=a,b] [--group-by=COLUMN] [flags]
       jaxtune eval TARGET --tasks=a,b [--include-path=DIR] [flags]

Held-out rows: loss and perplexity, and scores of generated answers, of the base and of the tuned model, with 95%
bootstrap intervals and a paired test that says better, worse or no evidence. A run knows its base, its data, template
and columns; its eval.json, report.html and model card are written again. Started again, it goes on where it was killed.

With --tasks: tasks of lm-evaluation-harness (pip install 'jaxtune[eval]').

metrics: exact_match, token_f1, rouge_l, numeric (the number after ####, or the last), json_valid, json_exact,
json_fields; loss alone generates nothing. Default: those that fit the expected answers. --schema and --scorer add
more."""

ARGUMENTS = {"target": Flag("run directory, adapter directory, model directory or hub id", required=True)}
FLAGS = {
    "data": Flag("rows to evaluate on; again for more files. Default: what the run held out", list),
    "format": Flag("of --data; default: that of the run's data, or by its columns"),
    "columns": Flag("of --data: ours=theirs,...; default: the run's"),
    "metrics": Flag("names, separated by commas"),
    "schema": Flag("JSON schema that answers should conform to", Path),
    "scorer": Flag("FILE.py:FUNCTION, a metric of your own: (prediction, reference) -> number or None", list),
    "labels": Flag("answers are labels: score each one; accuracy, macro-F1, calibration, confusion", bool, False),
    "group-by": Flag("column of the rows: everything also for each of its values"),
    "rows": Flag("use so many rows, drawn by a hash of their content; default: all", int),
    "max-new-tokens": Flag("longest answer; default: the longest expected one and a quarter more", int),
    "batch-size": Flag("prompts answered together", int, 32),
    "tuned-only": Flag("leave the base out", bool, False),
    "tasks": Flag("tasks of lm-evaluation-harness, separated by commas"),
    "include-path": Flag("folder with YAML tasks of your own; then only those are known", Path),
    "limit": Flag("documents of a task at most", int),
    "num-fewshot": Flag("examples in a task's prompt; default: the task's", int),
    "chat": Flag("render a task's prompts with the chat template", bool, False),
    **OF_ADAPTERS,
    "out": Flag("directory for eval.json and answers; default: the run's", Path),
}
OF_TASKS = ("include-path", "limit", "num-fewshot", "chat")
OF_ROWS = ("data", "format", "columns", "metrics", "schema", "scorer", "labels", "group-by", "rows", "max-new-tokens")


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    _check_flags(options)
    from jaxtune.files import exclusive
    from jaxtune.hf import tensors
    from jaxtune.infer.source import check_continues, find

    source = find(options.target, options.base, any_base=options.allow_other_base)
    tensors.index_dir(source.model)  # missing weights are named before anything is read
    out = options.out.expanduser() if options.out else source.run
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(exclusive(out / "eval"))
        if _has_labels(source):
            if options.tasks:
                raise UserError(
                    f"--tasks: {source.model} has a label head; the harness asks models that continue text."
                )
            _labelled(options, source, out)
        else:
            check_continues(source)
            (_tasks if options.tasks else _held_out)(options, source, out)
    if out is not None:
        print(f"written: {out / 'eval.json'}")
    if out is not None and out == source.run:
        _refresh(source)


def _has_labels(source: Any) -> bool:
    """Whether what is evaluated has a label head rather than a language model's."""
    from jaxtune.hf.load import read_config
    from jaxtune.hf.peft import read_adapter_config
    from jaxtune.models.classifier import TASK_TYPES, read_labels

    if source.config is not None:
        return source.config.get("objective", {}).get("name", "causal_lm") != "causal_lm"
    if source.adapter is not None and (kind := read_adapter_config(source.adapter)["task_type"]) is not None:
        return kind in TASK_TYPES.values()
    return read_labels(read_config(source.model)) is not None


def _check_flags(options: SimpleNamespace) -> None:
    other, why = (OF_ROWS, "has no effect with --tasks") if options.tasks else (OF_TASKS, "needs --tasks")
    for name in other:
        if getattr(options, name.replace("-", "_")) != FLAGS[name].default:
            raise UserError(f"--{name} {why}.")
    for name in ("rows", "max-new-tokens", "batch-size", "limit"):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected 1 or more.")
    if options.labels and (options.metrics or options.schema or options.scorer):
        raise UserError("--labels scores labels and generates nothing: leave out --metrics, --schema and --scorer.")


# ------------------------------------------------------------------------------------------------------ held-out rows


def _held_out(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    from jaxtune.config.recipe import compute_dtype
    from jaxtune.evaluate import held_out
    from jaxtune.evaluate.kept import Kept
    from jaxtune.evaluate.systems import systems
    from jaxtune.infer.source import eos_ids, tokenizer_of
    from jaxtune.train.runtime import prepare_jax

    began = time.time()
    own = _own_metrics(options)
    cfg = _config(source)
    prepare_jax()
    tokenizer = tokenizer_of(source)
    virtual = _virtual(source)
    rows, names = _rows(options, cfg, source, tokenizer, virtual)
    plan = _plan(options, rows, own, eos_ids(tokenizer, source), virtual)
    base, notes = _with_base(options, source, cfg)
    measured, progress = {}, Progress()
    with Kept(out and out / "eval" / "kept.jsonl") as kept, progress:
        for system in systems(source, base=base, dtype=compute_dtype(cfg.model.dtype if cfg else "auto")):
            if not measured:
                notes += _left_out(rows, system.module.spec.positions, plan)
            measured[system.name] = held_out.measure(system, rows, tokenizer, plan, kept, progress.begin)
            del system  # a whole base leaves the memory before the tuned model comes
    found = held_out.columns(rows, measured, plan)
    groups = [row.group for row in rows] if options.group_by else None
    tokens, labels = sum(sum(row.mask) for row in rows), held_out.confusions(rows, measured) if options.labels else None
    records = list(held_out.row_records(rows, measured, found))
    _tell(options, source, out, names, found, records, notes, began, groups=groups, tokens=tokens, labels=labels)


def _tell(
    options: SimpleNamespace,
    source: Any,
    out: Path | None,
    names: list[str],
    found: dict[str, Any],
    records: list[dict[str, Any]],
    notes: list[str],
    began: float,
    *,
    groups: list[str] | None,
    tokens: int,
    labels: dict[str, Any] | None,
) -> None:
    """Print what was found in the rows, and write it to eval.json and eval/rows.jsonl."""
    from jaxtune.evaluate import held_out
    from jaxtune.files import atomic_write_text

    report = {
        "target": str(options.target),
        "data": names,
        "rows": len(records),
        "tokens": tokens,
        "metrics": held_out.compare(found),
        "notes": notes + ([f"The base is in {q}, as it was in the run."] if (q := source.quantization) else []),
    }
    if groups is not None:
        report["groups"] = {"column": options.group_by} | held_out.compare_groups(found, groups)
    if labels is not None:
        report["labels"] = labels
    models = next(iter(found.values())).values
    report["samples"] = [_sample(record, models) for record in records[:MOST_SAMPLES]]
    report["seconds"] = round(time.time() - began, 2)
    _show(report)
    if out is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic_write_text(out / "eval" / "rows.jsonl", lines)
        _write(source, out, "held_out", report)


# --------------------------------------------------------------------------------------------------------- label heads


def _labelled(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    """Held-out rows of a model with a label head."""
    from jaxtune.config.recipe import max_length
    from jaxtune.evaluate import classifiers
    from jaxtune.evaluate.kept import Kept
    from jaxtune.evaluate.rows import data_names, group_values, tokenised
    from jaxtune.infer.source import tokenizer_of
    from jaxtune.train.runtime import prepare_jax

    for name in ("format", "metrics", "schema", "scorer", "labels", "max-new-tokens"):
        if getattr(options, name.replace("-", "_")) != FLAGS[name].default:
            raise UserError(f"--{name} has no effect on {source.model}, which has a label head.")
    began = time.time()
    cfg = _config(source)
    prepare_jax()
    tokenizer = tokenizer_of(source)
    heads, form = _heads(options, source, cfg)
    settings, sources, fraction = _sources(options, source, cfg)
    rows, lines = tokenised(
        tokenizer,
        sources,
        options.rows,
        eval_fraction=fraction,
        labels=form,
        max_length=max_length(settings, heads[0].module),
        overlength=settings.data.overlength,
        vocab_size=heads[0].module.spec.vocab,
        cache=settings.data.cache,
    )
    print(*lines, sep="\n")
    names, groups = data_names(sources), None
    if options.group_by:
        groups = group_values(rows, names, options.group_by)
    progress = Progress()
    with Kept(out and out / "eval" / "kept.jsonl") as kept, progress:
        said = {head.name: classifiers.classify(head, rows, form, kept, progress.begin) for head in heads}
    notes = [] if "base" in said or options.tuned_only else [NO_HEAD]
    notes += [sentence] if (sentence := classifiers.majority_baseline(rows, form)) else []
    found, labels = classifiers.columns(rows, said, form), classifiers.confusions(rows, said, form)
    records = classifiers.records(rows, said, form, tokenizer, groups)
    tokens = int(rows.length.sum())
    _tell(options, source, out, names, found, records, notes, began, groups=groups, tokens=tokens, labels=labels)


NO_HEAD = "The base has no head for these labels, so there is nothing to compare with."


def _heads(options: SimpleNamespace, source: Any, cfg: Any) -> tuple[list[Any], Any]:
    """The models that have a head for the labels, the tuned one last; and how rows for it are read."""
    import jax

    from jaxtune.config.recipe import compute_dtype
    from jaxtune.data import LabelForm
    from jaxtune.data.labels import JOINED
    from jaxtune.evaluate.kept import key_of
    from jaxtune.evaluate.systems import System, base_identity, identity
    from jaxtune.hf import load as hf
    from jaxtune.infer.source import open_source, same_base
    from jaxtune.models.classifier import PROBLEMS, TOKEN

    dtype = compute_dtype(cfg.model.dtype if cfg else "auto")
    if source.adapter is not None:
        module, tuned, _ = open_source(source, dtype=dtype)
        below = base_identity(source, dtype)
        heads = [System("tuned", module, tuned, key_of(below, identity(source.adapter)))]
        if not module.new_head and not options.tuned_only:
            with same_base(source):
                params = hf.read_params(module, source.model, key=jax.random.key(0), quantization=source.quantization)
            heads.insert(0, System("base", module, params, below))
    else:
        module, params = hf.load(source.model, dtype=dtype)
        name = "tuned" if source.run else "model"
        heads = [System(name, module, params, identity(source.model, str(dtype)))]
    given, labels = _columns(options.columns), module.labels
    form = LabelForm(
        per_token=labels.kind == TOKEN,
        names=labels.names,
        several=labels.problem == PROBLEMS[1],
        value=labels.problem == PROBLEMS[2],
        columns=given if given is not None else dict(cfg.data.columns) if cfg else {},
        origin="the model",
        first=cfg.objective.first_label if cfg else None,
        joined=None if module.is_encoder else JOINED,
    )
    return heads, form


def _config(source: Any) -> Any:
    """The resolved config of a run, or None."""
    from jaxtune import config

    if source.run is None:
        return None
    file = source.run / "config.json"
    return config.from_json(file.read_text(encoding="utf-8"), str(file))


def _own_metrics(options: SimpleNamespace) -> dict[str, Any]:
    """The metrics of --schema and --scorer."""
    from jaxtune.evaluate.metrics import load_scorer, schema_metric

    own = {"json_schema": schema_metric(options.schema.expanduser())} if options.schema else {}
    return own | dict(load_scorer(given) for given in options.scorer or ())


def _virtual(source: Any) -> int:
    """Positions that a soft prompt takes before each row."""
    from jaxtune.hf.peft import read_adapter_config

    return 0 if source.adapter is None else read_adapter_config(source.adapter).get("num_virtual_tokens") or 0


def _rows(options: SimpleNamespace, cfg: Any, source: Any, tokenizer: Any, virtual: int) -> tuple[list[Any], list[str]]:
    """The held-out rows, and the names of their sources."""
    from jaxtune import data, models
    from jaxtune.config.recipe import max_length
    from jaxtune.evaluate.rows import check_format, data_names, read_rows
    from jaxtune.hf.load import read_config

    settings, sources, fraction = _sources(options, source, cfg)
    module = models.build(read_config(source.model))
    given = _columns(options.columns)
    read_as = data.reading(settings.data)
    allowed = read_as.pop("allow_left_out")
    read_as["format"] = options.format or read_as["format"]
    if given is not None:
        read_as["columns"] = given
    if given is not None or options.format is not None:
        read_as["template"] = None
    if options.data and cfg is not None and given is None and options.format is None:
        chat = bool(tokenizer.chat_template) and read_as["template"] is None
        check_format(data_names(cfg.data.train)[0], data_names(sources), read_as | {"chat": chat})
    rows, lines = read_rows(
        tokenizer,
        sources,
        group_by=options.group_by,
        limit=options.rows,
        eval_fraction=fraction,
        max_length=max_length(settings, module) - virtual,
        overlength=settings.data.overlength,
        vocab_size=module.spec.vocab,
        cache=settings.data.cache,
        allow_left_out=allowed,
        **read_as,
    )
    print(*lines, sep="\n")
    return rows, data_names(sources)


def _sources(options: SimpleNamespace, source: Any, cfg: Any) -> tuple[Any, Any, float]:
    """(settings, sources, the share of them that is held out): --data, or what the run held out."""
    from jaxtune import config

    settings = cfg or config.resolve({}, {}, source="the defaults", required=())
    if options.data:
        return settings, options.data, 0.0
    if cfg is None:
        raise UserError(f"{options.target} is no run, so it has no data of its own; give --data=FILE.")
    if cfg.data.eval:
        return settings, cfg.data.eval, 0.0
    if not cfg.data.eval_fraction:
        raise UserError(f"The run in {source.run} held out no rows; give --data=FILE.")
    return settings, cfg.data.train, cfg.data.eval_fraction


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise UserError(f"--columns={text}: expected ours=theirs, several separated by commas.")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _plan(
    options: SimpleNamespace, rows: list[Any], own: dict[str, Any], eos_ids: tuple[int, ...], virtual: int
) -> Any:
    """What to measure on these rows."""
    from jaxtune.evaluate.held_out import LOSSES, Request, answer_length, label_names
    from jaxtune.evaluate.metrics import choose

    shared = {"batch_size": options.batch_size, "eos_ids": eos_ids, "virtual": virtual}
    references = [row.expected for row in rows if row.prompt]
    asked = options.metrics and [name.strip() for name in options.metrics.split(",") if name.strip()]
    named = None if asked is None else [name for name in asked if name not in LOSSES]
    if not references and (named or own or options.labels):
        raise UserError(
            f"{rows[0].where}: no row has a prompt and an answer to compare with, so there is only a loss; "
            "leave out --metrics, --schema, --scorer and --labels."
        )
    if options.labels:
        longest = max(map(len, label_names(rows).values()))
        return Request({}, labels=True, max_new_tokens=longest, **shared)
    metrics = choose(named, references) if references else {}
    return Request(metrics | own, max_new_tokens=options.max_new_tokens or answer_length(rows), **shared)


def _with_base(options: SimpleNamespace, source: Any, cfg: Any) -> tuple[bool, list[str]]:
    """Whether there is a base to compare with."""
    if cfg is not None and cfg.model.init == "random":
        return False, ["The run started from random weights: there is no base to compare with."]
    return not options.tuned_only, []


def _left_out(rows: list[Any], positions: int, plan: Any) -> list[str]:
    """A sentence on the rows for which nothing is generated."""
    from jaxtune.evaluate.held_out import answerable

    if not plan.metrics and not plan.labels:
        return []
    asked = len(answerable(rows, positions, plan))
    if not asked:
        raise UserError(
            f"No row has a prompt that leaves room for {plan.max_new_tokens} new tokens in the model's {positions:,} "
            "positions; lower --max-new-tokens."
        )
    without = len(rows) - asked
    why = f"no whole prompt, or no room for {plan.max_new_tokens} new tokens in the model's {positions:,} positions"
    return [f"{without:,} of {len(rows):,} rows have {why}; only their loss is counted."] if without else []


MOST_SAMPLES = 20


def _sample(record: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """A row as the page of a run shows it."""
    names = {"base": "before", "tuned": "after", "model": "after"}
    answers = {names[who]: record[who].get("answer", record[who].get("label")) for who in measured}
    kept = {key: record[key] for key in ("where", "prompt", "expected", "group") if key in record}
    return kept | {name: answer for name, answer in answers.items() if answer is not None}


def _write(source: Any, out: Path, part: str, report: dict[str, Any]) -> None:
    """Put a part into eval.json, with the step of the run; the other one stays."""
    from jaxtune.files import atomic_write_text
    from jaxtune.hf.tensors import read_json
    from jaxtune.train.log import read_metrics

    if source.run and (source.run / "metrics.jsonl").is_file():
        report |= {"step": max((m["step"] for m in read_metrics(source.run)), default=None)}
    file = out / "eval.json"
    whole = read_json(file) if file.is_file() else {}
    atomic_write_text(file, json.dumps(whole | {part: report}, indent=1, ensure_ascii=False) + "\n")


def _refresh(source: Any) -> None:
    """Write the page of the run and the card of its result again."""
    from jaxtune.report import write_report
    from jaxtune.report.card import carry_evaluation

    carry_evaluation(source.run, source.adapter or source.model)
    if (source.run / "metrics.jsonl").is_file():
        print(f"report: {write_report(source.run)}")


# -------------------------------------------------------------------------------------------------------- the terminal


class Progress:
    """A bar on a terminal; elsewhere a line at each tenth."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, transient=True) if self.console.is_terminal else None

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, what: str, total: int):
        """Return what is told how many more are done."""
        task = self.bar.add_task(what, total=total) if self.bar else None
        so_far = 0

        def done(count: int) -> None:
            nonlocal so_far
            before, so_far = so_far, so_far + count
            if self.bar:
                self.bar.advance(task, count)
            elif 10 * so_far // total > 10 * before // total:
                self.console.print(f"{what} {so_far:,}/{total:,}", markup=False)

        return done


def _show(report: dict[str, Any]) -> None:
    """Print the tables of the held-out rows."""
    from rich.console import Console
    from rich.table import Table

    from jaxtune.report.evaluation import difference, value, verdict, who

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    entries = report["metrics"]
    names = who(entries)
    table = Table(f"{report['rows']:,} held-out rows", *names, *(["difference", ""] if len(names) == 2 else []))
    for entry in entries.values():
        more = [difference(entry), verdict(entry)] if len(names) == 2 else []
        table.add_row(entry["label"], *(value(entry, name) for name in names), *more)
    console.print(table)
    groups = report.get("groups")
    if groups:
        for name, cells in groups["metrics"].items():
            table = Table(f"{entries[name]['label']} by {groups['column']}", "rows", *names, *[""] * (len(names) == 2))
            for group, cell in cells.items():
                more = [verdict(cell)] if len(names) == 2 else []
                table.add_row(group, f"{cell['rows']:,}", *(value(cell, who) for who in names), *more)
            console.print(table)
    for note in report["notes"]:
        console.print(note, markup=False)


# -------------------------------------------------------------------------------------- tasks of the evaluation harness


def _tasks(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    from jaxtune.config.recipe import compute_dtype
    from jaxtune.evaluate.harness import open_tasks, run_tasks
    from jaxtune.evaluate.systems import systems
    from jaxtune.infer.source import eos_ids, tokenizer_of
    from jaxtune.train.runtime import prepare_jax

    began = time.time()
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    manager = open_tasks(names, options.include_path)
    cfg = _config(source)
    prepare_jax()
    tokenizer = tokenizer_of(source)
    base, notes = _with_base(options, source, cfg)
    results = {}
    for system in systems(source, base=base, dtype=compute_dtype(cfg.model.dtype if cfg else "auto")):
        results[system.name] = run_tasks(
            system,
            tokenizer,
            names,
            manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            chat=options.chat,
            batch_size=options.batch_size,
            eos_ids=eos_ids(tokenizer, source),
        )
        del system
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    table = Table("task", "metric", *results)
    first = next(iter(results.values()))
    for task, values in first.items():
        for metric in values:
            table.add_row(task, metric, *(_with_error(results[who][task].get(metric)) for who in results))
    console.print(table)
    for note in notes:
        console.print(note, markup=False)
    report = {"target": str(options.target), "tasks": names, "results": results, "notes": notes}
    report |= {"limit": options.limit, "num_fewshot": options.num_fewshot, "chat": options.chat}
    if out is not None:
        _write(source, out, "tasks", report | {"seconds": round(time.time() - began, 2)})


def _with_error(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    error = entry.get("stderr")
    return f"{entry['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
