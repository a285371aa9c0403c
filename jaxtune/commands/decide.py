"""`jaxtune decide`: prompt or fine-tune? Both on the same held-out rows, with what they cost, and a decision."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxtune.errors import UserError
from jaxtune.flags import Flag, parse

USAGE = """usage: jaxtune decide --model=DIR_OR_ID --data=FILE [--workdir=DIR] [--prompt=FILE ...] [--price=PRICE]
       jaxtune decide --config=FILE.py [--config.section.key=value ...] [flags]

Would a better prompt have done? Prompts, prompts with examples, nearest training rows, and models tuned on three
numbers of rows answer the same held-out rows. Each has its score with a 95% interval, tokens and cost of requests, cost
of training, latency, and after how many requests its training is paid; with --forgetting, what tuning cost outside the
task. The answer is one sentence, decision.json, and a
page.

A config says how LoRA is tuned; without optim.lr three rates are tried. Rows are held out by --eval, or a part
of --data. The same command goes on with a decision that was killed.

candidates (default: those that apply): prompts, random, similar and balanced examples, labels (the likeliest of the
given labels), neighbours (a vote of the nearest rows), lora, head, soft-prompt.

A price has a unit: '0.2 USD per 1M tokens', '0.2 USD per 1M input tokens, 0.6 USD per 1M output tokens' or
'2.5 USD per hour'. Without one, costs are the seconds measured on this machine."""

FLAGS = {
    "model": Flag("model directory or hub id (model.path)"),
    "data": Flag("rows with answers, to tune on and to show as examples (data.train)"),
    "eval": Flag(
        "held-out rows (data.eval); default: a part of --data, for --rows or a third of it, or data.eval_fraction"
    ),
    "workdir": Flag("folder of the decision; default: runs/decide-NAME, after the data"),
    "prompt": Flag("a file with a prompt to put before the row's own, or around it as {input}; again for more", list),
    "shots": Flag("examples in a prompt", int, 4),
    "candidates": Flag("what to measure, separated by commas; default: all that apply"),
    "metric": Flag("as --metrics of jaxtune eval, from 0 to 1; default: json_exact, numeric or exact_match"),
    "rows": Flag("held-out rows to answer, at most", int, 200),
    "sizes": Flag("rows to tune LoRA on, separated by commas; default: a sixteenth, a quarter and all"),
    "price": Flag("of requests, with its unit"),
    "training-price": Flag("of training, with its unit; default: --price"),
    "worth": Flag("the gain in score, from 0 to 1, that is worth tuning", float, 0.02),
    "encoder": Flag("an encoder that finds similar rows; default: BM25, or the model itself if it is one"),
    "max-new-tokens": Flag("longest answer in tokens; default: 1.25 times the longest expected one", int),
    "batch-size": Flag("rows answered together", int, 32),
    "budget": Flag("minutes; candidates that would not fit are left out", float),
    "forgetting": Flag("general text, on which tuned models are measured, too; again for more files", list),
    "plan": Flag("check everything, show the plan, and stop", bool, False),
}
WIDE = 150  # columns of a terminal
ON_A_WIDE_TERMINAL = ("tokens a request", "latency", "rows needed", "general text", "front", "")
SHORT = {"model": "model.path", "data": "data.train", "eval": "data.eval"}


def main(argv: list[str]) -> None:
    argv = [_as_setting(token) for token in argv]
    cfg, options = parse(argv, FLAGS, usage=USAGE)
    asked = _options(options)
    from jaxtune.files import exclusive

    out = Path(options.workdir or f"runs/decide-{Path(str(cfg.data.train[0])).stem}").expanduser()
    if options.plan:
        from jaxtune.decide.run import Decision

        Decision(cfg, asked, out, _say).show_plan()
        return
    from jaxtune.decide.run import decide
    from jaxtune.run.workdir import check_is_ours, explained_disk

    check_is_ours(out, "candidates.jsonl")
    with exclusive(out), explained_disk(out, "What is finished is kept."):
        report = decide(cfg, out, asked, _say)
    _show(report)
    print(f"\n{report['sentence']}\nwritten: {out / 'decision.json'}\nreport: {out / 'decision.html'}")


def _as_setting(token: str) -> str:
    """--model=X is --config.model.path=X."""
    name, equals, value = token.partition("=")
    return f"--config.{SHORT[name[2:]]}={value}" if equals and name[2:] in SHORT and name.startswith("--") else token


def _options(options: SimpleNamespace) -> Any:
    """The flags as `jaxtune.decide.run.Options`."""
    from jaxtune.decide.price import SECONDS, parse_price
    from jaxtune.decide.run import Options

    for name in SHORT:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} needs an equals sign: --{name}={getattr(options, name)}")
    for name, least in (("shots", 0), ("rows", 2), ("batch-size", 1), ("max-new-tokens", 1), ("budget", 0)):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < least:
            raise UserError(f"--{name}={value:g}: expected {least} or more.")
    if not 0 <= options.worth < 1:
        raise UserError(f"--worth={options.worth:g}: expected a share of the score from 0 to below 1, such as 0.02.")
    price = parse_price(options.price) if options.price else SECONDS
    training = parse_price(options.training_price, "--training-price") if options.training_price else None
    if training is not None and training.unit != price.unit:
        raise UserError(f"--training-price is in {training.unit} and --price in {price.unit}; give both in one unit.")
    return Options(
        prompts=[Path(file).expanduser() for file in options.prompt or ()],
        shots=options.shots,
        candidates=_names(options.candidates),
        metric=options.metric,
        rows=options.rows,
        sizes=_sizes(options.sizes),
        price=price,
        training_price=training,
        worth=options.worth,
        encoder=options.encoder and Path(options.encoder).expanduser(),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        budget=None if options.budget is None else 60 * options.budget,
        forgetting=tuple(options.forgetting or ()),
    )


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--sizes={text}: expected numbers of rows separated by commas, such as 100,400,1600."
        ) from None


def _say(line: str) -> None:
    from jaxtune.errors import printable

    print(printable(line), flush=True)


def _show(report: dict[str, Any]) -> None:
    """Print the matrix."""
    from rich.console import Console
    from rich.table import Table

    from jaxtune.report.decision import curve_lines, matrix

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    heads, rows = matrix(report)
    wide = console.width >= WIDE
    shown = [i for i, head in enumerate(heads) if wide or head not in ON_A_WIDE_TERMINAL]
    table = Table(*(heads[i] for i in shown))
    for row in rows:
        cells = [row.name, *(c if isinstance(c, str) else c[1] for c in row.cells)]
        table.add_row(*(cells[i] for i in shown))
    console.print(table)
    for line in (*curve_lines(report.get("curve")), *report["notes"]):
        console.print(line, markup=False)
