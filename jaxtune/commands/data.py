"""`jaxtune data`: what training would read, and what is wrong with it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.errors import UserError
from jaxtune.flags import Flag, parse

if TYPE_CHECKING:
    from jaxtune.curate import DataReport

USAGE = """usage: jaxtune data --config=FILE.py [--config.section.key=value ...] [--strict] [--write-clean=FILE.jsonl]
       jaxtune data --config=FILE.py --known [--prompt=FILE] [--write-clean=FILE.jsonl --most-unknown=0.05]
       jaxtune data --config=FILE.py --mine-negatives=FILE.jsonl [--negatives=4] [--margin=0.05]

Read the data of a config as training does, and report on it: lengths, tokens, duplicates, overlap of training and
evaluation, contradictions, balance, characters, roles and templates, with example rows and what to do. Reads the
model's config.json and tokenizer; neither weights nor a GPU are needed.

With --known the base answers the training rows behind examples from the data, greedily and by samples, and each row is
sorted into HighlyKnown, MaybeKnown, WeaklyKnown or Unknown (arXiv:2405.05904), held-out rows beside them. known.jsonl
and known_held_out.jsonl in --workdir have the rows with a column known, by which a run can score its answers at every
evaluation: --config.evaluate.known=known.jsonl,known_held_out.jsonl.

With --mine-negatives the model of a config for pairs of texts (objective.name=embedding) finds hard negatives for each,
and writes the training rows with them to a file that trains.

Exit status: 0 the report was made; 2 the input is wrong, or, with --strict, a finding is an error or a warning."""

FLAGS = {
    "workdir": Flag("where data_report.json is written", Path),
    "strict": Flag("exit with status 2 if there are errors or warnings", bool, False),
    "write-clean": Flag("a .jsonl file to write the training rows to, without those that findings remove", Path),
    "drop-near": Flag("with --write-clean: leave out near duplicates, too", bool, False),
    "near": Flag("similarity of near duplicates, from 0 to 1; 0: do not look for them", float, 0.8),
    "known": Flag("sort training rows by whether the base knows their answers", bool, False),
    "known-rows": Flag(
        "with --known: rows of either kind, drawn by content; default: 500, with --most-unknown all", int
    ),
    "shots": Flag("with --known: examples before a question", int, 4),
    "prompt": Flag("with --known: a file with a prompt before the question, or around it as {input}", Path),
    "most-unknown": Flag("with --known and --write-clean: the largest share of Unknown rows to keep; 0: none", float),
    "mine-negatives": Flag("a .jsonl file to write the training pairs to, with hard negatives", Path),
    "negatives": Flag("with --mine-negatives: how many a row, at most", int, 4),
    "margin": Flag(
        "with --mine-negatives: they are less alike than the positive by this share of its cosine", float, 0.05
    ),
    "rows": Flag("rows to show with their trained tokens coloured", int, 3),
}
REPORT = "data_report.json"


def main(argv: list[str]) -> None:
    cfg, options = parse(argv, FLAGS, usage=USAGE)
    if not 0 <= options.near <= 1:
        raise UserError(f"--near={options.near:g}: expected a similarity from 0 to 1")
    if options.rows < 0:
        raise UserError(f"--rows={options.rows}: expected 0 or more")
    if options.drop_near and not (options.write_clean and options.near):
        raise UserError("--drop-near has no effect without --write-clean=FILE.jsonl, or with --near=0: leave it out.")
    _check_known(options)
    _check_mining(options)
    if options.write_clean:
        from jaxtune.curate.clean import targets

        targets(options.write_clean, len(cfg.data.train))
    from rich.console import Console

    console = Console(emoji=False)
    report = examine(cfg, near=options.near, samples=options.rows)
    if options.known:
        _know(report, cfg, options)
    report.print(console)
    if options.workdir:
        from jaxtune.files import atomic_write_text

        options.workdir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(options.workdir / REPORT, json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
        console.print(f"written: {options.workdir / REPORT}", highlight=False)
    if options.write_clean:
        _write_clean(report, options.write_clean, options.drop_near, console)
    if options.mine_negatives:
        from jaxtune.run.mining import mine_negatives

        with Console(stderr=True).status("finding negatives"):
            said = mine_negatives(cfg, options.mine_negatives, options.negatives, options.margin)
        for line in [*said, f"use it: --config.data.train={options.mine_negatives}"]:
            console.print(line, highlight=False, soft_wrap=True)
    errors, warnings = report.count("error"), report.count("warning")
    if options.strict and errors + warnings:
        raise UserError(f"--strict: the data has {errors} errors and {warnings} warnings, shown above.")


def _check_known(options: Any) -> None:
    for name in ("known-rows", "prompt", "most-unknown", "shots"):
        if not options.known and getattr(options, name.replace("-", "_")) != FLAGS[name].default:
            raise UserError(f"--{name} has no effect without --known; leave it out.")
    most = options.most_unknown
    if most is not None and not (0 <= most < 1 and options.write_clean):
        raise UserError(f"--most-unknown={most:g}: expected a share from 0 to below 1, with --write-clean=FILE.jsonl.")
    if options.shots < 0 or (options.known_rows is not None and options.known_rows < 1):
        raise UserError("--shots is 0 or more, and --known-rows 1 or more.")


def _check_mining(options: Any) -> None:
    file = options.mine_negatives
    for name in ("negatives", "margin"):
        if not file and getattr(options, name) != FLAGS[name].default:
            raise UserError(f"--{name} has no effect without --mine-negatives; leave it out.")
    if not file:
        return
    from jaxtune.files import refuse_existing

    if file.suffix != ".jsonl":
        raise UserError(f"--mine-negatives={file}: expected a file that ends in .jsonl.")
    refuse_existing(file)
    if options.negatives < 1 or not 0 <= options.margin < 1:
        raise UserError("--negatives is 1 or more, and --margin from 0 to below 1.")


def _know(report: "DataReport", cfg: Any, options: Any) -> None:
    """Add what the base knows to a report, and write the rows with their classes."""
    from rich.console import Console

    from jaxtune.curate.finding import SEVERITIES
    from jaxtune.run.known import know

    with Console(stderr=True).status("asking the base") as status:
        found = know(
            cfg,
            report.ledger,
            rows=options.known_rows or (None if options.most_unknown is not None else 500),
            shots=options.shots,
            prompt=options.prompt,
            most_unknown=options.most_unknown,
            progress=lambda done, total: status.update(f"asking the base: {done:,} of {total:,} rows"),
        )
    report.findings.append(found.finding)
    report.findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    report.summary["known"] = found.shares
    if options.workdir:
        from jaxtune.files import atomic_write_text

        options.workdir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(options.workdir / "known.jsonl", found.train)
        held_out = options.workdir / "known_held_out.jsonl"
        if found.held_out:
            atomic_write_text(held_out, found.held_out)
        else:
            held_out.unlink(missing_ok=True)  # of other rows


def examine(cfg: Any, *, near: float = 0.8, samples: int = 3) -> "DataReport":
    """Examine the data of a config."""
    from rich.console import Console

    from jaxtune import curate, data
    from jaxtune.config.recipe import open_model
    from jaxtune.objectives.task import row_length

    module, task = open_model(cfg)
    tokenizer = data.load_tokenizer(
        cfg.model.tokenizer, cfg.model.chat_template, cfg.data.date, cfg.model.new_tokens or ()
    )
    d = cfg.data
    with Console(stderr=True).status("reading") as status:
        return curate.examine(
            tokenizer,
            d.train,
            eval=d.eval,
            eval_fraction=d.eval_fraction,
            **data.reading(d),
            labels=task.form,
            max_length=row_length(cfg.data.max_length, module, task.length),
            overlength=d.overlength,
            packing=d.packing,
            rows_a_batch=cfg.train.batch_size,
            group_by_length=d.group_by_length,
            positions=module.spec.positions,
            vocab_size=module.spec.vocab,
            near=near,
            samples=samples,
            progress=lambda rows: status.update(f"reading: {rows:,} rows"),
        )


def _write_clean(report: "DataReport", out: Path, near: bool, console: Any) -> None:
    from jaxtune.curate import write_clean

    files, log, kept, removed = write_clean(report, out, near)
    console.print(
        f"written: {', '.join(map(str, files))} ({kept:,} rows); {log} ({removed:,} rows removed, and why)\n"
        f"use it: --config.data.train={','.join(map(str, files))}",
        highlight=False,
        soft_wrap=True,
    )
