"""`jaxtune eval`: measure a run against its base on held-out rows, or with tasks of lm-evaluation-harness."""

import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtune.errors import UserError
from jaxtune.flags import OF_ADAPTERS, Flag, parse_options

USAGE = """usage: jaxtune eval TARGET [--data=FILE ...] [--metrics=a,b] [--group-by=COLUMN] [flags]
       jaxtune eval TARGET --forgetting[=FILE ...] [--group-by=COLUMN] [flags]
       jaxtune eval TARGET --frontier[=FILE ...] [--keep=0.9] [--within=NATS] [flags]
       jaxtune eval TARGET --memory [flags]
       jaxtune eval TARGET --confidence [--samples=4] [--unanswerable=COLUMN | --unpaired=COLUMN] [flags]
       jaxtune eval TARGET --tasks=a,b [--include-path=DIR] [flags]

Held-out rows: loss and perplexity, and scores of generated answers, of the base and of the tuned model, with 95%
bootstrap intervals and a paired test with the verdict better, worse or no evidence. A run knows its base, data,
template and columns; its eval.json, report.html and model card are updated. The same command resumes an evaluation
that was killed.

With --forgetting: the same on text outside the tuning data, by domain; how far the tuned model is from the base, and
the answers that flipped from right to wrong and back. Without a file: the held-out part of mixed-in sources.

With --frontier: loss on the task and on that text at strengths 0, 0.1 ... 1.2 of the tuning, and the one that keeps
most of the gain and forgets least, for jaxtune export --scale. The gain is that in scored answers where those got
better, else in loss; --metrics=NAME says in which, --metrics=loss in loss.

With --memory: whether training rows were memorised: their losses against those of held-out rows, what goes on word for
word from its first 32 tokens, and the exposure of canaries (data.canaries).

With --confidence: how sure answers are, by the probability of their tokens and by samples that agree: calibration, the
risk that remains where only the surest answers are given, wrong and confident answers, words that the prompt does not
have, and, with --unanswerable, how often a question without an answer gets none. --unpaired makes such questions: each
is also asked beside the context of another row.

With --tasks: tasks of lm-evaluation-harness (pip install 'jaxtune[eval]').

metrics: exact_match, token_f1, rouge_l, numeric (the number after ####, or the last), json_valid, json_exact,
json_fields; loss alone generates nothing. Default: those that fit the expected answers. --schema and --scorer add
more."""

ARGUMENTS = {"target": Flag("run directory, adapter directory, model directory or hub id", required=True)}
FLAGS = {
    "data": Flag("rows to evaluate on; give it again for more files. Default: what the run held out", list),
    "format": Flag("how --data is read; default: as the run's data, else by its columns"),
    "columns": Flag("columns of --data, as data.columns: prompt=question,...; default: the run's"),
    "metrics": Flag("names, separated by commas"),
    "schema": Flag("JSON schema that answers should conform to", Path),
    "scorer": Flag("FILE.py:FUNCTION, (prediction, reference) -> number or None; or reward:DIR, a reward model", list),
    "labels": Flag("answers are labels: score each one; accuracy, macro-F1, calibration, confusion", bool, False),
    "group-by": Flag("a column of the rows: measure each of its values apart, too"),
    "rows": Flag("how many rows to use, drawn by a hash of their content; default: all", int),
    "max-new-tokens": Flag("longest answer in tokens; default: 1.25 times the longest expected one", int),
    "batch-size": Flag("prompts answered together", int, 32),
    "tuned-only": Flag("leave the base out", bool, False),
    "forgetting": Flag("text or tasks outside the tuning data; again for more files", list, bare=""),
    "frontier": Flag("the same text, at all strengths of the tuning; again for more files", list, bare=""),
    "keep": Flag("with --frontier: the share of the task's gain to keep at least", float, 0.9),
    "within": Flag("with --frontier: nats a token that general text may lose; default: any", float),
    "memory": Flag("whether the run memorised its training rows", bool, False),
    "confidence": Flag("how sure answers are, and whether rightly", bool, False),
    "samples": Flag("with --confidence: answers that are drawn beside the greedy one", int, 4),
    "unanswerable": Flag("with --confidence: a column that is true where a question has no answer"),
    "unpaired": Flag("with --confidence: a column with contexts: each question also beside another row's"),
    "abstain": Flag("with --confidence: a text by which a model abstains; again for more", list),
    "tasks": Flag("tasks of lm-evaluation-harness, separated by commas"),
    "include-path": Flag("folder with YAML tasks of your own; then only those are known", Path),
    "limit": Flag("at most so many documents of a task", int),
    "num-fewshot": Flag("examples in a task's prompt; default: the task's", int),
    "chat": Flag("render a task's prompts with the chat template", bool, False),
    **OF_ADAPTERS,
    "out": Flag("directory for eval.json and answers; default: the run's", Path),
}
OF_TASKS = ("include-path", "limit", "num-fewshot", "chat")
OF_ONE_TEXT = ("tasks", "forgetting", "frontier", "memory", "unpaired")  # not of a source and a target
OF_ROWS = (
    "forgetting",
    "data",
    "format",
    "columns",
    "metrics",
    "schema",
    "scorer",
    "labels",
    "group-by",
    "rows",
    "max-new-tokens",
)


def main(argv: list[str]) -> None:
    options = parse_options(argv, FLAGS, ARGUMENTS, usage=USAGE)
    _check_flags(options)
    from jaxtune.files import exclusive
    from jaxtune.hf import tensors
    from jaxtune.infer.source import check_reads_one_text, find
    from jaxtune.run.workdir import explained_disk

    source = find(options.target, options.base, any_base=options.allow_other_base)
    tensors.index_dir(source.model)  # missing weights are named before anything is read
    for name in OF_ONE_TEXT:
        if getattr(options, name):
            check_reads_one_text(source.model, f"--{name}")
    out = options.out.expanduser() if options.out else source.run
    with ExitStack() as stack:
        if out is not None:
            stack.enter_context(exclusive(out / "eval"))
            stack.enter_context(explained_disk(out, "What was measured is kept."))
        _what(options)(options, source, out)
        if out is not None:
            print(f"written: {out / 'eval.json'}")
        if out is not None and out == source.run:
            _refresh(source)


def _check_flags(options: SimpleNamespace) -> None:
    other, why = (OF_ROWS, "has no effect with --tasks") if options.tasks else (OF_TASKS, "needs --tasks")
    for name in other:
        if getattr(options, name.replace("-", "_")) != FLAGS[name].default:
            raise UserError(f"--{name} {why}.")
    for name in ("rows", "max-new-tokens", "batch-size", "limit"):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: expected 1 or more.")
    for part in ("frontier", "memory"):
        if not getattr(options, part):
            continue
        others = ("confidence", "forgetting", "memory", "schema", "group-by")
        of_answers = ("frontier", "metrics", "scorer", "labels", "max-new-tokens")
        for name in others if part == "frontier" else (*others, *of_answers):
            if name != part and getattr(options, name.replace("-", "_")) != FLAGS[name].default:
                raise UserError(f"--{name} has no effect with --{part}; leave one of them out.")
    for name in ("samples", "unanswerable", "unpaired", "abstain"):
        if not options.confidence and getattr(options, name) != FLAGS[name].default:
            raise UserError(f"--{name} has no effect without --confidence; give it, too.")
    if options.unpaired and options.unanswerable:
        raise UserError("--unpaired makes questions without an answer, and --unanswerable names them: leave one out.")
    if options.samples < 0:
        raise UserError(f"--samples={options.samples}: expected 0 or more.")
    if options.confidence and options.forgetting:
        raise UserError("--confidence and --forgetting measure different things: leave one of them out.")
    if not options.frontier and (options.keep, options.within) != (FLAGS["keep"].default, None):
        raise UserError("--keep and --within choose among the strengths of --frontier; give it, too.")
    if options.frontier and options.tuned_only:
        raise UserError("--frontier begins with the base: leave out --tuned-only.")
    if options.forgetting and options.data:
        raise UserError("--data has no effect with --forgetting: name the general text as --forgetting=FILE.")
    if options.forgetting and options.tuned_only:
        raise UserError("--forgetting compares with the base: leave out --tuned-only.")
    if options.labels and (options.metrics or options.schema or options.scorer):
        raise UserError("--labels scores labels and generates nothing: leave out --metrics, --schema and --scorer.")


def _what(options: SimpleNamespace) -> Any:
    """The function that measures what was asked for."""
    if options.tasks:
        return _tasks
    return _frontier if options.frontier else _memory if options.memory else _rows


def _rows(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    from jaxtune.evaluate.evaluation import HELD_OUT, Options, evaluate
    from jaxtune.evaluate.forgetting import FORGETTING

    general = options.forgetting and [file for file in options.forgetting if file]
    part = _confidence(options) if options.confidence else HELD_OUT if general is None else FORGETTING
    asked = Options(
        data=options.data if general is None else general,
        format=options.format,
        columns=_columns(options.columns),
        metrics=options.metrics and _names(options.metrics),
        schema=options.schema and options.schema.expanduser(),
        scorer=tuple(options.scorer or ()),
        labels=options.labels,
        group_by=options.group_by,
        rows=options.rows,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        base=not options.tuned_only,
    )
    if options.unpaired:
        asked = _unpaired(source, asked, options.unpaired, out)
    with Progress() as progress:
        report = evaluate(source, asked, out, part=part, progress=progress.begin)
    _show(report, "general" if part is FORGETTING else "held-out")


def _confidence(options: SimpleNamespace) -> Any:
    from jaxtune.evaluate.confidence import ABSTENTIONS, Asking, confidence_part
    from jaxtune.evaluate.unpaired import COLUMN

    phrases = tuple(options.abstain or ABSTENTIONS)
    unanswerable = COLUMN if options.unpaired else options.unanswerable
    return confidence_part(Asking(options.samples, unanswerable=unanswerable, phrases=phrases))


def _unpaired(source: Any, asked: Any, column: str, out: Path | None) -> Any:
    from jaxtune.evaluate.evaluation import run_config
    from jaxtune.evaluate.unpaired import write_unpaired
    from jaxtune.infer.source import tokenizer_of

    if out is None:
        raise UserError("--unpaired writes the questions that it makes: give --out=DIR.")
    file = out / "eval" / "unpaired.jsonl"
    return write_unpaired(source, run_config(source), tokenizer_of(source), asked, column, file)


def _frontier(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxtune.evaluate.evaluation import Options
    from jaxtune.evaluate.frontier import frontier
    from jaxtune.report.evaluation import strengths

    asked = Options(
        data=options.data,
        format=options.format,
        columns=_columns(options.columns),
        metrics=options.metrics and _names(options.metrics),
        scorer=tuple(options.scorer or ()),
        labels=options.labels,
        rows=options.rows,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    files = [file for file in options.frontier if file] or None
    with Progress() as progress:
        report = frontier(source, asked, files, out, keep=options.keep, within=options.within, progress=progress.begin)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    found = strengths(report)
    table = Table(found.title, *found.heads)
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    for line in (report["why"], *report["notes"]):
        console.print(line, markup=False)
    if report["chosen"] is not None and source.run:
        print(f"export it:\n  jaxtune export {source.run} OUT --scale={report['chosen']:g}")


def _memory(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxtune.evaluate.evaluation import Options
    from jaxtune.evaluate.memory import memory
    from jaxtune.report.evaluation import memory_tables

    asked = Options(
        data=options.data,
        format=options.format,
        columns=_columns(options.columns),
        rows=options.rows,
        batch_size=options.batch_size,
        base=not options.tuned_only,
    )
    with Progress() as progress:
        report = memory(source, asked, out, progress=progress.begin)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    for table in memory_tables(report):
        shown = Table(table.title, *table.heads)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in (report["why"], *report["notes"]):
        console.print(line, markup=False)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise UserError(f"--columns={text}: expected ours=theirs, several separated by commas.")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _refresh(source: Any) -> None:
    """Write the run's page and its result's model card again."""
    from jaxtune.report import write_report
    from jaxtune.report.card import carry_evaluation
    from jaxtune.report.verdict import keep_verdict

    if (source.run / "metrics.jsonl").is_file():
        keep_verdict(source.run)
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
        """Return a function to call with the number of items done since its last call."""
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


def _show(report: dict[str, Any], rows: str = "held-out") -> None:
    """Print the tables of the rows, which are what `rows` says."""
    from rich.console import Console
    from rich.table import Table

    from jaxtune.report.evaluation import difference, gaps, value, verdict, who

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    entries = report["metrics"]
    names = who(entries)
    table = Table(f"{report['rows']:,} {rows} rows", *names, *(["difference", ""] if len(names) == 2 else []))
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
        for line in gaps(report):
            console.print(line, markup=False)
    if flips := report.get("flips"):
        table = Table("answers that flipped", "rows", "right to wrong", "wrong to right", "")
        for entry in flips.values():
            counts = (f"{entry[key]:,}" for key in ("rows", "lost", "gained"))
            table.add_row(entry["label"], *counts, verdict(entry))
        console.print(table)
    for note in report["notes"]:
        console.print(note, markup=False)


# -------------------------------------------------------------------------------------- tasks of the evaluation harness


def _tasks(options: SimpleNamespace, source: Any, out: Path | None) -> None:
    from jaxtune.evaluate.evaluation import Options, base_to_compare, dtype_of, last_step, run_config, write_part
    from jaxtune.evaluate.harness import open_tasks, run_tasks
    from jaxtune.evaluate.systems import systems
    from jaxtune.infer.source import check_continues, eos_ids, tokenizer_of
    from jaxtune.train.runtime import prepare_jax

    began, step = time.time(), last_step(source)
    check_continues(source)
    names = _names(options.tasks)
    manager = open_tasks(names, options.include_path)
    cfg = run_config(source)
    prepare_jax()
    tokenizer = tokenizer_of(source)
    base, notes = base_to_compare(cfg, Options(base=not options.tuned_only))
    results = {}
    for system in systems(source, base=base, dtype=dtype_of(cfg)):
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
        write_part(source, out, "tasks", report | {"seconds": round(time.time() - began, 2)}, step)


def _with_error(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    error = entry.get("stderr")
    return f"{entry['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
